"""The running batch: pictures with different steps, samplers and guidance that share one network evaluation.

An engine step is one network evaluation for every row; a sampler step of heun takes two of them. Rows with the same
sampler keep their state in common tensors, so that the number of small operations grows with the number of samplers,
not of rows. The arithmetic of a row is that of models/colorize.py, element by element; only the network evaluates other
rows together with it. engine.py decides which requests join, and when.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.colorize import guided_evaluations, noise_for
from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.diffusion.guidance import EVERYWHERE, mix
from animediffusion.models.diffusion.sampler import (
    Sampler,
    State,
    build_sampler,
    cat_states,
    sample_times,
    select_states,
)
from animediffusion.models.doubt import doubt_map
from animediffusion.models.hint_spread import spread_hints
from animediffusion.models.network.condition import Condition
from animediffusion.models.out_of_memory import is_out_of_memory
from animediffusion.models.tensors import to_uint8
from animediffusion.serve.engine.admission import Claim
from animediffusion.serve.engine.condition_cache import ConditionCache, Pair, pair_of
from animediffusion.serve.engine.faults import for_log, for_request, is_device_lost, summary
from animediffusion.serve.engine.memory_limit import MemoryLimit
from animediffusion.serve.engine.network_runner import NetworkRunner
from animediffusion.serve.engine.requests import Request

log = logging.getLogger(__name__)


class NotFiniteError(ValueError):
    """The picture of the model contains NaN or infinity."""


@dataclass(eq=False)
class Row:
    """The state of a request from its submission to its end."""

    request: Request
    pair: Pair
    sampler: Sampler
    settings: SamplerDefaults
    noise: Tensor
    """[3, S, S]: the initial noise."""
    times: Tensor
    """[N + 1]: the times of the N sampler steps, from start to end."""
    guided: list[bool]
    """For each evaluation, whether guidance also needs the null condition, which has no reference."""
    number: int = -1
    """Number of the request, counted over all accepted requests."""
    num_done: int = 0
    """Number of finished evaluations."""
    condition: Condition | None = None
    null: Condition | None = None
    preview: NDArray[np.uint8] | None = None
    """uint8 [S, S, 3]: the estimate, if this evaluation ended a sampler step and the request has a callback."""
    picture: NDArray[np.uint8] | None = None
    """uint8 [S, S, 3]: the finished picture."""
    doubt: NDArray[np.uint8] | None = None
    """uint8 [S, S]: the doubt about the finished picture, if the request has a callback for it."""
    error: Exception | None = None
    """The error that removed the row from the batch."""
    future: Future[NDArray[np.uint8]] = field(default_factory=Future)
    """The result that the client of the engine waits for."""

    @property
    def slots(self) -> int:
        """Slots of the row, that is, its largest number of network rows: 2 if any evaluation is guided."""
        return 2 if any(self.guided) else 1

    @property
    def num_left(self) -> int:
        """Engine steps until the picture is finished."""
        return len(self.guided) - self.num_done

    @property
    def claim(self) -> Claim:
        """The slots and the engine steps that the request needs until it is finished."""
        return self.slots, self.num_left

    @property
    def work_left(self) -> int:
        """Rows of the network to evaluate until the picture is finished."""
        return self.num_left + sum(self.guided[self.num_done :])

    @property
    def steps_done(self) -> int:
        """Number of finished sampler steps."""
        return self.settings.steps if self.num_left == 0 else self.num_done // self.sampler.stages

    @property
    def has_preview(self) -> bool:
        """Whether to copy the estimate after the latest evaluation to the CPU."""
        return self.request.on_progress is not None and self.num_done % self.sampler.stages == 0

    def fail(self, error: Exception) -> None:
        """End the request with an error, unless it has ended or was canceled."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def finish(self, picture: NDArray[np.uint8]) -> None:
        """End the request with its picture, unless it has ended or was canceled."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            if self.request.on_doubt is not None and self.doubt is not None:
                self.request.on_doubt(self.doubt)
            self.future.set_result(picture)


def new_row(denoiser: Denoiser, request: Request, defaults: SamplerDefaults) -> Row:
    """Return the row of a request. The function uses only the CPU, so any thread may call it.

    Raises:
        ValueError: the sampler is unknown.
    """
    settings = request.options.apply_to(defaults)
    sampler = build_sampler(settings.name, denoiser.path)
    times = sample_times(denoiser.path, settings.steps, shift=settings.shift)
    guided = guided_evaluations(denoiser.path, settings)
    noise = noise_for(request.options.seed, request.sketch.shape[-1])
    seen = request.hints if denoiser.network.config.hints else None
    pair = pair_of(request.sketch, request.references, seen)
    return Row(request, pair, sampler, settings, noise, times, guided)


@dataclass(eq=False)
class _Group:
    """The rows with one sampler."""

    sampler: Sampler
    rows: list[Row]
    state: State


@dataclass(eq=False)
class _Layout:
    """Inputs of a network call that depend only on the rows and on their guidance, so that engine steps reuse them."""

    rows: list[Row]
    guided: list[int]
    """Numbers of the guided rows."""
    index: Tensor
    """int64 [G]: the same numbers. The call evaluates these rows a second time, at its end, without their reference."""
    scale: Tensor
    """[G]: the guidance scales of the guided rows."""
    condition: Condition

    def fits(self, rows: list[Row], guided: list[int]) -> bool:
        return self.rows == rows and self.guided == guided


class RunningBatch:
    """Rows that share network evaluations. Use it from one thread, under torch.inference_mode().

    Args:
        runner: calls the network.
        conditions: encodes the sketches and references of the rows.
    """

    def __init__(self, runner: NetworkRunner, conditions: ConditionCache) -> None:
        self.num_evaluated = 0
        """Evaluated rows of the network in the latest engine step, with null conditions of guidance and padding."""
        self._runner = runner
        self._conditions = conditions
        self._groups: dict[str, _Group] = {}
        self._layouts: list[_Layout] = []
        """Layouts of the latest engine step: one for each network call."""
        self._memory_limit = MemoryLimit()

    @property
    def rows(self) -> list[Row]:
        """All running rows."""
        return [row for group in self._groups.values() for row in group.rows]

    def join(self, rows: Sequence[Row]) -> None:
        """Add rows to the next engine steps. A row whose conditions cannot be encoded gets an `error`."""
        self._encode(rows)
        for row in rows:
            if row.error is None:
                state = row.sampler.start(row.noise[None].to(self._runner.device), row.times.to(self._runner.device))
                group = self._groups.get(row.settings.name)
                if group is None:
                    self._groups[row.settings.name] = _Group(row.sampler, [row], state)
                else:
                    group.rows.append(row)
                    group.state = cat_states([group.state, state])

    def leave(self, rows: Sequence[Row]) -> None:
        """Remove rows."""
        gone = set(rows)
        for name, group in list(self._groups.items()):
            kept = [number for number, row in enumerate(group.rows) if row not in gone]
            if not kept:
                del self._groups[name]
            elif len(kept) < len(group.rows):
                group.rows = [group.rows[number] for number in kept]
                state = select_states(group.state, torch.tensor(kept, device=self._runner.device))
                longest = max(len(row.times) for row in group.rows)
                group.state = state._replace(times=state.times[:, :longest])

    def clear(self) -> None:
        """Remove all rows without a call to the device, which may have failed."""
        self._groups, self._layouts = {}, []

    def step(self) -> list[Row]:
        """Run one engine step; remove and return the rows that ended in it, with a picture or an error."""
        rows, groups = self.rows, list(self._groups.values())
        queries = [group.sampler.query(group.state) for group in groups]
        x, t = (torch.cat(parts) for parts in zip(*queries, strict=True))
        self.num_evaluated = 0
        before, self._layouts = self._layouts, []
        found = self._all_estimates(rows, x, t, before)
        self._memory_limit.end_step()
        estimates = torch.split(found, [len(group.rows) for group in groups])
        for group, x_0 in zip(groups, estimates, strict=True):
            group.state = group.sampler.advance(group.state, x_0)
        for row in rows:
            row.num_done += 1
        self.copy_pictures(rows)
        ended = [row for row in rows if row.num_left == 0 or row.error is not None]
        self.leave(ended)
        return ended

    def _encode(self, rows: Sequence[Row]) -> None:
        """Encode the conditions of all rows in one call; if it fails, encode row by row to find the row that fails."""
        wanted = [(row, pair) for row in rows for pair in _pairs(row)]
        try:
            found = iter(self._conditions.get([pair for _, pair in wanted]))
            for row in rows:
                row.condition, row.null = next(found), next(found) if any(row.guided) else None
            return
        except Exception as error:
            self._handle_failure(error, rows)
        if len(rows) > 1:
            for row in rows:
                self._encode([row])

    def _all_estimates(self, rows: list[Row], x: Tensor, t: Tensor, before: list[_Layout]) -> Tensor:
        """Return x_0 of all rows; rows with different numbers of references need separate calls of the network."""
        counts = [len(row.request.references) for row in rows]
        if len(set(counts)) == 1:
            return self._estimates(rows, x, t, before)
        found = torch.zeros_like(x)
        for count in sorted(set(counts)):
            numbers = [number for number, other in enumerate(counts) if other == count]
            index = torch.tensor(numbers, device=self._runner.device)
            part = self._estimates([rows[number] for number in numbers], x[index], t[index], before)
            found.index_copy_(0, index, part)
        return found

    def _estimates(self, rows: list[Row], x: Tensor, t: Tensor, before: list[_Layout]) -> Tensor:
        """Return x_0 [B, 3, S, S] of rows at x, t. A row for which the network fails gets the error and zeros."""
        if self._memory_limit.allows(len(rows)):
            try:
                return self._guided_estimates(self._layout_of(rows, before), x, t)
            except Exception as error:
                self._handle_failure(error, rows)
            # The retry is outside `except`, because the error keeps the memory of the failed call allocated.
            if len(rows) == 1:
                return torch.zeros_like(x)
        half = len(rows) // 2
        first = self._estimates(rows[:half], x[:half], t[:half], before)
        return torch.cat([first, self._estimates(rows[half:], x[half:], t[half:], before)])

    def _handle_failure(self, error: Exception, rows: Sequence[Row]) -> None:
        """Handle a failed call for these rows; raise the error if the device has failed, so that no call can work."""
        if is_device_lost(error):
            raise error
        if is_out_of_memory(error):
            self._memory_limit.add_failure(len(rows))
            self._conditions.clear()  # Running rows keep their own references to the conditions that they need.
        if len(rows) == 1:
            log.error("a request failed: %s", for_log(error))
            rows[0].error = for_request(error)
        elif not is_out_of_memory(error):
            log.warning("an evaluation of %d requests failed and is retried in halves: %s", len(rows), summary(error))

    def _guided_estimates(self, layout: _Layout, x: Tensor, t: Tensor) -> Tensor:
        if not layout.guided:
            return self._evaluate(layout.condition, x, t)
        index, num_rows = layout.index, len(layout.rows)
        found = self._evaluate(layout.condition, torch.cat([x, x[index]]), torch.cat([t, t[index]]))
        estimates, without = found[:num_rows], found[num_rows:]
        # `index` contains only rows that are guided at this evaluation, so guidance applies at every t.
        mixed = mix(without, estimates[index], layout.scale, t[index], EVERYWHERE)
        return estimates.index_copy(0, index, mixed)

    def _evaluate(self, condition: Condition, x: Tensor, t: Tensor) -> Tensor:
        found = self._runner(x, t, condition)
        self.num_evaluated += len(condition.features)
        return found

    def _layout_of(self, rows: list[Row], before: list[_Layout]) -> _Layout:
        guided = [number for number, row in enumerate(rows) if row.guided[row.num_done]]
        known = next((layout for layout in before if layout.fits(rows, guided)), None)
        self._layouts.append(known or self._new_layout(rows, guided))
        return self._layouts[-1]

    def _new_layout(self, rows: list[Row], guided: list[int]) -> _Layout:
        scales = [rows[number].settings.guidance_scale for number in guided]
        conditions = [*(row.condition for row in rows), *(rows[number].null for number in guided)]
        device = self._runner.device
        return _Layout(
            rows=list(rows),
            guided=guided,
            index=torch.tensor(guided, dtype=torch.int64, device=device),
            scale=torch.tensor(scales, device=device),
            condition=self._runner.join([one for one in conditions if one is not None]),
        )

    def copy_pictures(self, rows: list[Row]) -> None:
        """Copy pictures and previews to the CPU in one transfer."""
        states = [
            (row, group.state, number) for group in self._groups.values() for number, row in enumerate(group.rows)
        ]
        wanted = [
            (row, state.x[number] if row.num_left == 0 else state.x_0[number])
            for row, state, number in states
            if row.error is None and (row.num_left == 0 or row.has_preview)
        ]
        for row in rows:
            row.preview = None
        if not wanted:
            return
        for row, image in wanted:
            if row.num_left == 0 and row.request.on_doubt is not None and row.condition is not None:
                doubt = doubt_map(row.condition, image[None])
                row.doubt = None if doubt is None else (255 * doubt[0]).round().to(torch.uint8).cpu().numpy()
        images = torch.stack([image if row.num_left else self._with_hints(row, image) for row, image in wanted])
        finite = torch.isfinite(images).flatten(1).all(1).tolist()
        for (row, _), pixels, is_finite in zip(wanted, to_uint8(images).cpu().numpy(), finite, strict=True):
            if row.num_left:
                row.preview = pixels
            elif is_finite:
                row.picture = pixels
            else:
                row.error = NotFiniteError("the model's picture is not finite")

    def _with_hints(self, row: Row, image: Tensor) -> Tensor:
        """Return the finished image [3, S, S] of a row with the colors of its hints, if it has any."""
        if row.request.hints is None:
            return image
        sketch, hints = (one[None].to(self._runner.device) for one in (row.request.sketch, row.request.hints))
        return spread_hints(self._runner.denoiser, sketch, image[None].clamp(-1, 1), hints)[0]


def _pairs(row: Row) -> list[Pair]:
    return [row.pair, row.pair.without_reference()] if any(row.guided) else [row.pair]
