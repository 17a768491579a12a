"""Code shared by all commands: the common options, the settings, the console, the connection to Ray."""

from __future__ import annotations

import os
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
from typer.core import TyperCommand

from animediffusion.console import Console

if TYPE_CHECKING:
    from animediffusion.platform.config import Settings

TYPED = "animediffusion.typed"
"""Key in the `meta` of a command's context for the values as they were typed."""

group = partial(
    typer.Typer,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
"""Make a group of commands."""


class Command(TyperCommand):
    """A command that rejects an option given twice, because the parser would silently use the last value.

    Its messages about a wrong value quote the value. Its help names arguments and values by their metavars, without the
    type and the brackets that Typer adds.
    """

    def make_parser(self, ctx: Any) -> Any:
        """Return a parser that rejects an option given twice, and keeps the values as they were typed."""
        from animediffusion.platform.errors import ConfigError

        parser: Any = super().make_parser(ctx)
        parse = parser.parse_args

        def parse_args(args: list[str]) -> tuple[dict[str, Any], list[str], list[Any]]:
            values, rest, given = parse(args=args)
            for option in given:
                once = option.param_type_name == "option" and not option.multiple
                if once and given.count(option) > 1:
                    raise ConfigError(option.opts[0], "given twice", "give it once")
            ctx.meta[TYPED] = dict(values)
            return values, rest, given

        parser.parse_args = parse_args
        return parser

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the command."""
        from animediffusion.platform.errors import ConfigError

        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            parameter: Any = error.param
            values = ctx.meta.get(TYPED, {})
            if parameter is None or values.get(parameter.name) is None:  # a missing argument or option
                raise
            allowed = error.message.rstrip(".")
            name = parameter.opts[0] if parameter.param_type_name == "option" else _shown(parameter).strip("[]")
            raise ConfigError(name, repr(values[parameter.name]), allowed[:1].lower() + allowed[1:]) from error
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:  # the parser does not know its command
                error.ctx = ctx  # type: ignore[attr-defined]
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words after the name of the command in the line `Usage:`."""
        arguments = [one for one in self.get_params(ctx) if one.param_type_name == "argument"]
        return ["[OPTIONS]", *(_shown(one) for one in arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the tables of the arguments and the options."""
        for kind, title in (("argument", "Arguments"), ("option", "Options")):
            rows = [
                (_shown(one), record[1])
                for one in self.get_params(ctx)
                if one.param_type_name == kind and (record := one.get_help_record(ctx)) is not None
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _shown(parameter: Any) -> str:
    """Return the name of an argument, or the names of an option and of its value, as the help shows them."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    names = " / ".join(", ".join(sorted(some, key=len)) for some in (parameter.opts, parameter.secondary_opts) if some)
    return names if parameter.is_flag else f"{names} {parameter.metavar or 'TEXT'}"


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


def in_job() -> bool:
    """Whether Ray's jobs API started this process; it sets this variable (ray._private.runtime_env.constants)."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
