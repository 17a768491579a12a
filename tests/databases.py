"""New MLflow databases as copies of one, because MLflow takes over a second and 60 migrations to create one."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from animediffusion.platform.tracking import embedded

create = embedded.one_creator
"""The function that create_copy() replaces."""


@functools.cache
def _template() -> Path:
    """A database that MLflow created; it is deleted with the process."""
    from mlflow import MlflowClient  # its import takes 2 s, and most tests need neither

    folder = Path(tempfile.mkdtemp(prefix="mlflow-database-"))
    atexit.register(shutil.rmtree, folder)
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments(max_results=1)
    return folder / "mlflow.db"


def copy_to(file: Path) -> None:
    """Write a new database."""
    shutil.copyfile(_template(), file)


@contextmanager
def create_copy(tracking_uri: str) -> Iterator[None]:
    """Do as `embedded.one_creator` does, and copy the database if there is none."""
    with create(tracking_uri):
        file = embedded.database(tracking_uri)
        if file is not None and not file.exists():
            copy_to(file)
        yield
