// The web page: choose two pictures, watch the coloring, compare, save. colorize.js sends the request to the server.
import {colorize} from "./colorize.js";
import {fetch_with_key, on_key} from "./key.js";

const $ = id => document.getElementById(id);
const KINDS = ["sketch", "reference"];
const FIELDS = ["num_inference_steps", "guidance_scale", "seed", "sampler"];
const MAX_MIB = 30;
const MAX_TRIES_KEPT = 12;
const files = {sketch: null, reference: null};
const urls = {sketch: "", reference: ""};
const tries = [];
let target = "sketch", running = null, shown = null, sweep = 0;

const show = (id, on) => { $(id).hidden = !on; };
const say = text => { $("said").textContent = text; };
const other = kind => KINDS[1 - KINDS.indexOf(kind)];
const stem_of = file => (file.name || "drawing").replace(/\.[^.]*$/, "");
const png_url = base64 => URL.createObjectURL(new Blob([Uint8Array.from(atob(base64), one => one.charCodeAt(0))], {type: "image/png"}));

function fail(text, fields = []) {
  $("error").textContent = text;
  show("error", Boolean(text));
  for (const field of [...KINDS, ...FIELDS]) {
    if (fields.includes(field)) $(field).setAttribute("aria-invalid", "true");
    else $(field).removeAttribute("aria-invalid");
  }
  if (fields.some(field => FIELDS.includes(field))) $("advanced").open = true;
}

// --- the two pictures -----------------------------------------------------------------------------------------------

function choose(kind, file) {
  if (!file) return;
  const type = file.type || `image/${file.name.split(".").pop().toLowerCase().replace("jpg", "jpeg")}`;
  if (!/^image\/(png|jpeg|webp)$/.test(type)) return fail(`${file.name || "This"} is not a PNG, JPEG or WebP image.`);
  if (file.size + (files[other(kind)]?.size || 0) > MAX_MIB * 2 ** 20) return fail(`${file.name} is too large: both pictures may have ${MAX_MIB} MB together.`);
  fail("");
  files[kind] = file;
  URL.revokeObjectURL(urls[kind]);
  urls[kind] = URL.createObjectURL(file);
  fill_zone(kind, file);
  for (const button of document.querySelectorAll(`#${kind}-examples button`))
    button.setAttribute("aria-pressed", String(button.dataset.name === file.name));
  const missing = KINDS.find(one => !files[one]);
  $("go").disabled = Boolean(missing) && !running;
  if (missing || !shown) $("note").textContent = missing ? `Now choose ${missing === "sketch" ? "your line art" : "where the colors come from"}.` : "Ready.";
  say(`${file.name || "A pasted picture"} chosen. ${missing || !shown ? $("note").textContent : ""}`);
}

function fill_zone(kind, file) {
  const drop = $(kind), image = new Image(), change = document.createElement("span");
  image.src = urls[kind];
  image.alt = `Chosen: ${file.name || "pasted picture"}`;
  image.onerror = () => { image.alt = `${file.name}: no preview`; };
  change.className = "change";
  change.textContent = "change";
  drop.replaceChildren(image, change);
  drop.classList.add("full");
}

/** Use the first of several files for `kind`, and the second file for the other kind. */
function choose_all(list, kind) {
  const chosen = [...list].slice(0, 2);
  chosen.forEach((file, number) => choose(number ? other(kind) : kind, file));
}

const first_empty = () => KINDS.find(kind => !files[kind]) || "sketch";

for (const kind of KINDS) {
  const drop = $(kind);
  drop.onclick = () => { target = kind; $("file").value = ""; $("file").click(); };
  drop.ondragover = () => drop.classList.add("over");
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = event => {
    event.preventDefault();
    event.stopPropagation();
    drop.classList.remove("over");
    choose_all(event.dataTransfer.files, kind);
  };
}
$("file").onchange = () => choose_all($("file").files, target);
window.addEventListener("dragover", event => event.preventDefault());
window.addEventListener("drop", event => { event.preventDefault(); choose_all(event.dataTransfer.files, first_empty()); });
window.addEventListener("paste", event => {
  const focused = document.activeElement?.id;
  choose_all(event.clipboardData.files, KINDS.includes(focused) ? focused : first_empty());
});

