"""Measure bulk coloring on Ray: its rate against plain processes, its actors on logical GPUs, its memory.

    python benchmarks/bulk.py [--drawings 400] [--rounds 2] [--styles painted flat] [--out FILE]
    python benchmarks/bulk.py --memory 100000 [--out FILE]

The first table compares two sides that do the same work: `processes` are as many plain processes as the machine has
cores, each with one thread and an equal share of the drawings; `ray` is color_on_cluster() on a private Ray with as
many CPUs. The drawings are faces of 128 to 256 px. Rates count the middle of a run: from the time when a quarter of the
pictures is on the disk until nine tenths are. Other work on the machine hardly affects CPU time, which is that of all
processes of a side, including Ray's own. `network` is the engine alone: no files, no rendering.

The second table counts actors and their shares on a Ray with logical GPUs.

With --memory, a network with random weights colors that many drawings of 48 px from and to an S3 server (moto), and the
table shows the resident memory of the driver, of the largest actor and of Ray's own processes over the run.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import datetime
import logging
import multiprocessing
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import ray
import torch
from common import hardware

from animediffusion.models.bundle import BundleConfig, SamplerDefaults, load_bundle, save_bundle
from animediffusion.models.network.attention import chosen_attention
from animediffusion.models.network.unet import UNetConfig
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.models.tensors import from_pixels
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.platform.cluster import cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.images.codec import encode_png, letterbox
from animediffusion.platform.storage import storage
from animediffusion.serve.bulk import bulk
from animediffusion.serve.bulk.drawings import Drawings, References, list_drawings
from animediffusion.serve.bulk.worker import BulkSettings, DrawingColorizer
from animediffusion.serve.client.local import BundleColorizer
from animediffusion.serve.engine.engine import Engine, Request
from animediffusion.serve.rendering.render import RenderOptions
from animediffusion.serve.replica.model_source import ModelSource

SIZES_PX = (128, 160, 192, 224, 256)
FACES = 40
"""Different drawings; the others are copies of them under other names."""
WARM, END = 0.25, 0.9
"""Shares of the pictures between which the rate is measured."""
POLL_S = 0.1
NETWORK = UNetConfig(base_channels=32, channel_multipliers=(1,), num_res_blocks=1, patch_size=4, head_channels=32)
TINY_PX = 48


class Rate(NamedTuple):
    """What one side of a round took."""

    start_s: float
    """Seconds until the first picture."""
    start_cpu_s: float
    pictures: int
    """Pictures between WARM and END."""
    seconds: float
    cpu_s: float


def cpu_seconds() -> float:
    """Return the CPU time of this process and of all processes below it, also of those that have ended."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])
    return total


def draw(folder: Path, count: int, sizes: Sequence[int] = SIZES_PX) -> None:
    """Write `count` drawings to folder/in and a reference to folder/reference.png."""
    faces = [make_row(0, number, sizes[number % len(sizes)]) for number in range(min(FACES, count))]
    files = [encode_png(face.sketch) for face in faces]
    (folder / "in").mkdir(parents=True)
    for number in range(count):
        (folder / "in" / f"{number:06d}.png").write_bytes(files[number % len(files)])
    (folder / "reference.png").write_bytes(encode_png(faces[0].cross_reference))


def list_from(folder: Path) -> Drawings:
    """Return the drawings of draw()."""
    return list_drawings([f"{folder}/in"], f"{folder}/out", "png", References((f"{folder}/reference.png",)))[0]


def watch(out: Path, total: int, run: Callable[[], object]) -> Rate:
    """Run a side that writes `total` pictures to `out` and measure its middle."""
    marks: list[tuple[int, float, float]] = []
    began, before, done = time.monotonic(), cpu_seconds(), threading.Event()

    def sample() -> None:
        for share in (0, WARM, END):
            while (count := count_pictures(out)) < max(1, share * total):
                if done.wait(POLL_S):
                    return
            marks.append((count, time.monotonic(), cpu_seconds()))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    if len(marks) < 3:
        raise SystemExit("error: the side ended before it had made all pictures; see its messages")
    first, warm, end = marks
    return Rate(first[1] - began, first[2] - before, end[0] - warm[0], end[1] - warm[1], end[2] - warm[2])


def count_pictures(out: Path) -> int:
    """Return the number of pictures that a bulk coloring has written to a local folder."""
    names = os.listdir(out) if out.is_dir() else []
    return sum(name.endswith(".png") and not name.endswith(".color.png") for name in names)


