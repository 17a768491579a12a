// Requests pictures from the server: reads the event stream, retries while the server is busy, and words the errors.

import {fetch_with_key} from "./key.js";

const RETRIES = 30;
const BUSY = [429, 503];
const NAMES = {
  sketch: "Line art", reference: "Color picture", num_inference_steps: "Steps", guidance_scale: "Reference strength", seed: "Seed", sampler: "Sampler",
  style: "Style", background: "Background", hints: "Colors by hand",
};

/** An error of the server or of the connection: a message for people, and the form fields that caused the error. */
export class Problem extends Error {
  constructor(message, {status = 0, fields = [], wait = 2} = {}) {
    super(message);
    Object.assign(this, {status, fields, wait});
  }
}

/**
 * Return the data of the event `result`; throw a Problem on an error, or an AbortError if `signal` aborts.
 * Calls on_progress(event data) after each step, and on_wait(seconds left, problem) every second before a retry.
 */
export function colorize(body, {signal, on_progress, on_wait}) {
  return retry(() => ask(body, signal, on_progress), signal, on_wait);
}

/** Return {blob, version}: a file that the server makes for a form, and the model version that made it. */
export function ask_file(body) {
  return retry(() => reached(async () => {
    const response = await fetch_with_key("v1/colorize", {method: "POST", body});
    if (!response.ok) throw await problem_of(response);
    return {blob: await response.blob(), version: response.headers.get("X-Model-Version")};
  }), new AbortController().signal, () => {});
}

/** Send the form of a correction; throw a Problem if the server does not store it. */
export function send_correction(body) {
  return reached(async () => {
    const response = await fetch_with_key("v1/corrections", {method: "POST", body});
    if (!response.ok) throw await problem_of(response);
  });
}

async function retry(request, signal, on_wait) {
  for (let tries = 0; ; tries++) {
    try {
      return await request();
    } catch (error) {
      if (!BUSY.includes(error.status) || tries === RETRIES) throw error;
      for (let left = error.wait; left > 0; left--) {
        on_wait(left, error);
        await pause(1000, signal);
      }
      on_wait(0, error);
    }
  }
}

/** Call `request`, and throw a Problem if the connection fails. */
async function reached(request) {
  try {
    return await request();
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached. Your pictures are still here: try again when it is back.");
  }
}

function ask(body, signal, on_progress) {
  return reached(async () => {
    const response = await fetch_with_key("v1/colorize/stream", {method: "POST", body, signal});
    if (!response.ok) throw await problem_of(response);
    for await (const {name, data} of read_events(response.body)) {
      if (name === "progress") on_progress(data);
      else if (name === "error") throw problem(data);
      else if (name === "result") return data;
    }
    throw new Problem("The connection ended before the picture was finished. Please try again.");
  });
}

async function problem_of(response) {
  let body = {};
  try { body = await response.json(); } catch { /* The body is not JSON, for example the error page of a proxy. */ }
  return problem({...body, status: response.status}, Number(response.headers.get("Retry-After")) || undefined);
}

function problem({status, detail, errors = []}, wait) {
  if (status === 401) return new Problem("This server requires a key. Please enter it at the top of the page.", {status});
  if (status === 429) return new Problem("The server is busy.", {status, wait});
  if (/^request \S+ is unknown/.test(detail)) return new Problem("The server no longer has this picture's request, so it cannot take a correction of it.", {status});
  if (/^the correction/.test(detail)) return new Problem("The correction could not be stored. Please try again later.", {status, wait});
  if (status === 503) {
    const why = /no model/.test(detail) ? "The server has no model ready yet." : "The server cannot color now.";
    return new Problem(why, {status, wait});
  }
  if (status === 413) return new Problem("The pictures are too large together. Please make them smaller.", {status});
  if (status === 504) return new Problem("The server did not finish in time. Please try again, or with fewer steps.", {status});
  if (errors.length) return new Problem(errors.map(error => in_words(error, detail)).join(" "), {status, fields: errors.map(error => error.field)});
  const text = detail || `The server answered ${status}.`, first = text.split(" ")[0];
  const named = NAMES[first] ? NAMES[first] + text.slice(first.length) : text;
  return new Problem(sentence(named), {status, fields: NAMES[first] ? [first] : []});
}

function in_words({field, found, allowed}, detail) {
  const number = (detail || "").match(/^reference (\d)/), name = (NAMES[field] || field) + (field === "reference" && number ? ` ${number[1]}` : "");
  return field in {sketch: 0, reference: 0} ? sentence(`${name} ${found}: ${allowed}`) : sentence(`${name}: ${found} is not allowed; give ${allowed}`);
}

function sentence(text) {
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, {once: true});
  });
}

async function* read_events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const [name, data] = text.slice(0, end).split("\n").map(line => line.slice(line.indexOf(": ") + 2));
      text = text.slice(end + 2);
      yield {name, data: JSON.parse(data)};
    }
  }
}