async function load_examples() {
  const {examples} = await (await fetch("examples")).json();
  for (const name of examples) {
    const kind = name.split("_")[0], button = document.createElement("button"), image = new Image();
    button.type = "button";
    button.dataset.name = name;
    button.setAttribute("aria-pressed", "false");
    image.src = `examples/${name}`;
    image.alt = `Example ${kind === "sketch" ? "drawing" : "colors"} ${name.match(/\d+/)[0]}`;
    button.append(image);
    button.onclick = async () => {
      try {
        choose(kind, new File([await (await fetch(image.src)).blob()], name, {type: "image/png"}));
      } catch { fail("The server cannot be reached."); }
    };
    $(`${kind}-examples`).append(button);
  }
}

async function invert() {
  const image = await createImageBitmap(files.sketch), canvas = document.createElement("canvas");
  Object.assign(canvas, {width: image.width, height: image.height});
  const draw = canvas.getContext("2d");
  draw.drawImage(image, 0, 0);
  draw.globalCompositeOperation = "difference";
  draw.fillStyle = "#fff";
  draw.fillRect(0, 0, image.width, image.height);
  canvas.toBlob(blob => choose("sketch", new File([blob], `${stem_of(files.sketch)}.png`, {type: "image/png"})));
}

// --- coloring -------------------------------------------------------------------------------------------------------

