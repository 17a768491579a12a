"""Measure the data path: ingest, training stream, batches compared with the authors' loader, overhead in training.

    pip install opencv-python-headless torchvision                      # requirements of the authors' loader
    git clone https://github.com/xq-meng/AnimeDiffusion PATH_OF_CLONE
    python benchmarks/data.py [--authors PATH_OF_CLONE] [--source FOLDER] [--parts stream batches training ray]

Without --source, images of 256 px are drawn. Data is read from a local folder and through S3 (moto, a Python process on
loopback and on the same cores, so the S3 rates are lower bounds). The parts are:

- stream: files/s of ingest, and rows/s of the training stream with two decoding consumers. The rate excludes the first
  batch, which waits for Ray. This part uses wall-clock time and both cores.
- batches: rows/s of one core (CPU time, one thread) for batches that are ready to train on. Our side reads Parquet,
  decodes, and augments as `phase1` does: line art, warps, colors. The authors' side is their Dataset in a DataLoader,
  which decodes an image and its line art of 256 px, both JPEG, warps at 256 px, and resizes. The sides run alternately.
- training: steps of `phase1` on rows that are read, compared with steps on one batch kept in memory. They run
  alternately on one core, without Ray.
- ray: images/s that `animediffusion train phase1` reports with one and with two workers, and the fraction of time that
  it waits for rows. They are compared with as many plain processes on a batch kept in memory (two of them under DDP, as
  in the run), measured before and after. This part uses wall-clock time and needs an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import boto3
import ray
import ray.data
import ray.train
import torch
from PIL import Image

from animediffusion.models.augmentation.augment import make_batch
from animediffusion.models.augmentation.lineart import xdog
from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.device import data_parallel
from animediffusion.models.tensors import to_tensor, to_uint8
from animediffusion.models.training.loop import Rows, TrainState, fit, step_generator
from animediffusion.pipelines.data.ingest import ingest
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.data.read_order import ReadBlock, Stream
from animediffusion.pipelines.data.shards import PICTURES
from animediffusion.pipelines.data.stream import _read, decode_rows, training_dataset
from animediffusion.pipelines.synthetic.dataset import synthesize
from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.platform.cluster import cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.images.codec import decode_rgb, fit_square
from animediffusion.platform.network import why_unreachable

WORLD_SIZE = 2
BATCH_ROWS = 16
BLOCK_ROWS = 256
"""Rows per read block without Ray; a training run reads larger blocks."""
THEIR_SIZE = 256
"""Side in pixels of the images that the authors' loader reads (config/anime.json)."""
PARTS = ("stream", "batches", "training", "ray")


@ray.remote(num_cpus=0)
class Rank:
    """A consumer that decodes its batches and discards them."""

    def take(self, shard: Any, num_rows: int) -> tuple[float, float]:
        """Return the seconds until the first batch, and the rows per second after it."""
        begun, started, taken = time.perf_counter(), 0.0, 0
        for batch in shard.iter_batches(batch_size=BATCH_ROWS, drop_last=True, prefetch_batches=4):
            decode_rows(batch)
            if not started:
                started = time.perf_counter()
                continue
            taken += BATCH_ROWS
            if taken >= num_rows:
                break
        return started - begun, taken / (time.perf_counter() - started)


def time_ingest(source: str, destination: str, size: int) -> tuple[Manifest, float]:
    """Ingest a source; return the dataset's manifest and the files per second."""
    started = time.perf_counter()
    manifest = ingest(source, destination, size)
    return manifest, manifest.num_files / (time.perf_counter() - started)


def time_stream(uri: str, num_rows: int) -> tuple[float, float]:
    """Return the seconds until the first batch, and the rows per second of all ranks together."""
    rows = training_dataset(uri, seed=0, world_size=WORLD_SIZE, num_rows=num_rows)
    ranks = [Rank.remote() for _ in range(WORLD_SIZE)]
    shards = rows.streaming_split(WORLD_SIZE, equal=True)
    times = ray.get([rank.take.remote(shard, num_rows) for rank, shard in zip(ranks, shards, strict=True)])
    return max(first for first, _ in times), sum(rate for _, rate in times)


