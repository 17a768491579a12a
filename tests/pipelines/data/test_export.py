"""Exported datasets are read by the programs that they are for, and ingested again."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from sources import picture, without_ray

from animediffusion.cli.app import run
from animediffusion.pipelines.data.formats.export import export, key_of, to_tar
from animediffusion.pipelines.data.ingest import prepare
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.data.shards import PICTURES
from animediffusion.pipelines.data.stream import read_split
from animediffusion.platform.errors import DataError, StorageError


def pixels(rows, role, name):
    return rows[role][list(rows["id"]).index(name)]


def test_hugging_face_datasets_loads_the_parquet(faces_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    export(faces_dataset, str(tmp_path / "out"), "parquet")
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    manifest = Manifest.load(faces_dataset)
    assert {split: len(rows) for split, rows in loaded.items()} == {s: v.rows for s, v in manifest.splits.items()}
    assert all(isinstance(loaded["val"].features[role], datasets.Image) for role in PICTURES)
    rows = read_split(faces_dataset, "val")
    for row in loaded["val"]:
        assert np.array_equal(np.asarray(row["target"].convert("RGB")), pixels(rows, "target", row["id"]))
        assert np.array_equal(np.asarray(row["sketch"].convert("L")), pixels(rows, "sketch", row["id"]))


def test_webdataset_reads_the_tars(faces_dataset, tmp_path):
    read = pytest.importorskip("webdataset").tariterators
    export(faces_dataset, str(tmp_path / "out"), "webdataset")
    rows = read_split(faces_dataset, "val")
    [shard] = (tmp_path / "out").glob("val-*.tar")
    with shard.open("rb") as file:  # WebDataset itself leaves its files to the garbage collector
        found = list(read.group_by_keys(read.tar_file_expander([{"url": str(shard), "stream": file}])))
    assert sorted(json.loads(one["json"])["id"] for one in found) == sorted(rows["id"])
    for one in found:
        name = json.loads(one["json"])["id"]
        assert one["__key__"] == name
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(one["target.webp"]))), pixels(rows, "target", name))


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_what_is_exported_is_ingested_again_with_the_same_content(form, faces_dataset, tmp_path):
    export(faces_dataset, str(tmp_path / "out"), form)
    manifest = Manifest.load(faces_dataset)
    again = without_ray(prepare(str(tmp_path / "out"), str(tmp_path / "data"), size=manifest.image_size))
    assert set(again.splits) == set(manifest.splits)
    for split in manifest.splits:
        rows, new = read_split(faces_dataset, split), read_split(str(tmp_path / "data"), split)
        assert sorted(rows["id"]) == sorted(new["id"])
        for name in rows["id"]:
            assert all(np.array_equal(pixels(rows, role, name), pixels(new, role, name)) for role in PICTURES)


def test_an_export_resumes_and_does_not_mix_with_another(faces_dataset, tmp_path):
    out = tmp_path / "out"
    export(faces_dataset, str(out), "webdataset")
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "val-000000.tar").unlink()
    kept = (out / "train-000000.tar").stat().st_mtime_ns
    export(faces_dataset, str(out), "webdataset")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert (out / "train-000000.tar").stat().st_mtime_ns == kept
    with pytest.raises(DataError, match="holds other files"):
        export(faces_dataset, str(out), "parquet")


def test_the_key_of_a_row_ends_where_webdataset_ends_it():
    assert key_of("a/0001") == "a/0001"
    assert key_of("v1.5/a.b") == "v1%2E5/a%2Eb"
    assert key_of("../../etc") == "%2E%2E/%2E%2E/etc"
    with tarfile.open(fileobj=io.BytesIO(to_tar([]))) as archive:
        assert archive.getmembers() == []


def test_the_command_names_the_formats(faces_dataset, tmp_path, capsys):
    assert run(["data", "export", faces_dataset, str(tmp_path / "out"), "--format", "csv"]) == 2
    assert capsys.readouterr().err == "error: --format: 'csv'; webdataset or parquet\n"
    assert run(["data", "export", faces_dataset, str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result) == ["data", "destination", "format", "rows", "files"]


def test_a_source_at_google_cloud_storage_is_ingested_where_its_package_is_installed(tmp_path, monkeypatch):
    import fsspec
    from fsspec.implementations.dirfs import DirFileSystem

    from animediffusion.platform.storage import fsspec_stores, storage

    class Store(DirFileSystem):
        def __init__(self, **_):
            super().__init__(path=str(tmp_path / "store"), fs=fsspec.filesystem("file", auto_mkdir=True))

    with pytest.raises(StorageError, match="gs:// needs the package gcsfs; pip install gcsfs"):
        storage.exists("gs://bucket/pictures")
    fsspec.register_implementation("gs", Store, clobber=True)
    monkeypatch.setattr(fsspec_stores, "PACKAGES", {"gs": "fsspec"})
    fsspec_stores.file_system.cache_clear()
    folder = tmp_path / "store" / "bucket" / "pictures"
    folder.mkdir(parents=True)
    for n in range(3):
        (folder / f"{n} ü.png").write_bytes(picture(n))
    manifest = without_ray(prepare("gs://bucket/pictures", "gs://bucket/data", size=16, val_fraction=0.0))
    assert manifest.splits["train"].rows == 3
    assert sorted(read_split("gs://bucket/data", "train")["id"]) == ["0 ü", "1 ü", "2 ü"]
    with pytest.raises(StorageError, match="does not exist"):
        storage.read_bytes("gs://bucket/none")
    with pytest.raises(StorageError, match="only s3:// and local files"):
        storage.s3_object("gs://bucket/keys.json")
    fsspec_stores.file_system.cache_clear()
