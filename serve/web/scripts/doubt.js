// Where the model guessed: a map over the picture, on request, that shows where a color by hand helps most.

import {$, say, show} from "./dom.js";
import {decode_png} from "./formats.js";

const COLOR = [232, 30, 140];
const OPACITY = 190;
/** Mean levels of the server's map from which on a region is marked, and marked fully. */
const LOW = 60, HIGH = 200;
const NOTE = "Pink regions are those whose colors the model guessed: a color by hand helps most there. New dot goes to the next one.";
const NONE = "The model was sure of every color: no region is pink.";
let is_on = false, shown = null, ask = null, marks = new Map();

/** Let the button show the map; `ask_for(result)` returns the bytes of the server's PNG, and errors go to `fail`. */
export function set_up_doubt(ask_for, fail) {
  ask = ask_for;
  $("doubt").onclick = async () => {
    is_on = !is_on;
    fail("");
    try { await draw(); } catch (error) {
      is_on = false;
      draw();
      fail(/doubt/.test(error.message) ? "This model cannot tell where it guessed." : error.message);
    }
    if (is_on) say($("doubt-note").textContent);
  };
}

/** Show the map over another result, if it is on; over none if `picture` is null. */
export function show_doubt(result, picture) {
  shown = picture && {result, picture};
  draw().catch(error => { $("doubt-note").textContent = error.message; });
}

/** Draw the map again, without regions that dots color: nobody guessed those. */
export const redraw_doubt = () => show_doubt(shown?.result, shown?.picture);

/** Return the marked region where a color helps most, the largest guess, or null. */
export function largest_guess() {
  const size = id => marks.get(id) * shown.picture.regions.get(id).area;
  const [largest] = [...marks.keys()].sort((one, other) => size(other) - size(one));
  return largest === undefined ? null : shown.picture.regions.get(largest);
}

async function draw() {
  const now = shown;
  marks = new Map();
  $("doubt").setAttribute("aria-pressed", String(is_on));
  show("doubt-map", false);
  show("doubt-note", is_on && Boolean(now));
  if (!is_on || !now) return;
  const {result, picture} = now;
  if (!result.doubt) {
    $("doubt-note").textContent = "Asking the model where it guessed...";
    result.doubt = decode_png(await ask(result));
  }
  const map = await result.doubt;
  if (shown !== now || !is_on) return;
  marks = marks_of(picture, map, picture.colors_by(result.edits.dots));
  const image = new ImageData(picture.width, picture.height);
  for (let place = 0; place < picture.labels.length; place++) {
    const opacity = marks.get(picture.labels[place]);
    if (opacity) image.data.set([...COLOR, opacity], 4 * place);
  }
  Object.assign($("doubt-map"), {width: picture.width, height: picture.height});
  $("doubt-map").getContext("2d").putImageData(image, 0, 0);
  show("doubt-map", true);
  $("doubt-note").textContent = marks.size ? NOTE : NONE;
}

/** Return how opaque the mark of a region is, a Map of id to 1..255, without the paper and the regions in `known`. */
function marks_of(picture, {channels, data}, known) {
  const sums = new Map(), marks = new Map(), paper = picture.paper();
  for (let place = 0; place < picture.labels.length; place++) {
    const id = picture.labels[place];
    sums.set(id, (sums.get(id) || 0) + data[place * channels]);
  }
  for (const {id, whole, area} of picture.regions.values()) {
    const opacity = Math.round(OPACITY * Math.min(1, (sums.get(id) / area - LOW) / (HIGH - LOW)));
    if (opacity > 0 && whole !== paper && !known.has(id)) marks.set(id, opacity);
  }
  return marks;
}
