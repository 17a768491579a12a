"""Test a GPU with one command: correctness of the computations, then speed, then training on images.

    PYTHONPATH=src python benchmarks/gpu.py [--pictures FOLDER] [--authors PATH_OF_CLONE] [--seconds 100] [--parts ...]
        [--device cuda|cpu] [--out DIR]

If the package is installed, PYTHONPATH is not needed. The requirements are torch 2.10 or later, numpy, safetensors,
kornia, pydantic, PyYAML and pillow, but neither Ray nor MLflow. xformers is measured if it works. The parts are:

    trains     compare training steps of each recipe with a CPU: the same parameters change, by about the same amount
    right      compare attention backends, bf16 and the engine with float32 and with requests sampled alone
    attention  time forward and backward of each backend at the networks' shapes
    training   images/s of our networks and of the authors' network in our code: float32, bf16, xformers, compiled; with
               --authors also a comparison with their code (training.py)
    sampling   latency of one image by number of steps
    engine     images/s of the serving engine by number of slots in its batch
    faces      train recipes for --seconds each on FOLDER/train, measure on FOLDER/val, write an image and a bf16 bundle

If a part finds an error, the run ends after it with exit code 1. FOLDER contains square images of one size in the
subfolders train and val; without it, faces are drawn. The output folder gets report.md, the image and the bundle. On a
CPU all sizes are smaller, so that the command can be tried before paying for a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

try:
    import kornia  # noqa: F401 - the first batch imports it, after minutes
    import numpy as np
    import torch
    from common import RECIPES, clock, drawn, hardware, matmul_flops, peak_mb, train
    from PIL import Image
    from torch.overrides import TorchFunctionMode
    from torch.utils.flop_counter import FlopCounterMode

    from animediffusion.models.bundle import Bundle, BundleConfig, SamplerDefaults, load_bundle, save_bundle
    from animediffusion.models.colorize import noise_for, sample_images
    from animediffusion.models.compile import compiled as compile_network
    from animediffusion.models.diffusion.denoiser import Denoiser
    from animediffusion.models.network.attention import Backend, attention, explain_attention, use_attention
    from animediffusion.models.numerics import choose_numerics
    from animediffusion.models.sampler_options import SamplerOptions
    from animediffusion.models.tensors import to_uint8
    from animediffusion.models.training import loop as training
    from animediffusion.models.training.loop import TrainState, fit, step_generator
    from animediffusion.pipelines.evaluation.tracks import build
    from animediffusion.pipelines.training.recipe import load_recipe, recipe_names
    from animediffusion.platform.images.codec import contact_sheet, encode_png
    from animediffusion.serve.engine.engine import Engine, Request
except ImportError as error:
    sys.exit(f"error: {error.name}: not installed; the first lines of {__file__} list what it needs")

HERE = Path(__file__).parent
PARTS = ("trains", "right", "attention", "training", "sampling", "engine", "faces")
FACES = ("flow-v", "flow-x0", "ours", "ours-2")
"""Keys of common.RECIPES that the part faces trains."""
BUNDLE = "ours-2"
STEPS = (1, 4, 10, 25)
PLACES = (1, 2, 4, 8, 16, 32)
CHUNK, PICTURES = 50, 6
TRAINED_STEPS = 3
"""Several steps are needed: the first one changes only the last layers, because all other gradients are zero as long as
the last layers' weights are."""
MOST_GRADIENT_ERROR, MOST_UPDATE_ERROR = 0.05, 0.2
"""Largest relative errors of TF32 compared with float32. AdamW's first updates depend on the gradient's sign, which
rounding can flip where the gradient is near 0."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class Scale:
    """Amount of work to measure."""

    trained: tuple[str, ...]
    """Recipes whose steps are compared with those on a CPU."""
    networks: tuple[tuple[str, int, int], ...]
    """(recipe, px, rows) of each network in the part training."""
    served: tuple[str, int]
    """(recipe, px) of the parts sampling and engine."""
    places: tuple[int, ...]
    """Numbers of slots in the engine's batch."""
    repeats: int
    rows: int
    """Number of faces to draw if no folder of images is given."""


