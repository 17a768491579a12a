"""The command line in this process: exit codes, the one line of an error, JSON."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from animediffusion.cli import app as cli
from animediffusion.models.bundle import BundleConfig, save_bundle
from animediffusion.models.network.unet import UNetConfig
from animediffusion.pipelines.training.recipe import load_recipe, plain
from animediffusion.platform.errors import Interrupted


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """One for all: the embedded MLflow needs seconds to make its database."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture
def command(capsys, monkeypatch, tmp_path, workspace):
    """A function that runs a command in an empty folder and returns its exit code, stdout and stderr as lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANIMEDIFFUSION_WORKSPACE", str(workspace))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(*words):
        code = cli.run([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run


@pytest.fixture
def bundle(tmp_path):
    torch.manual_seed(0)
    network = UNetConfig(base_channels=32, channel_multipliers=(1,), num_res_blocks=1, patch_size=4, head_channels=32)
    config = BundleConfig(network=network, image_size=32)
    save_bundle(tmp_path / "bundle", config.build(), config)
    return tmp_path / "bundle"


WRONG_USAGE = [
    (["paint"], "no such command 'paint'"),
    (["models", "promot", "3"], "no such command 'promot'"),
    (["train"], "missing argument 'RECIPE'"),
    (["evaluate", "m", "d", "--limt", "3"], "no such option: --limt"),
    (["evaluate", "m", "d", "--native", "--on-cluster"], "--native: with --on-cluster; one of the two"),
    (["evaluate", "m", "d", "--limit", "0"], "--limit: '0'; input should be greater than or equal to 1"),
    (["data", "synthesize", "d", "--count", "many"], "--count: 'many'; input should be a valid integer"),
    (["serve", "--port", "70000"], "--port: '70000'; input should be less than or equal to 65535"),
    (["models", "canary", "all"], "PERCENT: 'all'; input should be a valid integer"),
    (
        ["serve", "--port"],
        "animediffusion serve: option '--port' requires an argument; see animediffusion serve --help",
    ),
    (["train", "demo", "--workspace"], "--workspace: no folder given; write --workspace DIR"),
    (["train", "dmeo"], "recipe 'dmeo': unknown; did you mean 'demo'?"),
    (["train", "nothing.yaml"], "nothing.yaml: No such file or directory"),
    (["train", "demo", "network.base_chanels=96"], "network.base_chanels: unknown key; did you mean 'base_channels'?"),
    (["train", "demo", "batch_size=-4"], "batch_size: -4; input should be greater than 0"),
    (["train", "demo", "--no-estimate"], "--no-estimate: given without --dry-run; omit it"),
    (["train", "demo", "fast"], "fast: is not of the form key=value"),
    (["train", "demo", "data=/nowhere"], "/nowhere: no dataset (no manifest.json)"),
    (["evaluate", "/nowhere", "d"], "/nowhere: no such folder"),
    (["data", "show", "/nowhere"], "/nowhere"),
    (["data", "ingest", "/nowhere", "out"], "/nowhere"),
    (["models", "promote", "models:/animediffusion@nobody"], "nobody"),
    (["models", "register", "/nowhere"], "/nowhere"),
    (["keys", "create", "a b"], "NAME: 'a b'; up to 64 letters"),
    (["keys", "revoke", "nobody"], "key 'nobody': does not exist; one of none"),
    (["serve", "--host", "0.0.0.0"], "animediffusion keys create NAME"),
    (["colorize", "a.png", "--reference", "b.png", "--out", "o", "--size", "huge"], "--size: 'huge'; native or model"),
    (
        ["colorize", "a.png", "--reference", "b.png", "--out", "o", "--model", "m", "--url", "http://127.0.0.1:1"],
        "--model and --url: both given",
    ),
    (["colorize", "", "--reference", "b.png", "--out", "o"], "argument after colorize: is empty"),
    (["colorize", "a.png", "--reference", "b.png", "--out", ""], "argument after --out: is empty"),
    (["colorize", "a.png", "--reference=", "--out", "o"], "--reference: is empty"),
    (["models", "export", "1", ""], "argument after 1: is empty"),
]


@pytest.mark.parametrize(("words", "expected"), WRONG_USAGE, ids=[" ".join(words) for words, _ in WRONG_USAGE])
def test_wrong_usage_ends_with_2_and_one_line(command, words, expected):
    code, out, err = command(*words)
    assert (code, out) == (2, [])
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert expected in err[0]


def test_a_key_is_made_shown_once_listed_and_revoked(command, tmp_path):
    code, out, err = command("keys", "create", "studio", "--workspace", tmp_path)
    assert code == 0
    [key] = out
    assert "ANIMEDIFFUSION_API_KEY" in err[0]
    assert key not in "".join(err)
    code, out, _ = command("keys", "list", "--workspace", tmp_path, "--json")
    [row] = json.loads(out[-1])
    assert (row["name"], row["revoked"]) == ("studio", None)
    assert command("keys", "revoke", "studio", "--workspace", tmp_path)[0] == 0
    code, out, _ = command("keys", "list", "--workspace", tmp_path)
    assert out[1].startswith("studio")
    assert key not in "".join(out)
    code, out, _ = command("keys", "create", "other", "--workspace", tmp_path, "--json")
    assert set(json.loads(out[-1])) == {"name", "key"}


def test_a_demo_that_could_not_ask_its_own_server_says_so_before_it_trains(command, tmp_path, monkeypatch):
    monkeypatch.delenv("ANIMEDIFFUSION_API_KEY", raising=False)
    command("keys", "create", "studio", "--workspace", tmp_path)
    code, _, err = command("demo", "--workspace", tmp_path)
    assert code == 2
    assert err[0].startswith("error: ANIMEDIFFUSION_API_KEY: is not set, and")


def test_debug_shows_where_an_error_comes_from(command):
    code, _, err = command("train", "demo", "data=/nowhere", "--debug")
    assert code == 2
    assert err[0].startswith("Traceback")
    assert err[-1].startswith("error: /nowhere: no dataset")


@pytest.mark.parametrize("words", [[], ["data"]])
def test_a_group_without_a_command_shows_its_help(command, words):
    code, out, err = command(*words)
    assert (code, out) == (2, [])
    assert err[0].startswith("Usage: animediffusion")
    assert "Commands:" in err


@pytest.mark.parametrize("words", [["--version"], ["data", "synthesize", "--help"]])
def test_asking_for_help_is_not_an_error(command, words):
    code, out, err = command(*words)
    assert (code, err) == (0, [])
    assert out


def test_the_workspace_may_be_given_before_or_after_the_command(command, faces_dataset, tmp_path, monkeypatch):
    monkeypatch.delenv("ANIMEDIFFUSION_WORKSPACE")
    words = ("train", "demo", f"data={faces_dataset}", "name=x", "--dry-run", "--no-estimate", "--json")
    places = []
    for line in (
        ("--workspace", tmp_path / "w", *words),
        (*words, "--workspace", tmp_path / "w"),
        (*words, f"--workspace={tmp_path / 'w'}"),
        words,
    ):
        code, out, _ = command(*line)
        assert code == 0
        places.append(json.loads(out[-1])["run_dir"])
    assert places == [str(tmp_path / "w" / "runs" / "x")] * 3 + [str(tmp_path / "workspace" / "runs" / "x")]


def test_options_behind_two_dashes_belong_to_the_job():
    rest, common = cli.split_common(["jobs", "submit", "--json", "--", "train", "demo", "--json", "--workspace", "w"])
    assert rest == ["jobs", "submit", "--", "train", "demo", "--json", "--workspace", "w"]
    assert (common.json, common.workspace) == (True, None)


def test_a_dry_run_prints_the_resolved_run_and_writes_nothing(command, faces_dataset, tmp_path):
    code, out, _ = command("train", "demo", f"data={faces_dataset}", "seed=5", "--dry-run", "--no-estimate")
    assert code == 0
    assert "M parameters, 32 px" in out[0]
    resolved = yaml.safe_load("\n".join(out))
    assert (resolved["seed"], resolved["batch_size"]) == (5, 32)
    assert list(tmp_path.iterdir()) == []


MISFITS = [
    (["demo", "prediction=eps"], "recipe 'demo': prediction 'eps' cannot start on path 'flow'"),
    (
        ["animediffusion-strict", "prediction=x0"],
        "strict mode needs prediction 'eps', got 'x0'; change path, prediction",
    ),
    (
        ["animediffusion-strict", "path.zero_terminal=true"],
        "recipe 'animediffusion-strict': prediction 'eps' cannot start",
    ),
]


@pytest.mark.parametrize(("words", "expected"), MISFITS, ids=[" ".join(words) for words, _ in MISFITS])
def test_parts_of_a_recipe_that_do_not_fit_end_with_2_before_anything_starts(command, faces_dataset, words, expected):
    code, _, err = command("train", *words, f"data={faces_dataset}", "--dry-run")
    assert (code, len(err)) == (2, 1)
    assert expected in err[0]


def test_a_run_of_the_same_name_with_other_settings_ends_with_2_and_their_names(command, faces_dataset, workspace):
    old = load_recipe("demo", [f"data={faces_dataset}", "name=x", "augment.flip=0.25"])
    folder = workspace / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(old)))
    code, _, err = command("train", "demo", f"data={faces_dataset}", "name=x", "seed=1", "log_every=3")
    assert code == 2
    assert err == [
        "error: run x: already exists with a different augment.flip, seed; choose another name=, or the old values"
    ]


def test_json_is_the_last_line_and_the_only_one_on_stdout(command, bundle, faces_dataset):
    code, out, err = command("evaluate", bundle, faces_dataset, "--limit", "2", "--json")
    assert code == 0
    assert len(out) == 1
    assert json.loads(out[0])["num_images"] == 2
    assert err  # progress


def test_without_json_people_get_a_table(command, bundle, faces_dataset):
    code, out, _ = command("evaluate", bundle, faces_dataset, "--limit", "2", "--out", "o")
    assert code == 0
    assert "2 images" in out[0]
    assert [line.split()[0] for line in out[2:6]] == ["model", "copy_reference", "mean_color", "sketch"]
    assert out[-1] == "picture: o/grid.png"


def test_native_pictures_are_measured_in_another_table(command, bundle, faces_dataset):
    code, out, _ = command("evaluate", bundle, faces_dataset, "--native", "--limit", "2")
    assert code == 0
    assert "2 images" in out[0]
    assert "style flat" in out[0]
    assert [line.split()[0] for line in out[2:]] == ["model", "copy_reference", "mean_color"]


def test_drawing_ends_with_what_was_drawn(command, tmp_path):
    code, out, _ = command("data", "synthesize", "faces", "--count", "4", "--size", "32", "--json")
    assert code == 0
    assert json.loads(out[-1])["rows"] == 4
    code, out, _ = command("data", "show", "faces", "--out", "sheet.png", "--json")
    assert code == 0
    assert json.loads(out[-1])["sheet"] == "sheet.png"
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_an_empty_registry_says_how_to_begin(command):
    assert command("models", "list")[:2] == (0, ["no versions yet; run `animediffusion models register DIR`"])
    code, out, _ = command("models", "history", "--json")
    assert (code, json.loads(out[-1])) == (0, [])


def test_what_a_command_would_not_use_ends_with_2(command):
    code, _, err = command("models", "list", "--workspace", "a", "--workspace=b")
    assert (code, err) == (2, ["error: --workspace: given twice; give it once"])
    code, _, err = command("jobs", "submit", "--wiat", "--", "doctor")
    assert code == 2
    assert err[0].startswith("error: --wiat: unknown option of jobs submit; write jobs submit")
    code, _, err = command("train", "demo", "data=a", "data=b")
    assert (code, err) == (2, ["error: data: given twice; give it once"])


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("colorize a.png --reference b.png --out o --out p", "--out"),
        ("colorize a.png --reference b.png --out o --seed=1 --seed=2", "--seed"),
        ("models promote 1 --force --why --force --why again", "--why"),
        ("tune sampler m d --register --no-register", "--register"),
        ("data ingest a b --size 32 --size 64", "--size"),
    ],
)
def test_an_option_given_twice_ends_with_2(command, words, option):
    assert command(*words.split()) == (2, [], [f"error: {option}: given twice; give it once"])


def test_a_misspelled_variable_is_one_warning(command, monkeypatch):
    monkeypatch.setenv("ANIMEDIFFUSION_KEY", "x")
    code, _, err = command("models", "list")
    assert code == 0
    assert err == [
        "warning: ANIMEDIFFUSION_KEY: unknown variable, which changes nothing; did you mean ANIMEDIFFUSION_KEYS?"
    ]


def test_an_unforeseen_error_is_one_line_and_ends_with_1(command, monkeypatch, faces_dataset):
    def broken(*_):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("animediffusion.pipelines.training.plan.plan", broken)
    code, _, err = command("train", "demo", f"data={faces_dataset}")
    assert (code, err) == (1, ["error: RuntimeError: first line; run again with --debug"])


def test_a_file_that_cannot_be_written_is_named_with_the_reason(command, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "animediffusion.pipelines.release.release.show", lambda *arguments: arguments[-1].write_bytes(b"PNG")
    )
    assert command("models", "show", "1", "--out", tmp_path) == (
        2,
        [],
        [f"error: {tmp_path}: is a directory; check the path and its permissions"],
    )


@pytest.mark.parametrize(
    ("shell", "code", "line"),
    [
        ("keys list 2>&-", 0, b""),
        ("keys list >/dev/full", 2, b"error: standard output: no space left on device; "),
    ],
)
def test_streams_that_are_closed_or_full(tmp_path, shell, code, line):
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m animediffusion {shell}"],
        cwd=tmp_path,
        env=os.environ | {"ANIMEDIFFUSION_WORKSPACE": str(tmp_path / "ws"), "PYTHONUNBUFFERED": ""},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr[: len(line)], done.stderr.count(b"\n")) == (code, line, bool(line))


def test_what_ray_prints_after_the_result_goes_to_stderr(tmp_path):
    code = "import atexit; atexit.register(print, 'late'); from animediffusion.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "keys", "list", "--json", "--workspace", str(tmp_path)],
        capture_output=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (b"[]\n", b"late\n")


def test_a_result_may_name_what_the_terminal_cannot_print(command, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("animediffusion.pipelines.release.release.history", lambda _: [{"reason": "線\udc90"}])
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.run(["models", "history"]) == 0
    assert out.buffer.getvalue().splitlines() == [b"reason", rb"\u7dda\x90"]


def test_a_working_directory_that_is_gone_is_named(command, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    line = "error: working directory: no longer exists; change to another folder"
    assert command("keys", "list") == (2, [], [line])
    assert command("keys", "--help")[0] == 0


def test_a_reason_with_line_ends_stays_in_its_row_of_the_history(command, monkeypatch):
    monkeypatch.setattr(
        "animediffusion.pipelines.release.release.history", lambda _: [{"action": "promote", "reason": "a\x1b[2Jb\nc"}]
    )
    assert command("models", "history")[1] == ["action   reason", r"promote  a\x1b[2Jb\nc"]


def test_a_reason_may_be_empty(command):
    for words in (("--why", ""), ("--why=",)):
        assert "argument" not in command("models", "rollback", *words)[2][0]


def test_a_run_stopped_by_a_signal_ends_with_its_number(capsys, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise Interrupted(15, "run demo-1", 40)

    monkeypatch.setattr(cli, "commands", lambda: stop)
    assert cli.run(["train", "demo"]) == 143
    assert capsys.readouterr().err == "run demo-1: stopped at step 40; run the same command again to resume\n"
