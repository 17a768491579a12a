"""Network addresses: recognize a URI, hide its password, and test whether a server answers.

Callers test an address before they use a client library, which would retry an unreachable address for a minute.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from urllib.parse import urlsplit

SCHEME = re.compile(r"(?:[a-zA-Z][a-zA-Z0-9+.-]+(?=://)|(?:s3|file)(?=:))")
"""The scheme of a URI; s3: and file: count as schemes even if the slashes are missing."""
_DEFAULT_PORTS = {"http": 80, "https": 443}


def is_uri(text: str) -> bool:
    """Whether `text` is a URI with a scheme, not a local path."""
    return SCHEME.match(text) is not None


def why_unreachable(address: str, timeout: float = 5.0) -> str | None:
    """Return the reason why no TCP connection to `address` can be made; None if the connection succeeds.

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
    """Return an address that is safe to print: `user:password@` becomes `***@`."""
    return re.sub(r"//[^/@]*@", "//***@", address)


def temporary_folder_problem() -> str | None:
    """Explain why Ray cannot create its sockets in the folder of RAY_TMPDIR or TMPDIR; None if it can.

    The path of a socket may have 107 bytes (103 on macOS), and Ray's session and socket names take most of them.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    session = f"session_2000-01-01_00-00-00_000000_{os.getpid()}"
    file = os.path.join(os.environ.get(name, "/tmp"), "ray", session, "sockets", "plasma_store")
    surplus = len(os.fsencode(file)) - (103 if sys.platform == "darwin" else 107)
    return f"{name} is too long by {surplus} bytes for Ray's sockets" if surplus > 0 else None
