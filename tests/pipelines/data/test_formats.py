"""Archives, tables and layered files as sources: rows, names, and hostile ones; one command runs on Ray."""

import io
import json
import struct
import tarfile
import zipfile
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sources import fill, picture, without_ray

from animediffusion.cli.app import run
from animediffusion.pipelines.data.formats import archives, layered, tables
from animediffusion.pipelines.data.ingest import prepare
from animediffusion.pipelines.data.stream import read_split
from animediffusion.platform.errors import DataError, ImageError
from animediffusion.platform.images.codec import decode_rgb, fit_square

SIZE = 16


def tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return str(path)


def image_column(pictures: list[bytes | None], paths: list[str | None]) -> pa.Array:
    """A column as Hugging Face `datasets` writes it."""
    values = [
        None if data is None else {"bytes": data, "path": path} for data, path in zip(pictures, paths, strict=True)
    ]
    return pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def ingested(source: str, folder: Path, **options: object) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Ingest without Ray; return the sorted ids of each split, and (path, reason) of the rejects."""
    manifest = without_ray(prepare(source, str(folder), size=SIZE, **options))
    ids = {split: sorted(read_split(str(folder), split)["id"]) for split in manifest.splits}
    lines = (folder / "rejects.jsonl").read_text().splitlines()
    return ids, [(line["path"], line["reason"]) for line in map(json.loads, lines)]


def target_of(folder: Path, split: str, name: str) -> np.ndarray:
    rows = read_split(str(folder), split)
    return rows["target"][list(rows["id"]).index(name)]


PAIRS = {
    "0001.target.png": picture(1), "0001.sketch.png": picture(2, mode="L"), "0001.json": b"{}",
    "0002.target.png": picture(3), "0002.sketch.png": picture(4, mode="L"), "0002.txt": b"a caption",
}  # fmt: skip


@pytest.mark.parametrize("pack", [tar, zipped], ids=["tar", "zip"])
def test_an_archive_is_a_source_and_its_names_are_ids(pack, tmp_path):
    suffix = "tar" if pack is tar else "zip"
    source = pack(tmp_path / f"faces.{suffix}", PAIRS)
    ids, rejects = ingested(source, tmp_path / "data", val_fraction=0.5)
    assert sorted([*chain(*ids.values())]) == ["0001", "0002"]
    assert rejects == []
    [split] = [split for split, names in ids.items() if "0001" in names]
    expected = fit_square(decode_rgb(PAIRS["0001.target.png"]), SIZE)
    assert np.array_equal(target_of(tmp_path / "data", split, "0001"), expected)


def test_shards_give_splits_and_keep_the_names_of_their_members_as_ids(tmp_path):
    (tmp_path / "shards").mkdir()
    for name, first in (("train-00000", 0), ("train-00001", 2), ("validation-00000", 4)):
        tar(tmp_path / "shards" / f"{name}.tar", {f"{n:06d}.png": picture(n) for n in range(first, first + 2)})
    ids, rejects = ingested(str(tmp_path / "shards"), tmp_path / "data")
    assert ids == {"train": ["000000", "000001", "000002", "000003"], "val": ["000004", "000005"]}
    assert rejects == []


def test_archives_of_one_role_each_are_paired_by_the_names_in_them(tmp_path):
    (tmp_path / "source").mkdir()
    zipped(tmp_path / "source" / "color.zip", {f"{n}.png": picture(n) for n in range(4)})
    zipped(tmp_path / "source" / "sketch.zip", {f"{n}.png": picture(10 + n, mode="L") for n in range(4)})
    ids, rejects = ingested(str(tmp_path / "source"), tmp_path / "data", val_fraction=0.0)
    assert (ids, rejects) == ({"train": ["0", "1", "2", "3"]}, [])
    assert read_split(str(tmp_path / "data"), "train")["has_sketch"].all()


def test_equal_names_in_two_archives_are_two_rows(tmp_path):
    (tmp_path / "source").mkdir()
    for n, name in enumerate(("a", "b")):
        tar(tmp_path / "source" / f"{name}.tar", {"1.png": picture(n)})
    ids, _ = ingested(str(tmp_path / "source"), tmp_path / "data", val_fraction=0.0)
    assert ids == {"train": ["a/1", "b/1"]}


def test_a_folder_inside_an_archive_is_read_as_any_folder(tmp_path):
    names = [f"Anime/{split}/{role}/1.png" for split in ("train", "test") for role in ("reference", "condition")]
    kinds = {name: picture(n, mode="L" if "condition" in name else "RGB") for n, name in enumerate(names)}
    ids, _ = ingested(zipped(tmp_path / "paper.zip", kinds), tmp_path / "data")
    assert ids == {"train": ["Anime/train/1"], "val": ["Anime/test/1"]}


def test_hostile_members_are_listed_and_the_others_are_used(tmp_path):
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("good.png", "../escape.png", "/etc/passwd.png", "C:\\a.png", "a\nb.png", "good.png"):
            data, info = picture(len(name)), tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    ids, rejects = ingested(str(path), tmp_path / "data")
    assert ids == {"train": ["good"]}
    assert sorted(reason for _, reason in rejects) == ["duplicate", *["unreadable"] * 5]
    assert {one.name for one in tmp_path.iterdir()} == {"hostile.tar", "data"}


def test_a_cut_archive_gives_what_precedes_the_cut(tmp_path):
    path = Path(tar(tmp_path / "cut.tar", {f"{n}.png": picture(n) for n in range(4)}))
    path.write_bytes(path.read_bytes()[:4000])
    ids, rejects = ingested(str(path), tmp_path / "data")
    assert 1 <= len([*chain(*ids.values())]) < 4
    assert {reason for _, reason in rejects} == {"truncated"}


def test_a_tar_with_damage_in_the_middle_says_so(tmp_path):
    path = Path(tar(tmp_path / "damaged.tar", {f"{n}.png": bytes(600) for n in range(3)} | {"a.png": picture(1)}))
    data = bytearray(path.read_bytes())
    data[1536 : 1536 + 512] = b"?" * 512  # the header of the second member
    path.write_bytes(data)
    assert "no usable picture among 2 files (not_an_image, truncated)" in refused(str(path), tmp_path / "data")


def test_what_is_wrong_inside_a_member_is_its_reason(tmp_path):
    whole = picture(1)
    members = {"good.png": whole, "cut.png": whole[:-40], "text.png": b"not a picture", "empty.png": b""}
    ids, rejects = ingested(zipped(tmp_path / "a.zip", members, zipfile.ZIP_STORED), tmp_path / "data")
    assert ids == {"train": ["good"]}
    assert dict(rejects) == {"cut.png": "truncated", "text.png": "not_an_image", "empty.png": "empty"}
    details = (tmp_path / "data" / "rejects.jsonl").read_text()
    assert details.count("a.zip)") == 3


def with_flag(path: Path, flag: int) -> None:
    """Set a flag of every member of a ZIP archive, in its directory and its local headers."""
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(mark)
        while at >= 0:
            data[at + offset] |= flag
            at = data.find(mark, at + 1)
    path.write_bytes(data)


def refused(source: str, folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        without_ray(prepare(source, str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_archive_that_cannot_be_used_is_refused_in_a_line(tmp_path, monkeypatch):
    data = tmp_path / "data"
    encrypted = Path(zipped(tmp_path / "encrypted.zip", {"a.png": picture(1)}))
    with_flag(encrypted, 1)
    assert "is encrypted" in refused(str(encrypted), data)
    whole = Path(zipped(tmp_path / "whole.zip", {f"{n}.png": picture(n) for n in range(4)}))
    (tmp_path / "cut.zip").write_bytes(whole.read_bytes()[:-300])
    assert "is cut off" in refused(str(tmp_path / "cut.zip"), data)
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 200)
    assert "no tar archive starts so" in refused(str(tmp_path / "a.tar"), data)
    (tmp_path / "a.zip").write_bytes(b"")
    assert "is cut off" in refused(str(tmp_path / "a.zip"), data)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    assert "has 4 members; at most 3" in refused(str(whole), data)
    many = tar(tmp_path / "many.tar", {f"{n}.txt": b"" for n in range(4)})
    assert "more than 3 members" in refused(many, data)
    (tmp_path / "b.tar.gz").write_bytes(b"\x1f\x8b")
    assert "is compressed" in refused(str(tmp_path / "b.tar.gz"), data)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_ALWAYS_ALLOWED_BYTES", 2**20)
    bomb = zipped(tmp_path / "bomb.zip", {f"{n}.bmp": bytes(2**21) for n in range(3)})
    assert "would unpack to 6,291,456 bytes" in refused(bomb, tmp_path / "data")


def test_a_member_that_unpacks_to_more_than_the_archive_says_is_rejected(tmp_path, monkeypatch):
    path = Path(zipped(tmp_path / "lies.zip", {"good.png": picture(1), "lies.bmp": bytes(2**20)}))
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\1\2")
    struct.pack_into("<I", data, entry + 24, 100)  # the size in the directory
    path.write_bytes(data)
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 2**19)
    ids, rejects = ingested(str(path), tmp_path / "data", val_fraction=0.0)
    assert (ids, rejects) == ({"train": ["good"]}, [("lies.bmp", "too_large")])


def test_a_header_of_a_tar_that_asks_for_much_memory_is_an_error(tmp_path):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**33
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    assert "a header of" in refused(str(tmp_path / "a.tar"), tmp_path / "data")


def test_a_broken_archive_next_to_pictures_is_a_reject(tmp_path):
    source = fill(tmp_path / "source", {"1.png": picture(1), "broken.zip": b"PK"})
    ids, rejects = ingested(source, tmp_path / "data")
    assert (ids, rejects) == ({"train": ["1"]}, [("broken.zip", "unreadable")])


def write_table(path: Path, table: pa.Table, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with pa.OSFile(str(path), "wb") as sink:
            new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
            with new(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_tables_of_hugging_face_are_sources(kind, tmp_path):
    suffix = "parquet" if kind == "parquet" else "arrow"
    for split, first in (("train", 0), ("test", 5)):
        numbers = range(first, first + 5)
        columns = {
            "image": image_column([picture(n) for n in numbers], [f"{n:03d}.png" for n in numbers]),
            "sketch": image_column([picture(n, mode="L") if n % 2 else None for n in numbers], [None] * 5),
            "label": pa.array(range(5)),
        }
        write_table(tmp_path / "hf" / "data" / f"{split}-00000-of-00001.{suffix}", pa.table(columns), kind)
    (tmp_path / "hf" / "README.md").write_text("---")
    ids, rejects = ingested(str(tmp_path / "hf"), tmp_path / "data")
    assert ids == {"train": [f"{n:03d}" for n in range(5)], "val": [f"{n:03d}" for n in range(5, 10)]}
    assert rejects == [("README.md", "orphan")]
    rows = read_split(str(tmp_path / "data"), "train")
    assert {name: bool(has) for name, has in zip(rows["id"], rows["has_sketch"], strict=True)} == {
        f"{n:03d}": bool(n % 2) for n in range(5)
    }
    expected = fit_square(decode_rgb(picture(3)), SIZE)
    assert np.array_equal(target_of(tmp_path / "data", "train", "003"), expected)


def test_rows_of_a_table_without_names_are_numbered_and_bad_cells_are_listed(tmp_path):
    cells = [picture(1), None, b"not a picture", picture(2)]
    write_table(tmp_path / "some.parquet", pa.table({"photo": pa.array(cells, pa.binary())}), "parquet")
    ids, rejects = ingested(str(tmp_path / "some.parquet"), tmp_path / "data", val_fraction=0.0)
    assert ids == {"train": ["some/000000", "some/000003"]}
    assert rejects == [("some.parquet#1/photo", "empty"), ("some.parquet#2/photo", "not_an_image")]


def test_a_cell_that_names_a_file_is_rejected(tmp_path):
    column = pa.array([{"bytes": None, "path": "/etc/passwd"}, {"bytes": picture(1), "path": "a.png"}])
    write_table(tmp_path / "some.parquet", pa.table({"image": column}), "parquet")
    ids, rejects = ingested(str(tmp_path / "some.parquet"), tmp_path / "data")
    assert ids == {"train": ["a"]}
    assert rejects == [("some.parquet#0/image", "unreadable")]


def test_a_table_that_cannot_be_used_is_refused_in_a_line(tmp_path, monkeypatch):
    data = tmp_path / "data"
    table = pa.table({"image": image_column([picture(1)] * 4, [None] * 4)})
    write_table(tmp_path / "whole.parquet", table, "parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-30])
    assert "is not a whole Parquet or Arrow table" in refused(str(tmp_path / "cut.parquet"), data)
    write_table(tmp_path / "whole.arrow", table, "stream")
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "whole.arrow").read_bytes()[:-800])
    assert "is not a whole Parquet or Arrow table" in refused(str(tmp_path / "cut.arrow"), data)
    two = pa.table({"a": pa.array([b"1"]), "b": pa.array([b"2"])})
    write_table(tmp_path / "two.parquet", two, "parquet")
    assert "none of its columns of pictures (a, b) is a target" in refused(str(tmp_path / "two.parquet"), data)
    monkeypatch.setattr(tables, "MAX_BLOCK_BYTES", 1000)
    for name in ("whole.parquet", "whole.arrow"):
        again = tmp_path / f"again-{name}"  # The layout of a file that was read is not read again.
        again.write_bytes((tmp_path / name).read_bytes())
        assert "at most 1,000: write it with fewer rows" in refused(str(again), data)


def test_wrong_lengths_in_an_arrow_table_do_not_end_the_process(tmp_path):
    write_table(tmp_path / "whole.arrow", pa.table({"image": image_column([picture(1)] * 3, [None] * 3)}), "stream")
    whole = (tmp_path / "whole.arrow").read_bytes()
    places = [at for at in range(0, len(whole) - 8, 8) if whole[at : at + 8] in ((2).to_bytes(8, "little"),)]
    assert places
    for at in places:
        for value in (-(2**40), 2**40):
            damaged = whole[:at] + value.to_bytes(8, "little", signed=True) + whole[at + 8 :]
            file = tmp_path / f"damaged-{at}-{value}.arrow"
            file.write_bytes(damaged)
            assert "is not a whole Parquet or Arrow table" in refused(str(file), tmp_path / "data")


def test_an_ingest_of_tables_and_archives_resumes(tmp_path, monkeypatch):
    numbers = range(12)
    column = image_column([picture(n) for n in numbers], [f"{n}.png" for n in numbers])
    write_table(tmp_path / "train.parquet", pa.table({"image": column}), "parquet")
    tar(tmp_path / "train.tar", {f"{n}.png": picture(n) for n in numbers})
    for name in ("train.parquet", "train.tar"):
        source, folder = str(tmp_path / name), str(tmp_path / f"{name} data")
        monkeypatch.setattr("animediffusion.pipelines.data.ingest.MIN_PART_ROWS", 5)
        job = prepare(source, folder, size=SIZE)

        def stop(done: int, total: int, rejects: int) -> None:
            if done >= 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            without_ray(job, stop)
        again = prepare(source, folder, size=SIZE)
        assert again.continues
        assert without_ray(again).splits["train"].rows == 12
        whole = without_ray(prepare(source, folder + " calm", size=SIZE))
        assert whole.content_hash == without_ray(prepare(source, folder, size=SIZE)).content_hash


def test_anita_color_is_the_target_and_its_composition_only_where_there_is_no_other(tmp_path):
    frames = {
        f"Film/scene_{scene}/{role}/{n:04d}.png": picture(scene * 10 + n, mode="L" if role == "sketch" else "RGB")
        for scene in (1, 2) for n in (1, 2) for role in ("sketch", "color", "composition")
    }  # fmt: skip
    del frames["Film/scene_2/color/0002.png"]
    ids, rejects = ingested(fill(tmp_path / "anita", frames), tmp_path / "data", val_fraction=0.0)
    assert ids == {"train": [f"Film/scene_{scene}/{n:04d}" for scene in (1, 2) for n in (1, 2)]}
    assert rejects == [(f"Film/scene_{s}/composition/{n:04d}.png", "orphan") for s, n in ((1, 1), (1, 2), (2, 1))]
    expected = fit_square(decode_rgb(frames["Film/scene_2/composition/0002.png"]), SIZE)
    assert np.array_equal(target_of(tmp_path / "data", "train", "Film/scene_2/0002"), expected)


LAYERS = {"color": [(255, 0, 0, 255)] * 2, "Line art": [(0, 0, 0, 255), (0, 0, 0, 0)]}
"""Two pixels of each layer, the lowest first: a red ground, and a line in the left quarter."""


def png(pixels: list[tuple[int, ...]], side: int = 64) -> bytes:
    """A square whose left quarter has the first color, and the rest the second."""
    array = np.zeros((side, side, 4), np.uint8)
    array[:, : side // 4], array[:, side // 4 :] = pixels
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


MERGED = png([(0, 0, 0, 255), (255, 0, 0, 255)])


def openraster(layers: dict[str, list[tuple[int, ...]]] = LAYERS) -> bytes:
    stack = "".join(f'<layer name="{name}" src="data/{n}.png"/>' for n, name in reversed(list(enumerate(layers))))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("mimetype", "image/openraster")
        archive.writestr(
            "stack.xml", f'<image w="64" h="64"><stack><stack name="group">{stack}</stack></stack></image>'
        )
        archive.writestr("mergedimage.png", MERGED)
        for n, pixels in enumerate(layers.values()):
            archive.writestr(f"data/{n}.png", png(pixels))
    return buffer.getvalue()


def krita() -> bytes:
    """A file as Krita writes it, one tile for each layer: B, G, R and A planes, a run of LZF per line of pixels."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        layers = "".join(
            f'<layer name="{name}" filename="layer{n}" nodetype="paintlayer" colorspacename="RGBA" opacity="255"/>'
            for n, name in reversed(list(enumerate(LAYERS)))
        )
        archive.writestr(
            "maindoc.xml",
            f'<DOC xmlns="http://www.calligra.org/DTD/krita"><IMAGE name="Unnamed" width="64" height="64"><layers>'
            f'<layer name="g" nodetype="grouplayer"><layers>{layers}</layers></layer></layers></IMAGE></DOC>',
        )
        archive.writestr("mergedimage.png", MERGED)
        for n, pixels in enumerate(LAYERS.values()):
            planes = [bytes([a[c]] * 16 + [b[c]] * 48) * 64 for a, b in [pixels] for c in (2, 1, 0, 3)]
            tile = b"\0" + b"".join(planes) if n else b"\1" + packed(b"".join(planes))
            head = b"VERSION 2\nTILEWIDTH 64\nTILEHEIGHT 64\nPIXELSIZE 4\nDATA 1\n0,0,LZF,%d\n" % len(tile)
            archive.writestr(f"Unnamed/layers/layer{n}", head + tile)
    return buffer.getvalue()


