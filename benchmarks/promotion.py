"""Test promotion under load: requests continue while a version is promoted, a broken one is forced in, and rolled back.

    python benchmarks/promotion.py [--requests 1000] [--clients 6] [--out FILE]

One replica runs in this process with its engines and the thread that follows a real embedded registry, as on Ray Serve,
but without HTTP. The model is the network of the recipe phase1 with random weights, at 64 px; the steps of a request
are drawn from 4, 8 and 16. There are fewer clients than slots in the batch, so no request waits for a slot. An engine
step is one network evaluation of the batch. A stall is the time of a request beyond its number of steps times the
typical engine step at that time, counted in such steps. A request belongs to an event if it ran between the move of the
alias and two seconds after the replica had settled. Times are wall-clock times, so other work on the machine affects
them. The exit code is 1 if a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import hardware

from animediffusion.models.bundle import BundleConfig, SamplerDefaults, identity, save_bundle
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.platform.config import Settings
from animediffusion.platform.registry import audit_log
from animediffusion.platform.registry.client import Registry
from animediffusion.serve.protocol import ColorizeJob
from animediffusion.serve.replica.follower import Follower
from animediffusion.serve.replica.model_source import ModelSource
from animediffusion.serve.replica.replica import Replica

SIZE = 64
STEPS = (4, 8, 16)
POLL_S = 0.5
SETTLED_S = 2.0
NEAR_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The times and the result of one request."""

    began: float
    ended: float
    steps: int
    version: str
    """Model version that answered; empty if the request failed."""

    @property
    def seconds(self) -> float:
        """Time from sending the request to its answer."""
        return self.ended - self.began


@dataclass(frozen=True, kw_only=True)
class Event:
    """A move of the alias champion."""

    name: str
    began: float
    seen_s: float
    """Seconds until the replica had loaded or refused the version."""

    def holds(self, sample: Sample) -> bool:
        """Return whether the request ran during the event or within SETTLED_S after it."""
        return sample.ended > self.began and sample.began < self.began + self.seen_s + SETTLED_S


class Load:
    """Clients that each send one request after another."""

    def __init__(self, replica: Replica, num_requests: int, num_clients: int) -> None:
        row = make_row(0, 1, SIZE)
        self.replica = replica
        self.num_requests = num_requests
        self.num_clients = num_clients
        self.lines, self.reference = row.sketch, row.reference
        self.samples: list[Sample] = []
        self._random = random.Random(0)
        self._num_sent = 0

    async def run(self) -> None:
        """Run the clients until `num_requests` requests were sent and answered."""
        await asyncio.gather(*(self._client() for _ in range(self.num_clients)))

    async def _client(self) -> None:
        while self._num_sent < self.num_requests:
            self._num_sent += 1
            steps, began, version = self._random.choice(STEPS), time.perf_counter(), ""
            options = SamplerOptions(seed=self._random.randrange(2**32), steps=steps)
            job = ColorizeJob(lines=self.lines, references=(self.reference,), options=options)
            try:
                version = (await self.replica.colorize(job)).model_version
            except Exception as error:
                print(f"failed: {error!r}", file=sys.stderr)
            self.samples.append(Sample(began=began, ended=time.perf_counter(), steps=steps, version=version))


def make_registry(folder: Path) -> Registry:
    """Create a registry with working versions 1 and 2 and version 3 with NaN weights; version 1 is the champion."""
    registry = Registry(Settings(workspace=folder / "workspace"))
    network = load_recipe("phase1", ["max_steps=1"]).network
    config = BundleConfig(network=network, image_size=SIZE, sampler=SamplerDefaults(steps=8))
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        bundle, denoiser = folder / f"bundle-{seed}", config.build()
        if seed == 3:
            for parameter in denoiser.parameters():
                torch.nn.init.constant_(parameter, float("nan"))
        save_bundle(bundle, denoiser, config)
        registry.register(bundle, sha256=identity(bundle))
    move(registry, 1)
    return registry


def move(registry: Registry, version: int) -> None:
    """Point the alias champion at a version without checking its metrics."""
    with audit_log.recorded(registry, "promote", "champion", registry.alias("champion"), version, forced=True):
        registry.set_alias("champion", version)


async def measure(registry: Registry, num_requests: int, num_clients: int) -> tuple[list[Sample], list[Event]]:
    """Send all requests and move the alias after each quarter of them; return the requests and the three events."""
    replica = Replica(max_batch=2 * num_clients, max_queue=0)
    follower = Follower(replica, ModelSource(registry.settings), POLL_S)
    await asyncio.to_thread(follower.start)
    load, events = Load(replica, num_requests, num_clients), []
    running = asyncio.create_task(load.run())
    plan: list[tuple[str, int, Callable[[], bool]]] = [
        ("promotion", 2, lambda: replica.version == "2"),
        ("a broken version", 3, lambda: replica.error is not None),
        ("rollback", 1, lambda: replica.version == "1"),
    ]
    for number, (name, version, followed) in enumerate(plan, 1):
        while len(load.samples) < number * num_requests // 4:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(move, registry, version)
        began = time.perf_counter()
        while not followed() and not running.done():
            await asyncio.sleep(0.01)
        events.append(Event(name=name, began=began, seen_s=time.perf_counter() - began))
    await running
    follower.stop()
    replica.close()
    return load.samples, events


def report(samples: list[Sample], events: list[Event]) -> list[str]:
    """Return the lines of the table."""
    quiet = [sample for sample in samples if not any(event.holds(sample) for event in events)]
    step = statistics.median(sample.seconds / sample.steps for sample in samples)
    lines = [
        f"A typical engine step took {step * 1e3:.1f} ms.",
        "",
        "| while | requests | failed | new requests get it after | p50, ms | p95, ms | longest stall, steps |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = [("nothing happens", None, quiet)]
    groups += [(event.name, event, [one for one in samples if event.holds(one)]) for event in events]
    for name, event, group in groups:
        times = sorted(sample.seconds * 1e3 for sample in group)
        stall = max(sample.seconds / step_seconds_at(sample, samples) - sample.steps for sample in group)
        after = "" if event is None else "never" if event.name.startswith("a broken") else f"{event.seen_s:.1f} s"
        failed = sum(not sample.version for sample in group)
        lines.append(
            f"| {name} | {len(group)} | {failed} | {after} | {times[len(times) // 2]:.0f} | "
            f"{times[int(0.95 * (len(times) - 1))]:.0f} | {stall:.1f} |"
        )
    failed = sum(not sample.version for sample in samples)
    return [*lines, f"| all | {len(samples)} | {failed} | | | | |"]


def step_seconds_at(sample: Sample, samples: list[Sample]) -> float:
    """Return the seconds of a typical engine step near a request: the median over requests within ten seconds."""
    near = [one for one in samples if one.ended > sample.began - NEAR_S and one.began < sample.ended + NEAR_S]
    return statistics.median(one.seconds / one.steps for one in near)


def main() -> None:
    """Print the table; exit with 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="of the arithmetic")
    parser.add_argument("--out", type=Path, help="also write the table there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="promotion-") as folder:
        samples, events = asyncio.run(measure(make_registry(Path(folder)), options.requests, options.clients))
    machine = f"{hardware(torch.device('cpu'))}, {os.cpu_count()} cores"
    head = f"{machine}, torch {torch.__version__}, {options.threads} thread, {options.clients} clients"
    text = "\n".join([head, "", *report(samples, events)])
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    sys.exit(int(any(not sample.version for sample in samples)))


if __name__ == "__main__":
    main()
