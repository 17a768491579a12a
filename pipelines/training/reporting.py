"""Reports of a run: metrics to MLflow and Prometheus, and the progress that the driver shows.

Rank 0 reports. The driver polls ProgressActor, which also carries its stop request to the workers.
pipelines/training/worker.py makes the reports, and pipelines/training/driver.py reads them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.metrics import Gauge

if TYPE_CHECKING:
    import torch

    from animediffusion.models.training.loop import Step
    from animediffusion.pipelines.training.checkpoints import CheckpointScore
    from animediffusion.platform.tracking.tracking import Run

GAUGES = {
    "step": "Optimizer steps done.",
    "images_per_s": "Images a second, of all workers together, since the last report.",
    "data_wait": "Share of the time that rank 0 waited for rows, 0 to 1.",
    "loss": "Loss of the last step.",
    "workers": "Workers of the run.",
}
"""Prometheus gauges of a run, and their help texts; the dashboard in infra/grafana shows them."""
PREFIX = "animediffusion_train_"
"""Prefix of a gauge's name; Ray adds `ray_` before it."""
ASK_S = 0.5
"""Rank 0 asks at most this often, in seconds, whether the run should stop."""


@dataclass(frozen=True, slots=True)
class RunAddress:
    """Address of a run in MLflow, with which other processes write to it."""

    tracking_uri: str
    run_id: str
    unsent: Path
    """Folder of the records that MLflow has not received yet."""

    def attach(self, *, system_metrics: bool = False, warn: Callable[[str], None] | None = None) -> Run:
        """Write to the run from this process."""
        from animediffusion.platform.tracking.tracking import Run  # here, because MLflow takes seconds to import

        return Run.attach(self.tracking_uri, self.run_id, system_metrics=system_metrics, unsent=self.unsent, warn=warn)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Metrics of a run at one step."""

    loss: float
    """Loss of the step."""
    grad_norm: float
    """Norm of the step's gradients before clipping."""
    learning_rate: float
    """AdamW's learning rate in the step."""
    images_per_s: float
    """Images per second of all workers together, since the previous metrics."""
    data_wait: float
    """Fraction of the time since the previous metrics that rank 0 waited for rows, 0 to 1."""
    seconds_per_step: float
    """Mean duration of a step since the previous metrics, in seconds."""


@dataclass(frozen=True, slots=True)
class RunFailure:
    """An error that would recur if the run were resumed as it is."""

    reason: str
    advice: str
    """What to change, as an instruction."""


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """State of a run. The defaults are those of a run whose workers have not reported yet."""

    step: int = 0
    """Number of finished steps."""
    max_steps: int | None = None
    """Length of the run in steps; None until a run with a time limit has timed its first steps."""
    elapsed_s: float = 0.0
    """Seconds since rank 0 was ready to train."""
    metrics: StepMetrics | None = None
    device: str = "cpu"
    """Name of rank 0's GPU, or cpu."""
    attention: str = ""
    """Implementation of attention that rank 0 uses: xformers or sdpa."""
    workers: int = 1
    peak_memory_mb: float = 0.0
    """Peak memory of rank 0, on its GPU if it has one, in MB (2**20 bytes)."""
    best_step: int | None = None
    """Step of the checkpoint with the best score; None while no checkpoint has a score."""
    best_score: CheckpointScore | None = None
    worker: str | None = None
    """Id of the actor of the worker that started last; None while none has started."""
    failure: RunFailure | None = None
    warnings: tuple[str, ...] = ()
    """Lines for the user, oldest first."""


@ray.remote(num_cpus=0)
class ProgressActor:
    """Actor that carries progress from the workers to the driver, and the driver's stop request to rank 0."""

    def __init__(self) -> None:
        self._latest = TrainProgress()
        self._stop = False

    def start(self, worker: str) -> RunFailure | None:
        """Record that a worker starts, by the id of its actor.

        Return the failure of an earlier attempt if it would recur, else None.
        """
        self._latest = replace(self._latest, worker=worker)
        return self._latest.failure

    def report(self, now: TrainProgress) -> None:
        """Store rank 0's progress.

        The actor keeps `worker`, `failure` and `warnings`, and the old metrics if `now` has none.
        """
        kept = self._latest
        self._latest = replace(
            now,
            metrics=now.metrics or kept.metrics,
            worker=kept.worker,
            failure=kept.failure,
            warnings=kept.warnings,
        )

    def fail(self, failure: RunFailure) -> None:
        """Store an error that would recur."""
        self._latest = replace(self._latest, failure=failure)

    def warn(self, line: str) -> None:
        """Add a line to the warnings that the user sees."""
        self._latest = replace(self._latest, warnings=(*self._latest.warnings, line))

    def latest(self) -> TrainProgress:
        """Return the state of the run."""
        return self._latest

    def stop(self) -> None:
        """Ask the run to save a checkpoint and end."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Return whether the driver asked the run to end."""
        return self._stop


