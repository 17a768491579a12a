"""Send thousands of malformed or hostile requests to the real server, which must withstand all of them unchanged.

    python benchmarks/soak.py [--count 10000] [--threads 16] [--seed 0] [--ray]

The requests contain truncated and damaged images, decompression bombs, wrong types, broken multipart bodies, huge
headers and bytes that are not HTTP; some clients are slow, half-close the connection, reset it or leave. Without --ray
the application runs behind uvicorn in its own process; with --ray it runs on Ray Serve, proxy included. The output
shows the statuses of each kind of request, and the server's memory after a twentieth of the requests, after half and
after all.

The exit code is 1 for any 5xx, for a request that should have been answered and was not, for a slot in the engine that
is still occupied, for a process that ended, for memory growth above 64 MiB, or if the server afterwards colors a sketch
differently than before. The network is small and random, because only the code in front of it is tested.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import multiprocessing
import random
import socket
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import torch
from PIL import Image

from animediffusion.models.bundle import BundleConfig, SamplerDefaults, save_bundle
from animediffusion.models.network.unet import UNetConfig
from animediffusion.platform.api_keys import Keys

UPLOAD_TIMEOUT_S = 2.0
MAX_BODY_BYTES = 1_000_000
ANSWER_S = 30.0
MAX_GROWTH_MIB = 64
BOUNDARY = b"soak"
NO_ANSWER = 0
URL = "http://127.0.0.1:9/latest/meta-data"


def image(kind: str = "PNG", side: int = 24) -> bytes:
    """Return a small drawing as the bytes of an image file."""
    picture = Image.new("RGB", (side, side), "white")
    picture.paste((0, 0, 0), (4, 4, side - 4, 6))
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


GOOD = {kind: image(kind) for kind in ("PNG", "JPEG", "WEBP")}
FILES = tuple(GOOD.values())


def bomb(side: int) -> bytes:
    """Return a valid PNG of side x side white pixels in a few kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" + b"\xff" * ((side + 7) // 8)) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BOMB = bomb(20_000)


def part(name: bytes, data: bytes, filename: bytes | None = b"a.png") -> bytes:
    """Build one part of a multipart body."""
    file = b"" if filename is None else b'; filename="%s"' % filename
    head = b'--%s\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n' % (BOUNDARY, name, file)
    return head + data + b"\r\n"


def form(
    sketch: bytes, reference: bytes | None = None, rest: bytes = b"", *, name: bytes = b"a.png", steps: int = 1
) -> bytes:
    """Build a multipart body; a valid one is small and quick to answer."""
    quick = part(b"size", b"model", None) + part(b"num_inference_steps", b"%d" % steps, None)
    files = part(b"sketch", sketch, name) + part(b"reference", GOOD["PNG"] if reference is None else reference)
    return files + quick + rest + b"--%s--\r\n" % BOUNDARY


def post(body: bytes, key: str, headers: bytes = b"", length: int | None = None) -> bytes:
    """Build a POST request with headers and body."""
    size = b"Content-Length: %d\r\n" % (len(body) if length is None else length)
    kind = b"Content-Type: multipart/form-data; boundary=%s\r\n" % BOUNDARY
    who = b"Authorization: Bearer %s\r\n" % key.encode()
    start = b"POST /v1/colorize HTTP/1.1\r\nHost: soak\r\n"
    return start + kind + size + who + headers + b"\r\n" + body


def get(path: bytes) -> bytes:
    """Build a GET request without a body or an API key."""
    return b"GET %s HTTP/1.1\r\nHost: soak\r\n\r\n" % path


def chunked(body: bytes, key: str) -> bytes:
    """Build a POST request with a chunked body and no Content-Length."""
    whole = post(b"", key).replace(b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n")
    pieces = [body[start : start + 4000] for start in range(0, len(body), 4000)]
    return whole + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def _cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(1, len(data))]


def _damaged(data: bytes, dice: random.Random) -> bytes:
    wrong = bytearray(data)
    for _ in range(dice.randint(1, 8)):
        wrong[dice.randrange(8, len(wrong))] = dice.randrange(256)
    return bytes(wrong)


def _field(dice: random.Random) -> bytes:
    return part(dice.choice(FIELDS), dice.choice(VALUES), None)


