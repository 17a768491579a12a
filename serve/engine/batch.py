"""The running batch: pictures with different steps, samplers and guidance that share one network evaluation.

A turn is one network evaluation for every row. Rows with the same sampler keep their state in common tensors, so that
the number of small operations in a turn grows with the number of samplers, not of rows. The arithmetic of a row is that
of models/colorize.py, element by element; only the network evaluates other rows together with it. engine.py decides
which requests join, and when.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

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
from animediffusion.models.network.condition import Condition
from animediffusion.models.out_of_memory import is_out_of_memory
from animediffusion.models.tensors import to_uint8
from animediffusion.serve.engine.condition_cache import ConditionCache, Pair
from animediffusion.serve.engine.faults import for_log, for_request, is_lost, summary
from animediffusion.serve.engine.memory_limit import Room
from animediffusion.serve.engine.network_runner import Evaluator

log = logging.getLogger(__name__)


class NotFiniteError(ValueError):
    """The picture of the model contains NaN or infinity."""


@dataclass(eq=False)
class Row:
    """One picture that is being made."""

    pair: Pair
    sampler: Sampler
    settings: SamplerDefaults
    noise: Tensor
    """[3, S, S]: the initial noise."""
    times: Tensor
    """[N + 1]: the times of the N steps, from start to end."""
    guided: list[bool]
    """For each evaluation, whether guidance also needs the null condition, which has no reference."""
    shows_previews: bool = False
    num_done: int = 0
    """Number of finished evaluations."""
    condition: Condition | None = None
    null: Condition | None = None
    preview: NDArray[np.uint8] | None = None
    """uint8 [S, S, 3]: the estimate after a turn that ended a step other than the last; only if `shows_previews`."""
    picture: NDArray[np.uint8] | None = None
    """uint8 [S, S, 3]: the finished picture."""
    error: Exception | None = None
    """The error that ended the row."""

    @property
    def places(self) -> int:
        """Slots of the row, that is, the maximum of rows of the network in a turn: 2 if any evaluation is guided."""
        return 2 if any(self.guided) else 1

    @property
    def num_left(self) -> int:
        """Turns until the picture is finished."""
        return len(self.guided) - self.num_done

    @property
    def work_left(self) -> int:
        """Rows of the network to evaluate until the picture is finished."""
        return self.num_left + sum(self.guided[self.num_done :])

    @property
    def steps_done(self) -> int:
        """Number of finished sampler steps."""
        return self.settings.steps if self.num_left == 0 else self.num_done // self.sampler.stages


def new_row(denoiser: Denoiser, pair: Pair, settings: SamplerDefaults, seed: int, shows_previews: bool = False) -> Row:
    """Return a new row. The function uses only the CPU, so any thread may call it."""
    sampler = build_sampler(settings.name, denoiser.path)
    times = sample_times(denoiser.path, settings.steps, shift=settings.shift)
    guided = guided_evaluations(denoiser.path, settings)
    noise = noise_for(seed, pair.sketch.shape[-1])
    return Row(pair, sampler, settings, noise, times, guided, shows_previews)


@dataclass(eq=False)
class _Group:
    """The rows with one sampler."""

    sampler: Sampler
    rows: list[Row]
    state: State


@dataclass(eq=False)
class _Layout:
    """Inputs of a network call that stay the same until the rows or their guidance change, so turns reuse them."""

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
        evaluator: calls the network.
        conditions: encodes the sketches and references of the rows.
    """

    def __init__(self, evaluator: Evaluator, conditions: ConditionCache) -> None:
        self.num_evaluated = 0
        """Evaluated rows of the network in the latest turn, including null conditions of guidance and padding."""
        self._evaluator = evaluator
        self._conditions = conditions
        self._groups: dict[str, _Group] = {}
        self._layouts: list[_Layout] = []
        """Layouts of the latest turn: one for each network call."""
        self._room = Room()

    @property
    def rows(self) -> list[Row]:
        """All running rows."""
        return [row for group in self._groups.values() for row in group.rows]

    def join(self, rows: Sequence[Row]) -> None:
        """Add rows, which take part from the next turn on. A row whose conditions cannot be encoded gets an `error`."""
        self._encode(rows)
        for row in rows:
            if row.error is None:
                state = row.sampler.start(
                    row.noise[None].to(self._evaluator.device), row.times.to(self._evaluator.device)
                )
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
                state = select_states(group.state, torch.tensor(kept, device=self._evaluator.device))
                longest = max(len(row.times) for row in group.rows)
                group.state = state._replace(times=state.times[:, :longest])

    def clear(self) -> None:
        """Remove all rows without a call to the device, which may have failed."""
        self._groups, self._layouts = {}, []

    def turn(self) -> list[Row]:
        """Run one turn; remove and return the rows that ended in it, with a picture or an error."""
        rows, groups = self.rows, list(self._groups.values())
        queries = [group.sampler.query(group.state) for group in groups]
        x, t = (torch.cat(parts) for parts in zip(*queries, strict=True))
        self.num_evaluated = 0
        before, self._layouts = self._layouts, []
        found = self._estimates(rows, x, t, before)
        self._room.end_turn()
        estimates = torch.split(found, [len(group.rows) for group in groups])
        for group, x_0 in zip(groups, estimates, strict=True):
            group.state = group.sampler.advance(group.state, x_0)
        for row in rows:
            row.num_done += 1
        self._show(rows)
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
            self._excuse(error, rows)
        if len(rows) > 1:
            for row in rows:
                self._encode([row])

    def _estimates(self, rows: list[Row], x: Tensor, t: Tensor, before: list[_Layout]) -> Tensor:
        """Return x_0 [B, 3, S, S] of rows at x, t. A row for which the network fails gets the error and zeros."""
        if self._room.has(len(rows)):
            try:
                return self._guided_estimates(self._layout_of(rows, before), x, t)
            except Exception as error:
                self._excuse(error, rows)
            # The retry is outside `except`, because the error keeps the memory of the failed call allocated.
            if len(rows) == 1:
                return torch.zeros_like(x)
        half = len(rows) // 2
        first = self._estimates(rows[:half], x[:half], t[:half], before)
        return torch.cat([first, self._estimates(rows[half:], x[half:], t[half:], before)])

    def _excuse(self, error: Exception, rows: Sequence[Row]) -> None:
        """Handle a failed call for these rows; raise the error if the device has failed, so that no call can work."""
        if is_lost(error):
            raise error
        if is_out_of_memory(error):
            self._room.failed(len(rows))
            self._conditions.clear()  # Running rows keep their own references to the conditions that they need.
        if len(rows) == 1:
            log.error("a request is given up: %s", for_log(error))
            rows[0].error = for_request(error)
        elif not is_out_of_memory(error):
            log.warning("a call for %d requests failed, smaller ones are tried: %s", len(rows), summary(error))

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
        found = self._evaluator(x, t, condition)
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
        device = self._evaluator.device
        return _Layout(
            rows=list(rows),
            guided=guided,
            index=torch.tensor(guided, dtype=torch.int64, device=device),
            scale=torch.tensor(scales, device=device),
            condition=self._evaluator.join([one for one in conditions if one is not None]),
        )

    def _show(self, rows: list[Row]) -> None:
        """Copy pictures and previews to the CPU in one transfer."""
        states = [
            (row, group.state, number) for group in self._groups.values() for number, row in enumerate(group.rows)
        ]
        wanted = [
            (row, state.x[number] if row.num_left == 0 else state.x_0[number])
            for row, state, number in states
            if row.error is None and (row.num_left == 0 or _has_preview(row))
        ]
        for row in rows:
            row.preview = None
        if not wanted:
            return
        images = torch.stack([image for _, image in wanted])
        finite = torch.isfinite(images).flatten(1).all(1).tolist()
        for (row, _), pixels, is_finite in zip(wanted, to_uint8(images).cpu().numpy(), finite, strict=True):
            if row.num_left:
                row.preview = pixels
            elif is_finite:
                row.picture = pixels
            else:
                row.error = NotFiniteError("the model's picture is not finite")


def _pairs(row: Row) -> list[Pair]:
    return [row.pair, row.pair.without_reference()] if any(row.guided) else [row.pair]


def _has_preview(row: Row) -> bool:
    return row.shows_previews and row.num_done % row.sampler.stages == 0
