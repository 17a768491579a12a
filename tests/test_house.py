"""What holds the folders together: imports, packaging, command line, recipes, and what runs it elsewhere."""

import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from importlib.metadata import distribution
from pathlib import Path

import pytest
import ray
import typer
import yaml
from packaging.specifiers import SpecifierSet
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
from ray.serve.schema import ServeDeploySchema

from animediffusion.cli import app as cli
from animediffusion.pipelines.training.recipe import load_recipe, recipe_names
from animediffusion.platform.api_keys import Keys
from animediffusion.platform.errors import ConfigError
from animediffusion.serve.deployments import build_app

ROOT = Path(__file__).parents[1]
FOLDERS = ("platform", "models", "pipelines", "serve")
PACKAGE = ROOT / "src" / "animediffusion"
HOMES = [PACKAGE / "cli", *(ROOT / name for name in FOLDERS)]
SOURCES = sorted([*PACKAGE.glob("*.py"), *(path for home in HOMES for path in home.rglob("*.py"))])
MOST_FILES = 12
"""Of one folder: more are not found at a glance."""

MAY_IMPORT = {
    "animediffusion": {"animediffusion", "pipelines", "serve", "models", "platform"},
    "pipelines": {"pipelines", "models", "platform"},
    "serve": {"serve", "models", "platform"},
    "models": {"models"},
    "platform": {"platform"},
}
ERRORS = "animediffusion.platform.errors"
"""The one vocabulary of errors, which needs only the standard library."""
LAYERS = {
    "platform": {
        "storage": {"errors", "network"},
        "images": {"errors"},
        "tracking": {"config", "errors", "images", "network", "storage"},
        "registry": {"config", "errors", "network", "storage", "tracking"},
        "cluster": {"config", "errors", "network", "storage"},
        "corrections": {"atomic_update", "config", "errors", "storage"},
    },
    "models": {
        "network": {"sampler_options"},
        "diffusion": {"network"},
        "augmentation": {"authors", "network", "tensors"},
        "authors": {"network", "diffusion", "bundle", "tensors"},
        "training": {"network", "diffusion", "augmentation", "authors", "bundle", "compile", "tensors"},
    },
    "pipelines": {
        "data": set(),
        "synthetic": set(),
        "evaluation": {"data", "synthetic"},
        "training": {"data", "evaluation"},
        "estimate": {"data", "training"},
        "release": {"evaluation", "training"},
        "tuning": {"evaluation", "training", "release"},
    },
    "serve": {
        "rendering": set(),
        "engine": set(),
        "replica": {"engine", "rendering", "protocol", "network_inputs", "retry_after"},
        "api": {"rendering", "protocol", "retry_after"},
        "client": {"engine", "rendering", "replica", "standalone"},
        "bulk": {"client", "engine", "rendering", "replica"},
    },
}
"""What the files of a subfolder may import of the folder around it. Files that lie in no subfolder may import all."""

MODELS_NEED = {"torch", "numpy", "safetensors"}
MODELS_NEED_ALSO = {"augment.py": {"kornia"}, "attention.py": {"xformers"}}

VERBS = {
    "demo",
    "data",
    "train",
    "evaluate",
    "improve",
    "tune",
    "models",
    "colorize",
    "serve",
    "keys",
    "corrections",
    "jobs",
    "doctor",
}


def imports_of(path):
    """Every (module, name or None) that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from ((node.module, alias.name) for alias in node.names)


def own_folder(module, name):
    """The folder that an import reaches into, "animediffusion" for cli and console, None for what all may import."""
    parts = [*module.split("."), *([name] if name else [])]
    if parts[0] != "animediffusion" or parts[1:] in ([], ["__version__"]) or module == ERRORS:
        return None
    return parts[1] if parts[1] in FOLDERS else "animediffusion"


def git(*arguments):
    """Output of git, also where the checkout belongs to another user than the one who runs the tests."""
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def tracked_files():
    """Files of the working tree that git knows or would take."""
    names = git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    return [name for name in names if os.path.lexists(ROOT / name)]


def python(*arguments, cwd, path):
    """Output of a fresh interpreter that sees `path` first."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def leaf_commands(group, names=()):
    """Every command of the command line, as its words."""
    if not hasattr(group, "commands"):
        yield names
        return
    for name, command in group.commands.items():
        yield from leaf_commands(command, (*names, name))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder):
    home = PACKAGE if folder == "animediffusion" else ROOT / folder
    files = [path for path in SOURCES if home in path.parents]
    assert files
    for path in files:
        found = {own_folder(*pair) for pair in imports_of(path)} - {None}
        assert found <= MAY_IMPORT[folder], f"{path.relative_to(ROOT)} imports {found}"


@pytest.mark.parametrize(("folder", "inner"), [(folder, inner) for folder in LAYERS for inner in LAYERS[folder]])
def test_imports_between_subfolders_run_one_way(folder, inner):
    files = list((ROOT / folder / inner).rglob("*.py"))
    assert files
    for path in files:
        reached = {
            parts[2]
            for module, name in imports_of(path)
            if (parts := [*module.split("."), name])[:2] == ["animediffusion", folder]
        }
        assert reached <= LAYERS[folder][inner] | {inner}, f"{path.relative_to(ROOT)} imports {reached}"