ON_GPU = Scale(
    trained=tuple(recipe_names()),
    networks=(
        *(("phase1", 128, 64), ("small", 128, 64), ("base", 256, 16)),
        *(("animediffusion", 128, 32), ("animediffusion", 256, 16)),
    ),
    served=("small", 128),
    places=PLACES,
    repeats=20,
    rows=2000,
)
ON_CPU = Scale(
    trained=("demo", "phase1"),
    networks=(("phase1", 32, 4), ("animediffusion", 32, 2)),
    served=("phase1", 32),
    places=PLACES[:3],
    repeats=3,
    rows=40,
)


class Bench:
    """The device under test, the settings and the report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.args = args
        self.scale = ON_GPU if self.on_gpu else ON_CPU
        self.failed: list[str] = []
        self.report: list[str] = []

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def backends(self, dtype: torch.dtype) -> tuple[Backend, ...]:
        """Return the attention backends that can train in this dtype on this device."""
        small = torch.zeros(1, 64, 1, 64, dtype=dtype, device=self.device, requires_grad=True)
        try:
            use_attention("xformers")
            attention(small, small, small)
        except ValueError:
            return ("sdpa",)
        finally:
            use_attention("auto")
        return ("sdpa", "xformers")

    def show(self, text: str) -> None:
        """Print text and write it to report.md immediately, so that an interrupted run keeps its results."""
        print(f"{text}\n", flush=True)
        self.report.append(f"{text}\n")
        (self.args.out / "report.md").write_text("\n".join(self.report))

    def check(self, what: str, found: float, most: float) -> None:
        """Report a value that must not exceed a limit, and record a failure if it does."""
        good = found <= most
        self.failed += [] if good else [what]
        self.show(f"- {what}: {found:.2g}, at most {most:g}: {'yes' if good else 'NO'}")

    def seconds(self, work: Callable[[], object], warm: int = 3) -> float:
        """Return the median time of a call, after some untimed calls."""
        taken = []
        for call in range(warm + self.scale.repeats):
            begun = clock(self.device)
            work()
            taken += [clock(self.device) - begun] if call >= warm else []
        return statistics.median(taken)


def trains(bench: Bench) -> None:
    """Check that training steps agree with those on a CPU: same weights, rows and random numbers, in float32."""
    bench.show(f"**Does it train**: {TRAINED_STEPS} steps of each recipe here and on a CPU")
    for recipe in bench.scale.trained:
        start, there = _trained(bench, recipe, torch.device("cpu"))
        _, here = _trained(bench, recipe, bench.device)
        moved = [{name for name in start if not torch.equal(start[name], end[name])} for end in (there, here)]
        gradients = [name for name in there if name.startswith(("optimizer.exp_avg.", "optimizer.momentum_buffer."))]
        # An optimizer's moments are sums of gradients. The floor keeps moments of mere rounding errors from counting.
        usual = torch.stack([there[name].float().square().mean() for name in gradients]).mean().sqrt()
        errors = [_relative(here[name], there[name], 1e-2 * float(usual)) for name in gradients]
        updates = [torch.cat([(end[name] - start[name]).flatten() for name in start]) for end in (here, there)]
        bench.check(f"{recipe}, parameters that move on a CPU and not here", len(moved[0] - moved[1]), 0)
        bench.check(f"{recipe}, largest error of a parameter's gradients", max(errors), MOST_GRADIENT_ERROR)
        bench.check(f"{recipe}, error of the whole update", _relative(*updates), MOST_UPDATE_ERROR)


def _trained(
    bench: Bench, recipe: str, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train some steps; return the weights before, and the weights and optimizer state after, on the host."""
    size, rows = (64, 8) if bench.on_gpu else (32, 4)
    config = load_recipe(recipe, ["optimizer.precision=fp32", "max_steps=1000"])
    torch.manual_seed(0)
    denoiser = config.bundle_config(size).build()
    start = {f"model.{name}": weight.detach().clone() for name, weight in denoiser.named_parameters()}
    state = TrainState(denoiser.to(device), config.optimizer, 1000)
    objective = config.objective.build(denoiser, SamplerDefaults(), 0)
    batch = {name: torch.from_numpy(x).to(device) for name, x in drawn(rows, size).items()}
    made: dict[int, torch.Generator] = {}

    def draw(seed: int, step: int, rank: int, *_: Any) -> torch.Generator:
        # Use one generator per step, as on a CPU; on a GPU fit() requests a second one for the device.
        return made.setdefault(step, step_generator(seed, step, rank))

    on_host = mock.patch.object(training, "step_generator", draw)
    with on_host, DrawnOnTheHost():
        fit(state, objective, [batch] * TRAINED_STEPS, TRAINED_STEPS, lambda _: None, augment=config.augment, seed=0)
    return start, state.snapshot().tensors


