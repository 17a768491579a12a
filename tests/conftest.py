"""Fixtures that many tests share: an S3 server, a Ray cluster with two CPUs, a checkpoint of the authors' code.

Fixtures import what takes long, because the process that hands out the tests reads this file, too, and runs no fixture.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import resource
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from faults import FaultyStore
from head import Head, ray_head

if TYPE_CHECKING:
    import torch

# Set before anything imports torch, which reads it once. With a thread per core in each process, threads
# wait for each other: a training step of a small network takes ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"

# Examples have no deadline, because a busy machine may be slow.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

MOST_CPU_S = 10.0
"""CPU seconds that a test may take which is not marked as slow: twice the 5 s that are meant, for slower machines."""
TESTS = Path(__file__).parent
SHARED = {"ray_cluster": "ray", "cluster_head": "head"}
"""Fixtures that only one process should start, and the groups of the tests that use them."""
_MAY_LEAK = {"ray", "browser", "slow"}
"""Marks of tests with Ray or other programs, whose clients leave sockets and processes to the garbage collector."""
LONGEST = (
    "ray",
    "head",
    "infra/test_live.py",
    "pipelines/test_cluster_faults.py",
    "test_demo.py",
)
"""Groups of tests that take minutes, the longest first."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make groups of tests, each of which runs in one process, in the order in which they should begin.

    The tests that use a fixture of SHARED are one group. The tests of a file are a group otherwise, because they share
    fixtures. The longest groups begin first, then those with slow tests; the short ones then balance the processes.
    """
    groups, slow = {}, set()
    for item in items:
        shared = SHARED.keys() & set(item.fixturenames)  # type: ignore[attr-defined]
        group = SHARED[min(shared)] if shared else item.path.relative_to(TESTS).as_posix()
        if shared:
            item.add_marker(pytest.mark.ray)
        if not _may_leak(item):
            # The garbage collector finds an unclosed file in whatever code runs then, and pytest warns of its warning.
            item.add_marker(pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"))
            item.add_marker(pytest.mark.filterwarnings("error::ResourceWarning"))
        item.add_marker(pytest.mark.xdist_group(group))
        groups[item] = group
        if {"browser", "slow"} & {mark.name for mark in item.iter_markers()}:
            slow.add(group)

    def rank(item: pytest.Item) -> int:
        group = groups[item]
        return LONGEST.index(group) if group in LONGEST else len(LONGEST) + (group not in slow)

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Exclude the imported modules from garbage collections, each of which would take half a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Collect the garbage of the last test that may leak, so that its warnings do not end the next test."""
    if nextitem is not None and _may_leak(item) and not _may_leak(nextitem):
        gc.collect()


def _may_leak(item: pytest.Item) -> bool:
    return bool(_MAY_LEAK & {mark.name for mark in item.iter_markers()})


def _cpu_seconds() -> float:
    """CPU seconds of this process and of the child processes that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Record the CPU seconds of a test, which say the same on a busy machine."""
    before = _cpu_seconds()
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu_seconds", _cpu_seconds() - before))


