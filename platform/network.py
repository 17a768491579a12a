"""Addresses: whether anything answers, before a client library retries for a minute; how to show and recognize one."""

from __future__ import annotations

import os
import re
import socket
import sys
from urllib.parse import urlsplit

SCHEME = re.compile(r"(?:[a-zA-Z][a-zA-Z0-9+.-]+(?=://)|(?:s3|file)(?=:))")
"""The scheme of a URI; s3: and file: are meant as schemes even where slashes are missing."""
_DEFAULT_PORTS = {"http": 80, "https": 443}


def is_uri(text: str) -> bool:
    """Whether `text` is a URI of some scheme, not a local path."""
    return SCHEME.match(text) is not None


def why_unreachable(address: str, timeout: float = 5.0) -> str | None:
    """The reason why no TCP connection to `address` can be made, or None when one can.

    Args:
        address: `host:port` or a URL.
        timeout: seconds.
    """
    parts = urlsplit(address if "://" in address else f"tcp://{address}")
    try:
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
        if not parts.hostname or not port:
            return "is not host:port"
        socket.create_connection((parts.hostname, port), timeout=timeout).close()
    except ValueError as error:
        return f"is not host:port ({error})"
    except OSError as error:
        return f"does not answer ({error.strerror or error})"
    return None


def without_password(address: str) -> str:
    """An address as it may be printed: `user:password@` becomes `***@`."""
    return re.sub(r"//[^/@]*@", "//***@", address)


def temporary_folder_problem() -> str | None:
    """Why Ray cannot put its sockets where RAY_TMPDIR or TMPDIR says; None where it can.

    The path of a socket has 107 bytes at most (103 on macOS), of which Ray's names of session and socket take most.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    session = f"session_2000-01-01_00-00-00_000000_{os.getpid()}"
    file = os.path.join(os.environ.get(name, "/tmp"), "ray", session, "sockets", "plasma_store")
    surplus = len(os.fsencode(file)) - (103 if sys.platform == "darwin" else 107)
    return f"{name} is too long by {surplus} bytes for Ray's sockets" if surplus > 0 else None