class DrawnOnTheHost(TorchFunctionMode):
    """Draws random numbers on the generator's device and then moves them; a GPU's own numbers would differ."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Draw on the generator's device, then move the result to the requested device."""
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is None or "device" not in kwargs:
            return func(*args, **kwargs)
        device = kwargs.pop("device")
        return func(*args, **kwargs, device=kwargs["generator"].device).to(device)


def _relative(found: torch.Tensor, truth: torch.Tensor, floor: float = 0.0) -> float:
    """Return the root mean square of the error, divided by that of the truth plus `floor`."""
    error, size = (x.float().square().mean().sqrt() for x in (found - truth, truth))
    return float(error / (size + floor))


def right(bench: Bench) -> None:
    """Check that fast computations agree with slow, exact ones."""
    bench.show("**Is it right**")
    for shape in _attention_shapes(bench):
        query, key, value = (x.double() for x in _qkv(bench, shape, torch.float32))
        weights = torch.softmax(torch.einsum("bmhk,bnhk->bhmn", query * query.shape[-1] ** -0.5, key), -1)
        truth = torch.einsum("bhmn,bnhk->bmhk", weights, value)
        # On a GPU, float32 products are computed in TF32.
        for dtype, most in ((torch.float32, 5e-3 if bench.on_gpu else 1e-4), (torch.bfloat16, 3e-2)):
            for backend in bench.backends(dtype):
                use_attention(backend)
                found = attention(*(x.to(dtype) for x in (query, key, value))).double()
                name = f"attention {shape}, {backend}, {str(dtype).removeprefix('torch.')}, largest error"
                bench.check(name, float((found - truth).abs().max()), most)
        use_attention("auto")
    recipe, size = bench.scale.served
    bundle = _bundle(bench, recipe, size)
    batch = build(drawn(PICTURES, size), "same")
    noise = torch.stack([noise_for(seed, size) for seed in range(PICTURES)])
    alone = _sample(bundle.denoiser.cpu(), batch, noise, "cpu", "fp32", 4)
    levels_of_float32 = 2.0 if bench.on_gpu else 1.0
    for precision, most in (("fp32", levels_of_float32), ("bf16", 8.0)):
        same = _sample(bundle.denoiser.to(bench.device), batch, noise, bench.device, precision, 4)
        levels = float((same.int() - alone.int()).abs().max())
        bench.check(
            f"4 steps, {precision} on {bench.device.type} compared with float32 on a CPU, 8-bit levels", levels, most
        )
    engine = Engine(bundle, max_batch=4, max_queue=PICTURES)
    requests = [
        Request(sketch=s, references=(r,), options=SamplerOptions(seed=i, steps=4))
        for i, (s, r) in enumerate(zip(batch.sketch, batch.reference, strict=True))
    ]
    pictures = [future.result() for future in [engine.submit(request) for request in requests]]
    engine.close()
    levels = max(int(np.abs(p.astype(int) - a.numpy()).max()) for p, a in zip(pictures, alone, strict=True))
    bench.check(
        "the engine, rows in a running batch compared with single rows on a CPU, 8-bit levels",
        levels,
        levels_of_float32,
    )


def attention_table(bench: Bench) -> None:
    """Time attention forward and backward by shape and backend."""
    lines = ["| attention, [rows, queries, keys, heads, channels] | bf16, ms | times sdpa |", "|---|---|---|"]
    for shape in _attention_shapes(bench):
        taken = {}
        for backend in bench.backends(torch.bfloat16):
            use_attention(backend)
            qkv = [x.requires_grad_() for x in _qkv(bench, shape, torch.bfloat16)]
            taken[backend] = bench.seconds(lambda qkv=qkv: attention(*qkv).float().sum().backward())
        use_attention("auto")
        lines += [f"| {shape}, {name} | {1e3 * one:.2f} | {taken['sdpa'] / one:.2f} |" for name, one in taken.items()]
    bench.show("\n".join(lines))


