"""Replace the starter model, which comes with the package, by the model of a run.

    python benchmarks/starter.py workspace/runs/starter/bundle --rows 20000 --core-minutes 360 [--length 0.05]

The weights are stored as float16 in platform/registry/starter; they are loaded as float32. The card says how the model
was made. docs/training.md has the commands that make its data and train it. Each replacement adds its size to the
history of the repository.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from animediffusion.models.bundle import BundleConfig, load_bundle, save_bundle, smoke_sample
from animediffusion.models.training.ema import read_averages
from animediffusion.platform.registry.downloads import STARTER_FOLDER

MOST_BYTES = 15_000_000
KEPT = ("recipe", "objective", "steps", "batch_size")
"""Provenance that is kept; the rest names folders and runs of the machine that trained."""

CARD = """# The starter model

Colors anime line art (1 channel, dark on white) from one or more color references. It comes with the package, and
answers while no version was promoted. `train ... init_from=starter` begins with it.

| | |
|---|---|
| image size | {size} px |
| parameters | {parameters:.1f} M, stored as float16 |
| trained on | {rows:,} drawings of this project (`data synthesize`): faces, and `--variety diverse` |
| recipe | `{recipe}`, {steps:,} steps of {batch} rows, {core_minutes} minutes of one CPU core |
| sampler | {sampler} |
| hints, several references | {hints}, up to 4 |
{measured}
No picture by anybody else was used in training, and no other model: line art, references and targets are drawn by the
code of this project. Weights and code are under Apache-2.0.

## What it cannot do

- It has seen drawings of simple shapes only. On the work of artists, expect hair and skin in about the right colors;
  clothes, backgrounds and small parts (irises, accessories, patterns) are often blurred, or in the color of their
  surroundings.
- It finds colors by similar shapes and positions. If drawing and reference show different views, poses or crops, it
  assigns colors to wrong parts more often; hints and `style=flat` help.
- It draws no texture and little shading of its own.
- It was trained for a short time on a CPU. A model that continues from it on your own pictures is better.
"""


def main() -> None:
    """Write the bundle and print its size and identity."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("bundle", type=Path, help="bundle of the run")
    arguments.add_argument("--rows", type=int, required=True, help="number of drawings it was trained on")
    arguments.add_argument("--core-minutes", type=int, required=True, help="minutes of one core that training took")
    arguments.add_argument("--length", type=float, help="length of the average of the weights; the bundle's if omitted")
    arguments.add_argument("--measured", default="", help="a sentence for the card about what was measured")
    arguments.add_argument("--out", type=Path, default=STARTER_FOLDER, help="folder to replace")
    options = arguments.parse_args()
    bundle = load_bundle(options.bundle)
    bundle = read_averages(bundle).use(bundle, options.length)
    kept = {key: value for key, value in bundle.config.provenance.items() if key in KEPT}
    config = replace(bundle.config, provenance={"run": "starter", **kept, "core_minutes": options.core_minutes})
    card = card_of(config, sum(one.numel() for one in bundle.denoiser.parameters()), options)
    sha256 = save_bundle(options.out, bundle.denoiser, config, {}, card, dtype=torch.float16)
    smoke_sample(load_bundle(options.out, sha256=sha256))
    for path in options.out.iterdir():
        path.chmod(0o644)  # every user of the machine can read the installed file
    size = sum(path.stat().st_size for path in options.out.iterdir())
    if size > MOST_BYTES:
        raise SystemExit(f"error: {options.out}: {size:,} bytes; at most {MOST_BYTES:,}")
    print(json.dumps({"folder": str(options.out), "bytes": size, "sha256": sha256, **asdict(config)["provenance"]}))


def card_of(config: BundleConfig, parameters: int, options: argparse.Namespace) -> str:
    """Return the card of the model."""
    made = config.provenance
    return CARD.format(
        size=config.image_size,
        parameters=parameters / 1e6,
        rows=options.rows,
        recipe=made.get("recipe", "?"),
        steps=made.get("steps", 0),
        batch=made.get("batch_size", 0),
        core_minutes=options.core_minutes,
        sampler=config.sampler.describe(),
        hints="seen by the network" if config.network.hints else "not seen by the network",
        measured=f"\n{options.measured}\n" if options.measured else "",
    )


if __name__ == "__main__":
    main()
