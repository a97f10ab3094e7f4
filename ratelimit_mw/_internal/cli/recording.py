"""Recording of the changes that commands make, for `ratelimit-mw audit` and the dashboard."""

import getpass
import socket
from collections.abc import Iterable

from ratelimit_mw._internal.backends import open_audit_store
from ratelimit_mw._internal.cli.output import note
from ratelimit_mw._internal.live.audit import Action, AuditLog, Entries
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.settings import Settings

PATIENCE = 2.0
"""Seconds that a command waits for the backend at least; a request's time-out is too short for a first
connection from far away."""


async def record(
    settings: Settings,
    action: Action,
    callers: Iterable[str],
    detail: str,
    entries: tuple[Entries, Entries] | None = None,
) -> None:
    """Record what a command has changed. Where that fails, the change holds, and it is noted."""
    log = AuditLog(open_audit_store(settings.backend, timeout=PATIENCE))
    try:
        await log.add(_who(), action, callers, detail, entries)
    except BackendError as error:
        note(f"the change could not be recorded for ratelimit-mw audit: {error}")
    finally:
        await log.close()


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
