// The results: the stage with the shown picture, the list of all pictures, and what is saved.

import {ask_file} from "./colorize.js";
import {offer} from "./colors.js";
import {offer_correction} from "./correction.js";
import {$, bytes_of, download, element, png_blob, say, show} from "./dom.js";
import {redraw_doubt, set_up_doubt, show_doubt} from "./doubt.js";
import {edit, new_edits} from "./editor.js";
import {zip} from "./formats.js";
import {Picture, in_order} from "./picture.js";

const MAX_KEPT = 60;
const THUMBNAIL_PX = 128;
/**
 * What further tries of a drawing change besides the seed, which alone changes nothing that one sees. Steps are changed
 * only for models that need few. benchmarks/tries.py measures how much the pictures differ.
 */
const TRIES = [{guidance_scale: 1.5, steps: 12}, {guidance_scale: 0.7, steps: 1}, {guidance_scale: 2, steps: 12}, {guidance_scale: 0.5, steps: 12}];
const FEW_STEPS = 8;
/** The settings that tries change, and how the page names them. */
const CHANGED = {guidance_scale: "strength", num_inference_steps: "steps"};
/**
 * Each result is {answer, form, stem, seconds, thumbnail, url (of the sketch), edits, steps, doubt (if it was asked
 * for)}.
 */
const results = [];
let shown = null, picture = null, sweep = 0;

// --- the stage ------------------------------------------------------------------------------------------------------

/** Set the state of the stage: hint, drawing (line art over a preview), or result (a comparison with the line art). */
export function set_stage(state) {
  const result = state === "result";
  cancelAnimationFrame(sweep);
  show("hint", state === "hint");
  show("preview", false);
  show("before", state !== "hint");
  for (const id of ["after", "divider", "tag-before", "tag-after", "compare", "actions", "keep-seed", "open"]) show(id, result);
  if (!result) {
    edit(null);
    show_doubt(null, null);
    offer_correction(null);
  }
  $("stage").classList.toggle("drawing", state === "drawing");
  $("stage").classList.toggle("result", result);
}

/** Show the line art at this URL. */
export async function set_sketch(url) {
  $("before").src = url;
  try { await $("before").decode(); } catch { return; /* The server will report what is wrong with the file. */ }
  $("stage").style.setProperty("--ratio", $("before").naturalWidth / $("before").naturalHeight);
}

/** Show a result, and let people change its colors. */
export async function present(one) {
  shown = one;
  const [decoded] = await Promise.all([decode(one), set_sketch(one.url)]);
  if (shown !== one) return;
  picture = decoded;
  set_stage("result");
  cut(Number($("compare").value));
  picture.draw_on($("after"));
  edit(picture, one.edits, show_change);
  offer(picture, one.form.getAll("reference"));
  show_doubt(one, picture);
  offer_correction(one, picture, correction_of_shown);
  if (one.edits.dots.length) one.thumbnail = thumbnail_of($("after"));
  describe();
  show_list();
}

async function decode({answer, edits}) {
  const decoded = await Picture.decode(answer);
  decoded.recolor(decoded.colors_by(edits.dots));
  return decoded;
}

/** Show the last result again, for example after an error. Returns whether there is one. */
export async function present_last() {
  if (shown) await present(shown);
  return Boolean(shown);
}

function describe() {
  const {answer: {model_version, seed}, form, seconds, edits} = shown, number = edits.dots.length;
  const version = /^\d+$/.test(model_version) ? `model version ${model_version}` : model_version === "starter" ? "starter model" : `model ${model_version}`;
  const changes = number ? `, ${number} color${number > 1 ? "s" : ""} by hand` : "";
  const settings = Object.entries(CHANGED).map(([field, name]) => form.get(field) && `, ${name} ${form.get(field)}`).filter(Boolean);
  $("note").textContent = `${$("after").width} x ${$("after").height} px in ${seconds.toFixed(1)} s, seed ${seed}${settings.join("")}, ${version}${changes}`;
}

function show_change() {
  redraw_doubt();
  offer_correction(shown, picture, correction_of_shown);
  shown.thumbnail = thumbnail_of($("after"));
  describe();
  show_list();
}

