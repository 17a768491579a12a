from pathlib import Path

import numpy as np
import pytest

from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ClusterError, ConfigError, DataError, ImageError
from animediffusion.platform.images import decode_rgb, encode_png
from animediffusion.serve.client import RemotePainter
from animediffusion.serve.local import LocalPainter
from animediffusion.serve.painter import Options, colorize_files


@pytest.fixture(scope="module")
def painter(bundle_folder, tmp_path_factory) -> LocalPainter:
    return LocalPainter(Settings(workspace=tmp_path_factory.mktemp("workspace")), str(bundle_folder))


@pytest.fixture
def drawings(tmp_path: Path, sketch: np.ndarray, reference: np.ndarray) -> Path:
    folder = tmp_path / "drawings"
    folder.mkdir()
    for name in ("b.png", "a.png"):
        (folder / name).write_bytes(encode_png(sketch))
    (folder / "notes.txt").write_text("not a drawing")
    (tmp_path / "reference.png").write_bytes(encode_png(reference))
    return folder


def color(painter, sketches: list[Path], folder: Path, **options) -> list:
    return list(colorize_files(painter, sketches, folder / "reference.png", folder / "out", Options(**options)))


def test_a_folder_becomes_pictures_and_color_layers(painter, drawings, tmp_path, sketch):
    done = color(painter, [drawings], tmp_path, seed=7)
    assert [one.summary()["output"] for one in done] == [str(tmp_path / "out" / f"{stem}.png") for stem in "ab"]
    assert done[0].model_version.startswith("sha256:")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "a.color.png", "a.png", "b.color.png", "b.png",
    ]  # fmt: skip
    assert decode_rgb((tmp_path / "out" / "a.png").read_bytes()).shape == sketch.shape


def test_the_seed_decides(painter, drawings, tmp_path):
    def picture(seed: int) -> bytes:
        (done,) = color(painter, [drawings / "a.png"], tmp_path, seed=seed)
        return done.output.read_bytes()

    assert picture(1) == picture(1) != picture(2)


def test_a_server_makes_the_same_picture(painter, drawings, tmp_path, url):
    (here,) = color(painter, [drawings / "a.png"], tmp_path, seed=3, steps=2)
    pictures = [here.output.read_bytes()]
    with RemotePainter(url) as remote:
        (there,) = color(remote, [drawings / "a.png"], tmp_path, seed=3, steps=2)
    pictures.append(there.output.read_bytes())
    ours, theirs = (decode_rgb(data).astype(int) for data in pictures)
    assert there.model_version == "3"
    assert np.abs(ours - theirs).max() <= 2


def test_one_bad_drawing_does_not_stop_the_others(painter, drawings, tmp_path, url):
    (drawings / "a.png").write_text("no picture")
    with RemotePainter(url) as remote:
        for where, kind in ((painter, ImageError), (remote, DataError)):
            bad, good = color(where, [drawings], tmp_path)
            assert isinstance(bad.error, kind)
            assert str(drawings / "a.png") in str(bad.error)
            assert good.output.exists()


def test_a_server_that_is_not_there_is_one_line(drawings, tmp_path):
    with RemotePainter("http://127.0.0.1:9") as remote, pytest.raises(ClusterError, match="does not answer"):
        color(remote, [drawings], tmp_path)
    with pytest.raises(ConfigError):
        RemotePainter("127.0.0.1:8000")


def test_names_that_clash_are_refused_before_anything_is_written(painter, drawings, tmp_path, reference):
    (drawings / "a.jpg").write_bytes((drawings / "a.png").read_bytes())
    with pytest.raises(ConfigError, match="same name"):
        color(painter, [drawings], tmp_path)
    with pytest.raises(ConfigError, match="overwrite"):
        list(colorize_files(painter, [drawings / "b.png"], tmp_path / "reference.png", drawings, Options()))
    assert not (tmp_path / "out").exists()


def test_nothing_to_color_is_an_error(painter, tmp_path, drawings):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        color(painter, [tmp_path / "empty"], tmp_path)
    with pytest.raises(DataError, match="no such file"):
        color(painter, [tmp_path / "nothing.png"], tmp_path)
    with pytest.raises(DataError):
        list(colorize_files(painter, [drawings], tmp_path / "nothing.png", tmp_path / "out", Options()))


def test_settings_out_of_range_are_one_line(painter, drawings, tmp_path):
    with pytest.raises(ConfigError, match="steps"):
        color(painter, [drawings / "a.png"], tmp_path, steps=0)
