import io
import json
import os
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import httpx
import numpy as np
import pytest
from PIL import Image
from psd_tools import PSDImage

from animediffusion.cli import app as cli
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ClusterError, ConfigError, DataError, ImageError, StorageError
from animediffusion.platform.images.codec import decode_rgb, encode_png
from animediffusion.serve.client.colorize_files import colorize_files, list_own_results, list_sketches
from animediffusion.serve.client.file_metadata import read_metadata, with_metadata
from animediffusion.serve.client.local import LocalColorizer
from animediffusion.serve.client.remote import RemoteColorizer
from animediffusion.serve.rendering.render import RenderOptions


@pytest.fixture(scope="module")
def colorizer(bundle_folder, tmp_path_factory) -> LocalColorizer:
    return LocalColorizer(Settings(workspace=tmp_path_factory.mktemp("workspace")), str(bundle_folder))


@pytest.fixture
def drawings(tmp_path: Path, sketch: np.ndarray, reference: np.ndarray) -> Path:
    folder = tmp_path / "drawings"
    folder.mkdir()
    for name in ("b.png", "a.png"):
        (folder / name).write_bytes(encode_png(sketch))
    (folder / "notes.txt").write_text("not a drawing")
    (tmp_path / "reference.png").write_bytes(encode_png(reference))
    return folder


PAINTED = RenderOptions(style="painted")


def color(colorizer, sketches: list[Path], folder: Path, **options) -> list:
    return list(
        colorize_files(colorizer, sketches, [folder / "reference.png"], folder / "out", SamplerOptions(**options))
    )


def test_a_folder_becomes_pictures_and_color_layers(colorizer, drawings, tmp_path, sketch):
    done = color(colorizer, [drawings], tmp_path, seed=7)
    assert [one.summary()["output"] for one in done] == [str(tmp_path / "out" / f"{stem}.png") for stem in "ab"]
    assert done[0].model_version.startswith("sha256:")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "a.color.png", "a.png", "b.color.png", "b.png",
    ]  # fmt: skip
    assert decode_rgb((tmp_path / "out" / "a.png").read_bytes()).shape == sketch.shape


def test_the_seed_decides(colorizer, drawings, tmp_path):
    def picture(seed: int) -> bytes:
        (done,) = color(colorizer, [drawings / "a.png"], tmp_path, seed=seed)
        return done.output.read_bytes()

    assert picture(1) == picture(1) != picture(2)


def test_a_server_makes_the_same_picture(colorizer, drawings, tmp_path, url):
    (here,) = color(colorizer, [drawings / "a.png"], tmp_path, seed=3, steps=2)
    pictures = [here.output.read_bytes()]
    with RemoteColorizer(url) as remote:
        (there,) = color(remote, [drawings / "a.png"], tmp_path, seed=3, steps=2)
    pictures.append(there.output.read_bytes())
    ours, theirs = (decode_rgb(data).astype(int) for data in pictures)
    assert there.model_version == "3"
    assert np.abs(ours - theirs).max() <= 2


def test_one_bad_drawing_does_not_stop_the_others(colorizer, drawings, tmp_path, url):
    (drawings / "a.png").write_text("no picture")
    with RemoteColorizer(url) as remote:
        for where, kind in ((colorizer, ImageError), (remote, DataError)):
            bad, good = color(where, [drawings], tmp_path)
            assert isinstance(bad.error, kind)
            assert str(drawings / "a.png") in str(bad.error)
            assert good.output.exists()


def test_a_server_that_is_not_there_is_one_line(drawings, tmp_path):
    with RemoteColorizer("http://127.0.0.1:9") as remote, pytest.raises(ClusterError, match="does not answer"):
        color(remote, [drawings], tmp_path)
    with pytest.raises(ConfigError):
        RemoteColorizer("127.0.0.1:8000")


def errors(done: list) -> dict[str, str]:
    return {one.sketch.name: str(one.error) for one in done if one.error}


def outputs(folder: Path) -> set[str]:
    return {file.name for file in (folder / "out").iterdir()}


