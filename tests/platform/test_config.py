import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field, model_validator

from animediffusion.platform.config import Config, Settings, read_yaml, unknown_variables
from animediffusion.platform.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Engine:
    power: int = 5

    def __post_init__(self):
        if self.power < 0:
            raise ValueError(f"power must be positive, got {self.power}")


@dataclass(frozen=True, kw_only=True)
class Car:
    engine: Engine = field(default_factory=Engine)
    color: str = "red"


class Trip(Config):
    kilometers: int = Field(gt=0)
    car: Car = Car()
    spare: Engine | None = None
    stops: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _together(self):
        if self.kilometers > 100 and not self.stops:
            raise ValueError("a trip above 100 km needs stops")
        return self


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        (tmp_path / "trip.yaml").write_text(text)
        return tmp_path / "trip.yaml"

    return write


def failure(*overrides, **values):
    with pytest.raises(ConfigError) as caught:
        Trip.load(None, overrides, **values)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_overrides_win_over_values_which_win_over_the_file(yaml_file):
    path = yaml_file("kilometers: 1\ncar: {color: blue}\nstops: [a]\n")
    trip = Trip.load(path, ["car.engine.power=7", "stops=[x, y]"], kilometers=3)
    assert (trip.kilometers, trip.car, trip.stops) == (3, Car(engine=Engine(power=7), color="blue"), ("x", "y"))


def test_an_override_is_read_as_yaml():
    trip = Trip.load(None, ["kilometers=12", "car.color=no way = here", "spare=null"])
    assert (trip.kilometers, trip.car.color, trip.spare) == (12, "no way = here", None)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("kilometrs=1", "kilometrs: unknown key; did you mean 'kilometers'?"),
        ("car.colour=red", "car.colour: unknown key; did you mean 'color'?"),
        ("car.engine.powr=1", "car.engine.powr: unknown key; did you mean 'power'?"),
        ("spare.powr=1", "spare.powr: unknown key; did you mean 'power'?"),
        ("car.engine.zzz=1", "car.engine.zzz: unknown key; one of power"),
        ("kilometers=-3", "kilometers: -3; input should be greater than 0"),
        ("kilometers=far", "kilometers: 'far'; input should be a valid integer"),
        ("car.engine.power=-1", "car.engine: cannot be used; power must be positive, got -1"),
        ("kilometers=200", "Trip: cannot be used; a trip above 100 km needs stops"),
        ("kilometers.unit=km", "kilometers.unit: kilometers is 1, not a group of keys; set kilometers itself"),
        ("kilometers", "kilometers: is not of the form key=value"),
        ("=3", "=3: is not of the form key=value"),
        ("stops=[a", "stops: '[a' is not YAML"),
    ],
)
def test_a_wrong_override_is_one_line_that_says_what_is_allowed(override, line):
    assert failure(override, kilometers=1).startswith(line)


class Run(Config):
    """Settings of every kind that a recipe has."""

    data: str = ""
    name: str | None = "default"
    place: Path = Path("x")
    mode: Literal["on", "off"] = "on"
    seed: int = 0
    minutes: float | None = 1.0
    workers: int | tuple[int, int] = 1
    fast: bool = False
    car: Car = Car()


@pytest.mark.parametrize(
    "text",
    [
        "my #set",
        "/tmp/d: x",
        "2024-01-01",
        "007",
        "1:30",
        "on",
        "null",
        "~",
        "[a",
        "'q'",
        "{a: b}",
        "a=b",
        " x ",
        "%41",
        "!!x",
    ],
)
def test_an_override_of_text_is_the_text(text):
    assert Run.load(None, [f"data={text}"]).data == text
    assert Run.load(None, [f"name={text}"]).name == text
    assert Run.load(None, [f"place={text}"]).place == Path(text)
    assert Run.load(None, [f"car.color={text}"]).car.color == text


