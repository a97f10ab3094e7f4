"""Careful reading of the reports of workers: others may have written there, too."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ratelimit_mw._internal.fleet.snapshot import REASONS, Latency, Outcomes, WorkerFigures

_LONGEST = 200
_NO_REASONS = dict.fromkeys(REASONS, 0)
NOTHING = Outcomes(0, 0, _NO_REASONS)


class SeenCaller(NamedTuple):
    """Plan, account and key hash of a caller, as the worker says that decided about it."""

    plan: str | None = None
    account: str | None = None
    api_key_hash: str | None = None


def outcomes_of(counts: Mapping[str, int]) -> Outcomes:
    """Numbers by outcome; what is none of ours is left out."""
    refused = {reason: counts.get(reason, 0) for reason in REASONS}
    return Outcomes(counts.get("admitted", 0), counts.get("shadow", 0), refused)


def sums(buckets: Iterable[Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """The numbers of several buckets together: by plan or partition, then by outcome."""
    found: dict[str, dict[str, int]] = {}
    for counts in buckets:
        for name, number in counts.items():
            outcome, _, whom = name.partition(" ")
            by_outcome = found.setdefault(whom, {})
            by_outcome[outcome] = by_outcome.get(outcome, 0) + number
    return found


def by_plan(buckets: Iterable[Mapping[str, int]]) -> dict[str, Outcomes]:
    """The outcomes of several buckets together, by plan."""
    found = {plan: outcomes_of(counts) for plan, counts in sums(buckets).items()}
    return {plan: outcomes for plan, outcomes in found.items() if plan}  # a report without one has no plan


def total(counts: Mapping[str, int]) -> Outcomes:
    """The numbers of one bucket, whomever they are about."""
    by_outcome: dict[str, int] = {}
    for name, number in counts.items():
        outcome = name.partition(" ")[0]
        by_outcome[outcome] = by_outcome.get(outcome, 0) + number
    return outcomes_of(by_outcome) if by_outcome else NOTHING


def seen_callers(texts: Iterable[str]) -> dict[str, SeenCaller]:
    """Return the callers by partition; the first entry about a partition counts."""
    found: dict[str, SeenCaller] = {}
    for text in texts:
        said = _json(text)
        if isinstance(said, list) and len(said) == 4 and isinstance(said[0], str):
            found.setdefault(_text(said[0]), SeenCaller(*[_text(each) or None for each in said[1:]]))
    return found


def worker_of(name: str, text: str, seen: float) -> WorkerFigures | None:
    """Read a worker's description of itself; None if it makes no sense."""
    said = _json(text)
    if not isinstance(said, dict):
        return None
    latency = said.get("latency_ms")
    latency = latency if isinstance(latency, dict) else {}
    return WorkerFigures(
        worker=_text(name),
        host=_text(said.get("host")),
        pid=int(_number(said.get("pid")) or 0),
        version=_text(said.get("version")),
        compiled=said.get("compiled") is not False,
        backend_up=said.get("backend_up") is True,
        latency_ms=Latency(_number(latency.get("p50")), _number(latency.get("p99"))),
        requests=_number(said.get("requests")) or 0.0,
        leases=int(_number(said.get("leases")) or 0),
        owed=int(_number(said.get("owed")) or 0),
        seen=round(max(seen, 0.0), 1),
    )


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(value: Any) -> str:
    """A text that can be written as UTF-8; empty for anything else."""
    return value[:_LONGEST].encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) and abs(value) < 1e15 else None
