"""Autoscaling policy of Ray Serve: the number of engines for the pending work.

Work is counted in remaining network evaluations, not in requests: a picture of 100 steps counts as much as ten pictures
of 10 steps, and a picture that is nearly finished counts almost nothing. One unit is a new picture with the default
steps of its model; a guided picture counts two, because guidance evaluates the network twice. Ray pickles this module
by value into its controller, so the module imports nothing from this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

PENDING = "pending_pictures"
"""Name of the metric that every engine replica reports, see EngineDeployment.record_autoscaling_stats."""


def engines_for_work(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Return the number of engines, before Ray applies its delays and bounds, and an empty state.

    The policy asks for one engine for each `target_ongoing_requests` pictures of pending work. A request in the queue
    in front of the engines counts as one picture, because its steps are not known there. Before an engine has reported,
    every request counts as one picture. The result is at least 1 while any work is pending.
    """
    reported = (context.aggregated_metrics or {}).get(PENDING, {})
    requests = float(context.total_num_requests)
    work = sum(reported.values()) + float(context.total_queued_requests or 0) if reported else requests
    if work <= 0 and requests <= 0:
        return 0.0, {}
    return max(1.0, work / float(context.config.target_ongoing_requests)), {}
