"""The configuration of a training run: a recipe (YAML) with overrides, and the run name derived from it.

pipelines/training/driver.py runs a recipe.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from animediffusion.models.augmentation.augment import AugmentConfig
from animediffusion.models.bundle import BundleConfig, SamplerDefaults
from animediffusion.models.diffusion.denoiser import Prediction
from animediffusion.models.diffusion.path import PathConfig
from animediffusion.models.network.unet import UNetConfig
from animediffusion.models.training.loop import OptimizerConfig
from animediffusion.models.training.objective import ObjectiveConfig
from animediffusion.platform.config import Config, read_yaml
from animediffusion.platform.errors import ConfigError

Values = dict[str, Any]
"""Settings as a recipe's YAML holds them: plain values, lists and dictionaries."""
CONFIGS = Path(__file__).parents[1] / "configs"

BUDGET = frozenset({"max_steps", "max_minutes"})
"""Keys of the budget; exactly one of them is set."""

NOT_IDENTITY = frozenset(
    {"name", *BUDGET, "num_workers", "use_gpu", "cpus_per_worker", "storage", "attention", "compile"}
    | {"log_every", "checkpoint_every", "keep_checkpoints", "num_samples", "max_failures", "bundle"}
)
"""Keys (budget, workers, addresses, logging, ...) that may change when the same run continues."""
LATER_KEYS: dict[str, Values] = {
    "network": {"hints": False},
    "augment": {"extract": 0.0, "hints": 0.0, "wrong_reference": 0.5, "two_views": 0.0},
}
"""Keys of version 0.2 and their defaults. With these values they are not part of identity(), so that runs that began
without them keep their names."""
MOST_WORKERS = 4096
CPU_WORKERS = 2
"""Most workers without GPUs if the recipe sets no number."""


