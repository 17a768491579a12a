"""improve: what it decides, and three rounds with simulated artists."""

import hashlib
import json
import re
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import in_process
import numpy as np
import pytest
import torch
from artists import Studio, correct, draw_request, draw_signed_request
from bundles import evaluation, new_model, write_bundle
from filelock import FileLock

from animediffusion.cli import app as cli
from animediffusion.models.bundle import file_sha256, save_bundle
from animediffusion.pipelines.data import ingest
from animediffusion.pipelines.data.manifest import Manifest, Split, write_shard
from animediffusion.pipelines.data.shards import PICTURES, StoredRow
from animediffusion.pipelines.improve import UNTIL, ImproveOptions, improve
from animediffusion.pipelines.release import release
from animediffusion.pipelines.release.canary import canary
from animediffusion.pipelines.release.checks import CIEDE2000_MARGIN, PSNR_MARGIN
from animediffusion.pipelines.release.record import evaluate_and_record
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.pipelines.training import driver
from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.platform.cluster import cluster
from animediffusion.platform.corrections.counts import VersionCounts
from animediffusion.platform.corrections.store import Corrections, now
from animediffusion.platform.errors import ConfigError, DataError, Interrupted, RegistryError
from animediffusion.platform.images.codec import encode_lossless
from animediffusion.platform.registry import traffic
from animediffusion.platform.registry.client import Registry
from animediffusion.serve.rendering.sketch import as_gray, read_drawing

