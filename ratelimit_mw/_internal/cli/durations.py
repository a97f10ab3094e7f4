"""Durations on the command line."""

import re

from ratelimit_mw._internal.cli.output import UsageError

LONGEST = 10 * 365 * 86_400
"""Seconds of the longest duration."""

_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?=\d)" + "".join(rf"(?:(?P<{unit}>\d{{1,9}}){unit})?" for unit in _SECONDS))


def parse_duration(text: str) -> int:
    """Return the seconds of a duration such as `2h` or `1d12h`. Raises `UsageError`."""
    found = _DURATION.fullmatch(text.strip().lower())
    seconds = 0
    if found is not None:
        seconds = sum(int(found[unit] or 0) * each for unit, each in _SECONDS.items())
    if not 1 <= seconds <= LONGEST:
        raise UsageError(
            f"--for: {text[:40]!r} is not a duration; expected one such as 30m, 2h, 1d12h, up to 10 years"
        )
    return seconds
