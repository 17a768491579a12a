"""A bucket of drawings is colored on two machines, one of which is lost; then corrections improve the model.

    PYTHONPATH=tests python tests/infra/loop.py [--drawings 10000] [--corrections 200] [--sheet FILE.png]

The machines are those of machines.py. Simulated artists (tests/artists.py) correct what the served champion makes of
their drawings, which are in the bucket like all others. Prints every command and every stage with the time on stderr,
and at the end, as JSON, what was seen.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import httpx
import numpy as np
import yaml
from artists import TOO_FAR, Pixels, distance, draw_signed_request
from machines import ROOT, WAIT_S, Network, network, run_in_namespaces, until
from PIL import Image
from uploads import upload_folder

from animediffusion.pipelines.synthetic.dataset import synthesize
from animediffusion.pipelines.synthetic.faces import draw, random_character, random_geometry
from animediffusion.platform.corrections.store import Corrections
from animediffusion.platform.images.codec import decode_rgb, encode_png
from animediffusion.platform.storage import storage

SIZE = 128
"""Side of the drawings in pixels: that of the starter model."""
SCENE = 20
"""Drawings of one character."""
FACES = 3000
"""Drawings that the improved model rehearses."""
BUCKET, CORRECTIONS = "drawings", "s3://bucket/corrections"
IN, CAST, OUT = f"s3://{BUCKET}/in", f"s3://{BUCKET}/cast", f"s3://{BUCKET}/out"
LOST_AT = 0.4
"""Share of the pictures after which a machine is lost."""
SAMPLE, SHOWN = 5, 8
"""Pictures that are compared with those of one process, and pictures on the sheet."""
ARTISTS = ("aiko", "botan", "chiyo", "daiki", "emi")
"""Each has a key, because a server takes 60 corrections of a key in a minute."""
PERCENT = 50
TRAINING = "batch_size=16 num_workers=1"
"""The batch is half as large as that of the recipe, whose other settings are used."""


def say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


class Stages:
    """The seconds that each stage takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        say(f"== {name}")
        begun = time.monotonic()
        found = work()
        self.seconds[name] = round(time.monotonic() - begun, 1)
        say(f"== {name}: {self.seconds[name]} s")
        return found


# --- the bucket -------------------------------------------------------------------------------------------------------


def artists_drawing(number: int) -> str:
    return f"artist-{number:05d}.png"


def fill_bucket(count: int, artists: int) -> None:
    """Put the drawings, a reference for each character and cast.csv into the bucket.

    The first `artists` drawings are requests of artists; the others are scenes of drawn faces.
    """
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    # With versions, the bucket itself says how often a picture was written.
    boto3.client("s3").put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    jobs = [(start, min(start + SCENE, artists), True) for start in range(0, artists, SCENE)]
    jobs += [(start, min(start + SCENE, count), False) for start in range(artists, count, SCENE)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = [row for some in pool.map(put_drawings, *zip(*jobs, strict=True)) for row in some]
    lines = ["sketch,reference", *(",".join(row) for row in rows)]
    storage.write_bytes(f"{CAST}/cast.csv", "\n".join(lines).encode())


def put_drawings(start: int, end: int, of_artists: bool) -> list[tuple[str, str]]:
    """Write some drawings and their references; return the names of both."""
    rows, store = [], boto3.client("s3")
    character = random_character(np.random.default_rng([78, start]))
    for number in range(start, end):
        rng = np.random.default_rng([79, number])
        if of_artists:
            request = draw_signed_request(number, SIZE)
            name, reference, sketch, colors = artists_drawing(number), f"artist-{number:05d}.png", *request[:2]
        else:
            name, reference = f"scene-{start:05d}-{number - start:02d}.png", f"scene-{start:05d}.png"
            sketch, colors = draw(character, random_geometry(rng), SIZE)[1], None
            if number == start:
                colors = draw(character, random_geometry(rng), SIZE)[0]
        store.put_object(Bucket=BUCKET, Key=f"in/{name}", Body=encode_png(sketch))
        if colors is not None:
            store.put_object(Bucket=BUCKET, Key=f"cast/{reference}", Body=encode_png(colors))
        rows.append((name, reference))
    return rows


def pictures() -> dict[str, tuple[str, datetime]]:
    """Return the ETag and the time of each finished picture, by name."""
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="out/")
    found = (one for page in pages for one in page.get("Contents", ()))
    return {one["Key"]: (one["ETag"], one["LastModified"]) for one in found if not one["Key"].endswith(".color.png")}


