"""Runs programs of an image without a container engine.

A container consists of Linux namespaces and an overlay over the image's files, with its own /dev/shm and without
capabilities. Needs root, in a process that was started with NAMESPACES.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

NAMESPACES = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""Prefix of a command that may run containers; all its containers end when the command ends."""
ADDRESS = "10.88.0.2"
HOSTS = f"127.0.0.1 localhost postgres redis minio\n{ADDRESS} pod mlflow ray\n"
PATIENCE_S = 1200
"""Timeout for a program to end, on a machine with other work."""

# A container from the image $1. It keeps what it writes in $2, and has $3 of shared memory, the user $4 and the in-
# memory directories $5; its root is read-only if $6 is ro. DNS queries fail immediately, because no name server
# listens.
CONTAINER = """set -e
mkdir -p "$2/upper" "$2/work" "$2/root"
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
cd "$2/root"
cat "$2/hosts" > etc/hosts
rm -f etc/resolv.conf
echo nameserver 127.0.0.1 > etc/resolv.conf
mount -t proc proc proc
mount -t tmpfs -o mode=755 dev dev
for name in null zero full random urandom tty; do touch "dev/$name"; mount --bind "/dev/$name" "dev/$name"; done
mkdir -m 1777 dev/shm
mount -t tmpfs -o "size=$3,mode=1777" shm dev/shm
ln -s /proc/self/fd dev/fd
for place in $5; do mkdir -p ".$place"; mount -t tmpfs -o "uid=$4,gid=$4,mode=770" tmpfs ".$place"; done
[ "$6" != ro ] || mount -o remount,ro .
user=$4
shift 6
exec chroot . setpriv "--reuid=$user" "--regid=$user" --clear-groups --no-new-privs --bounding-set=-all \\
    --inh-caps=-all env -i "$@"
"""


@dataclass
class Container:
    """Settings with which a program of the image runs."""

    image: Path
    variables: dict[str, str]
    folder: Path
    user: int = 1000
    shm: str = "64m"
    memory: list[str] = field(default_factory=list)
    """In-memory directories that the user may write to."""
    read_only: bool = False

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Start a program in a new container."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        place.chmod(0o755)
        (place / "hosts").write_text(HOSTS)
        own = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "sh", "-c", CONTAINER, "sh"]
        own += [str(self.image), str(place), self.shm, str(self.user), " ".join(self.memory)]
        own += ["ro" if self.read_only else "rw", *(f"{name}={value}" for name, value in self.variables.items())]
        return subprocess.Popen([*own, *command], text=True, **options)

    def run(self, *command: str) -> str:
        """Run a program and return its output.

        Raises:
            RuntimeError: the exit code is not 0.
        """
        process = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate(timeout=PATIENCE_S)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)[:200]}: {process.returncode}: {output[-3000:]}")
        return output

    @contextmanager
    def running(self, log: Path, *command: str) -> Iterator[subprocess.Popen[str]]:
        """Start a program, and kill it at the end of the block if it still runs."""
        with log.open("w") as output:
            process = self.start(*command, stdout=output, stderr=output)
        try:
            yield process
        except Exception:
            print(log.read_text()[-4000:], file=sys.stderr)
            raise
        finally:
            process.kill()
            process.wait()


def terminate(process: subprocess.Popen[str]) -> float:
    """Send SIGTERM to the first process of a container and return the seconds until it ends."""
    begun = time.monotonic()
    [first] = psutil.Process(process.pid).children()
    first.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    return time.monotonic() - begun


def peak(box: Container, *command: str) -> int:
    """Run a program and return its peak memory in bytes, as the limit of the operator's init container counts it."""
    process = box.start(*command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


def network() -> None:
    """Set up an address in addition to loopback, and a default route that leads nowhere."""
    for words in (
        "link set lo up",
        "link add eth0 type veth peer name outside",
        f"addr add {ADDRESS}/24 dev eth0",
        "link set eth0 up",
        "link set outside up",
        "route add default dev eth0",
    ):
        subprocess.run(["ip", *words.split()], check=True)