def test_drawings_that_would_become_the_same_file_fail_and_the_others_are_colored(colorizer, drawings, tmp_path):
    (drawings / "a.jpg").write_bytes((drawings / "a.png").read_bytes())
    done = color(colorizer, [drawings], tmp_path)
    assert set(errors(done)) == {"a.png", "a.jpg"}
    assert "a.jpg: has the same name as " in errors(done)["a.jpg"]
    assert outputs(tmp_path) == {"b.png", "b.color.png"}
    (drawings / "b.color.png").write_bytes((drawings / "a.png").read_bytes())
    done = color(colorizer, [drawings / "b.png", drawings / "b.color.png"], tmp_path)
    assert set(errors(done)) == {"b.png", "b.color.png"}


def test_no_sketch_is_overwritten(colorizer, drawings, tmp_path):
    with pytest.raises(ConfigError, match="overwritten"):
        list(colorize_files(colorizer, [drawings / "b.png"], [tmp_path / "reference.png"], drawings, SamplerOptions()))
    with pytest.raises(ConfigError, match="is a file"):
        list(
            colorize_files(
                colorizer, [drawings / "b.png"], [tmp_path / "reference.png"], drawings / "a.png", SamplerOptions()
            )
        )
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_or_written_is_an_error_of_its_own(colorizer, drawings, tmp_path):
    data = (drawings / "a.png").read_bytes()
    kana = "\N{HIRAGANA LETTER KA}"
    for name in (
        kana * 80 + ".png",
        "x" * 251 + ".png",
        "taken.png",
        "-dash.png",
        "line\nend.png",
        os.fsdecode(b"\x90\xfc.png"),
    ):
        (drawings / name).write_bytes(data)
    (drawings / "gone.png").symlink_to("nothing")
    os.mkfifo(drawings / "pipe.png")
    (tmp_path / "out" / "taken.png").mkdir(parents=True)
    done = color(colorizer, [drawings], tmp_path)
    found = errors(done)
    assert set(found) == {"x" * 251 + ".png", "taken.png", "gone.png"}
    assert "its name is 6 bytes too long for STEM.color.png" in found["x" * 251 + ".png"]
    assert "taken.png: is a directory" in found["taken.png"]
    assert len(done) == 9
    assert {kana * 80 + ".png", kana * 80 + ".color.png", "-dash.png", "line\nend.png"} <= outputs(tmp_path)


def test_links_that_lead_to_each_other_are_an_error_of_their_own(colorizer, drawings, tmp_path):
    (drawings / "x.png").symlink_to("y.png")
    (drawings / "y.png").symlink_to("x.png")
    done = color(colorizer, [drawings], tmp_path)
    assert {name: error.rpartition(": ")[2] for name, error in errors(done).items()} == dict.fromkeys(
        ("x.png", "y.png"), "Too many levels of symbolic links; give an image file"
    )
    assert outputs(tmp_path) == {"a.png", "a.color.png", "b.png", "b.color.png"}


def test_a_file_that_would_fill_the_memory_is_an_error_of_its_own(colorizer, drawings, tmp_path, monkeypatch):
    monkeypatch.setattr("animediffusion.serve.client.colorize_files.MAX_FILE_BYTES", 2**20)
    with (drawings / "video.png").open("wb") as file:
        file.truncate(2**40)
    (drawings / "zero.png").symlink_to("/dev/zero")
    done = color(colorizer, [drawings, drawings / "zero.png"], tmp_path)
    assert {name: error.rpartition(": ")[2] for name, error in errors(done).items()} == dict.fromkeys(
        ("video.png", "zero.png"), "is larger than 1 MiB; give an image file"
    )


def test_folders_inside_a_folder_are_named(drawings, bundle_folder, tmp_path, capsys):
    for place in ("page 1", "book/page 2", "empty", ".hidden"):
        (drawings / place).mkdir(parents=True)
        if place != "empty":
            (drawings / place / "a\nb.png").write_bytes((drawings / "a.png").read_bytes())
    out = drawings / "done"

    def run(*sketches: Path) -> str:
        words = ["colorize", *sketches, "--reference", tmp_path / "reference.png", "--out", out]
        words += ["--model", bundle_folder, "--workspace", tmp_path / "workspace"]
        cli.run([str(word) for word in words])
        return capsys.readouterr().err

    for _ in range(2):
        assert "skipped 2 folders: book, page 1; give them by name" in run(drawings)
    assert "skipped 1 folder: book; " in run(drawings, drawings / "page 1")
    assert r"page 1/a\nb.png -> " in run(drawings / "page 1")
    assert "book: has no images itself, its folders have; give a folder" in run(drawings / "book")


