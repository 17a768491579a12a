import hashlib
import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from animediffusion.models.augmentation.augment import Batch
from animediffusion.models.bundle import (
    AVERAGES,
    BundleConfig,
    SamplerDefaults,
    load_bundle,
    save_bundle,
    with_metrics,
)
from animediffusion.models.network.attention import use_attention
from animediffusion.models.network.unet import UNetConfig
from animediffusion.models.training.ema import pack, read_averages
from animediffusion.pipelines.data.manifest import Manifest, Split, write_shard
from animediffusion.pipelines.data.shards import StoredRow
from animediffusion.pipelines.evaluation.evaluate import Evaluation
from animediffusion.pipelines.evaluation.measure import Measurement, load_rows, measure
from animediffusion.pipelines.release import release
from animediffusion.pipelines.release.checks import check_bundle
from animediffusion.pipelines.tuning import plots
from animediffusion.pipelines.tuning import sampler_search as tune
from animediffusion.pipelines.tuning.pareto import Prefer, choose, describe, knee, pareto_front
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError, ConfigError, DataError, Interrupted
from animediffusion.platform.images.codec import decode_rgb, encode_lossless
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.tracking import tracking

SIZE = 16


def point(evaluations: int, psnr: float, sampler: str = "euler") -> Measurement:
    return Measurement(
        sampler=sampler,
        steps=evaluations,
        guidance_scale=1.0,
        psnr=psnr,
        sharpness=1.0,
        evaluations=evaluations,
        seconds_per_image=0.1,
    )


def test_the_front_holds_what_nothing_beats() -> None:
    points = [point(4, 20.0), point(1, 18.0), point(2, 17.0), point(8, 20.5), point(16, 20.5), point(1, 17.5)]
    assert [(p.evaluations, p.psnr) for p in pareto_front(points)] == [(1, 18.0), (4, 20.0), (8, 20.5)]


def test_the_knee_is_where_more_work_stops_paying() -> None:
    front = [point(1, 18.0), point(2, 20.0), point(4, 20.4), point(8, 20.5)]
    assert knee(front).evaluations == 2
    assert knee(front[:1]).evaluations == 1


@pytest.mark.parametrize(("prefer", "evaluations"), [("best", 16), ("knee", 8), ("fast", 4)])
def test_the_choice_is_never_worse_than_the_defaults(prefer: Prefer, evaluations: int) -> None:
    defaults = point(8, 20.5)
    points = [defaults, point(1, 10.0), point(2, 20.2), point(4, 20.4), point(16, 20.52)]
    assert choose(points, prefer).evaluations == evaluations


@pytest.mark.parametrize("prefer", ["knee", "best"])
def test_what_was_chosen_is_chosen_again_when_it_is_the_defaults(prefer: Prefer) -> None:
    points = [point(3, 18.1), point(1, 18.0), point(2, 20.0), point(4, 20.4), point(5, 20.45), point(8, 20.5)]
    for defaults in points:
        chosen = choose([defaults, *points], prefer)
        assert choose([chosen, *points], prefer) == chosen


def test_defaults_that_nothing_beats_stay() -> None:
    points = [point(1, 21.0), point(4, 20.0), point(8, 20.9)]
    assert all(choose(points, prefer) == points[0] for prefer in ("best", "knee", "fast"))