def written() -> Counter[str]:
    """Return how often each picture was written, by name."""
    pages = boto3.client("s3").get_paginator("list_object_versions").paginate(Bucket=BUCKET, Prefix="out/")
    keys = (one["Key"] for page in pages for one in page.get("Versions", ()))
    return Counter(key for key in keys if not key.endswith(".color.png"))


# --- commands ---------------------------------------------------------------------------------------------------------


class Command:
    """A command on the front machine whose output is logged line by line."""

    def __init__(self, there: Network, line: str) -> None:
        say(f"$ {line}")
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = there.front.start(*shlex.split(line), **output)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or []:
            self.lines.append(line.rstrip())
            say(f"  {line.rstrip()}")

    def wait(self) -> list[str]:
        """Return the lines of the output."""
        code = self.process.wait()
        self._reader.join()
        if code:
            raise RuntimeError(f"a command ended with {code}: {self.lines[-1:]}")
        return self.lines


def run(there: Network, line: str) -> list[str]:
    return Command(there, line).wait()


# --- coloring ---------------------------------------------------------------------------------------------------------


def color_bucket(there: Network, count: int) -> dict[str, Any]:
    """Color the bucket as a job, and lose a machine in the middle."""
    words = f"colorize {IN} --references {CAST}/cast.csv --out {OUT} --style painted"
    job = Command(there, f"animediffusion jobs submit --wait -- {words}")
    begun, counts = time.monotonic(), []
    before: dict[str, tuple[str, datetime]] = {}
    pause = min(15.0, 0.5 + count / 700)  # a list of all pictures takes seconds of the server's time

    def at() -> float:
        return time.monotonic() - begun

    while job.process.poll() is None and (not counts or counts[-1][1] < count):
        counts.append((at(), len(done := pictures())))
        if not before and len(done) >= LOST_AT * count:
            before, lost = done, at()
            there.lose("first")
            say(f"the machine `first` is lost after {len(done)} pictures")
        time.sleep(pause)
    lines, ended = job.wait(), at()
    after = pictures()
    first = next(point for point in counts if point[1])
    rest = [(seconds, number) for seconds, number in counts if seconds >= lost]
    changed = [name for name, made in before.items() if after.get(name) != made]
    twice = [name for name, times in written().items() if times > 1]
    return {
        "drawings": count,
        "pictures": len(after),
        "lost_after": len(before),
        "changed_after_the_loss": changed,
        "written_twice": twice,
        "said": next(line for line in reversed(lines) if line.startswith("colored ")),
        "start_s": first[0],
        "lost_at_s": lost,
        "seconds": ended,
        "pictures_per_s_before": (len(before) - first[1]) / (lost - first[0]),
        "pictures_per_s_after": (rest[-1][1] - len(before)) / (rest[-1][0] - lost),
        "longest_pause_s": longest_pause(rest),
    }


def longest_pause(counts: list[tuple[float, int]]) -> float:
    """Return the longest time without a new picture."""
    longest, (since, number) = 0.0, counts[0]
    for seconds, now in counts:
        longest = max(longest, seconds - since)
        if now > number:
            since, number = seconds, now
    return longest


def compare_with_one_process(there: Network, names: list[str]) -> list[str]:
    """Color some drawings in one process; return those whose picture has other bytes than the job's."""
    sketches = " ".join(f"{IN}/{name}" for name in names)
    run(there, f"animediffusion colorize {sketches} --references {CAST}/cast.csv --out here --style painted")
    here = Path(f"/proc/{there.front.pid}/root{there.front.home}/here")
    files = [file for name in names for file in (name, name.replace(".png", ".color.png"))]
    return [name for name in files if (here / name).read_bytes() != storage.read_bytes(f"{OUT}/{name}")]


# --- the loop ---------------------------------------------------------------------------------------------------------


