"""The commands `corrections`: list and delete corrections of pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from animediffusion.cli import common
from animediffusion.console import table

if TYPE_CHECKING:
    from animediffusion.platform.corrections.store import Corrections

corrections = common.group(help="List and delete corrections of pictures.")

_COLUMNS = ("key", "request_id", "model_version", "time", "kind", "changed")


@corrections.command("list")
def corrections_list(
    key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only those of this API key; _ for clients without a key.")
    ] = None,
) -> None:
    """List corrections, and for each model version how many of its answered requests were corrected."""
    console, store = common.console(), _store()
    entries = store.entries(None if key is None else _checked(key))
    rows, faults = [], []
    for entry, record in zip(entries, store.read_records(entries), strict=True):
        if isinstance(record, dict):
            rows.append({name: record[name] for name in _COLUMNS})
        else:
            faults.append(f"{entry.path}: {record.found}")
    for fault in faults:
        console.note(f"left out {fault}")
    counts = {
        version: {"answered": one.answered, "corrected": one.corrected, "rate": round(one.rate, 6)}
        for version, one in sorted(store.counts().items())
    }
    text = table(rows, f"no corrections in {store.uri}")
    rates = table([{"model_version": version, **one} for version, one in counts.items()], "")
    console.result({"corrections": rows, "versions": counts}, f"{text}\n\n{rates}" if rates else text)


@corrections.command("delete")
def corrections_delete(
    key: Annotated[
        str, typer.Option(metavar="NAME", help="API key whose rows are deleted; _ for clients without a key.")
    ],
) -> None:
    """Delete all corrections of an API key, and the requests of it that the store still keeps.

    The deletion is recorded in the audit log.
    """
    from animediffusion.platform.registry import audit_log
    from animediffusion.platform.registry.client import Registry

    console, store, name = common.console(), _store(), _checked(key)
    there = store.num_of(name)
    if there == (0, 0):
        console.result(
            {"key": name, "corrections": 0, "requests": 0},
            f"{store.uri} has no corrections and no kept requests of {key}",
        )
        return
    facts = {"key": name, "corrections": str(there.corrections), "requests": str(there.requests), "store": store.uri}
    with audit_log.recorded_action(Registry(common.settings()), "corrections delete", key, facts):
        deleted = store.delete(name)
    console.note(
        "datasets that were made earlier still contain the deleted corrections, "
        "and models trained on them have learned from them"
    )
    console.result(
        {"key": name, **deleted._asdict()},
        f"deleted {_number(deleted.corrections, 'correction')} and "
        f"{_number(deleted.requests, 'kept request')} of {key}",
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _store() -> Corrections:
    from animediffusion.platform.corrections.store import Corrections
    from animediffusion.platform.errors import ConfigError

    uri = common.settings().corrections_uri
    if uri is None:
        raise ConfigError("ANIMEDIFFUSION_CORRECTIONS", "is not set", "set it to the store of your servers")
    return Corrections(uri)


def _checked(name: str) -> str:
    """Return the name of a key as the store knows it; raise ConfigError if no key can have this name."""
    from animediffusion.platform.api_keys import NAME
    from animediffusion.platform.corrections.store import NO_KEY
    from animediffusion.platform.errors import ConfigError

    if name != NO_KEY and not NAME.fullmatch(name):
        raise ConfigError("--key", repr(name[:80]), "the name of an API key, or _ for clients without a key")
    return "" if name == NO_KEY else name
