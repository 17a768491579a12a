import ast
import importlib
import inspect
from pathlib import Path

import pytest
import ray.data
from ray._private import ray_constants
from ray._private.node import Node
from ray._private.parameter import RayParams

from animediffusion.cli import common
from animediffusion.platform.cluster import ray_compat

ROOT = Path(__file__).parents[3]
FOLDERS = ("platform", "models", "pipelines", "serve", "src/animediffusion/cli", "benchmarks")


def private_imports(path: Path) -> set[tuple[str, str]]:
    """Every (module, name) that a file imports from a private module of Ray."""
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        (node.module or "", alias.name) if isinstance(node, ast.ImportFrom) else (alias.name, "")
        for node in imports
        for alias in node.names
    }
    return {
        (module, name)
        for module, name in names
        if module.partition(".")[0] == "ray" and any(part.startswith("_") for part in [*module.split("."), name])
    }


def test_only_ray_compat_imports_private_modules_of_ray():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert {path.name for path in files if private_imports(path)} == {"ray_compat.py"}


@pytest.mark.parametrize(("module", "name"), sorted(private_imports(Path(ray_compat.__file__))))
def test_the_pinned_ray_has_every_private_name(module, name):
    assert hasattr(importlib.import_module(module), name)


def test_the_private_names_are_used_as_ray_means_them():
    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool)
    assert callable(ray_compat.state.get_max_resources_from_cluster_config)
    assert {"no_monitor", "include_log_monitor"} <= set(inspect.signature(RayParams).parameters)
    assert callable(Node.start_api_server)
    context = ray.data.DataContext()
    ray_compat.pause_scheduling(context, 0.01)
    (made,) = context.custom_execution_callback_classes
    base = made.__bases__[0]
    assert callable(base.on_execution_step)
    made().on_execution_step(None)


def test_a_job_has_the_variable_by_which_commands_recognize_it(monkeypatch):
    name = importlib.import_module("ray._private.runtime_env.constants").RAY_JOB_CONFIG_JSON_ENV_VAR
    assert not common.in_job()
    monkeypatch.setenv(name, "{}")
    assert common.in_job()