def begin_champion(there: Network, folder: Path) -> None:
    """Make the starter model the champion, after its evaluation on drawn faces."""
    synthesize(str(folder / "drawn"), FACES, SIZE, workers=2)
    upload_folder(folder / "drawn", "s3://bucket/drawn")
    run(there, f"animediffusion data ingest s3://bucket/drawn s3://bucket/faces --size {SIZE}")
    run(there, "animediffusion models register starter")
    run(there, "animediffusion evaluate models:/animediffusion/1 s3://bucket/faces")
    run(there, "animediffusion models promote 1")


def key_of(there: Network, artist: str) -> str:
    lines = run(there, f"animediffusion keys create {artist} --json")
    return next(json.loads(line)["key"] for line in lines if line.startswith("{"))


def deploy(there: Network) -> str:
    """Serve with corrections; return the address."""
    config = yaml.safe_load((ROOT / "infra/serve.yaml").read_text())
    config["applications"][0]["args"] |= {"engine_gpus": 0, "engine_cpus": 0.25, "num_threads": 1}
    say(f"$ serve deploy serve.yaml  # args: {config['applications'][0]['args']}")
    there.deploy(config)
    return f"http://{there.front.address}:8000"


class Answer(NamedTuple):
    version: str
    request_id: str
    picture: Pixels


class Artists:
    """Artists who send their drawings of the bucket one after the other, and correct what is too far from their taste.

    Args:
        url: address of the server.
        keys: a key of each artist.
    """

    def __init__(self, url: str, keys: list[str]) -> None:
        self.clients = [
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=WAIT_S, trust_env=False)
            for key in keys
        ]
        self.drawn = 0
        self.answered, self.corrected = Counter[str](), Counter[str]()

    def color(self, number: int) -> Answer:
        """Color the drawing of this number as it is in the bucket."""
        name, client = artists_drawing(number), self.clients[number % len(self.clients)]
        files = {"sketch": storage.read_bytes(f"{IN}/{name}"), "reference": storage.read_bytes(f"{CAST}/{name}")}
        found = client.post("/v1/colorize", files=files, data={"style": "painted", "seed": "0"}).raise_for_status()
        return Answer(found.headers["X-Model-Version"], found.headers["X-Request-Id"], decode_rgb(found.content))

    def work(self, count: int) -> None:
        """Color the next drawings, and correct those whose hair has another color than the artist wants."""
        with ThreadPoolExecutor(len(self.clients)) as pool:
            made = list(pool.map(self._one, range(self.drawn, self.drawn + count)))
        self.drawn += count
        for version, was_corrected in made:
            self.answered[version] += 1
            self.corrected[version] += was_corrected

    def _one(self, number: int) -> tuple[str, bool]:
        answer, request = self.color(number), draw_signed_request(number, SIZE)
        if distance(request, answer.picture) <= TOO_FAR:
            return answer.version, False
        client, files = self.clients[number % len(self.clients)], {"corrected": encode_png(request.wanted)}
        while True:
            found = client.post("/v1/corrections", files=files, data={"request_id": answer.request_id})
            if found.status_code == 201:
                return answer.version, True
            if found.status_code != 429:
                raise RuntimeError(f"a correction was answered with {found.status_code}: {found.text}")
            time.sleep(float(found.headers["Retry-After"]))


def rates(artists: Artists) -> dict[str, Any]:
    """Return the answers and corrections by version, once the server has written all of its counts."""
    seen = {version: [number, artists.corrected[version]] for version, number in artists.answered.items()}

    def counted() -> dict[str, list[int]]:
        return {version: list(counts) for version, counts in Corrections(CORRECTIONS).counts().items()}

    until(lambda: counted() == seen)
    say(f"answered and corrected by version: {seen}")
    return seen


def decisions(lines: list[str]) -> list[str]:
    """Return the lines of the output of improve that say what it decided."""
    return [line for line in lines if line.startswith(("promote version", "end canary", "refuse", "canary", "wait"))]


