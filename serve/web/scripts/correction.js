// "Send as a correction": what a person repainted goes to the server, which stores it so that a model learns from it.

import {send_correction} from "./colorize.js";
import {$, say, show} from "./dom.js";

const STORED = "The server stores your drawing, the color pictures, this picture and your colors, and models learn from them.";
const AGREED = "corrections";
/** The shown result, and what returns its content; null if nothing can be sent. */
let shown = null, content = null;

/**
 * Offer to send the shown result if the server takes corrections and its dots change something.
 * `of()` returns {image, hints}: the bytes of the repainted picture, and its dots as hints.
 */
export function offer_correction(result, picture, of) {
  const changes = result?.answer.correctable && [...picture.colors_by(result.edits.dots)].some(([id, color]) => color !== picture.regions.get(id).color);
  [shown, content] = changes ? [result, of] : [null, null];
  const is_sent = Boolean(shown) && shown.sent === shown.edits.dots;
  ask(false);
  show("correction", Boolean(shown));
  show("send-correction", !is_sent);
  $("correction-note").textContent = is_sent ? "Sent as a correction. Thank you!" : STORED;
}

/** Ask whether to send, or stop asking. */
function ask(on) {
  show("agree", on);
  show("disagree", on);
  show("send-correction", !on);
}

async function send() {
  const result = shown, {edits: {dots}} = result, form = new FormData();
  ask(false);
  $("send-correction").disabled = true;
  $("correction-note").textContent = "Sending...";
  try {
    const {image, hints} = await content();
    form.set("request_id", result.answer.request_id);
    form.set("corrected", new Blob([image], {type: "image/png"}), "corrected.png");
    form.set("hints", new Blob([JSON.stringify(hints)], {type: "application/json"}), "hints.json");
    await send_correction(form);
    result.sent = dots;
    if (shown === result && dots === result.edits.dots) {
      show("send-correction", false);
      $("correction-note").textContent = "Sent as a correction. Thank you!";
    }
    say("Sent as a correction.");
  } catch (error) {
    if (shown === result) $("correction-note").textContent = error.message;
    say(error.message);
  } finally {
    $("send-correction").disabled = false;
  }
}

$("send-correction").onclick = () => {
  if (sessionStorage.getItem(AGREED)) return send();
  ask(true);
  $("agree").focus();
};
$("agree").onclick = () => {
  sessionStorage.setItem(AGREED, "yes"); // Asked once: until the tab is closed, further corrections are sent at a click.
  send();
};
$("disagree").onclick = () => {
  ask(false);
  $("send-correction").focus();
};