def _broken_form(dice: random.Random) -> bytes:
    whole = form(GOOD["PNG"])
    return dice.choice(
        [
            _cut(whole, dice),
            whole.replace(BOUNDARY, b"other"),
            whole.replace(b"form-data", dice.choice([b"", b"\0", b"x" * 9000]), 1),
            part(b"sketch" * 1000, GOOD["PNG"]),
            part(b"sketch", GOOD["PNG"]) * 50,
            b"".join(part(b"f%d" % number, b"1", None) for number in range(500)),
            b"--%s\r\nno header at all\r\n\r\n" % BOUNDARY,
            dice.randbytes(2000),
            b"",
        ]
    )


FIELDS = (b"seed", b"num_inference_steps", b"guidance_scale", b"sampler", b"output", b"callback", b"__class__")
VALUES = (b"1e999", b"nan", b"-1", b"\xff\xfe", b"\0", b"9" * 4000, b"{}", b"../../etc/passwd", URL.encode())
NAMES = (b"../../../tmp/a.png", b"/etc/passwd", b"a\0b.png", b"C:\\\\a.ini", b"x" * 3000, "\u202e.png".encode())
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
OTHERS = (b"", b"hello", SVG, b"GIF89a" + bytes(40), b"%PDF-1.7\n", b"PK\3\4" + bytes(30), GOOD["PNG"][:8] + bytes(500))
PATHS = (
    b"/..%2f..%2fetc/passwd",
    b"/examples/..%2fapi.py",
    b"/examples/%00",
    b"/%ff%fe",
    b"//v1/models",
    b"/v1/models",
)
LONG_PATHS = (b"/" + b"x" * 20_000, b"/?" + b"a" * 20_000)
HEADERS = (
    b"X-Filler: " + b"x" * 40_000,
    b"\r\n".join(b"X-%d: x" % number for number in range(300)),
    b"X-Request-Id: \xff\xfe",
    b"X-Request-Timeout-Seconds: 0.000001",
    b"X-Request-Timeout-Seconds: \xff",
    b"X-Request-Disconnect-Disabled: ?1",
    b"serve_multiplexed_model_id: \xff\r\nX-Session-Id: \xff",
    b"Cookie: " + b"a=b; " * 1000,
)
NO_HTTP = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60),  # A TLS client hello.
    b"GET /\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\r\n" * 50,
    b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    bytes(range(256)),
)

Build = Callable[[random.Random, str], bytes]

CASES: dict[str, tuple[int, str, Build]] = {
    # name: (weight, how it is sent, function of a random generator and a valid key that builds the bytes)
    "truncated image": (10, "send", lambda dice, key: post(form(_cut(dice.choice(FILES), dice)), key)),
    "damaged image": (10, "send", lambda dice, key: post(form(_damaged(dice.choice(FILES), dice)), key)),
    "decompression bomb": (4, "send", lambda _, key: post(form(BOMB), key)),
    "bomb as reference": (4, "send", lambda _, key: post(form(GOOD["PNG"], BOMB), key)),
    "no image": (8, "send", lambda dice, key: post(form(dice.choice(OTHERS)), key)),
    "broken multipart": (10, "send", lambda dice, key: post(_broken_form(dice), key)),
    "hostile field": (8, "send", lambda dice, key: post(form(GOOD["PNG"], rest=_field(dice)), key)),
    "hostile file name": (4, "send", lambda dice, key: post(form(GOOD["PNG"], name=dice.choice(NAMES)), key)),
    "a URL for a file": (3, "send", lambda _, key: post(part(b"sketch", URL.encode(), None) + form(GOOD["PNG"]), key)),
    "body over the limit": (3, "send", lambda _, key: post(form(bytes(MAX_BODY_BYTES)), key)),
    "chunks over the limit": (3, "send", lambda _, key: chunked(form(bytes(2 * MAX_BODY_BYTES)), key)),
    "hostile headers": (6, "send", lambda dice, key: post(form(GOOD["PNG"]), key, dice.choice(HEADERS) + b"\r\n")),
    "hostile path": (6, "send", lambda dice, _: get(dice.choice(PATHS + LONG_PATHS))),
    "wrong key": (4, "send", lambda dice, key: post(form(GOOD["PNG"]), key[: dice.randrange(len(key))])),
    "two lengths": (2, "send", lambda _, key: post(b"0\r\n\r\n", key, b"Transfer-Encoding: chunked\r\n")),
    "no HTTP": (4, "maybe", lambda dice, _: dice.choice(NO_HTTP)),
    "half-closed": (3, "half-close", lambda dice, key: _cut(post(form(GOOD["PNG"]), key), dice)),
    "reset while sending": (3, "reset", lambda dice, key: _cut(post(form(GOOD["PNG"]), key), dice)),
    "slow body": (1, "slow", lambda _, key: post(form(GOOD["PNG"])[:300], key, length=5000)),
    "left before the answer": (4, "leave", lambda _, key: post(form(GOOD["PNG"], steps=100), key)),
}


