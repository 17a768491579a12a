import json
from dataclasses import replace

import pytest
import torch

from animediffusion.models.bundle import (
    FILES,
    BundleConfig,
    SamplerDefaults,
    load_bundle,
    save_bundle,
    smoke_sample,
    verify,
    with_metrics,
    with_sampler,
)
from animediffusion.models.colorize import colorize
from animediffusion.models.diffusion.path import PathConfig
from animediffusion.platform.errors import BundleError


@pytest.fixture
def config(network):
    return BundleConfig(
        network=network,
        path=PathConfig(name="flow", shift=2.0),
        prediction="v",
        image_size=16,
        sampler=SamplerDefaults(name="heun", steps=2, guidance_scale=1.5, guidance_interval=(0.2, 0.9)),
        provenance={"recipe": "demo"},
    )


@pytest.fixture
def folder(tmp_path, config):
    torch.manual_seed(0)
    save_bundle(tmp_path / "bundle", config.build(), config, {"psnr": 20.5}, "# card\n")
    return tmp_path / "bundle"


def test_a_loaded_bundle_colors_as_the_saved_model_did(tmp_path, config, new_batch):
    torch.manual_seed(1)
    denoiser, batch = config.build(), new_batch(2)
    sha256 = save_bundle(tmp_path / "b", denoiser, config, {"psnr": 20.5})
    bundle = load_bundle(tmp_path / "b")
    t = torch.tensor([0.2, 0.9])
    before, after = (
        model(batch.target, t, model.encode(batch.sketch, batch.reference)) for model in (denoiser, bundle.denoiser)
    )
    assert torch.equal(before, after)
    assert (bundle.config, bundle.metrics, bundle.sha256) == (config, {"psnr": 20.5}, sha256)
    assert len(sha256) == 64
    assert not bundle.denoiser.training
    assert not any(p.requires_grad for p in bundle.denoiser.parameters())


def test_weights_of_half_the_size_are_loaded_as_float32(tmp_path, config):
    torch.manual_seed(1)
    denoiser = config.build()
    save_bundle(tmp_path / "b", denoiser, config)
    whole = (tmp_path / "b" / "model.safetensors").stat().st_size
    sha256 = save_bundle(tmp_path / "b", denoiser, config, dtype=torch.float16)
    assert (tmp_path / "b" / "model.safetensors").stat().st_size < 0.7 * whole
    loaded = load_bundle(tmp_path / "b", sha256=sha256).denoiser
    for parameter, before in zip(loaded.parameters(), denoiser.parameters(), strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before.half().float())