def test_every_subfolder_belongs_to_a_layer():
    for folder in FOLDERS:
        there = {path.name for path in (ROOT / folder).iterdir() if list(path.glob("*.py"))}
        assert there == set(LAYERS[folder])


def test_no_folder_holds_more_files_than_one_sees_at_a_glance():
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in SOURCES)
    assert {folder: number for folder, number in counts.items() if number > MOST_FILES} == {}


def test_no_two_classes_have_the_same_name():
    names = Counter(
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, number in names.items() if number > 1] == []


def test_models_need_only_torch_numpy_and_safetensors():
    for path in (ROOT / "models").rglob("*.py"):
        tops = {module.partition(".")[0] for module, _ in imports_of(path)} - set(sys.stdlib_module_names)
        allowed = MODELS_NEED | MODELS_NEED_ALSO.get(path.name, set()) | {"animediffusion"}
        assert tops <= allowed, f"models/{path.name} imports {tops - allowed}"


def test_platform_does_not_need_torch():
    tops = {module.partition(".")[0] for path in (ROOT / "platform").rglob("*.py") for module, _ in imports_of(path)}
    assert "torch" not in tops


def test_the_errors_need_only_the_standard_library():
    tops = {module.partition(".")[0] for module, _ in imports_of(ROOT / "platform" / "errors.py")}
    assert tops <= set(sys.stdlib_module_names)


def test_no_folder_is_a_regular_package():
    assert [path for folder in (*FOLDERS, "tests") for path in (ROOT / folder).rglob("__init__.py")] == []


def test_a_checkout_on_the_path_does_not_hide_the_standard_librarys_platform():
    code = "import platform; print(platform.__file__); platform.system()"
    assert python("-c", code, cwd=ROOT, path=ROOT).strip() == platform.__file__


@pytest.mark.ray
def test_a_ray_worker_finds_the_standard_librarys_platform_too(ray_cluster):
    root = str(ROOT)

    @ray.remote
    def where():
        sys.path.insert(0, root)
        sys.modules.pop("platform", None)
        import platform as found

        return found.__file__

    assert ray.get(where.remote()) == platform.__file__


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_package_reaches_a_folder_through_a_committed_relative_link(folder):
    link = PACKAGE / folder
    assert link.readlink() == Path("../..", folder)
    assert git("ls-files", "-s", str(link)).startswith("120000 ")


def test_help_lists_the_commands_and_imports_nothing_heavy():
    code = "import sys; from animediffusion.cli.app import run; run(['--help']); print('loaded', *sys.modules)"
    shown, _, loaded = python("-c", code, cwd=ROOT, path="").partition("loaded ")
    listed = re.findall(r"^  (\w+)  ", shown.partition("Commands:")[2], flags=re.MULTILINE)
    assert set(listed) == VERBS
    assert {"torch", "ray", "mlflow", "numpy", "pydantic", "yaml"} & set(loaded.split()) == set()


@pytest.mark.parametrize("words", list(leaf_commands(typer.main.get_command(cli.app))), ids=" ".join)
def test_every_command_has_a_help_text(words, capsys):
    assert cli.run([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: animediffusion {' '.join(words)}" in shown
    assert "<" not in shown.replace("<=", "")  # no name of a Python type


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_loads(recipe):
    assert load_recipe(recipe, ["max_steps=1"]).recipe == recipe


def test_compose_names_its_services_and_publishes_on_loopback_only():
    services = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())["services"]
    assert set(services) == {"minio", "buckets", "migrate", "postgres", "mlflow", "ray", "serve"}
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    depended = [pair for service in services.values() for pair in service.get("depends_on", {}).items()]
    needs_health = {name for name, how in depended if how["condition"] == "service_healthy"}
    assert needs_health == {"minio", "postgres", "mlflow", "ray"}
    assert all("healthcheck" in services[name] for name in needs_health)


def test_every_secret_of_compose_comes_from_the_env_file_whose_example_has_none():
    asked = set(re.findall(r"\$\{(\w+)", (ROOT / "infra/compose.yaml").read_text()))
    example = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / "infra/.env.example").read_text(), flags=re.MULTILINE))
    assert set(example) == asked
    assert set(example.values()) == {""}
    assert "infra/.env" not in tracked_files()


def test_the_serve_config_file_fits_ray_and_the_application(tmp_path, monkeypatch):
    monkeypatch.setenv("ANIMEDIFFUSION_KEYS", str(tmp_path / "keys.json"))
    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "infra/serve.yaml").read_text()))
    [application] = config.applications
    assert application.import_path == f"{build_app.__module__}:{build_app.__name__}"
    with pytest.raises(ConfigError, match="API keys"):
        build(build_app, application.args)
    Keys(str(tmp_path / "keys.json")).create("studio")
    assert build(build_app, application.args)
    with pytest.raises(ValueError, match="max_btch"):
        build(build_app, {**application.args, "max_btch": 4})


