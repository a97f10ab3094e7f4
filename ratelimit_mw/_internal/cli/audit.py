"""`ratelimit-mw audit`: the latest changes by operators."""

import asyncio
from typing import Annotated

import typer

from ratelimit_mw._internal.backends import open_audit_store
from ratelimit_mw._internal.cli.counts import check_shared
from ratelimit_mw._internal.cli.options import Json, SettingsFile
from ratelimit_mw._internal.cli.output import console, print_json, print_table
from ratelimit_mw._internal.cli.recording import PATIENCE
from ratelimit_mw._internal.cli.sources import load_usable
from ratelimit_mw._internal.live.audit import AuditLog, Change
from ratelimit_mw._internal.live.timed_entries import time_text
from ratelimit_mw._internal.settings import Settings


def audit(
    number: Annotated[
        int,
        typer.Option("-n", metavar="N", min=1, max=500, help="Number of changes to show, the latest first."),
    ] = 20,
    settings: SettingsFile = None,
    json: Json = False,
) -> None:
    """Show who changed what: plans given and counters cleared, by commands or on the dashboard."""
    loaded = load_usable(settings)
    check_shared(loaded)
    changes = asyncio.run(_latest(loaded, number))
    if json:
        print_json({"changes": [change.as_dict() for change in changes]})
    elif not changes:
        console.print("no changes")
    else:
        print_table(("when", "callers", "change", "by"), map(_row, changes), whole=True)


async def _latest(settings: Settings, number: int) -> list[Change]:
    log = AuditLog(open_audit_store(settings.backend, timeout=PATIENCE))
    try:
        return await log.latest(number)
    finally:
        await log.close()


def _row(change: Change) -> tuple[str, ...]:
    return time_text(change.at), ", ".join(change.callers), change.detail, change.who
