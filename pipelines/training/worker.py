"""The training function of a Ray Train worker: it reads rows and produces steps, checkpoints and metrics.

This file is about processes: DDP, resuming, agreement of the ranks on when to stop, and what rank 0 does for all.
models/training/loop.py has the mathematics of a step, pipelines/training/validation.py saves and scores checkpoints,
and pipelines/training/reporting.py reports.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from animediffusion.models.compile import compiled
from animediffusion.models.device import data_parallel, device_name, peak_memory_mb
from animediffusion.models.network.attention import attention_used, use_attention
from animediffusion.models.numerics import choose_numerics
from animediffusion.models.out_of_memory import is_out_of_memory
from animediffusion.models.training.loop import Step, TrainState, fit
from animediffusion.pipelines.data.decoding import Decode
from animediffusion.pipelines.evaluation.evaluate import SplitRows, Track
from animediffusion.pipelines.training.checkpoints import fetch, fetch_newest, retry_outage
from animediffusion.pipelines.training.recipe import TrainConfig
from animediffusion.pipelines.training.reporting import (
    DriverReports,
    MetricsReporter,
    RunAddress,
    RunFailure,
    RunGauges,
    TrainProgress,
)
from animediffusion.pipelines.training.step_budget import StepBudget
from animediffusion.pipelines.training.trial_report import TrialContext, TrialReporter
from animediffusion.pipelines.training.validation import ScoredCheckpoints, ScoringTask, SharedColorizer
from animediffusion.platform.storage import storage

AGREE_EVERY = 10
"""Steps between two synchronizations of rank 0's decisions to all ranks."""
AHEAD = {"cpu": 2, "cuda": 4}
"""Batches decoded ahead, by kind of device; each batch is decoded in its own thread."""
SCORED_BETWEEN_STEPS = ("cuda",)
"""Kinds of devices on which the ranks color the scoring rows themselves, between two steps."""
NAMED_ROWS = 8
"""Most rows that an error message names."""


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What the driver hands to every worker of a run."""

    config: TrainConfig
    run_name: str
    image_size: int
    """Side of the images in pixels."""
    checkpoints: str
    """URI of the folder with the checkpoints."""
    mlflow: RunAddress
    progress: Any
    """Handle of the run's ProgressActor."""
    init_weights: ray.ObjectRef[dict[str, Tensor]] | None = None
    """Weights to start from; random weights if None."""
    samples: SplitRows | None = field(default=None, repr=False)
    """Rows of val on which checkpoints are scored; None if they are not scored."""
    trial: TrialContext | None = None
    """Set if the run is a trial of a search."""

    def warn(self, line: str) -> None:
        """Show a warning to the user."""
        self.progress.warn.remote(line)

    def fail(self, reason: str, advice: str) -> None:
        """Report to the driver an error that would recur; workers that Ray restarts then return immediately."""
        ray.get(self.progress.fail.remote(RunFailure(reason, advice)))


def train_worker(config: Mapping[str, ray.ObjectRef[WorkerContext]]) -> None:
    """Run one rank: resume from the newest undamaged checkpoint, or start from `init_weights` or random weights.

    Args:
        config: a reference to the WorkerContext as `context`; Ray Train passes only dictionaries.
    """
    context = ray.get(config["context"])
    if ray.get(context.progress.start.remote(ray.get_runtime_context().get_actor_id())) is not None:
        return  # Ray restarted the workers after an error that would recur
    try:
        use_attention(context.config.attention)
    except ValueError as error:
        context.fail(str(error), "set attention=auto")
        raise
    rank = None
    try:
        rank = Rank(context)
        rank.run()
    except ray.exceptions.RayError:
        raise  # the error of another process
    except Exception as error:
        # A search counts the trial as failed and continues with other settings.
        if not is_out_of_memory(error) or context.trial is not None:
            raise
        if rank is not None and rank.lead is not None:
            rank.lead.checkpoints.wait()
        # This rank must raise, not return: the other ranks wait for its gradients, and Ray ends them when one raises.
        context.fail(f"out of {_memory()}", "lower batch_size or use more workers (num_workers)")
        raise


def _memory() -> str:
    """Return where this process trains and how much memory is there, for messages."""
    if not torch.cuda.is_available():
        return f"memory on {platform.node()}"
    found = torch.cuda.get_device_properties(ray.train.torch.get_device())
    return f"GPU memory on {found.name} ({found.total_memory / 2**30:.0f} GiB)"


@dataclass(frozen=True, slots=True)
class _Decision:
    """What rank 0 decides for all ranks."""

    max_steps: int | None = None
    """Length of the run; None while it is unknown."""
    stop: bool = False
    """Whether to save a checkpoint and end."""


