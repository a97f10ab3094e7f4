"""Addresses and routes of callers whom an operator looks at: counted for them alone, and only meanwhile."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from ratelimit_mw._internal.policy.client_address import Scope
from ratelimit_mw._internal.policy.lookup import LookupEntry

Watch = Callable[[LookupEntry, Scope], None]

MOST = 60
"""Addresses and routes of all watched callers that are counted from one report to the next."""
LONGEST = 200
"""Characters of a path."""
ADDRESS, ROUTE = "address", "route"


class Sightings:
    """Counts where the requests of watched callers come from and go to."""

    def __init__(self, address_of: Callable[[Scope], str], switch: Callable[[Watch | None], None]) -> None:
        """`switch` is given what each request is to be shown to; None while nobody is watched."""
        self._address_of = address_of
        self._switch = switch
        self._watched: frozenset[str] = frozenset()
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def watch(self, callers: Iterable[str]) -> None:
        """Count these callers from now on, and no others."""
        self._watched = frozenset(callers)
        self._switch(self if self._watched else None)

    def __call__(self, found: LookupEntry, scope: Scope) -> None:
        """Count a request, if it is of a watched caller."""
        caller = found.identity.partition
        if caller not in self._watched:
            return
        rule = found.policy.route
        path = scope["path"] if rule is None else rule.path
        route = f"{scope.get('method', 'GET')} {path[:LONGEST]}"
        for each in ((caller, ADDRESS, self._address_of(scope)), (caller, ROUTE, route)):
            if each in self._counts or len(self._counts) < MOST:
                self._counts[each] += 1

    def take(self) -> dict[str, int]:
        """Return the counts since the last call, by the name that `sightings_of` reads."""
        counts, self._counts = self._counts, Counter()
        # A copy, since another thread's request may still be counting there.
        return {json.dumps(each, separators=(",", ":")): number for each, number in [*counts.items()]}


def sightings_of(caller: str, several: Iterable[Mapping[str, int]]) -> tuple[Counter[str], Counter[str]]:
    """Return the addresses and the routes of a caller, each with its requests, from several counts."""
    found: dict[str, Counter[str]] = {ADDRESS: Counter(), ROUTE: Counter()}
    for counts in several:
        for name, number in counts.items():
            try:
                said = json.loads(name)
            except (ValueError, RecursionError):
                continue
            if isinstance(said, list) and len(said) == 3 and all(isinstance(each, str) for each in said):
                whose, kind, text = said
                if whose == caller and kind in found:
                    found[kind][text.encode("utf-8", "replace").decode()] += number
    return found[ADDRESS], found[ROUTE]