def test_a_link_is_a_drawing_of_its_own_name(colorizer, drawings, tmp_path):
    (drawings / "link.png").symlink_to("b.png")
    color(colorizer, [drawings], tmp_path)
    assert {"b.png", "link.png", "a.png"} <= outputs(tmp_path)


def test_a_folder_gives_its_drawings_and_tells_which_pictures_are_left_out(drawings, bundle_folder, tmp_path, capsys):
    (drawings / "b.png").unlink()
    image = Image.open(drawings / "a.png")
    (drawings / "._a.png").write_bytes(b"\0\5\x16\7" + bytes(4000))
    for name, kind in (("d.JFIF", "JPEG"), ("b.tif", "TIFF"), ("c.bmp", "BMP"), ("e.GIF", "GIF")):
        image.save(drawings / name, kind)
    words = ["colorize", drawings, "--reference", tmp_path / "reference.png", "--out", tmp_path / "out"]
    words += ["--model", bundle_folder, "--workspace", tmp_path / "workspace"]
    assert cli.run([str(word) for word in words]) == 0
    captured = capsys.readouterr()
    assert captured.out == "colored 2 of 2\n"
    assert "skipped 3 files: b.tif, c.bmp, e.GIF; " in captured.err


def test_pictures_may_be_written_next_to_their_drawings_again_and_again(
    drawings, colorizer, bundle_folder, tmp_path, capsys
):
    Image.open(drawings / "a.png").save(drawings / "c.jpg", quality=95)
    Image.open(drawings / "a.png").save(drawings / "ink.color.webp", lossless=True)
    for name in ("a.png", "b.png"):
        (drawings / name).unlink()
    words = ["colorize", drawings, "--reference", tmp_path / "reference.png", "--out", drawings]
    words += ["--model", bundle_folder, "--workspace", tmp_path / "workspace"]
    for done in ("colored 2 of 2\n", "colored 0 of 2; 2 done before with the same settings\n"):
        assert cli.run([str(word) for word in words]) == 0
        captured = capsys.readouterr()
        assert captured.out == done
    assert "skipped 4 files: c.color.png, c.png, ink.color.color.png, ink.color.png, made by colorize" in captured.err
    listed = list_sketches([drawings, drawings / "c.png"])
    assert [file.name for file in listed] == ["c.jpg", "ink.color.webp", "c.png"]
    assert [file.name for file in list_own_results([drawings], listed)] == [
        "c.color.png",
        "ink.color.color.png",
        "ink.color.png",
    ]
    for name in ("c.jpg", "ink.color.webp"):
        (drawings / name).unlink()
    with pytest.raises(DataError, match="only images that colorize has made"):
        color(colorizer, [drawings], tmp_path)


def test_a_drawing_may_be_named_as_a_color_layer(drawings, colorizer, tmp_path):
    (drawings / "b.png").rename(drawings / "ink.color.png")
    assert [one.sketch.name for one in color(colorizer, [drawings], tmp_path)] == ["a.png", "ink.color.png"]


def test_a_folder_that_cannot_be_written_to_ends_the_command_before_anything_is_colored(colorizer, drawings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/out: not a directory"):
        list(
            colorize_files(
                colorizer, [drawings], [tmp_path / "reference.png"], tmp_path / "file" / "out", SamplerOptions()
            )
        )


def test_a_drawing_named_twice_is_colored_once(colorizer, drawings, tmp_path):
    assert len(color(colorizer, [drawings, drawings / "a.png", drawings / ".." / "drawings" / "b.png"], tmp_path)) == 2


def test_what_is_done_with_the_same_settings_is_skipped(colorizer, drawings, tmp_path, sketch):
    first = color(colorizer, [drawings], tmp_path, seed=7)
    assert [one.skipped for one in first] == [False, False]
    out = tmp_path / "out"
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.iterdir()}
    again = color(colorizer, [drawings], tmp_path, seed=7)
    assert [one.summary() for one in again] == [{**one.summary(), "skipped": True} for one in first]
    assert before == {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.iterdir()}


