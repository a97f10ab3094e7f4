"""Figures as files, CSV or JSON: the hour and the day, callers, rules of routes, changes."""

import csv
import io
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from ratelimit_mw._internal.dashboard.answers import json_response
from ratelimit_mw._internal.fleet import FleetView
from ratelimit_mw._internal.fleet.snapshot import Outcomes
from ratelimit_mw._internal.limiter.limiter import Limiter

Row = Mapping[str, Any]
"""A line of a file: plain values by column."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Beginnings of a text that a spreadsheet would run as a formula."""


async def _hour(view: FleetView, _limiter: Limiter) -> list[Row]:
    snapshot = await view.read()
    rows = [(point, _numbers(point.outcomes)) for point in snapshot.series]
    return [
        {"at": _time(point.at), **(numbers if point.known else dict.fromkeys(numbers))}
        for point, numbers in rows
    ]


async def _day(view: FleetView, _limiter: Limiter) -> list[Row]:
    day = await view.day()
    return [
        {"at": _time(step.at), "plan": plan, **_numbers(outcomes)}
        for step in day.steps
        for plan, outcomes in step.plans.items()
    ]


async def _callers(view: FleetView, _limiter: Limiter) -> list[Row]:
    return [
        {
            "caller": each.caller,
            "label": each.label,
            "account": each.account,
            "plan": each.plan,
            "requests_a_second": each.rate,
            **_numbers(each.outcomes),
        }
        for each in await view.every_caller()
    ]


async def _routes(view: FleetView, _limiter: Limiter) -> list[Row]:
    return [{"route": each.route, **_numbers(each.outcomes)} for each in (await view.read()).routes]


async def _app_routes(view: FleetView, _limiter: Limiter) -> list[Row]:
    return [
        {"route": each.route, "rule": each.rule, **_numbers(each.outcomes)}
        for each in (await view.read()).app_routes
    ]


async def _audit(_view: FleetView, limiter: Limiter) -> list[Row]:
    changes = await limiter.engine.live.audit.latest()
    return [
        {
            "at": _time(change.at),
            "by": change.who,
            "action": change.action,
            "callers": " ".join(change.callers),
            "change": change.detail,
        }
        for change in changes
    ]


EXPORTED: Mapping[str, Callable[[FleetView, Limiter], Awaitable[list[Row]]]] = {
    "hour": _hour,
    "day": _day,
    "callers": _callers,
    "routes": _routes,
    "app-routes": _app_routes,
    "audit": _audit,
}
"""Rows of each file, by its name without the ending. Each may raise `BackendError`."""
EXPORTS = tuple(f"{name}.{kind}" for name in EXPORTED for kind in ("csv", "json"))


def export_response(name: str, kind: str, rows: Sequence[Row]) -> Response:
    """The file as an answer that a browser saves."""
    headers = {"Content-Disposition": f'attachment; filename="ratelimit-{name}.{kind}"'}
    if kind == "json":
        return json_response(rows, headers=headers)
    return Response(_csv(rows), headers=headers, media_type="text/csv")


def _csv(rows: Sequence[Row]) -> bytes:
    """Rows as RFC 4180 has them; the first line names the columns."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(rows[0] if rows else ())
    writer.writerows([_cell(value) for value in row.values()] for row in rows)
    return file.getvalue().encode("utf-8", "replace")


def _cell(value: object) -> object:
    """A value that no spreadsheet takes for a formula: some names come from outside."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _numbers(outcomes: Outcomes) -> dict[str, int]:
    refused = {f"refused_{reason}": number for reason, number in outcomes.refused.items()}
    return {
        "admitted": outcomes.admitted,
        "shadow": outcomes.shadow,
        "refused": outcomes.all_refused,
        **refused,
    }


def _time(at: float) -> str:
    """A time in ISO 8601, in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
