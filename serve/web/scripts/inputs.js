// What to color: the drawings, up to four references, and the settings of a request.

import {$, element, say, show} from "./dom.js";

export const KINDS = ["sketch", "reference"];
const FIELDS = ["style", "background", "num_inference_steps", "guidance_scale", "seed", "sampler"];
const MAX_MIB = 30;
const MAX_FILES = {sketch: 50, reference: 4};
export const files = {sketch: [], reference: []};
const urls = {sketch: [], reference: []};
/** Whether the references are shown as a group, to which further pictures are added, and not as one that is replaced. */
let several = false, target = {kind: "sketch", add: false}, on_input = () => {};

export const name_of = file => file.name || "A pasted picture";
export const missing = () => KINDS.find(kind => !files[kind].length);

/** Call `then` after each change of the files. */
export function on_files(then) {
  on_input = then;
}

/** Show an error, and mark the fields that caused it; without a text, show none. */
export function fail(text, fields = []) {
  $("error").textContent = text;
  show("error", Boolean(text));
  for (const field of [...KINDS, ...FIELDS]) {
    if (fields.includes(field)) $(field).setAttribute("aria-invalid", "true");
    else $(field).removeAttribute("aria-invalid");
  }
  if (fields.some(field => $("advanced").contains($(field)))) $("advanced").open = true;
}

/** Return the form of a request for one drawing. */
export function form_data(sketch) {
  const data = new FormData();
  data.append("sketch", sketch);
  for (const reference of files.reference) data.append("reference", reference);
  for (const field of FIELDS) if ($(field).value !== "" && !$(field).disabled) data.append(field, $(field).value);
  data.set("output", "layers");
  return data;
}

/** Set these settings for the next pictures, an object of field and value. */
export function choose_settings(settings) {
  for (const [field, value] of Object.entries(settings)) $(field).value = value;
  $("advanced").open = true;
  say(`Seed ${settings.seed} and the other settings of this picture are set for the next pictures.`);
}

// --- choosing -------------------------------------------------------------------------------------------------------

/** Use these files, in place of or (`add`) in addition to those of the same kind. */
export function choose(kind, list, add = kind === "reference" && several) {
  if (!list.length) return;
  const wrong = what_is_wrong(kind, [...list], add);
  if (wrong) return fail(wrong);
  const all = add ? [...files[kind], ...list] : [...list], left_out = all.slice(MAX_FILES[kind]);
  set_files(kind, all.slice(0, MAX_FILES[kind]));
  fail(left_out.length ? words_for(kind, all.length, left_out) : "");
  say(`${list.length > 1 ? `${list.length} ${kind === "sketch" ? "drawings" : "color pictures"}` : name_of(list[0])} chosen. ${$("note").textContent}`);
}

function words_for(kind, number, left_out) {
  if (kind === "sketch") return `Only the first ${MAX_FILES.sketch} of ${number} drawings are used.`;
  return `At most ${MAX_FILES.reference} color pictures are used: ${left_out.map(name_of).join(", ")} ${left_out.length > 1 ? "are" : "is"} left out.`;
}

function what_is_wrong(kind, list, add) {
  const type_of = file => file.type || `image/${file.name.split(".").pop().toLowerCase().replace("jpg", "jpeg")}`;
  const other = list.find(file => !/^image\/(png|jpeg|webp)$/.test(type_of(file)));
  if (other) return `${name_of(other)} is not a PNG, JPEG or WebP image.`;
  const chosen = {...files, [kind]: add ? [...files[kind], ...list] : list};
  const size = Math.max(0, ...chosen.sketch.map(file => file.size)) + chosen.reference.reduce((sum, file) => sum + file.size, 0);
  const largest = list.reduce((one, file) => file.size > one.size ? file : one);
  return size > MAX_MIB * 2 ** 20 && `${name_of(largest)} is too large: a drawing and its color pictures may have ${MAX_MIB} MB together.`;
}

function set_files(kind, chosen) {
  files[kind] = chosen;
  for (const url of urls[kind]) URL.revokeObjectURL(url);
  urls[kind] = chosen.map(file => URL.createObjectURL(file));
  if (kind === "reference") several = chosen.length > 1 || several && chosen.length > 0;
  fill_zone(kind);
  if (kind === "reference") fill_references();
  for (const button of document.querySelectorAll(`#${kind}-examples button`))
    button.setAttribute("aria-pressed", String(chosen.some(file => file.name === button.dataset.name)));
  on_input();
}