def decoded(uri: str, batch_rows: int) -> Iterator[Rows]:
    """Yield decoded batches of a dataset in the order of training, read like a Ray read task but without Ray."""
    shards = Manifest.load(uri).split("train").shards
    stream = Stream(tuple(shard.rows for shard in shards), 0, BLOCK_ROWS)
    for number in itertools.count():
        table = _read([(uri, shard) for shard in shards], stream.rows(ReadBlock(number))[1])
        for start in range(0, BLOCK_ROWS - batch_rows + 1, batch_rows):
            part = table.slice(start, batch_rows)
            arrays = decode_rows({name: part.column(name).to_pylist() for name in PICTURES})
            yield {name: torch.from_numpy(array) for name, array in arrays.items()}


def our_batches(uri: str) -> Iterator[object]:
    """Yield the batches that steps of `phase1` train on."""
    augment = load_recipe("phase1").augment
    for step, rows in enumerate(decoded(uri, BATCH_ROWS)):
        yield make_batch(rows, augment, step_generator(0, step, 0))


def their_batches(clone: str, folder: Path, size: int) -> Iterator[object]:
    """Yield the batches of the authors' DataLoader, which runs in this process."""
    sys.path.insert(0, clone)
    import cv2
    from data import Anime  # type: ignore[import-not-found]

    cv2.setNumThreads(1)
    pictures = Anime(str(folder / "reference"), str(folder / "condition"), size=size)
    loader = torch.utils.data.DataLoader(pictures, batch_size=BATCH_ROWS, shuffle=True, drop_last=True)
    while True:
        yield from loader


def write_their_files(source: str, folder: Path, limit: int) -> None:
    """Write reference/N.jpg and condition/N.jpg of 256 px: images of a folder, and line art as the authors make it."""
    for name in ("reference", "condition"):
        (folder / name).mkdir(parents=True)
    kinds = (".jpg", ".jpeg", ".png", ".webp")
    found = [path for path in sorted(Path(source).rglob("*")) if path.suffix.lower() in kinds]
    # A drawn dataset has four images per row, of which only the targets are used.
    targets = [path for path in found if path.parent.name == "target"] or found
    for number, path in enumerate(targets[:limit]):
        picture = fit_square(decode_rgb(path.read_bytes()), THEIR_SIZE)
        lines = to_uint8(xdog(to_tensor(torch.from_numpy(picture)[None]), torch.tensor([0.4])))
        Image.fromarray(picture).save(folder / f"reference/{number}.jpg", quality=95)
        Image.fromarray(lines[0, :, :, 0].numpy()).save(folder / f"condition/{number}.jpg", quality=95)


def alternate(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Run the sides alternately; return each side's rows per second of CPU time, without its first round."""
    seconds, rows = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0)
    for number, (name, work) in itertools.product(range(rounds + 1), sides.items()):
        begun = time.process_time()
        done = work()
        if number:
            seconds[name] += time.process_time() - begun
            rows[name] += done
    return {name: rows[name] / seconds[name] for name in sides}


