import asyncio
import time

import numpy as np
import pytest
from breakage import broken_copy, changed_byte, not_finite, wrong_shape

from animediffusion.models.bundle import SamplerDefaults, identity, with_sampler
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError, NoModelError, RegistryError
from animediffusion.platform.registry import audit_log, traffic
from animediffusion.platform.registry.client import Registry
from animediffusion.serve.protocol import ColorizeJob
from animediffusion.serve.replica.follower import FIRST_PAUSE_S, Follower
from animediffusion.serve.replica.model_source import ModelSource
from animediffusion.serve.replica.replica import Replica

GOOD, OTHER, CHANGED, SHAPE, NAN = 1, 2, 3, 4, 5


@pytest.fixture(scope="module")
def registered(tmp_path_factory, bundle_folder) -> Registry:
    """Versions that work, GOOD and OTHER, and versions that do not."""
    folder = tmp_path_factory.mktemp("versions")
    with_sampler(bundle_folder, folder / "other", SamplerDefaults(name="euler", steps=2))
    broken = [
        broken_copy(bundle_folder, folder / breakage.__name__, breakage)
        for breakage in (changed_byte, wrong_shape, not_finite)
    ]
    registry = Registry(Settings(workspace=folder / "workspace"))
    for bundle in (bundle_folder, folder / "other", *broken):
        registry.register(bundle, sha256=identity(bundle))
    return registry


@pytest.fixture
def registry(registered) -> Registry:
    """The same, with GOOD as champion and nothing else."""
    registered.client.delete_registered_model_alias(registered.name, "challenger")
    registered.set_alias("champion", GOOD)
    traffic.set_percent(registered, 0)
    return registered


@pytest.fixture
def replicas():
    """A function that makes a replica and its follower; all are closed at the end."""
    made = []

    def make(registry: Registry, model: str | None = None, **options) -> Follower:
        replica = Replica(max_batch=2, max_queue=2, name=f"replica-{len(made)}")
        made.append(replica)
        return Follower(replica, ModelSource(registry.settings, model), period_s=3, **options)

    yield make
    for replica in made:
        replica.close()


@pytest.fixture
def follower(replicas, registry) -> Follower:
    """One that has loaded the champion."""
    follower = replicas(registry)
    assert follower.step()
    return follower


def answers(follower: Follower, sketch: np.ndarray, reference: np.ndarray, seed: int = 1) -> str:
    job = ColorizeJob(lines=sketch[..., 0], references=(reference,), options=SamplerOptions(seed=seed, steps=1))
    return asyncio.run(follower.replica.colorize(job)).model_version


def test_a_bundle_folder_is_named_by_its_hash(registry, bundle_folder):
    source = ModelSource(registry.settings, str(bundle_folder))
    version = f"sha256:{identity(bundle_folder)[:12]}"
    assert source.resolve() == version
    assert source.plan().shares == {version: 1.0}
    assert source.fetch(version) == bundle_folder
    with pytest.raises(BundleError):
        ModelSource(registry.settings, str(bundle_folder / "nothing")).resolve()


def test_a_bundle_folder_is_served_without_a_registry(replicas, registry, bundle_folder):
    follower = replicas(registry, str(bundle_folder))
    assert follower.step()
    assert follower.replica.version == f"sha256:{identity(bundle_folder)[:12]}"


def test_one_version_may_be_pinned(replicas, registry):
    follower = replicas(registry, f"models:/animediffusion/{OTHER}")
    follower.step()
    assert follower.replica.shares == {"2": 1.0}
    assert follower.desired == {"champion": "1", "challenger": None}


def test_an_alias_that_does_not_exist_lists_those_that_do(registry):
    with pytest.raises(RegistryError, match="champion"):
        ModelSource(registry.settings, "models:/animediffusion@nobody").resolve()


def test_a_promotion_moves_the_traffic(follower, registry, sketch, reference):
    registry.set_alias("champion", OTHER)
    follower.step()
    assert answers(follower, sketch, reference) == "2"
    assert follower.replica.versions == ["2"]
    assert follower.describe().desired == {"champion": "2", "challenger": None}


def test_a_canary_gives_the_challenger_its_share_and_ends(follower, registry, sketch, reference):
    registry.set_alias("challenger", OTHER)
    follower.step()
    assert follower.replica.shares == {"1": 1.0}
    traffic.set_percent(registry, 40)
    follower.step()
    assert follower.replica.shares == {"2": 0.4, "1": 0.6}
    assert {answers(follower, sketch, reference, seed) for seed in range(12)} == {"1", "2"}
    traffic.set_percent(registry, 0)
    follower.step()
    assert follower.replica.versions == ["1"]


