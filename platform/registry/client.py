"""Model versions in MLflow: register a bundle folder, find a version, download it, point an alias at it.

A version is a folder of plain files without any pickle: the bundle, the files that make it an MLflow model
(pyfunc_flavor.py), and files that the caller adds. It has the tags `sha256` and `parent`, and one tag `evaluation.*`
for each data set that it was evaluated on. This module does not need torch: the caller checks a fetched bundle by
loading it. Not here: the history of promotions, see `animediffusion.platform.registry.audit_log`; the checks before a
promotion, see `pipelines/release/release.py`.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mlflow.artifacts
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError, RegistryError
from animediffusion.platform.registry.downloads import cache_folder, fetch_folder, whole_folder
from animediffusion.platform.registry.model_version import (
    ASIDE,
    EvaluationJson,
    Version,
    bundle_files,
    damage,
    difference,
    evaluation_tags,
    headline,
    listed,
    read_version,
)
from animediffusion.platform.registry.pyfunc_flavor import write_flavor
from animediffusion.platform.tracking import embedded, tracking

CHAMPION = "champion"
ALIASES = (CHAMPION, "challenger")
MODELS = "animediffusion-models"
"""Experiment for versions without a training run, for example an imported bundle."""

_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[^/@]+))")
_READY_SECONDS = 60
"""Seconds that MLflow may take to make a new version available."""
_MAX_VERSION_DIGITS = 9


class Registry:
    """Versions of one registered model, in the embedded MLflow or on the server of MLFLOW_TRACKING_URI."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.model_name
        self.tracking_uri = settings.tracking_uri
        self.client: MlflowClient = tracking.setup(settings)

    def register(
        self,
        folder: Path,
        *,
        sha256: str,
        run_id: str | None = None,
        parent: int | None = None,
        metrics: EvaluationJson | None = None,
        tags: dict[str, str] | None = None,
        files: dict[str, bytes] | None = None,
    ) -> int:
        """Upload a bundle folder and register it as the next version; return the version's number.

        Args:
            folder: a bundle whose hash the caller has checked.
            sha256: identity of the bundle.
            run_id: the run that made the bundle; a new run is created if None.
            parent: the version that this version was made from.
            metrics: content of the bundle's metrics.json.
            tags: further tags of the version.
            files: further files to store with the version, by name.
        """
        all_tags = {"sha256": sha256, **(tags or {}), **evaluation_tags(metrics or {}, own=True)}
        if parent is not None:
            all_tags["parent"] = str(parent)
        with self._reported(f"registering {folder}"):
            run_id = run_id or self._own_run(folder)
            model = self._upload(folder, run_id, sha256, files or {})
            self._log_headline(run_id, model.model_id, metrics or {})
            self._create_registered_model()
            # Not models:/ID: the embedded store would look this URI up in the global tracking URI, not in ours.
            version = self.client.create_model_version(
                self.name,
                source=model.artifact_location,
                run_id=run_id,
                model_id=model.model_id,
                tags=all_tags,
                await_creation_for=_READY_SECONDS,
            )
        return int(version.version)

    def versions(self) -> list[Version]:
        """Return all versions, newest first; empty if nothing is registered yet."""
        with self._reported("listing versions"):
            aliases = self._aliases()
            if aliases is None:
                return []
            found = self._search()
        return sorted((read_version(item, aliases) for item in found), key=lambda v: -v.version)

    def get(self, reference: str | int) -> Version:
        """Return the version of a number, an alias, `models:/NAME@alias` or `models:/NAME/3`.

        Raises:
            RegistryError: if the version does not exist; the message lists the existing versions and aliases.
        """
        wanted = _selector(str(reference), self.name)
        with self._reported(str(reference)):
            aliases = self._aliases() or {}
            number = wanted if wanted.isdecimal() else aliases.get(wanted)
            if number is not None and len(number) > _MAX_VERSION_DIGITS:
                number = None  # no database has such a number
            found = self._find_number(number) if number is not None else None
        if found is None:
            raise self._unknown(str(reference), wanted)
        return read_version(found, aliases)

    def find(self, sha256: str) -> Version | None:
        """Return the newest version whose bundle has this identity, or None."""
        return next((version for version in self.versions() if version.sha256 == sha256), None)

    def reference(self, model: str) -> str:
        """Expand a bare number to `models:/NAME/3` and a bare alias to `models:/NAME@champion`; keep any other text."""
        if model.isdecimal():
            return f"models:/{self.name}/{model}"
        return f"models:/{self.name}@{model}" if model in ALIASES else model

    def fetch(self, model: str | Path, cache_dir: Path | None = None, *, averages: bool = False) -> Path:
        """Return the local folder of a bundle; a version is downloaded only once.

        Args:
            model: a bundle folder, the URI of a bundle folder (s3://...), `starter`, `models:/NAME@alias` or
                `models:/NAME/3`.
            cache_dir: parent folder of downloads, WORKSPACE/cache if None.
            averages: also download a version's averages.safetensors, which coloring does not need, if it has that file.

        Raises:
            BundleError: if the folder does not exist, or the downloaded files are damaged.
            RegistryError: if the version or alias does not exist.
            StorageError: if the URI cannot be read.
        """
        if not str(model).startswith("models:"):
            return fetch_folder(model, cache_dir or cache_folder(self.settings))
        version = self.get(str(model))
        destination = self._cached(version, cache_dir)
        with self._reported(f"downloading {model}"):
            if damage(destination) is not None:
                with whole_folder(destination) as temporary:
                    self._download(version.version, temporary)
            if averages:
                self._add_aside(version.version, destination)
        return destination

    def forget(self, model: str) -> None:
        """Delete the local copy of a version, so that the next fetch() downloads it again."""
        shutil.rmtree(self._cached(self.get(model)), ignore_errors=True)

    def _cached(self, version: Version, cache_dir: Path | None = None) -> Path:
        cache = cache_dir or cache_folder(self.settings)
        return cache / version.name / f"{version.version}-{version.sha256[:12]}"

    def _download(self, version: int, folder: Path) -> None:
        """Download a version's bundle without the files in ASIDE; raises if the bundle is incomplete or damaged."""
        held, location = self.file_names(version), self.location(version)
        if "checksums.json" in held:
            self._download_file(location, "checksums.json", folder)
        names = (listed(folder) or held) - ASIDE
        missing = names - held
        if missing or not names:
            found = f"has no {', '.join(sorted(missing)) or 'files'} at {location}"
            raise RegistryError(f"version {version}", found, "restore the files there, or register the bundle again")
        for name in sorted(names - {"checksums.json"}):
            self._download_file(location, name, folder)
        self._require_intact(version, damage(folder))

    def _add_aside(self, version: int, folder: Path) -> None:
        missing = {name for name in ASIDE & (listed(folder) or set()) if not (folder / name).exists()}
        if missing:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
                for name in missing & self.file_names(version):
                    path = self._download_file(self.location(version), name, Path(temporary))
                    self._require_intact(version, difference(path, folder))
                    path.rename(folder / name)

    def _require_intact(self, version: int, damage: str | None) -> None:
        if damage is not None:
            raise BundleError(
                f"version {version}", damage, f"register it again; its files are at {self.location(version)}"
            )

    def _download_file(self, location: str, name: str, folder: Path) -> Path:
        """Download one file of a version's folder."""
        address = f"{location.rstrip('/')}/{quote(name)}"
        return Path(mlflow.artifacts.download_artifacts(address, dst_path=str(folder), tracking_uri=self.tracking_uri))

    def location(self, version: int) -> str:
        """Return the URI of the folder with a version's files."""
        # The result is not models:/NAME/3: MLflow would look that up in its global tracking URI, not in ours.
        with self._reported(f"version {version}"):
            location = str(self.client.get_model_version_download_uri(self.name, str(version)))
        is_embedded = tracking.is_embedded(self.settings)
        return embedded.relocated(location, self.settings.artifact_root) if is_embedded else location

    def read_file(self, version: int, name: str) -> bytes | None:
        """Return the content of a version's file, for files that are not part of the bundle; None if it is missing."""
        with self._reported(f"version {version}"), tempfile.TemporaryDirectory(prefix="animediffusion-") as folder:
            if name not in self.file_names(version):
                return None
            return self._download_file(self.location(version), name, Path(folder)).read_bytes()

    def file_names(self, version: int) -> set[str]:
        """Return the names of the files in a version's folder."""
        with self._reported(f"version {version}"):
            held = mlflow.artifacts.list_artifacts(self.location(version), tracking_uri=self.tracking_uri)
        return {Path(item.path).name for item in held}

    def add_evaluation(self, version: int, result: EvaluationJson) -> None:
        """Store an evaluation of a version in its tags, so that a promotion can compare versions."""
        with self._reported(f"version {version}"):
            for key, value in evaluation_tags(result, own=False).items():
                self.client.set_model_version_tag(self.name, str(version), key, value)

    def set_alias(self, alias: str, version: int) -> None:
        """Point an alias at a version, in one atomic step."""
        with self._reported(f"alias {alias}"):
            self.client.set_registered_model_alias(self.name, alias, str(version))

    def alias(self, alias: str) -> int | None:
        """Return the version that an alias points at, or None."""
        with self._reported(f"alias {alias}"):
            version = (self._aliases() or {}).get(alias)
        return int(version) if version is not None else None

    def _aliases(self) -> dict[str, str] | None:
        """Return the version of each alias; None if the registered model does not exist."""
        try:
            # Some of MLflow's stores return the versions as numbers, others as text.
            return {
                alias: str(version) for alias, version in self.client.get_registered_model(self.name).aliases.items()
            }
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _find_number(self, number: str) -> Any:
        try:
            return self.client.get_model_version(self.name, number)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _search(self) -> list[Any]:
        found: list[Any] = []
        token: str | None = None
        while True:
            page = self.client.search_model_versions(f"name='{self.name}'", max_results=500, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _own_run(self, folder: Path) -> str:
        """Create a run for the registration of a bundle that was made without a run in this store."""
        experiment = tracking.experiment_id(self.client, MODELS, tracking.artifact_root(self.settings))
        run_id = str(self.client.create_run(experiment, run_name=f"register {folder.name}").info.run_id)
        self.client.set_terminated(run_id)
        return run_id

    def _upload(self, folder: Path, run_id: str, sha256: str, files: dict[str, bytes]) -> Any:
        experiment = self.client.get_run(run_id).info.experiment_id
        model = self.client.create_logged_model(
            experiment, name=self.name, source_run_id=run_id, model_type="bundle", tags={"sha256": sha256}
        )
        try:
            for path in bundle_files(folder):
                self.client.log_model_artifact(model.model_id, str(path))
            with tempfile.TemporaryDirectory(prefix="animediffusion-") as name:
                more = Path(name)
                write_flavor(more, model_id=model.model_id, run_id=run_id)
                for file, content in files.items():
                    (more / file).write_bytes(content)
                self.client.log_model_artifacts(model.model_id, str(more))
        except Exception:
            self.client.finalize_logged_model(model.model_id, "FAILED")
            raise
        return self.client.finalize_logged_model(model.model_id, "READY")

    def _log_headline(self, run_id: str, model_id: str, metrics: EvaluationJson) -> None:
        now = int(datetime.now(UTC).timestamp() * 1000)
        numbers = [Metric(key, value, now, 0, model_id=model_id) for key, value in headline(metrics).items()]
        if numbers:
            self.client.log_batch(run_id, metrics=numbers)

    def _create_registered_model(self) -> None:
        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _unknown(self, reference: str, wanted: str) -> RegistryError:
        versions = self.versions()
        if not versions:
            return RegistryError(
                reference, f"no version of {self.name} is registered", "run `animediffusion models register DIR`"
            )
        kind = "version" if wanted.isdecimal() else "alias"
        thing = f"{kind} {reference}" if reference == wanted else reference
        numbers = ", ".join(str(v.version) for v in reversed(versions[:20]))
        aliases = ", ".join(f"{alias} (version {v.version})" for v in versions for alias in v.aliases) or "none"
        return RegistryError(thing, f"no such {kind}", f"versions: {numbers}; aliases: {aliases}")

    @contextmanager
    def _reported(self, thing: str) -> Iterator[None]:
        try:
            yield
        except MlflowException as error:
            found = f"{tracking.store_name(self.tracking_uri)} rejected the request ({tracking.first_line(error)})"
            raise RegistryError(thing, found, "see `animediffusion doctor`") from error
        except (OSError, BotoCoreError, ClientError) as error:  # disk, network or artifact store
            raise RegistryError(
                thing, f"failed ({tracking.first_line(error)})", "see `animediffusion doctor`"
            ) from error


def _selector(reference: str, name: str) -> str:
    """Extract the version number or the alias from a reference that a user wrote."""
    if not reference.startswith("models:"):
        return reference
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise RegistryError(reference, "is not a model reference", f"write models:/{name}@champion or models:/{name}/3")
    if match["name"] != name:
        raise RegistryError(
            reference, f"this registry has no model {match['name']!r}", f"the registered model is {name}"
        )
    return match["alias"] or match["version"]