class TrainConfig(Config):
    """All settings of a training run."""

    recipe: str = Field(min_length=1)
    """Name of the recipe; it becomes the first part of the run's name."""
    data: str
    """URI of a dataset."""
    rehearse: str | None = None
    """URI of a second dataset, of which every batch also has rows, so that a fine-tuned model does not forget what it
    learned before."""
    rehearse_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of these rows in a batch."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run; if None, RECIPE-XXXXXXXX with the first 8 hex digits of fingerprint()."""
    init_from: str | None = None
    """Model (a bundle or a registered version) whose weights, network and path the run starts from."""
    image_size: int | None = Field(default=None, gt=0)
    """Side in pixels; it must equal the dataset's size, and None means that size."""
    seed: int = Field(default=0, ge=0, lt=2**31)

    network: UNetConfig = UNetConfig()
    path: PathConfig = PathConfig()
    prediction: Prediction = "x0"
    clamp: bool = False
    sampler: SamplerDefaults | None = None
    """Sampler settings of the bundle; if None, those of the model in init_from, or the defaults without one."""
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    augment: AugmentConfig = AugmentConfig()

    batch_size: int = Field(default=32, gt=0)
    """Rows per step, over all workers together."""
    max_steps: int | None = Field(default=None, gt=0)
    max_minutes: float | None = Field(default=None, gt=0)
    """Time limit of the training itself, in minutes; it becomes max_steps once the first steps are timed."""

    num_workers: int | tuple[int, int] | None = None
    """Number of workers. If None, the largest number that divides batch_size, at most one per GPU (2 without GPUs).
    If (fewest, most), as many as the cluster has room for, and fewer after a node is lost; batch_size stays."""
    use_gpu: bool | None = None
    """Whether each worker gets a GPU. If None, it does if the cluster has enough GPUs now; with true, the run also
    waits for an autoscaler to add them."""
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPUs per worker. If None, 1 with GPUs and at most 0.5 without, so that half of the CPUs are left for Ray Data."""
    storage: str | None = None
    """URI for the checkpoints, which all nodes must be able to reach; the workspace if None."""
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    compile: bool = False
    """Compile the network with torch.compile: steps get faster after minutes of compiling. It needs a C++ compiler."""
    log_every: int = Field(default=10, gt=0)
    checkpoint_every: int = Field(default=500, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    num_samples: int = Field(default=32, ge=0)
    """Number of val rows on which each checkpoint is scored, and which MLflow shows; 0 disables scoring."""
    bundle: Literal["last", "best"] = "last"
    """Checkpoint that becomes the bundle; `best` is the one with the lowest CIEDE2000 on the cross track."""
    max_failures: int = Field(default=3, ge=-1)
    """Number of worker failures that the run survives; -1 means no limit. A preemption with a notice does not count."""

    @model_validator(mode="after")
    def _check_budget_and_workers(self) -> TrainConfig:
        if (self.max_steps is None) == (self.max_minutes is None):
            raise ValueError("set either max_steps or max_minutes")
        fewest, most = self.workers_on(0)
        if not 1 <= fewest <= most <= MOST_WORKERS:
            raise ValueError(f"num_workers must be 1 to {MOST_WORKERS}, or (fewest, most), got {self.num_workers}")
        for number in range(fewest, most + 1):
            if self.batch_size % number:
                raise ValueError(f"batch_size {self.batch_size} must be a multiple of num_workers {number}")
        return self

    def workers_on(self, gpus: int) -> tuple[int, int]:
        """Return the fewest and the most workers for this many GPUs (0 means CPUs only).

        The two are equal if the number of workers is fixed.
        """
        if isinstance(self.num_workers, tuple):
            return self.num_workers
        if self.num_workers is not None:
            return self.num_workers, self.num_workers
        most = min(gpus or CPU_WORKERS, self.batch_size, MOST_WORKERS)
        number = next(number for number in range(most, 0, -1) if self.batch_size % number == 0)
        return number, number

    def rows_per_worker(self, workers: int) -> int:
        """Return the number of rows in a worker's part of a batch."""
        return self.batch_size // workers

    @property
    def run_name(self) -> str:
        """`name` if set, else RECIPE-XXXXXXXX with the first 8 hex digits of fingerprint()."""
        return self.name or f"{self.recipe}-{self.fingerprint()[:8]}"

    def identity(self) -> Values:
        """Return the settings that decide what is learned, as plain values."""
        values: Values = self.model_dump(mode="json")
        if self.rehearse is None:  # a key of version 0.2, as in LATER_KEYS
            values = {key: value for key, value in values.items() if not key.startswith("rehearse")}
        for part, defaults in LATER_KEYS.items():
            values[part] = {k: v for k, v in values[part].items() if k not in defaults or v != defaults[k]}
        return {key: value for key, value in values.items() if key not in NOT_IDENTITY}

    def fingerprint(self) -> str:
        """Return the sha256 of identity(), 64 hex digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def bundle_config(self, image_size: int) -> BundleConfig:
        """Return the configuration of the bundle that this run produces."""
        sampler = self.sampler or SamplerDefaults()
        return BundleConfig(
            network=self.network,
            path=self.path,
            prediction=self.prediction,
            clamp=self.clamp,
            image_size=image_size,
            sampler=sampler,
        )

    def started_from(self, parent: BundleConfig) -> TrainConfig:
        """Return this config with the network, path, prediction and clamp of `parent`, and its sampler unless set.

        The network also gets the hints of this config; their weights start at zero if `parent` has none.
        """
        network = replace(parent.network, hints=parent.network.hints or self.network.hints)
        values = {"network": network, "path": parent.path, "prediction": parent.prediction}
        return self.model_copy(update={**values, "clamp": parent.clamp, "sampler": self.sampler or parent.sampler})


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load a recipe by name or YAML file and apply key=value overrides.

    A YAML recipe may name another recipe as `base`; it then overrides values of that recipe.

    Raises:
        ConfigError: unknown recipe or key, or a value out of range.
    """
    values = _with_base(read_yaml(_find(recipe)))
    if BUDGET & {o.partition("=")[0] for o in overrides}:
        # A budget on the command line replaces the recipe's, also if one is in steps and the other in minutes.
        values = {key: value for key, value in values.items() if key not in BUDGET}
    values.setdefault("recipe", Path(recipe).stem)
    return TrainConfig.load(None, overrides, **values)


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def changed_keys(old: Values, new: Values, prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ between two nested dictionaries."""
    changed: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            changed.append(f"{prefix}{key}")
    return changed


def plain(config: TrainConfig) -> Values:
    """Return all settings as JSON values, for config.yaml and MLflow."""
    return config.model_dump(mode="json")


def _find(recipe: str) -> Path:
    if recipe.endswith((".yaml", ".yml")):
        return Path(recipe)
    path = CONFIGS / f"{recipe}.yaml"
    if not path.is_file():
        names = recipe_names()
        close = difflib.get_close_matches(recipe, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"recipe {recipe!r}", "unknown", f"{hint}one of {', '.join(names)}, or a YAML file")
    return path


def _with_base(values: Values, above: tuple[Path, ...] = ()) -> Values:
    base = values.pop("base", None)
    if base is None:
        return values
    file = _find(str(base))
    if file in above:
        raise ConfigError("base", f"recipe {base!r} is based on itself", "name another recipe, or omit base")
    inherited = _with_base(read_yaml(file), (*above, file))
    # The run is named after this recipe, not after its base. A budget here replaces the base's, in either unit.
    dropped = {"recipe", *(BUDGET if BUDGET & values.keys() else ())}
    return _merge({key: value for key, value in inherited.items() if key not in dropped}, values)


def _merge(base: Values, changes: Values) -> Values:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged
