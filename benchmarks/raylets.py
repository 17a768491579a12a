"""Measure how ingest, training, bulk coloring and serving grow from one raylet to two.

    python benchmarks/raylets.py [--rounds 2] [--work 1] [--stages ingest train colorize serve] [--out FILE]

A raylet is a node of Ray with its own object store and workers. Here both raylets are on one machine, and each has one
logical CPU and one core: every process of a raylet is pinned to its core, with one thread of arithmetic. The driver,
the clients and Ray's control store are not pinned, so with two raylets they compete with them for the cores.

Each stage is the function that the command calls, on drawn faces of 128 px that are made before: `data ingest` of rows
with four pictures, in parts of 32 rows, so that both raylets end together; `train` with one worker for each raylet and
the same 32 rows a step; `colorize --on-cluster` with the starter model, painted; `serve` with one engine for each
raylet, the ingress and the proxy on the first raylet, and 24 clients that send the next drawing as soon as they have
the last picture. The second raylet joins and leaves while the application runs.

In each stage the sides alternate: one raylet, two, two, one. Only the middle of a run counts: from the time when a
quarter of its rows is done until nine tenths are, so without the start of processes. CPU seconds are those of all
processes of the raylets, including Ray's own; other CPU seconds are those of the driver, the clients and the control
store.

--work 0.25 makes a quarter of the rows.
"""

from __future__ import annotations

import os
import secrets

# Ray and torch read these variables when they are imported. Without a token, Ray writes one to the home directory.
os.environ |= {"OMP_NUM_THREADS": "1", "RAY_enable_metrics_collection": "0"}
if "RAY_AUTH_MODE" not in os.environ:
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
os.environ.pop("MLFLOW_TRACKING_URI", None)

import argparse
import datetime
import functools
import itertools
import platform
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import ray
import torch
from bulk import END, POLL_S, WARM, count_pictures
from common import hardware
from ray import serve
from ray.cluster_utils import Cluster
from scaling import engines, free_port

from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.pipelines.data.ingest import prepare
from animediffusion.pipelines.synthetic.dataset import synthesize
from animediffusion.pipelines.training.driver import train
from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.pipelines.training.reporting import TrainProgress
from animediffusion.platform.cluster import cluster
from animediffusion.platform.config import Settings
from animediffusion.serve.bulk.bulk import color_on_cluster
from animediffusion.serve.bulk.drawings import References, list_drawings
from animediffusion.serve.deployments import ServeConfig
from animediffusion.serve.rendering.render import RenderOptions
from animediffusion.serve.server import start

FACES_PX, ROW_FILES = 128, 4
"""Side of the drawn faces, and pictures of a row."""
TRAIN_PX = 64
PART_ROWS = 32
FACES, STEPS, DRAWINGS, REQUESTS = 1500, 30, 300, 300
"""Rows, training steps, drawings and requests of one run."""
CLIENTS = 24
ENGINE_CPUS = 0.75
"""Logical CPUs of an engine; the ingress takes the rest of the first raylet."""
NODE = {"num_cpus": 1, "include_log_monitor": False}
PATIENCE_S = 120.0

Process = tuple[int, float]
"""Id and start time of a process."""
CpuTimes = dict[Process, float]


class Middle(NamedTuple):
    """What the middle of a run took."""

    rows: int
    seconds: float
    cpu_s: float
    """CPU time of the raylets' processes."""
    other_cpu_s: float
    """CPU time of the driver, the clients and the control store."""