function form_data(extra) {
  const data = new FormData();
  for (const kind of KINDS) data.append(kind, files[kind]);
  for (const field of FIELDS) if ($(field).value !== "") data.append(field, $(field).value);
  for (const [field, value] of Object.entries({...extra, output: "both"})) data.set(field, value);
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

function set_running(controller) {
  running = controller;
  $("go").textContent = controller ? "Stop" : "Color it";
  $("go").disabled = !controller && KINDS.some(kind => !files[kind]);
  $("again").disabled = Boolean(controller);
  $("tries").inert = Boolean(controller);
  $("stage").setAttribute("aria-busy", String(Boolean(controller)));
}

/** Set the state of the stage: hint, drawing (line art over a preview), or result (a comparison with the line art). */
function set_stage(state) {
  const result = state === "result";
  show("hint", state === "hint");
  show("preview", false);
  show("before", state !== "hint");
  for (const id of ["after", "divider", "tag-before", "tag-after", "compare", "actions", "keep-seed"]) show(id, result);
  $("stage").classList.toggle("drawing", state === "drawing");
  $("stage").classList.toggle("result", result);
}

async function set_sketch(url) {
  $("before").src = url;
  try { await $("before").decode(); } catch { return; /* The server will report what is wrong with the file. */ }
  $("stage").style.setProperty("--ratio", $("before").naturalWidth / $("before").naturalHeight);
}

async function color(extra = {}) {
  cancelAnimationFrame(sweep);
  fail("");
  const started = performance.now(), sketch = files.sketch, body = form_data(extra), controller = new AbortController();
  set_running(controller);
  const sketch_url = URL.createObjectURL(sketch);
  set_stage("drawing");
  progress(0.04, "Sending...");
  say("Coloring.");
  await set_sketch(sketch_url);
  $("stage").scrollIntoView({block: "nearest"});
  try {
    const result = await colorize(body, {signal: controller.signal, on_progress: show_step, on_wait: show_wait});
    await add_try(result, sketch_url, stem_of(sketch), (performance.now() - started) / 1000);
  } catch (error) {
    end_badly(error);
  } finally {
    show("wait", false);
    progress(null);
    set_running(null);
  }
}

function show_step({step, total, preview}) {
  $("preview").src = preview;
  show("preview", true);
  progress(step / (total + 0.5), `Step ${step} of ${total}`);
}

function show_wait(seconds, problem) {
  $("wait").textContent = `${problem.message} Trying again ${seconds ? `in ${seconds} s` : "now"}.`;
  show("wait", seconds > 0);
  if (seconds === problem.wait) say($("wait").textContent);
}

function end_badly(error) {
  if (shown) present(shown);
  else set_stage("hint");
  const stopped = error.name === "AbortError";
  $("note").textContent = stopped ? "Stopped." : "";
  if (stopped) return say("Stopped.");
  fail(error.message, error.fields);
  if (error.fields?.includes("sketch") && /black/.test(error.message)) {
    const button = document.createElement("button");
    Object.assign(button, {type: "button", className: "button", textContent: "Invert it for me", onclick: invert});
    $("error").append(document.createElement("br"), button);
  }
}

// --- results --------------------------------------------------------------------------------------------------------

async function add_try(result, sketch, stem, seconds) {
  const one = {sketch, stem, seconds, seed: result.seed, version: result.model_version, picture: png_url(result.image), layer: png_url(result.color_layer)};
  tries.push(one);
  while (tries.length > MAX_TRIES_KEPT) {
    const old = tries.shift();
    for (const url of [old.sketch, old.picture, old.layer]) URL.revokeObjectURL(url);
  }
  await present(one);
  reveal();
  say(`Done. ${$("note").textContent}`);
}

async function present(one) {
  shown = one;
  await set_sketch(one.sketch);
  $("after").src = one.picture;
  await $("after").decode();
  for (const [id, url, suffix] of [["save", one.picture, "colored"], ["save-layer", one.layer, "color-layer"]])
    Object.assign($(id), {href: url, download: `${one.stem}.${suffix}.png`});
  $("open").href = one.picture;
  set_stage("result");
  cut(Number($("compare").value));
  const version = /^\d+$/.test(one.version) ? `version ${one.version}` : one.version;
  const size = `${$("after").naturalWidth} x ${$("after").naturalHeight}`;
  $("note").textContent = `${size} px in ${one.seconds.toFixed(1)} s, seed ${one.seed}, model ${version}`;
  show_tries();
}

function show_tries() {
  show("tries", tries.length > 1);
  $("tries").replaceChildren(...tries.map((one, number) => {
    const button = document.createElement("button"), image = new Image();
    button.type = "button";
    button.setAttribute("aria-pressed", String(one === shown));
    image.src = one.picture;
    image.alt = `Picture ${number + 1}, seed ${one.seed}`;
    button.append(image);
    button.onclick = async () => {
      await present(one);
      $("tries").children[tries.indexOf(one)]?.focus();
    };
    return button;
  }));
}

/** Animate the slider once from the line art to the picture, so that people notice the slider. */
function reveal() {
  const end = 0, started = performance.now();
  $("compare").value = end;
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return cut(end);
  const move = now => {
    const part = Math.min(1, (now - started) / 900);
    cut(100 - (100 - end) * part ** 2 * (3 - 2 * part));
    if (part < 1) sweep = requestAnimationFrame(move);
  };
  sweep = requestAnimationFrame(move);
}

function cut(percent) {
  $("stage").style.setProperty("--cut", `${percent}%`);
  $("compare").setAttribute("aria-valuetext", `${Math.round(percent)} percent line art`);
  show("tag-before", percent > 12);
  show("tag-after", percent < 88);
}

$("compare").oninput = () => { cancelAnimationFrame(sweep); cut(Number($("compare").value)); };
$("again").onclick = () => color({seed: String(Math.floor(Math.random() * 2 ** 32))});
$("keep-seed").onclick = () => {
  $("seed").value = shown.seed;
  $("advanced").open = true;
  say(`Seed ${shown.seed} is set for the next pictures.`);
};
$("form").onsubmit = event => {
  event.preventDefault();
  if (running) running.abort();
  else color();
};
window.addEventListener("keydown", event => { if (event.key === "Escape") running?.abort(); });

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
