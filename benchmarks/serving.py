"""Compare continuous batching with one request at a time and with @serve.batch, over HTTP and without HTTP.

    python benchmarks/serving.py [--model BUNDLE] [--threads 1] [--max-batch 16] [--precision float32]

All sides use the same model, thread count and HTTP code (benchmarks/serving_sides.py). The model is the recipe phase1
at 64 px, untrained unless --model is given, because the arithmetic is the same. Steps are drawn from {4, 8, 16, 25}.

In the phase saturated, a fixed number of requests is always in progress; the sides alternate in short rounds, so other
work on the machine affects all of them. In the phase paced, requests are Poisson arrivals at the same rate on every
side, a fraction of the throughput of @serve.batch. In the phase overload, they are Poisson arrivals at ten times our
throughput. Seconds are wall-clock time; CPU is the CPU time of the server's processes, which other work on the machine
affects least. The exit code is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from serving_sides import Side, run_side

from animediffusion.models.bundle import load_bundle, save_bundle
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.models.tensors import to_tensor
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.platform.images.codec import encode_png
from animediffusion.serve.engine.engine import Engine, Request

STEPS = (4, 8, 16, 25)
SIZE, NUM_PAIRS = 64, 8
SIDES = ("one", "batch", "ours")
PACE = 0.7
"""Rate of paced requests, as a fraction of the throughput of @serve.batch."""
OVERLOAD = 10
START_S = 240


@dataclass
class Sample:
    """The result of one request."""

    status: int
    seconds: float
    first_preview: float | None = None


@dataclass
class Load:
    """Results of all requests of one phase on one side."""

    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0
    cpu: float = 0.0

    @property
    def done(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.status == 200]

    @property
    def rate(self) -> float:
        """Images per second."""
        return len(self.done) / self.seconds if self.seconds else float("nan")

    @property
    def cpu_ms(self) -> float:
        """CPU time of the server per image, in ms."""
        return 1000 * self.cpu / max(1, len(self.done))

    def percentile(self, share: int, status: int = 200) -> float:
        seconds = [sample.seconds for sample in self.samples if sample.status == status]
        return float(np.percentile(seconds, share)) if seconds else float("nan")

    def first_preview(self) -> float:
        """Return the median seconds until the first preview, or until the image if there were no previews."""
        found = [sample.first_preview for sample in self.done if sample.first_preview is not None]
        return float(np.median(found)) if found else self.percentile(50)

    def add(self, other: Load) -> None:
        self.samples += other.samples
        self.seconds += other.seconds
        self.cpu += other.cpu


class Client:
    """Sends requests to one server; the number of a request determines its images, seed and steps."""

    def __init__(self, port: int, process: psutil.Process) -> None:
        self.url, self.process = f"http://127.0.0.1:{port}", process
        rows = [make_row(0, index, SIZE) for index in range(NUM_PAIRS)]
        self.pairs = [(encode_png(row.sketch), encode_png(row.reference)) for row in rows]

    async def ask(self, http: httpx.AsyncClient, number: int, stream: bool = False) -> Sample:
        """Request one image."""
        sketch, reference = self.pairs[number % NUM_PAIRS]
        files = {"sketch": ("s.png", sketch), "reference": ("r.png", reference)}
        data = {"num_inference_steps": str(steps_of(number)), "seed": str(number), "size": "model"}
        begun, first = time.perf_counter(), None
        path = "/v1/colorize/stream" if stream else "/v1/colorize"
        async with http.stream("POST", self.url + path, files=files, data=data) as answer:
            async for line in answer.aiter_lines() if stream else answer.aiter_bytes():
                if first is None and stream and line.startswith("event: progress"):
                    first = time.perf_counter() - begun
        return Sample(answer.status_code, time.perf_counter() - begun, first)

    def saturated(self, count: int, at_once: int, first: int) -> Load:
        """Send `count` requests, with `at_once` of them in progress at a time."""
        numbers = iter(range(first, first + count))

        async def worker(http: httpx.AsyncClient) -> list[Sample]:
            return [await self.ask(http, number) for number in numbers]

        async def run(http: httpx.AsyncClient) -> list[Sample]:
            return [one for some in await asyncio.gather(*(worker(http) for _ in range(at_once))) for one in some]

        return self._measure(run)

    def paced(self, rate: float, seconds: float, stream_each: int = 0) -> Load:
        """Send Poisson arrivals for `seconds` and wait for all responses; every `stream_each`-th requests previews."""
        gaps = np.random.default_rng(0).exponential(1 / rate, round(rate * seconds))

        async def run(http: httpx.AsyncClient) -> list[Sample]:
            tasks = []
            for number, gap in enumerate(gaps):
                await asyncio.sleep(gap)
                tasks.append(
                    asyncio.create_task(self.ask(http, number, bool(stream_each) and not number % stream_each))
                )
            return list(await asyncio.gather(*tasks))

        return self._measure(run)

    def _measure(self, run: Any) -> Load:
        async def within() -> list[Sample]:
            async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as http:
                samples: list[Sample] = await run(http)
                return samples

        begun, cpu = time.perf_counter(), self._cpu()
        samples = asyncio.run(within())
        return Load(samples, time.perf_counter() - begun, self._cpu() - cpu)

    def _cpu(self) -> float:
        times = [process.cpu_times() for process in [self.process, *self.process.children(recursive=True)]]
        return sum(one.user + one.system for one in times)


def steps_of(number: int) -> int:
    """Return the steps of a request; all counts are equally frequent, in a fixed random order."""
    return int(np.random.default_rng(number // len(STEPS)).permutation(STEPS)[number % len(STEPS)])


class EngineAlone:
    """The engine without HTTP, in this process."""

    def __init__(self, side: Side) -> None:
        torch.set_num_threads(side.threads)
        bundle = load_bundle(side.model, dtype=getattr(torch, side.precision))
        self.engine = Engine(bundle, max_batch=side.max_batch, max_queue=1000)
        rows = [make_row(0, index, SIZE) for index in range(NUM_PAIRS)]
        self.pairs = [tuple(to_tensor(torch.from_numpy(p)[None])[0] for p in (r.sketch, r.reference)) for r in rows]

    def saturated(self, count: int, first: int) -> Load:
        """Submit all requests together and wait for them."""
        begun, cpu = time.perf_counter(), time.process_time()
        futures = [self.engine.submit(self._request(number)) for number in range(first, first + count)]
        for future in futures:
            future.result()
        seconds = time.perf_counter() - begun
        return Load([Sample(200, seconds)] * count, seconds, time.process_time() - cpu)

    def _request(self, number: int) -> Request:
        sketch, reference = self.pairs[number % NUM_PAIRS]
        options = SamplerOptions(seed=number, steps=steps_of(number), guidance_scale=1.0)
        return Request(sketch=sketch[:1], references=(reference,), options=options)


@contextmanager
def serving(side: Side) -> Iterator[Client]:
    """Run a server in its own process, and yield a client once it is ready."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(side.threads)}
    command = [sys.executable, __file__, "--side", json.dumps(asdict(side))]
    process = subprocess.Popen(command, env=environment)
    try:
        until = time.monotonic() + START_S
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"error: server {side.name!r}: did not come up; see above")
            try:
                if httpx.get(f"http://127.0.0.1:{side.port}/readyz", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield Client(side.port, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(60)


def untrained(folder: Path) -> str:
    """Write an untrained bundle of the recipe phase1 with the weights of seed 0; return its path."""
    config = load_recipe("phase1").bundle_config(SIZE)
    torch.manual_seed(0)
    save_bundle(folder / "bundle", config.build(), config)
    return str(folder / "bundle")


def measure(args: argparse.Namespace, model: str) -> dict[str, dict[str, Load]]:
    """Run all phases; return {side: {phase: load}}."""
    names = [name for name in SIDES if name not in args.without]
    rivals = args.rivals_precision or args.precision
    sides = {
        name: Side(
            name=name,
            model=model,
            port=args.port + number,
            threads=args.threads,
            max_batch=args.max_batch,
            precision=args.precision if name == "ours" else rivals,
            timeout_s=args.timeout,
        )
        for number, name in enumerate(SIDES)
    }
    with ExitStack() as stack:
        clients = {name: stack.enter_context(serving(sides[name])) for name in names}
        alone = EngineAlone(sides["ours"])
        found: dict[str, dict[str, Load]] = {name: {"saturated": Load()} for name in (*names, "engine alone")}
        alone.saturated(2 * args.max_batch, 0)
        for client in clients.values():
            client.saturated(4, 4, 0)
        for number in range(args.rounds):
            for name, client in clients.items():
                count = args.requests // (4 if name == "one" else 1)
                found[name]["saturated"].add(client.saturated(count, 2 * args.max_batch, number * args.requests))
            found["engine alone"]["saturated"].add(alone.saturated(args.requests, number * args.requests))
        rate = args.rate or PACE * found["batch" if "batch" in names else "ours"]["saturated"].rate
        for name, client in clients.items():
            found[name]["paced"] = client.paced(rate, args.seconds, 4 if name == "ours" else 0)
        overload = OVERLOAD * found["ours"]["saturated"].rate
        found["ours"]["overload"] = clients["ours"].paced(overload, args.overload_seconds)
    return found


def table(found: dict[str, dict[str, Load]], deadline: float) -> tuple[str, bool]:
    """Return the table as Markdown, and whether all targets are met."""
    lines = [
        "| | pictures/s | times `one` | CPU ms a picture | times `one` | p50, s | p95, s | p99, s | first preview, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    one = found["one"]["saturated"]
    for name, loads in found.items():
        full, paced = loads["saturated"], loads.get("paced", Load())
        cells = [
            f"{full.rate:.2f}",
            f"{full.rate / one.rate:.2f}",
            f"{full.cpu_ms:.0f}",
            f"{one.cpu_ms / full.cpu_ms:.2f}",
        ]
        cells += [f"{value:.2f}" for value in (*map(paced.percentile, (50, 95, 99)), paced.first_preview())]
        lines.append(f"| {name} | {' | '.join(cell.replace('nan', '') for cell in cells)} |")
    ours, over = found["ours"]["saturated"], found["ours"]["overload"]
    statuses = sorted({sample.status for sample in over.samples})
    counts = ", ".join(f"{sum(s.status == status for s in over.samples)} answered {status}" for status in statuses)
    lines += ["", f"Overload: {len(over.samples)} requests, {counts}.", ""]
    others = sum(sample.status not in (200, 429) for sample in over.samples)
    checks = [
        ("engine alone, times `one`", found["engine alone"]["saturated"].rate / one.rate, 3.3, True),
        ("ours over HTTP, times `one`", ours.rate / one.rate, 2.5, True),
        ("overload: p95 of 429, s", over.percentile(95, 429), 0.25, False),
        ("overload: slowest accepted, s", over.percentile(100), deadline, False),
        ("overload: answers that are neither 200 nor 429", others, 0, False),
    ]
    if "batch" in found:
        p95 = found["ours"]["paced"].percentile(95) / found["batch"]["paced"].percentile(95)
        checks.append(("p95, times that of `batch`", p95, 0.6, False))
    met = [value >= target if larger else value <= target for _, value, target, larger in checks]
    for (what, value, target, larger), ok in zip(checks, met, strict=True):
        lines.append(f"- {what}: {value:.2f}, at {'least' if larger else 'most'} {target}: {'yes' if ok else 'NO'}")
    return "\n".join(lines), all(met)


def main() -> None:
    """Print the table; exit with 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="bundle folder for 64 px")
    parser.add_argument("--threads", type=int, default=1, help="of arithmetic, on every side")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rivals-precision", choices=("float32", "bfloat16"), help="if another")
    parser.add_argument("--rounds", type=int, default=3, help="of the saturated phase")
    parser.add_argument("--requests", type=int, default=48, help="in each of them; a quarter for `one`")
    parser.add_argument("--seconds", type=float, default=25, help="of the paced phase")
    parser.add_argument(
        "--rate", type=float, help=f"requests per second of the paced phase; {PACE} of the rate of `batch` if omitted"
    )
    parser.add_argument("--overload-seconds", type=float, default=8)
    parser.add_argument("--timeout", type=float, default=30, help="deadline of a request, s")
    parser.add_argument("--without", nargs="*", default=[], choices=["batch"], help="sides to leave out")
    parser.add_argument("--port", type=int, default=18200)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(Side(**json.loads(args.side)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, args.model or untrained(Path(folder)))
    lines, met = table(found, args.timeout)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {args.threads} threads,", end=" ")
    print(f"batch {args.max_batch}, {args.precision}, load {os.getloadavg()[0]:.0f}\n\n{lines}")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
