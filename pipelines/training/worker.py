"""The training function of a Ray Train worker: it reads rows and produces steps, checkpoints and metrics.

This file is about processes: DDP, resuming, agreement of the ranks on when to stop, and the reports of rank 0.
models/training/loop.py has the mathematics of a step, pipelines/training/checkpoints.py writes the checkpoints, and
pipelines/training/validation.py scores them.
"""

from __future__ import annotations

import platform
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from animediffusion.models.compile import compiled
from animediffusion.models.network.attention import attention_used, use_attention
from animediffusion.models.numerics import choose_numerics
from animediffusion.models.out_of_memory import is_out_of_memory
from animediffusion.models.training.loop import Snapshot, Step, TrainState, fit, write
from animediffusion.models.training.objective import NUM_BINS
from animediffusion.pipelines.data.decoding import Decode
from animediffusion.pipelines.evaluation.evaluate import Track
from animediffusion.pipelines.training.checkpoints import (
    CheckpointWriter,
    Save,
    Take,
    best_step,
    fetch,
    fetch_newest,
    outlast,
    read_scores,
)
from animediffusion.pipelines.training.prometheus import RunGauges
from animediffusion.pipelines.training.recipe import TrainConfig
from animediffusion.pipelines.training.step_budget import StepBudget
from animediffusion.pipelines.training.trial_report import Rungs
from animediffusion.pipelines.training.validation import Scorer, SharedPainter, record_score
from animediffusion.platform.errors import StorageError
from animediffusion.platform.storage import files as storage

AGREE_EVERY = 10
"""Steps between two synchronizations of rank 0's decisions to all ranks."""
UNKNOWN_LENGTH = 1 << 40
"""Effectively unlimited: max_steps of a run with a time limit until its speed is known."""
SCORING_S = 120.0
"""Seconds that a run waits at its end for each score that is still missing."""
AHEAD = {"cpu": 2, "cuda": 4}
"""Batches decoded ahead, by kind of device; each batch is decoded in its own thread."""
SCORED_BETWEEN_STEPS = ("cuda",)
"""Kinds of devices on which the ranks color the scoring rows themselves, between two steps."""
NAMED_ROWS = 8
"""Most rows that an error message names."""


