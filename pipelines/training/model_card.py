"""The model card of a bundle, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from animediffusion.models.bundle import BundleConfig


def model_card(config: BundleConfig, num_parameters: int, seconds: float | None = None) -> str:
    """Return the card: what the model is, how it was made, how to use it, what its limits are.

    Args:
        config: configuration of the bundle, with its provenance.
        num_parameters: number of parameters of the network.
        seconds: duration of the training; None if unknown.
    """
    made, sampler = config.provenance, config.sampler
    rows = {
        "image size": f"{config.image_size} px",
        "parameters": f"{num_parameters / 1e6:.1f} M",
        "path, prediction": f"{config.path.name}, {config.prediction}",
        "sampler": sampler.describe(),
        "trained": f"elsewhere: {made['source']}" if "source" in made else _training(made, seconds),
        "from the weights of": f"sha256 {str(made['parent'])[:12]}" if made.get("parent") else None,
        "attention": made.get("attention"),
        "data": f"sha256 {str(made['data_hash'])[:12]}" if made.get("data_hash") else None,
        "rehearsed": _rehearsed(made) if made.get("rehearse_hash") else None,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return f"""# AnimeDiffusion bundle `{made.get("run", "unnamed")}`

Colors anime line art (1 channel, dark on white) from a color reference.

| | |
|---|---|
{table}

Use: `animediffusion colorize SKETCH --reference IMAGE --out DIR --model THIS_FOLDER`. The metrics of
`animediffusion evaluate`, if it was run, are in `metrics.json`.

Made for faces and busts in the style of its training data; other drawings get plausible, not correct, colors. The
code is under Apache-2.0; the rights to the training images determine the permitted uses of the model.
"""


def _rehearsed(made: Mapping[str, Any]) -> str:
    return f"{made['rehearse_share']:.0%} of each batch, from sha256 {made['rehearse_hash'][:12]}"


def _training(made: Mapping[str, Any], seconds: float | None) -> str:
    phase = "phase 2, reconstruction through the sampler" if made.get("objective") == "reconstruction" else "phase 1"
    steps, batch = made.get("steps", 0), made.get("batch_size", 0)
    length = f"{steps:,} step{'s' * (steps != 1)} of {batch} images, {steps * batch:,} in all"
    text = f"{made.get('recipe', '?')} ({phase}), {length}"
    return text if seconds is None else f"{text}, {seconds / 60:.1f} minutes"
