"""The body of a Ray Train worker: rows in, steps, checkpoints and metrics out.

The mathematics of a step is in models/training.py; this file is about processes: DDP, resume, agreement of the
ranks on when to stop, and what rank 0 tells the world.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from animediffusion.models.attention import attention_used, use_attention
from animediffusion.models.augment import fixed_batch
from animediffusion.models.colorize import noise_for, sample_images
from animediffusion.models.images import to_uint8
from animediffusion.models.training import Step, TrainState, fit
from animediffusion.pipelines.dataset import decode_rows
from animediffusion.pipelines.recipe import TrainConfig
from animediffusion.platform.images import contact_sheet
from animediffusion.platform.tracking import Run

TIMED_STEPS = 20
"""After so many steps (and so many before them to warm up) max_minutes becomes max_steps."""
AGREE_EVERY = 10
"""Steps between two looks of all ranks at what rank 0 decided."""
UNKNOWN_LENGTH = 1 << 40


@ray.remote(num_cpus=0)
class Progress:
    """Where the driver looks how a run is going, and says that it should stop. Lives on any node."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._stop = False

    def tell(self, **values: Any) -> bool:
        """Rank 0 reports; the answer is whether to stop."""
        self._latest.update(values)
        return self._stop

    def look(self) -> dict[str, Any]:
        """The latest report."""
        return self._latest

    def stop(self) -> None:
        """Ask the run to save a checkpoint and end."""
        self._stop = True


def train_worker(config: dict[str, Any]) -> None:
    """One rank of a run. Continues from the checkpoint that Ray hands it, else from `init_from`.

    Args:
        config: run (TrainConfig as a dictionary), image_size, init_weights (object reference or None), tracking_uri,
            mlflow_run_id, progress (actor), samples (rows of the grid, or None).
    """
    _Rank(config).run()


class _Rank:
    def __init__(self, config: dict[str, Any]) -> None:
        self.run_config = TrainConfig.check(config["run"])
        self.shared = config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        use_attention(self.run_config.attention)
        self.bundle_config = self.run_config.bundle_config(config["image_size"])
        self.state = self._state()
        self.first_step = self.state.step
        self.saved_step = -1
        self.stopping = False
        self.waited = 0.0
        self.log = _Log(self) if self.rank == 0 else None

    def _state(self) -> TrainState:
        run = self.run_config
        torch.manual_seed(run.seed)  # initial weights, equal on all ranks
        denoiser = self.bundle_config.build()
        if self.shared["init_weights"] is not None:
            denoiser.load_state_dict(ray.get(self.shared["init_weights"]))
        state = TrainState(denoiser.to(self.device), run.optimizer, run.max_steps or UNKNOWN_LENGTH)
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                state.restore(Path(folder))
            if run.max_steps is not None:
                state.max_steps = run.max_steps
        return state

    def run(self) -> None:
        objective = self.run_config.objective.build(
            self.state.denoiser, self.bundle_config.sampler, self.run_config.seed
        )
        if self.world_size > 1:
            objective = _ddp(objective, self.device)
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
        if self.state.step > self.saved_step:
            self._checkpoint()
        if self.log is not None:
            self.log.close()

    def _rows(self) -> Iterator[dict[str, Tensor]]:
        run = self.run_config
        if self.state.step >= self.state.max_steps:
            return
        shard = ray.train.get_dataset_shard("train")
        batches = iter(shard.iter_batches(batch_size=run.rows_per_worker, drop_last=True, prefetch_batches=2))
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                return
            arrays = decode_rows(batch)
            tensors = {k: torch.from_numpy(v).to(self.device, non_blocking=True) for k, v in arrays.items()}
            self.waited += time.monotonic() - asked
            yield tensors

    def _on_step(self, step: Step) -> bool:
        if self.log is not None:
            self.log.step(step)
        if (step.step - self.first_step) % AGREE_EVERY == 0:
            self._agree()
        done = step.step >= self.state.max_steps or self.stopping
        if step.step % self.run_config.checkpoint_every == 0 and not done:
            self._checkpoint()
        return done

    def _agree(self) -> None:
        """All ranks take over from rank 0 how long the run is and whether it is to stop now."""
        decided = torch.tensor([self.state.max_steps, 0], dtype=torch.int64, device=self.device)
        if self.log is not None:
            decided = torch.tensor(self.log.decide(), dtype=torch.int64, device=self.device)
        if self.world_size > 1:
            dist.broadcast(decided, 0)
        self.state.max_steps, self.stopping = int(decided[0]), bool(decided[1])

    def _checkpoint(self) -> None:
        """Save on rank 0 and report on all; the step is part of the name, so nothing is written twice."""
        self.saved_step = self.state.step
        name = f"step-{self.state.step:08d}"
        if self.log is None:
            ray.train.report({"step": self.state.step}, checkpoint_dir_name=name)
            return
        metrics = {"step": self.state.step, **self.log.checkpointed()}
        with tempfile.TemporaryDirectory() as folder:
            self.state.save(Path(folder))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint(folder), checkpoint_dir_name=name)


