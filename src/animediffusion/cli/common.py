"""Code shared by all commands: the common options, the settings, the console, the connection to Ray."""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
from typer.core import TyperCommand

from animediffusion.console import Console

if TYPE_CHECKING:
    from animediffusion.platform.config import Settings

group = partial(typer.Typer, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
"""Make a group of commands."""


class Command(TyperCommand):
    """A command that refuses an option given twice, of which the parser would use the last without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the command."""
        from animediffusion.platform.errors import ConfigError

        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in given:
            if option.param_type_name == "option" and given.count(option) > 1:
                raise ConfigError(option.opts[0], "given twice", "give it once")
        return super().parse_args(ctx, args)


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
    from animediffusion.platform.cluster import cluster

    cluster.connect(settings)
