"""`improve`: corrections become the next champion, in steps that are also commands.

1. Decide the canary of an earlier call: promote its challenger, end it, or wait (models canary).
2. Make a dataset of all corrections (data ingest corrections://).
3. Fine-tune the champion on it, with rows of its former dataset in every batch (train improve rehearse=...).
4. Register the model as a version whose parent is the champion (models register).
5. Evaluate both on the corrections and on the former dataset (evaluate).
6. Refuse the version if it is no better on the corrections or worse on the other data, which the audit log records.
7. Make it the challenger and begin a canary (models promote V --alias challenger, models canary PERCENT).

One call does what can be done now, and the next call continues. Its state is what the registry and the audit log say,
and the file WORKSPACE/improve.json, which names the dataset from step 2 to step 4.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Literal

from filelock import FileLock, Timeout

from animediffusion.pipelines.data import ingest
from animediffusion.pipelines.data.manifest import MANIFEST, Manifest
from animediffusion.pipelines.release import correction_rate, release
from animediffusion.pipelines.release.canary import canary
from animediffusion.pipelines.release.checks import check_quality
from animediffusion.pipelines.release.lineage import ancestors
from animediffusion.pipelines.release.record import evaluate_and_record
from animediffusion.pipelines.release.stored_evaluation import StoredEvaluation
from animediffusion.pipelines.training import driver
from animediffusion.pipelines.training.plan import plan, read_json, write_json
from animediffusion.pipelines.training.recipe import TrainConfig, load_recipe
from animediffusion.platform.cluster import cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.corrections.store import Entry
from animediffusion.platform.errors import ConfigError, DataError, RegistryError
from animediffusion.platform.registry import audit_log, traffic
from animediffusion.platform.registry.client import CHAMPION, Registry
from animediffusion.platform.registry.model_version import Version
from animediffusion.platform.registry.traffic import CHALLENGER
from animediffusion.platform.storage import storage

UNTIL = "corrections_until"
"""Tag of the versions that improve() made: when the newest correction in its dataset was written, ISO 8601, UTC."""
VAL_FRACTION = 0.2
"""Share of the corrected drawings that are held out, by the hash of the drawing."""
GIVEN = ("recipe", "data", "init_from", "name")
"""Settings of the training run that improve() chooses."""

Action = Literal["promote", "end canary", "refuse", "canary", "wait"]
ENDS = ("promote", "end canary", "refuse")
"""Actions with which a round is over."""


@dataclass(frozen=True, kw_only=True)
class ImproveOptions:
    """Settings of improve()."""

    recipe: str = "improve"
    overrides: tuple[str, ...] = ()
    """Settings of the training run, KEY=VALUE."""
    percent: int = 10
    """Percentage of the requests that the challenger gets, 1 to 99."""
    min_new: int = 20
    """New corrections that a round needs."""
    min_answered: int = correction_rate.MIN_ANSWERED
    """Answered requests that champion and challenger each need before the canary is decided."""
    datasets: str | None = None
    """Folder or URI of the datasets of corrections; WORKSPACE/data if None."""


@dataclass(frozen=True, slots=True)
class ImproveStep:
    """Something that improve() decided, or why it waits."""

    action: Action
    version: int | None
    why: str

    @property
    def text(self) -> str:
        """The step as a line."""
        subject = "" if self.version is None else f" version {self.version}"
        return f"{self.action}{subject}: {self.why}"

    def to_json(self) -> dict[str, str | int | None]:
        """Return the step as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class _Round:
    """What a round begins with."""

    champion: int
    data: str
    """URI of the dataset of corrections."""
    rehearse: str
    """URI of the dataset whose rows are mixed into every batch."""
    until: str
    """Value of the tag UNTIL."""


Note = Callable[[str], None]
Training = Callable[[], AbstractContextManager[driver.Report]]
"""Returns a context with the callback for the state of a training run, as Console.training()."""


def improve(
    settings: Settings,
    options: ImproveOptions,
    note: Note,
    training: Training,
    *,
    rounds: int | None = None,
    pause_s: float = 60.0,
) -> list[ImproveStep]:
    """Do what can be done now and return it; with `rounds`, wait where needed, until that many rounds are over.

    Args:
        settings: names the registry and the corrections store.
        options: settings.
        note: called with a line for every step that takes long or decides something.
        training: context of the training run.
        rounds: number of rounds that end with a promotion, the end of the canary or a refusal.
        pause_s: seconds between two checks while there is nothing to do.

    Raises:
        ConfigError: there is no corrections store, or a setting is wrong.
        RegistryError: there is no champion, or a canary is running that improve() did not begin.
        DataError: the data to rehearse is unknown or cannot be read.
        Interrupted: a signal arrived during training; the same call resumes.
    """
    _check(options)
    work = _Improver(settings, options, note, training)
    settings.workspace.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(settings.workspace / "improve.lock", blocking=False):
            return work.rounds(rounds, pause_s)
    except Timeout:
        return [ImproveStep("wait", None, f"another improve is running in {settings.workspace}")]