class Rank:
    """One rank of a run."""

    def __init__(self, context: WorkerContext) -> None:
        self.context, self.config = context, context.config
        # The driver has reached both places, so an outage now is temporary and is retried.
        storage.expect(context.checkpoints, self.config.data)
        group = ray.train.get_context()
        self.rank, self.world_size = group.get_world_rank(), group.get_world_size()
        self.device = ray.train.torch.get_device()
        choose_numerics(self.device, exact=self.config.objective.strict)
        self.bundle_config = self.config.bundle_config(context.image_size)
        self.state = self._state()
        self.first_step = self.state.step
        self.stopping = False
        self.saved_before_preemption = False
        self.waited_s = 0.0
        """Seconds that this rank has waited for rows."""
        self.row_ids: list[str] = []
        self.colorizer: SharedColorizer | None = None
        self.trial: TrialReporter | None = None
        self.lead: _RankZero | None = None
        scoring: ScoringTask | None = None
        if context.samples is not None and self.device.type in SCORED_BETWEEN_STEPS:
            self.colorizer = SharedColorizer(self.bundle_config, context.samples)
        elif context.samples is not None:
            scoring = ScoringTask(self.bundle_config, context.samples)
        if context.trial is not None:
            self.trial = TrialReporter(context.trial, self.bundle_config, context.mlflow.run_id)
        if self.rank == 0:
            ends_early = self.trial.stop_requested if self.trial is not None else lambda: False
            self.lead = _RankZero(context, self.state, self.device, self.world_size, scoring, ends_early)

    def _state(self) -> TrainState:
        torch.manual_seed(self.config.seed)  # initial weights, equal on all ranks
        denoiser = self.bundle_config.build()
        if self.context.init_weights is not None:
            denoiser.start_from(ray.get(self.context.init_weights))
        state = TrainState(denoiser.to(self.device), self.config.optimizer, self.config.max_steps)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "state"
            if self._fetch(folder):
                state.restore(folder)
                if self.config.max_steps is not None:
                    state.max_steps = self.config.max_steps
        return state

    def _fetch(self, folder: Path) -> int:
        """Fetch the newest undamaged checkpoint and return its step, or 0 if there is none.

        Rank 0 chooses it, before any rank requests rows.
        """
        place, step = self.context.checkpoints, 0
        if self.rank == 0:
            step = retry_outage(lambda: fetch_newest(place, folder, self.context.warn))
        step = int(self._from_rank_0([step])[0])
        if self.rank and step:
            retry_outage(lambda: fetch(place, step, folder))
        return step

    def _from_rank_0(self, numbers: list[int]) -> list[int]:
        values = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        if self.world_size > 1:
            dist.broadcast(values, 0)
        decided: list[int] = values.tolist()
        return decided

    def _compile(self) -> None:
        try:
            compiled(self.state.denoiser)
        except ValueError as error:
            if self.rank == 0:
                self.context.warn(f"{error}; training continues without compiling")

    def run(self) -> None:
        """Train until the run ends or is stopped."""
        if self.config.compile:
            self._compile()
        objective = self.config.objective.build(self.state.denoiser, self.bundle_config.sampler, self.config.seed)
        if self.world_size > 1:
            objective = data_parallel(objective, self.device)
        try:
            fit(
                self.state,
                objective,
                self._batches(),
                None,
                self._on_step,
                augment=self.config.augment,
                seed=self.config.seed,
                rank=self.rank,
            )
        except FloatingPointError as error:
            if self.trial is not None:
                raise  # a search counts the trial as failed and continues with other settings
            self._give_up(str(error))
            return
        tracks = None if self.stopping else self.color_samples()
        if self.lead is not None:
            self.lead.finish(tracks, stopped=self.stopping, save=self.trial is None)

    def color_samples(self) -> dict[str, Track] | None:
        """Color the scoring rows on all ranks; return None if a task colors them, or memory is short."""
        if self.colorizer is None:
            return None
        tracks = self.colorizer.color(self.state, self.rank, self.world_size)
        if tracks is None:
            self.colorizer = None  # on all ranks
            if self.rank == 0:
                fewer = f"set num_samples below {self.config.num_samples}"
                self.context.warn(f"checkpoints are no longer scored: out of {_memory()}; {fewer}")
        return tracks

    def _give_up(self, reason: str) -> None:
        """Report which rows made the loss infinite or NaN, an error that would recur; all ranks must call this."""
        found: list[Any] = [(reason, self.row_ids)]
        if self.world_size > 1:
            found = [None] * self.world_size
            dist.all_gather_object(found, (reason, self.row_ids))
        if self.lead is not None:
            # A rank whose own rows are fine reports only bad gradients: they are averaged over all ranks.
            bad = [pair for pair in found if "the loss is" in pair[0]] or found
            ids = [name for _, names in bad for name in names]
            more = f" and {len(ids) - NAMED_ROWS} more" if len(ids) > NAMED_ROWS else ""
            self.lead.give_up(f"{bad[0][0]}, rows {', '.join(ids[:NAMED_ROWS])}{more}")

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        if self._complete():
            return
        shard = ray.train.get_dataset_shard("train")
        batches = iter(
            shard.iter_torch_batches(
                batch_size=self.config.rows_per_worker(self.world_size),
                drop_last=True,
                prefetch_batches=AHEAD[self.device.type],
                collate_fn=Decode(self.device),
            )
        )
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                return
            self.row_ids = batch.ids
            self.waited_s += time.monotonic() - asked
            yield batch.tensors

    def _complete(self) -> bool:
        return self.state.max_steps is not None and self.state.step >= self.state.max_steps

    def _on_step(self, step: Step) -> bool:
        if self.lead is not None:
            self.lead.after_step(step, self.waited_s)
        if self.trial is not None:
            self.trial.after_step(self.state, self.rank)
        if (step.step - self.first_step) % AGREE_EVERY == 0:
            self._agree()
        done = self._complete() or self.stopping
        if step.step % self.config.checkpoint_every == 0 and not done:
            tracks = self.color_samples()
            if self.lead is not None:
                self.lead.save(tracks)
        return done

    def _agree(self) -> None:
        """Apply rank 0's decision on all ranks; save a checkpoint if a node is about to be preempted."""
        own = self.lead.decide() if self.lead is not None else _Decision()
        length, stop = self._from_rank_0([own.max_steps or 0, int(own.stop)])
        self.state.max_steps, self.stopping = length or None, bool(stop)
        # Without a checkpoint now, the steps since the last one would have to be repeated after the preemption.
        if ray.train.get_preemption_info() is None or self.saved_before_preemption:
            return
        self.saved_before_preemption = True
        if self.lead is not None:
            self.context.warn(f"a node is about to be preempted; saving step {self.state.step}")
            self.lead.save()


