"""The headers that tell a caller how its limits stand."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import lru_cache

from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.header_window import HeaderWindow
from ratelimit_mw._internal.model.limits import REQUESTS, Window
from ratelimit_mw._internal.model.money import format_amount
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.status import WindowStatus
from ratelimit_mw._internal.policy.decision import Decision
from ratelimit_mw._internal.runtime.leaf import digits
from ratelimit_mw._internal.settings import ResponseSettings

RawHeaders = list[tuple[bytes, bytes]]
"""Headers as ASGI has them: lower-case names, values as bytes."""

SHADOW = b"x-ratelimit-shadow"
"""Sent where shadow mode lets a request through that would have been refused."""

_OWN = (b"x-ratelimit-", b"ratelimit")


class HeaderWriter:
    """Writes the headers of a decision as `[response]` says."""

    __slots__ = ("_classic", "_ietf", "is_absolute", "is_classic_only", "is_unix")

    def __init__(self, settings: ResponseSettings) -> None:
        self._classic = "x-ratelimit" in settings.headers
        self._ietf = "ietf" in settings.headers
        self.is_classic_only: bool = self._classic and not self._ietf
        """Whether `X-RateLimit-*` are sent, and the draft's `RateLimit` fields are not."""
        self.is_unix: bool = settings.reset == "unix"
        """Whether resets are Unix times."""
        self.is_absolute: bool = self.is_unix and not self._ietf
        """Whether all times in headers are absolute, so that an answer that is kept stays true."""

    def __call__(self, decision: Decision) -> RawHeaders:
        """The headers for any decision; `of_admitted` writes the same for most admitted requests."""
        headers: RawHeaders = []
        for unit in (REQUESTS, *decision.units()) if self._classic else ():
            nearest = decision.nearest(unit)
            if nearest is not None:
                window, status = nearest
                left, reset_after = window.quota - status.used, status.reset_after_us
                limit = (b"x-ratelimit-limit", digits(window.quota))
                figures = self._x_ratelimit(limit, left, decision.now_us, reset_after)
                headers += figures if unit == REQUESTS else _of_unit(figures, unit)
        if self._ietf:
            headers += _ietf_items(decision)
        headers += self._spending(decision)
        if decision.shadow and decision.refusal is not None:
            headers.append((SHADOW, b"refused"))
        return headers

    def of_admitted(self, lease: Lease) -> RawHeaders:
        """The headers of the response to an admitted request, as `__call__` would write them.

        It makes no `Decision`, unless the settings or a budget need more than `X-RateLimit-*`.
        """
        outcome = lease.outcome
        if not self.is_classic_only or outcome is None:
            return self(lease.decision)
        charge = lease.initial_charge
        if charge.warn_amounts and charge.nears_budget(outcome):
            return self(lease.decision)
        window = outcome.nearest_of(charge.windows)
        if charge.unit_windows:
            return self._with_units(charge, outcome, window)
        return [] if window is None else self._figures(window, outcome)

    def _with_units(self, charge: Charge, outcome: Outcome, window: HeaderWindow | None) -> RawHeaders:
        """The headers of an admitted request of a plan with metered units."""
        headers: RawHeaders = [] if window is None else self._figures(window, outcome)
        for unit, windows in charge.unit_windows.items():
            window = outcome.nearest_of(windows)
            if window is not None:
                headers += _of_unit(self._figures(window, outcome), unit)
        return headers

    def _figures(self, window: HeaderWindow, outcome: Outcome) -> RawHeaders:
        left = window.quota - outcome.used(window.place)
        return self._x_ratelimit(window.limit_header, left, outcome.now, outcome.reset_after(window.place))

    def reset(self, now: int, reset_after: int) -> int:
        """A reset as the settings want it: a Unix time or seconds from now, rounded up."""
        return -(-(now + reset_after if self.is_unix else reset_after) // 1_000_000)

    def _x_ratelimit(self, limit: tuple[bytes, bytes], left: int, now: int, reset_after: int) -> RawHeaders:
        return [
            limit,
            (b"x-ratelimit-remaining", digits(left if left > 0 else 0)),  # noqa: FURB136 - a call costs more
            (b"x-ratelimit-reset", digits(self.reset(now, reset_after))),
        ]

    def _spending(self, decision: Decision) -> RawHeaders:
        """The budget with the smallest share left, of those that have reached their `warn_at`."""
        warnings = list(decision.warnings())
        if not warnings:
            return []
        nearest = min(warnings, key=lambda near: Fraction(near.left, near.allowance.amount))
        amount, currency = nearest.allowance.amount, nearest.allowance.currency
        return [
            (b"x-spending-limit", format_amount(amount, currency).encode()),
            (b"x-spending-remaining", format_amount(nearest.left, currency).encode()),
            (b"x-spending-reset", b"%d" % self.reset(decision.now_us, nearest.period.ends - decision.now_us)),
        ]


def add_headers(present: Iterable[tuple[bytes, bytes]], ours: RawHeaders) -> RawHeaders:
    """The app's headers and ours; of rate limits the app's alone, where it tells of them itself."""
    headers = present if type(present) is list else list(present)
    for name, _ in headers:
        first = name[0] if name else 0
        # The first letter rules out nearly all names for little.
        if first in b"xXrR" and bytes(name).lower().startswith(_OWN):
            ours = [(name, value) for name, value in ours if name == SHADOW or not name.startswith(_OWN)]
            break
    return headers + ours


def _of_unit(figures: RawHeaders, unit: str) -> RawHeaders:
    """Rename headers to those of a metered unit, such as `X-RateLimit-Limit-Tokens`."""
    names = _names_for(unit)
    return [(names[place], value) for place, (_, value) in enumerate(figures)]


@lru_cache(maxsize=256)
def _names_for(unit: str) -> tuple[bytes, ...]:
    """The names of these headers, in their order."""
    return tuple(
        [b"x-ratelimit-%b-%b" % (figure, unit.encode()) for figure in (b"limit", b"remaining", b"reset")]
    )


def _ietf_items(decision: Decision) -> Iterator[tuple[bytes, bytes]]:
    """`RateLimit-Policy` and `RateLimit` of draft-ietf-httpapi-ratelimit-headers-10, an item a limit."""
    windows, names = list[tuple[str, Window, WindowStatus]](), set[str]()
    for unit in (REQUESTS, *decision.units()):
        for own_name, window, status in decision.named_windows(unit):
            name = _quotable(own_name) or window.text
            if name in names and (own_name or window.is_metered):
                name = f"{name} {window.text}" if own_name else window.name
            windows.append((name, window, status))
            names.add(name)
    if not windows:
        return
    policies = ", ".join(
        f'"{name}";q={window.quota};w={window.seconds}'
        + (f';qu="{window.counts}"' if window.is_metered else "")
        for name, window, _ in windows
    )
    limits = ", ".join(
        f'"{name}";r={max(window.quota - status.used, 0)};t={_seconds(status.reset_after_us)}'
        for name, window, status in windows
    )
    yield b"ratelimit-policy", policies.encode()
    yield b"ratelimit", limits.encode()


def _quotable(name: str) -> str:
    """A name as it can stand between quotes in a header."""
    return "".join([each if " " <= each <= "~" and each not in '"\\' else "?" for each in name])


def _seconds(microseconds: int) -> int:
    return -(-microseconds // 1_000_000)
