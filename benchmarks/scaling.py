"""Test autoscaling: a minute of load scales the engines from 0 to 1, 2, 1 and 0 replicas, and no request fails.

    python benchmarks/scaling.py [--seconds 60] [--clients 16] [--out FILE]

The application runs on its own Ray with two logical GPUs, one for each engine; /v1/models is polled every half second.
Clients send requests with many steps without a pause; after a 429 response a client waits for the time in Retry-After.
The network is small and has random weights, because only the scaling is measured. The scaling delays are shorter than
ServeConfig's. The exit code is 1 if a request failed, if there were never two engines, or if an engine remained.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import ray
import torch
from ray import serve

from animediffusion.models.bundle import BundleConfig, save_bundle
from animediffusion.models.network.unet import UNetConfig
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.platform.images.codec import encode_png
from animediffusion.serve.deployments import ServeConfig
from animediffusion.serve.server import start

NETWORK = UNetConfig(base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, patch_size=2, head_channels=32)
DELAYS = {"upscale_delay_s": 2, "downscale_delay_s": 5, "downscale_to_zero_delay_s": 10}
PATIENCE_S = 120.0


class Load:
    """Clients of the application, and counts of their responses by status."""

    def __init__(self, url: str) -> None:
        row = make_row(0, 1, 64)
        self.url = url
        self.files = {"sketch": encode_png(row.sketch), "reference": encode_png(row.reference)}
        self.answers: Counter[int] = Counter()
        self.stop = threading.Event()

    def client(self) -> None:
        """Send requests as one client until `stop` is set."""
        data = {"num_inference_steps": "60", "size": "model"}
        with httpx.Client(base_url=self.url, timeout=120, trust_env=False) as client:
            while not self.stop.is_set():
                answer = client.post("/v1/colorize", files=self.files, data=data)
                self.answers[answer.status_code] += 1
                if answer.status_code == 429:
                    self.stop.wait(float(answer.headers["retry-after"]))


def engines(client: httpx.Client) -> int:
    """Return the number of replicas with a loaded model."""
    return sum(one["state"] == "ready" for one in client.get("/v1/models").json()["replicas"])


def watch(client: httpx.Client, seen: list[tuple[float, int]], began: float, until: float, last: int | None) -> None:
    """Record each change of the number of engines, until a given time or until the number is `last`."""
    while time.monotonic() < until:
        number = engines(client)
        if not seen or seen[-1][1] != number:
            seen.append((time.monotonic() - began, number))
            print(f"{seen[-1][0]:6.1f} s: {number} engines", file=sys.stderr)
        if number == last:
            return
        time.sleep(0.5)


def measure(url: str, seconds: float, num_clients: int) -> tuple[list[tuple[float, int]], Counter[int]]:
    """Run the load; return the number of engines over time and the counts of responses by status."""
    load, seen = Load(url), list[tuple[float, int]]()
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        began = time.monotonic()
        watch(client, seen, began, began + 1, None)
        clients = [threading.Thread(target=load.client) for _ in range(num_clients)]
        for thread in clients:
            thread.start()
        watch(client, seen, began, began + seconds, None)
        load.stop.set()
        for thread in clients:
            thread.join()
        seen.append((time.monotonic() - began, seen[-1][1]))
        watch(client, seen, began, time.monotonic() + PATIENCE_S, 0)
    return seen, load.answers


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Print the table; exit with 1 if a request failed or the engines did not scale as expected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--out", type=Path, help="also write the table there")
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Without it, Ray writes one to the home directory.
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        config = BundleConfig(network=NETWORK, image_size=64)
        save_bundle(Path(folder) / "bundle", config.build(), config)
        application = ServeConfig(
            model=str(Path(folder) / "bundle"),
            workspace=Path(folder) / "workspace",
            max_batch=4,
            min_replicas=0,
            max_replicas=2,
            engine_gpus=0,
            **DELAYS,
        )
        seen, answers = measure(start(application, port=free_port()), options.seconds, options.clients)
        serve.shutdown()
    ray.shutdown()
    lines = [f"| {at:.0f} s | {number} |" for at, number in seen]
    head = f"{os.cpu_count()} cores, torch {torch.__version__}, Ray {ray.__version__}; {options.clients} clients"
    text = "\n".join([f"{head} for {options.seconds:.0f} s.", "", "| at | engines |", "|---|---|", *lines, ""])
    text += "\nAnswers: " + ", ".join(f"{count} times {status}" for status, count in sorted(answers.items()))
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    numbers = [number for _, number in seen]
    sys.exit(int(bool(set(answers) - {200, 429}) or max(numbers) < 2 or numbers[-1] != 0))


if __name__ == "__main__":
    main()
