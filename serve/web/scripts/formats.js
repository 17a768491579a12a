// PNG and ZIP files in plain JavaScript. A canvas would read 16-bit samples as 8-bit ones, and round the colors of
// transparent pixels.

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4};
const CRC_TABLE = Uint32Array.from({length: 256}, (_, value) => {
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

export function crc32(bytes) {
  let crc = 0xffffffff;
  for (let i = 0; i < bytes.length; i++) crc = CRC_TABLE[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

async function through(stream, parts) {
  return new Uint8Array(await new Response(new Blob(parts).stream().pipeThrough(stream)).arrayBuffer());
}

/**
 * Return {width, height, channels, data} of a PNG: gray or RGB, with or without alpha, not interlaced.
 * data has 8 or 16 bits for each sample, row by row.
 */
export async function decode_png(bytes) {
  if (SIGNATURE.some((byte, i) => bytes[i] !== byte)) throw new Error("not a PNG");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength), parts = [];
  const width = view.getUint32(16), height = view.getUint32(20), depth = bytes[24], channels = CHANNELS[bytes[25]];
  if (!channels || depth < 8 || bytes[28]) throw new Error("a kind of PNG that the page cannot read");
  for (let place = 8; place < bytes.length;) {
    const length = view.getUint32(place), type = String.fromCharCode(...bytes.subarray(place + 4, place + 8));
    if (type === "IDAT") parts.push(bytes.subarray(place + 8, place + 8 + length));
    place += 12 + length;
  }
  const step = channels * depth / 8, samples = unfilter(await through(new DecompressionStream("deflate"), parts), width * step, height, step);
  if (depth === 8) return {width, height, channels, data: samples};
  const data = new Uint16Array(samples.length / 2);
  for (let i = 0; i < data.length; i++) data[i] = samples[2 * i] << 8 | samples[2 * i + 1];
  return {width, height, channels, data};
}

/** Undo the filters of PNG (section 9.2 of its specification): each row begins with the number of its filter. */
function unfilter(raw, stride, height, step) {
  const out = new Uint8Array(stride * height);
  for (let row = 0; row < height; row++) {
    const from = row * (stride + 1) + 1, to = row * stride, kind = raw[from - 1];
    for (let i = 0; i < stride; i++) {
      const left = i < step ? 0 : out[to + i - step], above = row ? out[to + i - stride] : 0;
      let guess = 0;
      if (kind === 1) guess = left;
      else if (kind === 2) guess = above;
      else if (kind === 3) guess = (left + above) >> 1;
      else if (kind === 4) guess = predict(left, above, i < step || !row ? 0 : out[to + i - stride - step]);
      out[to + i] = raw[from + i] + guess;
    }
  }
  return out;
}

/** Return the neighbor that is nearest to left + above - corner. */
function predict(left, above, corner) {
  const by_left = Math.abs(above - corner), by_above = Math.abs(left - corner), by_corner = Math.abs(left + above - 2 * corner);
  if (by_left <= by_above && by_left <= by_corner) return left;
  return by_above <= by_corner ? above : corner;
}

/** Return the bytes of a PNG of 8-bit samples; each row is stored as its difference from the row above. */
export async function encode_png({width, height, channels, data}) {
  const stride = width * channels, raw = new Uint8Array((stride + 1) * height);
  for (let row = 0; row < height; row++) {
    const to = row * (stride + 1), from = row * stride;
    raw[to] = 2;
    for (let i = 0; i < stride; i++) raw[to + 1 + i] = data[from + i] - (row ? data[from + i - stride] : 0);
  }
  const head = new Uint8Array(13), view = new DataView(head.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  head.set([8, Number(Object.keys(CHANNELS).find(kind => CHANNELS[kind] === channels))], 8);
  const packed = await through(new CompressionStream("deflate"), [raw]);
  return joined([Uint8Array.from(SIGNATURE), chunk("IHDR", head), chunk("IDAT", packed), chunk("IEND", new Uint8Array())]);
}

function chunk(type, data) {
  const bytes = new Uint8Array(12 + data.length), view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(data, 8);
  view.setUint32(8 + data.length, crc32(bytes.subarray(4, 8 + data.length)));
  return bytes;
}

function joined(arrays) {
  const all = new Uint8Array(arrays.reduce((sum, one) => sum + one.length, 0));
  let place = 0;
  for (const one of arrays) {
    all.set(one, place);
    place += one.length;
  }
  return all;
}

/** Return a ZIP of [{name, bytes}], stored without compression, because PNGs are compressed already. */
export function zip(files, now = new Date()) {
  const time = now.getHours() << 11 | now.getMinutes() << 5 | now.getSeconds() >> 1;
  const date = now.getFullYear() - 1980 << 9 | now.getMonth() + 1 << 5 | now.getDate();
  const parts = [], directory = [];
  let place = 0;
  for (const {name, bytes} of files) {
    const encoded = new TextEncoder().encode(name), crc = crc32(bytes);
    // Version 2.0, names in UTF-8, stored, time, date, checksum, both sizes, length of the name, no extra field.
    const common = [[20, 2], [0x800, 2], [0, 2], [time, 2], [date, 2], [crc, 4], [bytes.length, 4], [bytes.length, 4], [encoded.length, 2], [0, 2]];
    const local = record([[0x04034b50, 4], ...common]);
    parts.push(local, encoded, bytes);
    directory.push(record([[0x02014b50, 4], [20, 2], ...common, [0, 2], [0, 2], [0, 2], [0, 4], [place, 4]]), encoded);
    place += local.length + encoded.length + bytes.length;
  }
  const size = directory.reduce((sum, one) => sum + one.length, 0);
  const end = record([[0x06054b50, 4], [0, 2], [0, 2], [files.length, 2], [files.length, 2], [size, 4], [place, 4], [0, 2]]);
  return new Blob([...parts, ...directory, end], {type: "application/zip"});
}

/** Return little-endian numbers, given as [number, size in bytes]. */
function record(fields) {
  return Uint8Array.from(fields.flatMap(([number, size]) => Array.from({length: size}, (_, i) => number >>> 8 * i & 255)));
}
