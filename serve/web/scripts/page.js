// The web page: choose drawings and a reference, watch the coloring. results.js shows, edits and saves what is made.

import {colorize} from "./colorize.js";
import {$, element, say, show} from "./dom.js";
import {choose_settings, fail, files, form_data, invert, load_examples, missing, name_of, on_files} from "./inputs.js";
import {fetch_with_key, on_key} from "./key.js";
import {add, form_for_try, form_to_spread, present, present_last, reveal, set_sketch, set_stage, set_up_actions, settings_of_shown, show_list} from "./results.js";

let running = null;

on_files(() => {
  const kind = missing();
  set_button();
  if (!running) $("note").textContent = kind ? `Now choose ${kind === "sketch" ? "your line art" : "where the colors come from"}.` : "Ready.";
});

// --- coloring -------------------------------------------------------------------------------------------------------

function progress(part, text) {
  show("bar", part !== null);
  if (part === null) return;
  $("bar").firstElementChild.style.width = `${Math.round(100 * part)}%`;
  $("bar").setAttribute("aria-valuenow", Math.round(100 * part));
  $("bar").setAttribute("aria-valuetext", text);
  $("note").textContent = text;
}

function set_button() {
  const number = files.sketch.length;
  $("go").textContent = running ? "Stop" : number > 1 ? `Color ${number} drawings` : "Color it";
  $("go").disabled = !running && Boolean(missing());
}

function set_running(controller) {
  running = controller;
  set_button();
  $("again").disabled = $("spread").disabled = Boolean(controller);
  $("pictures").inert = Boolean(controller);
  $("stage").setAttribute("aria-busy", String(Boolean(controller)));
}

/** Send forms, one after the other; a drawing that cannot be colored does not end the others. */
async function color(forms) {
  fail("");
  const controller = new AbortController(), done = [], failed = [];
  set_running(controller);
  say("Coloring.");
  try {
    for (const [number, form] of forms.entries()) {
      try {
        done.push(await color_one(form, {number, count: forms.length}, controller.signal));
      } catch (error) {
        if (forms.length === 1 || !error.fields?.includes("sketch")) throw error;
        failed.push(`${name_of(form.get("sketch"))}: ${error.message}`);
      }
    }
    if (failed.length) fail(`${done.length} of ${forms.length} drawings are colored. ${failed.join(" ")}`);
    if (done.length) await finish(done[0]);
    else await present_again();
  } catch (error) {
    if (done.length) await present(done[0]);
    await end_badly(error, forms.slice(done.length + failed.length), forms.length);
  } finally {
    show("wait", false);
    progress(null);
    set_running(null);
  }
}

async function color_one(form, {number, count}, signal) {
  const started = performance.now(), url = URL.createObjectURL(form.get("sketch"));
  const words = text => count > 1 ? `Drawing ${number + 1} of ${count}: ${text.toLowerCase()}` : text;
  let steps = 0;
  set_stage("drawing");
  progress((number + 0.04) / count, words("Sending..."));
  await set_sketch(url);
  if (!number) $("stage").scrollIntoView({block: "nearest"});
  const on_progress = ({step, total, preview}) => {
    steps = total;
    $("preview").src = preview;
    show("preview", true);
    progress((number + step / (total + 0.5)) / count, words(`Step ${step} of ${total}`));
  };
  try {
    const answer = await colorize(form, {signal, on_progress, on_wait: show_wait});
    const one = await add(answer, form, (performance.now() - started) / 1000, steps);
    if (count > 1) show_list();
    return one;
  } finally {
    URL.revokeObjectURL(url);
  }
}

async function finish(one) {
  await present(one);
  reveal();
  say(`Done. ${$("note").textContent}`);
}

async function present_again() {
  if (!await present_last()) set_stage("hint");
}

function show_wait(seconds, problem) {
  $("wait").textContent = `${problem.message} Trying again ${seconds ? `in ${seconds} s` : "now"}.`;
  show("wait", seconds > 0);
  if (seconds === problem.wait) say($("wait").textContent);
}

/** Report an error or a stop, and offer what helps: `rest` are the forms, of `count`, that were not answered. */
async function end_badly(error, rest, count) {
  await present_again();
  const stopped = error.name === "AbortError", some = rest.length < count;
  $("note").textContent = stopped ? "Stopped." : "";
  if (stopped) say("Stopped.");
  if (stopped && !some) return;
  fail(`${some ? `${count - rest.length} of ${count} drawings are done. ` : ""}${stopped ? "" : error.message}`, error.fields);
  if (some) offer_help(`Color the other ${rest.length}`, () => color(rest));
  else if (count === 1 && error.fields?.includes("sketch") && /black/.test(error.message)) offer_help("Invert it for me", () => invert(rest[0].get("sketch")));
}

function offer_help(text, onclick) {
  $("error").append(element("br"), element("button", {type: "button", className: "button", textContent: text, onclick}));
}

$("again").onclick = () => color([form_for_try()]);
$("spread").onclick = async () => {
  const form = await form_to_spread();
  if (form) color([form]);
  else fail("First click a region of the picture and give it a color: all that looks alike then gets that color.");
};
$("keep-seed").onclick = () => choose_settings(settings_of_shown());
$("form").onsubmit = event => {
  event.preventDefault();
  if (running) running.abort();
  else color(files.sketch.map(form_data));
};
window.addEventListener("keydown", event => { if (event.key === "Escape") running?.abort(); });
set_up_actions(fail);

// --- the server -----------------------------------------------------------------------------------------------------

function set_status(text, state) {
  if ($("status").textContent !== text) $("status").textContent = text; // A live region: screen readers announce every assignment.
  $("status").className = `pill ${state}`;
}

async function check_status() {
  if (document.hidden) return;
  try {
    const response = await fetch_with_key("v1/models");
    if (response.status === 401) return set_status("key needed", "down");
    if (!response.ok) return set_status("server error", "down");
    const versions = Object.keys((await response.json()).traffic);
    set_status(versions.length ? `model ${versions.join(", ")}` : "no model yet", versions.length ? "ready" : "");
  } catch {
    set_status("server unreachable", "down");
  }
}

load_examples().catch(() => fail("The examples could not be loaded: the server cannot be reached."));
on_key(check_status);
check_status();
setInterval(check_status, 10000);
document.addEventListener("visibilitychange", check_status);
