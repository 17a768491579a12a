"""Settings of this installation, and the base of every run configuration.

Not here: the recipes themselves, see pipelines/configs.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from animediffusion.platform.errors import ConfigError

ENV_PREFIX = "ANIMEDIFFUSION_"


class Config(BaseModel):
    """Base of every run configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = (), /, **values: Any) -> Self:
        """Read YAML, then apply `values`, then `key.sub=value` overrides (values are YAML too).

        Raises:
            ConfigError: naming the key, what was found and what is allowed.
        """
        merged = read_yaml(path) if path is not None else {}
        merged.update({key: value for key, value in values.items() if value is not None})
        for override in overrides:
            key, separator, value = override.partition("=")
            if not separator or not key:
                raise ConfigError(override, "is not of the form key=value", "write for example max_steps=100")
            _set(merged, key, _parse(key, value))
        return cls.check(merged)

    @classmethod
    def check(cls, values: dict[str, Any]) -> Self:
        """Validate a plain dictionary, with a one-line ConfigError in place of pydantic's report."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _one_line(cls, error) from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        ConfigError: if the file is missing or is no mapping.
    """
    try:
        value = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(str(path), error.strerror or "cannot be read", "give an existing YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is not YAML ({str(error).splitlines()[0]})", "write key: value lines") from error
    if not isinstance(value, dict):
        raise ConfigError(str(path), f"holds a {type(value).__name__}", "write key: value lines")
    return value


def _parse(key: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(key, f"{value!r} is not YAML", "write a number, a word or a [list]") from error


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(dotted, f"{parent} is {child!r}, not a group of keys", f"set {parent} itself")
        tree = child
    tree[leaf] = value


def _one_line(model: type[BaseModel], error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"]) or model.__name__
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        names = _names_beside(model, first["loc"])
        close = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(names)}"
        return ConfigError(path, "unknown key", hint)
    if first["type"] in ("missing", "missing_argument"):
        return ConfigError(path, "is not set", f"add {path}=...")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[:1].lower() + message[1:]
    # A rule about several keys has all of them as its input; its message says which matters.
    found = "cannot be used" if isinstance(first["input"], dict) else repr(first["input"])
    return ConfigError(path, found, message)


def _names_beside(model: type[Any], location: Iterable[int | str]) -> list[str]:
    """The keys that are allowed where the last part of `location` stands."""
    kind: Any = model
    for part in list(location)[:-1]:
        kind = _field_types(kind).get(str(part), kind)
        for option in get_args(kind):
            if isinstance(option, type) and (is_dataclass(option) or issubclass(option, BaseModel)):
                kind = option
    return sorted(_field_types(kind))


def _field_types(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: info.annotation for name, info in kind.model_fields.items()}
    if is_dataclass(kind):
        return get_type_hints(kind)
    return {}


def sqlite_uri(file: Path) -> str:
    """The URI of a SQLite database by its absolute path, whatever characters that has."""
    quoted = str(file).replace("%", "%25").replace("?", "%3F")
    # At a plain sqlite:/// URI, MLflow makes the folder that it spells, the quotes included.
    return f"sqlite:///{file}" if quoted == str(file) else f"sqlite+pysqlite:///{quoted}"


class Settings(Config):
    """Where this installation keeps its things; each from `ANIMEDIFFUSION_*`, else the default.

    MLflow, AWS and Ray settings come from their own usual variables.
    """

    workspace: Path = Path("workspace")
    """Folder for data, runs, the embedded MLflow database and artifacts."""
    model_name: str = "animediffusion"
    """Registered model name."""
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    """auto, xformers or sdpa."""
    keys: str | None = None
    """File of the API keys' hashes, a path or s3://; in the workspace if left out."""

    @classmethod
    def from_environment(cls, **overrides: Any) -> Settings:
        """Settings from the environment; arguments that are not None win."""
        values = {
            name: os.environ[ENV_PREFIX + name.upper()]
            for name in cls.model_fields
            if os.environ.get(ENV_PREFIX + name.upper())
        }
        values.update({key: value for key, value in overrides.items() if value is not None})
        settings = cls.check(values)
        return settings.model_copy(update={"workspace": settings.workspace.expanduser().absolute()})

    @property
    def tracking_uri(self) -> str:
        """MLFLOW_TRACKING_URI, else SQLite in the workspace."""
        return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(self.database)

    @property
    def database(self) -> Path:
        """File of the embedded MLflow."""
        return self.workspace / "mlflow.db"

    @property
    def keys_uri(self) -> str:
        """The file of API keys, meant the same from any working directory."""
        given = self.keys or str(self.workspace / "keys.json")
        return given if "://" in given else str(Path(given).expanduser().absolute())

    @property
    def artifact_root(self) -> Path:
        """Artifacts of the embedded MLflow (a server keeps its own)."""
        return self.workspace / "artifacts"
