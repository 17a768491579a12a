"""Kill a training run repeatedly at random moments, and compare its weights with those of an undisturbed run.

    python benchmarks/chaos.py --data URI [--kills 20] [--phases 1 2] [--interval 10] [--seed 0] [--out DIR]

Half of the kills hit a worker (Ray restarts the worker group), half hit the driver and its entire Ray (the same command
is run again). The moment of a kill is random, both in steps and within a step. Each phase gets its share of the kills
and its own run. The table shows kills, recoveries, the largest number of steps repeated after a kill, and whether the
weights are bit-identical. The exit code is 1 if a kill or a recovery is missing, if the weights differ, or if more than
one checkpoint interval was repeated. The network is small, because the benchmark tests recovery, not arithmetic. It
runs two workers on the CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from animediffusion.pipelines.training.checkpoints import latest_step

RECIPE = """
network:
  base_channels: 32
  channel_multipliers: [1]
  num_res_blocks: 1
  patch_size: 4
  head_channels: 32
  reference_channels: 32
optimizer: {{warmup_steps: 3, muon_learning_rate: 0.02}}
sampler: {{steps: 2}}
batch_size: 4
log_every: 1
num_samples: 0
checkpoint_every: {interval}
data: {data}
"""
PHASE_2 = "objective: {name: reconstruction}\n"
STUCK_S = 300.0
"""A run counts as lost if it does not reach the awaited step within this time."""


class Run:
    """A training process and the last step that it reported."""

    def __init__(self, workspace: Path, recipe: Path, overrides: list[str]) -> None:
        self.place = str(workspace / "runs" / overrides[0].removeprefix("name=") / "checkpoints")
        self._command = [sys.executable, __file__, "--drive", str(workspace), str(recipe), *overrides]
        self.step = 0
        self.result: dict[str, Any] | None = None
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            message = json.loads(line)
            self.step = message.get("step", self.step)
            self.result = message.get("result", self.result)

    def wait(self, step: int | None) -> bool:
        """Wait until the run reports this step (None: until it ends); return False if it does not get there in time."""
        end = time.monotonic() + STUCK_S
        while step is None or self.step < step:
            if self.result is not None or time.monotonic() > end or self.process.poll() not in (None, -9):
                return False
            time.sleep(0.005)
        return True

    def workers(self) -> list[psutil.Process]:
        """Return Ray Train's worker processes among the descendants of this driver."""
        found = []
        with suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error, IndexError):
                    if "RayTrainWorker" in process.cmdline()[0]:
                        found.append(process)
        return found

    def _hold(self, workers: list[psutil.Process]) -> None:
        """Pause the workers until all steps they reported have arrived, so that the step of the kill is known."""
        for process in workers:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGSTOP)
        last = -1
        while self.step != last:
            last = self.step
            time.sleep(0.5)

    def kill(self, whom: str, rng: random.Random) -> tuple[int, int]:
        """Send SIGKILL; return the last step before it and the step that the run will resume from.

        Raises:
            RuntimeError: if no worker is running.
        """
        workers = self.workers()
        if not workers:
            raise RuntimeError("no worker to kill")
        self._hold(workers)
        if whom == "driver":
            family = psutil.Process(self.process.pid).children(recursive=True)
            before = self.step
            self.process.kill()
            self.process.wait()
            for process in family:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(family, timeout=60)
            after = latest_step(self.place)
            self.step = 0
            self._start()
            return before, after
        before, victim = self.step, rng.choice(workers)
        victim.kill()
        for process in workers:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        self.step = 0
        return before, latest_step(self.place)