class Raylets:
    """A Ray cluster on this machine whose raylets have one core each; this process joins it.

    Args:
        settings: settings of the workspace.
    """

    def __init__(self, settings: Settings) -> None:
        self._allowed = os.sched_getaffinity(0)
        self._cores = sorted(self._allowed)[:2]
        if len(self._cores) < 2:
            raise SystemExit("error: this process may use one core, and the benchmark needs two")
        with self._on_core(0):
            head = {"include_dashboard": False, **NODE}
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [self._cluster.head_node]
        for kind, processes in self._nodes[0].all_processes.items():
            for one in processes if kind != "raylet" else ():
                release(one.process.pid, self._allowed)
        os.environ["RAY_ADDRESS"] = self._cluster.address
        cluster.connect(settings)

    @contextmanager
    def _on_core(self, number: int) -> Iterator[None]:
        """Pin this thread to the core of a raylet, because the processes that it starts inherit that."""
        os.sched_setaffinity(0, {self._cores[number]})
        try:
            yield
        finally:
            os.sched_setaffinity(0, self._allowed)

    def use(self, number: int) -> None:
        """Start or remove the second raylet, so that the cluster has this number of them."""
        while len(self._nodes) > number:
            self._cluster.remove_node(self._nodes.pop())
        while len(self._nodes) < number:
            with self._on_core(len(self._nodes)):
                self._nodes.append(self._cluster.add_node(**NODE))

    def close(self) -> None:
        """End the cluster."""
        cluster.shutdown()
        self._cluster.shutdown()

    def cpu_times(self) -> tuple[CpuTimes, CpuTimes]:
        """Return the CPU seconds of each process of the raylets, and of all other processes of this benchmark."""
        raylets, others = CpuTimes(), CpuTimes()
        for core, node in zip(self._cores, self._nodes, strict=False):
            for process in tree(node.all_processes["raylet"][0].process.pid):
                with suppress(psutil.Error):  # the process may just have ended
                    add_time(process, raylets)
                    if process.cpu_affinity() != [core]:
                        raise SystemExit(f"error: {process.name()} is not on the core of its raylet")
        for process in tree(os.getpid()):
            with suppress(psutil.Error):
                add_time(process, others)
        return raylets, {process: seconds for process, seconds in others.items() if process not in raylets}


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all processes below it."""
    top = psutil.Process(pid)
    return [top, *top.children(recursive=True)]


def add_time(process: psutil.Process, found: CpuTimes) -> None:
    """Add the CPU seconds of a process."""
    found[process.pid, process.create_time()] = sum(process.cpu_times()[:2])


def spent(before: CpuTimes, after: CpuTimes) -> float:
    """Return the CPU seconds between two times, of the processes that have not ended."""
    return sum(seconds - before.get(process, 0.0) for process, seconds in after.items())


def release(pid: int, cores: set[int]) -> None:
    """Let all threads of a process run on these cores."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


class Bench:
    """The cluster and the files of all runs.

    Args:
        folder: a new folder.
        work: share of the usual rows.
    """

    def __init__(self, folder: Path, work: float) -> None:
        self.folder, self._work = folder, work
        self.faces = folder / "faces"
        synthesize(str(self.faces), self.share(FACES), FACES_PX)
        self.settings = Settings(workspace=folder / "workspace")
        cluster.POLL_S = POLL_S  # A step of training is seen when it ends.
        self.raylets = Raylets(self.settings)
        self.sketches = sorted((self.faces / "train" / "sketch").iterdir())
        self.reference = min((self.faces / "val" / "reference").iterdir())
        self.endless_sketches = itertools.cycle(self.sketches)
        """Drawings for clients, each one after all others."""
        self._names = itertools.count()

    def share(self, usual: int) -> int:
        """Return this benchmark's share of a usual number of rows."""
        return max(10, round(self._work * usual))

    def new_name(self) -> str:
        """Return a name that no other run has."""
        return f"run-{next(self._names)}"

    def middle(self, total: int, count: Callable[[], int], run: Callable[[], object]) -> Middle:
        """Run something that makes `total` rows and measure its middle; `count` returns the rows that are done."""
        marks: list[tuple[int, float, tuple[CpuTimes, CpuTimes]]] = []
        over = threading.Event()

        def sample() -> None:
            for share in (WARM, END):
                while (done := count()) < share * total:
                    if over.wait(POLL_S) and count() < share * total:
                        return
                marks.append((done, time.monotonic(), self.raylets.cpu_times()))

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            run()
        finally:
            over.set()
            thread.join()
        if len(marks) < 2:
            raise SystemExit("error: a run ended before its rows were counted; use a larger --work")
        (first, since, before), (last, until, after) = marks
        return Middle(last - first, until - since, *map(spent, before, after))

    @functools.cached_property
    def url(self) -> str:
        """Address of the application, which is started at the first use."""
        config = ServeConfig(
            model="starter",
            workspace=self.settings.workspace,
            max_replicas=2,
            engine_cpus=ENGINE_CPUS,
            engine_gpus=0,
            num_threads=1,
            upscale_delay_s=1,
            downscale_delay_s=600,
        )
        return start(config, port=free_port())

    def close(self) -> None:
        """Stop the application and the cluster."""
        serve.shutdown()
        self.raylets.close()