@pytest.mark.parametrize(
    ("version", "why"), [(CHANGED, "changed after it was written"), (SHAPE, "does not fit"), (NAN, "not a finite")]
)
def test_a_champion_that_does_not_work_leaves_the_one_before(follower, registry, sketch, reference, version, why):
    registry.set_alias("champion", version)
    follower.step()
    assert answers(follower, sketch, reference) == "1"
    described = follower.describe()
    assert described.desired["champion"] == str(version)
    assert described.replica.state == "ready"
    assert described.replica.versions == ["1"]
    assert described.replica.error.startswith(f"version {version}: ")
    assert why in described.replica.error
    assert follower.missing == [str(version)]
    registry.set_alias("champion", GOOD)
    follower.step()
    assert follower.describe().replica.error is None
    assert follower.missing == []


def test_a_challenger_that_does_not_work_leaves_the_champion(follower, registry):
    registry.set_alias("challenger", NAN)
    traffic.set_percent(registry, 50)
    follower.step()
    assert follower.replica.shares == {"1": 1.0}
    assert "version 5" in follower.replica.error


def test_a_challenger_keeps_its_share_when_the_new_champion_does_not_work(follower, registry):
    registry.set_alias("challenger", OTHER)
    traffic.set_percent(registry, 20)
    registry.set_alias("champion", CHANGED)
    follower.step()
    assert follower.replica.shares == {"2": 0.2, "1": 0.8}


def test_a_version_registered_as_another_one_is_not_loaded(follower, registry, monkeypatch):
    registry.set_alias("champion", OTHER)
    monkeypatch.setattr(follower.source, "sha256", lambda _: "f" * 64)
    follower.step()
    assert follower.replica.version == "1"
    assert "not the registered ffffffffffff" in follower.replica.error


@pytest.mark.parametrize("broken", [CHANGED, NAN])  # The copy of NAN is as it was registered, so it is downloaded.
def test_a_version_that_failed_is_tried_again_later_with_a_fresh_copy(replicas, registry, broken):
    now = 0.0
    follower = replicas(registry, clock=lambda: now)
    assert follower.step()

    def tried() -> int:
        return follower.replica.counters.totals()["swaps"][str(broken), "failed"]

    registry.set_alias("champion", broken)
    follower.step()
    assert tried() == 1
    assert not list(registry.settings.workspace.glob(f"cache/animediffusion/{broken}-*"))
    # The second pause is twice as long as the first one.
    for now, expected in (
        (FIRST_PAUSE_S - 1, 1),
        (FIRST_PAUSE_S, 2),
        (3 * FIRST_PAUSE_S - 1, 2),
        (3 * FIRST_PAUSE_S, 3),
    ):
        follower.step()
        assert tried() == expected, now


def test_an_unreachable_registry_changes_nothing(follower, registry, sketch, reference, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    follower.source = ModelSource(registry.settings)
    assert follower.step()
    assert answers(follower, sketch, reference) == "1"
    assert follower.replica.error is None


def test_a_replica_started_while_the_registry_is_unreachable_loads_when_it_returns(replicas, registry, monkeypatch):
    follower = replicas(registry)
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with pytest.raises(RegistryError, match=r"no version can be loaded .*does not answer"):
            follower.start()
    assert follower.step()
    assert follower.replica.describe().error is None


def test_replicas_born_in_the_middle_of_a_promotion_agree_in_the_end(follower, replicas, registry):
    registry.set_alias("champion", OTHER)
    younger = replicas(registry)
    younger.step()
    assert (follower.replica.version, younger.replica.version) == ("1", "2")
    follower.step()
    assert follower.replica.shares == younger.replica.shares == {"2": 1.0}


def test_a_replica_born_under_a_broken_champion_serves_the_one_before(replicas, registry, sketch, reference):
    for version in (OTHER, GOOD, NAN):
        with audit_log.recorded(registry, "promote", "champion", registry.alias("champion"), version):
            registry.set_alias("champion", version)
    follower = replicas(registry)
    assert follower.step()
    assert answers(follower, sketch, reference) == "1"
    assert follower.replica.describe().state == "ready"
    assert "version 5" in follower.replica.error
    registry.set_alias("champion", OTHER)
    follower.step()
    assert follower.replica.shares == {"2": 1.0}


def test_without_any_version_that_works_a_replica_says_why(replicas, registry, sketch, reference):
    follower = replicas(registry, f"models:/animediffusion/{NAN}")
    follower.start(patience_s=60)
    follower.stop()
    assert follower.replica.describe().state == "failed"
    with pytest.raises(NoModelError, match="not a finite"):
        answers(follower, sketch, reference)


def test_the_background_follows_by_itself(replicas, registry):
    follower = replicas(registry)
    follower.period_s = 0.05
    follower.start()
    registry.set_alias("champion", OTHER)
    for _ in range(200):
        if follower.replica.version == "2":
            break
        time.sleep(0.05)
    follower.stop()
    assert follower.replica.version == "2"
