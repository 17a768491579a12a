"""The model card of a bundle, in Markdown."""

from __future__ import annotations

from typing import Any

from animediffusion.models.bundle import BundleConfig


def model_card(config: BundleConfig, num_parameters: int) -> str:
    """What the model is, how it was made, how to use it, what it cannot do."""
    made, sampler = config.provenance, config.sampler
    trained = f"elsewhere: {made['source']}" if "source" in made else _training(made)
    return f"""# AnimeDiffusion bundle `{made.get("run", "unnamed")}`

Colors anime line art (1 channel, dark on white) from a color reference.

| | |
|---|---|
| image size | {config.image_size} px |
| parameters | {num_parameters / 1e6:.1f} M |
| path, prediction | {config.path.name}, {config.prediction} |
| sampler | {sampler.name}, {sampler.steps} steps, guidance {sampler.guidance_scale:g} |
| trained | {trained} |
| data | sha256 {str(made.get("data_hash", ""))[:12]} |

Use: `animediffusion colorize SKETCH --reference IMAGE --out DIR --model THIS_FOLDER`.

Made for faces and busts in the style of its training data; other drawings get plausible, not correct, colors. The
rights in the training images decide what the model may be used for.
"""


def _training(made: dict[str, Any]) -> str:
    phase = "phase 2, reconstruction through the sampler" if made.get("objective") == "reconstruction" else "phase 1"
    return f"{made.get('recipe', '?')} ({phase}), {made.get('steps', 0)} steps of {made.get('batch_size', '?')} images"
