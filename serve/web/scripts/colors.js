// The choice of a color for the chosen region: by hex, from the reference, from recent colors and those of the picture.

import {$, element, show} from "./dom.js";
import {commit, on_chosen, set_color, tell} from "./editor.js";
import {hex_of} from "./picture.js";

const MAX_RECENT = 8;
const MAX_OF_PICTURE = 12;
const MAX_SIDE_PX = 1536;
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
const recent = [], mark = {x: 0.5, y: 0.5};
/** The references of the result, and the one that is shown. */
let offered = [], shown = null;

/** Offer the colors of a picture and of its references, Blobs. */
export async function offer(picture, references) {
  draw_swatches("recent", recent);
  const areas = new Map();
  for (const {color, area} of picture.regions.values()) areas.set(color, (areas.get(color) || 0) + area);
  const largest = [...areas].sort((one, other) => other[1] - one[1]).slice(0, MAX_OF_PICTURE);
  draw_swatches("picture-colors", largest.map(([color]) => color));
  if (references.length === offered.length && references.every((one, number) => one === offered[number])) return;
  offered = references;
  await draw_reference(references[0]);
  const images = await Promise.all(references.map(one => reduced(one)));
  if (offered !== references) return; // Another result is shown by now.
  show("reference-choice", references.length > 1);
  $("reference-choice").replaceChildren(...images.map((image, number) => {
    const button = element("button", {type: "button", "aria-pressed": String(!number), "aria-label": `Color picture ${number + 1}`}, image);
    button.onclick = () => {
      for (const other of $("reference-choice").children) other.setAttribute("aria-pressed", String(other === button));
      draw_reference(references[number]);
    };
    return button;
  }));
}

/** Return a canvas with a picture, a Blob, at most `side` pixels wide and high. */
async function reduced(blob, side = 128) {
  const image = await createImageBitmap(blob), scale = Math.min(1, side / Math.max(image.width, image.height));
  const canvas = element("canvas", {width: Math.max(1, Math.round(image.width * scale)), height: Math.max(1, Math.round(image.height * scale))});
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/** Show the reference from which colors are picked. */
async function draw_reference(reference) {
  shown = reference;
  const image = await reduced(reference, MAX_SIDE_PX), canvas = $("reference-colors");
  if (shown !== reference) return; // Another one is shown by now.
  Object.assign(mark, {x: 0.5, y: 0.5});
  draw_mark(false);
  Object.assign(canvas, {width: image.width, height: image.height});
  canvas.getContext("2d", {willReadFrequently: true}).drawImage(image, 0, 0);
}

function use(color) {
  if (!set_color(color)) return;
  commit();
  remember(color);
}

function remember(color) {
  const kept = [color, ...recent.filter(other => other !== color)].slice(0, MAX_RECENT);
  recent.splice(0, recent.length, ...kept);
  draw_swatches("recent", recent);
}

function draw_swatches(id, colors) {
  $(id).parentElement.hidden = !colors.length;
  const held = $(id).contains(document.activeElement);
  $(id).replaceChildren(...colors.map(color => {
    const button = element("button", {type: "button", title: color, "aria-label": `Color ${color}`, onclick: () => use(color)});
    button.style.background = color;
    return button;
  }));
  if (held) $(id).firstElementChild?.focus();
}

// --- hex and the color chooser of the browser -----------------------------------------------------------------------

function use_hex() {
  const hex = $("hex").value.trim().replace(/^#?/, "#").replace(/^#(.)(.)(.)$/, "#$1$1$2$2$3$3").toLowerCase();
  const good = /^#[0-9a-f]{6}$/.test(hex);
  $("hex").setAttribute("aria-invalid", String(!good));
  if (!good) return tell("A color is # and six digits from 0 to 9 and a to f, for example #e0b080.");
  $("hex").value = hex;
  use(hex);
}

$("hex").onchange = use_hex;
$("hex").onkeydown = event => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  use_hex();
};
$("any-color").oninput = () => set_color($("any-color").value);
$("any-color").onchange = () => use($("any-color").value);
on_chosen(color => {
  $("hex").disabled = $("any-color").disabled = !color;
  $("any-color").value = color || "#ffffff";
  if (document.activeElement === $("hex") && color) return;
  $("hex").value = color || "";
  $("hex").removeAttribute("aria-invalid");
});

// --- the reference --------------------------------------------------------------------------------------------------

function use_reference(x, y) {
  const canvas = $("reference-colors");
  const [left, top] = [[x, canvas.width], [y, canvas.height]].map(([part, size]) => Math.min(size - 1, Math.max(0, Math.floor(part * size))));
  Object.assign(mark, {x, y});
  draw_mark();
  use(hex_of([...canvas.getContext("2d").getImageData(left, top, 1, 1).data.slice(0, 3)]));
}

function draw_mark(used = true) {
  $("reference-mark").classList.toggle("used", used);
  $("reference-mark").style.left = `${100 * mark.x}%`;
  $("reference-mark").style.top = `${100 * mark.y}%`;
}

$("reference-colors").onclick = ({offsetX, offsetY}) => use_reference(offsetX / $("reference-colors").clientWidth, offsetY / $("reference-colors").clientHeight);
$("reference-colors").onkeydown = event => {
  if (event.key === "Enter" || event.key === " ") use_reference(mark.x, mark.y);
  else if (event.key in ARROWS) {
    const [right, down] = ARROWS[event.key], size = event.shiftKey ? 0.1 : 0.01;
    Object.assign(mark, {x: Math.min(1, Math.max(0, mark.x + right * size)), y: Math.min(1, Math.max(0, mark.y + down * size))});
    draw_mark();
  } else return;
  event.preventDefault();
};