def test_an_override_of_something_else_is_yaml_without_surprises():
    given = ["mode=off", "seed=12", "minutes=1e-1", "workers=[4, 8]", "fast=on", "name="]
    run = Run.load(None, given)
    assert (run.mode, run.seed, run.minutes, run.workers, run.fast, run.name) == ("off", 12, 0.1, (4, 8), True, None)
    assert Run.load(None, ["minutes=null"]).minutes is None
    for wrong in ("seed=1:30", "minutes=1:30", "seed=2024-01-01", "seed=0x10", "seed=1 #2", "seed=#1", "seed=1 2"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            Run.load(None, [wrong])
    assert Run.load(None, ["seed=010"]).seed == 10


def test_an_override_given_twice_raises_config_error():
    assert failure("kilometers=1", "kilometers=2") == "kilometers: given twice; give it once"


def test_a_file_holds_text_where_yaml_has_surprises(yaml_file):
    path = yaml_file("data: 2024-01-01\nname: 007\nmode: off\nfast: on\nplace: 1:30\nminutes: 1e-1\nseed: -3\n")
    run = Run.load(path)
    assert (run.data, run.name, run.mode, run.fast, run.place) == ("2024-01-01", "007", "off", True, Path("1:30"))
    assert (run.minutes, run.seed) == (0.1, -3)
    with pytest.raises(ConfigError, match="name: 7 is read as a number; write it in quotes"):
        Run.load(yaml_file("name: 7\n"))


def test_a_key_given_twice_in_a_file_raises_config_error(yaml_file):
    for text in ("a: 1\na: 2\n", "b: {a: 1, a: 2}\n"):
        with pytest.raises(ConfigError, match="key 'a' is given twice"):
            read_yaml(yaml_file(text))


def test_what_is_dumped_is_read_back(yaml_file):
    values = {
        "a": "2024-01-01",
        "b": "007",
        "c": "on",
        "d": None,
        "e": 1e-06,
        "f": [1, 2.5, "1:30", True],
        "g": "~",
        "h": 1e20,
    }
    assert read_yaml(yaml_file(yaml.safe_dump(values))) == values


def test_a_required_value_that_is_missing_is_named():
    assert failure() == "kilometers: is not set; add kilometers=VALUE"


@pytest.mark.parametrize(
    ("text", "found"),
    [("a: [1", "is not YAML"), ("- 1\n- 2\n", "holds a list"), ("", "holds no keys"), ("\tx", "is not YAML")],
)
def test_a_file_that_is_not_a_mapping_is_rejected_by_name(yaml_file, text, found):
    with pytest.raises(ConfigError, match=found) as caught:
        read_yaml(yaml_file(text))
    assert str(caught.value).startswith(str(yaml_file(text)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 1\n\tb: 2\n", r"found character '\t' that cannot start any token, line 2, column 1"),
        ("a: *.png\n", "expected alphabetic or numeric character, but found '.', line 1, column 5"),
        ("a: 1\n---\nb: 2\n", "found another document, line 2, column 1"),
        ("a: " + "[" * 3000 + "]" * 3000, "it is nested too deeply"),
        ("a:\n  1: x\n", "key '1' is not a word, line 2, column 3"),
        ("~: x\n", "key '~' is not a word, line 1, column 1"),
        ("? [a]\n: x\n", "key a sequence is not a word, line 1, column 3"),
    ],
)
def test_a_file_that_is_not_yaml_raises_config_error_with_the_reason(yaml_file, text, found):
    with pytest.raises(ConfigError) as caught:
        read_yaml(yaml_file(text))
    assert str(caught.value) == f"{yaml_file(text)}: is not YAML ({found}); write key: value lines"


def test_the_text_encodings_of_windows_are_read_or_named(yaml_file):
    path = yaml_file("")
    path.write_bytes("a: 1\r\n".encode("utf-8-sig"))
    assert read_yaml(path) == {"a": 1}
    path.write_bytes("a: 1\r\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"is not YAML \(its byte 0 is not UTF-8\); save it as UTF-8"):
        read_yaml(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory; give an existing YAML file"):
        read_yaml(tmp_path / "nothing.yaml")


def test_bytes_that_are_not_text_are_not_yaml(tmp_path):
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_yaml(tmp_path / "image.yaml")


def test_a_config_cannot_be_changed_after_it_was_made():
    trip = Trip(kilometers=1)
    with pytest.raises(ValueError, match="frozen"):
        trip.kilometers = 2


def test_settings_come_from_the_environment_and_arguments_win(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("ANIMEDIFFUSION_WORKSPACE", str(tmp_path / "from-environment"))
    monkeypatch.setenv("ANIMEDIFFUSION_MODEL_NAME", "studio")
    settings = Settings.from_environment()
    assert (settings.workspace, settings.model_name) == (tmp_path / "from-environment", "studio")
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/from-environment/mlflow.db"
    assert Settings.from_environment(workspace=str(tmp_path / "argument")).workspace == tmp_path / "argument"


def test_a_relative_workspace_stays_where_the_command_was_given(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANIMEDIFFUSION_WORKSPACE", raising=False)
    assert Settings.from_environment().workspace == tmp_path / "workspace"


def test_a_tracking_server_replaces_the_embedded_database(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert Settings.from_environment().tracking_uri == "http://127.0.0.1:5000"


def test_a_misspelled_variable_is_named_with_the_one_that_was_meant(monkeypatch):
    assert [line for line in unknown_variables() if "WORKSPCE" in line] == []
    monkeypatch.setenv("ANIMEDIFFUSION_WORKSPCE", "x")
    monkeypatch.setenv("animediffusion_keys", "x")
    first, second = unknown_variables()
    assert first == (
        "ANIMEDIFFUSION_WORKSPCE: unknown variable, which changes nothing; did you mean ANIMEDIFFUSION_WORKSPACE?"
    )
    assert second.startswith("animediffusion_keys: unknown variable")


def test_every_variable_that_the_code_reads_is_known(monkeypatch):
    root = Path(__file__).parents[2]
    sources = [
        path for folder in ("platform", "models", "pipelines", "serve", "src") for path in (root / folder).rglob("*.py")
    ]
    for name in {name for path in sources for name in re.findall(r"ANIMEDIFFUSION_[A-Z_]+[A-Z]", path.read_text())}:
        monkeypatch.setenv(name, "x")
    assert unknown_variables() == []


def test_an_unknown_attention_in_the_environment_raises_config_error(monkeypatch):
    monkeypatch.setenv("ANIMEDIFFUSION_ATTENTION", "flash")
    with pytest.raises(ConfigError, match="attention: 'flash'; input should be 'auto', 'xformers' or 'sdpa'"):
        Settings.from_environment()


@pytest.mark.parametrize("name", ["a/b", "a@b", "a:b", "it's", "..", "v1.0", " ", "a ", "x" * 81, "a\nb", "50%"])
def test_a_model_name_that_cannot_be_referred_to_raises_config_error(name):
    with pytest.raises(ConfigError, match=r"model_name: .*; write 1 to 80 characters, none of"):
        Settings.from_environment(model_name=name)


@pytest.mark.parametrize("name", ["animediffusion", "line art_2-b", "\N{HIRAGANA LETTER KA}" * 80])
def test_other_model_names_are_taken(name):
    assert Settings.from_environment(model_name=name).model_name == name


def test_a_number_that_yaml_cannot_read_is_one_line(yaml_file):
    for tag in ("int", "float"):
        assert f"kilometers: '!!{tag} x' is not YAML" in failure(f"kilometers=!!{tag} x")
        with pytest.raises(ConfigError, match="is not YAML"):
            read_yaml(yaml_file(f"kilometers: !!{tag} x"))
