"""Compare training steps with the authors' code on the same network, start and batches: images/s, peak memory, loss.

    git clone https://github.com/xq-meng/AnimeDiffusion PATH_OF_CLONE
    python benchmarks/training.py --authors PATH_OF_CLONE [--data URI] [--steps 20] [--out FILE]

Both sides train the authors' network of 52.3 M parameters. Each side runs in its own process, so each has its own peak
memory; the sides alternate in blocks of two steps. The authors' side repeats a step of their base/trainer.py with their
classes: loss, NaN check, backward, AdamW, both as shipped (float32) and under bf16 autocast. Making its batches is not
timed. Our side is fit() in a process with the environment variables of a training worker; its time includes making the
batches.

Phase 1 uses the recipe `animediffusion-strict`: both sides compute the same loss of the same batches, noise and times
at a constant learning rate, so only rounding differs. Phase 2 compares `animediffusion-phase2` with the authors' ten
differentiated steps; the two losses are not comparable.

On a CPU the clock counts CPU time of all threads (one by default), so images/s are those of one core, and other work on
the machine does not count. On a GPU it counts wall-clock time, and our side runs with torch's attention, with xformers,
and compiled. The share column is the fraction of the rate at which the same device multiplies large bf16 matrices in
the same run. The exit code is 1 if a target, which exists only for CPUs, is missed.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from authors import given_noise
from common import clock, drawn, hardware, matmul_flops, peak_mb
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from animediffusion.models.augmentation.augment import Batch, make_batch
from animediffusion.models.authors.weights import from_authors
from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.network.attention import Backend, use_attention
from animediffusion.models.training.loop import MALLOC, Rows, TrainState, fit, step_generator
from animediffusion.models.training.objective import ReconstructionObjective
from animediffusion.pipelines.training.recipe import TrainConfig, load_recipe

BLOCK = 2
"""Steps of a side per round; the first round is not timed."""
NUM_BATCHES = 8
CONSTANT_RATE = (
    *("optimizer.warmup_steps=0", "optimizer.cosine_after_warmup=false", "optimizer.final_learning_rate=1.0"),
    *("optimizer.learning_rate=1e-4", "max_steps=1000000"),
)
TARGETS = {1: {"theirs": 2.0, "theirs, bf16": 0.97}, 2: {"theirs": 3.0}}
"""By phase and side: the least ratio of our images/s to that side's, on a CPU. A run can resolve differences of about
3 %."""
LOSS_TOLERANCE = 0.02
"""Largest difference between the phase 1 losses, relative to the authors' loss."""


@dataclass(frozen=True)
class Side:
    """One column of the comparison."""

    name: str
    ours: bool
    precision: str
    attention: Backend = "sdpa"
    compiled: bool = False


CPU_SIDES = (Side("theirs", False, "fp32"), Side("theirs, bf16", False, "bf16"), Side("ours", True, "bf16"))
GPU_SIDES = (
    *CPU_SIDES,
    Side("ours, xformers", True, "bf16", "xformers"),
    Side("ours, compiled", True, "bf16", compiled=True),
    Side("ours, float32", True, "fp32"),
)


