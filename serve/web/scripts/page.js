// The web page: choose drawings and a reference, watch the coloring. results.js shows, edits and saves what is made.

import {colorize} from "./colorize.js";
import {$, element, say, show} from "./dom.js";
import {fetch_with_key, on_key} from "./key.js";
import {add, present, present_last, reveal, seed_of_shown, set_sketch, set_stage, set_up_saving, show_list} from "./results.js";

const KINDS = ["sketch", "reference"];
const FIELDS = ["style", "background", "num_inference_steps", "guidance_scale", "seed", "sampler"];
const MAX_MIB = 30;
const MAX_SKETCHES = 50;
const files = {sketch: [], reference: []};
const urls = {sketch: "", reference: ""};
let target = "sketch", running = null;

const name_of = file => file.name || "A pasted picture";

function fail(text, fields = []) {
  $("error").textContent = text;
  show("error", Boolean(text));
  for (const field of [...KINDS, ...FIELDS]) {
    if (fields.includes(field)) $(field).setAttribute("aria-invalid", "true");
    else $(field).removeAttribute("aria-invalid");
  }
  if (fields.some(field => $("advanced").contains($(field)))) $("advanced").open = true;
}

// --- the inputs -----------------------------------------------------------------------------------------------------

/** Use these files: several drawings, or one reference. */
function choose(kind, list) {
  const chosen = [...list].slice(0, kind === "sketch" ? MAX_SKETCHES : 1);
  if (!chosen.length) return;
  const wrong = chosen.map(file => what_is_wrong(kind, file)).find(Boolean);
  if (wrong) return fail(wrong);
  fail(list.length > MAX_SKETCHES ? `Only the first ${MAX_SKETCHES} of ${list.length} drawings are used.` : "");
  files[kind] = chosen;
  fill_zone(kind, chosen);
  for (const button of document.querySelectorAll(`#${kind}-examples button`))
    button.setAttribute("aria-pressed", String(button.dataset.name === chosen[0].name));
  const missing = KINDS.find(one => !files[one].length);
  set_button();
  if (!running) $("note").textContent = missing ? `Now choose ${missing === "sketch" ? "your line art" : "where the colors come from"}.` : "Ready.";
  say(`${chosen.length > 1 ? `${chosen.length} drawings` : name_of(chosen[0])} chosen. ${running ? "" : $("note").textContent}`);
}

function what_is_wrong(kind, file) {
  const type = file.type || `image/${file.name.split(".").pop().toLowerCase().replace("jpg", "jpeg")}`;
  if (!/^image\/(png|jpeg|webp)$/.test(type)) return `${file.name || "This"} is not a PNG, JPEG or WebP image.`;
  const others = files[kind === "sketch" ? "reference" : "sketch"].map(other => other.size);
  return file.size + Math.max(0, ...others) > MAX_MIB * 2 ** 20 && `${name_of(file)} is too large: drawing and reference may have ${MAX_MIB} MB together.`;
}

function fill_zone(kind, [file, ...more]) {
  URL.revokeObjectURL(urls[kind]);
  urls[kind] = URL.createObjectURL(file);
  const image = element("img", {src: urls[kind], alt: `Chosen: ${file.name || "pasted picture"}${more.length ? ` and ${more.length} more` : ""}`});
  image.onerror = () => { image.alt = `${file.name}: no preview`; };
  $(kind).replaceChildren(image, element("span", {className: "change", textContent: "change"}));
  if (more.length) $(kind).append(element("span", {className: "count", textContent: `${more.length + 1} drawings`}));
  $(kind).classList.add("full");
}

/** Use files that were not given to one of the zones: two files at the beginning are a drawing and its reference. */
function choose_any(list) {
  const empty = KINDS.filter(kind => !files[kind].length);
  if (list.length === 2 && empty.length === 2) [...list].forEach((file, number) => choose(KINDS[number], [file]));
  else choose(empty[0] || "sketch", list);
}

for (const kind of KINDS) {
  const drop = $(kind);
  drop.onclick = () => {
    target = kind;
    Object.assign($("file"), {value: "", multiple: kind === "sketch"});
    $("file").click();
  };
  drop.ondragover = () => drop.classList.add("over");
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = event => {
    event.preventDefault();
    event.stopPropagation();
    drop.classList.remove("over");
    choose(kind, event.dataTransfer.files);
  };
}
$("file").onchange = () => choose(target, $("file").files);
window.addEventListener("dragover", event => event.preventDefault());
window.addEventListener("drop", event => { event.preventDefault(); choose_any(event.dataTransfer.files); });
window.addEventListener("paste", event => {
  const focused = document.activeElement?.id;
  if (KINDS.includes(focused)) choose(focused, event.clipboardData.files);
  else choose_any(event.clipboardData.files);
});

async function load_examples() {
  const {examples} = await (await fetch("examples")).json();
  for (const name of examples) {
    const kind = name.split("_")[0];
    const image = element("img", {src: `examples/${name}`, alt: `Example ${kind === "sketch" ? "drawing" : "colors"} ${name.match(/\d+/)[0]}`});
    const button = element("button", {type: "button", "aria-pressed": "false"}, image);
    button.dataset.name = name;
    button.onclick = async () => {
      try {
        choose(kind, [new File([await (await fetch(image.src)).blob()], name, {type: "image/png"})]);
      } catch { fail("The server cannot be reached."); }
    };
    $(`${kind}-examples`).append(button);
  }
}

async function invert(file) {
  const image = await createImageBitmap(file), canvas = element("canvas", {width: image.width, height: image.height});
  const draw = canvas.getContext("2d");
  draw.drawImage(image, 0, 0);
  draw.globalCompositeOperation = "difference";
  draw.fillStyle = "#fff";
  draw.fillRect(0, 0, image.width, image.height);
  canvas.toBlob(blob => choose("sketch", [new File([blob], `${file.name.replace(/\.[^.]*$/, "")}.png`, {type: "image/png"})]));
}

