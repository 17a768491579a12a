// Dots that give regions of a picture exact colors, with undo and redo. Nothing here asks the server.

import {$, element, say, show} from "./dom.js";
import {largest_guess} from "./doubt.js";

const SHIFT_FACTOR = 10;
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
const OUTLINE = [232, 30, 99];

/**
 * `edits` is {dots, past, future} of the shown result. `dots` is a list of {id, x, y, color, scope}; every change makes a
 * new list, and `past` and `future` hold the older and newer ones. Of two dots with the same scope, the later one of the
 * list wins in a region.
 */
let picture = null, edits = null, on_change = () => {}, on_choice = () => {};
/** The id of the chosen dot, a dot that has no color yet, and the list before the present gesture. */
let chosen = 0, waiting = null, before = null, next_id = 1;

/** Return edits without a change, or with the dots of others of the same drawing as one change. */
export const new_edits = (dots = []) => ({dots, past: dots.length ? [[]] : [], future: []});

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
  tell(`${what_of(dot)} is now ${color}.`);
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
  picture.recolor(picture.colors_by(dots));
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
  const {name, id, whole} = picture.region_at(x, y), has_part = name && name !== `region ${id}`;
  return has_part ? name[0].toUpperCase() + name.slice(1) : `Region ${whole}`;
}

const pieces_at = ({x, y}) => picture.pieces_of(picture.region_at(x, y)).length;

/** Return what a dot colors, in words. */
function what_of(dot) {
  if (dot.scope === "color") return `Everything in ${picture.region_at(dot.x, dot.y).color}`;
  return dot.scope === "piece" && pieces_at(dot) > 1 ? `This piece of ${lower(name_at(dot))}` : name_at(dot);
}

const lower = text => text[0].toLowerCase() + text.slice(1);

/** Let a dot that has a color, or waits for one, color something else. */
function set_scope(scope) {
  if (!current()) return;
  if (waiting) {
    waiting = {...waiting, scope};
    draw();
  } else {
    begin();
    update(edits.dots.map(dot => dot.id === chosen ? {...dot, scope} : dot));
    commit();
  }
  tell_chosen();
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

/**
 * Choose the region at a place: its dot if it has one, else a new dot, which waits for a color. A second click on a
 * region that is chosen already takes one piece of it.
 */
function choose_place(x, y, scope = "whole") {
  const region = picture.region_at(x, y), at = dot => picture.region_at(dot.x, dot.y), now = current();
  if (scope === "whole" && now?.scope === "whole" && at(now).whole === region.whole && pieces_at(now) > 1) scope = "piece";
  const fits = dot => dot.scope === "piece" ? scope === "piece" && at(dot) === region : scope !== "piece" && at(dot).whole === region.whole;
  const dot = edits.dots.findLast(fits);
  if (dot) choose(dot.id);
  else choose(next_id, {id: next_id++, x, y, color: null, scope});
  tell_chosen();
}

function tell_chosen() {
  const dot = current(), again = waiting && dot.scope === "whole" && pieces_at(dot) > 1 ? " Click again for one piece of it." : "";
  tell(`${what_of(dot)} ${dot.color ? "is now" : "is"} ${color_at(dot)}. Pick another color.${again}`);
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
  for (const choice of $("scope").querySelectorAll("input")) {
    choice.checked = choice.value === (current()?.scope || "whole");
    choice.disabled = !current() || choice.value === "piece" && !choice.checked && pieces_at(current()) === 1;
  }
  if (!current()) $("colors-note").textContent = "Click a region of the picture, then pick its color.";
  on_choice(current() && color_at(current()));
}

/** Mark what a waiting dot would color. Other regions are not marked, so that their colors are seen as they are. */
function draw_outline() {
  const canvas = $("outline");
  show("outline", Boolean(waiting));
  if (!waiting) return;
  Object.assign(canvas, {width: picture.width, height: picture.height});
  const thickness = Math.max(1, Math.round(1.5 * picture.width / $("stage").clientWidth));
  const {left, top, image} = picture.outline([...picture.colored_by(waiting).keys()], thickness, OUTLINE);
  canvas.getContext("2d").putImageData(image, left, top);
}

function new_button(id) {
  const button = element("button", {type: "button", className: "dot", id: `dot-${id}`});
  const take = () => { if (chosen !== id) choose(id); };
  let again = false; // Whether a pointer is on a dot that was chosen before, and has not moved it.
  button.onclick = event => {
    take();
    if (event.detail === 0) $("hex").focus(); // A key pressed the button, not a pointer.
    else if (again && waiting && pieces_at(waiting) > 1) set_scope(waiting.scope === "piece" ? "whole" : "piece");
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
    again = chosen === id;
    take();
    button.setPointerCapture(event.pointerId);
    tell_chosen();
  };
  button.onpointermove = event => {
    if (!button.hasPointerCapture(event.pointerId)) return;
    const frame = $("dots").getBoundingClientRect();
    again = false;
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
  const [x, y] = [event.offsetX / $("after").clientWidth * picture.width, event.offsetY / $("after").clientHeight * picture.height];
  choose_place(within(x, picture.width), within(y, picture.height), event.altKey ? "piece" : "whole");
});
$("scope").onchange = event => set_scope(event.target.value);
$("add-dot").onclick = () => {
  const guess = largest_guess(), [x, y] = guess ? picture.middle_of(guess) : [picture.width >> 1, picture.height >> 1];
  const has_dot = guess && edits.dots.some(dot => picture.region_at(dot.x, dot.y).whole === guess.whole);
  choose_place(x, y, has_dot ? "piece" : "whole");
  $(`dot-${chosen}`).focus();
};
$("remove-dot").onclick = remove;
$("undo").onclick = undo;
$("redo").onclick = redo;
window.addEventListener("keyup", commit);
window.addEventListener("keydown", event => {
  if (event.key === "Escape" && picture && current()) choose(0);
  if (!picture || !(event.ctrlKey || event.metaKey) || event.altKey || event.target.matches("input:not([type=range], [type=color], [type=radio])")) return;
  const key = event.key.toLowerCase();
  if (key !== "z" && key !== "y") return;
  event.preventDefault();
  if (key === "y" || event.shiftKey) redo();
  else undo();
});