def packed(data: bytes) -> bytes:
    """LZF of data in runs: one literal, then references to the byte before."""
    out, at = bytearray(), 0
    while at < len(data):
        run = len(data[at:]) - len(data[at:].lstrip(data[at : at + 1]))
        out += bytes([0, data[at]])
        run, at = min(run - 1, 264), at + 1
        if run >= 3:
            out += bytes([0xE0, run - 9, 0]) if run >= 9 else bytes([(run - 2) << 5, 0])
            at += run
    return bytes(out)


def photoshop() -> bytes:
    psd = pytest.importorskip("psd_tools")
    document = psd.PSDImage.new("RGBA", (64, 64))
    for name, pixels in LAYERS.items():
        document.create_pixel_layer(Image.open(io.BytesIO(png(pixels))), name=name)
    buffer = io.BytesIO()
    document.save(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(("suffix", "make"), [("ora", openraster), ("kra", krita), ("psd", photoshop)])
def test_the_composite_and_the_line_layer_of_a_drawing_are_a_pair(suffix, make, tmp_path):
    drawing = make()
    lines = layered.decode_lines(drawing, "a")
    assert (lines.shape, lines[0, 0], lines[0, -1]) == ((64, 64), 0, 255)
    if suffix != "psd":  # psd-tools does not write a composite
        composite = layered.decode_composite(drawing, "a")
        assert (tuple(composite[0, 0]), tuple(composite[0, -1])) == ((0, 0, 0), (255, 0, 0))
    source = fill(tmp_path / "source", {f"art/a.{suffix}": drawing, "art/a.png": picture(1), "art/b.png": picture(2)})
    ids, rejects = ingested(source, tmp_path / "data", val_fraction=0.0)
    rows = read_split(str(tmp_path / "data"), "train")
    assert ids == {"train": ["art/a", "art/b"]}
    assert rejects == [("art/a.png", "duplicate")]
    assert dict(zip(rows["id"], map(bool, rows["has_sketch"]), strict=True)) == {"art/a": True, "art/b": False}


def test_a_drawing_without_a_line_layer_is_a_target(tmp_path):
    drawing = openraster({"color": LAYERS["color"], "outfit": LAYERS["color"]})
    ids, rejects = ingested(fill(tmp_path / "source", {"a.ora": drawing}), tmp_path / "data")
    assert (ids, rejects) == ({"train": ["a"]}, [("a.ora#lines", "unreadable")])


def rezipped(drawing: bytes, changes: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(drawing)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, changes.get(name, old.read(name)))
    return buffer.getvalue()


BILLION = b'<!DOCTYPE x [<!ENTITY a "aaaa">]><image w="64" h="64"><stack name="&a;"/></image>'


@pytest.mark.parametrize(
    ("drawing", "found"),
    [
        (rezipped(openraster(), {"stack.xml": BILLION}), "declares entities"),
        (rezipped(openraster(), {"stack.xml": b"<image"}), "stack.xml is damaged"),
        (rezipped(openraster(), {"stack.xml": b" " * 2**23}), "has 8,388,608 bytes"),
        (rezipped(openraster(), {"stack.xml": b'<image w="99999" h="99999"/>'}), "99,999 x 99,999 pixels"),
        (rezipped(openraster(), {"data/1.png": b"no"}), "is not an image"),
        (rezipped(krita(), {"Unnamed/layers/layer1": b"VERSION 2\n"}), "its line layer is damaged"),
        (openraster()[:-60], "is cut off"),
        (b"8BPS", "is cut off"),
        (b"8BPS\0\1" + bytes(8) + struct.pack(">II", 300_000, 300_000) + bytes(99), "300,000 x 300,000 pixels"),
        (b"8BPS\0\1" + bytes(8) + struct.pack(">II", 64, 64) + bytes(99), "is a damaged PSD file"),
    ],
    # An archive contains the time at which it was made, but both processes of the tests must find the same names.
    ids=["entities", "xml", "large part", "large canvas", "layer", "tiles", "cut", "short", "large PSD", "PSD"],
)
def test_a_damaged_drawing_is_an_error_of_one_line(drawing, found):
    with pytest.raises(ImageError, match=found):
        layered.decode_lines(drawing, "a")


@pytest.mark.parametrize("data", [b"\x20", b"\xe0\xff\xff", b"\x05abc", b"\x20\x05", b"\x00a" * 9])
def test_damaged_lzf_is_an_error(data):
    with pytest.raises((ValueError, IndexError)):
        layered.unpack_lzf(data, 8)


@pytest.mark.ray
def test_the_command_ingests_tables_and_archives_on_a_cluster(ray_cluster, tmp_path, capsys):
    column = image_column([picture(n) for n in range(6)], [f"{n}.png" for n in range(6)])
    write_table(tmp_path / "train.parquet", pa.table({"image": column}), "parquet")
    for source in (str(tmp_path / "train.parquet"), tar(tmp_path / "train.tar", PAIRS)):
        assert run(["data", "ingest", source, source + " data", "--size", str(SIZE), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert shown["splits"] == {"train": 2 if source.endswith("tar") else 6}
