"""Evaluate a model and store the metrics with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from animediffusion.models.bundle import with_metrics
from animediffusion.pipelines.evaluation.evaluate import Evaluation, evaluate
from animediffusion.pipelines.release.release import record_evaluation
from animediffusion.platform.config import Settings


def evaluate_and_record(
    settings: Settings,
    model: str,
    data: str,
    split: str = "val",
    limit: int | None = None,
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    on_cluster: bool = False,
) -> Evaluation:
    """Evaluate a model and store the result in the bundle folder's metrics.json or with the registered version.

    The arguments, the result and the errors are those of evaluate(). A result for another URI is not stored.
    """
    result = evaluate(settings, model, data, split, limit, out, progress, on_cluster=on_cluster)
    if record_evaluation(settings, model, result.to_json()) is None and "://" not in model:
        with_metrics(Path(model), result.to_json())
    return result
