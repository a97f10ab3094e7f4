"""Warns of metered units that an app settles or estimates though no settings limit them."""

import logging
from collections.abc import Callable

from ratelimit_mw._internal.settings import Settings
from ratelimit_mw._internal.settings.errors import nearest_name

logger = logging.getLogger("ratelimit_mw")

MAX_NAMED = 100
"""Units that are warned about: their names are the app's."""


class UncountedUnits:
    """Told of each unit that was settled or estimated and that no limit of the request counts.

    That does nothing and is not an error, as with a price where there is no budget: one app serves
    plans with and without a limit of tokens, and its handlers need not know which. A unit that no plan has at
    all is most likely misspelt, which is said once.
    """

    def __init__(self, settings: Callable[[], Settings]) -> None:
        """`settings` tells those in force."""
        self._settings = settings
        self._said: set[str] = set()

    def __call__(self, unit: object, ignored: str = "settle") -> None:
        """Note one, and in which of both it was `ignored`."""
        if not isinstance(unit, str) or unit in self._said or len(self._said) >= MAX_NAMED:
            return
        known = self._settings().units
        if unit in known:
            return
        self._said.add(unit)
        nearest = nearest_name(unit, known)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        logger.warning("%s ignored: no plan limits the unit %.40r%s", ignored, unit, hint)