def exchange(host: str, port: int, how: str, data: bytes) -> int:
    """Send bytes in the manner `how`; return the status of the response, or NO_ANSWER if there is none."""
    with socket.create_connection((host, port), timeout=ANSWER_S) as connection:
        with suppress(ConnectionError):  # The server may answer and close the connection before all bytes are sent.
            connection.sendall(data)
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how == "leave":
            time.sleep(0.01)
        if how in ("reset", "leave"):
            return NO_ANSWER
        if how in ("half-close", "maybe"):
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(OSError):
            while b"\r\n" not in answer and (piece := connection.recv(4096)):
                answer += piece
    words = answer.split(maxsplit=2)
    return int(words[1]) if answer.startswith(b"HTTP/") else NO_ANSWER


@dataclass
class Report:
    """Observed behavior of the server."""

    statuses: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    memory_mib: list[dict[str, float]] = field(default_factory=list)
    taken: int = 0
    """Requests that the engine still holds at the end."""
    same_picture: bool = False

    @property
    def failures(self) -> int:
        """Number of 5xx responses."""
        return sum(count for found in self.statuses.values() for status, count in found.items() if status >= 500)

    @property
    def unanswered(self) -> int:
        """Number of requests that should have been answered and were not."""
        return sum(found[NO_ANSWER] for name, found in self.statuses.items() if CASES[name][1] in ("send", "slow"))

    @property
    def growth_mib(self) -> float:
        """Memory growth of all server processes from the first to the last sample; infinite if one has ended."""
        first, *_, last = self.memory_mib
        return sum(last.get(process, math.inf) - first[process] for process in first)

    @property
    def ok(self) -> bool:
        """Whether the server met all requirements."""
        still = self.taken == 0 and self.same_picture and self.growth_mib <= MAX_GROWTH_MIB
        return still and self.failures == self.unanswered == 0