def storm(run: Run, kills: int, interval: int, rng: random.Random) -> dict[str, int]:
    """Kill a run up to `kills` times; return the numbers of kills and recoveries, and the most steps repeated."""
    killed, recovered, most_repeated, at = 0, 0, 0, 0
    for number in range(kills):
        whom = ("worker", "driver")[number % 2]
        if not run.wait(at + rng.randint(1, 2 * interval)):
            break
        time.sleep(rng.random() * 0.2)
        before, at = run.kill(whom, rng)
        killed += 1
        back = run.wait(at + 1)
        recovered += back
        most_repeated = max(most_repeated, before - at)
        print(f"kill {killed}: {whom} at step {before}, back at {at}: {'ok' if back else 'LOST'}", file=sys.stderr)
    return {"kills": killed, "recoveries": recovered, "repeated": most_repeated}


def one_phase(phase: int, args: argparse.Namespace, parent: str | None, kills: int) -> tuple[dict[str, Any], str]:
    """Train an undisturbed and a disturbed run; return the table's row and the undisturbed run's bundle."""
    workspace = args.out.resolve()
    workspace.mkdir(parents=True, exist_ok=True)
    recipe = workspace / f"phase{phase}.yaml"
    recipe.write_text(RECIPE.format(interval=args.interval, data=args.data) + (PHASE_2 if phase == 2 else ""))
    common = [f"max_steps={2 * args.interval * (kills + 2)}", f"max_failures={kills}"]
    common += [f"init_from={parent}"] if parent else []
    calm = Run(workspace, recipe, [f"name=calm-{phase}", *common])
    calm.wait(None)
    stormy = Run(workspace, recipe, [f"name=storm-{phase}", *common])
    counts = storm(stormy, kills, args.interval, random.Random(args.seed + phase))
    stormy.wait(None)
    if calm.result is None or stormy.result is None:
        return {"phase": phase, **counts, "equal": False}, ""
    states = [
        (Path(run.place) / f"step-{run.result['steps']:08d}" / "state.safetensors").read_bytes()
        for run in (calm, stormy)
        if run.result
    ]
    return {"phase": phase, **counts, "equal": states[0] == states[1]}, str(calm.result["bundle"])


def drive(workspace: str, recipe: str, *overrides: str) -> None:
    """Train in this process, and print one JSON line for each progress report."""
    from animediffusion.pipelines.training import driver as training
    from animediffusion.pipelines.training.recipe import load_recipe
    from animediffusion.pipelines.training.reporting import TrainProgress
    from animediffusion.platform.cluster import cluster
    from animediffusion.platform.config import Settings

    training.POLL_S = 0.02
    settings = Settings(workspace=Path(workspace))
    out = sys.stdout
    sys.stdout = sys.stderr
    cluster.connect(settings)

    def report(now: TrainProgress) -> None:
        print(json.dumps({"step": now.step}), file=out, flush=True)

    result = training.train(settings, load_recipe(recipe, list(overrides)), report)
    print(json.dumps({"result": result.to_json()}), file=out, flush=True)


def main() -> None:
    """Run the benchmark described at the top of this file."""
    if sys.argv[1:2] == ["--drive"]:
        drive(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="URI of a dataset")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--phases", nargs="+", type=int, choices=[1, 2], default=[1, 2])
    parser.add_argument("--interval", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("chaos"))
    args = parser.parse_args()
    results, parent = [], None
    for number, phase in enumerate(args.phases):
        share = args.kills * (number + 1) // len(args.phases) - args.kills * number // len(args.phases)
        found, bundle = one_phase(phase, args, parent if phase == 2 else None, share)
        parent = bundle or None
        results.append(found)
    print("| phase | kills | recoveries | most steps repeated | checkpoint interval | weights equal |")
    print("|---|---|---|---|---|---|")
    for r in results:
        equal = "yes" if r["equal"] else "NO"
        print(f"| {r['phase']} | {r['kills']} | {r['recoveries']} | {r['repeated']} | {args.interval} | {equal} |")
    good = all(r["equal"] and r["kills"] == r["recoveries"] and r["repeated"] <= args.interval for r in results)
    sys.exit(0 if good and sum(r["kills"] for r in results) == args.kills else 1)


if __name__ == "__main__":
    main()
