"""The plan of a run: its resolved config, name, folder, parent and the step at which it starts or resumes.

    work = plan(settings, load_recipe("demo", ["data=workspace/data/faces"]))
    print(work.run, work.start_step, work.finished)

pipelines/training/driver.py carries the plan out.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from animediffusion.models.bundle import BundleConfig, load_bundle
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.training.checkpoints import latest_step
from animediffusion.pipelines.training.recipe import TrainConfig, changed_keys, plain
from animediffusion.platform.config import Settings, read_yaml
from animediffusion.platform.errors import ConfigError
from animediffusion.platform.storage import storage


@dataclass(frozen=True)
class RunPlan:
    """Everything about a run that is decided before training begins."""

    config: TrainConfig
    run: str
    folder: Path
    storage: str
    """URI of the folder that holds `checkpoints`."""
    image_size: int
    data_hash: str
    rehearse_hash: str | None
    """content_hash of the dataset `rehearse`; None without one."""
    start_step: int
    finished: bool
    parent: BundleConfig | None
    parent_folder: Path | None

    @property
    def checkpoints(self) -> str:
        """URI of the folder with the checkpoints."""
        return storage.join(self.storage, "checkpoints")


def plan(settings: Settings, config: TrainConfig) -> RunPlan:
    """Resolve a config against its data, its parent model and an existing run folder. This writes nothing.

    Raises:
        ConfigError: a run of that name has another config, image_size differs from the data's, or the parts of the
            config do not fit each other.
        DataError, RegistryError, StorageError: data or parent cannot be found.
    """
    manifest = Manifest.load(config.data)
    manifest.split("train")
    size = config.image_size or manifest.image_size
    rehearsed = _rehearsed(config)
    for uri, dataset in ((config.data, manifest), (config.rehearse, rehearsed)):
        if dataset is not None and size != dataset.image_size:
            raise ConfigError("image_size", str(size), f"the data in {uri} is {dataset.image_size} px")
    attention = settings.attention if config.attention == "auto" else config.attention
    config = config.model_copy(update={**_absolute(config), "attention": attention})
    parent = parent_folder = None
    if config.init_from is not None:
        from animediffusion.platform.registry.client import Registry  # here, because MLflow takes seconds to import

        parent_folder = Registry(settings).fetch(config.init_from)
        parent = load_bundle(parent_folder).config
        config = config.started_from(parent)
    multiple = config.network.size_multiple
    if size % multiple:
        raise ConfigError("image_size", str(size), f"this network needs a multiple of {multiple}")
    _require_fit(config, size)
    name = _name_before_a_move(settings.workspace, config) or config.run_name
    folder = settings.workspace / "runs" / name
    place = storage.join(config.storage, name) if config.storage else str(folder)
    _reject_another(folder, config)
    record = read_json(folder / "run.json")
    finished = bool(record.get("finished")) and _budget_spent(int(record["result"]["steps"]), config)
    start = latest_step(storage.join(place, "checkpoints"))
    return RunPlan(
        config=config,
        run=name,
        folder=folder,
        storage=place,
        image_size=size,
        data_hash=manifest.content_hash,
        rehearse_hash=None if rehearsed is None else rehearsed.content_hash,
        start_step=start,
        finished=finished,
        parent=parent,
        parent_folder=parent_folder,
    )


def _rehearsed(config: TrainConfig) -> Manifest | None:
    """Return the manifest of the dataset `rehearse`, or None without one."""
    if config.rehearse is None:
        return None
    manifest = Manifest.load(config.rehearse)
    manifest.split("train")
    return manifest


def _absolute(config: TrainConfig) -> dict[str, str | None]:
    """Return the addresses of the datasets, which do not depend on the working directory."""
    rehearse = None if config.rehearse is None else storage.absolute(config.rehearse)
    return {"data": storage.absolute(config.data), "rehearse": rehearse}


@dataclass(frozen=True, slots=True)
class RunDescription:
    """What `train --dry-run` prints about a run, except the estimate."""

    work: RunPlan
    num_parameters: int

    @property
    def yaml(self) -> str:
        """The resolved config as a recipe."""
        work, resolved = self.work, yaml.safe_dump(plain(self.work.config), sort_keys=False)
        head = f"# run {work.run}, {self.num_parameters / 1e6:.1f} M parameters, {work.image_size} px"
        return f"{head}\n{resolved}".rstrip()

    def to_json(self) -> Mapping[str, object]:
        """Return the JSON object that `train --dry-run` prints."""
        return {
            "run": self.work.run,
            "run_dir": str(self.work.folder),
            "image_size": self.work.image_size,
            "num_parameters": self.num_parameters,
            "data_hash": self.work.data_hash,
            "resume_step": self.work.start_step,
            "finished": self.work.finished,
            "yaml": self.yaml,
            "config": plain(self.work.config),
        }


def describe(work: RunPlan) -> RunDescription:
    """Describe a run; the model is built on the meta device, which allocates no memory."""
    with torch.device("meta"):
        model = work.config.bundle_config(work.image_size).build()
    return RunDescription(work, sum(parameter.numel() for parameter in model.parameters()))


def _require_fit(config: TrainConfig, size: int) -> None:
    """Raise ConfigError if prediction, path and objective do not fit together, before a cluster is started.

    The model and the objective are built on the meta device, which allocates no memory.
    """
    try:
        with torch.device("meta"):
            bundle = config.bundle_config(size)
            config.objective.build(bundle.build(), bundle.sampler, config.seed)
    except ValueError as error:
        raise ConfigError(f"recipe {config.recipe!r}", str(error), "change path, prediction or objective") from error


def _reject_another(folder: Path, config: TrainConfig) -> None:
    """Raise ConfigError if the folder belongs to a run with other settings."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    # TrainConfig fills in the defaults of settings that are newer than the file.
    old, new = TrainConfig.check(read_yaml(path)).identity(), config.identity()
    for key in ("data", "rehearse"):
        if old.get(key) and new.get(key) and _is_moved(old[key], new[key], folder.parents[1]):
            old[key] = new[key]
    changed = changed_keys(old, new)
    if changed:
        raise ConfigError(
            f"run {folder.name}",
            f"already exists with a different {', '.join(changed)}",
            "choose another name=, or the old values",
        )