@pytest.mark.parametrize("change", ["seed", "steps", "drawing", "reference", "no layer", "another layer", "cut off"])
def test_what_was_made_of_something_else_is_made_again(colorizer, drawings, tmp_path, change, sketch, reference):
    color(colorizer, [drawings], tmp_path, seed=7)
    out, options = tmp_path / "out", {"seed": 7}
    if change in ("seed", "steps"):
        options[change] = 3
    elif change == "drawing":
        (drawings / "a.png").write_bytes(encode_png(sketch[::-1]))
    elif change == "reference":
        (tmp_path / "reference.png").write_bytes(encode_png(reference[::-1]))
    elif change == "no layer":
        (out / "a.color.png").unlink()
    elif change == "another layer":
        (out / "a.color.png").write_bytes(encode_png(sketch))
    else:
        (out / "a.png").write_bytes((out / "a.png").read_bytes()[:20])
    a, b = color(colorizer, [drawings], tmp_path, **options)
    assert not a.skipped
    assert b.skipped == (change not in ("seed", "steps", "reference"))
    assert read_metadata(out / "a.png") == read_metadata(out / "a.color.png")


def test_pictures_of_a_version_that_no_longer_answers_are_made_again(drawings, tmp_path, url):
    with RemoteColorizer(url) as remote:
        (made,) = color(remote, [drawings / "a.png"], tmp_path)
        (again,) = color(remote, [drawings / "a.png"], tmp_path)
        assert (made.skipped, again.skipped, again.model_version) == (False, True, "3")
        for file in (tmp_path / "out").iterdir():
            metadata = {**read_metadata(file), "model_version": "2"}
            file.write_bytes(with_metadata(encode_png(decode_rgb(file.read_bytes())), metadata))
        (once_more,) = color(remote, [drawings / "a.png"], tmp_path)
    assert (once_more.skipped, once_more.model_version) == (False, "3")


def test_metadata_changes_no_pixel(tmp_path, sketch):
    png = encode_png(sketch)
    (tmp_path / "a.png").write_bytes(with_metadata(png, {"seed": 7}))
    assert read_metadata(tmp_path / "a.png") == {"seed": 7}
    assert (decode_rgb((tmp_path / "a.png").read_bytes()) == sketch).all()
    (tmp_path / "plain.png").write_bytes(png)
    assert read_metadata(tmp_path / "plain.png") is None
    assert read_metadata(tmp_path / "nothing.png") is None


def test_one_request_brings_picture_and_layer_of_one_version(drawings, tmp_path, url, sketch, reference):
    with RemoteColorizer(url) as remote:
        colored = remote.colorize(encode_png(sketch), [encode_png(reference)], SamplerOptions(seed=5), name="a")
    layer = Image.open(io.BytesIO(colored.color_layer))
    white = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    assert np.abs(np.asarray(white) / 255 * sketch - decode_rgb(colored.picture)).max() <= 2


@pytest.mark.parametrize("file_format", ["png", "ora", "psd"])
def test_a_file_with_layers_is_written_instead_of_pictures_and_skipped_when_it_is_done(
    colorizer, drawings, tmp_path, file_format
):
    def run(**look) -> list:
        rendering = RenderOptions(**look)
        reference, out = tmp_path / "reference.png", tmp_path / "out"
        return list(
            colorize_files(colorizer, [drawings], [reference], out, SamplerOptions(seed=1), rendering, file_format)
        )

    first = run(style="flat")
    names = {f"{stem}.{file_format}" for stem in "ab"} | (
        {"a.color.png", "b.color.png"} if file_format == "png" else set()
    )
    assert outputs(tmp_path) == names
    assert [one.output.name for one in first] == [f"a.{file_format}", f"b.{file_format}"]
    assert [one.skipped for one in run(style="flat")] == [True, True]
    for look in (
        {"style": "shaded"},
        {"style": "shaded", "background": "reference"},
        {"style": "shaded", "palette": "none"},
        {"style": "shaded", "palette": b"GIMP Palette\n1 2 3\n"},
        {"style": "shaded", "palette": b"GIMP Palette\n1 2 4\n"},
        {"style": "painted"},
    ):
        assert [one.skipped for one in run(**look)] == [False, False]
        assert [one.skipped for one in run(**look)] == [True, True]
    assert outputs(tmp_path) == names


