"""`ratelimit-mw top`: the busiest and the most refused callers of the whole fleet, live."""

import asyncio
import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ratelimit_mw._internal.cli.counts import patient_limiter
from ratelimit_mw._internal.cli.options import Json, SettingsFile
from ratelimit_mw._internal.cli.output import WIDEST, CommandError, console, print_json, print_whole
from ratelimit_mw._internal.cli.sources import load_usable
from ratelimit_mw._internal.fleet import FleetView, Snapshot
from ratelimit_mw._internal.fleet.snapshot import CallerFigures, LimitFigures, Outcomes, PlanFigures
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.runtime.printable import printable

ROWS = 20
"""Callers in the table, unless told otherwise."""
_BAR = 10
_WIDE = 110
"""Columns of a terminal from which on there is room for everything but whole names."""
_WIDEST = 160
"""Columns from which on there is room for those, too."""
_DIGITS, _FEW_DIGITS = 12, 8
"""Digits of a shortened name, which any command takes; fewer where there is little room."""
_HEX_NAME = re.compile(r"(?:k|i|ah|l):[0-9a-f]{32}")

Sort = Literal["requests", "refused", "nearest"]
_ORDERS: Mapping[Sort, Callable[[CallerFigures], float]] = {
    "requests": lambda caller: caller.outcomes.asked,
    "refused": lambda caller: caller.outcomes.all_refused,
    "nearest": lambda caller: caller.nearest,
}


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    interval: Annotated[
        float, typer.Option("--interval", metavar="S", min=0.5, max=3_600, help="Seconds between two looks.")
    ] = 1.0,
    sort: Annotated[Sort, typer.Option("--sort", help="What the first callers have most of.")] = "requests",
    number: Annotated[
        int | None, typer.Option("-n", metavar="N", min=1, max=50, help="Callers to show.")
    ] = None,
    settings: SettingsFile = None,
    json: Json = False,
) -> None:
    """Show the busiest and most refused callers of all workers, live.

    Figures are of the last minute. Where the output is no terminal, one table is printed. Ctrl-C ends it.
    """
    limiter = patient_limiter(load_usable(settings))
    order = Order(sort, number)
    if json:
        snapshot = asyncio.run(_once(limiter))
        print_json(order.of(snapshot).as_dict())
    elif once or not console.is_terminal:
        width = console.width if console.is_terminal else WIDEST
        print_whole(table_of(order.of(asyncio.run(_once(limiter))), width=width))
    else:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_watch(limiter, order, interval))


class Order:
    """Which callers are shown, in which order."""

    def __init__(self, sort: Sort, number: int | None) -> None:
        self._key = _ORDERS[sort]
        self._number = number

    def of(self, snapshot: Snapshot) -> Snapshot:
        """The same with those callers."""
        callers = sorted(snapshot.callers, key=self._key, reverse=True)
        return replace(snapshot, callers=tuple(callers[: self._number]))


def table_of(snapshot: Snapshot, rows: int = ROWS, width: int = WIDEST) -> Group:
    """A snapshot as a person reads it at a terminal of so many columns."""
    is_wide = width >= _WIDE
    callers = snapshot.callers[:rows]
    names = _names(callers, None if width >= _WIDEST else _DIGITS if is_wide else _FEW_DIGITS)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("caller", overflow="fold", min_width=_FEW_DIGITS + 2)
    if is_wide:
        table.add_column("account", overflow="fold", max_width=26)
    table.add_column("plan", overflow="fold", max_width=16)
    for name in ("req/s", *(["admitted"] if is_wide else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("refused", "slots", "spent", "nearest limit"):
        table.add_column(name, no_wrap=True)
    for caller, name in zip(callers, names, strict=True):
        table.add_row(*_row(caller, name, is_wide=is_wide))
    lines: list[RenderableType] = [_heading(snapshot), *_notes(snapshot), Text(), table]
    if not snapshot.callers:
        lines.append(Text("nobody asked in the last minute"))
    return Group(*lines)


def _names(callers: Sequence[CallerFigures], digits: int | None) -> list[str]:
    """What callers are called: whole, or by so many digits where these stand for one of them alone."""
    short = [_shortened(caller.caller, digits) for caller in callers]
    pairs = zip(callers, short, strict=True)
    return [printable(name if short.count(name) == 1 else caller.caller) for caller, name in pairs]


def _shortened(name: str, digits: int | None) -> str:
    return name if digits is None or not _HEX_NAME.fullmatch(name) else name[: name.index(":") + 1 + digits]


def _account(caller: CallerFigures) -> str:
    """The label and the account of a caller, as far as it has them."""
    return printable(" · ".join(dict.fromkeys(each for each in (caller.label, caller.account) if each)))


async def _once(limiter: Limiter) -> Snapshot:
    try:
        await limiter.live.read_keys()
        return await _seen(FleetView(limiter))
    finally:
        await _close(limiter)


async def _watch(limiter: Limiter, order: Order, interval: float) -> None:
    view = FleetView(limiter)
    await limiter.live.open()
    try:
        first = await _seen(view)
        with Live(_screen(order.of(first)), console=console, screen=True, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(interval)
                live.update(_screen(order.of(await view.read())), refresh=True)
    finally:
        await _close(limiter)


def _screen(snapshot: Snapshot) -> Group:
    return table_of(snapshot, max(console.height - 6, 1), console.width)


async def _seen(view: FleetView) -> Snapshot:
    """The first look, which has to succeed."""
    snapshot = await view.read()
    if not snapshot.series:
        raise CommandError(snapshot.partial or "there is nothing to see")
    return snapshot


async def _close(limiter: Limiter) -> None:
    await limiter.close()
    await limiter.reporter.store.close()


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
        parts.append(f"backend {latency.p50:.1f} ms, at worst {latency.p99:.1f} ms")
    return Text(" · ".join(parts), style="bold")


def _notes(snapshot: Snapshot) -> list[Text]:
    notes = [] if snapshot.partial is None else [snapshot.partial]
    if len(snapshot.versions) > 1:
        notes.append(f"workers go by different settings: {', '.join(snapshot.versions)}")
    away = sum(not worker.backend_up for worker in snapshot.workers)
    if away:
        notes.append(f"{away} of {len(snapshot.workers)} workers find the backend away")
    return [Text(printable(note), style="bold red") for note in notes]


def _all(plans: tuple[PlanFigures, ...]) -> Outcomes:
    admitted, shadow, refused = 0, 0, dict[str, int]()
    for plan in plans:
        admitted, shadow = admitted + plan.outcomes.admitted, shadow + plan.outcomes.shadow
        for reason, number in plan.outcomes.refused.items():
            refused[reason] = refused.get(reason, 0) + number
    return Outcomes(admitted, shadow, refused)


def _row(caller: CallerFigures, name: str, *, is_wide: bool) -> tuple[Text, ...]:
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
        Text("\n".join(map(printable, spent)) or "-"),
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