NETWORK = """
network:
  base_channels: 32
  channel_multipliers: [1, 1]
  num_res_blocks: 1
  patch_size: 4
  head_channels: 32
  reference_channels: 32
  io_kernel_size: 3
  attention_levels: [1]
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("improve")


@pytest.fixture
def settings(workspace, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = new_model(workspace)
    return settings.model_copy(update={"corrections": str(tmp_path / "corrections")})


def call(settings, *overrides, **options):
    """The steps of one call, as text."""
    found = improve(settings, ImproveOptions(overrides=overrides, **options), lambda _: None, silent)
    return [step.text for step in found]


def result(data_hash, psnr, ciede2000):
    return {**evaluation(psnr, ciede2000, data_hash), "num_images": 8, "image_size": 32}


@pytest.fixture
def candidate(settings, faces_dataset, tmp_path):
    """A function that registers version 1, the champion, and version 2, which an earlier call trained and evaluated."""
    corrections = tmp_path / "dataset"
    shutil.copytree(faces_dataset, corrections)
    manifest = json.loads((corrections / "manifest.json").read_text())
    (corrections / "manifest.json").write_text(json.dumps({**manifest, "content_hash": "c" * 64}))

    def make(*, corrected: float, psnr: float):
        """CIEDE2000 of version 2 on the corrections, where the champion has 12; its PSNR elsewhere, where it has 20."""
        release.register(settings, write_bundle(tmp_path / "one", 1, result("0" * 64, 20.0, 8.0), data=faces_dataset))
        release.promote(settings, 1)
        made = {"data": str(corrections), "rehearse": faces_dataset}
        bundle = write_bundle(tmp_path / "two", 2, **made)
        release.register(settings, bundle, parent=1, tags={UNTIL: datetime.now(UTC).isoformat()})
        for version, values in ((1, (10.0, 12.0)), (2, (11.0, corrected))):
            release.record_evaluation(settings, f"models:/{settings.model_name}/{version}", result("c" * 64, *values))
        release.record_evaluation(settings, f"models:/{settings.model_name}/2", result("0" * 64, psnr, 8.0))

    return make


def moves(settings):
    return [(event["action"], event["alias"], event["to"]) for event in release.history(settings)[1:]]


def answered(settings, champion: VersionCounts, challenger: VersionCounts):
    Corrections(settings.corrections_uri).add_counts({(now()[:10], "1"): champion, (now()[:10], "2"): challenger})


def test_a_better_version_gets_a_canary_and_waits_for_answers(settings, candidate):
    candidate(corrected=9.0, psnr=19.9)
    gain = "CIEDE2000 12.00 to 9.00 on 8 corrections held out"
    assert call(settings, percent=30) == [f"canary version 2: 30 % of the requests; {gain}"]
    assert traffic.read(Registry(settings)).shares == {2: 0.3, 1: 0.7}
    assert moves(settings) == [("promote", "challenger", 2), ("canary", "challenger", 2)]
    assert {event["reason"] for event in release.history(settings)[1:]} == {f"improve: {gain}"}
    answered(settings, VersionCounts(90, 40), VersionCounts(40, 4))
    [waits] = call(settings)
    assert waits.startswith("wait version 2: 10.0% (4 of 40) of the challenger's answers corrected, 44.4% (40 of 90)")
    assert waits.endswith("100 answers of each are needed")
    assert len(moves(settings)) == 2


def test_a_lower_correction_rate_promotes_and_the_same_call_again_changes_nothing(settings, candidate):
    candidate(corrected=9.0, psnr=20.0)
    call(settings)
    answered(settings, VersionCounts(900, 400), VersionCounts(100, 10))
    promoted, waits = call(settings)
    assert promoted.startswith("promote version 2: 10.0% (10 of 100) of the challenger's answers")
    assert waits == "wait: 0 new corrections; a round needs 20"
    assert Registry(settings).alias("champion") == 2
    assert not traffic.read(Registry(settings)).is_canary
    before = moves(settings)
    assert before[-2:] == [("canary", "challenger", 2), ("promote", "champion", 2)]
    assert call(settings) == [waits]
    assert moves(settings) == before


def test_a_higher_correction_rate_ends_the_canary(settings, candidate):
    candidate(corrected=9.0, psnr=20.0)
    call(settings)
    answered(settings, VersionCounts(900, 100), VersionCounts(100, 40))
    ended, _ = call(settings)
    assert ended.startswith("end canary version 2: 40.0% (40 of 100)")
    assert traffic.read(Registry(settings)).shares == {1: 1.0}
    assert call(settings) == ["wait: 0 new corrections; a round needs 20"]


@pytest.mark.parametrize(
    ("corrected", "psnr", "why"),
    [
        (12.0, 21.0, "is no better: CIEDE2000 12.00 to 12.00 on 8 corrections held out"),
        (6.0, 19.7, "same-reference PSNR 19.70 against the champion's 20.00"),
    ],
)
def test_a_version_that_is_no_better_or_worse_elsewhere_is_refused_once(settings, candidate, corrected, psnr, why):
    candidate(corrected=corrected, psnr=psnr)
    [refused] = call(settings)
    assert refused.startswith(f"refuse version 2: {why}")
    assert moves(settings) == [("refuse", "challenger", 2)]
    assert Registry(settings).alias("challenger") is None
    assert call(settings) == ["wait: 0 new corrections; a round needs 20"]
    assert moves(settings) == [("refuse", "challenger", 2)]


def test_a_refusal_is_no_alias_change_for_a_rollback(settings, candidate):
    candidate(corrected=12.0, psnr=20.0)
    call(settings)
    with pytest.raises(RegistryError, match="no version was promoted yet"):
        release.rollback(settings, "challenger")


def test_a_canary_of_somebody_else_is_left_alone(settings, tmp_path):
    for seed in (1, 2):
        release.register(settings, write_bundle(tmp_path / str(seed), seed, evaluation()))
    release.promote(settings, 1)
    release.promote(settings, 2, alias="challenger")
    canary(settings, 10)
    with pytest.raises(RegistryError, match="version 2 has one that improve did not begin; decide it with"):
        call(settings)


def test_what_is_missing_is_named(settings, tmp_path):
    with pytest.raises(ConfigError, match="ANIMEDIFFUSION_CORRECTIONS: is not set"):
        call(settings.model_copy(update={"corrections": None}))
    with pytest.raises(RegistryError, match="there is no champion; run `models promote V`"):
        call(settings)
    with pytest.raises(ConfigError, match="init_from: is chosen by improve; leave it out"):
        call(settings, "init_from=starter")
    with pytest.raises(ConfigError, match="--percent: 100; 1 to 99"):
        call(settings, percent=100)


def test_data_that_is_gone_must_be_named(settings, tmp_path):
    release.register(settings, write_bundle(tmp_path / "one", 1, evaluation(), data=str(tmp_path / "gone")))
    release.promote(settings, 1)
    store = Corrections(settings.corrections_uri)
    for number in range(3):
        request = draw_request(number, 16)
        correct(store, "1", f"request-{number}", request, request.reference)
    assert call(settings) == ["wait: 3 new corrections; a round needs 20"]
    with pytest.raises(DataError, match=r"former data of version 1: .*/gone: no dataset .*; name .* rehearse=DATA"):
        call(settings, min_new=3)


def test_two_at_once_do_not_mix(settings):
    with FileLock(settings.workspace / "improve.lock"):
        assert call(settings) == [f"wait: another improve is running in {settings.workspace}"]


def test_the_command_prints_its_steps(settings, candidate, monkeypatch, capsys):
    candidate(corrected=9.0, psnr=20.0)
    monkeypatch.setenv("ANIMEDIFFUSION_MODEL_NAME", settings.model_name)
    monkeypatch.setenv("ANIMEDIFFUSION_WORKSPACE", str(settings.workspace))
    monkeypatch.setenv("ANIMEDIFFUSION_CORRECTIONS", str(settings.corrections))
    assert cli.run(["improve", "--percent", "25", "--json"]) == 0
    [step] = json.loads(capsys.readouterr().out)["steps"]
    assert (step["action"], step["version"]) == ("canary", 2)
    assert cli.run(["models", "canary"]) == 0
    assert "25 % of the requests go to version 2, 75 % to version 1" in capsys.readouterr().out
    assert cli.run(["improve"]) == 0
    assert capsys.readouterr().out.startswith("wait version 2: 0.0% (0 of 0)")
    assert cli.run(["improve", "data=elsewhere"]) == 2
    assert capsys.readouterr().err == "error: data: is chosen by improve; leave it out\n"


def silent():
    """A context for a training run that ignores its reports."""
    return nullcontext(lambda _: None)


SIZE = 32
HASH = "d" * 64
"""content_hash of the data of the first champion."""
RECIPE = f"""{NETWORK}objective: {{denoising: {{time_mean: 2.0}}}}
sampler: {{steps: 1}}
optimizer: {{learning_rate: 2.0e-3, muon_learning_rate: 0.02, warmup_steps: 10, ema_decay: 0.97, precision: fp32}}
augment: {{cross_reference: 1.0, recolor: 0.0, rewarp: 0.0, flip: 0.0, soften: 0.0}}
batch_size: 16
num_workers: 1
num_samples: 0
max_steps: 1
"""
ANSWERS = 120
"""Drawings that the artists color with each version in each round."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def drawn_faces(tmp_path_factory):
    """A dataset of 400 + 40 drawn faces, the data of the first champion."""
    folder = str(tmp_path_factory.mktemp("drawn"))
    splits = {}
    for split, numbers in (("train", range(400)), ("val", range(1000, 1040))):
        rows = []
        for number in numbers:
            row = make_row(0, number, SIZE)
            pictures = {name: encode_lossless(getattr(row, name)) for name in PICTURES}
            sha256 = hashlib.sha256(pictures["target"]).hexdigest()
            rows.append(StoredRow(id=f"{number}", split=split, **pictures, width=SIZE, height=SIZE, sha256=sha256))
        splits[split] = Split(rows=len(rows), shards=(write_shard(folder, split, 0, rows),))
    facts = {"num_files": 1760, "num_rejects": 0, "source": "drawn", "content_hash": HASH}
    Manifest(image_size=SIZE, splits=splits, **facts).save(folder)
    return folder


