import json
import re

import pytest
import torch

from animediffusion.cli import app as cli
from animediffusion.models.bundle import BundleConfig, save_bundle
from animediffusion.models.network.unet import UNetConfig
from animediffusion.pipelines.release import release
from animediffusion.pipelines.release.canary import canary
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError, RegistryError
from animediffusion.platform.registry import traffic
from animediffusion.platform.registry.client import Registry

NETWORK = UNetConfig(base_channels=32, channel_multipliers=(1,), num_res_blocks=1, patch_size=4, head_channels=32)


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """Versions 1, 2 and 3, three untrained bundles; one registry for all tests, as making one takes seconds."""
    folder = tmp_path_factory.mktemp("canary")
    settings = Settings(workspace=folder / "workspace")
    for seed in range(3):
        torch.manual_seed(seed)
        config = BundleConfig(network=NETWORK, image_size=16)
        sha256 = save_bundle(folder / f"bundle-{seed}", config.build(), config)
        Registry(settings).register(folder / f"bundle-{seed}", sha256=sha256)
    return settings


@pytest.fixture
def settings(registered, monkeypatch):
    """The three versions, none of them promoted."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry = Registry(registered)
    for alias in ("champion", "challenger"):
        registry.client.delete_registered_model_alias(registry.name, alias)
    traffic.set_percent(registry, 0)
    return registered


@pytest.fixture
def pair(settings):
    """Version 1 as champion and version 2 as challenger."""
    for alias, version in (("champion", 1), ("challenger", 2)):
        Registry(settings).set_alias(alias, version)
    return settings


def shares(settings):
    return traffic.read(Registry(settings)).shares


def test_a_canary_splits_the_traffic_and_is_written_down(pair):
    assert shares(pair) == {1: 1.0}
    assert canary(pair, 20, "looks good").to_json() == {
        "percent": 20, "from": 0, "champion": 1, "challenger": 2, "changed": True
    }  # fmt: skip
    assert shares(pair) == {2: 0.2, 1: 0.8}
    last = release.history(pair)[-1]
    assert {key: last[key] for key in ("action", "alias", "to", "percent", "reason")} == {
        "action": "canary", "alias": "challenger", "to": 2, "percent": 20, "reason": "looks good"
    }  # fmt: skip
    assert last["user"]
    assert [release.show(pair, version)["share"] for version in (1, 2, 3)] == [0.8, 0.2, 0.0]
    assert {row["version"]: row["share"] for row in release.versions(pair)} == {1: 0.8, 2: 0.2, 3: 0.0}


def test_zero_ends_it_and_the_same_again_changes_nothing(pair):
    canary(pair, 20)
    assert not canary(pair, 20).changed
    assert canary(pair, 0).changed
    assert not canary(pair, 0).changed
    assert shares(pair) == {1: 1.0}
    assert [(event["action"], event["percent"]) for event in release.history(pair)[-2:]] == [
        ("canary", 20),
        ("canary", 0),
    ]


def test_all_of_the_traffic_may_go_to_the_challenger(pair):
    canary(pair, 100)
    assert shares(pair) == {2: 1.0, 1: 0.0}


@pytest.mark.parametrize(
    ("move", "champion", "challenger"),
    [
        (lambda s: release.promote(s, 2, force=True), 2, 2),
        (lambda s: release.promote(s, 3, force=True), 3, 2),
        (lambda s: release.promote(s, 3, alias="challenger", force=True), 1, 3),
    ],
    ids=["the challenger wins", "a third one wins", "another challenger"],
)
def test_a_promotion_ends_the_canary(pair, move, champion, challenger):
    canary(pair, 20)
    assert move(pair).canary_ended == 20
    now = traffic.read(Registry(pair))
    assert (now.champion, now.challenger, now.percent, now.shares) == (champion, challenger, 0, {champion: 1.0})
    ended = release.history(pair)[-2]
    assert (ended["action"], ended["percent"]) == ("canary", 0)
    assert "became" in ended["reason"]


def test_a_rollback_ends_the_canary_and_does_not_count_it_as_a_champion(pair):
    release.promote(pair, 1, alias="challenger", force=True)
    release.promote(pair, 2, force=True)
    release.promote(pair, 3, force=True)
    canary(pair, 50)
    assert release.rollback(pair).to_json() == {
        "version": 2, "alias": "champion", "from": 3, "changed": True, "canary_ended": 50
    }  # fmt: skip
    assert shares(pair) == {2: 1.0}


def test_a_promotion_of_the_present_version_does_not_end_the_canary(pair):
    canary(pair, 20)
    assert not release.promote(pair, 1, force=True).changed
    assert shares(pair) == {2: 0.2, 1: 0.8}


@pytest.mark.parametrize("percent", [-1, 101])
def test_a_percentage_is_0_to_100(pair, percent):
    with pytest.raises(ConfigError, match=f"PERCENT: {percent}; 0 to 100"):
        canary(pair, percent)


def test_a_canary_needs_two_versions(settings):
    with pytest.raises(RegistryError, match="there is no champion; run `models promote V`"):
        canary(settings, 20)
    release.promote(settings, 1, force=True)
    with pytest.raises(RegistryError, match="there is no challenger; run `models promote V --alias challenger`"):
        canary(settings, 20)
    release.promote(settings, 1, alias="challenger", force=True)
    with pytest.raises(RegistryError, match="version 1 is champion and challenger"):
        canary(settings, 20)
    assert not canary(settings, 0).changed


def test_nothing_registered_is_said(settings):
    with pytest.raises(RegistryError, match="no version of empty is registered"):
        canary(settings.model_copy(update={"model_name": "empty"}), 20)


@pytest.mark.parametrize("text", ["lots", "-5", "1000", "", "20.5"])
def test_a_tag_that_is_not_a_percentage_counts_as_0(pair, text):
    registry = Registry(pair)
    registry.client.set_registered_model_tag(registry.name, traffic.PERCENT_TAG, text)
    assert shares(pair) == {1: 1.0}


def test_a_challenger_that_was_removed_by_hand_leaves_the_champion(pair):
    canary(pair, 20)
    registry = Registry(pair)
    registry.client.delete_registered_model_alias(registry.name, "challenger")
    assert shares(pair) == {1: 1.0}
    assert canary(pair, 0).changed
    assert traffic.read(registry).percent == 0


def test_the_command_says_what_goes_where(pair, monkeypatch, capsys):
    monkeypatch.setenv("ANIMEDIFFUSION_MODEL_NAME", pair.model_name)
    monkeypatch.setenv("ANIMEDIFFUSION_WORKSPACE", str(pair.workspace))

    def run(*words):
        code = cli.run(["models", *words])
        captured = capsys.readouterr()
        return code, captured.out.strip(), captured.err.strip()

    assert run("canary", "20", "--why", "try it") == (
        0, "20 % of the requests go to version 2, 80 % to version 1 (was 0 %)", ""
    )  # fmt: skip
    code, out, _ = run("canary", "20", "--json")
    assert (code, json.loads(out)["changed"]) == (0, False)
    assert re.search(r"canary +2 +2 +challenger +20 .*try it", run("history")[1])
    assert run("canary", "-5") == (2, "", "error: PERCENT: -5; 0 to 100; 0 ends the canary")
    code, out, error = run("canary", "many")
    assert (code, out, error.count("\n")) == (2, "", 0)
    assert "unable to parse" in error
    assert run("promote", "2", "--force")[1] == "version 2 is now champion; the canary of 20 % has ended"
    assert run("canary", "0") == (0, "no canary was running", "")