def test_pictures_of_version_0_1_are_done(colorizer, drawings, tmp_path):
    references, options = [tmp_path / "reference.png"], SamplerOptions(seed=3)
    list(colorize_files(colorizer, [drawings / "a.png"], references, tmp_path / "out", options, PAINTED))
    known = {"sketch", "reference", "seed", "steps", "guidance_scale", "sampler", "size", "model_version"}
    assert set(read_metadata(tmp_path / "out" / "a.png")) == known


@pytest.mark.parametrize("file_format", ["png", "ora", "psd"])
@pytest.mark.parametrize("palette", ["#0a0b0c,#f0e0d0", b"GIMP Palette\n10 11 12 ink\n240 224 208 paper\n"])
def test_a_server_makes_the_same_bytes(colorizer, url, sketch, reference, file_format, palette):
    rendering = RenderOptions(style="flat", palette=palette, background="reference")
    files = encode_png(sketch), [encode_png(reference)], SamplerOptions(seed=5, steps=2), rendering, file_format
    here = colorizer.colorize(*files, name="a")
    with RemoteColorizer(url) as remote:
        there = remote.colorize(*files, name="a")
    assert (here.picture, here.color_layer) == (there.picture, there.color_layer)


def test_several_references_are_sent_to_a_server_and_five_are_an_error(drawings, tmp_path, capsys, url, colorizer):
    other = np.full((40, 40, 3), (200, 60, 30), np.uint8)
    (tmp_path / "other.png").write_bytes(encode_png(other))
    references = [tmp_path / "reference.png", tmp_path / "other.png"]
    with RemoteColorizer(url) as remote:
        pictures = [
            next(colorize_files(each, [drawings / "a.png"], given, tmp_path / name, SamplerOptions(seed=1)))
            for each, given, name in (
                (remote, references, "remote"),
                (colorizer, references, "local"),
                (colorizer, references[:1], "one"),
            )
        ]
    remote_bytes, local_bytes, one = (decode_rgb(result.output.read_bytes()) for result in pictures)
    assert np.array_equal(remote_bytes, local_bytes)
    assert not np.array_equal(local_bytes, one)
    words = [
        "colorize",
        str(drawings / "a.png"),
        *5 * ["--reference", str(references[0])],
        "--out",
        str(tmp_path / "x"),
    ]
    assert cli.run(words) == 2
    assert capsys.readouterr().err.splitlines() == ["error: --reference: 5 images; 1 to 4 images"]


def test_metadata_does_not_change_layers(colorizer, tmp_path, sketch, reference):
    metadata = {"seed": 7, "sketch": "<&>\u00e4"}
    for kind in ("ora", "psd"):
        files = encode_png(sketch), [encode_png(reference)], SamplerOptions(), RenderOptions(style="flat"), kind
        plain = colorizer.colorize(*files, name="a").picture
        file = tmp_path / f"a.{kind}"
        file.write_bytes(plain)
        assert read_metadata(file) is None
        file.write_bytes(with_metadata(plain, metadata))
        assert read_metadata(file) == metadata
        file.write_bytes(with_metadata(plain, metadata)[:-40])
        if kind == "ora":
            assert read_metadata(file) is None
    with zipfile.ZipFile(io.BytesIO(with_metadata(plain_ora(colorizer, sketch, reference), metadata))) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "mimetype"
    psd = PSDImage.open(io.BytesIO(with_metadata(plain, metadata)))
    assert [layer.name for layer in psd] == ["Region ids", "Flats", "Line art"]
    assert (np.asarray(psd.topil().convert("RGB")) == np.asarray(Image.open(io.BytesIO(plain)).convert("RGB"))).all()


