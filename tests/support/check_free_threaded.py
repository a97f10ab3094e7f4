"""Run by a free-threaded Python that has the package uncompiled: what docs/upgrading.md says of it is true.

In Python alone an import leaves the GIL off, one event loop is limited exactly, and the start warns. Where
redis-py's parser switches the GIL on, as soon as settings name a server, Python itself says so.
"""

import asyncio
import contextlib
import logging
import sys
import warnings

from ratelimit_mw import Limiter, RateLimited, Settings

QUOTA, ASKED = 50, 80
FINDING = "without-gil"


class Findings(logging.Handler):
    """Names of the findings that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        logging.getLogger("ratelimit_mw.checks").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the name."""
        self.names.append(getattr(record, "check", ""))


async def ask() -> int:
    """Number of requests that a limiter in memory admits."""
    admitted = 0
    settings = Settings.model_validate({"plans": {"default": {"requests": [f"{QUOTA}/hour"]}}})
    async with Limiter(settings) as limiter:
        for _ in range(ASKED):
            with contextlib.suppress(RateLimited):
                async with await limiter.acquire(api_key="one") as lease:
                    admitted += lease.allowed
    return admitted


def is_gil_on() -> bool:
    """Whether the GIL is on now; it is on any Python that is not free-threaded."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def main() -> int:
    """Report what is otherwise; the exit status says whether anything is."""
    problems = []
    if is_gil_on():
        problems.append("the GIL is on after the import: a Python with it, or a compiled module")
    findings = Findings()
    admitted = asyncio.run(ask())
    if admitted != QUOTA:
        problems.append(f"{admitted} of {QUOTA} requests were admitted")
    if FINDING not in findings.names:
        problems.append("no finding tells that the GIL is off")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Limiter(Settings.model_validate({"backend": {"url": "redis://127.0.0.1:6379/0"}}))
    is_told = any("hiredis" in str(warning.message) for warning in caught)
    if is_gil_on() is not is_told:
        problems.append("the GIL was switched on and nobody said so")
    state = "on" if is_gil_on() else "off"
    good = f"Python {sys.version.split()[0]}: as documented; with a server the GIL is {state}"
    sys.stdout.write("\n".join(problems or [good]) + "\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
