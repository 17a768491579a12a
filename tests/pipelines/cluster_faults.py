"""Trains on a cluster of three nodes that loses a worker, and two nodes, one after a warning; prints JSON.

    PYTHONPATH=tests python tests/pipelines/cluster_faults.py DATASET WORKSPACE

This is a separate process because a test session has only one Ray, and this script removes nodes from its Ray.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

# Ray reads these variables when it is imported.
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1"
os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.2"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_enable_metrics_collection"] = "0"  # noqa: SIM112 - Ray spells it so

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from tiny import NETWORK

from animediffusion.pipelines.training import driver as training
from animediffusion.pipelines.training.checkpoints import list_steps
from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.platform.cluster import cluster, ray_compat
from animediffusion.platform.config import Settings

# Workers synchronize every 10 steps and EVERY is not a multiple of 10, so a save after a warning is not a regular one.
EVERY = 27
COMPARED, LAST = 3 * EVERY, 4 * EVERY
"""Step until which one run loses what it can lose and the other one nothing, and the last step of both."""
RECIPE = f"""{NETWORK}optimizer: {{warmup_steps: 3, muon_learning_rate: 0.02}}
sampler: {{steps: 2}}
batch_size: 4
cpus_per_worker: 2
max_steps: {LAST}
checkpoint_every: {EVERY}
keep_checkpoints: 100
log_every: 1
num_samples: 0
"""
WAIT_S = 600
CPUS = 3


class Stage:
    """A cluster, and training runs on it that are disturbed."""

    def __init__(self, data, workspace):
        cluster.POLL_S = 0.2
        self.settings = Settings(workspace=workspace)
        self.step = 0
        """The step that the driver saw last."""
        self.recipe = workspace / "tiny.yaml"
        self.recipe.parent.mkdir(parents=True, exist_ok=True)
        self.recipe.write_text(f"data: {data}\n{RECIPE}")
        # A log monitor would read every log file ten times a second, for nobody.
        node = {"num_cpus": CPUS, "include_log_monitor": False, "setup_worker_path": str(ray_compat.SETUP_WORKER)}
        self.cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **node})
        # Each node has room for one of the two workers. The head, which has the driver, is never lost.
        self.nodes = [self.cluster.add_node(**node) for _ in range(2)]
        ray.init(address=self.cluster.address, log_to_driver=False)

    def run(self, name, script, **values):
        """Train; `script` is called in a thread, with a function that waits until a step is reported."""
        self.step = 0
        config = load_recipe(str(self.recipe), [f"name={name}", *(f"{k}={v}" for k, v in values.items())])

        def until(step):
            wait_for(lambda: self.step >= step, f"step {step} was not seen")

        def act():
            try:
                script(until)
            except BaseException:
                traceback.print_exc()
                os._exit(1)  # otherwise the run would wait forever

        thread = threading.Thread(target=act)
        thread.start()
        reports = []

        def report(now):
            reports.append(now)
            self.step = now.step

        result = training.train(self.settings, config, report)
        thread.join()
        return result, reports

    def weights(self, name, step):
        return (self.settings.workspace / "runs" / name / f"checkpoints/step-{step:08d}/state.safetensors").read_bytes()

    def steps(self, name):
        return list_steps(str(self.settings.workspace / "runs" / name / "checkpoints"))

    def victim(self):
        """Return a node that may be lost and runs a training worker."""
        parents = {process.ppid() for process in workers()}
        return next(node for node in self.nodes if node.all_processes["raylet"][0].process.pid in parents)

    def lose(self, node):
        """Remove a node without a graceful shutdown."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def warn(self, node, seconds):
        """Announce the end of a node, as a cloud does before it reclaims a machine: a faster `ray drain-node`."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int(1000 * (time.time() + seconds))
        client = ray._raylet.GcsClient(address=self.cluster.address)
        accepted, why_not = client.drain_node(node.node_id, reason, "spot", deadline_ms)
        assert accepted, why_not


def workers():
    """Return the processes of training workers that this script's cluster started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # the process may just have ended
            if "RayTrainWorker" in " ".join(process.cmdline()):  # It is empty for a process that has been killed.
                found.append(process)
    return found


def wait_for(condition, what):
    end = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.01)


def main(data, workspace):
    stage = Stage(data, Path(workspace))

    def storm(until):
        until(EVERY + 1)
        before = {process.pid for process in workers()}
        os.kill(min(before), signal.SIGKILL)
        wait_for(lambda: len({process.pid for process in workers()} - before) == 2, "the workers were not replaced")
        until(stage.step + 1)  # The run continues, so that the lost node costs a restart of its own.
        node = stage.victim()
        stage.warn(node, 60)
        wait_for(lambda: any(step % EVERY for step in stage.steps("storm")), "no checkpoint was saved after a warning")
        stage.lose(node)

    stormy, reports = stage.run("storm", storm)

    def lose_a_node(until):
        until(COMPARED + 3)
        stage.lose(stage.victim())

    shrunk, shrunk_reports = stage.run("elastic", lose_a_node, num_workers="[1,2]")
    calm_workers = {now.workers for now in shrunk_reports if now.metrics and now.step <= COMPARED}
    print(
        json.dumps(
            {
                "equal": stage.weights("elastic", COMPARED) == stage.weights("storm", COMPARED),
                "steps": [stormy.steps, shrunk.steps],
                "off_the_beat": [step for step in stage.steps("storm")[:-1] if step % EVERY],
                "warnings": reports[-1].warnings,
                "workers": [*calm_workers, shrunk.num_workers],
            }
        ),
        flush=True,
    )
    ray.shutdown()
    stage.cluster.shutdown()
    os._exit(0)  # Ray's clients would look for the control store for a quarter of a minute


if __name__ == "__main__":
    main(*sys.argv[1:])
