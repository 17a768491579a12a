"""Compare a step of phase 2 with the authors' on the authors' network: CPU time, activations, process memory.

    git clone https://github.com/xq-meng/AnimeDiffusion PATH_OF_CLONE
    python benchmarks/phase2.py --authors PATH_OF_CLONE

The authors' side uses their classes: fix_forward and ten differentiated steps. Our side is the objective of the recipe
animediffusion-phase2 with its sampler. It draws the number K of differentiated steps (1 or 2) per training step, so
both cases are measured: their times are averaged, and of their memory the larger counts. A step is forward and backward
in float32. Memory is measured in a separate process for each side. Activations are the most that autograd holds at a
time, without weights. The hooks do not see activations that a checkpointed pass saves while it is recomputed (K = 2);
the peak of the process includes everything. The exit code is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from authors import their_model
from torch import Tensor

from animediffusion.models.augmentation.augment import Batch
from animediffusion.models.bundle import BundleConfig
from animediffusion.models.training.loop import step_generator
from animediffusion.models.training.objective import ReconstructionObjective
from animediffusion.pipelines.training.recipe import load_recipe

TARGETS = {"CPU seconds per step": 1 / 3, "activations, MB": 1 / 8, "peak of the process, MB": 1 / 3}
SIDES = ("theirs", "ours, K = 1", "ours, K = 2")


def make_step(side: str, clone: str, size: int, rows: int) -> Callable[[], None]:
    """Return a function that runs one step: forward and backward, then clear the gradients."""
    generator = torch.Generator().manual_seed(0)
    target, sketch, reference = (torch.rand(rows, c, size, size, generator=generator) * 2 - 1 for c in (3, 1, 3))
    if side == "theirs":
        return _their_step(clone, target, torch.cat([sketch, reference], 1))
    return _our_step(int(side[-1]), Batch(target, sketch, reference))


def _their_step(clone: str, target: Tensor, together: Tensor) -> Callable[[], None]:
    model = their_model(clone)

    def step() -> None:
        start = model.fix_forward(target, x_cond=together)
        F.mse_loss(model.inference_ddim(start, x_cond=together)[-1], target).backward()
        model.zero_grad(set_to_none=True)

    return step


def _our_step(differentiated: int, batch: Batch) -> Callable[[], None]:
    phase1, phase2 = load_recipe("animediffusion"), load_recipe("animediffusion-phase2")
    config: BundleConfig = phase2.started_from(phase1.bundle_config(batch.target.shape[-1])).bundle_config(
        batch.target.shape[-1]
    )
    denoiser = config.build()
    objective = phase2.objective.build(denoiser, config.sampler, seed=0)
    assert isinstance(objective, ReconstructionObjective)
    number = next(n for n in range(1000) if objective.num_gradient_steps(n) == differentiated)

    def step() -> None:
        objective(batch, step_generator(0, number, 0), number).total.backward()
        objective.zero_grad(set_to_none=True)

    return step


class Meter:
    """Counts the bytes that autograd holds during a step, each storage once."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.holders: dict[int, int] = {}

    def measure(self, step: Callable[[], None]) -> float:
        """Run a step and return the most that autograd held at a time, in MB."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(self, tensor), lambda held: held.tensor):
            step()
        return self.peak / 1e6

    def add(self, storage: torch.UntypedStorage, change: int) -> None:
        """Record that a tensor of this storage was saved (1) or released (-1)."""
        key = storage.data_ptr()
        before = self.holders.get(key, 0)
        self.holders[key] = before + change
        if (before, change) == (0, 1):
            self.now += storage.nbytes()
        elif (before, change) == (1, -1):
            self.now -= storage.nbytes()
        self.peak = max(self.peak, self.now)


class _Held:
    def __init__(self, meter: Meter, tensor: Tensor) -> None:
        self.tensor = tensor
        # Weights and their reshaped views need no additional memory.
        self.counts = not (tensor.is_leaf and tensor.requires_grad) and not _is_weight(tensor)
        self.meter = meter
        if self.counts:
            meter.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        if self.counts:
            self.meter.add(self.tensor.untyped_storage(), -1)


def _is_weight(tensor: Tensor) -> bool:
    base = tensor._base
    return base is not None and base.is_leaf and base.requires_grad


def memory(side: str, clone: str, size: int, rows: int) -> dict[str, float]:
    """Return the memory in MB of one side; this process must not have run anything else."""
    step = make_step(side, clone, size, rows)
    step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"peak of the process, MB": peak, "activations, MB": Meter().measure(step)}


def _memory_apart(side: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--authors", args.authors, "--size", str(args.size)]
    done = subprocess.run(
        [*command, "--batch", str(args.batch), "--memory-of", side], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def seconds(clone: str, size: int, rows: int, repeats: int) -> dict[str, float]:
    """Run the sides alternately; return the median CPU time of a step of each side.

    CPU time does not include other processes on the machine.
    """
    steps = {side: make_step(side, clone, size, rows) for side in SIDES}
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side, step in steps.items():
            begun = time.process_time()
            step()
            taken[side].append(time.process_time() - begun)
    return {side: statistics.median(values) for side, values in taken.items()}


def table(found: dict[str, dict[str, float]]) -> tuple[str, bool]:
    """Return the table as Markdown, and whether all targets are met."""
    lines = ["| | theirs | ours, K = 1 | ours, K = 2 | ours / theirs | target | ok |", "|---|---|---|---|---|---|---|"]
    passed = True
    for what, target in TARGETS.items():
        theirs, one, two = (found[side][what] for side in SIDES)
        # Both values of K are equally likely, so times are averaged; memory must suffice for the larger K.
        ours = (one + two) / 2 if what.startswith("CPU") else max(one, two)
        passed &= ours / theirs <= target
        ok = "yes" if ours / theirs <= target else "NO"
        digits = 2 if what.startswith("CPU") else 0
        cells = " | ".join(f"{value:,.{digits}f}" for value in (theirs, one, two))
        lines.append(f"| {what} | {cells} | {ours / theirs:.3f} | {target:.3f} | {ok} |")
    return "\n".join(lines), passed


def main() -> None:
    """Print the table; exit with 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", required=True, help="clone of the authors' repository")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each side")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(memory(args.memory_of, args.authors, args.size, args.batch)))
        return
    found: dict[str, Any] = {side: _memory_apart(side, args) for side in SIDES}
    for side, value in seconds(args.authors, args.size, args.batch, args.repeats).items():
        found[side]["CPU seconds per step"] = value
    lines, passed = table(found)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.size} px, batch {args.batch}\n\n{lines}"
    )
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
