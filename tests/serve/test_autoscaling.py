import subprocess
import sys

import pytest
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve.config import AutoscalingContext

from animediffusion.platform.errors import ConfigError
from animediffusion.serve.autoscaling import PENDING, engines_for_work
from animediffusion.serve.deployments import ServeConfig, autoscaling_config
from animediffusion.serve.ray_backend import mean_shares


def context(pending: dict[str, float] | None, *, queued: float = 0, requests: float = 0, max_batch: int = 8):
    """What Ray Serve gives a policy."""
    return AutoscalingContext(
        deployment_id="engine",
        deployment_name="engine",
        app_name="app",
        current_num_replicas=len(pending or {}),
        target_num_replicas=len(pending or {}),
        running_replicas=list(pending or {}),
        total_num_requests=requests,
        total_queued_requests=queued,
        aggregated_metrics={} if pending is None else {PENDING: pending},
        raw_metrics={},
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=9,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=autoscaling_config(ServeConfig(max_batch=max_batch)),
    )


@pytest.mark.parametrize(
    ("situation", "engines"),
    [
        (context({"a": 0.0}), 0),
        (context({"a": 0.5}, requests=1), 1),
        (context({"a": 8.0}, requests=16), 1),
        (context({"a": 20.0}, requests=4), 2.5),
        (context({"a": 8.0, "b": 0.1}, requests=9), 8.1 / 8),
        (context({"a": 12.0}, queued=12, requests=28), 3),
        (context(None, requests=24), 3),
        (context({"a": 0.0}, requests=2), 1),
        (context({"a": 4.0}, requests=2, max_batch=1), 4),
    ],
)
def test_engines_are_wanted_for_the_work_and_not_for_the_requests(situation, engines):
    assert engines_for_work(situation) == (pytest.approx(engines), {})


def test_rays_controller_can_run_the_policy_without_this_package():
    # As Ray does it: cloudpickled here, loaded where nothing of ours can be imported.
    policy = autoscaling_config(ServeConfig()).policy
    assert _resolve_policy_callable(policy)(context({"a": 16.0}, requests=9)) == (2.0, {})
    code = (
        "import sys, cloudpickle\n"
        "sys.path[:] = [path for path in sys.path if 'src' not in path]\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
        "policy = cloudpickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "print(policy.__name__, 'animediffusion' in sys.modules)"
    )
    pickled = policy.get_serialized_policy_def().hex()
    done = subprocess.run([sys.executable, "-c", code, pickled], capture_output=True, text=True, env={"PYTHONPATH": ""})
    assert done.stdout.split() == ["engines_for_work", "False"], done.stderr


@pytest.mark.parametrize(("gpus", "fits"), [(0, True), (0.25, True), (1, True), (2, True), (1.5, False), (-1, False)])
def test_an_engine_takes_a_part_of_a_gpu_or_whole_ones(gpus, fits):
    if fits:
        assert ServeConfig.check({"engine_gpus": gpus}).engine_gpus == gpus
    else:
        with pytest.raises(ConfigError, match="engine_gpus"):
            ServeConfig.check({"engine_gpus": gpus})


def test_the_traffic_of_all_replicas_is_their_mean():
    assert mean_shares([]) == {}
    assert mean_shares([{"1": 1.0}, {}]) == {"1": 1.0}
    assert mean_shares([{"2": 0.2, "1": 0.8}, {"1": 1.0}]) == {"1": 0.9, "2": 0.1}
    assert mean_shares([{"2": 1.0, "1": 0.0}]) == {"2": 1.0}
