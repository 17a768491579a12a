import shutil
from pathlib import Path

import pytest
import yaml

from animediffusion.pipelines.training.plan import RunPlan, plan
from animediffusion.pipelines.training.recipe import load_recipe, plain
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError


def planned(workspace: Path, data: Path, **changed: str | None) -> RunPlan:
    given = {"data": str(data), "name": "first", "max_steps": "2", "image_size": "32", **changed}
    config = load_recipe("demo", [f"{key}={value}" for key, value in given.items() if value is not None])
    return plan(Settings(workspace=workspace), config)


def test_a_run_of_a_workspace_that_was_moved_is_the_same_run(faces_dataset: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(faces_dataset, old / "data" / "faces")
    shutil.copytree(faces_dataset, old / "data" / "others")
    work = planned(old, old / "data" / "faces")
    work.folder.mkdir(parents=True)
    (work.folder / "config.yaml").write_text(yaml.safe_dump(plain(work.config)))
    old.rename(new)
    assert planned(new, new / "data" / "faces").folder == new / "runs" / "first"
    for data in (new / "data" / "others", Path(faces_dataset)):
        with pytest.raises(ConfigError, match="run first: already exists with a different data"):
            planned(new, data)
    with pytest.raises(ConfigError, match="run first: already exists with a different seed"):
        planned(new, new / "data" / "faces", seed="7")


def test_a_run_without_a_name_resumes_when_its_workspace_was_moved(faces_dataset: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(faces_dataset, old / "data" / "faces")
    shutil.copytree(faces_dataset, old / "data" / "others")
    work = planned(old, old / "data" / "faces", name=None)
    work.folder.mkdir(parents=True)
    (work.folder / "config.yaml").write_text(yaml.safe_dump(plain(work.config)))
    old.rename(new)

    assert planned(new, new / "data" / "faces", name=None).run == work.run
    for data, seed in ((new / "data" / "others", "0"), (new / "data" / "faces", "7"), (Path(faces_dataset), "0")):
        assert planned(new, data, name=None, seed=seed).run != work.run
