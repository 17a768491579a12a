"""A cross-machine lock that serializes alias changes.

MLflow has no locks, but the names of registered models are unique in every store. The process that creates the
registered model `NAME-turn` holds the lock and deletes the model afterwards. The name is as in version 0.1, so that
both versions exclude each other.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mlflow.exceptions import MlflowException

from animediffusion.platform.errors import RegistryError
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.tracking import tracking

STALE_S = 30.0
"""Seconds after which a lock counts as left by a killed process and is removed; a lock is held for a second or two."""
_POLL_S = (0.1, 0.3)


@contextmanager
def alias_lock(registry: Registry, stale_s: float = STALE_S) -> Iterator[None]:
    """Hold the lock while the block runs.

    Args:
        registry: the registry whose aliases are to be changed.
        stale_s: seconds after which a lock that one process holds is removed.

    Raises:
        RegistryError: if the store does not answer or rejects the lock.
    """
    name = f"{registry.name}-turn"
    try:
        _acquire(registry, name, stale_s)
    except MlflowException as error:
        found = f"{tracking.store_name(registry.tracking_uri)} rejected the request ({tracking.first_line(error)})"
        raise RegistryError(f"lock for the aliases of {registry.name}", found, "nothing was changed") from error
    try:
        yield
    finally:
        with suppress(MlflowException):  # the block is done; the next process removes a stale lock
            registry.client.delete_registered_model(name)


def _acquire(registry: Registry, name: str, stale_s: float) -> None:
    holder, since = None, time.monotonic()
    while True:
        try:
            registry.client.create_registered_model(name, description="lock for a change of aliases")
            return
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        present = _created(registry, name)
        if present != holder:
            holder, since = present, time.monotonic()
        elif present is not None and time.monotonic() - since > stale_s:
            _remove(registry, name)
            holder = None
        time.sleep(random.uniform(*_POLL_S))


def _remove(registry: Registry, name: str) -> None:
    """Remove the lock of a process that has ended; raises if the store rejects it, as for another user's model."""
    try:
        registry.client.delete_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # else another waiting process deleted it
            raise


def _created(registry: Registry, name: str) -> int | None:
    """Return when the current lock was created, by the store's clock; None if it was released meanwhile."""
    try:
        return int(registry.client.get_registered_model(name).creation_timestamp)
    except MlflowException:
        return None