def _ddp(objective: nn.Module, device: torch.device) -> nn.Module:
    ids = [device.index or 0] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)


class _Log:
    """What rank 0 tells MLflow and the driver."""

    def __init__(self, rank: _Rank) -> None:
        self.rank = rank
        self.config = rank.run_config
        self.progress = rank.shared["progress"]
        self.run = Run.attach(rank.shared["tracking_uri"], rank.shared["mlflow_run_id"], system_metrics=True)
        self.answer: Any = None
        self.begun = time.monotonic()
        self.last = (rank.state.step, self.begun, 0.0)
        self.timed: float | None = None
        self.values: dict[str, float] = {}
        self.bins, self.counts = torch.zeros(8), torch.zeros(8)

    def step(self, step: Step) -> None:
        self.bins += step.loss.bins.cpu()
        self.counts += step.loss.counts.cpu()
        if step.step - self.rank.first_step == TIMED_STEPS:
            self.timed = time.monotonic()
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
        self.bins, self.counts = torch.zeros(8), torch.zeros(8)
        self.run.log({**self.values, **by_level}, step.step)
        self._tell()

    def _tell(self) -> None:
        # Never wait for the driver: read the answer to the report before this one.
        self.answer = self.progress.tell.remote(
            step=self.rank.state.step,
            max_steps=self.rank.state.max_steps,
            elapsed=time.monotonic() - self.begun,
            attention=attention_used(),
            device=_device_name(self.rank.device),
            **self.values,
        )

    def decide(self) -> list[int]:
        """[max_steps, stop]"""
        stop = 0
        if self.answer is not None:
            ready, _ = ray.wait([self.answer], timeout=0)
            stop = int(bool(ready) and bool(ray.get(ready[0])))
        max_steps = self.rank.state.max_steps
        done = self.rank.state.step - self.rank.first_step
        if max_steps == UNKNOWN_LENGTH and self.timed is not None and done >= 2 * TIMED_STEPS:
            seconds_per_step = (time.monotonic() - self.timed) / (done - TIMED_STEPS)
            left = (self.config.max_minutes or 0) * 60 - (time.monotonic() - self.begun)
            max_steps = self.rank.state.step + max(1, int(left / seconds_per_step))
        return [max_steps, stop]

    def checkpointed(self) -> dict[str, float]:
        """Log the sample grid; the metrics that go with a checkpoint."""
        if self.rank.shared["samples"] is not None:
            self.run.log_image(sample_grid(self.rank.state, self.rank.shared), "samples", self.rank.state.step)
        self._tell()
        return dict(self.values)

    def close(self) -> None:
        self._tell()
        ray.get(self.answer)
        self.run.finish("KILLED" if self.rank.stopping else "FINISHED")


def sample_grid(state: TrainState, shared: dict[str, Any]) -> Any:
    """sketch | reference | result | truth of fixed rows with fixed noise, uint8 [H, W, 3]."""
    denoiser = state.averaged()
    device = next(denoiser.parameters()).device
    rows = {key: torch.from_numpy(value).to(device) for key, value in shared["samples"].items()}
    batch = fixed_batch(rows, "cross", torch.Generator(device).manual_seed(0))
    noise = torch.stack([noise_for(i, batch.target.shape[-1]) for i in range(len(batch.target))]).to(device)
    settings = TrainConfig.check(shared["run"]).bundle_config(shared["image_size"]).sampler
    with torch.no_grad():
        result = sample_images(denoiser, batch.sketch, batch.reference, noise, settings)
    columns = (batch.sketch.expand(-1, 3, -1, -1), batch.reference, result, batch.target)
    cells = [to_uint8(column).cpu().numpy() for column in columns]
    return contact_sheet([list(row) for row in zip(*cells, strict=True)], ["sketch", "reference", "result", "truth"])


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
