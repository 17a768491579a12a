"""The running batch: pictures at different steps, of different samplers and guidance, in one network evaluation.

Rows of one sampler keep their state in common tensors, so that a turn costs as many small operations as there are
samplers, not as there are rows. A row's arithmetic is that of models/colorize.py, element by element; only the network
sees other rows beside it. Not here: who may join and when (engine.py).
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
from animediffusion.models.tensors import to_uint8
from animediffusion.serve.engine.condition_cache import ConditionCache, Pair
from animediffusion.serve.engine.faults import for_log, for_request, is_lost, is_out_of_memory, summary
from animediffusion.serve.engine.memory_limit import Room
from animediffusion.serve.engine.network_runner import Evaluator

log = logging.getLogger(__name__)


class NotFiniteError(ValueError):
    """The model made something that is no picture."""


@dataclass(eq=False)
class Row:
    """One picture in the making."""

    pair: Pair
    sampler: Sampler
    settings: SamplerDefaults
    noise: Tensor
    """[3, S, S]."""
    times: Tensor
    """[N + 1]."""
    guided: list[bool]
    """Of each evaluation: does it need the condition without reference as well."""
    shows_previews: bool = False
    num_done: int = 0
    """Evaluations so far."""
    condition: Condition | None = None
    null: Condition | None = None
    preview: NDArray[np.uint8] | None = None
    """After a turn that ended a step, but not the last one: the estimate, if it shows previews."""
    picture: NDArray[np.uint8] | None = None
    """Once it is finished: uint8 [S, S, 3]."""
    error: Exception | None = None
    """Why it will not be finished."""

    @property
    def places(self) -> int:
        """Rows of the network that it may need in a turn: two if it is ever guided."""
        return 2 if any(self.guided) else 1

    @property
    def num_left(self) -> int:
        """Turns until it is finished."""
        return len(self.guided) - self.num_done

    @property
    def work_left(self) -> int:
        """Rows of the network until it is finished."""
        return self.num_left + sum(self.guided[self.num_done :])

    @property
    def steps_done(self) -> int:
        """Steps that are complete."""
        return self.settings.steps if self.num_left == 0 else self.num_done // self.sampler.stages


def new_row(denoiser: Denoiser, pair: Pair, settings: SamplerDefaults, seed: int, shows_previews: bool = False) -> Row:
    """A row at its start; touches the processor only, so any thread may make it."""
    sampler = build_sampler(settings.name, denoiser.path)
    times = sample_times(denoiser.path, settings.steps, shift=settings.shift)
    guided = guided_evaluations(denoiser.path, settings)
    noise = noise_for(seed, pair.sketch.shape[-1])
    return Row(pair, sampler, settings, noise, times, guided, shows_previews)


@dataclass(eq=False)
class _Group:
    """The rows of one sampler."""

    sampler: Sampler
    rows: list[Row]
    state: State


@dataclass(eq=False)
class _Layout:
    """What of a network call changes only when rows do: made once for all turns between."""

    rows: list[Row]
    guided: list[int]
    index: Tensor
    """int64 [G]: the guided rows, which come a second time at the end, without their reference."""
    scale: Tensor
    """[G]: their guidance scales."""
    condition: Condition

    def fits(self, rows: list[Row], guided: list[int]) -> bool:
        return self.rows == rows and self.guided == guided


class RunningBatch:
    """Rows that share network evaluations. For one thread, under torch.inference_mode().

    Args:
        evaluator: calls the network.
        conditions: encodes what rows are about.
    """

    def __init__(self, evaluator: Evaluator, conditions: ConditionCache) -> None:
        self.num_evaluated = 0
        """Rows of the network in the last turn, nulls of guidance and filling included."""
        self._evaluator = evaluator
        self._conditions = conditions
        self._groups: dict[str, _Group] = {}
        self._layouts: list[_Layout] = []
        """Of the last turn: one, or one for each part that was evaluated by itself."""
        self._room = Room()

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [row for group in self._groups.values() for row in group.rows]

    def join(self, rows: Sequence[Row]) -> None:
        """Let rows take part from the next turn on; those that cannot get an `error` instead."""
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
        """Take rows out."""
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
        """Take all rows out, without a call of the device, which may have failed."""
        self._groups, self._layouts = {}, []

    def turn(self) -> list[Row]:
        """One network evaluation for every row. Those that have ended by it, with picture or error, have left."""
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
        """Conditions of all rows in one call; one by one if that fails, to see whose fault it is."""
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
        """x_0 [B, 3, S, S] of rows at x, t. A row that makes the network fail gets its error, the others continue."""
        if self._room.has(len(rows)):
            try:
                return self._guided_estimates(self._layout_of(rows, before), x, t)
            except Exception as error:
                self._excuse(error, rows)
            # Outside of `except`: an error holds on to the memory of the call that ran out of it.
            if len(rows) == 1:
                return torch.zeros_like(x)
        half = len(rows) // 2
        first = self._estimates(rows[:half], x[:half], t[:half], before)
        return torch.cat([first, self._estimates(rows[half:], x[half:], t[half:], before)])

    def _excuse(self, error: Exception, rows: Sequence[Row]) -> None:
        """Note the failure of a call for these rows; raises it where no smaller call can work."""
        if is_lost(error):
            raise error
        if is_out_of_memory(error):
            self._room.failed(len(rows))
            self._conditions.clear()  # what running rows need, they hold themselves
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
        mixed = mix(without, estimates[index], layout.scale, t[index], EVERYWHERE)  # the others are not in `index`
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
        """Bring pictures and previews to the processor, in one transfer."""
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
