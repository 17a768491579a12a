"""Training and ingest in the process of a test instead of on Ray: the same plans, rows, steps and files."""

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from animediffusion.models.bundle import load_bundle
from animediffusion.models.training.loop import TrainState, fit
from animediffusion.pipelines.data import stream
from animediffusion.pipelines.data.read_order import read_blocks
from animediffusion.pipelines.training.checkpoints import CheckpointWriter
from animediffusion.pipelines.training.plan import RunPlan, plan, write_json
from animediffusion.pipelines.training.recipe import TrainConfig, plain
from animediffusion.pipelines.training.result import write_bundle
from animediffusion.platform.config import Settings


def run_tasks(tasks: Iterable[Callable[[], Any]], note: Callable[[str], None]) -> Iterator[Any]:
    """Do what ingest.run_tasks() does on the cluster."""
    return (task() for task in tasks)


def train(settings: Settings, config: TrainConfig, report: object = None) -> SimpleNamespace:
    """Do what driver.train() does with one worker, without checkpoints on the way; return the bundle."""
    work = plan(settings, config)
    work.folder.mkdir(parents=True, exist_ok=True)
    (work.folder / "config.yaml").write_text(yaml.safe_dump(plain(work.config)))
    torch.manual_seed(config.seed)
    config = work.config
    bundle = config.bundle_config(work.image_size)
    denoiser = bundle.build()
    if work.parent_folder is not None:
        denoiser.start_from(load_bundle(work.parent_folder).denoiser.state_dict())
    state = TrainState(denoiser, config.optimizer, config.max_steps)
    objective = config.objective.build(denoiser, bundle.sampler, config.seed)
    fit(state, objective, batches(work), config.max_steps, lambda _: None, augment=config.augment, seed=config.seed)
    CheckpointWriter(work.checkpoints, 1, print).finish(state.step, lambda: state.save)
    folder, _ = write_bundle(work, state.step, "sdpa", 0.0)
    result = {"steps": state.step}
    write_json(work.folder / "run.json", {"run": work.run, "finished": True, "result": result})
    return SimpleNamespace(bundle=str(folder))


def batches(work: RunPlan) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batches of a run with one worker."""
    config = work.config
    rehearse = None if config.rehearse is None else stream.Rehearsal(config.rehearse, config.rehearse_share)
    source, block_rows = stream._source(config.data, "train", config.seed, 1, rehearse)
    left: dict[str, list[Any]] = {}
    for block in read_blocks(block_rows, 1, (config.max_steps or 0) * config.batch_size):
        table = stream._read(source.shards, source.stream.rows(block)[1]).to_pydict()
        left = {name: [*left.get(name, []), *column] for name, column in table.items()}
        while len(left["id"]) >= config.batch_size:
            rows = stream.decode_rows({name: column[: config.batch_size] for name, column in left.items()})
            left = {name: column[config.batch_size :] for name, column in left.items()}
            yield {name: torch.from_numpy(array) for name, array in rows.items()}