/** Animate the slider once from the line art to the picture, so that people notice the slider. */
export function reveal() {
  const started = performance.now();
  $("compare").value = 0;
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return cut(0);
  const move = now => {
    const part = Math.min(1, (now - started) / 900);
    cut(100 - 100 * part ** 2 * (3 - 2 * part));
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

// --- the list -------------------------------------------------------------------------------------------------------

/**
 * Add the answer of the server for a form, and return the result; the oldest results are dropped. The dots of the same
 * drawing's last result are kept.
 */
export async function add(answer, form, seconds, steps) {
  const dots = of_drawing(form).at(-1)?.edits.dots;
  const sketch = form.get("sketch"), stem = (sketch.name || "drawing").replace(/\.[^.]*$/, "");
  const thumbnail = thumbnail_of(await createImageBitmap(png_blob(bytes_of(answer.image))));
  const one = {answer, form, stem, seconds, steps, thumbnail, url: URL.createObjectURL(sketch), edits: new_edits(dots)};
  results.push(one);
  while (results.length > MAX_KEPT) URL.revokeObjectURL(results.shift().url);
  return one;
}

/** Return the results of the drawing in a form. */
function of_drawing(form) {
  const [name, size] = [form.get("sketch").name, form.get("sketch").size];
  return results.filter(one => one.form.get("sketch").name === name && one.form.get("sketch").size === size);
}

/** Return the form of another try of the shown result. */
export function form_for_try() {
  const before = of_drawing(shown.form), change = TRIES[(before.length - 1) % TRIES.length];
  const form = form_for(shown, "layers");
  form.set("seed", String(Math.floor(Math.random() * 2 ** 32)));
  form.set("guidance_scale", String(change.guidance_scale));
  if (before[0].steps <= FEW_STEPS) form.set("num_inference_steps", String(change.steps));
  return form;
}

/** Return the form that makes the shown result again, with the colors of its dots for all that looks alike; null without dots. */
export async function form_to_spread() {
  if (!shown.edits.dots.length) return null;
  const form = form_for(shown, "layers");
  await add_dots(form, shown, true);
  return form;
}

export function settings_of_shown() {
  const changed = Object.keys(CHANGED).map(field => [field, shown.form.get(field) || ""]);
  return {seed: shown.answer.seed, ...Object.fromEntries(changed)};
}

export function show_list() {
  const named = new Set(results.map(one => one.stem)).size > 1;
  show("pictures", results.length > 1);
  $("tries").classList.toggle("named", named);
  $("tries").replaceChildren(...results.map((one, number) => {
    const label = `Picture ${number + 1}${named ? ` of ${one.stem}` : ""}, seed ${one.answer.seed}`;
    const image = element("img", {src: one.thumbnail, alt: label, title: one.stem});
    const button = element("button", {type: "button", "aria-pressed": String(one === shown)}, image);
    if (named) button.append(element("span", {textContent: one.stem, "aria-hidden": "true"}));
    button.onclick = async () => {
      await present(one);
      $("tries").children[results.indexOf(one)]?.focus();
    };
    return button;
  }));
}

function thumbnail_of(source) {
  const scale = THUMBNAIL_PX / Math.min(source.width, source.height);
  const canvas = element("canvas", {width: Math.round(source.width * scale), height: Math.round(source.height * scale)});
  canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}

// --- saving ---------------------------------------------------------------------------------------------------------

/** Return the bytes of the picture and of its color layer, as PNGs. */
async function pngs_of({answer, edits}, decoded) {
  return {image: edits.dots.length ? await decoded.png() : bytes_of(answer.image), layer: await decoded.layer_png()};
}

async function save_zip() {
  const used = new Map(), files = [];
  for (const one of results) {
    const number = (used.get(one.stem) || 0) + 1, name = number > 1 ? `${one.stem}-${number}` : one.stem;
    used.set(one.stem, number);
    const {image, layer} = await pngs_of(one, one === shown ? picture : await decode(one));
    files.push({name: `${name}.colored.png`, bytes: image}, {name: `${name}.color-layer.png`, bytes: layer});
  }
  download(zip(files), "colored.zip");
  say(`${results.length} pictures saved.`);
}

/** Return the form that made a result, with its seed, for another output. */
function form_for(one, output) {
  const form = new FormData();
  for (const [name, value] of one.form.entries()) form.append(name, value);
  form.set("output", output);
  form.set("seed", one.answer.seed);
  return form;
}

/** Return the bytes of the map of where the model guessed in a result. */
async function ask_doubt(one) {
  const {blob} = await ask_file(form_for(one, "doubt"));
  return new Uint8Array(await blob.arrayBuffer());
}

/** Return the repainted picture and the dots of the shown result, as a correction has them. */
async function correction_of_shown() {
  const hints = in_order(shown.edits.dots).map(({x, y, color, scope}) => ({x, y, color, scope}));
  return {image: (await pngs_of(shown, picture)).image, hints};
}

/** Add the dots of a result to its form, after the hints that the result was made with, so that the dots win. */
async function add_dots(form, {edits}, learned) {
  const before = form.get("hints") ? JSON.parse(await form.get("hints").text()) : [];
  const dots = in_order(edits.dots).map(({x, y, color, scope}) => ({x, y, color, scope, learned}));
  const hints = [...before.filter(hint => !learned || !dots.some(({x, y}) => x === hint.x && y === hint.y)), ...dots];
  if (hints.length) form.set("hints", new Blob([JSON.stringify(hints)], {type: "application/json"}), "hints.json");
}

/** Save a layered file of the shown result: the server makes it from the same inputs, the same seed and the dots. */
async function save_layered(output) {
  const one = shown, form = form_for(one, output);
  await add_dots(form, one, false);
  $("note").textContent = `Making the ${output.toUpperCase()} file...`;
  const {blob, version} = await ask_file(form);
  download(blob, `${one.stem}.${output}`);
  describe();
  if (version !== one.answer.model_version) $("note").textContent += `. The file was made with the newer version ${version}: its colors may differ.`;
  say(`${output.toUpperCase()} file saved.`);
}

/** Let a button save something, or show where the model guessed; errors go to `fail`. */
export function set_up_actions(fail) {
  set_up_doubt(ask_doubt, fail);
  const actions = {
    "save": async () => download(png_blob((await pngs_of(shown, picture)).image), `${shown.stem}.colored.png`),
    "save-layer": async () => download(png_blob((await pngs_of(shown, picture)).layer), `${shown.stem}.color-layer.png`),
    "save-ora": () => save_layered("ora"),
    "save-psd": () => save_layered("psd"),
    "save-all": save_zip,
    "open": async () => {
      const opened = window.open("", "_blank"), {image} = await pngs_of(shown, picture);
      if (opened) opened.location = URL.createObjectURL(png_blob(image));
    },
  };
  for (const [id, save] of Object.entries(actions))
    $(id).onclick = async () => {
      $(id).disabled = true;
      fail("");
      try { await save(); } catch (error) {
        describe();
        fail(error.message, error.fields);
      } finally { $(id).disabled = false; }
    };
}
