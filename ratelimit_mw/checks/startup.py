"""What happens once when a process starts, before its first request."""

from ratelimit_mw.checks.plain import findings
from ratelimit_mw.checks.surroundings import server_findings
from ratelimit_mw.findings import say_once
from ratelimit_mw.settings import Settings


def log_findings(settings: Settings) -> None:
    """Log what the start-up checks find, each the first time that this process meets it."""
    for finding in (*findings(settings), *server_findings(settings)):
        say_once(finding)
