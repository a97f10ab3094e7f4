"""The table of `ratelimit-mw top`: callers of the whole fleet, as wide as a terminal is."""

import re
import time
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ratelimit_mw._internal.cli.output import WIDEST
from ratelimit_mw._internal.fleet import Snapshot
from ratelimit_mw._internal.fleet.snapshot import CallerFigures, LimitFigures, Outcomes, PlanFigures
from ratelimit_mw._internal.runtime.printable import printable

ROWS = 20
"""Callers in the table, unless told otherwise."""
_BAR = 10
_NARROW = 100
"""Columns of a terminal below which there is no room for budgets beside the nearest limit."""
_WIDE = 140
"""Columns from which on there is room for everything but whole names."""
_WIDEST = 160
"""Columns from which on there is room for those, too."""
_DIGITS, _FEW_DIGITS = 12, 8
"""Digits of a shortened name, which any command takes; fewer where there is little room."""
_LETTERS = 24
"""Characters of any other shortened name."""
_HEX_NAME = re.compile(r"(?:k|i|ah|l):[0-9a-f]{32}")


def table_of(
    snapshot: Snapshot, callers: Sequence[CallerFigures], rows: int = ROWS, width: int = WIDEST
) -> Group:
    """A snapshot and these of its callers, as a person reads them at a terminal of so many columns."""
    is_wide = width >= _WIDE
    callers = callers[:rows]
    names = _names(callers, None if width >= _WIDEST else _DIGITS if is_wide else _FEW_DIGITS)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    # A name that goes on in the next line could not be copied.
    table.add_column("caller", overflow="fold", min_width=max(map(len, names), default=0))
    if is_wide:
        table.add_column("account", overflow="fold", max_width=26)
    table.add_column("plan", overflow="fold", max_width=16)
    for name in ("req/s", *(["admitted"] if is_wide else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("refused", "slots", *(["spent"] if width >= _NARROW else []), "nearest limit"):
        table.add_column(name, no_wrap=True)
    for caller, name in zip(callers, names, strict=True):
        table.add_row(*_row(caller, name, width))
    lines: list[RenderableType] = [_heading(snapshot), *_notes(snapshot), Text(), table]
    if not callers:
        asked = _all(snapshot.plans).all_requests
        lines.append(
            Text(f"no caller {'that fits the filter ' if asked else ''}sent a request in the last minute")
        )
    return Group(*lines)


def _names(callers: Sequence[CallerFigures], digits: int | None) -> list[str]:
    """Return the names of callers as they are shown: shortened if the short name is unique, else whole.

    `digits` is the number of hex digits in a shortened name; None shortens no name.
    """
    short = [_shortened(caller.caller, digits) for caller in callers]
    pairs = zip(callers, short, strict=True)
    return [printable(name if short.count(name) == 1 else caller.caller) for caller, name in pairs]


def _shortened(name: str, digits: int | None) -> str:
    if digits is None:
        return name
    return name[: name.index(":") + 1 + digits] if _HEX_NAME.fullmatch(name) else name[:_LETTERS]


def _account(caller: CallerFigures) -> str:
    """The label and the account of a caller, as far as it has them."""
    return printable(" · ".join(dict.fromkeys(each for each in (caller.label, caller.account) if each)))


def _heading(snapshot: Snapshot) -> Text:
    minute = _all(snapshot.plans)
    workers = len(snapshot.workers)
    admitted = minute.admitted + minute.shadow
    parts = [
        f"{sum(worker.requests for worker in snapshot.workers):.1f} requests/s",
        f"last minute: {admitted} admitted, refused: {_reasons(minute) or 'none'}",
        f"{workers} worker{'' if workers == 1 else 's'}",
    ]
    latency = snapshot.latency
    if latency.p50 is not None and latency.p99 is not None:
        parts.append(f"backend p50 {latency.p50:.1f} ms, p99 {latency.p99:.1f} ms")
    return Text(" · ".join(parts), style="bold")


def _notes(snapshot: Snapshot) -> list[Text]:
    headline = snapshot.headline
    if not headline.title:
        return []
    style = {"alarm": "bold red", "notice": "yellow", "calm": "green"}[headline.level]
    since = f" {_clock(headline.since)}" if headline.since is not None else ""
    caller = next((each for each in snapshot.callers if each.caller == headline.caller), None)
    account = _account(caller) if caller is not None else ""
    whom = f"{headline.caller}{f' ({account})' if account else ''} " if headline.caller else ""
    more = f". {headline.more}" if headline.more else ""
    notes = [Text(printable(f"{whom}{headline.title}{since}{more}"), style=style)]
    if snapshot.partial is not None and headline.kind != "backend":
        notes.append(Text(printable(snapshot.partial), style="bold red"))
    return notes


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _all(plans: tuple[PlanFigures, ...]) -> Outcomes:
    admitted, shadow, refused = 0, 0, dict[str, int]()
    for plan in plans:
        admitted, shadow = admitted + plan.outcomes.admitted, shadow + plan.outcomes.shadow
        for reason, number in plan.outcomes.refused.items():
            refused[reason] = refused.get(reason, 0) + number
    return Outcomes(admitted, shadow, refused)


def _row(caller: CallerFigures, name: str, width: int) -> tuple[Text, ...]:
    is_wide = width >= _WIDE
    outcomes = caller.outcomes
    slots = [f"{limit.used:g}/{limit.limit:g}" for limit in caller.limits if limit.kind == "slots"]
    spent = [
        f"{limit.used_text}/{limit.limit_text} {limit.currency}"
        for limit in caller.limits
        if limit.kind == "spending"
    ]
    admitted = [Text(str(outcomes.admitted + outcomes.shadow))] if is_wide else []
    account = _account(caller)
    if not is_wide and account:
        name = f"{name}\n{account}"
    return (
        Text(name),
        *([Text(account or "-")] if is_wide else []),
        Text(printable(caller.plan or "-")),
        Text(f"{caller.rate:.1f}"),
        *admitted,
        Text(_reasons(outcomes) or "-", style="bold red" if outcomes.all_refused else ""),
        Text("\n".join(slots) or "-"),
        *([Text("\n".join(map(printable, spent)) or "-")] if width >= _NARROW else []),
        _nearest(max(caller.limits, key=lambda limit: limit.share, default=None), is_wide=is_wide),
    )


def _nearest(limit: LimitFigures | None, *, is_wide: bool) -> Text:
    """The limit of which most is used, where there is room with a bar."""
    if limit is None:
        return Text("-")
    style = "red" if limit.share >= 1 else "yellow" if limit.share >= 0.8 else "green"
    filled = min(round(limit.share * _BAR), _BAR)
    text = Text()
    if is_wide:
        text.append("█" * filled, style).append("░" * (_BAR - filled), "dim").append(" ")
    return text.append(f"{limit.share:4.0%} ", style).append(printable(limit.name), "default")


def _reasons(outcomes: Outcomes) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in outcomes.refused.items() if number)
