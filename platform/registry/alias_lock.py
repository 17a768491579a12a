"""One at a time: who moves an alias waits for whoever is moving one now, on any machine.

MLflow has no locks, but names of registered models are unique in every store: whoever creates `NAME-turn` has the
turn, and deletes it afterwards.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mlflow.exceptions import MlflowException

from animediffusion.platform.errors import RegistryError
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.tracking import run as tracking

STALE_S = 30.0
"""A turn takes a second or two. One that lasts this long belongs to a process that was killed, and is taken over."""
_POLL_S = (0.1, 0.3)


@contextmanager
def turn(registry: Registry, stale_s: float = STALE_S) -> Iterator[None]:
    """Hold the turn for the block inside.

    Args:
        registry: whose aliases are to be moved.
        stale_s: how long the same holder is waited for.

    Raises:
        RegistryError: the store does not answer, or refuses.
    """
    name = f"{registry.name}-turn"
    try:
        _take(registry, name, stale_s)
    except MlflowException as error:
        found = f"{tracking.place(registry.tracking_uri)} refused ({tracking.first_line(error)})"
        raise RegistryError(f"turn to move aliases of {registry.name}", found, "nothing was changed") from error
    try:
        yield
    finally:
        with suppress(MlflowException):  # what was done in the turn is done; the next one takes a stale one over
            registry.client.delete_registered_model(name)


def _take(registry: Registry, name: str, stale_s: float) -> None:
    holder, since = None, time.monotonic()
    while True:
        try:
            registry.client.create_registered_model(name, description="somebody is moving an alias; gone in a second")
            return
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        present = _created(registry, name)
        if present != holder:
            holder, since = present, time.monotonic()
        elif present is not None and time.monotonic() - since > stale_s:
            _end(registry, name)
            holder = None
        time.sleep(random.uniform(*_POLL_S))


def _end(registry: Registry, name: str) -> None:
    """End the turn of somebody who is gone; refused where the model is another user's, which then is the error."""
    try:
        registry.client.delete_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # another one who waited was first
            raise


def _created(registry: Registry, name: str) -> int | None:
    """When the present holder took the turn, by the store's clock; None where it was given back meanwhile."""
    try:
        return int(registry.client.get_registered_model(name).creation_timestamp)
    except MlflowException:
        return None
