"""The dashboard's headline: the one thing to know first, in a fixed order, with thresholds for an alarm."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from ratelimit_mw import Settings
from ratelimit_mw._internal.cli.output import console
from ratelimit_mw._internal.cli.top_table import table_of
from ratelimit_mw._internal.fleet.habits import Workers
from ratelimit_mw._internal.fleet.headline import Circumstances, Outage, headline_of, outage_text
from ratelimit_mw._internal.fleet.snapshot import (
    REASONS,
    CallerFigures,
    Latency,
    Outcomes,
    PlanFigures,
    Snapshot,
    WorkerFigures,
)

NOW = 1_000_000.0
SETTINGS = Settings()
ALONE = "Each worker counts alone"
GOOD, OLD = "a1b2c3", "d4e5f6"


def outcomes(admitted: int, **refused: int) -> Outcomes:
    """So many admitted and refused."""
    return Outcomes(admitted, 0, {**dict.fromkeys(REASONS, 0), **refused})


def worker(name: str, *, seen: float = 1.0, version: str = GOOD, up: bool = True) -> WorkerFigures:
    """A worker that said something so many seconds ago."""
    return WorkerFigures(
        worker=name, host="host", pid=1, version=version, compiled=True, backend_up=up,
        latency_ms=Latency(), requests=5.0, leases=0, owed=0, seen=seen,
    )  # fmt: skip


def caller(name: str, made: Outcomes, plan: str = "pro") -> CallerFigures:
    """A caller with what became of its requests."""
    return CallerFigures(name, plan, None, None, None, made, 1.0)


def fleet(callers: list[CallerFigures], workers: list[WorkerFigures] | None = None) -> Snapshot:
    """A snapshot of these callers; plans have what their callers have."""
    plans: dict[str, list[Outcomes]] = {}
    for each in callers:
        plans.setdefault(str(each.plan), []).append(each.outcomes)
    figures = tuple(
        PlanFigures(
            plan,
            Outcomes(
                sum(each.admitted for each in found),
                0,
                {reason: sum(each.refused[reason] for each in found) for reason in REASONS},
            ),
        )
        for plan, found in plans.items()
    )
    present = tuple([worker("w1"), worker("w2")] if workers is None else workers)
    return Snapshot(NOW, 5, (), figures, tuple(callers), present, True, True)


def said(snapshot: Snapshot, **known: Any) -> tuple[str, str]:
    """Level and kind of the headline."""
    headline = headline_of(snapshot, Circumstances(SETTINGS, **known))
    return headline.level, headline.kind


ABUSER = caller("k:1", outcomes(10, rate=500))
MANY = [caller(f"k:{number}", outcomes(10, rate=20)) for number in range(5)]
FINE = [caller(f"k:f{number}", outcomes(100), "free") for number in range(20)]


@pytest.mark.parametrize(
    ("callers", "expected"),
    [
        ([], ("calm", "calm")),
        (FINE, ("calm", "calm")),
        ([caller("k:1", outcomes(5, rate=2))], ("notice", "caller")),
        ([caller("k:1", outcomes(30, rate=15))], ("notice", "caller")),
        ([caller("k:1", outcomes(1000, rate=400))], ("notice", "caller")),
        ([ABUSER], ("alarm", "caller")),
        ([ABUSER, *FINE], ("alarm", "caller")),
        ([*MANY, *FINE], ("alarm", "plan")),
        ([*MANY], ("alarm", "everybody")),
        ([*FINE, caller("k:1", outcomes(100, capacity=400))], ("alarm", "capacity")),
    ],
)
def test_limits_that_do_their_job_are_no_alarm(
    callers: list[CallerFigures], expected: tuple[str, str]
) -> None:
    """A few refusals, or a small share of many, are not an incident; a plan comes before a caller."""
    assert said(fleet(callers)) == expected


def test_a_caller_that_is_always_refused_is_no_alarm() -> None:
    """Refusals at a caller's usual rate are not an alarm; refusals far beyond the habit are one."""
    assert said(fleet([ABUSER]), habits={"k:1": 450.0}) == ("notice", "caller")
    assert said(fleet([ABUSER]), habits={"k:1": 100.0}) == ("alarm", "caller")
    headline = headline_of(fleet([ABUSER]), Circumstances(SETTINGS, habits={"k:1": 100.0}))
    assert "Usually it has 100 refusals a minute." in headline.more
    assert headline.caller == "k:1"
    assert "500 of its 510 requests in the last minute were refused (request rate)" in headline.more


