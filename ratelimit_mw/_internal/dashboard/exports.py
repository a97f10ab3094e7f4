"""Figures as files, CSV or JSON: the hour and the day, callers, rules of routes, changes."""

import csv
import io
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from starlette.responses import Response

from ratelimit_mw._internal.dashboard.answers import json_response
from ratelimit_mw._internal.fleet import FleetView
from ratelimit_mw._internal.fleet.snapshot import REASONS, Outcomes
from ratelimit_mw._internal.limiter.limiter import Limiter

Row = Sequence[Any]
"""A line of a file: a plain value for each column."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Beginnings of a text that a spreadsheet would run as a formula."""


_NUMBERS = ("admitted", "shadow", "refused", *(f"refused_{reason}" for reason in REASONS))
"""Columns that tell what became of requests."""


class Export(NamedTuple):
    """A file: the names of its columns, and the function that reads its rows."""

    columns: tuple[str, ...]
    rows: Callable[[FleetView, Limiter], Awaitable[list[Row]]]
    """Return the rows. May raise `BackendError`."""


async def _hour(view: FleetView, _limiter: Limiter) -> list[Row]:
    nothing = (None,) * len(_NUMBERS)
    return [
        (_time(point.at), *(_numbers(point.outcomes) if point.known else nothing))
        for point in (await view.read()).series
    ]


async def _day(view: FleetView, _limiter: Limiter) -> list[Row]:
    day = await view.day()
    return [
        (_time(step.at), plan, *_numbers(outcomes))
        for step in day.steps
        for plan, outcomes in step.plans.items()
    ]


async def _callers(view: FleetView, _limiter: Limiter) -> list[Row]:
    return [
        (each.caller, each.label, each.account, each.plan, each.rate, *_numbers(each.outcomes))
        for each in await view.every_caller()
    ]


async def _routes(view: FleetView, _limiter: Limiter) -> list[Row]:
    return [(each.route, *_numbers(each.outcomes)) for each in (await view.read()).routes]


async def _app_routes(view: FleetView, _limiter: Limiter) -> list[Row]:
    return [(each.route, each.rule, *_numbers(each.outcomes)) for each in (await view.read()).app_routes]


async def _audit(_view: FleetView, limiter: Limiter) -> list[Row]:
    changes = await limiter.engine.live.audit.latest()
    return [
        (_time(change.at), change.who, change.action, " ".join(change.callers), change.detail)
        for change in changes
    ]


EXPORTED: Mapping[str, Export] = {
    "hour": Export(("at", *_NUMBERS), _hour),
    "day": Export(("at", "plan", *_NUMBERS), _day),
    "callers": Export(("caller", "label", "account", "plan", "requests_a_second", *_NUMBERS), _callers),
    "routes": Export(("route", *_NUMBERS), _routes),
    "app-routes": Export(("route", "rule", *_NUMBERS), _app_routes),
    "audit": Export(("at", "by", "action", "callers", "change"), _audit),
}
"""Files by their names without the ending."""
EXPORTS = tuple(f"{name}.{kind}" for name in EXPORTED for kind in ("csv", "json"))


def export_response(name: str, kind: str, rows: Sequence[Row]) -> Response:
    """The file as an answer that a browser saves."""
    columns = EXPORTED[name].columns
    headers = {"Content-Disposition": f'attachment; filename="ratelimit-{name}.{kind}"'}
    if kind == "json":
        return json_response([dict(zip(columns, row, strict=True)) for row in rows], headers=headers)
    return Response(_csv(columns, rows), headers=headers, media_type="text/csv")


def _csv(columns: Row, rows: Sequence[Row]) -> bytes:
    """Rows as RFC 4180 has them; the first line names the columns."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return file.getvalue().encode("utf-8", "replace")


def _cell(value: object) -> object:
    """A value that no spreadsheet takes for a formula: some names come from outside."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _numbers(outcomes: Outcomes) -> Row:
    """Values of `_NUMBERS`."""
    refused = (outcomes.refused[reason] for reason in REASONS)
    return (outcomes.admitted, outcomes.shadow, outcomes.all_refused, *refused)


def _time(at: float) -> str:
    """A time in ISO 8601, in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
