"""Commands as processes that are forked from one that has imported the other packages, which takes seconds.

    python tests/preforked.py SOCKET                       the process that is forked
    python -I -S tests/preforked.py SOCKET ARGUMENT...     runs `animediffusion ARGUMENT...` in a fork of it

A command has its own arguments, variables, working directory, files and exit code, gets the signals of its caller, and
imports our package itself.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

PACKAGES = (
    "fastapi",
    "kornia",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "optuna",
    "ray.serve",
    "ray.train.torch",
    "ray.tune",
    "torchmetrics",
    "typer",
)
STREAMS = (0, 1, 2)
MOST_BYTES = 2**20
"""Most bytes of arguments and variables."""


@contextmanager
def forking(environment):
    """Start the process that is forked, and give a folder with the command `animediffusion` for shell scripts.

    Args:
        environment: variables of the process that is forked, as of each command.
    """
    # Paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="fork-", dir="/tmp") as folder:
        place, command = Path(folder, "socket"), Path(folder, "animediffusion")
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {__file__} {place} "$@"\n')
        command.chmod(0o755)
        variables = {**environment, "MLFLOW_DISABLE_TELEMETRY": "true"}  # MLflow reads it when it is imported
        process = subprocess.Popen([sys.executable, __file__, str(place)], env=variables, start_new_session=True)
        try:
            while not place.exists():
                assert process.poll() is None
                time.sleep(0.05)
            yield folder
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def serve(place):
    """Fork a process for each caller, and return in the one that is to run the command."""
    with socket.socket(socket.AF_UNIX) as server:
        for name in PACKAGES:
            __import__(name)
        assert threading.active_count() == 1, "a fork has only the thread that forks"
        server.bind(f"{place}.new")
        server.listen()
        os.rename(f"{place}.new", place)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for watch()
        while True:
            caller, _ = server.accept()
            with caller:
                if os.fork() == 0:
                    server.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    return watch(caller)


def watch(caller):
    """Fork the process of the command, and return in it; tell the caller its id, and in the end its exit code."""
    data, streams, _, _ = socket.recv_fds(caller, MOST_BYTES, len(STREAMS))
    while not data.endswith(b"\n"):
        data += caller.recv(MOST_BYTES)
    command = os.fork()
    if command:
        for stream in streams:
            os.close(stream)
        caller.sendall(f"{command}\n".encode())
        _, status = os.waitpid(command, 0)
        caller.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    caller.close()
    for stream, given in zip(STREAMS, streams, strict=True):
        os.dup2(given, stream)
        os.close(given)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    words, variables, folder = json.loads(data)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.path[0] = folder
    sys.argv = ["animediffusion", *words]


def call(place, words):
    """Run a command in a fork and exit as it did."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        data = json.dumps([words, dict(os.environ), os.getcwd()]).encode() + b"\n"
        sent = socket.send_fds(server, [data], STREAMS)
        server.sendall(data[sent:])
        with server.makefile() as answers:
            command = int(answers.readline())
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, _: os.kill(command, number))
            code = int(answers.readline())
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        call(sys.argv[1], sys.argv[2:])
    serve(sys.argv[1])
    from animediffusion.cli.app import main

    main()