def plain_ora(colorizer, sketch, reference) -> bytes:
    return colorizer.colorize(
        encode_png(sketch), [encode_png(reference)], SamplerOptions(), RenderOptions(style="flat"), "ora", name="a"
    ).picture


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--style", "oil"], "--style: 'oil'; flat, shaded or painted"),
        (["--background", "sea"], "--background: 'sea'; paper, white or reference"),
        (["--style", "painted", "--background", "paper"], "--background: 'paper' with style painted; "),
        (["--style", "painted", "--palette", "#123456"], "--palette: '#123456' with style painted; "),
        (["--style", "flat", "--palette", "nowhere.gpl"], "--palette: 'nowhere.gpl': No such file or directory; "),
        (["--style", "flat", "--palette", "#12"], "--palette: '#12' is not a color; "),
        (["--style", "flat", "--palette", "notes.txt"], "--palette: 'not' is not a color; "),
        (["--format", "tiff"], "--format: 'tiff'; png, ora or psd"),
        (["--size", "big"], "--size: 'big'; native or model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_of_the_picture_that_is_wrong_is_one_line(drawings, tmp_path, capsys, monkeypatch, words, line):
    monkeypatch.chdir(drawings)
    files = ["colorize", str(drawings / "a.png"), "--reference", str(tmp_path / "reference.png")]
    assert cli.run([*files, "--out", str(tmp_path / "out"), *words]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {line}")
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_writes_layers_with_a_palette_file(drawings, tmp_path, bundle_folder, capsys):
    (tmp_path / "two.gpl").write_text("GIMP Palette\n10 20 30 ink\n240 230 220 paper\n")
    words = ["colorize", drawings, "--reference", tmp_path / "reference.png", "--out", drawings, "--format", "ora"]
    words += ["--model", bundle_folder, "--workspace", tmp_path / "workspace"]
    words += ["--style", "flat", "--palette", tmp_path / "two.gpl", "--background", "reference"]
    for done in ("colored 2 of 2\n", "colored 0 of 2; 2 done before with the same settings\n"):
        assert cli.run([str(word) for word in words]) == 0
        captured = capsys.readouterr()
        assert captured.out == done
        assert "skipped" not in captured.err
    with zipfile.ZipFile(drawings / "a.ora") as archive:
        names = [layer.get("name") for layer in ElementTree.fromstring(archive.read("stack.xml")).iter("layer")]
    assert set(names) - {"#0a141e", "#f0e6dc", "background"} == {"Line art", "Region ids"}


ANOTHER_SERVER = {
    "a web page": httpx.Response(200, html="<p>Welcome</p>"),
    "no JSON": httpx.Response(200, text="event: result\ndata: {x\n\n", headers={"Content-Type": "text/event-stream"}),
    "a list": httpx.Response(200, text="event: result\ndata: [1]\n\n", headers={"Content-Type": "text/event-stream"}),
    "no image": httpx.Response(200, text="event: result\ndata: {}\n\n", headers={"Content-Type": "text/event-stream"}),
}


@pytest.mark.parametrize("kind", ANOTHER_SERVER)
def test_a_server_of_something_else_is_one_line_without_its_password(kind):
    transport = httpx.MockTransport(lambda _: ANOTHER_SERVER[kind])
    remote = RemoteColorizer("HTTP://me:secret@x/", transport=transport)
    with pytest.raises(ClusterError, match="is not an AnimeDiffusion server") as caught:
        remote.colorize(b"", [b""], SamplerOptions(), name="a")
    assert "secret" not in str(caught.value)
    if kind == "a web page":
        with pytest.raises(ClusterError, match="is not an AnimeDiffusion server"):
            remote.versions()


def test_the_error_names_where_a_server_has_moved():
    moved = httpx.Response(301, headers={"Location": "https://x/v1/colorize/stream"})
    remote = RemoteColorizer("http://x", transport=httpx.MockTransport(lambda _: moved))
    with pytest.raises(ClusterError, match=r"301 \(Moved Permanently: https://x/v1/colorize/stream\); give"):
        remote.colorize(b"", [b""], SamplerOptions(), name="a")


@pytest.mark.parametrize(
    "url", ["", "http://", "127.0.0.1:8000", "http://[::1", "http://h:x", "http://h/?a", "http://h/#a"]
)
def test_an_address_that_cannot_be_asked_raises_config_error(url):
    with pytest.raises(ConfigError, match=r"^--url: '"):
        RemoteColorizer(url)


def test_a_key_with_a_line_end_is_sent_without_it_and_one_with_other_characters_is_not_shown(monkeypatch):
    asked = []
    monkeypatch.setenv("ANIMEDIFFUSION_API_KEY", "ad_secret\n")
    transport = httpx.MockTransport(lambda request: asked.append(request) or httpx.Response(200, json={"traffic": {}}))
    RemoteColorizer("http://x", transport=transport).versions()
    assert asked[0].headers["Authorization"] == "Bearer ad_secret"
    for key in ("ad_\nsecret", "\N{HIRAGANA LETTER KA}secret"):
        monkeypatch.setenv("ANIMEDIFFUSION_API_KEY", key)
        with pytest.raises(
            ConfigError, match="ANIMEDIFFUSION_API_KEY: contains characters that a key cannot contain"
        ) as caught:
            RemoteColorizer("http://x")
        assert "secret" not in str(caught.value)


def test_a_busy_server_is_asked_again_as_it_asks_for(sketch, reference):
    result = {"image": "aW1n", "color_layer": "bGF5", "model_version": "4"}
    answers = [
        httpx.Response(429, headers={"Retry-After": "0"}, json={"detail": "busy"}),
        httpx.Response(200, text='event: error\ndata: {"status": 503, "detail": "no model"}\n\n'),
        httpx.Response(200, text=f"event: result\ndata: {json.dumps(result)}\n\n"),
    ]
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return answers[len(asked) - 1]

    with RemoteColorizer("http://127.0.0.1:9", transport=httpx.MockTransport(answer)) as remote:
        colored = remote.colorize(encode_png(sketch), [encode_png(reference)], SamplerOptions(), name="a")
    assert asked == ["/v1/colorize/stream"] * 3
    assert (colored.picture, colored.color_layer, colored.maker) == (b"img", b"lay", "4")


def test_the_command_prints_a_line_per_drawing_and_resumes(drawings, tmp_path, bundle_folder, capsys):
    (drawings / "bad.png").write_text("no picture")
    words = ["colorize", drawings, "--reference", tmp_path / "reference.png", "--out", tmp_path / "out"]
    words += ["--model", bundle_folder, "--workspace", tmp_path / "workspace"]

    def run(*more: str) -> tuple[list[str], list[str]]:
        assert cli.run([str(word) for word in [*words, *more]]) == 1
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err.splitlines()

    out, lines = run()
    assert out == ["colored 2 of 3; 1 failed"]
    assert [line.split(" -> ")[0] for line in lines if "->" in line] == [str(drawings / f"{stem}.png") for stem in "ab"]
    assert sum(line.startswith(f"error: {drawings / 'bad.png'}") for line in lines) == 1
    (tmp_path / "out" / "b.png").unlink()
    out, lines = run()
    assert out == ["colored 1 of 3; 1 done before with the same settings; 1 failed"]
    assert [line for line in lines if line.endswith("a.png (done before)")]
    out, _ = run("--json")
    assert [one.get("skipped", False) for one in json.loads(out[-1])] == [True, True, False]


def test_nothing_to_color_is_an_error(colorizer, tmp_path, drawings):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        color(colorizer, [tmp_path / "empty"], tmp_path)
    with pytest.raises(DataError, match="no such file"):
        color(colorizer, [tmp_path / "nothing.png"], tmp_path)
    with pytest.raises(DataError):
        list(colorize_files(colorizer, [drawings], [tmp_path / "nothing.png"], tmp_path / "out", SamplerOptions()))


@pytest.mark.parametrize("words", [("--steps", "0"), ("--seed", "4294967296"), ("--guidance-scale", "21")])
def test_settings_out_of_range_are_one_line(drawings, tmp_path, capsys, words):
    files = ["colorize", str(drawings / "a.png"), "--reference", str(tmp_path / "reference.png")]
    assert cli.run([*files, "--out", str(tmp_path / "out"), *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {words[0]}: '{words[1]}'; input should be ")
    assert line.count("\n") == 1