def _not_marked(terminal: pytest.TerminalReporter) -> dict[str, float]:
    """CPU seconds of the tests that should be marked as slow."""
    calls = [report for report in terminal.getreports("passed") if report.when == "call"]
    unmarked = [report for report in calls if not {"slow", "ray", "browser"} & set(report.keywords)]
    seconds = {report.nodeid: dict(report.user_properties).get("cpu_seconds", 0.0) for report in unmarked}
    return {name: value for name, value in seconds.items() if value > MOST_CPU_S}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the tests that should be marked as slow."""
    for name, seconds in _not_marked(terminalreporter).items():
        terminalreporter.write_line(f"{name} took {seconds:.0f} CPU seconds; mark it as slow", red=True)


@pytest.fixture(scope="session", autouse=True)
def _quiet_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests from reading or writing the user's home, and Ray from what tests do not need."""
    values = {
        "HOME": str(tmp_path_factory.mktemp("home")),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "animediffusion.serve.proxy:middlewares",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        # As in an embedded cluster; pipelines/cluster_faults.py has several nodes and turns it on.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS / "startup"), os.environ.get("PYTHONPATH")])),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session", autouse=True)
def _copied_databases() -> Iterator[None]:
    """Give each new workspace of this process a copy of one MLflow database."""
    import databases

    from animediffusion.platform.tracking import embedded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "one_creator", databases.create_copy)
        yield


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """URL of an S3 server on loopback with the bucket `bucket`; the AWS variables point to it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield url
    server.stop()


@pytest.fixture
def faulty_s3(moto_server: str) -> Iterator[tuple[str, FaultyStore]]:
    """URL of a proxy to the S3 server that fails on command, and the proxy itself (faults.py).

    Use the URL in a URI or in the AWS variables.
    """
    with FaultyStore(moto_server) as store:
        yield store.url, store


@pytest.fixture(scope="session")
def ray_cluster(moto_server: str) -> Iterator[None]:
    """One Ray cluster for all tests, with two CPUs; it starts after the S3 server so that workers have the address."""
    import ray

    from animediffusion.platform.cluster import ray_compat

    with pytest.MonkeyPatch.context() as patch, ray_compat.only_needed_processes():
        # Only here: every process of a Ray with metrics sends them to another one, which adds them up in Python.
        patch.setenv("RAY_enable_metrics_collection", "1")
        patch.setenv("RAY_metrics_report_interval_ms", "3000")
        ray.init(address="local", num_cpus=2, log_to_driver=False, object_store_memory=256 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def cluster_head() -> Iterator[Head]:
    """The head of a cluster with two CPUs, with the jobs API and without metrics."""
    with ray_head("--num-cpus=2", RAY_enable_metrics_collection="0") as head:
        yield head


@pytest.fixture(scope="session")
def faces_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 48 + 8 drawn faces at 32 px, with all four pictures."""
    from animediffusion.pipelines.data.manifest import Manifest, Split, write_shard
    from animediffusion.pipelines.data.shards import PICTURES, StoredRow
    from animediffusion.pipelines.synthetic.dataset import make_row
    from animediffusion.platform.images.codec import encode_lossless

    folder = str(tmp_path_factory.mktemp("faces"))
    splits = {}
    for split, indices in (("train", range(48)), ("val", range(100, 108))):
        rows = []
        for index in indices:
            row = make_row(0, index, 32)
            pictures = {name: encode_lossless(getattr(row, name)) for name in PICTURES}
            sha256 = hashlib.sha256(pictures["target"]).hexdigest()
            rows.append(StoredRow(id=f"{split}/{index}", split=split, **pictures, width=32, height=32, sha256=sha256))
        splits[split] = Split(rows=len(rows), shards=(write_shard(folder, split, 0, rows),))
    Manifest(image_size=32, splits=splits, num_files=224, num_rejects=0, source="drawn", content_hash="0" * 64).save(
        folder
    )
    return folder


BASE = 64


def _residual_shapes(width_in: int, width_out: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "time_emb.1": (width_out, 4 * BASE),
        "conv1.0": (width_in,),
        "conv1.2": (width_out, width_in, 3, 3),
        "conv2.0": (width_out,),
        "conv2.3": (width_out, width_out, 3, 3),
    }
    return shapes if width_in == width_out else {**shapes, "skip_connection": (width_out, width_in, 1, 1)}


def _layer_shapes() -> dict[str, tuple[int, ...]]:
    """Weight shapes of a two-level network by their names."""
    wide = 2 * BASE
    residuals = {
        "encoder_block.0": (BASE, BASE),
        "encoder_block.1": (BASE, BASE),
        "encoder_block.3": (BASE, wide),
        "encoder_block.4": (wide, wide),
        "bottom_block.0": (wide, wide),
        "bottom_block.2": (wide, wide),
        "decoder_block.0": (2 * wide, wide),
        "decoder_block.1": (2 * wide, wide),
        "decoder_block.2.0": (wide + BASE, wide),
        "decoder_block.3": (wide + BASE, BASE),
        "decoder_block.4": (2 * BASE, BASE),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "time_embedding.0": (4 * BASE, BASE),
        "time_embedding.2": (4 * BASE, 4 * BASE),
        "input.0": (BASE, 7, 1, 1),
        "bottom_block.1.attention.0": (wide,),
        "bottom_block.1.attention.1": (3 * wide, wide, 1),
        "output.0": (BASE,),
        "output.2": (3, BASE, 1, 1),
    }
    for place, widths in residuals.items():
        shapes |= {f"{place}.{layer}": shape for layer, shape in _residual_shapes(*widths).items()}
    return shapes


@pytest.fixture
def authors_checkpoint() -> dict[str, torch.Tensor]:
    """Random weights with the authors' names: 64 and 128 channels, two blocks per level."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], spread: float) -> torch.Tensor:
        return spread * torch.randn(shape, generator=generator)

    buffers = ("sqrt_reciprocal_gammas", "sqrt_reciprocal_gammas_m1", "posterior_variance", "posterior_log_variance")
    state = {"gammas": torch.cumprod(1 - torch.linspace(1e-6, 1e-2, 1000), 0)}
    state |= {name: torch.zeros(1000) for name in buffers}
    for layer, shape in _layer_shapes().items():
        fan_in = max(1, math.prod(shape[1:]))
        is_norm = len(shape) == 1
        state[f"denoise_fn.{layer}.weight"] = is_norm + draw(shape, 0.2 if is_norm else fan_in**-0.5)
        state[f"denoise_fn.{layer}.bias"] = draw(shape[:1], 0.2)
    return state