def training_table(bench: Bench) -> None:
    """Measure images/s of each network in each training mode."""
    peak = matmul_flops(bench.device)
    bench.show(f"bf16 matrix products: {peak / 1e12:,.2f} TFLOP/s. The share is of that.")
    lines = [
        "| training | px | rows | images/s | times float32 | peak, MB | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe, size, rows in bench.scale.networks:
        slow = flops = 0.0
        for precision, backend, compiled in _ways(bench):
            name = ", ".join([recipe, precision, backend] + ["compiled"] * compiled)
            try:
                seconds, counted, memory = _training_step(bench, recipe, size, rows, precision, backend, compiled)
            except ValueError as error:  # For example, no compiler is installed.
                bench.show(f"{name}, {size} px: {error}")
                continue
            # Use the count of the first mode: with torch's own attention the counter sees all operations.
            slow, flops = slow or seconds, flops or counted
            share = f"{flops / seconds / peak:.2f}" if precision == "bf16" else ""
            line = (
                f"| {name} | {size} | {rows} | {rows / seconds:,.1f} | {slow / seconds:.2f} | {memory:,.0f} | {share} |"
            )
            print(line, file=sys.stderr, flush=True)
            lines.append(line)
    bench.show("\n".join(lines))
    if bench.args.authors:
        command = [sys.executable, str(HERE / "training.py"), "--authors", str(bench.args.authors), "--steps", "8"]
        command += [] if bench.on_gpu else ["--sizes", "32", "--batch", "2", "--phases", "1"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        bench.show(f"**Compared with the authors' code**\n\n{done.stdout.strip()}")


def _ways(bench: Bench) -> Iterator[tuple[str, Backend, bool]]:
    yield "fp32", "sdpa", False
    for backend in bench.backends(torch.bfloat16):
        yield "bf16", backend, False
    if bench.on_gpu:
        yield "bf16", "sdpa", True


def _training_step(
    bench: Bench, recipe: str, size: int, rows: int, precision: str, backend: Backend, compiled: bool
) -> tuple[float, float, float]:
    """Return the seconds, floating-point operations and peak memory (MB) of a training step."""
    use_attention(backend)
    config = load_recipe(recipe, [f"optimizer.precision={precision}", "max_steps=1000000"])
    denoiser = config.bundle_config(size).build().to(bench.device)
    state = TrainState(denoiser, config.optimizer, 1_000_000)
    objective = config.objective.build(denoiser, SamplerDefaults(), 0)
    if compiled:
        compile_network(denoiser)
    batch = {name: torch.from_numpy(x).to(bench.device) for name, x in drawn(rows, size).items()}

    def step() -> None:
        fit(state, objective, [batch], state.step + 1, lambda _: None, augment=config.augment, seed=0)

    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.seconds(step)
    memory = peak_mb(bench.device)
    flops = 0.0
    if not compiled:
        with FlopCounterMode(display=False) as counter:
            step()
        flops = float(counter.get_total_flops())
    use_attention("auto")
    return seconds, flops, memory


def sampling_table(bench: Bench) -> None:
    """Measure the latency of one image by number of steps."""
    recipe, size = bench.scale.served
    denoiser = _bundle(bench, recipe, size).denoiser.to(bench.device)
    batch = build(drawn(2, size), "same", range(1))
    noise = noise_for(0, size)[None]
    lines = [f"| one picture, {recipe}, {size} px, steps | fp32, ms | bf16, ms |", "|---|---|---|"]
    for steps in STEPS:
        taken = [
            1e3 * bench.seconds(lambda p=precision, n=steps: _sample(denoiser, batch, noise, bench.device, p, n))
            for precision in ("fp32", "bf16")
        ]
        lines.append(f"| {steps} | {taken[0]:.2f} | {taken[1]:.2f} |")
    bench.show("\n".join(lines))


def engine_table(bench: Bench) -> None:
    """Measure images/s of requests that all arrive together, by number of batch slots, with bf16 weights."""
    recipe, size = bench.scale.served
    lines = [
        f"| engine, {recipe}, {size} px, bf16, 4 steps, places | pictures/s | times one place | turn, ms |",
        "|---|---|---|---|",
    ]
    first = 0.0
    for places in bench.scale.places:
        bundle = _bundle(bench, recipe, size, torch.bfloat16)
        engine = Engine(bundle, max_batch=places, max_queue=1000)
        batch = build(drawn(PICTURES, size), "same")
        count = 8 * places * (4 if bench.on_gpu else 1)

        def submit(number: int, engine: Engine = engine, batch: Any = batch) -> Any:
            row = number % PICTURES
            request = Request(
                sketch=batch.sketch[row],
                references=(batch.reference[row],),
                options=SamplerOptions(seed=number, steps=4),
            )
            return engine.submit(request)

        for warm in [submit(n) for n in range(places)]:
            warm.result()
        turns, begun = engine.num_steps, clock(bench.device)
        for future in [submit(n) for n in range(count)]:
            future.result()
        seconds = clock(bench.device) - begun
        first = first or count / seconds
        turn = 1e3 * seconds / (engine.num_steps - turns)
        engine.close()
        lines.append(f"| {places} | {count / seconds:,.1f} | {count / seconds / first:.2f} | {turn:.2f} |")
    bench.show("\n".join(lines))


def faces_table(bench: Bench) -> None:
    """Train each recipe for the same time and measure its results."""
    rows, val = _faces(bench)
    size = rows["target"].shape[1]
    lines = [
        f"| {len(rows['target'])} pictures, {size} px, {bench.args.seconds:g} s each | images seen | bent, 1 | bent, 4 "
        "| recolored, 4 |",
        "|---|---|---|---|---|",
    ]
    columns: dict[str, Any] = {}
    for name in FACES:
        denoiser, seen = None, 0
        for recipe, share in RECIPES[name]:
            config = load_recipe(recipe, ["seed=0", "max_steps=1000000"])
            denoiser, took = train(config, denoiser, rows, share * bench.args.seconds, bench.device)
            seen += took["images"]
        assert denoiser is not None
        found = {}
        for track, steps in (("same", 1), ("same", 4), ("recolored", 4)):
            batch = build(val, track)
            noise = torch.stack([noise_for(i, size) for i in range(len(batch.target))])
            image = _sample(denoiser, batch, noise, bench.device, "bf16", steps)
            found[track, steps] = _psnr(image, to_uint8(batch.target))
            columns[name] = image[:PICTURES].numpy()
        lines.append(f"| {name} | {seen} | {' | '.join(f'{value:.2f}' for value in found.values())} |")
        print(lines[-1], file=sys.stderr, flush=True)
        if name == BUNDLE:
            config = load_recipe(RECIPES[name][0][0]).bundle_config(size)
            save_bundle(bench.args.out / "bundle", denoiser.to(torch.bfloat16), config)
    batch = build(val, "recolored", range(min(PICTURES, len(val["target"]))))
    sketch, reference, truth = (
        to_uint8(x).numpy() for x in (batch.sketch.expand(-1, 3, -1, -1), batch.reference, batch.target)
    )
    sheet = contact_sheet(
        list(zip(sketch, reference, *columns.values(), truth, strict=True)), ["sketch", "reference", *columns, "truth"]
    )
    (bench.args.out / "faces.png").write_bytes(encode_png(sheet))
    size_mb = (bench.args.out / "bundle" / "model.safetensors").stat().st_size / 2**20
    bench.show("PSNR in dB by track and network evaluations.\n\n" + "\n".join(lines))
    bench.check("bundle, MiB", size_mb, 16)


def _attention_shapes(bench: Bench) -> list[tuple[int, int, int, int, int]]:
    """Return shapes [rows, queries, keys, heads, channels] to measure.

    On a GPU they are those of phase1 at 64 px, of small at 128 px and of the authors' bottleneck at 256 px.
    """
    if not bench.on_gpu:
        return [(4, 64, 128, 2, 64)]
    return [(64, 64, 320, 2, 64), (64, 256, 1280, 4, 64), (16, 1024, 1024, 4, 128)]


def _qkv(bench: Bench, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    rows, queries, keys, heads, channels = shape
    generator = torch.Generator(bench.device).manual_seed(0)
    sides = ((rows, n, heads, channels) for n in (queries, keys, keys))
    return [torch.randn(side, generator=generator, device=bench.device).to(dtype) for side in sides]


def _bundle(bench: Bench, recipe: str, size: int, dtype: torch.dtype = torch.float32) -> Bundle:
    """Load a network with random weights of a fixed seed as a server would."""
    torch.manual_seed(0)
    config: BundleConfig = load_recipe(recipe).bundle_config(size)
    folder = bench.args.out / "untrained"
    save_bundle(folder, config.build(), config)
    return load_bundle(folder, bench.device, dtype)


@torch.inference_mode()
def _sample(
    denoiser: Denoiser, batch: Any, noise: torch.Tensor, device: torch.device | str, precision: str, steps: int
) -> torch.Tensor:
    """Sample images, returned as uint8 [B, S, S, 3] on the CPU."""
    parts = []
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
    for start in range(0, len(noise), CHUNK):
        some = slice(start, start + CHUNK)
        given = (x[some].to(device) for x in (batch.sketch, batch.reference, noise))
        with autocast:
            image = sample_images(denoiser, *given, SamplerDefaults(steps=steps))
        parts.append(to_uint8(image.clamp(-1, 1)).cpu())
    return torch.cat(parts)


def _psnr(images: torch.Tensor, truths: torch.Tensor) -> float:
    """Return the PSNR in dB, averaged over images."""
    error = ((images.float() - truths.float()) / 255).square().mean((1, 2, 3))
    return float((-10 * error.clamp(min=1e-10).log10()).mean())


def _faces(bench: Bench) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rows for training and for measuring."""
    if bench.args.pictures is None:
        size = 128 if bench.on_gpu else 32
        return drawn(bench.scale.rows, size), drawn(CHUNK if bench.on_gpu else PICTURES, size, bench.scale.rows)
    train_rows, val_rows = (_pictures(bench.args.pictures / split) for split in ("train", "val"))
    return train_rows, val_rows


def _pictures(folder: Path) -> dict[str, Any]:
    """Read a folder of images as rows that have only a target."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"error: {folder}: no pictures; give a folder with train and val")
    target = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    if len({picture.shape for picture in target}) > 1 or target[0].shape[0] != target[0].shape[1]:
        raise SystemExit(f"error: {folder}: pictures differ in size or are not square; make them one square size")
    arrays = {"target": np.stack(target)}
    arrays |= {name: np.zeros_like(arrays["target"]) for name in ("reference", "cross_reference")}
    arrays["sketch"] = np.zeros(arrays["target"].shape[:3], np.uint8)
    return arrays | {flag: np.zeros(len(files), bool) for flag in ("has_sketch", "has_reference", "has_cross")}


TABLES = dict(
    zip(PARTS, (trains, right, attention_table, training_table, sampling_table, engine_table, faces_table), strict=True)
)


def main() -> None:
    """Run the parts; exit with 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--pictures", type=Path, help="folder with train and val; drawn faces if omitted")
    parser.add_argument("--authors", type=Path, help="clone of the authors' repository")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="of training for each recipe; 100 on a GPU, 5 on a CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"error: --device cuda: torch {torch.__version__} finds no GPU; animediffusion doctor says why")
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    args.seconds = args.seconds or (100 if bench.on_gpu else 5)
    numerics = choose_numerics(bench.device)  # The same setting as in training and serving.
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, float32 products in {numerics}"
    if bench.on_gpu:
        versions += f", CUDA {torch.version.cuda}, attention {explain_attention()}"
    bench.show(f"`{' '.join(['python', *sys.argv])}`, {datetime.date.today()}, {hardware(bench.device)}, {versions}.")
    for part in args.parts:
        TABLES[part](bench)
        if bench.failed:
            break
    sys.exit(f"error: not as it should be: {'; '.join(bench.failed)}" if bench.failed else 0)


if __name__ == "__main__":
    main()
