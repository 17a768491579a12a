"""Free ports for the servers of tests."""

import random
import socket
from contextlib import suppress

PORTS = range(20000, 32768)
"""Above the ports of Ray's workers and below Linux's ephemeral ports: a free port stays free until a test uses it."""


def free_port() -> int:
    """Return a free port of the loopback address."""
    draw = random.SystemRandom()
    while True:
        port = draw.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
