// A colored drawing as layers: repaints regions without asking the server, with the server's own arithmetic.

import {bytes_of} from "./dom.js";
import {decode_png, encode_png} from "./formats.js";

export const hex_of = color => `#${color.map(level => level.toString(16).padStart(2, "0")).join("")}`;
export const color_of = hex => [1, 3, 5].map(place => parseInt(hex.slice(place, place + 2), 16));

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
    this.pixels = new ImageData(image.width, image.height);
    const target = this.pixels.data.fill(255);
    for (let place = 0; place < this.labels.length; place++)
      for (let channel = 0; channel < 3; channel++) target[4 * place + channel] = sample(image, place, channel);
  }

  region_at(x, y) {
    return this.regions.get(this.labels[y * this.width + x]);
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

  /** Return a picture of a region's outline, as large as its box. */
  outline({id, box: [left, top, right, bottom]}, thickness, color) {
    const {labels, width, height} = this, outline = new ImageData(right - left, bottom - top);
    const differs = (x, y) => x < 0 || y < 0 || x >= width || y >= height || labels[y * width + x] !== id;
    this.each_pixel({id, box: [left, top, right, bottom]}, (_, x, y) => {
      if (differs(x - thickness, y) || differs(x + thickness, y) || differs(x, y - thickness) || differs(x, y + thickness))
        outline.data.set([...color, 255], 4 * ((y - top) * (right - left) + x - left));
    });
    return outline;
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

/** Return one level of an image of any number of channels. */
function sample({channels, data}, place, channel) {
  return data[place * channels + (channels > 2 ? channel : 0)];
}