function fill_zone(kind) {
  const [file, ...more] = files[kind];
  $(kind).querySelector(".ask").hidden = Boolean(file);
  for (const one of $(kind).querySelectorAll("img, .change, .count")) one.remove();
  $(kind).classList.toggle("full", Boolean(file));
  if (!file) return;
  $(kind).append(picture_of(kind, 0, `Chosen: ${file.name || "pasted picture"}${more.length ? ` and ${more.length} more` : ""}`), element("span", {className: "change", textContent: "change"}));
  if (more.length) $(kind).append(element("span", {className: "count", textContent: `${more.length + 1} drawings`}));
}

function picture_of(kind, number, alt) {
  const image = element("img", {src: urls[kind][number], alt});
  image.onerror = () => { image.alt = `${name_of(files[kind][number])}: no preview`; };
  return image;
}

/** Show all references, each with a button that removes it, and one that adds another. */
function fill_references() {
  const number = files.reference.length;
  show("reference", !several);
  show("references", several);
  show("add-reference", number === 1 && !several);
  if (!several) return $("references").replaceChildren();
  const shown = files.reference.map((file, place) => {
    const remove = element("button", {type: "button", className: "remove", textContent: "\u00d7", title: "Remove", "aria-label": `Remove ${name_of(file)}`});
    remove.onclick = () => {
      set_files("reference", files.reference.filter(other => other !== file));
      say(`${name_of(file)} is removed.`);
      ($("references").querySelector(".more") || $("reference")).focus();
    };
    return element("div", {title: file.name}, picture_of("reference", place, `Color picture ${place + 1}: ${file.name || "pasted picture"}`), remove);
  });
  if (number < MAX_FILES.reference)
    shown.push(element("button", {type: "button", className: "more", textContent: "+", title: "Add a color picture", "aria-label": "Add a color picture", onclick: () => ask_for("reference", true)}));
  $("references").replaceChildren(...shown);
}

/** Use files that were not given to one of the zones: two files at the beginning are a drawing and its reference. */
function choose_any(list) {
  const empty = KINDS.filter(kind => !files[kind].length);
  if (list.length === 2 && empty.length === 2) [...list].forEach((file, number) => choose(KINDS[number], [file]));
  else choose(empty[0] || "sketch", list);
}

function ask_for(kind, add) {
  target = {kind, add};
  $("file").value = "";
  $("file").click();
}

for (const kind of KINDS) {
  const zone = $(kind).parentElement;
  $(kind).onclick = () => ask_for(kind, false);
  zone.ondragover = () => zone.classList.add("over");
  zone.ondragleave = () => zone.classList.remove("over");
  zone.ondrop = event => {
    event.preventDefault();
    event.stopPropagation();
    zone.classList.remove("over");
    choose(kind, event.dataTransfer.files);
  };
}
$("add-reference").onclick = () => {
  several = true; // Also if no file is chosen now: the examples then are added, too.
  fill_references();
  ask_for("reference", true);
};
$("file").onchange = () => choose(target.kind, $("file").files, target.add);
window.addEventListener("dragover", event => event.preventDefault());
window.addEventListener("drop", event => { event.preventDefault(); choose_any(event.dataTransfer.files); });
window.addEventListener("paste", event => {
  const kind = KINDS.find(one => $(one).parentElement.contains(document.activeElement));
  if (kind) choose(kind, event.clipboardData.files);
  else choose_any(event.clipboardData.files);
});
$("style").onchange = () => { $("background").disabled = $("style").value === "painted"; };

// --- examples and help ----------------------------------------------------------------------------------------------

export async function load_examples() {
  const {examples} = await (await fetch("examples")).json();
  for (const name of examples) {
    const kind = name.split("_")[0];
    const image = element("img", {src: `examples/${name}`, alt: `Example ${kind === "sketch" ? "drawing" : "colors"} ${name.match(/\d+/)[0]}`});
    const button = element("button", {type: "button", "aria-pressed": "false"}, image);
    button.dataset.name = name;
    button.onclick = async () => {
      const same = files.reference.find(file => file.name === name);
      if (several && same) return set_files("reference", files.reference.filter(file => file !== same));
      try {
        choose(kind, [new File([await (await fetch(image.src)).blob()], name, {type: "image/png"})]);
      } catch { fail("The server cannot be reached."); }
    };
    $(`${kind}-examples`).append(button);
  }
}

/** Replace the drawing by its negative. */
export async function invert(file) {
  const image = await createImageBitmap(file), canvas = element("canvas", {width: image.width, height: image.height});
  const draw = canvas.getContext("2d");
  draw.drawImage(image, 0, 0);
  draw.globalCompositeOperation = "difference";
  draw.fillStyle = "#fff";
  draw.fillRect(0, 0, image.width, image.height);
  canvas.toBlob(blob => choose("sketch", [new File([blob], `${file.name.replace(/\.[^.]*$/, "")}.png`, {type: "image/png"})]));
}
