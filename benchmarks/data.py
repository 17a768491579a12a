"""Rows per second of ingest and of the training stream, from a local folder and through S3 (moto, on loopback).

    python benchmarks/data.py [--source FOLDER] [--size 64] [--rows 10000]

Without --source, pictures are drawn with `data synthesize`. The stream is timed with two consumers that decode, after
their first batch, which waits for Ray; the S3 server is a Python process on the same cores, so S3 is a lower bound.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import boto3
import ray

from animediffusion.pipelines.dataset import Manifest, decode_rows, training_dataset
from animediffusion.pipelines.ingest import ingest
from animediffusion.pipelines.synthesize import synthesize
from animediffusion.platform import cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.network import why_unreachable

WORLD_SIZE = 2
BATCH_ROWS = 16


@ray.remote(num_cpus=0)
class Rank:
    """A consumer that decodes what it gets and does nothing with it."""

    def take(self, shard: Any, num_rows: int) -> tuple[float, float]:
        """Seconds until the first batch, and rows per second from there on."""
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
    """The dataset, and files per second."""
    started = time.perf_counter()
    manifest = ingest(source, destination, size)
    return manifest, manifest.num_files / (time.perf_counter() - started)


def time_stream(uri: str, num_rows: int) -> tuple[float, float]:
    """Seconds until the first batch, and rows per second of all ranks together."""
    rows = training_dataset(uri, seed=0, world_size=WORLD_SIZE, num_rows=num_rows)
    ranks = [Rank.remote() for _ in range(WORLD_SIZE)]
    shards = rows.streaming_split(WORLD_SIZE, equal=True)
    times = ray.get([rank.take.remote(shard, num_rows) for rank, shard in zip(ranks, shards, strict=True)])
    return max(first for first, _ in times), sum(rate for _, rate in times)


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server in a process of its own, with one bucket that the AWS variables lead to."""
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


def main() -> None:
    """Print one line per store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="folder of pictures")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=10_000, help="rows that each of the two consumers takes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, s3_server():
        cluster.connect(Settings.from_environment(workspace=Path(folder) / "workspace"), num_cpus=2)
        source = args.source or f"{folder}/drawn"
        if not args.source:
            synthesize(source, 1000, args.size)
        lines = []
        for name, place in (("local", f"{folder}/dataset"), ("S3 (moto)", "s3://bench/dataset")):
            manifest, files_per_s = time_ingest(source, place, args.size)
            first_s, rows_per_s = time_stream(place, args.rows)
            rows = sum(split.rows for split in manifest.splits.values())
            lines.append(f"| {name} | {rows} | {files_per_s:.0f} | {first_s:.1f} | {rows_per_s:.0f} |")
        print(f"\n{args.size} px, 2 CPUs\n\n| store | rows | ingest files/s | first batch s | stream rows/s |")
        print("|---|---|---|---|---|", *lines, sep="\n")
        cluster.shutdown()


if __name__ == "__main__":
    main()
