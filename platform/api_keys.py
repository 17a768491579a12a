"""API keys for the server. A key is shown once when it is created; a JSON file keeps only its sha256.

    key = Keys("workspace/keys.json").create("studio")      # ad_...: give it to the client, it is not shown again
    keyring = Keyring("workspace/keys.json")                # the keys that a server accepts
    keyring.name_of(key)                                    # "studio", or None for an unknown key

    {"format": 1, "keys": [{"name": "studio", "sha256": "...", "created": "2026-01-31T12:00:00Z", "revoked": null}]}

A key is 32 random bytes, too many to try all, so a plain hash needs neither a salt nor a slow function. The file may be
in an object store (s3://) for nodes that share no disk. A revoked key stays in the file with the time, so that a server
whose last key was revoked does not become open to everybody.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal

from animediffusion.platform.atomic_update import update
from animediffusion.platform.config import Config
from animediffusion.platform.errors import AnimeDiffusionError, ConfigError
from animediffusion.platform.storage import storage

PREFIX = "ad_"
"""Prefix by which people and scanners for leaked secrets recognize a key."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
REFRESH_S = 2.0
"""Seconds between two reads of the key file by a server."""

log = logging.getLogger(__name__)


class Key(Config):
    """One entry of the key file."""

    name: str
    sha256: str
    """Hash of the key's ASCII text, in hex."""
    created: str
    """Time of creation, ISO 8601, UTC."""
    revoked: str | None = None
    """Time of revocation, ISO 8601, UTC; None for an active key."""


class KeyFile(Config):
    """Content of the key file."""

    format: Literal[1] = 1
    keys: tuple[Key, ...] = ()


class Keys:
    """Manage the keys in a file: create, list and revoke them.

    Args:
        uri: a local path or s3:// URI of the file, which need not exist yet.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def entries(self) -> tuple[Key, ...]:
        """Return all keys ever created, oldest first; empty if the file does not exist.

        Raises:
            StorageError: if the file cannot be read.
            ConfigError: if the file is damaged.
        """
        return self._parse(storage.read_bytes(self.uri) if storage.exists(self.uri) else None).keys

    def active(self) -> tuple[Key, ...]:
        """Return the keys that are not revoked."""
        return tuple(key for key in self.entries() if key.revoked is None)

    def create(self, name: str) -> str:
        """Create a key and return its text, which cannot be read again later.

        Raises:
            ConfigError: if the name is invalid or already used by an active key.
        """
        if not NAME.fullmatch(name):
            raise ConfigError("NAME", repr(name[:80]), "up to 64 letters, digits, dots, dashes and underscores")
        text = PREFIX + secrets.token_urlsafe(32)
        entry = Key(name=name, sha256=_digest(text), created=_now())

        def add(old: bytes | None) -> bytes:
            keys = self._parse(old).keys
            if any(key.name == name and key.revoked is None for key in keys):
                raise ConfigError(f"key {name!r}", "already exists", "choose another name, or revoke the key first")
            return _dump(KeyFile(keys=(*keys, entry)))

        update(self.uri, add)
        return text

    def revoke(self, name: str) -> None:
        """Revoke a key; servers reject it within 5 s.

        Raises:
            ConfigError: if no active key has this name.
        """

        def mark(old: bytes | None) -> bytes:
            keys = self._parse(old).keys
            names = [key.name for key in keys if key.revoked is None]
            if name not in names:
                raise ConfigError(f"key {name[:80]!r}", "does not exist", f"one of {', '.join(names) or 'none'}")
            ended = {"revoked": _now()}
            hit = [key.model_copy(update=ended) if (key.name, key.revoked) == (name, None) else key for key in keys]
            return _dump(KeyFile(keys=tuple(hit)))

        update(self.uri, mark)

    def _parse(self, data: bytes | None) -> KeyFile:
        if data is None:
            return KeyFile()
        try:
            return KeyFile.check(json.loads(data))
        except (ValueError, TypeError, ConfigError):
            # The error leaves out the content and the exception chain: the file may hold a key by mistake.
            what_to_do = "restore it, or delete it and create new keys"
            raise ConfigError(self.uri, "is not a key file", what_to_do) from None


class Keyring:
    """The keys that a server accepts, kept up to date while watching() runs.

    If the file becomes unreadable later, the server keeps the keys that it has read before.

    Args:
        uri: the key file, as for Keys; None means that the server has no keys and is open to everybody.
        is_closed: require a key even if none was ever created, for example on a node where the file is missing.

    Raises:
        AnimeDiffusionError: if the file cannot be read now or is damaged.
    """

    def __init__(self, uri: str | None, *, is_closed: bool = False) -> None:
        self._keys = Keys(uri) if uri is not None else None
        self._names: dict[bytes, str] = {}
        self._problem = ""
        self.is_closed = False
        """Whether clients need a key. It becomes True once the file has a key, and then stays True."""
        if self._keys is not None:
            self._use(self._keys.entries())
        if is_closed and not self._names:
            log.warning("no API key in %s: all requests are rejected until you create one", uri)
        self.is_closed = self.is_closed or is_closed

    def name_of(self, text: str) -> str | None:
        """Return the name of an accepted key, else None; right and wrong keys take equally long."""
        digest, found = _digest(text).encode(), None
        for known, name in self._names.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def refresh(self) -> None:
        """Read the key file again; if that fails, keep the known keys and log a warning."""
        if self._keys is None:
            return
        try:
            self._use(self._keys.entries())
        except AnimeDiffusionError as error:
            self._keep(str(error))

    @contextmanager
    def watching(self, period_s: float = REFRESH_S) -> Iterator[None]:
        """Refresh the keys in a thread until the block ends."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(period_s):
                try:
                    self.refresh()
                except Exception:  # if this thread ended, keys revoked later would stay accepted
                    log.exception("the API keys could not be read")

        thread = threading.Thread(target=watch, name="keys", daemon=True)
        if self._keys is not None:
            thread.start()
        try:
            yield
        finally:
            stop.set()

    def _keep(self, problem: str) -> None:
        """Keep the known keys and log the reason once."""
        if problem != self._problem:
            log.warning("the server keeps the API keys that it has read before: %s", problem)
        self._problem = problem

    def _use(self, entries: tuple[Key, ...]) -> None:
        if not entries and self.is_closed:
            self._keep("the key file is missing or empty")
            return
        self._problem = ""
        self._names = {key.sha256.encode(): key.name for key in entries if key.revoked is None}
        self.is_closed = bool(entries)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _dump(file: KeyFile) -> bytes:
    return json.dumps(file.model_dump(), indent=1).encode() + b"\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