def _name_before_a_move(workspace: Path, config: TrainConfig) -> str | None:
    """Return the name of a run with this config that began before its workspace moved; None if there is none.

    A name that is not given contains a hash of the config, and so of the data's former path.
    """
    runs, new = workspace / "runs", config.identity()
    if config.name is not None or (runs / config.run_name).exists():
        return None
    for path in sorted(runs.glob(f"{glob.escape(config.recipe)}-*/config.yaml")):
        with suppress(ConfigError):  # the config of another version of this package may be invalid here
            old = TrainConfig.check(read_yaml(path))
            gone = old.data == new["data"] or not Path(old.data).exists()
            moved = gone and _is_moved(old.data, new["data"], workspace)
            if moved and old.name is None and old.identity() == {**new, "data": old.data}:
                return path.parent.name
    return None


def _is_moved(old: str, new: str, workspace: Path) -> bool:
    """Return whether `old` and `new` are one data folder inside a workspace that was moved in between."""
    if storage.is_remote(old) or not Path(new).is_relative_to(workspace):
        return False
    inside = Path(new).relative_to(workspace).parts
    return bool(inside) and Path(old).parts[-len(inside) :] == inside


def _budget_spent(steps: int, config: TrainConfig) -> bool:
    """Return whether a run that has finished after `steps` is done: it continues only if max_steps was raised."""
    return config.max_steps is None or steps >= config.max_steps


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; the result is empty if the file does not exist."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object atomically (temporary file, then rename)."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.rename(path)