def pins_of(name):
    """Package -> (comparison, version) of a file of constraints."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r"([\w.-]+)(==|<=)([\w.+!-]+)", line).groups() for line in lines]
    assert len({package.lower() for package, *_ in pins}) == len(pins)
    return {package: (comparison, version) for package, comparison, version in pins}


def test_every_dependency_has_one_pinned_version():
    names = pins_of("constraints.txt")
    # A GPU needs another torch, which is in constraints-gpu.txt; both files are given to pip together.
    assert {name for name, (comparison, _) in names.items() if comparison != "=="} == {"torch", "torchvision"}
    assert {"torch", "ray", "mlflow", "setuptools", "build"} <= set(names)


def test_the_pins_for_gpus_are_of_one_cuda_version_and_fit_the_others():
    gpu, all_pins = pins_of("constraints-gpu.txt"), pins_of("constraints.txt")
    assert all(comparison == "==" for comparison, _ in gpu.values())
    for name in gpu.keys() & all_pins.keys():
        comparison, version = all_pins[name]
        assert SpecifierSet(comparison + version).contains(gpu[name][1]), name
    wheel = distribution("xformers")
    assert wheel.version == gpu["xformers"][1]
    # The wheel says for which torch and CUDA it was built, and its library asks the linker for the CUDA runtime.
    built = json.loads(wheel.locate_file("xformers/cpp_lib.json").read_text())["version"]
    major, minor = divmod(built["cuda"], 100)
    assert gpu["torch"][1] == built["torch"].partition("+")[0]
    assert gpu[f"nvidia-cuda-runtime-cu{major}"][1].startswith(f"{major}.{minor}.")
    assert f"libcudart.so.{major}\0".encode() in wheel.locate_file("xformers/_C.so").read_bytes()


def test_the_hooks_before_a_commit_have_the_versions_of_the_checks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    versions = {one["repo"].rpartition("/")[2]: one["rev"] for one in hooks}
    pins = pins_of("constraints.txt")
    assert versions.keys() == {"ruff-pre-commit", "codespell", "pre-commit-hooks"}
    assert versions["ruff-pre-commit"] == f"v{pins['ruff'][1]}"
    assert versions["codespell"] == f"v{pins['codespell'][1]}"
    assert re.fullmatch(r"v\d+\.\d+\.\d+", versions["pre-commit-hooks"])
    assert "detect-private-key" in {hook["id"] for one in hooks for hook in one["hooks"]}


def test_the_workflow_runs_what_contributors_run():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text())["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_changelog_has_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\n## {version}, " in (ROOT / "CHANGELOG.md").read_text()


def test_links_of_the_texts_lead_to_files_of_the_repository():
    for text in [name for name in tracked_files() if name.endswith(".md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / text).read_text()):
            assert (ROOT / text).parent.joinpath(target).exists(), f"{text} links to {target}"


def test_the_architecture_has_a_line_on_every_file_and_none_on_others():
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = {
        f"{folder}/{name}"
        for folder, table in re.findall(r"^### `(\S+)/`\n(.*?)(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL)
        for name in re.findall(r"^\| `(\S+\.py)` \|", table, flags=re.MULTILINE)
    }
    assert listed == {str(path.relative_to(ROOT)) for path in SOURCES if path.name != "__init__.py"}


def test_the_table_of_commands_names_every_command():
    named = re.findall(r"^\| `([a-z]+)", (ROOT / "docs" / "commands.md").read_text(), flags=re.MULTILINE)
    assert set(named) == VERBS


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the working tree, built in a copy: a build leaves folders behind."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in tracked_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), cwd=copy, path="")
    [path] = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_has_every_module_and_every_data_file(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"animediffusion/{path.relative_to(PACKAGE)}" for path in SOURCES if PACKAGE in path.parents}
    wanted |= {"animediffusion/py.typed"}
    starter = ("card.md", "checksums.json", "config.json", "metrics.json", "model.safetensors")
    wanted |= {f"animediffusion/platform/registry/starter/{name}" for name in starter}
    for name in tracked_files():
        if name.split("/")[0] in FOLDERS and Path(name).suffix in (
            ".py",
            ".yaml",
            ".html",
            ".png",
            ".svg",
            ".css",
            ".js",
        ):
            wanted.add(f"animediffusion/{name}")
    assert len(wanted) > len(FOLDERS)
    assert wanted - held == set()
    assert any(name.endswith("licenses/LICENSE") for name in held)


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(wheel, tmp_path):
    installed = tmp_path / "installed"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed), str(wheel)]
    python(*install, cwd=tmp_path, path="")
    assert "Usage: animediffusion" in python("-m", "animediffusion", "--help", cwd=tmp_path, path=installed)
    code = "import animediffusion.models.network.unet as one; print(one.__file__)"
    found = python("-c", code, cwd=tmp_path, path=installed).strip()
    assert Path(found) == installed / "animediffusion/models/network/unet.py"


def test_a_test_of_several_processes_has_its_group(request):
    assert request.node.nodeid.endswith("@test_house.py") == hasattr(request.config, "workerinput")
