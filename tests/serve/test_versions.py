import asyncio
import shutil
import time

import numpy as np
import pytest

from animediffusion.models.bundle import identity
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError, RegistryError
from animediffusion.platform.registry import Registry
from animediffusion.serve.messages import Answer, BusyError, Job, NoModelError, Preview, UnusableError
from animediffusion.serve.replica import Replica
from animediffusion.serve.versions import Follower, ModelSource


def job(sketch: np.ndarray, reference: np.ndarray, **settings) -> Job:
    return Job(**{"lines": sketch[..., 0], "reference": reference, "seed": 1, **settings})


@pytest.fixture
def replica():
    replica = Replica(max_batch=2, max_queue=2)
    yield replica
    replica.close()


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    return Settings(workspace=tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def two_versions(settings, bundle_folder, tmp_path_factory) -> Registry:
    """A registry with the good version 1, which is the champion, and version 2 with a changed byte."""
    broken = tmp_path_factory.mktemp("broken") / "bundle"
    shutil.copytree(bundle_folder, broken)
    weights = broken / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    registry = Registry(settings)
    registry.register(bundle_folder, sha256=identity(bundle_folder))
    registry.register(broken, sha256=identity(broken))
    registry.set_alias("champion", 1)
    return registry


def test_without_a_version_a_job_is_told_so(replica, sketch, reference):
    with pytest.raises(NoModelError):
        asyncio.run(replica.colorize(job(sketch, reference)))


def test_a_new_version_answers_and_the_old_one_leaves(replica, bundle_folder, sketch, reference):
    assert replica.load("1", bundle_folder)
    assert replica.load("2", bundle_folder)
    assert asyncio.run(replica.colorize(job(sketch, reference))).model_version == "2"
    end = time.monotonic() + 10
    while replica.describe()["versions"] != ["2"] and time.monotonic() < end:
        time.sleep(0.02)
    assert replica.describe()["versions"] == ["2"]


def test_jobs_that_run_during_a_promotion_are_finished_by_the_old_version(replica, bundle_folder, sketch, reference):
    async def promote_meanwhile() -> list[Answer]:
        replica.load("1", bundle_folder)
        early = [asyncio.create_task(replica.colorize(job(sketch, reference, steps=60))) for _ in range(3)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(replica.load, "2", bundle_folder)
        late = asyncio.create_task(replica.colorize(job(sketch, reference)))
        return await asyncio.gather(*early, late)

    assert [answer.model_version for answer in asyncio.run(promote_meanwhile())] == ["1", "1", "1", "2"]


def test_a_version_that_does_not_load_changes_nothing_but_the_error(
    replica, bundle_folder, tmp_path, sketch, reference
):
    replica.load("1", bundle_folder)
    assert not replica.load("2", tmp_path / "nothing")
    assert asyncio.run(replica.colorize(job(sketch, reference))).model_version == "1"
    description = replica.describe()
    assert description["state"] == "ready"
    assert "version 2" in description["error"]


def test_a_full_replica_is_busy(replica, bundle_folder, sketch, reference):
    async def too_many() -> list[Answer | BaseException]:
        replica.load("1", bundle_folder)
        jobs = [replica.colorize(job(sketch, reference, steps=50)) for _ in range(8)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    answers = asyncio.run(too_many())
    assert sum(isinstance(answer, BusyError) for answer in answers) == 4
    assert sum(isinstance(answer, Answer) for answer in answers) == 4


def test_settings_that_only_the_model_can_judge_are_named(replica, bundle_folder, sketch, reference):
    replica.load("1", bundle_folder)
    with pytest.raises(UnusableError):
        asyncio.run(replica.colorize(job(sketch, reference, steps=5000)))


def test_a_stream_that_nobody_reads_any_more_frees_its_place(replica, bundle_folder, sketch, reference):
    async def read_one() -> Preview | Answer:
        replica.load("1", bundle_folder)
        stream = replica.stream(job(sketch, reference, steps=1000))
        first = await anext(stream)
        await stream.aclose()
        for _ in range(500):
            if not replica.describe()["running"]:
                break
            await asyncio.sleep(0.01)
        return first

    first = asyncio.run(read_one())
    assert isinstance(first, Preview)
    assert first.total == 1000
    assert replica.describe()["running"] == 0


def test_a_bundle_folder_is_named_by_its_hash(settings, bundle_folder):
    source = ModelSource(settings, str(bundle_folder))
    assert source.wanted() == f"sha256:{identity(bundle_folder)[:12]}"
    assert source.fetch(source.wanted()) == bundle_folder
    with pytest.raises(BundleError):
        ModelSource(settings, str(bundle_folder / "nothing")).wanted()


def test_a_follower_moves_with_the_champion_and_stays_when_the_next_is_broken(replica, two_versions, settings):
    follower = Follower(replica, ModelSource(settings), period_s=3)
    follower.step()
    assert replica.version == "1"
    two_versions.set_alias("champion", 2)
    follower.step()
    assert replica.version == "1"
    assert "changed after it was written" in replica.describe()["error"]
    assert follower.describe()["desired"] == {"champion": "2", "challenger": None}
    two_versions.set_alias("champion", 1)
    follower.step()
    assert replica.describe()["error"] is None


def test_a_follower_keeps_serving_when_the_registry_is_gone(replica, two_versions, settings, tmp_path):
    source = ModelSource(settings)
    follower = Follower(replica, source, period_s=3)
    follower.step()
    source.model = "models:/animediffusion@nobody"
    follower.step()
    assert replica.version == "1"


def test_an_alias_that_does_not_exist_lists_those_that_do(settings, two_versions):
    with pytest.raises(RegistryError, match="champion"):
        ModelSource(settings, "models:/animediffusion@nobody").wanted()
