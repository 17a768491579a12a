// A colored drawing as layers: repaints regions without asking the server, with the server's own arithmetic.

import {bytes_of} from "./dom.js";
import {decode_png, encode_png} from "./formats.js";

export const hex_of = color => `#${color.map(level => level.toString(16).padStart(2, "0")).join("")}`;
export const color_of = hex => [1, 3, 5].map(place => parseInt(hex.slice(place, place + 2), 16));

/** What a dot colors, in the order in which dots apply: the most exact one wins. As in serve/rendering/hints.py. */
export const SCOPES = ["color", "whole", "piece"];
/** Two colors are shades of one color if the cosine of their angle is at least this many hundredths, as in hints.py. */
const SHADE = 98;

/** Return whether a color is a shadow or a light of another. */
function is_shade(one, other) {
  const product = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
  return product(one, other) ** 2 * 100 ** 2 >= SHADE ** 2 * product(one, one) * product(other, other);
}

/** Return what `color` is where `base` is `shade`: multiplied or screened, whichever changes it less. */
function shaded_like(color, shade, base) {
  const sum = levels => levels[0] + levels[1] + levels[2], changed = sum(shade), old = sum(base);
  const nearest = changed < old ? Math.max : Math.min;
  return color.map(level => nearest(scaled(level, changed, old), 255 - scaled(255 - level, 765 - changed, 765 - old)));
}

function scaled(level, changed, old) {
  if (!old) return changed ? 255 : level;
  return Math.min(255, Math.floor((2 * level * changed + old) / (2 * old)));
}

/** Return below x above / 255, rounded, for levels from 0 to 255. */
const multiplied = (below, above) => (below * above + 127) / 255 | 0;

export class Picture {
  /** Decode the answer of the server for output=layers. */
  static async decode(answer) {
    const names = ["image", "labels", "lines", "shading", "highlights"].filter(name => answer[name]);
    const layers = await Promise.all(names.map(name => decode_png(bytes_of(answer[name]))));
    return new Picture(Object.fromEntries(names.map((name, number) => [name, layers[number]])), answer.regions);
  }

  constructor({image, labels, lines, shading, highlights}, regions) {
    Object.assign(this, {width: image.width, height: image.height, labels: labels.data, lines, shading, highlights});
    this.regions = new Map(regions.map(region => [region.id, region]));
    this.colors = new Map(regions.map(region => [region.id, region.color]));
    this.pieces = grouped(regions, "whole");
    this.alike = grouped(regions, "color");
    this.pixels = new ImageData(image.width, image.height);
    const target = this.pixels.data.fill(255);
    for (let place = 0; place < this.labels.length; place++)
      for (let channel = 0; channel < 3; channel++) target[4 * place + channel] = sample(image, place, channel);
  }

  region_at(x, y) {
    return this.regions.get(this.labels[y * this.width + x]);
  }

  /** Return the region of the drawing around a figure, if its pieces are white: one that has most of the border. */
  paper() {
    const {width, height, labels} = this, count = new Map();
    const add = place => {
      const {whole, color} = this.regions.get(labels[place]);
      if (color === "#ffffff") count.set(whole, (count.get(whole) || 0) + 1);
    };
    for (let x = 0; x < width; x++) [x, x + (height - 1) * width].forEach(add);
    for (let y = 1; y < height - 1; y++) [y * width, y * width + width - 1].forEach(add);
    return [...count].find(([, number]) => number > width + height - 2)?.[0];
  }

  /** Return all pieces of a region of the drawing, of which a picture makes several where it has shadows or lights. */
  pieces_of(region) {
    return this.pieces.get(region.whole);
  }

  /** Return the colors that a dot gives to regions, a Map of id to #rrggbb; a dot without a color gives them null. */
  colored_by({x, y, color, scope}) {
    const piece = this.region_at(x, y), found = new Map();
    if (scope === "piece") return found.set(piece.id, color);
    const wholes = new Set((scope === "color" ? this.alike.get(piece.color) : [piece]).map(region => region.whole));
    const old = color_of(piece.color), exact = color && color_of(color);
    for (const region of [...wholes].flatMap(whole => this.pieces.get(whole))) {
      const own = color_of(region.color), is_same = region.color === piece.color;
      if (!is_same && is_shade(own, old)) found.set(region.id, color && hex_of(shaded_like(exact, own, old)));
      else if (is_same || scope === "whole") found.set(region.id, color);
    }
    return found;
  }

  /** Return the colors that dots give to regions, a Map of id to #rrggbb. */
  colors_by(dots) {
    return new Map(in_order(dots).flatMap(dot => [...this.colored_by(dot)]));
  }

  /** Draw the whole picture on a canvas, on which later repaints draw, too. */
  draw_on(canvas) {
    Object.assign(canvas, {width: this.width, height: this.height});
    this.canvas = canvas.getContext("2d");
    this.canvas.putImageData(this.pixels, 0, 0);
  }