def _taker(batches: Iterator[object]) -> Callable[[], int]:
    def take() -> int:
        for _ in range(BLOCK_ROWS // BATCH_ROWS):
            next(batches)
        return BLOCK_ROWS

    return take


def time_batches(places: dict[str, str], clone: str | None, their_files: Path, size: int, rounds: int) -> list[str]:
    """Return table lines: rows per second of one core, in batches that are ready to train on."""
    sides = {f"ours, {name}": _taker(our_batches(uri)) for name, uri in places.items()}
    if clone:
        sides["theirs, local"] = _taker(their_batches(clone, their_files, size))
    rates = alternate(sides, rounds)
    theirs = rates.get("theirs, local")
    lines = []
    for name, rate in rates.items():
        lines.append(f"| {name} | {size} | {rate:.0f} | {f'{rate / theirs:.1f}' if theirs else ''} |")
    return lines


class Trainer:
    """Trains `phase1` on batches from any source."""

    def __init__(self, size: int, batch_rows: int | None = None) -> None:
        self.config = load_recipe("phase1", ["max_steps=1000000"])
        self.batch_rows = batch_rows or self.config.batch_size
        torch.manual_seed(0)
        self.state = TrainState(self.config.bundle_config(size).build(), self.config.optimizer, 1_000_000)
        sampler = self.config.sampler or SamplerDefaults()
        self.objective = self.config.objective.build(self.state.denoiser, sampler, 0)

    def steps(self, batches: Iterator[Rows], count: int) -> int:
        """Run `count` steps and return the number of rows trained on."""
        until = self.state.step + count
        augment = self.config.augment
        fit(self.state, self.objective, batches, until, lambda _: None, augment=augment, seed=0)
        return count * self.batch_rows


def time_training(places: dict[str, str], size: int, rounds: int) -> list[str]:
    """Return table lines: images per second of one core, from each store and from one batch kept in memory."""
    trainer = Trainer(size)
    kept = itertools.repeat(next(decoded(next(iter(places.values())), trainer.batch_rows)))
    sources: dict[str, Iterator[Rows]] = {"one kept batch": kept}
    sources |= {f"read, {name}": decoded(uri, trainer.batch_rows) for name, uri in places.items()}

    def worker(batches: Iterator[Rows]) -> Callable[[], int]:
        return lambda: trainer.steps(batches, BLOCK_ROWS // trainer.batch_rows)

    rates = alternate({name: worker(batches) for name, batches in sources.items()}, rounds)
    base = rates["one kept batch"]
    return [f"| {name} | {rate:.1f} | {rate / base:.3f} |" for name, rate in rates.items()]


def bare_rate(uri: str, size: int, steps: int, workers: int, common_gradients: bool = False) -> float:
    """Return images per second (wall clock) of plain processes, one per worker, on one batch kept in memory.

    With common_gradients the processes train under DDP.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(workers) as pool:
        meeting = f"file://{folder}/meeting" if common_gradients else None
        tasks = [(uri, size, steps, workers, rank, meeting) for rank in range(workers)]
        return sum(pool.starmap(_bare_process, tasks, chunksize=1))


def _bare_process(uri: str, size: int, steps: int, workers: int, rank: int, meeting: str | None) -> float:
    torch.set_num_threads(1)
    trainer = Trainer(size, load_recipe("phase1").batch_size // workers)
    if meeting is not None:
        torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=workers)
        trainer.objective = data_parallel(trainer.objective, torch.device("cpu"))
    kept = itertools.repeat(next(decoded(uri, trainer.batch_rows)))
    trainer.steps(kept, 5)
    begun = time.perf_counter()
    return trainer.steps(kept, steps) / (time.perf_counter() - begun)


def verb_rate(uri: str, steps: int, workers: int, workspace: str) -> tuple[float, float]:
    """Run `train`; return images per second in its second half, and the fraction of time that it waits for rows."""
    command = [sys.executable, "-m", "animediffusion", "--json", "--workspace", workspace, "train", "phase1"]
    settings = [f"data={uri}", f"max_steps={2 * steps}", f"log_every={steps}", "num_samples=0"]
    done = subprocess.run(
        [*command, *settings, f"num_workers={workers}"], check=True, stdout=subprocess.PIPE, text=True
    )
    result = json.loads(done.stdout)
    return result["images_per_s"], result["metrics"]["data_wait"]


def time_verb(uri: str, size: int, steps: int, workspace: str) -> list[str]:
    """Return table lines: the `train` command compared with plain processes that share gradients or do not."""
    lines = []
    for workers in (1, WORLD_SIZE):
        common = workers > 1
        before = bare_rate(uri, size, steps, workers, common)
        rate, wait = verb_rate(uri, steps, workers, f"{workspace}-{workers}")
        after = bare_rate(uri, size, steps, workers, common)
        share = 2 * rate / (before + after)
        lines.append(f"| bare, one kept batch; before, after | {workers} | {before:.1f}, {after:.1f} | | |")
        lines.append(f"| `animediffusion train phase1` | {workers} | {rate:.1f} | {share:.3f} | {wait:.3f} |")
    alone = bare_rate(uri, size, steps, WORLD_SIZE)
    return [*lines, f"| bare, without exchange of gradients | {WORLD_SIZE} | {alone:.1f} | | |"]


@contextmanager
def s3_server() -> Iterator[str]:
    """Run an S3 server with one bucket in its own process, and point the AWS environment variables to it."""
    port = 5000 + os.getpid() % 20_000
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while why_unreachable(url, timeout=1):
            if server.poll() is not None:
                raise SystemExit("the S3 server did not start: pip install 'moto[server]'")
            time.sleep(0.2)
        os.environ.update(
            AWS_ENDPOINT_URL_S3=url, AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench", AWS_REGION="us-east-1"
        )
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bench")
        yield url
    finally:
        server.terminate()
        server.wait()


def make_datasets(source: str, folder: str, size: int) -> tuple[dict[str, str], dict[str, tuple[Manifest, float]]]:
    """Ingest a dataset of this size into each store; return its URIs, and manifests with files per second."""
    places = {"local": f"{folder}/dataset-{size}", "S3": f"s3://bench/dataset-{size}"}
    return places, {name: time_ingest(source, place, size) for name, place in places.items()}


def show(title: str, header: str, lines: list[str]) -> None:
    """Print a table."""
    rule = "|" + "---|" * (header.count("|") - 1)
    print(f"\n{title}\n\n{header}\n{rule}", *lines, sep="\n", flush=True)


def measure(args: argparse.Namespace, folder: str) -> None:
    """Run the selected parts one after the other."""
    source = args.source or f"{folder}/drawn"
    if not args.source:
        synthesize(source, args.pictures, THEIR_SIZE)
    datasets = {}
    for size in sorted({args.size, *(args.sizes if "batches" in args.parts else [])}):
        datasets[size], made = make_datasets(source, folder, size)
        lines = []
        for name, (manifest, files_per_s) in made.items():
            rows = sum(split.rows for split in manifest.splits.values())
            first_s, rows_per_s = time_stream(datasets[size][name], args.rows) if "stream" in args.parts else (0, 0)
            lines.append(f"| {name} | {rows} | {files_per_s:.0f} | {first_s:.1f} | {rows_per_s:.0f} |")
        if "stream" in args.parts:
            header = "| store | rows | ingest files/s | first batch s | stream rows/s |"
            show(f"{size} px, two cores, by the wall's clock", header, lines)
    cluster.shutdown()
    torch.set_num_threads(1)
    if "batches" in args.parts:
        their_files = Path(folder) / "theirs"
        write_their_files(source, their_files, args.pictures)
        lines = [
            line for size in args.sizes for line in time_batches(datasets[size], args.authors, their_files, size, 4)
        ]
        show("Batches ready to train on, one core", "| side | px | rows/s | times theirs |", lines)
    if "training" in args.parts:
        lines = time_training(datasets[args.size], args.size, args.rounds)
        show(f"Training `phase1`, {args.size} px, one core, no Ray", "| rows | images/s | share |", lines)
    if "ray" in args.parts:
        lines = time_verb(datasets[args.size]["local"], args.size, args.steps, f"{folder}/runs")
        header = "| | workers | images/s | share | waiting for rows |"
        batch = load_recipe("phase1").batch_size
        show(f"Training `phase1`, {args.size} px, batch {batch}, by the wall's clock", header, lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", help="clone of the authors' repository; without it, their loader is not measured")
    parser.add_argument("--source", help="folder of pictures")
    parser.add_argument("--pictures", type=int, default=1000, help="to draw, and to give to their loader")
    parser.add_argument("--size", type=int, default=64, help="pixels, of the stream and of training")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256], help="pixels, of ready batches")
    parser.add_argument("--rows", type=int, default=10_000, help="rows that each consumer of the stream takes")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of 256 rows, of batches and training")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of the verb")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, Ray {ray.__version__}, {os.cpu_count()} CPUs", flush=True)
    with tempfile.TemporaryDirectory() as folder, s3_server():
        cluster.connect(Settings.from_environment(workspace=Path(folder) / "workspace"), num_cpus=2)
        try:
            measure(args, folder)
        finally:
            cluster.shutdown()


if __name__ == "__main__":
    main()
