"""How many engines the present work asks for: Ray Serve's autoscaler calls this.

Work is counted in network evaluations still to do, not in requests: a picture of 100 steps is as much as ten of 10, and
one that is nearly finished is nearly nothing. One unit is a picture of its model's default steps that has not begun;
guidance, which evaluates twice, makes it two.
Ray pickles this module by value into its controller, so it imports nothing of ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

PENDING = "pending_pictures"
"""The measure that every engine replica reports, see EngineDeployment.record_autoscaling_stats."""


def engines_for_work(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Engines wanted, before Ray applies its delays and bounds; and no state to keep.

    One for each `target_ongoing_requests` pictures of pending work. Requests that wait in front of the engines count as
    one picture each, as nobody has looked into them; so does everything before the first engine has reported. As long
    as there is anything to do there is one engine.
    """
    reported = (context.aggregated_metrics or {}).get(PENDING, {})
    requests = float(context.total_num_requests)
    work = sum(reported.values()) + float(context.total_queued_requests or 0) if reported else requests
    if work <= 0 and requests <= 0:
        return 0.0, {}
    return max(1.0, work / float(context.config.target_ongoing_requests)), {}