def _check(options: ImproveOptions) -> None:
    for override in options.overrides:
        key = override.partition("=")[0]
        if key in GIVEN:
            raise ConfigError(key, "is chosen by improve", "leave it out")
    if not 1 <= options.percent <= 99:
        raise ConfigError("--percent", str(options.percent), "1 to 99, so that both versions answer")
    if options.min_new < 1:
        raise ConfigError("--min-new", str(options.min_new), "at least 1")


class _Improver:
    """The steps of improve()."""

    def __init__(self, settings: Settings, options: ImproveOptions, note: Note, training: Training) -> None:
        self.settings, self.options, self.note, self.training = settings, options, note, training
        self.registry = Registry(settings)
        self.store = correction_rate.corrections_store(settings)
        self.pin = settings.workspace / "improve.json"

    def rounds(self, rounds: int | None, pause_s: float) -> list[ImproveStep]:
        """Do what can be done now; with `rounds`, wait and continue until that many rounds are over."""
        done: list[ImproveStep] = []
        while True:
            steps = self.once()
            if rounds is None:
                return steps
            for step in steps:
                if not done or step.text != done[-1].text:  # it waits for the same as a minute ago
                    self.note(step.text)
                    done.append(step)
            if sum(step.action in ENDS for step in done) >= rounds:
                return done
            if not any(step.action in ENDS for step in steps):
                time.sleep(pause_s)

    def once(self) -> list[ImproveStep]:
        """Decide the running canary, then begin or continue a round."""
        steps = [] if not traffic.read(self.registry).is_canary else [self._decide()]
        if not steps or steps[0].action != "wait":
            steps.append(self._round())
        return steps

    # --- the canary of an earlier call ------------------------------------------------------------------------------

    def _decide(self) -> ImproveStep:
        challenger = traffic.read(self.registry).challenger
        if challenger is None or UNTIL not in self.registry.get(challenger).tags:
            found = f"version {challenger} has one that improve did not begin"
            raise RegistryError("canary", found, "decide it with `models promote V` or `models canary 0`")
        verdict = correction_rate.judge(self.settings, self.options.min_answered)
        why = f"improve: {verdict.why}"
        if verdict.decision == "promote":
            release.promote(self.settings, challenger, why=why)
        elif verdict.decision == "end canary":
            canary(self.settings, 0, why)
        return ImproveStep(verdict.decision, challenger, verdict.why)

    # --- a round ----------------------------------------------------------------------------------------------------

    def _round(self) -> ImproveStep:
        number = self.registry.alias(CHAMPION)
        if number is None:
            raise RegistryError("improve", "there is no champion", "run `models promote V`")
        champion = self.registry.get(number)
        last = self._last(champion)
        if last is not None and last.parent == number and not self._is_decided(last):
            return self._judge(last, champion)
        now = self._pinned(number) or self._begin(champion, last)
        if isinstance(now, ImproveStep):
            return now
        version = self._train(now, champion)
        self.pin.unlink(missing_ok=True)
        if self._is_decided(version):
            why = "training on the same corrections gave this version again, which is already decided"
            return ImproveStep("wait", version.version, f"{why}; wait for new corrections")
        return self._judge(version, champion)

    def _last(self, champion: Version) -> Version | None:
        """Return the newest version that improve() made from this champion, or from which this champion comes."""
        lineage = {ancestor.version for ancestor in ancestors(self.registry, champion)}
        made = (version for version in self.registry.versions() if UNTIL in version.tags)
        return next((one for one in made if one.version in lineage or one.parent == champion.version), None)

    def _is_decided(self, version: Version) -> bool:
        """Return whether a version was refused or had its canary, which ends what improve() does with it by itself."""
        events = audit_log.read(self.registry, CHALLENGER)
        return any(one.version == version.version and one.action in ("refuse", "canary") for one in events)

    def _pinned(self, champion: int) -> _Round | None:
        """Return the round that an earlier call began, if its champion is still the champion and its dataset exists."""
        found = read_json(self.pin)
        if found.get("champion") != champion or not storage.exists(storage.join(found["data"], MANIFEST)):
            return None
        return _Round(**found)

    def _begin(self, champion: Version, last: Version | None) -> _Round | ImproveStep:
        """Make the dataset of a new round, or return why there is none."""
        entries = self.store.entries()
        known = datetime.fromisoformat(last.tags[UNTIL]) if last is not None else None
        new = sum(known is None or entry.modified > known for entry in entries)
        if new < self.options.min_new:
            return ImproveStep("wait", None, f"{_number(new, 'new correction')}; a round needs {self.options.min_new}")
        rehearse = self._rehearse(champion)
        place = self.options.datasets or str(self.settings.workspace / "data")
        data = storage.join(place, f"corrections-{_hash(entries)[:8]}")
        size = int(champion.tags["image_size"])
        job = ingest.prepare(f"corrections://{self.store.uri}", data, size, val_fraction=VAL_FRACTION)
        for key, number in job.left_out.items():
            whose = key or "clients without a key"
            self.note(f"left out {_number(number, 'correction')} of {whose}: too large a share of the rows")
        if job.done is None:
            self.note(f"ingesting {_number(len(entries), 'correction')}, {new} of them new: {data}")
            cluster.connect(self.settings)
        job.run(note=self.note)
        now = _Round(champion.version, data, rehearse, max(entry.modified for entry in entries).isoformat())
        write_json(self.pin, asdict(now))
        return now

    def _train(self, now: _Round, champion: Version) -> Version:
        """Fine-tune the champion, and return the new version."""
        config = self._config(now, champion)
        work = plan(self.settings, config)
        if not work.finished:
            verb = f"resuming {work.run} at step {work.start_step}" if work.start_step else f"run {work.run}"
            self.note(f"{verb}: version {champion.version} learns from {now.data}, rehearsing {config.rehearse}")
            cluster.connect(self.settings)
        with self.training() as report:
            result = driver.train(self.settings, config, report)
        tags = {UNTIL: now.until}
        version = release.register(self.settings, result.bundle, parent=champion.version, tags=tags)
        self.note(f"version {version.version}: {result.bundle}")
        return version

    def _rehearse(self, champion: Version) -> str:
        given = (override.partition("=") for override in self.options.overrides)
        return next((value for key, _, value in given if key == "rehearse"), None) or former_data(champion)

    def _config(self, now: _Round, champion: Version) -> TrainConfig:
        chosen = {"data": now.data, "rehearse": now.rehearse, "init_from": f"models:/{champion.name}/{now.champion}"}
        given = [override for override in self.options.overrides if not override.startswith("rehearse=")]
        return load_recipe(self.options.recipe, [*(f"{key}={value}" for key, value in chosen.items()), *given])

    # --- the judgment of the new version ----------------------------------------------------------------------------

    def _judge(self, version: Version, champion: Version) -> ImproveStep:
        """Evaluate the new version and its parent; refuse it, or begin its canary."""
        corrections, former = version.tags["data"], version.tags["rehearse"]
        for data in (corrections, former):
            for one in (champion, version):
                self._evaluate(one, data)
        version, champion = (self.registry.get(one.version) for one in (version, champion))
        try:
            gain = _gain(version, champion, corrections)
            check_quality(version, champion)
        except RegistryError as error:
            previous, reason = self.registry.alias(CHALLENGER), f"improve: {error.found}"
            with audit_log.recorded(self.registry, "refuse", CHALLENGER, previous, version.version, reason=reason):
                return ImproveStep("refuse", version.version, error.found)
        why = f"improve: {gain}"
        release.promote(self.settings, version.version, CHALLENGER, why)
        canary(self.settings, self.options.percent, why)
        return ImproveStep("canary", version.version, f"{self.options.percent} % of the requests; {gain}")

    def _evaluate(self, version: Version, data: str) -> None:
        manifest = Manifest.load(data)
        rows = manifest.split("val").rows
        if _evaluated(version, manifest.content_hash, rows) is not None:
            return
        self.note(f"evaluating version {version.version} on {_number(rows, 'row')} of {data}")
        evaluate_and_record(self.settings, f"models:/{version.name}/{version.version}", data)