def ingest(bench: Bench, _: int) -> Middle:
    """Measure `data ingest`."""
    job = prepare(str(bench.faces), str(bench.folder / bench.new_name()), FACES_PX)
    files = [0]

    def progress(done: int, *_: int) -> None:
        files[0] = done

    run = functools.partial(replace(job, part_rows=PART_ROWS).run, progress)
    return bench.middle(bench.share(FACES), lambda: files[0] // ROW_FILES, run)


def training(bench: Bench, raylets: int) -> Middle:
    """Measure `train`."""
    data, steps = str(bench.folder / "dataset"), bench.share(STEPS)
    prepare(str(bench.faces), data, TRAIN_PX).run()
    values = {"data": data, "name": bench.new_name(), "num_workers": raylets, "max_steps": steps}
    fixed = {"max_minutes": "null", "log_every": 1, "num_samples": 0}
    config = load_recipe("phase1", [f"{key}={value}" for key, value in (values | fixed).items()])
    progress = [TrainProgress()]

    def report(now: TrainProgress) -> None:
        progress[0] = now

    run = functools.partial(train, bench.settings, config, report)
    return bench.middle(steps * config.batch_size, lambda: progress[0].step * config.batch_size, run)


def colorize(bench: Bench, _: int) -> Middle:
    """Measure `colorize --on-cluster`."""
    out, sketches = bench.folder / bench.new_name(), bench.sketches[: bench.share(DRAWINGS)]
    references = References((str(bench.reference),))
    drawings = list_drawings(list(map(str, sketches)), str(out), "png", references)[0]

    def run() -> None:
        rendering = RenderOptions(style="painted")
        for outcome in color_on_cluster(bench.settings, "starter", drawings, SamplerOptions(), rendering, "png", print):
            if outcome.error:
                raise SystemExit(f"error: {outcome.error}")

    return bench.middle(len(drawings), lambda: count_pictures(out), run)


class Clients:
    """Clients that each send the next drawing as soon as they have the last picture."""

    def __init__(self, url: str, sketches: Iterator[Path], reference: Path) -> None:
        self._url, self._sketches, self._reference = url, sketches, reference.read_bytes()
        self.answers = Counter[int]()
        """Responses by status."""
        self._stop = threading.Event()

    def _send(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120, trust_env=False) as client:
            while not self._stop.is_set():
                files = {"sketch": next(self._sketches).read_bytes(), "reference": self._reference}
                answer = client.post("/v1/colorize", files=files, data={"style": "painted"})
                self.answers[answer.status_code] += 1
                if answer.status_code == 429:
                    self._stop.wait(float(answer.headers["retry-after"]))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send requests until the end of the block."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            sent = [pool.submit(self._send) for _ in range(CLIENTS)]
            try:
                yield
            finally:
                self._stop.set()
        for one in sent:
            one.result()
        if set(self.answers) - {200, 429}:
            raise SystemExit(f"error: statuses of the answers: {dict(self.answers)}")


def serving(bench: Bench, raylets: int) -> Middle:
    """Measure `serve`: the second engine starts when the second raylet has joined."""
    clients, total = Clients(bench.url, bench.endless_sketches, bench.reference), bench.share(REQUESTS)
    with clients.running(), httpx.Client(base_url=bench.url, timeout=30, trust_env=False) as client:
        wait_for(lambda: engines(client) == raylets, f"{raylets} engines")
        before = clients.answers[200]
        reached = functools.partial(wait_for, lambda: clients.answers[200] - before >= total, f"{total} answers")
        return bench.middle(total, lambda: clients.answers[200] - before, reached)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"error: no {what} in {PATIENCE_S:.0f} s")
        time.sleep(POLL_S)


