"""Code shared by all commands: the common options, the settings, the console, the connection to Ray."""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import typer

from animediffusion.console import Console

if TYPE_CHECKING:
    from animediffusion.platform.config import Settings

group = partial(typer.Typer, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
"""Make a group of commands."""


class Common(NamedTuple):
    """The options that every command takes."""

    workspace: str | None = None
    json: bool = False
    debug: bool = False


current: ContextVar[Common] = ContextVar("common", default=Common())  # noqa: B039 - a tuple
"""The common options of the running command, set by app.run()."""


def console() -> Console:
    """Return the console of the running command."""
    return Console(as_json=current.get().json)


def settings() -> Settings:
    """Return the settings of the running command, from the environment and --workspace."""
    from animediffusion.platform.config import Settings

    return Settings.from_environment(workspace=current.get().workspace)


def use_attention(settings: Settings) -> None:
    """Apply ANIMEDIFFUSION_ATTENTION to the models of this process."""
    from animediffusion.models.network.attention import use_attention
    from animediffusion.platform.errors import ConfigError

    try:
        use_attention(settings.attention)
    except ValueError as error:
        raise ConfigError("ANIMEDIFFUSION_ATTENTION", str(error), "unset it") from error


def connect(settings: Settings) -> None:
    """Connect to the cluster that RAY_ADDRESS names, else start a private Ray."""
    from animediffusion.platform.cluster import connect as cluster

    cluster.connect(settings)