def test_the_fleet_comes_first_then_the_backend_then_callers() -> None:
    """Without news of the workers nothing else is of now; without the backend no figure is."""
    callers = [ABUSER, *MANY]
    silent = [worker("w1", seen=30), worker("w2", seen=40)]
    assert said(fleet(callers, silent)) == ("alarm", "silent")
    headline = headline_of(fleet(callers, silent), Circumstances(SETTINGS))
    assert (headline.title, headline.since) == ("No news from 2 workers since", NOW - 30)
    assert said(fleet(callers, [worker("w1", seen=30), worker("w2")])) == ("alarm", "some-silent")
    assert said(fleet(callers, [worker("w1", up=False), worker("w2")])) == ("alarm", "backend-partly")
    differ = [worker("w1", version=OLD), worker("w2")]
    assert said(fleet(callers, differ), disagree_since=NOW - 60) == ("alarm", "settings")
    assert said(fleet(callers, differ), disagree_since=NOW - 1) == ("alarm", "everybody")
    assert said(fleet(callers, silent), outage=Outage(NOW - 9, "refused", 0)) == ("alarm", "backend")
    assert said(fleet([], []), outage=Outage(NOW - 9, "refused", 0)) == ("alarm", "backend")


def test_a_fleet_without_workers_is_not_calm() -> None:
    """Nothing is known where nobody reports: the app is down, or its settings name another place."""
    assert said(fleet([], [])) == said(fleet([ABUSER], [])) == ("notice", "no-workers")
    settings = Settings.model_validate({"backend": {"namespace": "staging"}})
    assert "the namespace staging?" in headline_of(fleet([], []), Circumstances(settings)).more


def test_an_outage_tells_since_when_and_what_becomes_of_requests() -> None:
    """An outage's headline tells its effect on requests, how many met it, and that retries go on."""
    headline = headline_of(fleet([]), Circumstances(SETTINGS, Outage(NOW - 9, "Connection refused", 1234)))
    assert (headline.title, headline.since) == ("The backend is away since", NOW - 9)
    assert headline.more.startswith("Each worker counts alone: up to 2 times each limit.")
    assert "This worker has decided 1,234 requests in the outage." in headline.more
    assert headline.more.endswith("the last error: Connection refused")


@pytest.mark.parametrize(
    ("values", "workers", "expected"),
    [
        ({}, 1, "Each worker counts alone."),
        ({"backend": {"local_share": 0.25}}, 4, "Each worker counts alone."),
        ({"backend": {"local_share": 0.5}}, 5, "Each worker counts alone: up to 2.5 times each limit."),
        ({"backend": {"on_failure": "deny"}}, 2, "Requests are refused with 503."),
        ({"backend": {"on_failure": "allow"}}, 2, "Every request is let through, and none is counted."),
        (
            {
                "plans": {
                    "a": {"on_failure": "deny"},
                    "b": {"on_failure": "deny"},
                    "c": {"on_failure": "local"},
                }
            },
            3,
            f"{ALONE}: up to 3 times each limit. Of plan a, b: Requests are refused with 503.",
        ),
    ],
)
def test_what_becomes_of_requests_is_what_the_settings_say(
    values: Mapping[str, Any], workers: int, expected: str
) -> None:
    """Of every plan that says otherwise, too."""
    assert outage_text(Settings.model_validate(values), workers) == expected


def test_a_worker_that_goes_without_a_word_is_missed() -> None:
    """One that takes leave is not, nor one in whose place another has come; it is forgotten in the end."""
    workers = Workers()

    def names(*present: WorkerFigures, now: float) -> dict[str, float]:
        return {each.worker: each.seen for each in workers.seen(present, now)}

    assert set(names(worker("w1"), worker("w2"), now=0)) == {"w1", "w2"}
    assert set(names(worker("w1"), now=1)) == {"w1"}
    names(worker("w1", seen=12), worker("w3"), now=20)
    assert names(worker("w3"), now=25) == {"w3": 1.0, "w1": 17.0}
    assert set(names(worker("w3"), now=100)) == {"w1", "w3"}
    assert set(names(worker("w3"), worker("w4"), now=101)) == {"w3", "w4"}
    names(worker("w3", seen=11), worker("w4"), now=110)
    assert set(names(worker("w4"), now=115)) == {"w3", "w4"}
    assert set(names(worker("w4"), now=800)) == {"w4"}


def test_workers_disagree_from_the_first_moment_on() -> None:
    """A change that is under way ends it; a silent worker's settings don't count."""
    workers = Workers()
    for now, versions, since in (
        (1, (OLD, OLD), None),
        (5, (OLD, GOOD), 5),
        (9, (OLD, GOOD), 5),
        (11, (GOOD,), None),
    ):
        workers.seen([worker(f"w{index}", version=each) for index, each in enumerate(versions)], now)
        assert workers.disagree_since == since
    workers.seen([worker("w1", seen=20, version=OLD), worker("w2")], 12)
    assert workers.disagree_since is None


def test_top_names_the_headline_s_caller_by_label_though_it_is_not_shown() -> None:
    """A filter leaves out rows of the table and nothing of the headline."""
    labelled = ABUSER._replace(label="Acme, batch", account="acme")
    snapshot = fleet([labelled, *FINE])
    snapshot = replace(snapshot, headline=headline_of(snapshot, Circumstances(SETTINGS)))
    with console.capture() as captured:
        console.print(table_of(snapshot, FINE[:1]), soft_wrap=True)
    assert "k:1 (Acme, batch · acme) is refused most" in captured.get()
