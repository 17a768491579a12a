// Dots that give regions of a picture exact colors, with undo and redo. Nothing here asks the server.

import {$, element, say, show} from "./dom.js";

const SHIFT_FACTOR = 10;
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
const OUTLINE = [232, 30, 99];

/**
 * `edits` is {dots, past, future} of the shown result. `dots` is a list of {id, x, y, color}; every change makes a new
 * list, and `past` and `future` hold the older and newer ones. A later dot of the list wins in a region.
 */
let picture = null, edits = null, on_change = () => {}, on_choice = () => {};
/** The id of the chosen dot, a dot that has no color yet, and the list before the present gesture. */
let chosen = 0, waiting = null, before = null, next_id = 1;

export const new_edits = () => ({dots: [], past: [], future: []});

/** Return the colors that dots give to regions, a Map of id to #rrggbb. */
export function colors_by(dots, of_picture) {
  return new Map(dots.map(({x, y, color}) => [of_picture.region_at(x, y).id, color]));
}

/** Edit a picture, or none if it is null. Calls changed() after each change. */
export function edit(of_picture, with_edits, changed) {
  [picture, edits, on_change] = [of_picture, with_edits, changed];
  [chosen, waiting, before] = [0, null, null];
  show("colors", Boolean(picture));
  $("stage").classList.toggle("editable", Boolean(picture));
  $("dots").replaceChildren();
  if (picture) update(edits.dots);
}

/** Call `then` with the color of the chosen region, or null, after each choice. */
export function on_chosen(then) {
  on_choice = then;
}

/** Give the chosen region a color, as a part of a gesture that ends with commit(). Returns whether a region is chosen. */
export function set_color(color) {
  if (!current()) {
    tell("First click a region of the picture.");
    return false;
  }
  begin();
  if (current().color === color) return true;
  const dot = {...current(), color};
  const dots = waiting ? [...edits.dots, dot] : edits.dots.map(other => other.id === chosen ? dot : other);
  [chosen, waiting] = [dot.id, null];
  update(dots);
  tell(`${name_at(dot)} is now ${color}.`);
  return true;
}

/** End a gesture: what it changed can be undone in one step. */
export function commit() {
  const changed = before && before !== edits.dots;
  if (changed) {
    edits.past.push(before);
    edits.future = [];
  }
  before = null;
  if (!changed) return;
  draw();
  on_change();
}

export const undo = () => step("past", "future", "Undone.");
export const redo = () => step("future", "past", "Redone.");

function step(from, to, text) {
  if (!picture) return;
  commit();
  if (!edits[from].length) return;
  edits[to].push(edits.dots);
  choose(0);
  update(edits[from].pop());
  on_change();
  tell(text);
}

// --- changes --------------------------------------------------------------------------------------------------------

function begin() {
  before ??= edits.dots;
}

function update(dots) {
  edits.dots = dots;
  picture.recolor(colors_by(dots, picture));
  draw();
}

function move(x, y) {
  const place = {x: within(x, picture.width), y: within(y, picture.height)};
  if (waiting) {
    waiting = {...waiting, ...place};
    return draw();
  }
  begin();
  // The moved dot becomes the last one, so that its color wins where it meets another dot.
  update([...edits.dots.filter(dot => dot.id !== chosen), {...current(), ...place}]);
}

function remove() {
  const dot = current();
  if (!dot) return;
  begin();
  const dots = edits.dots.filter(other => other !== dot);
  choose(0);
  update(dots);
  commit();
  tell(`The dot is removed: ${name_at(dot)} is ${color_at(dot)}.`);
}

const within = (value, size) => Math.min(size - 1, Math.max(0, Math.floor(value)));
const current = () => waiting || edits?.dots.find(dot => dot.id === chosen) || null;
const color_at = ({x, y}) => picture.colors.get(picture.region_at(x, y).id);

function name_at({x, y}) {
  const {name, id} = picture.region_at(x, y);
  return name ? name[0].toUpperCase() + name.slice(1) : `Region ${id}`;
}

/** Show a sentence next to the colors, and let screen readers say it. */
export function tell(text) {
  $("colors-note").textContent = text;
  say(text);
}

// --- dots in the picture --------------------------------------------------------------------------------------------

function choose(id, new_dot = null) {
  [chosen, waiting] = [id, new_dot];
  draw();
}