  /** Give regions new colors, a Map of id to #rrggbb, and all others their own again. */
  recolor(changed) {
    for (const region of this.regions.values()) {
      const color = changed.get(region.id) || region.color;
      if (color === this.colors.get(region.id)) continue;
      this.colors.set(region.id, color);
      this.repaint(region, color_of(color));
    }
  }

  repaint(region, color) {
    const target = this.pixels.data, [left, top, right, bottom] = region.box, exact = [0, 0, 0];
    this.each_pixel(region, place => {
      this.shade(place, color, exact);
      for (let channel = 0; channel < 3; channel++) target[4 * place + channel] = multiplied(exact[channel], sample(this.lines, place, channel));
    });
    this.canvas?.putImageData(this.pixels, 0, 0, left, top, right - left, bottom - top);
  }

  /** Return the pixel of a region that is nearest to the middle of its box, as [x, y]. */
  middle_of(region) {
    const [left, top, right, bottom] = region.box, far = (x, y) => Math.hypot(2 * x - left - right, 2 * y - top - bottom);
    let best = [left, top], least = Infinity;
    this.each_pixel(region, (_, x, y) => {
      if (far(x, y) < least) [best, least] = [[x, y], far(x, y)];
    });
    return best;
  }

  each_pixel({id, box: [left, top, right, bottom]}, call) {
    for (let y = top; y < bottom; y++)
      for (let x = left, place = y * this.width + left; x < right; x++, place++) if (this.labels[place] === id) call(place, x, y);
  }

  /** Write the color of a pixel without lines to `out`: a flat color under the shading. */
  shade(place, color, out) {
    for (let channel = 0; channel < 3; channel++) {
      const dark = this.shading ? multiplied(color[channel], sample(this.shading, place, channel)) : color[channel];
      out[channel] = this.highlights ? 255 - multiplied(255 - dark, 255 - sample(this.highlights, place, channel)) : dark;
    }
  }

  /** Return the outline of regions, some ids, as {left, top, image}. */
  outline(ids, thickness, color) {
    const {labels, width, height} = this, boxes = [...ids].map(id => this.regions.get(id).box);
    const [left, top] = [0, 1].map(side => Math.min(...boxes.map(box => box[side])));
    const [right, bottom] = [2, 3].map(side => Math.max(...boxes.map(box => box[side])));
    const image = new ImageData(right - left, bottom - top), inside = new Uint8Array(2 ** 16); // Ids have 16 bits.
    for (const id of ids) inside[id] = 1;
    const differs = (x, y) => x < 0 || y < 0 || x >= width || y >= height || !inside[labels[y * width + x]];
    for (let y = top; y < bottom; y++)
      for (let x = left; x < right; x++)
        if (!differs(x, y) && (differs(x - thickness, y) || differs(x + thickness, y) || differs(x, y - thickness) || differs(x, y + thickness)))
          image.data.set([...color, 255], 4 * ((y - top) * (right - left) + x - left));
    return {left, top, image};
  }

  /** Return the finished picture as the bytes of a PNG. */
  async png() {
    const {width, height} = this, source = this.pixels.data, data = new Uint8Array(3 * width * height);
    for (let place = 0; place < width * height; place++)
      for (let channel = 0; channel < 3; channel++) data[3 * place + channel] = source[4 * place + channel];
    return encode_png({width, height, channels: 3, data});
  }

  /** Return the colors without lines as the bytes of a PNG; white is transparent. */
  async layer_png() {
    const {width, height, labels} = this, data = new Uint8Array(4 * width * height), color = [0, 0, 0];
    const colors = new Map([...this.colors].map(([id, hex]) => [id, color_of(hex)]));
    for (let place = 0; place < labels.length; place++) {
      this.shade(place, colors.get(labels[place]), color);
      for (let channel = 0; channel < 3; channel++) data[4 * place + channel] = color[channel];
      data[4 * place + 3] = color.every(level => level === 255) ? 0 : 255;
    }
    return encode_png({width, height, channels: 4, data});
  }
}

/** Return a Map of each value of a key to the objects that have it. */
function grouped(objects, key) {
  const groups = new Map();
  for (const one of objects) {
    if (!groups.has(one[key])) groups.set(one[key], []);
    groups.get(one[key]).push(one);
  }
  return groups;
}

/** Return dots in the order in which they apply, those of one scope as they are. */
export function in_order(dots) {
  return dots.toSorted((one, other) => SCOPES.indexOf(one.scope) - SCOPES.indexOf(other.scope));
}

/** Return one level of an image of any number of channels. */
function sample({channels, data}, place, channel) {
  return data[place * channels + (channels > 2 ? channel : 0)];
}
