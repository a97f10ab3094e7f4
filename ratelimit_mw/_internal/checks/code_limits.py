"""Checks of limits in code: names that only the settings have, and declarations that differ."""

from collections.abc import Iterable, Iterator

from ratelimit_mw._internal.policy.code_limits import Limit
from ratelimit_mw._internal.settings import Settings
from ratelimit_mw._internal.settings.errors import nearest_name
from ratelimit_mw._internal.settings.findings import Finding


def code_limit_findings(settings: Settings, limits: Iterable[Limit]) -> Iterator[Finding]:
    """Yield findings about the limits that an app declares, and what the settings say of them."""
    first: dict[str, Limit] = {}
    differing: dict[str, None] = {}
    for limit in sorted(limits, key=repr):
        known = first.setdefault(limit.name, limit)
        if not known.is_like(limit):
            differing[limit.name] = None
    for name in differing:
        text = (
            f"{name!r} is declared twice in code, with different amounts: both share one count, and each "
            "route has the amounts of its own declaration. Declare the limit once, and import it."
        )
        yield Finding("limit-declared-twice", text)
    for name in settings.limits:
        if name not in first:
            nearest = nearest_name(name, first)
            hint = f"; did you mean {nearest!r}?" if nearest else "."
            yield Finding("unknown-limit", f"[limits.{name}]: no code declares a limit of this name{hint}")