class _RankZero:
    """What rank 0 does for all ranks: it reports, saves checkpoints, and decides how long the run is.

    Args:
        context: what the driver handed over.
        state: state of the run.
        device: device that trains.
        workers: number of workers.
        scoring: what a scoring task needs; None if the ranks color the rows, or nothing is scored.
        ends_early: returns whether a search asks the run to end.
    """

    def __init__(
        self,
        context: WorkerContext,
        state: TrainState,
        device: torch.device,
        workers: int,
        scoring: ScoringTask | None,
        ends_early: Callable[[], bool],
    ) -> None:
        config = context.config
        self._context, self._state, self._device, self._workers = context, state, device, workers
        self._ends_early = ends_early
        self._mlflow = context.mlflow.attach(system_metrics=True, warn=context.warn)
        self._driver = DriverReports(context.progress)
        self._begun = time.monotonic()
        self._metrics = MetricsReporter(
            self._mlflow,
            RunGauges(context.run_name),
            batch_size=config.batch_size,
            workers=workers,
            every=config.log_every,
            first_step=state.step,
            device=device,
        )
        self._budget = StepBudget((config.max_minutes or 0) * 60)
        self.checkpoints = ScoredCheckpoints(
            context.checkpoints, config.keep_checkpoints, self._mlflow, context.warn, scoring
        )
        if state.step:
            self.checkpoints.resume()

    def after_step(self, step: Step, waited_s: float) -> None:
        """Take the results of a step; `waited_s` are the seconds that rank 0 has waited for rows so far."""
        self._budget.step()
        self._driver.ask()
        if self._metrics.step(step, waited_s):
            self.checkpoints.poll()
            self._report()

    def decide(self) -> _Decision:
        """Return whether the run should stop, and its length."""
        length = self._state.max_steps
        if length is None and (more := self._budget.more()) is not None:
            length = self._state.step + more
        return _Decision(length, self._driver.stop_requested() or self._ends_early())

    def save(self, tracks: dict[str, Track] | None = None) -> None:
        """Save a checkpoint; it is scored afterwards, from `tracks` if the ranks have colored the rows."""
        self.checkpoints.save(self._state, tracks)
        self._report()

    def finish(self, tracks: dict[str, Track] | None, *, stopped: bool, save: bool) -> None:
        """Save and score the last checkpoint unless `save` is false, send the last report, and end the MLflow run."""
        if save:
            self.checkpoints.save_last(self._state, tracks)
        if not stopped:
            self.checkpoints.wait_for_scores()
        self._report()
        self._driver.flush()
        self._mlflow.finish("KILLED" if stopped else "FINISHED")

    def give_up(self, reason: str) -> None:
        """End a run that cannot continue; its checkpoints stay as they are."""
        self.checkpoints.wait()
        self._context.fail(reason, "lower optimizer.learning_rate or check these rows, and choose another name=")
        self._mlflow.finish("FAILED")

    def _report(self) -> None:
        best_step, best_score = self.checkpoints.best()
        self._driver.send(
            TrainProgress(
                step=self._state.step,
                max_steps=self._state.max_steps,
                elapsed_s=time.monotonic() - self._begun,
                metrics=self._metrics.latest,
                device=device_name(self._device),
                attention=attention_used(),
                workers=self._workers,
                peak_memory_mb=peak_memory_mb(self._device),
                best_step=best_step,
                best_score=best_score,
            )
        )
