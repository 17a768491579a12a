"""Ports for servers of tests."""

import random
import socket
from contextlib import suppress

PORTS = range(20000, 32768)
"""Above Ray's workers, below those that Linux gives to connections: what is free stays so until it is used."""


def free_port() -> int:
    """A port of the loopback address that nobody has."""
    draw = random.SystemRandom()
    while True:
        port = draw.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
