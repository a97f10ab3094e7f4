"""Findings of the start-up checks: each has a name, a sentence and a place to read more.

An idea of express-rate-limit's: most limiters that don't limit are mounted or configured in one of a few
known ways, and the process can see most of them itself.
"""

import logging
from typing import Literal, NamedTuple

from ratelimit_mw._internal.runtime.printable import printable

DOCS = "https://ratelimit-mw.github.io/ratelimit-mw"
"""Address of the documentation, for readers who have nothing but the wheel."""
PAGE = f"{DOCS}/checks/"
"""The page on which every check has a section under its name: docs/checks.md."""

logger = logging.getLogger("ratelimit_mw.checks")

_MAX_SAID = 1_000
_said: set["Finding"] = set()


class Finding(NamedTuple):
    """Something that does less, or more, than its operator may think."""

    name: str
    """The check that found it. Never changes: to filter by, and to look up."""
    text: str
    """One sentence: what is so, and what comes of it."""
    level: Literal["warning", "note"] = "warning"
    """A note may be just as it was meant."""

    @property
    def link(self) -> str:
        """Link to the advice about this finding."""
        return f"{PAGE}#{self.name}"

    def __str__(self) -> str:
        return printable(f"{self.text} [{self.link}]")


def say_once(finding: Finding) -> None:
    """Log a finding, the first time that this process meets it.

    Records of the logger `ratelimit_mw.checks` have the check's name as `check`, to filter by.
    """
    if finding in _said or len(_said) >= _MAX_SAID:
        return
    _said.add(finding)
    level = logging.WARNING if finding.level == "warning" else logging.INFO
    logger.log(level, "%s", finding, extra={"check": finding.name})
