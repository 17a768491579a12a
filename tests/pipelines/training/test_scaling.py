"""How many workers a run has on a cluster, and on what."""

import pytest
import ray

from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.pipelines.training.scaling import cpus_of_a_read, scaling_for
from animediffusion.pipelines.tuning import sampler_search as tune
from animediffusion.pipelines.tuning.schedule_search import trials_at_once
from animediffusion.platform.cluster import cluster
from animediffusion.platform.errors import ClusterError


def scale(has, *overrides, may=None):
    """(workers, whether on GPUs, CPUs of a worker, lines) for a run of 32 rows on a cluster with these resources."""
    scaling, lines = scaling_for(load_recipe("phase1", overrides), has, may or has)
    return scaling.num_workers, scaling.use_gpu, scaling.resources_per_worker["CPU"], lines


def test_a_run_takes_every_gpu_and_without_any_two_workers_of_half_a_cpu():
    assert scale({"CPU": 16, "GPU": 1}) == (1, True, 1.0, [])
    assert scale({"CPU": 64, "GPU": 8}) == (8, True, 1.0, [])
    assert scale({"CPU": 16}) == (2, False, 0.5, [])
    assert scale({"CPU": 16, "GPU": 8}, "use_gpu=false") == (2, False, 0.5, [])


def test_gpus_that_stay_idle_are_named():
    few = scale({"CPU": 64, "GPU": 8}, "batch_size=20")
    assert few == (5, True, 1.0, ["3 of 8 GPUs are idle, batch_size=20 has no larger divisor"])
    fixed = scale({"CPU": 64, "GPU": 8}, "num_workers=2")
    assert fixed == (2, True, 1.0, ["6 of 8 GPUs are idle, num_workers is 2; omit it"])
    none = scale({"CPU": 16, "GPU": 1}, "num_workers=2")
    line = "training runs on CPUs: 1 of 1 GPUs are idle, num_workers is 2; omit it"
    assert none == (2, False, 0.5, [line])


def test_a_cluster_that_is_at_zero_is_waited_for_where_gpus_are_asked_for():
    at_rest, most = {}, {"CPU": 200.0, "GPU": 20.0}
    assert scale(at_rest, "use_gpu=true", "num_workers=8", may=most) == (8, True, 1.0, [])
    line = "the run has one worker, and the cluster can add 20 GPUs; raise num_workers"
    assert scale(at_rest, "use_gpu=true", may=most) == (1, True, 1.0, [line])
    line = "training runs on CPUs: the cluster has no GPU yet and can add 20; set use_gpu=true to wait for them"
    assert scale(at_rest, may=most) == (2, False, 0.5, [line])
    assert scale({"CPU": 15}, "use_gpu=true", "num_workers=8", may=most)[:2] == (8, True)


def test_what_a_cluster_can_never_hold_raises_cluster_error():
    with pytest.raises(ClusterError, match="use_gpu: one GPU for each of 1 workers, the cluster has at most 0; lower"):
        scale({"CPU": 16}, "use_gpu=true")
    with pytest.raises(ClusterError, match="use_gpu: one GPU for each of 8 workers, the cluster has at most 4; lower"):
        scale({}, "use_gpu=true", "num_workers=8", may={"CPU": 60, "GPU": 4})
    with pytest.raises(ClusterError, match="2 workers take 0 of 0 CPUs; lower num_workers or cpus_per_worker"):
        scale({})


def test_workers_on_cpus_are_spread_over_the_nodes_and_workers_on_gpus_share_a_node():
    for has, placement in (({"CPU": 2}, "SPREAD"), ({"CPU": 16, "GPU": 2}, "PACK")):
        assert scaling_for(load_recipe("phase1"), has, has)[0].placement_strategy == placement


@pytest.mark.parametrize(
    ("nodes", "overrides", "cpus"),
    [
        ([16], [], 1.0),
        ([2], [], 1.0),
        ([1], ["num_workers=1"], 0.45),
        ([1], [], 0.45),
        ([1, 1], [], 0.45),
        ([1, 1], ["num_workers=[1,2]"], 0.45),
        ([1, 1, 1], [], 1.0),
        ([4, 1], ["num_workers=4", "cpus_per_worker=1"], 1.0),
        ([1, 1, 1], ["cpus_per_worker=1"], 1.0),
    ],
)
def test_a_read_fits_where_the_workers_leave_room(monkeypatch, nodes, overrides, cpus):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": float(n)}} for n in nodes])
    has = {"CPU": float(sum(nodes))}
    scaling, _ = scaling_for(load_recipe("phase1", overrides), has, has)
    assert cpus_of_a_read(scaling) == pytest.approx(cpus)


@pytest.mark.parametrize(
    ("has", "most", "device"),
    [
        ({"CPU": 16, "GPU": 2}, {"CPU": 16, "GPU": 2}, ("GPU", 2)),
        ({}, {"CPU": 60, "GPU": 4}, ("GPU", 1)),
        ({"CPU": 4}, {"CPU": 4}, ("CPU", 4)),
    ],
)
def test_a_search_of_samplers_uses_gpus_and_asks_an_autoscaler_for_one(monkeypatch, has, most, device):
    monkeypatch.setattr(cluster, "resources", lambda: (has, most))
    assert tune.trial_device() == device


def test_a_search_of_schedules_begins_with_one_trial_where_no_gpu_is_there_yet():
    config, most = load_recipe("phase1", ["use_gpu=true", "num_workers=1"]), {"CPU": 60, "GPU": 4}
    for has, at_once in (({}, 1), (most, 4)):
        assert trials_at_once(scaling_for(config, has, most)[0], has) == at_once
    cpus = {"CPU": 8}
    assert trials_at_once(scaling_for(load_recipe("phase1", ["num_workers=1"]), cpus, cpus)[0], cpus) == 8