def former_data(champion: Version) -> str:
    """Return the dataset that the champion was trained on, without the corrections of earlier rounds.

    Raises:
        DataError: it is unknown, or no longer there.
    """
    name, what_to_do = f"former data of version {champion.version}", "name the data to rehearse: rehearse=DATA"
    data = champion.tags.get("rehearse") or champion.tags.get("data")
    if not data:
        raise DataError(name, "is unknown", what_to_do)
    try:
        Manifest.load(data)
    except DataError as error:
        raise DataError(name, f"{error.thing}: {error.found}", what_to_do) from error
    return data


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _hash(entries: Iterable[Entry]) -> str:
    """Return the sha256 of the listing of the store."""
    listing = [[entry.path, entry.num_bytes, entry.modified.isoformat()] for entry in entries]
    return hashlib.sha256(json.dumps(sorted(listing)).encode()).hexdigest()


def _evaluated(version: Version, data_hash: str, rows: int) -> StoredEvaluation | None:
    """Return the newest evaluation on all val rows of a dataset."""
    found = (StoredEvaluation.of(result) for result in reversed(version.evaluations))
    wanted = (data_hash, "val", rows)
    return next((one for one in found if (one.data_hash, one.split, one.num_images) == wanted), None)


def _gain(version: Version, champion: Version, corrections: str) -> str:
    """Return how much better the version is on the corrections held out, with the artists' own references.

    Raises:
        RegistryError: it is no better.
    """
    manifest = Manifest.load(corrections)
    rows = manifest.split("val").rows
    before, after = (
        found.metrics["cross.ciede2000"]
        for one in (champion, version)
        if (found := _evaluated(one, manifest.content_hash, rows)) is not None
    )
    change = f"CIEDE2000 {before:.2f} to {after:.2f} on {_number(rows, 'correction')} held out"
    if not after < before:
        raise RegistryError(f"version {version.version}", f"is no better: {change}", "train longer")
    return change
