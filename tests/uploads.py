"""Copies of local folders in a store, for tests that read from S3."""

from pathlib import Path

from animediffusion.platform.storage.storage import join, list_files, write_bytes


def upload_folder(local: Path, uri: str) -> None:
    """Copy all files of a local folder to `uri`."""
    for name in list_files(str(local)):
        write_bytes(join(uri, name), (local / name).read_bytes())