@ray.remote(num_cpus=0)
class Progress:
    """Shared actor: progress reports from rank 0, stop requests from the driver."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {"warnings": []}
        self._stop = False

    def tell(self, **values: Any) -> bool:
        """Store a report of rank 0; return whether the run should stop."""
        self._latest.update(values)
        return self._stop

    def warn(self, line: str) -> None:
        """Add one line to the warnings that the user sees."""
        self._latest["warnings"] = [*self._latest["warnings"], line]

    def look(self) -> dict[str, Any]:
        """Return the latest report."""
        return self._latest

    def stop(self) -> None:
        """Ask the run to save a checkpoint and end."""
        self._stop = True


def train_worker(config: dict[str, Any]) -> None:
    """Run one rank: resume from the newest undamaged checkpoint, or start from `init_weights` or random weights.

    Args:
        config: run (TrainConfig as a dictionary), run_name, checkpoints (URI of their folder), image_size, init_weights
            (object reference or None), tracking_uri, mlflow_run_id, unsent (folder of records that MLflow has not
            received yet), progress (the actor Progress), samples (rows to score, or None); in a search also rungs,
            which pipelines/training/trial_report.py describes.
    """
    if ray.get(config["progress"].look.remote()).get("failed"):
        return  # Ray restarted the workers after an error that would recur
    config["progress"].tell.remote(worker=ray.get_runtime_context().get_actor_id())
    try:
        use_attention(TrainConfig.check(config["run"]).attention)
    except ValueError as error:
        _give_up_for_good(config, str(error), "set attention=auto")
        raise
    rank = None
    try:
        rank = _Rank(config)
        rank.run()
    except ray.exceptions.RayError:
        raise  # the error of another process
    except Exception as error:
        # A search counts the trial as failed and continues with other settings.
        if not is_out_of_memory(error) or config.get("rungs"):
            raise
        if rank is not None and rank.log is not None:
            rank.log.writer.wait()
        # This rank must raise, not return: the other ranks wait for its gradients, and Ray ends them when one raises.
        _give_up_for_good(config, f"out of {_memory()}", "lower batch_size or use more workers (num_workers)")
        raise


def _give_up_for_good(config: dict[str, Any], failed: str, advice: str) -> None:
    """Report to the driver an error that would recur; workers that Ray restarts then return immediately."""
    ray.get(config["progress"].tell.remote(failed=failed, advice=advice))


def _memory() -> str:
    """Return where this process trains and how much memory is there, for messages."""
    if not torch.cuda.is_available():
        return f"memory on {platform.node()}"
    found = torch.cuda.get_device_properties(ray.train.torch.get_device())
    return f"GPU memory on {found.name} ({found.total_memory / 2**30:.0f} GiB)"


class _Rank:
    def __init__(self, config: dict[str, Any]) -> None:
        self.run_config = TrainConfig.check(config["run"])
        # The driver has reached both places, so an outage now is temporary and is retried.
        storage.expect(config["checkpoints"], self.run_config.data)
        self.shared = config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        choose_numerics(self.device, exact=self.run_config.objective.strict)
        self.bundle_config = self.run_config.bundle_config(config["image_size"])
        self.state = self._state()
        self.first_step = self.state.step
        self.stopping = False
        self.warned_node = False
        self.waited = 0.0
        self.row_ids: list[str] = []
        between_steps = config["samples"] is not None and self.device.type in SCORED_BETWEEN_STEPS
        self.painter = (
            SharedPainter(self.run_config, config["image_size"], config["samples"]) if between_steps else None
        )
        self.log = _Log(self) if self.rank == 0 else None
        self.rungs = Rungs(config) if config.get("rungs") else None

    def _state(self) -> TrainState:
        run = self.run_config
        torch.manual_seed(run.seed)  # initial weights, equal on all ranks
        denoiser = self.bundle_config.build()
        if self.shared["init_weights"] is not None:
            denoiser.load_state_dict(ray.get(self.shared["init_weights"]))
        state = TrainState(denoiser.to(self.device), run.optimizer, run.max_steps or UNKNOWN_LENGTH)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "state"
            if self._fetch(folder):
                state.restore(folder)
                if run.max_steps is not None:
                    state.max_steps = run.max_steps
        return state

    def _fetch(self, folder: Path) -> int:
        """Fetch the newest undamaged checkpoint and return its step, or 0 if there is none.

        Rank 0 chooses it, before any rank requests rows.
        """
        place, step = self.shared["checkpoints"], 0
        if self.rank == 0:
            step = outlast(lambda: fetch_newest(place, folder, self._warn))
        step = int(self._from_rank_0([step])[0])
        if self.rank and step:
            outlast(lambda: fetch(place, step, folder))
        return step

    def _from_rank_0(self, numbers: list[int]) -> list[int]:
        values = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        if self.world_size > 1:
            dist.broadcast(values, 0)
        decided: list[int] = values.tolist()
        return decided

    def _warn(self, line: str) -> None:
        self.shared["progress"].warn.remote(line)

    def _compile(self) -> None:
        try:
            compiled(self.state.denoiser)
        except ValueError as error:
            if self.rank == 0:
                self._warn(f"{error}; training continues without compiling")

    def run(self) -> None:
        if self.run_config.compile:
            self._compile()
        objective = self.run_config.objective.build(
            self.state.denoiser, self.bundle_config.sampler, self.run_config.seed
        )
        if self.world_size > 1:
            objective = _ddp(objective, self.device)
        try:
            fit(
                self.state,
                objective,
                self._rows(),
                UNKNOWN_LENGTH,
                self._on_step,
                augment=self.run_config.augment,
                seed=self.run_config.seed,
                rank=self.rank,
            )
        except FloatingPointError as error:
            if self.rungs is not None:
                raise  # a search counts the trial as failed and continues with other settings
            self._give_up(str(error))
            return
        tracks = None if self.stopping else self._paint()
        if self.log is not None:
            self.log.finish(tracks)

    def _paint(self) -> dict[str, Track] | None:
        if self.painter is None:
            return None
        tracks = self.painter.paint(self.state, self.rank, self.world_size)
        if tracks is None:
            self.painter = None  # on all ranks
            if self.rank == 0:
                few = f"set num_samples below {self.run_config.num_samples}"
                self._warn(f"no more scores: out of {_memory()} beside what trains; {few}")
        return tracks

    def _give_up(self, reason: str) -> None:
        """Report which rows made the loss infinite or NaN, an error that would recur; all ranks must call this."""
        found: list[Any] = [(reason, self.row_ids)]
        if self.world_size > 1:
            found = [None] * self.world_size
            dist.all_gather_object(found, (reason, self.row_ids))
        if self.log is not None:
            # A rank whose own rows are fine reports only bad gradients: they are averaged over all ranks.
            bad = [pair for pair in found if "the loss is" in pair[0]] or found
            ids = [name for _, names in bad for name in names]
            more = f" and {len(ids) - NAMED_ROWS} more" if len(ids) > NAMED_ROWS else ""
            self.log.give_up(f"{bad[0][0]}, rows {', '.join(ids[:NAMED_ROWS])}{more}")

    def _rows(self) -> Iterator[dict[str, Tensor]]:
        if self.state.step >= self.state.max_steps:
            return
        shard = ray.train.get_dataset_shard("train")
        batches = iter(
            shard.iter_torch_batches(
                batch_size=self.run_config.batch_size // self.world_size,
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
            self.waited += time.monotonic() - asked
            yield batch.tensors

    def _on_step(self, step: Step) -> bool:
        if self.log is not None:
            self.log.step(step)
        if self.rungs is not None:
            self.rungs.after(self.state, self.rank)
        if (step.step - self.first_step) % AGREE_EVERY == 0:
            self._agree()
        done = step.step >= self.state.max_steps or self.stopping
        if step.step % self.run_config.checkpoint_every == 0 and not done:
            tracks = self._paint()
            if self.log is not None:
                self.log.checkpoint(tracks)
        return done

    def _agree(self) -> None:
        """Broadcast max_steps and the stop request from rank 0 to all ranks; save a checkpoint before a preemption."""
        mine = self.log.decide() if self.log is not None else [0, 0]
        self.state.max_steps, stop = self._from_rank_0(mine)
        self.stopping = bool(stop)
        # Without a checkpoint now, the steps since the last one would have to be repeated after the preemption.
        if ray.train.get_preemption_info() is None or self.warned_node:
            return
        self.warned_node = True
        if self.log is not None:
            self._warn(f"a node will be taken away; saving step {self.state.step}")
            self.log.checkpoint()


def _ddp(objective: nn.Module, device: torch.device) -> nn.Module:
    ids = [device.index or 0] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)


@dataclass(frozen=True)
class _Taken:
    """A copied state that is to be saved, and the rows to score as that state colored them (None: no such rows)."""

    snapshot: Snapshot
    tracks: dict[str, Track] | None

    def __call__(self, folder: Path) -> None:
        write(self.snapshot, folder)


class _Log:
    """Rank 0's part of a run: metrics, progress reports, checkpoints, scores and stop requests."""

    def __init__(self, rank: _Rank) -> None:
        from animediffusion.platform.tracking.run import Run  # here, because MLflow takes seconds to import

        self.rank = rank
        self.config = rank.run_config
        self.progress = rank.shared["progress"]
        self.run = Run.attach(
            rank.shared["tracking_uri"],
            rank.shared["mlflow_run_id"],
            system_metrics=True,
            unsent=Path(rank.shared["unsent"]),
            warn=rank._warn,
        )
        self.answer: Any = None
        self.begun = time.monotonic()
        self.last = (rank.state.step, self.begun, 0.0)
        self.pace = StepBudget((self.config.max_minutes or 0) * 60)
        self.values: dict[str, float] = {}
        self.gauges = RunGauges(rank.shared["run_name"])
        self.bins, self.counts = torch.zeros(2, NUM_BINS, device=rank.device)
        place, run = rank.shared["checkpoints"], rank.run_config
        in_a_task = rank.shared["samples"] is not None and rank.painter is None
        self.scorer = Scorer(place, rank.shared) if in_a_task else None
        awaited = self.scorer.awaited if self.scorer is not None else tuple
        self.writer = CheckpointWriter(place, run.keep_checkpoints, rank._warn, self._saved, awaited)
        self.scores = read_scores(place) if rank.state.step else {}

    def step(self, step: Step) -> None:
        # Add up on the device: reading the values here would wait for the GPU in each step.
        self.bins += step.loss.bins
        self.counts += step.loss.counts
        self.pace.step()
        if step.step % self.config.log_every == 0:
            self._report(step)

    def _report(self, step: Step) -> None:
        now = time.monotonic()
        steps, since, waited = self.last
        seconds = max(now - since, 1e-6)
        self.last = (step.step, now, self.rank.waited)
        self.values = {
            "loss": float(step.loss.total),
            "grad_norm": float(step.grad_norm),
            "learning_rate": step.learning_rate,
            "images_per_s": (step.step - steps) * self.config.batch_size / seconds,
            "data_wait": (self.rank.waited - waited) / seconds,
            "seconds_per_step": seconds / max(1, step.step - steps),
        }
        means = enumerate(zip(self.bins.tolist(), self.counts.tolist(), strict=True))
        by_level = {f"loss_by_noise/{i}": total / count for i, (total, count) in means if count}
        self.bins.zero_()
        self.counts.zero_()
        self.run.log({**self.values, **by_level}, step.step)
        self.gauges.set(step=step.step, workers=self.rank.world_size, **self.values)
        if self.scorer is not None:
            self.scorer.look(0)
        self._tell()

    def _saved(self, step: int, state: Save) -> None:
        """Score a saved checkpoint; called in the thread that wrote it."""
        if self.scorer is not None:
            self.scorer.start(step)
        if isinstance(state, _Taken) and state.tracks is not None:
            with suppress(StorageError):  # a missing score must not end the run
                self.scores[step] = record_score(self.writer.place, step, state.tracks, self.run)

    def _tell(self) -> None:
        # Never wait for the driver: decide() reads the answer later, if it has arrived.
        self.answer = self.progress.tell.remote(
            step=self.rank.state.step,
            max_steps=self.rank.state.max_steps,
            elapsed=time.monotonic() - self.begun,
            attention=attention_used(),
            device=_device_name(self.rank.device),
            workers=self.rank.world_size,
            peak_memory_mb=_peak_memory_mb(self.rank.device),
            **self._best(),
            **self.values,
        )

    def _best(self) -> dict[str, Any]:
        scores = {**self.scores, **(self.scorer.scores if self.scorer is not None else {})}
        best = best_step(scores)
        return {} if best is None else {"best_step": best, "best_score": scores[best]}

    def decide(self) -> list[int]:
        """Return [max_steps, stop], where stop is 0 or 1."""
        stop = 0
        if self.answer is not None:
            ready, _ = ray.wait([self.answer], timeout=0)
            stop = int(bool(ready) and bool(ray.get(ready[0])))
        if self.rank.rungs is not None and self.rank.rungs.stopped():
            stop = 1
        max_steps = self.rank.state.max_steps
        if max_steps == UNKNOWN_LENGTH and (more := self.pace.more()) is not None:
            max_steps = self.rank.state.step + more
        return [max_steps, stop]

    def checkpoint(self, tracks: dict[str, Track] | None = None) -> None:
        """Save the state; it is scored afterwards, from `tracks` if the ranks have colored the rows."""
        self.writer.save(self.rank.state.step, self._taker(tracks))
        self._tell()

    def _taker(self, tracks: dict[str, Track] | None) -> Take:
        return lambda: _Taken(self.rank.state.snapshot(), tracks)

    def finish(self, tracks: dict[str, Track] | None) -> None:
        """Save and score the last checkpoint, send the last report, and end the MLflow run."""
        if self.rank.rungs is None:  # a trial of a search keeps only its reports
            self.writer.finish(self.rank.state.step, self._taker(tracks))
        if self.scorer is not None and not self.rank.stopping:
            self.scorer.finish(SCORING_S)
            self.writer.prune()
        self._tell()
        ray.get(self.answer)
        self.run.finish("KILLED" if self.rank.stopping else "FINISHED")

    def give_up(self, reason: str) -> None:
        """End a run that cannot continue; its checkpoints stay as they are."""
        self.writer.wait()
        advice = "lower optimizer.learning_rate or look at these rows, with another name="
        ray.get(self.progress.tell.remote(failed=reason, advice=advice))
        self.run.finish("FAILED")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory of this process's GPU, or of the process itself on a CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