@pytest.mark.parametrize("number", [1, 5, 6, 7, 20])
def test_the_strip_has_at_most_six_points_the_ends_of_the_front_and_the_choice(number: int) -> None:
    front = [point(1 + i, 18.0 + i) for i in range(number)]
    for chosen in (front[number // 2], point(30, 17.0)):
        shown = plots.spaced_points(front, chosen)
        assert len(shown) == len(set(shown)) <= plots.STRIP_POINTS
        assert {front[0], front[-1], chosen} <= set(shown)
        assert shown == sorted(shown, key=lambda p: p.evaluations)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Eight rows of flat pictures with everything that a row can have."""
    rows = []
    for number in range(8):
        pictures = {
            name: encode_lossless(np.full((SIZE, SIZE, 3), 20 * number + shift, np.uint8))
            for shift, name in enumerate(("target", "reference", "cross_reference"))
        }
        sketch = encode_lossless(np.full((SIZE, SIZE), 255, np.uint8))
        digest = hashlib.sha256(pictures["target"]).hexdigest()
        rows.append(
            StoredRow(id=f"{number}", split="val", sketch=sketch, **pictures, width=SIZE, height=SIZE, sha256=digest)
        )
    uri = str(tmp_path / "data")
    splits = {"val": Split(rows=8, shards=(write_shard(uri, "val", 0, rows),))}
    Manifest(
        image_size=SIZE, splits=splits, num_files=8, num_rejects=0, source="test", content_hash="0" * 64
    ).save(uri)  # fmt: skip
    return uri


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """An untrained bundle whose defaults are a waste of time."""
    torch.manual_seed(0)
    sizes = {"base_channels": 32, "num_res_blocks": 1, "head_channels": 32, "reference_channels": 32}
    network = UNetConfig(channel_multipliers=(1, 1), **sizes)
    sampler = SamplerDefaults(name="heun", steps=12, guidance_scale=3.0, shift=1.5)
    config = BundleConfig(network=network, image_size=SIZE, sampler=sampler, provenance={"run": "first"})
    folder = tmp_path / "bundle"
    denoiser = config.build()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    kept = {
        length: {name: (1 + length) * tensor for name, tensor in denoiser.state_dict().items()}
        for length in (0.04, 0.16)
    }
    save_bundle(folder, denoiser, config, metrics={"tracks": {"same": {"psnr": 1.0}}}, averages=pack(kept))
    return folder


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Settings.from_environment(workspace=tmp_path / "workspace")


@pytest.mark.ray
def test_tuning_resumes_after_a_signal_registers_better_defaults_and_costs_nothing_a_second_time(
    ray_cluster: None, settings: Settings, bundle: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = release.register(settings, bundle)
    lines: list[str] = []
    measured = Evaluation("m", "", data, "0" * 64, "val", 4, SIZE, SamplerDefaults(), {}, {}, "recolored", None)

    def search(model: str, progress: Callable[[str], None] = lines.append) -> tune.SamplerResult:
        return tune.tune_sampler(
            settings,
            model,
            data,
            trials=4,
            num_images=4,
            progress=progress,
            evaluate=lambda folder: replace(measured, sampler=load_bundle(folder).config.sampler),
        )

    def interrupt(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped at trial") as stopped:
        search("models:/animediffusion/1", interrupt)
    assert stopped.value.exit_code == 130
    known = len(lines)
    result = search("models:/animediffusion/1")
    assert (result.trials, result.measured) == (4, 4 - known)
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert capsys.readouterr().out.strip() == ""
    own = result.defaults
    assert (own.sampler, own.steps, own.guidance_scale, own.evaluations) == ("heun", 12, 3.0, 46)
    best = result.best
    assert best in result.front
    assert best.psnr >= own.psnr
    assert result.unseen is not None
    assert result.unseen.best >= result.unseen.defaults - tune.CONFIRM_DB
    version = Registry(settings).get(result.version)
    assert (version.version, version.parent) == (2, 1)
    stored = replace(measured, sampler=best.settings, model=f"sha256:{version.sha256[:12]}").to_json()
    assert version.metrics == stored
    tuned = load_bundle(Registry(settings).fetch("models:/animediffusion/2"))
    assert tuned.config.sampler == best.settings
    assert tuned.config.provenance.get("ema_length") == best.ema_length
    assert tuned.sha256 != first.sha256
    run = tracking.setup(settings).get_run(version.run)
    assert (run.info.status, run.data.params["trials"]) == ("FINISHED", "4")
    folder = settings.workspace / "tune"
    assert {path.name for path in Path(result.folder).iterdir()} == {"points.jsonl", "front.png", "strip.png"}
    assert [path.name for path in folder.iterdir()] == [Path(result.folder).name]
    for name in ("picture", "strip"):
        assert min(decode_rgb(Path(getattr(result, name)).read_bytes()).shape[:2]) > 100

    # Other defaults on the same weights: what is known stays known, and the choice is where it was.
    again = search("models:/animediffusion/2")
    assert (again.trials, again.measured, again.changed, again.version) == (4, 0, False, 2)
    assert again.best == best
    assert len(lines) == 4


def test_a_chosen_average_becomes_the_weights_of_a_version_that_knows_the_others(
    settings: Settings, bundle: Path, data: str
) -> None:
    release.register(settings, bundle)
    registry, rows = Registry(settings), load_rows(data, "val", 8)
    loaded = load_bundle(bundle)
    averages = read_averages(loaded)
    task = tune.SamplerTask(loaded, averages, rows.searched)
    sampler = SamplerDefaults(steps=2)
    trained, chosen = (tune.measure_point(task, sampler, length) for length in (None, 0.1))
    assert trained.psnr != chosen.psnr
    assert "average over 10% of the run" in describe(chosen)
    run = tracking.Run.start(settings, tracking.TUNING, "test", {})
    made = tune.register_choice(registry, loaded, averages, chosen, run.run_id, None)
    assert made == (2, True)

    # Who only colors gets the weights that were measured, and not the others.
    folder = registry.fetch("models:/animediffusion/2")
    assert not (folder / AVERAGES).exists()
    tuned = check_bundle(folder)
    assert replace(measure(tuned, rows.searched, sampler), seconds_per_image=0) == replace(
        chosen, ema_length=None, seconds_per_image=0
    )
    assert release.show(settings, 2)["lineage"][0]["made"] == "tuned"

    # Who tunes it again gets them all, also after that, and the same journal.
    again = load_bundle(registry.fetch("models:/animediffusion/2", averages=True))
    found = read_averages(again)
    assert (again.folder, found.length) == (folder, 0.1)
    assert tune.search_key(again, found, rows) == tune.search_key(loaded, averages, rows)
    assert tune.register_choice(registry, again, found, chosen, run.run_id, None) == (2, False)
    back, _ = tune.register_choice(registry, again, found, trained, run.run_id, None)
    assert load_bundle(registry.fetch(f"models:/animediffusion/{back}")).config == replace(
        loaded.config, sampler=sampler
    )
    run.finish()


def test_averages_that_do_not_fit_are_an_error_of_one_line(settings: Settings, bundle: Path, data: str) -> None:
    save_file({"0.04/other": torch.zeros(1)}, bundle / AVERAGES)
    with_metrics(bundle, {})  # seals the folder as it is now
    with pytest.raises(BundleError, match=r"averages\.safetensors does not fit the model"):
        tune.tune_sampler(settings, bundle, data, num_images=4)


def test_a_measurement_depends_on_the_settings_alone(bundle: Path, data: str) -> None:
    rows = load_rows(data, "val", 8)
    loaded = load_bundle(bundle)
    first, second = (measure(loaded, rows.searched, SamplerDefaults(steps=2)) for _ in range(2))
    assert (first.psnr, first.sharpness, first.evaluations) == (second.psnr, second.sharpness, 2)
    assert rows.unseen is None


def test_a_point_that_is_good_by_chance_is_not_chosen(bundle: Path, data: str) -> None:
    loaded, rows = load_bundle(bundle), load_rows(data, "val", 4)
    averages = read_averages(loaded)
    assert rows.unseen is not None
    settings = [SamplerDefaults(steps=1), SamplerDefaults(steps=2), SamplerDefaults(name="heun", steps=4)]
    unseen = sorted((measure(loaded, rows.unseen, one) for one in settings), key=lambda point: point.psnr)
    assert unseen[1].psnr - unseen[0].psnr > tune.CONFIRM_DB
    worst, defaults = replace(unseen[0], psnr=99.0), replace(unseen[1], psnr=20.0)
    chosen, found = tune.confirm(loaded, averages, rows, [defaults, worst], "best")
    assert chosen == defaults
    assert found == tune.UnseenPsnr(defaults=unseen[1].psnr, best=unseen[1].psnr)


def test_wrong_arguments_are_named(settings: Settings, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="knee, fast, best"):
        tune.tune_sampler(settings, bundle, "x", prefer="cheap")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1"):
        tune.tune_sampler(settings, bundle, "x", trials=0)
    with pytest.raises(DataError, match="no dataset"):
        tune.tune_sampler(settings, bundle, str(tmp_path))


def test_a_trial_in_another_process_uses_the_attention_of_the_driver(monkeypatch, bundle: Path) -> None:
    use_attention("sdpa")
    try:
        loaded = load_bundle(bundle)
        task = pickle.loads(pickle.dumps(tune.SamplerTask(loaded, read_averages(loaded), Batch(*[torch.zeros(1)] * 3))))
    finally:
        use_attention("auto")
    backends: list[str] = []
    monkeypatch.setattr(tune, "use_attention", backends.append)
    monkeypatch.setattr(tune, "measure_point", lambda *_: point(1, 20.0))
    monkeypatch.setattr(tune.tune, "report", lambda _: None)
    tune.trial({"steps": 1}, task=task)
    assert backends == ["sdpa"]
