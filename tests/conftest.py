"""Real parts that many tests share: an S3 server, a Ray cluster with two CPUs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import boto3
import pytest
import ray
from moto.server import ThreadedMotoServer

from animediffusion.pipelines.dataset import Manifest, Split, write_shard
from animediffusion.pipelines.shards import PICTURES
from animediffusion.pipelines.synthesize import make_row
from animediffusion.platform.images import encode_lossless


@pytest.fixture(scope="session", autouse=True)
def _quiet_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of the user's home is read or written, and two cores are not oversubscribed."""
    values = {
        "HOME": str(tmp_path_factory.mktemp("home")),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """URL of an S3 server on loopback that the AWS variables point at, with the bucket `bucket`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield url
    server.stop()


@pytest.fixture(scope="session")
def ray_cluster(moto_server: str) -> Iterator[None]:
    """One Ray for all tests, with two CPUs; started after the S3 server, so that its workers know the address."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=256 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def faces_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 48 + 8 drawn faces at 32 px, with all four pictures."""
    folder = str(tmp_path_factory.mktemp("faces"))
    splits = {}
    for split, indices in (("train", range(48)), ("val", range(100, 108))):
        rows = []
        for index in indices:
            row = make_row(0, index, 32)
            pictures = {name: encode_lossless(getattr(row, name)) for name in PICTURES}
            sha256 = hashlib.sha256(pictures["target"]).hexdigest()
            rows.append(
                {"id": f"{split}/{index}", "split": split, "width": 32, "height": 32, "sha256": sha256, **pictures}
            )
        splits[split] = Split(rows=len(rows), shards=(write_shard(folder, split, 0, rows),))
    Manifest(image_size=32, splits=splits, num_files=224, num_rejects=0, source="drawn", content_hash="0" * 64).save(
        folder
    )
    return folder