def color_share(model: str, folder: Path, style: str, first: int, step: int) -> None:
    """Color every `step`-th drawing from `first` on, one after the other, in this process."""
    torch.set_num_threads(1)
    bundle = load_bundle(ModelSource(Settings.from_environment(), model).fetch(model))
    rendering = RenderOptions(style=style)  # type: ignore[arg-type]
    settings = BulkSettings(SamplerOptions(), rendering, "png", model, model, chosen_attention(), ())
    color = DrawingColorizer(BundleColorizer(bundle, model, 1), settings)
    for one in list(list_from(folder))[first::step]:
        outcome = color(one.sketch, one.references, one.output)
        if outcome.error:
            raise SystemExit(outcome.error)


def in_processes(model: str, folder: Path, style: str, cores: int) -> None:
    """Color the drawings in plain processes, each of which has an equal share."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=color_share, args=(model, folder, style, core, cores)) for core in range(cores)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def on_ray(model: str, folder: Path, style: str, cores: int) -> None:
    """Color the drawings on a private Ray."""
    cluster.connect(Settings.from_environment(), cores)
    shares(model, list_from(folder), RenderOptions(style=style))  # type: ignore[arg-type]
    cluster.shutdown()


def shares(model: str, drawings: Drawings, rendering: RenderOptions) -> Counter[str]:
    """Color drawings on the Ray that this process is connected to; return the number of drawings of each actor."""
    settings, found = Settings.from_environment(), Counter[str]()
    for outcome in bulk.color_on_cluster(settings, model, drawings, SamplerOptions(), rendering, "png", print):
        if outcome.error:
            raise SystemExit(outcome.error)
        found[outcome.actor] += 1
    return found


def network_rate(model: str, pictures: int) -> float:
    """Return pictures per CPU second of an engine that holds one drawing at a time."""
    torch.set_num_threads(1)
    bundle = load_bundle(ModelSource(Settings.from_environment(), model).fetch(model))
    side, engine = bundle.config.image_size, Engine(bundle, max_batch=1)
    row = make_row(0, 0, side)
    sketch = from_pixels(letterbox(row.sketch, side)[0])[0]
    reference = from_pixels(letterbox(row.cross_reference, side)[0])[0]
    before = 0.0
    for number in range(pictures + 5):
        if number == 5:
            before = time.process_time()
        # Other lines each time, because the engine caches what it computed from a pair of drawing and reference.
        request = Request(sketch=sketch.roll(number, -1), references=(reference,), options=SamplerOptions())
        engine.submit(request).result()
    return pictures / (time.process_time() - before)


def rates(model: str, count: int, rounds: int, styles: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the first table."""
    cores = os.cpu_count() or 1
    sides = {"processes": in_processes, "ray": on_ray}
    yield f"The engine alone makes {network_rate(model, 100):.1f} pictures per CPU second (`network`)."
    yield ""
    yield "| style | side | start, s | start, CPU s | pictures/s | pictures per CPU s | of `processes` |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for style in styles:
        found: dict[str, list[Rate]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                with tempfile.TemporaryDirectory(prefix="bulk-") as folder:
                    draw(Path(folder), count)
                    rate = watch(Path(folder, "out"), count, lambda: side(model, Path(folder), style, cores))  # noqa: B023
                    print(style, name, rate, file=sys.stderr, flush=True)
                    found[name].append(rate)
        speed = {name: statistics.median(one.pictures / one.cpu_s for one in some) for name, some in found.items()}
        for name, some in found.items():
            start, start_cpu = (statistics.median(values) for values in zip(*(one[:2] for one in some), strict=True))
            wall = statistics.median(one.pictures / one.seconds for one in some)
            share = speed[name] / speed["processes"]
            yield f"| {style} | {name} | {start:.1f} | {start_cpu:.1f} | {wall:.2f} | {speed[name]:.2f} | {share:.2f} |"


def actors(model: str, count: int, gpus: Sequence[int]) -> Iterator[str]:
    """Yield the lines of the second table."""
    yield "| logical GPUs | actors | drawings of an actor | CPU s a picture, with the start |"
    yield "|---:|---:|---:|---:|"
    bulk.BLOCK_ROWS["GPU"] = bulk.BLOCK_ROWS["CPU"]
    for number in gpus:
        with tempfile.TemporaryDirectory(prefix="bulk-") as folder:
            draw(Path(folder), count)
            ray.init(address="local", num_cpus=1, num_gpus=number, include_dashboard=False, log_to_driver=False)
            before = cpu_seconds()
            found = shares(model, list_from(Path(folder)), RenderOptions(style="painted"))
            spent = (cpu_seconds() - before) / count
            ray.shutdown()
        yield f"| {number} | {len(found)} | {min(found.values())} to {max(found.values())} | {spent:.3f} |"


@contextmanager
def s3_server() -> Iterator[None]:
    """Run moto in a process of its own, with the bucket `bulk`, and point the AWS variables to it."""
    import boto3

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=_serve_s3, args=(there,), daemon=True)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL_S3": here.recv(),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    boto3.client("s3").create_bucket(Bucket="bulk")
    try:
        yield
    finally:
        server.terminate()
        server.join()