@pytest.fixture
def here(monkeypatch):
    """Train and ingest in this process."""
    monkeypatch.setattr(driver, "train", in_process.train)
    monkeypatch.setattr(ingest, "run_tasks", in_process.run_tasks)
    monkeypatch.setattr(cluster, "connect", lambda _: None)


def test_a_server_keeps_what_distinguishes_the_drawings_of_signing_artists():
    for number in range(20):
        sketch = draw_signed_request(number, 128).sketch
        seen = as_gray(read_drawing(np.repeat(sketch[..., None], 3, axis=2)))
        np.testing.assert_array_equal(seen, sketch)
        assert seen[:112, :112].min() >= 127


@pytest.mark.slow
def test_artists_correct_less_each_round_and_nothing_gets_worse_elsewhere(settings, recipe, drawn_faces, here, capsys):
    config = load_recipe(recipe, [f"data={drawn_faces}", "max_steps=500"])
    first = release.register(settings, driver.train(settings, config).bundle)
    evaluate_and_record(settings, f"models:/{first.name}/1", drawn_faces)
    release.promote(settings, 1)
    studio = Studio(settings, SIZE)
    rates = studio.work(ANSWERS)
    options = ImproveOptions(recipe=recipe, overrides=("max_steps=250",), percent=50, min_new=40, min_answered=ANSWERS)
    for champion in (1, 2, 3):
        [*ended, begun] = steps(settings, options)
        assert [action for action, _ in ended] == (["promote"] if champion > 1 else [])
        assert begun == ("canary", champion + 1)
        assert steps(settings, options) == [("wait", champion + 1)]
        worked = studio.work(ANSWERS)
        assert worked.keys() == {champion, champion + 1}
        rates[champion + 1] = worked[champion + 1]
    assert steps(settings, replace(options, min_new=10_000)) == [("promote", 4), ("wait", None)]

    made = [Registry(settings).get(version) for version in (1, 2, 3, 4)]
    assert [version.parent for version in made] == [None, 1, 2, 3]
    assert {version.tags["rehearse"] for version in made[1:]} == {drawn_faces}
    elsewhere = [next(one["tracks"] for one in version.evaluations if one["data_hash"] == HASH) for version in made]
    with capsys.disabled():
        for version, tracks in zip(made, elsewhere, strict=True):
            psnr, color = tracks["same"]["psnr"], tracks["cross"]["ciede2000"]
            line = f"version {version.version}: {rates[version.version]:.1%} corrected; elsewhere {psnr:.2f} dB"
            print(f"\n{line}, CIEDE2000 {color:.2f}", end="")
    assert rates[1] > rates[2] > rates[3] > rates[4]
    for before, after in pairwise(elsewhere):
        assert after["same"]["psnr"] >= before["same"]["psnr"] - PSNR_MARGIN
        assert after["cross"]["ciede2000"] <= before["cross"]["ciede2000"] + CIEDE2000_MARGIN
    assert [event["to"] for event in release.history(settings, "champion")] == [1, 2, 3, 4]


