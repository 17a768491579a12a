import numpy as np
import pytest
from bundles import evaluation, new_model, write_bundle

from animediffusion.cli import app as cli
from animediffusion.pipelines.release import release
from animediffusion.pipelines.release.compare import compare
from animediffusion.platform.errors import ConfigError, DataError, RegistryError
from animediffusion.platform.images.codec import decode_rgb


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A registry with two versions that were measured on the same data; the second also on other data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        workspace = tmp_path_factory.mktemp("workspace")
        settings = new_model(workspace)
        release.register(settings, write_bundle(workspace / "a", 1, evaluation(20.0, 8.0)))
        release.register(settings, write_bundle(workspace / "b", 2, evaluation(21.5, 8.5), image_size=32))
        release.record_evaluation(settings, f"models:/{settings.model_name}/2", evaluation(30.0, data_hash="b" * 64))
        yield settings


def found_row(found, data_hash, track, metric):
    wanted = (data_hash, track, metric)
    return next(row for row in found["metrics"] if (row["data_hash"], row["track"], row["metric"]) == wanted)


def test_metrics_of_the_same_images_are_in_one_row_with_the_better_named(settings, tmp_path):
    found = compare(settings, "1", "2", out=tmp_path / "ab.png").to_json()
    psnr = found_row(found, "a" * 64, "same", "psnr")
    assert (psnr["a"], psnr["b"], psnr["difference"], psnr["better"]) == (20.0, 21.5, 1.5, 2)
    delta = found_row(found, "a" * 64, "cross", "ciede2000")
    assert (delta["difference"], delta["better"]) == (0.5, 1)
    assert found_row(found, "a" * 64, "same", "ciede2000")["better"] is None
    alone = found_row(found, "b" * 64, "same", "psnr")
    assert (alone["a"], alone["b"], alone["difference"], alone["better"]) == (None, 30.0, None, None)
    assert [version["version"] for version in found["versions"]] == [1, 2]


def test_the_picture_has_both_results_between_reference_and_truth(settings, faces_dataset, tmp_path):
    compare(settings, "1", "2", data=faces_dataset, out=tmp_path / "ab.png")
    compare(settings, "2", "1", data=faces_dataset, out=tmp_path / "ba.png")
    ab, ba = (decode_rgb((tmp_path / name).read_bytes()).astype(int) for name in ("ab.png", "ba.png"))
    assert ab.shape == ba.shape
    changed = np.abs(ab - ba).max(axis=(0, 2)) > 8
    # Of five columns the third and the fourth.
    assert 0.3 < np.flatnonzero(changed)[0] / len(changed) < np.flatnonzero(changed)[-1] / len(changed) < 0.85


def test_the_command_prints_both_and_draws_in_the_current_folder(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANIMEDIFFUSION_MODEL_NAME", settings.model_name)
    assert cli.run(["models", "compare", "1", "2", "--workspace", str(settings.workspace)]) == 0
    shown = capsys.readouterr().out
    assert "+1.5" in shown
    assert (tmp_path / "compare-1-2.png").exists()


def test_what_cannot_be_compared_is_said(settings, tmp_path):
    with pytest.raises(ConfigError, match="both version 1; give two versions"):
        compare(settings, "1", f"models:/{settings.model_name}/1")
    with pytest.raises(RegistryError, match="no such version"):
        compare(settings, "1", "7")
    with pytest.raises(ConfigError, match="PNG file"):
        compare(settings, "1", "2", out=tmp_path / "picture.jpg")
    with pytest.raises(DataError, match="nothing"):
        compare(settings, "1", "2", data=str(tmp_path / "nothing"), out=tmp_path / "x.png")