def improve(there: Network, stages: Stages, artists: Artists, given: argparse.Namespace, most: int) -> dict[str, Any]:
    """Correct, improve, correct the canary's pictures, and improve again."""

    def correct() -> None:
        while sum(artists.corrected.values()) < given.corrections:
            artists.work(min(20, given.corrections - sum(artists.corrected.values())))

    stages.run("corrections", correct)
    found: dict[str, Any] = {"corrections": sum(artists.corrected.values()), "counts": rates(artists)}
    settings = f"{TRAINING} max_steps={given.steps} {given.settings} rehearse=s3://bucket/faces"
    words = f"improve {settings} storage=s3://bucket/runs --datasets s3://bucket/data --percent {PERCENT}"
    words += f" --min-answered {given.answers}"
    again = f"animediffusion jobs submit --wait -- {words}"
    found["improve"] = decisions(stages.run("improve", lambda: run(there, again)))[-1]
    if not found["improve"].startswith("canary"):
        return found

    def correct_both() -> None:
        while artists.answered["2"] < given.answers and artists.drawn + 20 <= most:
            artists.work(20)

    stages.run("canary", correct_both)
    found["canary_counts"] = rates(artists)
    run(there, "animediffusion models canary")
    found["improve_again"] = decisions(stages.run("improve again", lambda: run(there, f"{again} --min-new {most}")))
    run(there, "animediffusion models history")
    if found["improve_again"][0].startswith("promote"):
        stages.run("the server follows", lambda: until(lambda: artists.color(0).version == "2"))
    return found


def draw_sheet(artists: Artists, path: str) -> None:
    """Draw a row for each of: drawing, reference, picture of the bucket, picture now, and what the artist wants."""
    columns = []
    for number in range(SHOWN):
        name, request = artists_drawing(number), draw_signed_request(number, SIZE)
        before = decode_rgb(storage.read_bytes(f"{OUT}/{name}"))
        sketch = np.repeat(request.sketch[:, :, None], 3, axis=2)
        after = artists.color(number).picture
        columns.append(np.concatenate([sketch, request.reference, before, after, request.wanted]))
    Image.fromarray(np.concatenate(columns, axis=1)).save(path)


def main() -> None:
    given = arguments()
    begun, stages = time.monotonic(), Stages()
    artists_count = SCENE * -(-int(1.3 * given.corrections + 3 * given.answers) // SCENE)
    count = max(given.drawings, artists_count)
    environment = {"ANIMEDIFFUSION_CORRECTIONS": CORRECTIONS}
    with (
        tempfile.TemporaryDirectory(prefix="loop-", dir="/tmp") as name,
        network(Path(name), ("front", "first"), cpus=2, gpus=0, environment=environment) as there,
    ):
        stages.seconds["start"] = round(time.monotonic() - begun, 1)
        say(f"two machines: {list(there.machines)}")
        stages.run("drawings", lambda: fill_bucket(count, artists_count))
        stages.run("champion", lambda: begin_champion(there, Path(name)))
        found = {"colored": stages.run("coloring", lambda: color_bucket(there, count))}
        say(json.dumps(found))
        names = [artists_drawing(0), artists_drawing(1), *sorted(Path(one).name for one in pictures())[-SAMPLE + 2 :]]
        found["other_bytes"] = stages.run("in one process", lambda: compare_with_one_process(there, names))
        say(f"other bytes than in one process: {found['other_bytes']}")
        keys = [key_of(there, artist) for artist in ARTISTS]
        url = stages.run("deploy", lambda: deploy(there))
        artists = Artists(url, keys)
        found |= improve(there, stages, artists, given, artists_count)
        found["version"] = artists.color(0).version
        if given.sheet:
            draw_sheet(artists, given.sheet)
    print(json.dumps({**found, "stages": stages.seconds, "seconds": round(time.monotonic() - begun, 1)}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=int, default=10_000)
    parser.add_argument("--corrections", type=int, default=200)
    parser.add_argument("--answers", type=int, default=100, help="answers of each version before the canary is decided")
    parser.add_argument("--steps", type=int, default=300, help="steps of the training")
    parser.add_argument("--settings", default="", help="further settings of the training")
    parser.add_argument("--sheet", help="PNG with examples")
    return parser.parse_args()


if __name__ == "__main__":
    run_in_namespaces(__file__, main)
