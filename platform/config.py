"""Settings of this installation, and the base class of every run configuration.

Not here: the recipes, see pipelines/configs.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from animediffusion.platform.errors import ConfigError
from animediffusion.platform.network import is_uri
from animediffusion.platform.storage.local_files import expanded

ENV_PREFIX = "ANIMEDIFFUSION_"
_MODEL_NAME = re.compile(r"""[^/:@.%"'\0-\x1f]{1,80}""")
"""Names that MLflow allows, without @, which separates an alias, and short enough for the name of a folder."""
_OTHER_VARIABLES = ("API_KEY", "MAX_BODY_BYTES", "STORAGE_PATIENCE_S")
"""Variables, named without the prefix, that other modules read; `Settings` reads all the rest."""


class Config(BaseModel):
    """Base class of every run configuration: it is immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = (), /, **values: Any) -> Self:
        """Read a YAML file, then apply `values`, then overrides of the form `key.sub=value`.

        An override of a text setting is used literally; the value of any other override is parsed as YAML.

        Raises:
            ConfigError: with the key, the value found and the allowed values.
        """
        merged = read_yaml(path) if path is not None else {}
        merged.update({key: value for key, value in values.items() if value is not None})
        given: set[str] = set()
        for override in overrides:
            key, separator, value = override.partition("=")
            if not separator or not key:
                raise ConfigError(override, "is not of the form key=value", "write for example max_steps=100")
            if key in given:
                raise ConfigError(key, "given twice", "give it once")
            given.add(key)
            _set(merged, key, _parse(_field_types(_group(cls, key.split("."))).get(key.split(".")[-1]), key, value))
        return cls.check(merged)

    @classmethod
    def check(cls, values: dict[str, Any]) -> Self:
        """Validate a plain dictionary and raise a one-line ConfigError instead of pydantic's report."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _one_line(cls, error) from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping from a file.

    Raises:
        ConfigError: if the file is missing or is not a YAML mapping.
    """
    try:
        value = _load(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(str(path), error.strerror or "cannot be read", "give an existing YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            str(path), f"is not YAML (its byte {error.start} is not UTF-8)", "save it as UTF-8"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError for !!int x
        raise ConfigError(str(path), f"is not YAML ({_yaml_problem(error)})", "write key: value lines") from error
    if not isinstance(value, dict):
        found = "a list" if isinstance(value, list) else "text without keys" if isinstance(value, str) else "no keys"
        raise ConfigError(str(path), f"holds {found}", "write key: value lines")
    return value


def _yaml_problem(error: Exception) -> str:
    """Return what is wrong and where: the first line of PyYAML's text only names what it was about to read."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return problem.removeprefix("but ") + where


_NAME_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
"""Tags of the keys that settings may have."""


