"""The embedded MLflow store: a SQLite database and a folder of artifacts, both in the workspace.

MLflow stores absolute artifact URIs in the database. A workspace may be moved, copied or mounted elsewhere, so the URIs
are corrected when the database is opened: a copied workspace works and never writes to its original.
Not here: the recorded data, see tracking.py; the address of the database, see `config.sqlite_uri`.
"""

from __future__ import annotations

import errno
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns in which MLflow stores artifact URIs."""
_OURS = re.compile(r"file://.*/artifacts/(animediffusion-[^/]+(?:/.*)?)")
"""URI of an artifact folder in a workspace; the names of our experiments begin with the package's name."""
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def database(tracking_uri: str) -> Path | None:
    """Return the file of a SQLite database; None for a server, another database, or a database in memory."""
    try:
        url = make_url(tracking_uri)
    except ArgumentError:
        return None
    is_file = url.get_backend_name() == "sqlite" and url.database and url.database != ":memory:"
    return Path(str(url.database)).absolute() if is_file else None


@contextmanager
def one_creator(tracking_uri: str) -> Iterator[None]:
    """Hold a lock while a SQLite database may be created, because MLflow fails if two processes create it concurrently.

    An existing database in a read-only folder is opened without the lock.
    """
    file = database(tracking_uri)
    if file is None:
        yield
        return
    lock = FileLock(file.with_name(file.name + ".lock"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in _READ_ONLY or not file.exists():
            raise
    try:
        yield
    finally:
        lock.release()


def relocated(uri: str, artifacts: Path) -> str:
    """Move an artifact URI of any workspace to the given artifact folder; other URIs are returned unchanged."""
    match = _OURS.fullmatch(uri)
    return f"{artifacts.as_uri()}/{match[1]}" if match else uri


def relocate(file: Path, artifacts: Path) -> None:
    """Correct the artifact URIs of a database whose workspace was moved or copied.

    A read-only database stays unchanged; readers then correct each URI with relocated().

    Args:
        file: the database of the workspace.
        artifacts: absolute path of the same workspace's artifact folder.
    """
    with closing(sqlite3.connect(file, timeout=60)) as connection, connection:
        stored = [uri for (uri,) in connection.execute("SELECT artifact_location FROM experiments") if uri]
        if not any(_is_elsewhere(uri, artifacts) for uri in stored):
            return
        connection.create_function("relocated", 1, lambda uri: relocated(uri, artifacts), deterministic=True)
        try:
            for table, column in _COLUMNS:
                connection.execute(f"UPDATE {table} SET {column} = relocated({column}) WHERE {column} IS NOT NULL")
        except sqlite3.OperationalError as error:
            if "readonly" not in str(error):
                raise


def _is_elsewhere(uri: str, artifacts: Path) -> bool:
    """Whether an experiment's folder is in another workspace; a link to this workspace does not count as another."""
    if relocated(uri, artifacts) == uri:
        return False
    recorded = Path(unquote(urlsplit(uri).path)).parent
    return not (recorded.exists() and artifacts.exists() and recorded.samefile(artifacts))