@dataclass(frozen=True)
class Job:
    """Settings that all sides of a table share."""

    clone: str
    data: str | None
    device: str
    phase: int
    size: int
    batch: int
    steps: int
    threads: int

    @property
    def rounds(self) -> int:
        """Number of rounds of each side, the first one included."""
        return 1 + -(-self.steps // BLOCK)


@dataclass
class Found:
    """Measurements of one side."""

    seconds: list[float] = field(default_factory=list)
    """Mean seconds of a step, for each round."""
    losses: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    flops: float = 0.0

    @property
    def step_seconds(self) -> float:
        """Seconds of a step: the median over all rounds but the first."""
        return statistics.median(self.seconds[1:])

    @property
    def late_loss(self) -> float:
        """Mean loss of the second half of the steps."""
        return statistics.fmean(self.losses[len(self.losses) // 2 :])


def compare(job: Job, sides: tuple[Side, ...]) -> dict[str, Found]:
    """Run all sides round by round and return their measurements."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for side in sides:
        pipes[side.name], end = context.Pipe()
        with environment(MALLOC if side.ours else {}):
            context.Process(target=serve, args=(end, side, job), daemon=True).start()
    found = {side.name: Found() for side in sides}
    for number, side in itertools.product(range(job.rounds), sides):
        pipes[side.name].send(BLOCK)
        seconds, losses = pipes[side.name].recv()
        found[side.name].seconds.append(seconds)
        found[side.name].losses += losses
        print(f"  phase {job.phase}, {side.name}, round {number}: {seconds:.2f} s a step", file=sys.stderr, flush=True)
    for name, pipe in pipes.items():
        pipe.send(0)
        found[name].peak_mb, found[name].flops = pipe.recv()
    return found


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for processes started in this context; glibc reads them when a process starts."""
    os.environ.update(variables)
    yield
    for name in variables:
        del os.environ[name]


def serve(pipe: Connection, side: Side, job: Job) -> None:
    """Run one side in this process: receive numbers of steps and run them, until the number is 0."""
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    if side.ours:
        use_attention(side.attention)
    step = (_our_steps if side.ours else _their_steps)(side, job, device)
    while count := pipe.recv():
        pipe.send(step(count))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    peak = peak_mb(device)
    pipe.send((peak, 0.0 if side.compiled else _count(step)))


def _count(step: Callable[[int], object]) -> float:
    """Return the floating-point operations of a step's products and convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step(1)
    return float(counter.get_total_flops())


def _their_steps(side: Side, job: Job, device: torch.device) -> Callable[[int], tuple[float, list[float]]]:
    model = _their_model(job.clone).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches = _batches(job, device)

    def one(batch: Batch, noise: Tensor, n: Tensor) -> Tensor:
        together = torch.cat([batch.sketch, batch.reference], 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=side.precision == "bf16"):
            if job.phase == 1:
                with given_noise([noise]):
                    loss: Tensor = model(x=batch.target, t=n, x_cond=together)
            else:
                start = model.fix_forward(batch.target, x_cond=together)
                loss = F.mse_loss(model.inference_ddim(x_t=start, x_cond=together)[-1], batch.target)
        bad = torch.isnan(loss).int().sum() > 0
        loss.backward()
        if not bad:
            optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def steps(count: int) -> tuple[float, list[float]]:
        seconds, values = 0.0, []
        for _ in range(count):
            given = next(batches)
            begun = clock(device)
            loss = one(*given)
            seconds += clock(device) - begun
            values.append(float(loss) / given[0].target.numel())
        return seconds / count, values

    return steps


def _our_steps(side: Side, job: Job, device: torch.device) -> Callable[[int], tuple[float, list[float]]]:
    config = load_recipe(
        "animediffusion-strict" if job.phase == 1 else "animediffusion-phase2",
        [*CONSTANT_RATE, f"optimizer.precision={side.precision}"],
    )
    if job.phase == 2:
        config = config.started_from(load_recipe("animediffusion").bundle_config(job.size))
    denoiser = config.bundle_config(job.size).build()
    denoiser.load_state_dict(from_authors(_their_model(job.clone).state_dict())[1])
    state = TrainState(denoiser.to(device), config.optimizer, config.max_steps or 1)
    objective = _objective(config, state, job)
    if side.compiled:
        denoiser.network.denoise = torch.compile(denoiser.network.denoise)
    rows = itertools.cycle(_rows(job, device))
    pixels = job.batch * 3 * job.size**2 if job.phase == 1 else 1
    losses: list[float] = []

    def steps(count: int) -> tuple[float, list[float]]:
        losses.clear()
        begun = clock(device)
        fit(
            state,
            objective,
            rows,
            state.step + count,
            lambda step: losses.append(float(step.loss.total.detach()) / pixels),
            augment=config.augment,
            seed=0,
        )
        return (clock(device) - begun) / count, list(losses)

    return steps


def _objective(config: TrainConfig, state: TrainState, job: Job) -> torch.nn.Module:
    """Build the objective.

    In phase 2 the seed determines the numbers of differentiated steps; choose a seed with which each round gets both
    numbers, 1 and 2, once.
    """
    for seed in itertools.count():
        objective = config.objective.build(state.denoiser, config.sampler or SamplerDefaults(), seed)
        if not isinstance(objective, ReconstructionObjective):
            return objective
        drawn = [objective.num_gradient_steps(step) for step in range(BLOCK * job.rounds)]
        if all(sum(drawn[i : i + BLOCK]) == 3 for i in range(0, len(drawn), BLOCK)):
            return objective
    raise AssertionError


def _their_model(clone: str) -> Any:
    """Build the authors' GaussianDiffusion as configured in config/anime.json, with the weights of a fixed seed."""
    sys.path.insert(0, clone)
    from models.diffusion import GaussianDiffusion  # type: ignore[import-not-found]

    torch.manual_seed(0)
    network = {"channel_in": 7, "channel_out": 3, "channel_mult": [1, 2, 4, 8], "attention_head": 4, "cbam": False}
    return GaussianDiffusion(1000, {"linear_start": 1e-6, "linear_end": 1e-2}, network)


def _rows(job: Job, device: torch.device) -> list[Rows]:
    """Return decoded batches of the dataset, or of drawn faces if there is no dataset."""
    count = NUM_BATCHES * job.batch
    if job.data is None:
        arrays = drawn(count, job.size)
    else:
        # Import only here: everything else runs without Ray and pyarrow (needed by gpu.py).
        from animediffusion.pipelines.data.stream import read_split

        arrays = read_split(job.data, "train", limit=count)
        arrays.pop("id")
        if arrays["target"].shape[1] != job.size:
            raise SystemExit(f"{job.data} is of {arrays['target'].shape[1]} px, not {job.size}: omit --data")
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    whole = len(arrays["target"]) // job.batch
    return [{k: v[i * job.batch : (i + 1) * job.batch] for k, v in tensors.items()} for i in range(whole)]


def _batches(job: Job, device: torch.device) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Yield the same batches, noise and times as fit() and StrictObjective draw in each step."""
    augment = load_recipe("animediffusion-strict").augment
    for step, rows in enumerate(itertools.cycle(_rows(job, device))):
        generator = step_generator(0, step, 0, device)
        batch = make_batch(rows, augment, generator)
        noise = torch.randn(batch.target.shape, device=device, generator=generator)
        yield batch, noise, torch.randint(1000, (len(noise),), device=device, generator=generator)


def table(job: Job, found: dict[str, Found], peak_flops: float) -> str:
    """Return the Markdown table of one phase and size."""
    theirs = found["theirs"]
    lines = [
        f"| phase {job.phase}, {job.size} px, batch {job.batch} | images/s | times theirs | peak, MB | loss | share |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        # In phase 1 network and loss are equal, so all sides need the operations counted for the authors' side; the
        # counter may not see all operations of the other sides.
        flops = theirs.flops if job.phase == 1 else one.flops
        share = f"{flops / one.step_seconds / peak_flops:.2f}" if job.phase == 1 else ""
        loss = f"{one.late_loss:.4f}" if job.phase == 1 else ""
        ratio = theirs.step_seconds / one.step_seconds
        rate = job.batch / one.step_seconds
        lines.append(f"| {name} | {rate:.2f} | {ratio:.2f} | {one.peak_mb:,.0f} | {loss} | {share} |")
    return "\n".join(lines)


def verdicts(job: Job, found: dict[str, Found]) -> list[tuple[str, bool]]:
    """Return the targets on a CPU as texts, and whether each was met."""
    ours, checks = found["ours"], []
    for name, least in TARGETS[job.phase].items():
        ratio = found[name].step_seconds / ours.step_seconds
        checks.append((f"phase {job.phase}: {ratio:.2f} times {name}, at least {least}", ratio >= least))
    if job.phase == 1:
        off = abs(ours.late_loss / found["theirs"].late_loss - 1)
        checks.append((f"phase 1: loss differs by {off:.2%}, at most {LOSS_TOLERANCE:.0%}", off <= LOSS_TOLERANCE))
    return checks


def main() -> None:
    """Print the tables; exit with 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", required=True, help="clone of the authors' repository")
    parser.add_argument("--data", help="dataset of the size; drawn faces if omitted")
    parser.add_argument("--phases", type=int, nargs="+", default=[1, 2], choices=(1, 2))
    parser.add_argument("--sizes", type=int, nargs="+", help="pixels; 64 on a CPU, 128 and 256 on a GPU")
    parser.add_argument("--batch", type=int, help="rows; 8 on a CPU, 32 on a GPU")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side in phase 1")
    parser.add_argument("--steps2", type=int, default=4, help="timed steps of each side in phase 2")
    parser.add_argument("--threads", type=int, default=1, help="of each side on a CPU")
    parser.add_argument("--out", type=Path, help="file for what is printed")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    torch.set_num_threads(args.threads)
    peak_flops = matmul_flops(device)
    parts = []

    def show(text: str) -> None:
        print(f"{text}\n", flush=True)
        parts.append(f"{text}\n")
        if args.out:
            args.out.write_text("\n".join(parts))

    show(
        f"`python {' '.join(['benchmarks/training.py', *sys.argv[1:]])}`, {datetime.date.today()}, {hardware(device)}, "
        f"{args.threads} thread{'s' * (args.threads > 1)}, Python {platform.python_version()}, torch "
        f"{torch.__version__}. bf16 matrix products: {peak_flops / 1e9:,.0f} GFLOP/s."
    )
    checks = []
    for size, phase in itertools.product(args.sizes or ([128, 256] if on_gpu else [64]), args.phases):
        steps = args.steps if phase == 1 else args.steps2
        batch = args.batch or (32 if on_gpu else 8)
        job = Job(args.authors, args.data, device.type, phase, size, batch, steps, args.threads)
        found = compare(job, GPU_SIDES if on_gpu else CPU_SIDES)
        show(table(job, found, peak_flops))
        checks += [] if on_gpu else verdicts(job, found)
    if checks:
        show("\n".join(f"- {what}: {'yes' if passed else 'NO'}" for what, passed in checks))
    sys.exit(0 if all(passed for _, passed in checks) else 1)


if __name__ == "__main__":
    main()