// --- coloring -------------------------------------------------------------------------------------------------------

function form_data(sketch, extra) {
  const data = new FormData();
  data.append("sketch", sketch);
  data.append("reference", files.reference[0]);
  for (const field of FIELDS) if ($(field).value !== "" && !$(field).disabled) data.append(field, $(field).value);
  for (const [field, value] of Object.entries(extra)) data.set(field, value);
  data.set("output", "layers");
  return data;
}

function progress(part, text) {
  show("bar", part !== null);
  if (part === null) return;
  $("bar").firstElementChild.style.width = `${Math.round(100 * part)}%`;
  $("bar").setAttribute("aria-valuenow", Math.round(100 * part));
  $("bar").setAttribute("aria-valuetext", text);
  $("note").textContent = text;
}

function set_button() {
  const number = files.sketch.length;
  $("go").textContent = running ? "Stop" : number > 1 ? `Color ${number} drawings` : "Color it";
  $("go").disabled = !running && KINDS.some(kind => !files[kind].length);
}

function set_running(controller) {
  running = controller;
  set_button();
  $("again").disabled = Boolean(controller);
  $("pictures").inert = Boolean(controller);
  $("stage").setAttribute("aria-busy", String(Boolean(controller)));
}

/** Color all chosen drawings, one after the other; one that cannot be colored does not end the others. */
async function color(extra = {}) {
  fail("");
  const sketches = files.sketch, controller = new AbortController(), done = [], failed = [];
  set_running(controller);
  say("Coloring.");
  try {
    for (const [number, sketch] of sketches.entries()) {
      const part = {number, count: sketches.length};
      try {
        done.push(await color_one(form_data(sketch, extra), part, controller.signal));
      } catch (error) {
        if (sketches.length === 1 || !error.fields?.includes("sketch")) throw error;
        failed.push(`${name_of(sketch)}: ${error.message}`);
      }
    }
    if (failed.length) fail(`${done.length} of ${sketches.length} drawings are colored. ${failed.join(" ")}`);
    if (done.length) await finish(done[0]);
    else await present_again();
  } catch (error) {
    if (done.length) await present(done[0]);
    await end_badly(error);
  } finally {
    show("wait", false);
    progress(null);
    set_running(null);
  }
}

async function color_one(form, {number, count}, signal) {
  const started = performance.now(), url = URL.createObjectURL(form.get("sketch"));
  const words = text => count > 1 ? `Drawing ${number + 1} of ${count}: ${text.toLowerCase()}` : text;
  set_stage("drawing");
  progress((number + 0.04) / count, words("Sending..."));
  await set_sketch(url);
  if (!number) $("stage").scrollIntoView({block: "nearest"});
  const on_progress = ({step, total, preview}) => {
    $("preview").src = preview;
    show("preview", true);
    progress((number + step / (total + 0.5)) / count, words(`Step ${step} of ${total}`));
  };
  try {
    const answer = await colorize(form, {signal, on_progress, on_wait: show_wait});
    const one = await add(answer, form, (performance.now() - started) / 1000);
    if (count > 1) show_list();
    return one;
  } finally {
    URL.revokeObjectURL(url);
  }
}

async function finish(one) {
  await present(one);
  reveal();
  say(`Done. ${$("note").textContent}`);
}

async function present_again() {
  if (!await present_last()) set_stage("hint");
}

function show_wait(seconds, problem) {
  $("wait").textContent = `${problem.message} Trying again ${seconds ? `in ${seconds} s` : "now"}.`;
  show("wait", seconds > 0);
  if (seconds === problem.wait) say($("wait").textContent);
}

async function end_badly(error) {
  await present_again();
  const stopped = error.name === "AbortError";
  $("note").textContent = stopped ? "Stopped." : "";
  if (stopped) return say("Stopped.");
  fail(error.message, error.fields);
  if (files.sketch.length === 1 && error.fields?.includes("sketch") && /black/.test(error.message)) {
    const [file] = files.sketch;
    $("error").append(element("br"), element("button", {type: "button", className: "button", textContent: "Invert it for me", onclick: () => invert(file)}));
  }
}

$("again").onclick = () => color({seed: String(Math.floor(Math.random() * 2 ** 32))});
$("keep-seed").onclick = () => {
  $("seed").value = seed_of_shown();
  $("advanced").open = true;
  say(`Seed ${$("seed").value} is set for the next pictures.`);
};
$("form").onsubmit = event => {
  event.preventDefault();
  if (running) running.abort();
  else color();
};
$("style").onchange = () => { $("background").disabled = $("style").value === "painted"; };
window.addEventListener("keydown", event => { if (event.key === "Escape") running?.abort(); });
set_up_saving(fail);

// --- the server -----------------------------------------------------------------------------------------------------

function set_status(text, state) {
  if ($("status").textContent !== text) $("status").textContent = text; // A live region: screen readers announce every assignment.
  $("status").className = `pill ${state}`;
}

async function check_status() {
  if (document.hidden) return;
  try {
    const response = await fetch_with_key("v1/models");
    if (response.status === 401) return set_status("key needed", "down");
    if (!response.ok) return set_status("server error", "down");
    const versions = Object.keys((await response.json()).traffic);
    set_status(versions.length ? `model ${versions.join(", ")}` : "no model yet", versions.length ? "ready" : "");
  } catch {
    set_status("server unreachable", "down");
  }
}

load_examples().catch(() => fail("The examples could not be loaded: the server cannot be reached."));
on_key(check_status);
check_status();
setInterval(check_status, 10000);
document.addEventListener("visibilitychange", check_status);
