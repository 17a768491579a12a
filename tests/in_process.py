"""Training and ingest in the process of a test instead of on Ray: the same plans, rows, steps and files."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from animediffusion.models.bundle import load_bundle
from animediffusion.models.training.loop import Step, TrainState, fit
from animediffusion.pipelines.data import stream
from animediffusion.pipelines.data.read_order import read_blocks
from animediffusion.pipelines.training.checkpoints import CheckpointWriter, fetch
from animediffusion.pipelines.training.plan import RunPlan, plan, write_json
from animediffusion.pipelines.training.recipe import TrainConfig, plain
from animediffusion.pipelines.training.result import write_bundle
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import Interrupted


def run_tasks(tasks: Iterable[Callable[[], Any]], note: Callable[[str], None]) -> Iterator[Any]:
    """Do what ingest.run_tasks() does on the cluster."""
    return (task() for task in tasks)


def train(
    settings: Settings, config: TrainConfig, report: Callable[[Step], object] = lambda _: None
) -> SimpleNamespace:
    """Do what driver.train() does with one worker; return the bundle. Interrupted from `report` stops the run."""
    work = plan(settings, config)
    if work.finished:
        return SimpleNamespace(bundle=str(work.folder / "bundle"))
    work.folder.mkdir(parents=True, exist_ok=True)
    config = work.config
    (work.folder / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    torch.manual_seed(config.seed)
    bundle = config.bundle_config(work.image_size)
    denoiser = bundle.build()
    if work.parent_folder is not None:
        denoiser.start_from(load_bundle(work.parent_folder).denoiser.state_dict())
    state = TrainState(denoiser, config.optimizer, config.max_steps)
    if work.start_step:
        with tempfile.TemporaryDirectory() as folder:
            fetch(work.checkpoints, work.start_step, Path(folder, "state"))
            state.restore(Path(folder, "state"))
    objective = config.objective.build(denoiser, bundle.sampler, config.seed)
    stopped: list[Interrupted] = []

    def on_step(step: Step) -> bool:
        try:
            report(step)
        except Interrupted as error:
            stopped.append(error)
        return bool(stopped)

    fit(state, objective, batches(work), config.max_steps, on_step, augment=config.augment, seed=config.seed)
    CheckpointWriter(work.checkpoints, 1, print).finish(state.step, lambda: state.save)
    if stopped:
        raise stopped[0]
    folder, _ = write_bundle(work, state.step, "sdpa", 0.0)
    result = {"steps": state.step}
    write_json(work.folder / "run.json", {"run": work.run, "finished": True, "result": result})
    return SimpleNamespace(bundle=str(folder))


def batches(work: RunPlan) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batches that a run with one worker has not read yet."""
    config = work.config
    rehearse = None if config.rehearse is None else stream.Rehearsal(config.rehearse, config.rehearse_share)
    source, block_rows = stream.open_source(config.data, "train", config.seed, 1, rehearse)
    left: dict[str, list[Any]] = {}
    start = work.start_step * config.batch_size
    for block in read_blocks(block_rows, 1, (config.max_steps or 0) * config.batch_size - start, start):
        table = stream.read_in_order(source.shards, source.stream.rows(block)[1]).to_pydict()
        left = {name: [*left.get(name, []), *column] for name, column in table.items()}
        while len(left["id"]) >= config.batch_size:
            rows = stream.decode_rows({name: column[: config.batch_size] for name, column in left.items()})
            left = {name: column[config.batch_size :] for name, column in left.items()}
            yield {name: torch.from_numpy(array) for name, array in rows.items()}