def attack(url: str, key: str, count: int, seed: int, threads: int, memory: Callable[[], dict[str, float]]) -> Report:
    """Send `count` requests: each case once, and the rest drawn by weight."""
    host, _, port = url.removeprefix("http://").partition(":")
    report, before = Report(), color(url, key)
    draw = random.Random(seed)
    weights = [weight for weight, _, _ in CASES.values()]
    names = [*CASES, *draw.choices([*CASES], weights, k=count - len(CASES))]
    draw.shuffle(names)

    def one(number: int) -> tuple[str, int]:
        name = names[number]
        _, how, build = CASES[name]
        return name, exchange(host, int(port), how, build(random.Random(f"{seed} {number}"), key))

    with ThreadPoolExecutor(threads) as pool:
        for begin, end in itertools.pairwise((0, count // 20, count // 2, count)):
            for name, status in pool.map(one, range(begin, end)):
                report.statuses[name][status] += 1
            report.taken = _taken(url, key)
            report.memory_mib.append(memory())
    report.same_picture = color(url, key) == before
    return report


def color(url: str, key: str) -> bytes:
    """Return the image that a valid request gets."""
    files = {"sketch": GOOD["PNG"], "reference": GOOD["PNG"]}
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
        return client.post("/v1/colorize", files=files, data={"seed": "1"}).raise_for_status().content


def _taken(url: str, key: str) -> int:
    """Return the number of requests that the engine still holds, after up to ten seconds for abandoned ones to end."""
    end = time.monotonic() + 10
    while True:
        answer = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=60)
        taken = sum(one["running"] + one["queued"] for one in answer.json()["replicas"])
        if taken == 0 or time.monotonic() > end:
            return int(taken)
        time.sleep(0.1)


def random_model(folder: Path) -> Path:
    """Write a bundle of a small network with random weights, 32 px, and return its folder."""
    torch.manual_seed(0)
    network = UNetConfig(base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, patch_size=2, head_channels=32)
    config = BundleConfig(network=network, image_size=32, sampler=SamplerDefaults(name="euler", steps=3))
    save_bundle(folder, config.build(), config)
    return folder


def _serve_alone(model: Path, keys: str, port: int) -> None:
    """Run the application behind uvicorn in this process until it is terminated."""
    import uvicorn

    from animediffusion.platform.api_keys import Keyring
    from animediffusion.serve.api import access_log
    from animediffusion.serve.api.app import create_app
    from animediffusion.serve.replica.replica import Replica

    torch.set_num_threads(1)
    access_log.write_to(model.parent / "requests.jsonl")
    replica = Replica()
    assert replica.load("1", model)
    limits = {"max_body_bytes": MAX_BODY_BYTES, "upload_timeout_s": UPLOAD_TIMEOUT_S}
    uvicorn.run(create_app(replica, keyring=Keyring(keys), **limits), port=port, log_level="critical")


@contextmanager
def alone(model: Path, keys: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Run a server without Ray in its own process; yield its URL and a function that measures its memory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=_serve_alone, args=(model, keys, port))
    process.start()
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while time.monotonic() < end and process.is_alive():
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", trust_env=False).is_success:
                break
        time.sleep(0.2)
    try:
        yield url, lambda: {"server": _mib(psutil.Process(process.pid))}
    finally:
        process.terminate()
        process.join()


@contextmanager
def on_ray(model: Path, keys: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Run the application on Ray Serve; yield its URL and a function that measures proxy, ingress and engine memory."""
    from animediffusion.platform.config import Settings
    from animediffusion.serve.deployments import ServeConfig
    from animediffusion.serve.server import running

    workspace = model.parent / "workspace"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    limits = {"max_body_bytes": MAX_BODY_BYTES, "upload_timeout_s": UPLOAD_TIMEOUT_S}
    config = ServeConfig(model=str(model), workspace=workspace, keys=keys, **limits)

    def memory() -> dict[str, float]:
        found: dict[str, float] = {}
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                name = " ".join(process.cmdline())
                if any(sign in name for sign in ("ServeReplica", "ProxyActor")):
                    # Ray appends a dot and the method that is currently running.
                    found[name.split("::")[-1].split(".")[0].strip(": ")] = _mib(process)
        return found

    with running(Settings(workspace=workspace), config, port=port) as url:
        yield url, memory


def _mib(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


def table(report: Report, count: int, seconds: float) -> str:
    """Return the report as Markdown."""
    lines = ["| request | sent | statuses |", "|---|---|---|"]
    for name in CASES:
        found = report.statuses[name]
        shown = ", ".join(f"{status or 'none'}: {number}" for status, number in sorted(found.items()))
        lines.append(f"| {name} | {found.total()} | {shown} |")
    lines += ["", f"{count} requests in {seconds:.0f} s, {count / seconds:.0f} a second", ""]
    lines += ["| what | found | allowed |", "|---|---|---|"]
    for process in report.memory_mib[0]:
        seen = ", ".join(f"{sample.get(process, math.nan):.0f}" for sample in report.memory_mib)
        lines.append(f"| memory of {process}, MiB | {seen} | |")
    lines += [
        f"| growth, MiB | {report.growth_mib:.1f} | {MAX_GROWTH_MIB} |",
        f"| 5xx | {report.failures} | 0 |",
        f"| unanswered | {report.unanswered} | 0 |",
        f"| stuck slots | {report.taken} | 0 |",
        f"| same picture as before | {'yes' if report.same_picture else 'no'} | yes |",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run the requests and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", action="store_true", help="on Ray Serve, proxy included")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, keys = random_model(Path(folder, "model")), str(Path(folder, "keys.json"))
        key = Keys(keys).create("soak")
        with (on_ray if asked.ray else alone)(model, keys) as (url, memory):
            started = time.monotonic()
            report = attack(url, key, asked.count, asked.seed, asked.threads, memory)
            print(table(report, asked.count, time.monotonic() - started), flush=True)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
