"""`ratelimit-mw top`: the busiest and the most refused callers of the whole fleet, live."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Literal

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from ratelimit_mw._internal.cli.completion import complete_plan
from ratelimit_mw._internal.cli.counts import patient_limiter
from ratelimit_mw._internal.cli.keyboard import Keyboard
from ratelimit_mw._internal.cli.options import Json, SettingsFile
from ratelimit_mw._internal.cli.output import WIDEST, CommandError, console, print_json, print_whole
from ratelimit_mw._internal.cli.sources import load_usable
from ratelimit_mw._internal.cli.top_table import table_of
from ratelimit_mw._internal.fleet import FleetView, Snapshot
from ratelimit_mw._internal.fleet.snapshot import CallerFigures
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.runtime.printable import printable

Sort = Literal["requests", "refused", "nearest"]
_SORT_KEYS: Mapping[str, Sort] = {"b": "requests", "r": "refused", "n": "nearest"}
_AROUND = 7
"""Lines of the screen that are not callers."""
_MAX_FILTER = 100
_ORDERS: Mapping[Sort, Callable[[CallerFigures], float]] = {
    "requests": lambda caller: caller.outcomes.all_requests,
    "refused": lambda caller: caller.outcomes.all_refused,
    "nearest": lambda caller: caller.nearest,
}


def top(  # noqa: PLR0913, PLR0917 - an option each
    once: Annotated[bool, typer.Option("--once", help="Print one table, then exit.")] = False,
    interval: Annotated[
        float,
        typer.Option("--interval", metavar="S", min=0.5, max=3_600, help="Seconds between two updates."),
    ] = 1.0,
    sort: Annotated[
        Sort,
        typer.Option(
            "--sort",
            help="Who comes first: callers with most requests, with most refusals, or nearest to a limit.",
        ),
    ] = "requests",
    number: Annotated[
        int | None, typer.Option("-n", metavar="N", min=1, max=50, help="Number of callers to show.")
    ] = None,
    text: Annotated[
        str,
        typer.Option(
            "--filter", metavar="TEXT", help="Show callers with this in their name, label or account."
        ),
    ] = "",
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan", metavar="PLAN", autocompletion=complete_plan, help="Show callers of this plan."
        ),
    ] = None,
    settings: SettingsFile = None,
    json: Json = False,
) -> None:
    """Show the busiest and most refused callers of all workers, live.

    Figures are of the last minute. Where the output is not a terminal, one table is printed. At a terminal,
    b shows the busiest callers first, r the most refused, n those nearest to a limit; / filters, and q or
    Ctrl-C ends the command.
    """
    limiter = patient_limiter(load_usable(settings))
    order = Order(sort, number, text, plan)
    if json:
        snapshot = asyncio.run(_once(limiter))
        print_json(replace(snapshot, callers=order.shown_of(snapshot)).as_dict())
    elif once or not console.is_terminal:
        snapshot = asyncio.run(_once(limiter))
        width = console.width if console.is_terminal else WIDEST
        print_whole(table_of(snapshot, order.shown_of(snapshot), width=width))
    else:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_watch(limiter, order, interval))


class Order:
    """Filter and sort order of the callers that are shown; pressed keys change both."""

    def __init__(
        self, sort: Sort, number: int | None = None, text: str = "", plan: str | None = None
    ) -> None:
        self.sort = sort
        self.text = text
        self.is_typing = False
        """Whether keys are of the text that is looked for."""
        self._number = number
        self._plan = plan

    def shown_of(self, snapshot: Snapshot) -> tuple[CallerFigures, ...]:
        """Return the callers of a snapshot that are shown, in this order."""
        callers = [caller for caller in snapshot.callers if self._is_shown(caller)]
        callers.sort(key=_ORDERS[self.sort], reverse=True)
        return tuple(callers[: self._number])

    def press(self, key: str) -> bool:
        """Take a key; whether it ends the watching."""
        if not self.is_typing:
            self.sort = _SORT_KEYS.get(key, self.sort)
            self.is_typing = key == "/"
            if key == "\x1b":
                self.text = ""
            return key == "q"
        if key in "\r\n\x1b":
            self.is_typing = False
            self.text = "" if key == "\x1b" else self.text
        elif key in "\x7f\b":
            self.text = self.text[:-1]
        elif key.isprintable():
            self.text = (self.text + key)[:_MAX_FILTER]
        return False

    def help(self) -> Text:
        """Return the line that explains the keys and shows the filter."""
        if self.is_typing:
            return Text(
                f"filter: {printable(self.text)}_   Enter keeps the filter, Esc removes it", style="bold"
            )
        found = f"   filter: {printable(self.text)} (Esc removes it)" if self.text else ""
        keys = [
            f"[{key}] {name}" if name == self.sort else f"{key} {name}" for key, name in _SORT_KEYS.items()
        ]
        return Text(f"q quit   {'   '.join(keys)}   / filter{found}", style="dim")

    def _is_shown(self, caller: CallerFigures) -> bool:
        texts = (caller.caller, caller.label, caller.account)
        has_text = any(self.text.casefold() in text.casefold() for text in texts if text)
        return has_text and self._plan in (None, caller.plan)


async def _once(limiter: Limiter) -> Snapshot:
    try:
        await limiter.engine.live.read_keys()
        return await _seen(FleetView(limiter))
    finally:
        await _close(limiter)


async def _watch(limiter: Limiter, order: Order, interval: float) -> None:
    view, keyboard = FleetView(limiter), Keyboard()
    await limiter.engine.live.open()
    try:
        snapshot = await _seen(view)
        with (
            keyboard.opened(),
            Live(
                _screen(snapshot, order, keyboard), console=console, screen=True, auto_refresh=False
            ) as live,
        ):
            due = time.monotonic() + interval
            while True:
                key = await keyboard.pressed(max(due - time.monotonic(), 0.01))
                if key is not None and order.press(key):
                    return
                if time.monotonic() >= due:
                    snapshot, due = await view.read(), time.monotonic() + interval
                live.update(_screen(snapshot, order, keyboard), refresh=True)
    finally:
        await _close(limiter)


def _screen(snapshot: Snapshot, order: Order, keyboard: Keyboard) -> Group:
    shown = order.shown_of(snapshot)
    table = table_of(snapshot, shown, max(console.height - _AROUND, 1), console.width)
    return Group(table, order.help()) if keyboard.is_open else table


async def _seen(view: FleetView) -> Snapshot:
    """The first look, which has to succeed."""
    snapshot = await view.read()
    if not snapshot.series:
        raise CommandError(snapshot.partial or "no figures could be read")
    return snapshot


async def _close(limiter: Limiter) -> None:
    await limiter.close()
    await limiter.engine.reporter.store.close()