class _Loader(yaml.SafeLoader):
    """Loader for YAML 1.2: only plain numbers, true, false and null become values; dates, 007, 1:30 and on stay text.

    A duplicate key is an error.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - a class attribute of the library
        first: [
            ("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$")),
            ("tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$")),
            ("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$|[-+]?\.inf$|\.nan$")),
            ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")),
            ("tag:yaml.org,2002:null", re.compile(r"(?:null|Null|NULL|~|)$")),
            ("tag:yaml.org,2002:merge", re.compile(r"<<$")),
        ]
        for first in ["", *"-+.0123456789tTfFnN~<"]
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        odd = next((key for key, _ in node.value if key.tag not in _NAME_TAGS), None)
        if odd is not None:
            name = repr(odd.value) if isinstance(odd, yaml.ScalarNode) else f"a {odd.id}"
            problem = f"key {name} is not a word"
            raise yaml.constructor.ConstructorError(None, None, problem, odd.start_mark)
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _load(text: str) -> Any:
    return yaml.load(text, _Loader)


def _parse(kind: Any, key: str, value: str) -> Any:
    """Return the value of `key=value`: the text itself for a text setting, else the parsed YAML."""
    if _is_text(kind):
        return value if value or type(None) not in get_args(kind) else None
    try:
        if re.search(r"(^|\s)#", value):
            raise yaml.YAMLError("it has a comment")
        return _load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError for !!int x
        raise ConfigError(key, f"{value!r} is not YAML", "write a number, a word or a [list]") from error


def _is_text(kind: Any) -> bool:
    """Whether a type accepts only strings, paths or a fixed set of words."""
    if kind in (str, Path):
        return True
    if get_origin(kind) is Literal:
        return all(isinstance(word, str) for word in get_args(kind))
    is_union = get_origin(kind) in (Union, UnionType)
    return is_union and all(_is_text(option) for option in get_args(kind) if option is not type(None))


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
        names = sorted(_field_types(_group(model, first["loc"])))
        close = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(names)}"
        return ConfigError(path, "unknown key", hint)
    if first["type"] in ("missing", "missing_argument"):
        return ConfigError(path, "is not set", f"add {path}=VALUE")
    if first["type"] == "string_type" and isinstance(first["input"], int | float):
        return ConfigError(path, f"{first['input']} is read as a number", "write it in quotes")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[:1].lower() + message[1:]
    # The input of a rule about several keys is the whole dictionary; the rule's message names the keys that matter.
    found = "cannot be used" if isinstance(first["input"], dict) else repr(first["input"])
    return ConfigError(path, found, message)


def _group(model: type[Any], location: Iterable[int | str]) -> Any:
    """Return the class that has the last part of `location` as a field."""
    kind: Any = model
    for part in list(location)[:-1]:
        kind = _field_types(kind).get(str(part), kind)
        for option in get_args(kind):
            if isinstance(option, type) and (is_dataclass(option) or issubclass(option, BaseModel)):
                kind = option
    return kind


def _field_types(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: info.annotation for name, info in kind.model_fields.items()}
    if is_dataclass(kind):
        return get_type_hints(kind)
    return {}


def unknown_variables() -> list[str]:
    """Return a warning for each environment variable with our prefix that is not read, most likely a typo."""
    known = [ENV_PREFIX + name.upper() for name in (*Settings.model_fields, *_OTHER_VARIABLES)]
    lines = []
    for name in sorted(name for name in os.environ if name.upper().startswith(ENV_PREFIX) and name not in known):
        close = difflib.get_close_matches(name.upper(), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(sorted(known))}"
        lines.append(f"{name}: unknown variable, which changes nothing; {hint}")
    return lines


def sqlite_uri(file: Path) -> str:
    """Return the URI of the SQLite database at an absolute path, which may contain any characters."""
    quoted = str(file).replace("%", "%25").replace("?", "%3F")
    # For a plain sqlite:/// URI, MLflow would create the folder without decoding the %-escapes in its name.
    return f"sqlite:///{file}" if quoted == str(file) else f"sqlite+pysqlite:///{quoted}"


class Settings(Config):
    """Settings of this installation, each read from the variable `ANIMEDIFFUSION_<NAME>` if it is set.

    MLflow, AWS and Ray are configured by their own usual variables.
    """

    workspace: Path = Path("workspace")
    """Folder for data, runs, the embedded MLflow database and its artifacts."""
    model_name: str = "animediffusion"
    """Name of the registered model."""
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    """Implementation of attention."""
    keys: str | None = None
    """File with the hashes of the API keys, a path or s3:// URI; keys.json in the workspace if None."""
    corrections: str | None = None
    """Store of corrections, a folder or s3:// URI that all servers share; None means that servers keep no request and
    take no corrections. A server keeps each request that it answered in this store for 7 days, at most the newest
    10,000 requests and 20 GiB, so that its picture can be corrected; corrections stay until they are deleted."""

    @field_validator("model_name")
    @classmethod
    def _check_model_name(cls, name: str) -> str:
        if not _MODEL_NAME.fullmatch(name) or name.strip() != name:
            raise ValueError("write 1 to 80 characters, none of them / : @ . % or a quote, and no space at either end")
        return name

    @classmethod
    def from_environment(cls, **overrides: Any) -> Settings:
        """Read the settings from the environment; arguments that are not None take precedence."""
        values = {
            name: os.environ[ENV_PREFIX + name.upper()]
            for name in cls.model_fields
            if os.environ.get(ENV_PREFIX + name.upper())
        }
        values.update({key: value for key, value in overrides.items() if value is not None})
        settings = cls.check(values)
        return settings.model_copy(update={"workspace": expanded(settings.workspace).absolute()})

    @property
    def tracking_uri(self) -> str:
        """MLFLOW_TRACKING_URI if it is set, else the SQLite database in the workspace."""
        return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(self.database)

    @property
    def database(self) -> Path:
        """Database file of the embedded MLflow."""
        return self.workspace / "mlflow.db"

    @property
    def keys_uri(self) -> str:
        """Absolute path or URI of the file of API keys."""
        given = self.keys or str(self.workspace / "keys.json")
        return given if is_uri(given) else str(expanded(given).absolute())

    @property
    def corrections_uri(self) -> str | None:
        """Absolute path or URI of the corrections store; None if corrections are off."""
        given = self.corrections
        return given if given is None or is_uri(given) else str(expanded(given).absolute())

    @property
    def artifact_root(self) -> Path:
        """Artifact folder of the embedded MLflow (a server has its own)."""
        return self.workspace / "artifacts"
