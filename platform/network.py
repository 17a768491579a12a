"""Addresses: is anybody there, before a client library retries for a minute; and how to show one."""

from __future__ import annotations

import re
import socket
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