def steps(settings, options):
    """The actions and versions of one call."""
    return [(step.action, step.version) for step in improve(settings, options, lambda _: None, silent)]


def bundle_of(folder, config, **provenance):
    """Write an untrained bundle of a recipe, and return its folder."""
    torch.manual_seed(0)
    made = replace(config.bundle_config(SIZE), provenance=provenance)
    save_bundle(folder, made.build(), made)
    return folder


def stopping(step):
    """A context for a training run that is stopped at this step."""

    def report(now):
        if now.step == step:
            raise Interrupted(signal.SIGTERM, "run", step)

    return lambda: nullcontext(report)


def test_a_stopped_run_continues_with_its_own_corrections(settings, recipe, faces_dataset, tmp_path, here):
    champion = bundle_of(tmp_path / "one", load_recipe(recipe, [f"data={faces_dataset}"]), data=faces_dataset)
    release.promote(settings, release.register(settings, champion).version, force=True)
    store = Corrections(settings.corrections_uri)
    requests = [draw_request(number, SIZE) for number in range(7)]
    for number, request in enumerate(requests[:6]):
        correct(store, "1", f"request-{number}", request, request.reference)
    options = ImproveOptions(recipe=recipe, overrides=("max_steps=12",), min_new=5)
    with pytest.raises(Interrupted):
        improve(settings, options, lambda _: None, stopping(7))
    correct(store, "1", "late", requests[6], requests[6].reference)
    lines = []
    [step] = improve(settings, options, lines.append, silent)

    assert step.version == 2
    assert any(re.match(r"resuming tiny-\w+ at step 7:", line) for line in lines)
    version = Registry(settings).get(2)
    assert (version.parent, version.tags["rehearse"], version.tags["rehearse_share"]) == (1, faces_dataset, "0.5")
    data = version.tags["data"]
    assert sum(split.rows for split in Manifest.load(data).splits.values()) == 6
    assert not (settings.workspace / "improve.json").exists()
    given = [f"data={data}", f"rehearse={faces_dataset}", f"init_from={champion}", "max_steps=12"]
    calm = in_process.train(settings, load_recipe(recipe, given))
    assert version.tags["weights_sha256"] == file_sha256(Path(calm.bundle, "model.safetensors"))