def _serve_s3(pipe: multiprocessing.connection.Connection) -> None:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    pipe.send(f"http://{host}:{port}")
    threading.Event().wait()


def memory(count: int) -> Iterator[str]:
    """Yield the lines of the table of memory."""
    with tempfile.TemporaryDirectory(prefix="bulk-") as folder, s3_server():
        config = BundleConfig(network=NETWORK, image_size=32, sampler=SamplerDefaults(steps=1))
        save_bundle(Path(folder, "bundle"), config.build(), config)
        face = make_row(0, 0, TINY_PX)
        data = encode_png(face.sketch)
        storage.write_bytes("s3://bulk/reference.png", encode_png(face.cross_reference))
        for number in range(count):
            storage.write_bytes(f"s3://bulk/in/{number:06d}.png", data)
        began = time.monotonic()
        reference = References(("s3://bulk/reference.png",))
        drawings, _ = list_drawings(["s3://bulk/in"], "s3://bulk/out", "png", reference)
        yield f"{len(drawings):,} drawings were listed in {time.monotonic() - began:.1f} s."
        yield ""
        yield "| pictures | s | driver, MiB | largest actor, MiB | Ray's own processes, MiB |"
        yield "|---:|---:|---:|---:|---:|"
        settings, rendering = Settings.from_environment(), RenderOptions(style="painted")
        cluster.connect(settings)
        began, next_line = time.monotonic(), 0
        outcomes = bulk.color_on_cluster(
            settings, f"{folder}/bundle", drawings, SamplerOptions(), rendering, "png", print
        )
        for done, outcome in enumerate(outcomes, 1):
            if outcome.error:
                raise SystemExit(outcome.error)
            if done >= next_line or done == len(drawings):
                next_line += max(1, len(drawings) // 10)
                sizes = " | ".join(f"{size:.0f}" for size in resident())
                yield f"| {done:,} | {time.monotonic() - began:.0f} | {sizes} |"
        cluster.shutdown()


def resident() -> tuple[float, float, float]:
    """Return the resident memory in MiB of this process, of the largest actor and of Ray's other processes."""
    own, largest, others = psutil.Process(), 0.0, 0.0
    for process in own.children(recursive=True):
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            size = process.memory_info().rss / 2**20
            if "ColorDrawings" in words:
                largest = max(largest, size)
            elif "multiprocessing" not in words:  # not the S3 server
                others += size
    return own.memory_info().rss / 2**20, largest, others


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--drawings", type=int, default=400, help="drawings of a side in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--styles", nargs="+", default=["painted", "flat"])
    parser.add_argument("--gpus", type=int, nargs="*", default=[1, 2, 4], help="numbers of logical GPUs")
    parser.add_argument("--memory", type=int, help="measure the memory with that many drawings instead")
    parser.add_argument("--out", type=Path, help="also write the tables there")
    args = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # Otherwise Ray writes a token to the home directory.
    processor = f"{hardware(torch.device('cpu'))}, {os.cpu_count()} cores"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Ray {ray.__version__}"
    lines = [f"{datetime.date.today()}, {processor}, {versions}, NumPy {np.__version__}.", ""]
    if args.memory:
        parts: list[Iterator[str]] = [memory(args.memory)]
    else:
        parts = [
            rates(args.model, args.drawings, args.rounds, args.styles),
            actors(args.model, args.drawings // 2, args.gpus),
        ]
    print("\n".join(lines))
    for part in parts:
        for line in part:
            lines.append(line)
            print(line, flush=True)
        lines.append("")
        print()
    if args.out is not None:
        args.out.write_text("# Bulk coloring on Ray\n\n" + "\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