STAGES: dict[str, tuple[str, str, Callable[[Bench, int], Middle]]] = {
    "ingest": (f"`data ingest`, {ROW_FILES} pictures of {FACES_PX} px a row", "rows", ingest),
    "train": (f"`train phase1`, {TRAIN_PX} px, 32 rows a step", "images", training),
    "colorize": (f"`colorize --on-cluster`, starter model, painted, {FACES_PX} px", "pictures", colorize),
    "serve": (f"`serve`, starter model, painted, {FACES_PX} px", "requests", serving),
}
"""The stages in their order: description, what a row is, and the function that measures it on a number of raylets."""


def sides(rounds: int) -> list[int]:
    """Return the numbers of raylets of all runs of a stage: one, two, two, one, and so on."""
    return [number for turn in range(rounds) for number in ((1, 2), (2, 1))[turn % 2]]


def line(name: str, found: dict[int, list[Middle]]) -> str:
    """Return a line of the table, from the sums over the runs of each side."""
    what, unit, _ = STAGES[name]
    sums = {number: Middle(*map(sum, zip(*runs, strict=True))) for number, runs in found.items()}
    rates = [sums[number].rows / sums[number].seconds for number in (1, 2)]
    cpu = [sums[number].cpu_s / sums[number].rows for number in (1, 2)]
    other = [sums[number].other_cpu_s / sums[number].rows for number in (1, 2)]
    cells = [what, *(f"{rate:.1f} {unit}/s" for rate in rates), f"{rates[1] / rates[0]:.2f}"]
    cells += [" / ".join(f"{seconds:.4f}" for seconds in pair) for pair in (cpu, other)]
    return f"| {' | '.join(cells)} |"


def table(bench: Bench, stages: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield the lines of the table as they are measured."""
    yield "| stage | one raylet | two raylets | ratio | CPU s a row, one / two | other CPU s a row, one / two |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name in stages:
        found: dict[int, list[Middle]] = {1: [], 2: []}
        for number in sides(rounds):
            began = time.monotonic()
            bench.raylets.use(number)
            found[number].append(STAGES[name][2](bench, number))
            print(
                name, number, found[number][-1], f"{time.monotonic() - began:.0f} s in all", file=sys.stderr, flush=True
            )
        yield line(name, found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each stage on each side")
    parser.add_argument("--work", type=float, default=1.0, help="share of the usual rows, steps, drawings and requests")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--out", type=Path, help="also write the table and the method there")
    args = parser.parse_args()
    began = time.monotonic()
    processor = f"{hardware(torch.device('cpu'))}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Ray {ray.__version__}"
    command = f"python benchmarks/raylets.py --rounds {args.rounds} --work {args.work:g}"
    lines = [f"`{command}`, {datetime.date.today()}, {processor}, {versions}.", ""]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory(prefix="raylets-") as folder:
        bench = Bench(Path(folder), args.work)
        try:
            for text in table(bench, [name for name in STAGES if name in args.stages], args.rounds):
                lines.append(text)
                print(text, flush=True)
        finally:
            bench.close()
    lines += ["", f"{args.rounds} runs of each side and stage in {time.monotonic() - began:.0f} s."]
    print("\n".join(lines[-2:]))
    if args.out is not None:
        method = (__doc__ or "").split("\n\n")[2:5]
        args.out.write_text("\n\n".join(["# Growth from one raylet to two", "\n".join(lines), *method]) + "\n")


if __name__ == "__main__":
    main()
