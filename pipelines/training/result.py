"""What a run leaves: a bundle with its model card, and the summary that `train` prints."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from animediffusion.models.bundle import identity, save_bundle
from animediffusion.models.training.ema import pack
from animediffusion.models.training.loop import averaged_weights, kept_averages
from animediffusion.pipelines.training.checkpoints import CheckpointScore, fetch, retry_outage
from animediffusion.pipelines.training.model_card import model_card
from animediffusion.pipelines.training.plan import RunPlan


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Summary of a finished run; the field order is that of its JSON."""

    run: str
    run_dir: str
    bundle: str
    """Folder of the bundle."""
    steps: int
    resumed_from: int | None
    """Step at which the last invocation resumed; None if it started from the beginning."""
    seconds: float
    """Duration of the last invocation."""
    images_per_s: float
    """Speed of all workers together in the last steps."""
    num_parameters: int
    device: str
    attention: str
    mlflow_run_id: str
    metrics: dict[str, float]
    """The last loss, grad_norm and data_wait (StepMetrics); empty if the run ended before its first report."""
    scores: dict[int, CheckpointScore]
    """Scores of the checkpoints that were kept, by step."""
    best_step: int | None
    bundle_step: int
    """Step of the checkpoint that became the bundle."""
    num_workers: int
    peak_memory_mb: float

    def to_json(self) -> Mapping[str, object]:
        """Return the JSON object that `train` prints, which is also in run.json."""
        return {**asdict(self), "scores": {str(step): asdict(score) for step, score in self.scores.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the result from to_json(), also of an earlier version that had fewer fields."""
        added = {
            "scores": {},
            "best_step": None,
            "bundle_step": value["steps"],
            "num_workers": 1,
            "peak_memory_mb": 0.0,
        }
        values = {**added, **value}
        scores = {int(step): CheckpointScore(**score) for step, score in values["scores"].items()}
        return cls(**{**values, "scores": scores})


def _rehearsal(work: RunPlan) -> dict[str, str | float | None]:
    """Return the provenance of the rehearsed rows; empty without such rows, so that other bundles stay the same."""
    if work.config.rehearse is None:
        return {}
    share = work.config.rehearse_share
    return {"rehearse": work.config.rehearse, "rehearse_hash": work.rehearse_hash, "rehearse_share": share}


def write_bundle(work: RunPlan, step: int, attention: str, seconds: float) -> tuple[Path, int]:
    """Write the bundle of a run, and return its folder and the number of parameters.

    Args:
        work: plan of the run.
        step: step of the checkpoint that becomes the bundle.
        attention: implementation of attention that the run used.
        seconds: duration of the run.
    """
    config = work.config
    bundle_config = config.bundle_config(work.image_size)
    denoiser = bundle_config.build()
    with tempfile.TemporaryDirectory() as folder:
        retry_outage(lambda: fetch(work.checkpoints, step, Path(folder)))
        denoiser.load_state_dict(averaged_weights(Path(folder)))
        averages = pack(kept_averages(Path(folder), config.optimizer.ema_lengths))
    provenance: dict[str, str | int | float | None] = {
        "run": work.run,
        "recipe": config.recipe,
        "objective": config.objective.name,
        "steps": step,
        "batch_size": config.batch_size,
        "attention": attention,
        "data": config.data,
        "data_hash": work.data_hash,
        **_rehearsal(work),
        "parent": None if work.parent_folder is None else identity(work.parent_folder),
    }
    bundle_config = replace(bundle_config, provenance=provenance)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    # The full duration of a resumed run is unknown. The provenance has no duration: equal runs must give equal bundles.
    card = model_card(bundle_config, parameters, None if work.start_step else seconds)
    folder_path = work.folder / "bundle"
    save_bundle(folder_path, denoiser.eval(), bundle_config, {}, card, averages=averages)
    return folder_path, parameters