def test_a_bundle_holds_five_files_and_no_pickle(folder):
    names = {"config.json", "model.safetensors", "metrics.json", "card.md", "checksums.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert list(folder.parent.iterdir()) == [folder]


def test_saving_over_a_bundle_replaces_it(folder, config):
    before = verify(folder)
    torch.manual_seed(5)
    after = save_bundle(folder, config.build(), config)
    assert before != after == verify(folder)


def test_a_pointer_of_git_lfs_is_named(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(BundleError, match=r"model.safetensors is a Git LFS pointer, not the file; fetch it with"):
        load_bundle(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_found_and_named(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} was changed"):
        load_bundle(folder)


@pytest.mark.parametrize("name", [*FILES, "checksums.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"missing {name}"):
        load_bundle(folder)


def test_damaged_checksums_and_a_missing_folder_are_named(folder, tmp_path):
    (folder / "checksums.json").write_text("{")
    with pytest.raises(BundleError, match=r"checksums\.json is damaged"):
        load_bundle(folder)
    with pytest.raises(BundleError, match="is not a directory"):
        load_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format is not 1"),
        ({"paper": 1}, "unknown keys paper"),
        ({"sampler": {"name": "ddpm"}}, "sampler name must be one of"),
        ({"network": {"base_channels": 64}}, r"model\.safetensors does not fit"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(folder, change, message):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **change}))
    with_metrics(folder, {})  # seals the folder as it is now
    with pytest.raises(BundleError, match=message):
        load_bundle(folder)


def test_other_sampler_defaults_are_another_identity_with_the_same_weights(folder, tmp_path):
    sampler = SamplerDefaults(name="dpmpp_2m", steps=7, guidance_scale=2.0, guidance_interval=(0.1, 0.8))
    sha256 = with_sampler(folder, tmp_path / "tuned", sampler, {"psnr": 21.0})
    before, after = load_bundle(folder), load_bundle(tmp_path / "tuned")
    assert before.sha256 != after.sha256 == sha256
    assert (after.config.sampler, after.metrics) == (sampler, {"psnr": 21.0})
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "tuned")]
    assert weights[0] == weights[1]


def test_measured_metrics_leave_the_identity_alone(folder):
    before = verify(folder)
    with_metrics(folder, {"psnr": 1.0})
    assert load_bundle(folder).metrics == {"psnr": 1.0}
    assert verify(folder) == before


def test_the_smoke_sample_passes_a_sound_model_and_rejects_weights_that_are_not_finite(folder, config):
    smoke_sample(load_bundle(folder))
    # The null reference is seen under guidance only.
    for name in ("network.output.bias", "network.null_reference"):
        denoiser = config.build()
        with torch.no_grad():
            denoiser.get_parameter(name).fill_(float("nan"))
        save_bundle(folder, denoiser, config)
        with pytest.raises(BundleError, match="not a finite 16x16 image"):
            smoke_sample(load_bundle(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "ddpm"}, "euler, heun, dpmpp_2m"),
        ({"steps": 0}, "a whole number from 1 to 1000, got 0"),
        ({"guidance_scale": 30.0}, "a number from 0 to 20, got 30"),
        ({"shift": 0.0}, "above 0"),
        ({"guidance_interval": (0.7, 0.2)}, "two rising times"),
        ({"guidance_interval": (0.0, 1.5)}, "two rising times"),
    ],
)
def test_impossible_sampler_defaults_raise_value_error(values, message):
    with pytest.raises(ValueError, match=message):
        SamplerDefaults(**values)


def test_the_same_seed_gives_the_same_image_and_another_seed_another(folder, new_batch):
    bundle, batch = load_bundle(folder), new_batch(1)
    first, again, other = (colorize(bundle, batch.sketch, batch.reference, seeds=[seed]) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.01)
    assert first.shape == (1, 3, 16, 16)
    assert first.abs().max() <= 1


def test_an_image_does_not_depend_on_its_neighbours(folder, new_batch):
    bundle, batch = load_bundle(folder), new_batch(3)
    together = colorize(bundle, batch.sketch, batch.reference, seeds=[1, 2, 3])
    for row in range(3):
        alone = colorize(bundle, batch.sketch[row : row + 1], batch.reference[row : row + 1], seeds=[row + 1])
        # Far below half an 8-bit level (0.004).
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-4)


def test_a_request_may_ask_for_another_sampler(folder, new_batch):
    bundle, batch = load_bundle(folder), new_batch(1)
    own = colorize(bundle, batch.sketch, batch.reference, seeds=[0])
    other = colorize(bundle, batch.sketch, batch.reference, seeds=[0], sampler=SamplerDefaults(steps=1))
    assert not torch.allclose(own, other, atol=0.01)


def test_a_bundle_without_hints_is_as_version_0_1_wrote_it(folder, config, new_batch, tmp_path):
    assert "hints" not in json.loads((folder / "config.json").read_text())["network"]
    network = replace(config.network, hints=True)
    hinted = replace(config, network=network)
    save_bundle(tmp_path / "hinted", hinted.build(), hinted)
    bundle = load_bundle(tmp_path / "hinted")
    assert bundle.config.network.hints
    batch = new_batch(1)
    planes = torch.ones(1, 4, *batch.sketch.shape[2:])
    assert colorize(bundle, batch.sketch, [batch.reference] * 2, seeds=[1], hints=planes).shape == batch.target.shape
