"""Decide a canary by how often people correct the pictures of the challenger, compared with those of the champion.

The challenger is promoted when both versions have answered enough requests and its share of corrected answers is lower
than the champion's by Fisher's exact test, one-sided, at LEVEL. The canary ends without a promotion when the share is
higher by the same test, or when the challenger has answered ten times as many requests and is not clearly better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from animediffusion.platform.config import Settings
from animediffusion.platform.corrections.counts import VersionCounts
from animediffusion.platform.corrections.store import Corrections
from animediffusion.platform.errors import ConfigError, RegistryError
from animediffusion.platform.registry import audit_log, traffic
from animediffusion.platform.registry.audit_log import Event
from animediffusion.platform.registry.client import Registry

MIN_ANSWERED = 100
"""Answers of each version before a decision."""
PATIENCE = 10
"""Times MIN_ANSWERED after which the canary of a challenger that is not clearly better ends."""
LEVEL = 0.01
"""Error probability of the test. It is low because the counts are looked at many times while they grow."""

Decision = Literal["promote", "end canary", "wait"]


@dataclass(frozen=True)
class CanaryVerdict:
    """What the corrections say about a running canary."""

    champion: int
    challenger: int
    percent: int
    since: str
    """Day on which the canary began, UTC; the counts are those since that day."""
    counts: tuple[VersionCounts, VersionCounts]
    """Of the champion and of the challenger."""
    decision: Decision
    why: str

    def to_json(self) -> dict[str, object]:
        """Return the JSON object of `models canary --json` without PERCENT."""
        ours, theirs = (
            {"version": version, **counts._asdict(), "rate": round(counts.rate, 6)}
            for version, counts in zip((self.champion, self.challenger), self.counts, strict=True)
        )
        facts = {"percent": self.percent, "since": self.since, "champion": ours, "challenger": theirs}
        return {**facts, "decision": self.decision, "why": self.why}


def judge(settings: Settings, min_answered: int = MIN_ANSWERED) -> CanaryVerdict:
    """Compare the two versions of the running canary.

    Args:
        settings: names the registry and the corrections store.
        min_answered: answers of each version before a decision.

    Raises:
        RegistryError: no canary is running.
        ConfigError: there is no corrections store.
        StorageError: the store fails.
    """
    registry = Registry(settings)
    now = traffic.read(registry)
    if not now.is_canary or now.champion is None or now.challenger is None:
        raise RegistryError("canary", "none is running", "run `models canary PERCENT`")
    since = began(audit_log.read(registry), now.challenger).time[:10]
    found = corrections_store(settings).counts(since)
    champion, challenger = (found.get(str(version), VersionCounts()) for version in (now.champion, now.challenger))
    decision, why = decide(champion, challenger, min_answered)
    return CanaryVerdict(now.champion, now.challenger, now.percent, since, (champion, challenger), decision, why)


def corrections_store(settings: Settings) -> Corrections:
    """Return the store of ANIMEDIFFUSION_CORRECTIONS.

    Raises:
        ConfigError: it is not set.
    """
    if settings.corrections_uri is None:
        raise ConfigError("ANIMEDIFFUSION_CORRECTIONS", "is not set", "set it to the store of your servers")
    return Corrections(settings.corrections_uri)


def began(events: list[Event], challenger: int) -> Event:
    """Return the event that began the canary of this version: the first one after its last end."""
    found = None
    for event in events:
        if event.action == "canary":
            is_on = event.version == challenger and bool(event.percent)
            found = (found or event) if is_on else None
    if found is None:
        raise RegistryError(
            "canary", "the audit log does not record when it began", "run `models canary PERCENT` again"
        )
    return found


def decide(
    champion: VersionCounts, challenger: VersionCounts, min_answered: int = MIN_ANSWERED
) -> tuple[Decision, str]:
    """Return the decision, and its reason as one sentence."""
    said = f"{_share(challenger)} of the challenger's answers corrected, {_share(champion)} of the champion's"
    least = min(champion.answered, challenger.answered)
    if least < min_answered:
        return "wait", f"{said}; {min_answered} answers of each are needed"
    lower = probability_of_at_most(challenger, champion)
    if lower < LEVEL:
        return "promote", f"{said} (p = {lower:.2g})"
    higher = probability_of_at_most(champion, challenger)
    if higher < LEVEL:
        return "end canary", f"{said} (p = {higher:.2g})"
    if challenger.answered >= PATIENCE * min_answered:
        return "end canary", f"{said}: not clearly better"
    return "wait", f"{said}: no clear difference yet (p = {lower:.2g})"


def probability_of_at_most(few: VersionCounts, others: VersionCounts) -> float:
    """Return the p-value of Fisher's exact test that `few` has a lower share of corrected answers than `others`.

    It is the probability that, of all corrected answers, at most this many are among those of `few` if chance alone
    distributes them.
    """
    few, others = (VersionCounts(one.answered, min(one.corrected, one.answered)) for one in (few, others))
    answered, corrected = few.answered + others.answered, few.corrected + others.corrected
    least = max(0, corrected - others.answered)
    total = _log_ways(answered, few.answered)
    terms = (
        _log_ways(corrected, number) + _log_ways(answered - corrected, few.answered - number) - total
        for number in range(least, few.corrected + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))


def _log_ways(number: int, chosen: int) -> float:
    """Return the logarithm of the number of ways to choose some of a number of things."""
    return math.lgamma(number + 1) - math.lgamma(chosen + 1) - math.lgamma(number - chosen + 1)


def _share(counts: VersionCounts) -> str:
    return f"{counts.rate:.1%} ({counts.corrected} of {counts.answered})"