/** Choose the region at a place: its dot if it has one, else a new dot, which waits for a color. */
function choose_place(x, y) {
  const region = picture.region_at(x, y);
  const dot = edits.dots.findLast(one => picture.region_at(one.x, one.y) === region);
  if (dot) choose(dot.id);
  else choose(next_id, {id: next_id++, x, y, color: null});
  tell_chosen();
}

function tell_chosen() {
  tell(`${name_at(current())} is ${color_at(current())}. Pick another color.`);
}

function draw() {
  const all = waiting ? [...edits.dots, waiting] : edits.dots, ids = new Set(all.map(dot => `dot-${dot.id}`));
  for (const button of [...$("dots").children]) if (!ids.has(button.id)) button.remove();
  all.forEach((dot, number) => {
    if (!$(`dot-${dot.id}`)) $("dots").append(new_button(dot.id));
    const button = $(`dot-${dot.id}`);
    button.style.left = `${100 * (dot.x + 0.5) / picture.width}%`;
    button.style.top = `${100 * (dot.y + 0.5) / picture.height}%`;
    button.style.setProperty("--color", dot.color || "transparent");
    button.setAttribute("aria-pressed", String(dot.id === chosen));
    button.setAttribute("aria-label", `Dot ${number + 1}: ${name_at(dot)}, ${dot.color || "no color yet"}`);
  });
  draw_outline();
  $("undo").disabled = !edits.past.length;
  $("redo").disabled = !edits.future.length;
  $("remove-dot").disabled = !current();
  if (!current()) $("colors-note").textContent = "Click a region of the picture, then pick its color.";
  on_choice(current() && color_at(current()));
}

/** Mark the region of a waiting dot. Other regions are not marked, so that their colors are seen as they are. */
function draw_outline() {
  const canvas = $("outline"), region = waiting && picture.region_at(waiting.x, waiting.y);
  show("outline", Boolean(region));
  if (!region) return;
  Object.assign(canvas, {width: picture.width, height: picture.height});
  const thickness = Math.max(1, Math.round(1.5 * picture.width / $("stage").clientWidth));
  canvas.getContext("2d").putImageData(picture.outline(region, thickness, OUTLINE), region.box[0], region.box[1]);
}

function new_button(id) {
  const button = element("button", {type: "button", className: "dot", id: `dot-${id}`});
  const take = () => { if (chosen !== id) choose(id); };
  button.onclick = event => {
    take();
    if (event.detail === 0) $("hex").focus(); // A key pressed the button, not a pointer.
  };
  button.onkeydown = event => {
    take();
    if (event.key in ARROWS) {
      const [right, down] = ARROWS[event.key], {x, y} = current();
      const size = Math.ceil(picture.width / $("stage").clientWidth) * (event.shiftKey ? SHIFT_FACTOR : 1);
      move(x + right * size, y + down * size);
      tell_chosen();
    } else if (event.key === "Delete" || event.key === "Backspace") {
      remove();
      $("add-dot").focus();
    } else return;
    event.preventDefault();
  };
  button.onpointerdown = event => {
    take();
    button.setPointerCapture(event.pointerId);
    tell_chosen();
  };
  button.onpointermove = event => {
    if (!button.hasPointerCapture(event.pointerId)) return;
    const frame = $("dots").getBoundingClientRect();
    move((event.clientX - frame.left) / frame.width * picture.width, (event.clientY - frame.top) / frame.height * picture.height);
  };
  button.onpointerup = button.onpointercancel = () => {
    commit();
    if (current()) tell_chosen();
  };
  return button;
}

$("after").addEventListener("click", event => {
  if (!picture) return;
  choose_place(within(event.offsetX / $("after").clientWidth * picture.width, picture.width), within(event.offsetY / $("after").clientHeight * picture.height, picture.height));
});
$("add-dot").onclick = () => {
  choose_place(picture.width >> 1, picture.height >> 1);
  $(`dot-${chosen}`).focus();
};
$("remove-dot").onclick = remove;
$("undo").onclick = undo;
$("redo").onclick = redo;
window.addEventListener("keyup", commit);
window.addEventListener("keydown", event => {
  if (event.key === "Escape" && picture && current()) choose(0);
  if (!picture || !(event.ctrlKey || event.metaKey) || event.altKey || event.target.matches("input:not([type=range]):not([type=color])")) return;
  const key = event.key.toLowerCase();
  if (key !== "z" && key !== "y") return;
  event.preventDefault();
  if (key === "y" || event.shiftKey) redo();
  else undo();
});