class DriverReports:
    """Rank 0's connection to ProgressActor; only flush() waits for the actor.

    Args:
        actor: handle of a ProgressActor.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._sent: Any = None
        self._question: Any = None
        self._asked_at = float("-inf")
        self._stop = False

    def send(self, now: TrainProgress) -> None:
        """Send the state of the run."""
        self._sent = self._actor.report.remote(now)

    def ask(self) -> None:
        """Ask whether the run should stop, at most every ASK_S, and take the answer to the previous question."""
        if time.monotonic() - self._asked_at >= ASK_S and not self.stop_requested() and self._question is None:
            self._question, self._asked_at = self._actor.stop_requested.remote(), time.monotonic()

    def stop_requested(self) -> bool:
        """Return whether an answer that has arrived asks the run to stop."""
        if self._question is not None and ray.wait([self._question], timeout=0)[0]:
            self._stop, self._question = ray.get(self._question), None
        return self._stop

    def flush(self) -> None:
        """Wait until the actor has received everything."""
        ray.get(self._sent)


class RunGauges:
    """Prometheus gauges of one run, exported through Ray; a cluster that exports no metrics discards them.

    Args:
        run: name of the run, the tag `run` of each gauge.
    """

    def __init__(self, run: str) -> None:
        self._gauges = {name: Gauge(PREFIX + name, text, tag_keys=("run",)) for name, text in GAUGES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def set(self, step: int, workers: int, metrics: StepMetrics) -> None:
        """Set all gauges."""
        values = {**asdict(metrics), "step": step, "workers": workers}
        for name, gauge in self._gauges.items():
            gauge.set(float(values[name]))


class MetricsReporter:
    """Sends the metrics of a run to MLflow and Prometheus, every few steps.

    Args:
        run: run in MLflow.
        gauges: gauges for Prometheus.
        batch_size: rows of a step, of all workers together.
        workers: number of workers.
        every: number of steps from one report to the next.
        first_step: number of steps that were finished before this process.
        device: device of the losses.
    """

    def __init__(
        self,
        run: Run,
        gauges: RunGauges,
        *,
        batch_size: int,
        workers: int,
        every: int,
        first_step: int,
        device: torch.device,
    ) -> None:
        # Here, because ProgressActor does not need torch, which takes seconds to import.
        import torch

        from animediffusion.models.training.objective import NUM_BINS

        self._run, self._gauges = run, gauges
        self._batch_size, self._workers, self._every = batch_size, workers, every
        self._last = (first_step, time.monotonic(), 0.0)
        self._bins, self._counts = torch.zeros(2, NUM_BINS, device=device)
        self.latest: StepMetrics | None = None
        """Metrics of the last report."""

    def step(self, step: Step, waited_s: float) -> bool:
        """Take the results of a step, and return whether they were reported.

        Args:
            step: results of the step.
            waited_s: seconds that this rank has waited for rows, since it started.
        """
        # Add up on the device: reading the values here would wait for the GPU in each step.
        self._bins += step.loss.bins
        self._counts += step.loss.counts
        if step.step % self._every:
            return False
        self.latest = self._metrics(step, waited_s)
        self._run.log({**asdict(self.latest), **self._loss_by_noise()}, step.step)
        self._gauges.set(step.step, self._workers, self.latest)
        return True

    def _metrics(self, step: Step, waited_s: float) -> StepMetrics:
        now = time.monotonic()
        last_step, since, waited_before_s = self._last
        seconds, steps = max(now - since, 1e-6), step.step - last_step
        self._last = (step.step, now, waited_s)
        return StepMetrics(
            loss=float(step.loss.total),
            grad_norm=float(step.grad_norm),
            learning_rate=step.learning_rate,
            images_per_s=steps * self._batch_size / seconds,
            data_wait=(waited_s - waited_before_s) / seconds,
            seconds_per_step=seconds / max(1, steps),
        )

    def _loss_by_noise(self) -> dict[str, float]:
        """Return the mean loss since the last report in each bin of noise levels that had rows."""
        means = enumerate(zip(self._bins.tolist(), self._counts.tolist(), strict=True))
        by_level = {f"loss_by_noise/{i}": total / count for i, (total, count) in means if count}
        self._bins.zero_()
        self._counts.zero_()
        return by_level
