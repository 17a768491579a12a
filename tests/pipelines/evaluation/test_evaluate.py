import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from animediffusion.models.bundle import BundleConfig, SamplerDefaults, load_bundle, save_bundle
from animediffusion.models.network.unet import UNetConfig
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.data.stream import read_split
from animediffusion.pipelines.evaluation.evaluate import evaluate, run_tracks
from animediffusion.pipelines.evaluation.metrics import score
from animediffusion.pipelines.release.record import evaluate_and_record
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError, ConfigError, DataError
from animediffusion.platform.images.codec import decode_rgb

NETWORK = UNetConfig(base_channels=32, channel_multipliers=(1,), num_res_blocks=1, patch_size=4, head_channels=32)
NUMBERS = {"psnr", "ssim", "ms_ssim", "ciede2000"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return Settings(workspace=tmp_path_factory.mktemp("workspace"))


def write_bundle(folder, size=32):
    torch.manual_seed(0)
    config = BundleConfig(network=NETWORK, image_size=size, sampler=SamplerDefaults(name="dpmpp_2m", steps=2))
    save_bundle(folder, config.build(), config)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("model") / "bundle")


def test_an_evaluation_has_the_keys_of_the_contract(settings, bundle, faces_dataset, tmp_path):
    seen = []
    result = evaluate(
        settings, str(bundle), faces_dataset, out=tmp_path / "out", progress=lambda done, _total: seen.append(done)
    )
    values = result.to_json()
    contract = {"model", "data", "data_hash", "split", "num_images", "image_size", "sampler", "tracks", "baselines"}
    assert contract | {"grid"} <= set(values)
    own = {"name": "dpmpp_2m", "steps": 2, "guidance_scale": 1.0, "shift": 1.0, "guidance_interval": [0.0, 1.0]}
    assert values["sampler"] == own
    assert (result.num_images, result.image_size, result.split) == (8, 32, "val")
    assert result.data_hash == Manifest.load(faces_dataset).content_hash
    assert result.model_sha256 == load_bundle(bundle).sha256
    assert set(result.baselines) == {"copy_reference", "mean_color", "sketch"}
    for tracks in (values["tracks"], *values["baselines"].values()):
        assert set(tracks) == {"same", "cross"}
        for numbers in tracks.values():
            assert set(numbers) == NUMBERS
            assert numbers["ms_ssim"] is None
            assert 0 < numbers["psnr"] < 60
    assert seen[-1] == 16
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == values
    assert result.grid == str(tmp_path / "out" / "grid.png")
    assert decode_rgb((tmp_path / "out" / "grid.png").read_bytes()).shape[1] > 8 * 32


def test_two_evaluations_are_equal(settings, bundle, faces_dataset):
    first, again = (evaluate(settings, str(bundle), faces_dataset, limit=4) for _ in range(2))
    assert first == again
    assert first.num_images == 4


def test_the_tracks_compare_with_the_target_and_show_what_the_dataset_has(bundle, faces_dataset):
    rows = read_split(faces_dataset, "val", 3)
    rows.pop("id")
    tracks = run_tracks(load_bundle(bundle), rows)
    for name, reference in (("same", "reference"), ("cross", "cross_reference")):
        assert np.array_equal(tracks[name].truth, rows["target"])
        assert np.array_equal(tracks[name].reference, rows[reference])
        assert np.array_equal(tracks[name].sketch[..., 0], rows["sketch"])
        assert score(tracks[name].truth, rows["target"]).psnr == 100


def test_rows_without_a_second_view_are_recolored_for_the_cross_track(bundle, faces_dataset):
    rows = read_split(faces_dataset, "val", 3)
    rows.pop("id")
    rows["has_cross"][:] = False
    track = run_tracks(load_bundle(bundle), rows)["cross"]
    assert not np.array_equal(track.truth, rows["target"])
    assert not np.array_equal(track.reference, rows["cross_reference"])


def test_what_was_measured_is_kept_in_the_bundle_whose_identity_stays(settings, tmp_path, faces_dataset):
    bundle = write_bundle(tmp_path / "bundle")
    before = load_bundle(bundle).sha256
    result = evaluate_and_record(settings, str(bundle), faces_dataset, limit=2)
    after = load_bundle(bundle)
    assert after.sha256 == before
    assert after.metrics == result.to_json()


def test_data_of_another_size_raises_config_error(settings, tmp_path, faces_dataset):
    bundle = write_bundle(tmp_path / "bundle", size=64)
    with pytest.raises(ConfigError, match="32 px, the model is for 64 px; ingest the source at the model's size"):
        evaluate(settings, str(bundle), faces_dataset)


def test_a_missing_model_and_a_missing_split_are_named(settings, bundle, faces_dataset, tmp_path):
    with pytest.raises(BundleError, match="nowhere: no such folder"):
        evaluate(settings, str(tmp_path / "nowhere"), faces_dataset)
    with pytest.raises(DataError, match=r"split 'test'.*one of 'train', 'val'"):
        evaluate(settings, str(bundle), faces_dataset, split="test")
    with pytest.raises(DataError, match="no dataset"):
        evaluate(settings, str(bundle), str(tmp_path))


def test_a_bundle_with_a_changed_byte_is_not_measured(settings, tmp_path, faces_dataset):
    bundle = write_bundle(tmp_path / "bundle")
    weights = bytearray((bundle / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (bundle / "model.safetensors").write_bytes(weights)
    with pytest.raises(BundleError, match=r"model\.safetensors was changed"):
        evaluate(settings, str(bundle), faces_dataset)


@pytest.mark.ray
def test_an_evaluation_on_a_cluster_has_the_same_numbers_and_picture(
    ray_cluster, settings, bundle, faces_dataset, tmp_path
):
    here, there = (
        evaluate(settings, str(bundle), faces_dataset, "train", limit=40, out=tmp_path / name, on_cluster=on_cluster)
        for name, on_cluster in (("here", False), ("there", True))
    )
    assert here.num_images == 40
    assert replace(there, grid=here.grid) == here
    assert (tmp_path / "there" / "grid.png").read_bytes() == (tmp_path / "here" / "grid.png").read_bytes()
