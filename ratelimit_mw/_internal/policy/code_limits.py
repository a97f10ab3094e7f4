"""Limits that an app declares in its code, for what a settings file cannot see."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar
from uuid import UUID
from weakref import WeakSet

from pydantic import TypeAdapter, ValidationError

from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.model.limits import REQUESTS, OnFailure, Slots, Window
from ratelimit_mw._internal.model.metered import MAX_AMOUNT
from ratelimit_mw._internal.policy.by import By, HeaderValue, Key, PathPart, Whose
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.policy import Counts
from ratelimit_mw._internal.runtime.plain_hooks import check_plain
from ratelimit_mw._internal.settings.errors import in_our_words
from ratelimit_mw._internal.settings.limits import Concurrent, Rates
from ratelimit_mw._internal.settings.units import UnitName, counting

STRICTNESS: tuple[OnFailure, ...] = ("allow", "local", "deny")
"""Decisions while the backend is away, the strictest last."""
MAX_NAME = 200
"""Characters of the longest name of a limit."""

CostFunction = Callable[[MutableMapping[str, Any], Identity], "int | Awaitable[int]"]
"""A function of scope and identity that returns what a request costs."""
RatesFunction = Callable[[Identity], "str | Iterable[str] | Awaitable[str | Iterable[str] | None] | None"]
"""A function of the identity that returns the rates of some callers; None: the limit's own."""
Condition = Callable[[MutableMapping[str, Any], Identity], "bool | Awaitable[bool]"]
"""A function of scope and identity that returns whether a limit applies to a request."""

_T = TypeVar("_T")

declared: "WeakSet[Limit]" = WeakSet()
"""Every limit of this process that something still refers to."""


class Limit:
    """A limit that the app declares: rates, slots or both, counted by a key under a name.

    All limits of one name have one count for each key and window length. Routes that `limited` marks are
    decided about together with all their other limits, before the handler runs. A handler, or a job, charges
    one with a key of its own: `lease.charge(limit.on(key))`, `limiter.acquire(limit.on(key))`.

    Raises ValueError for what limits nothing or is malformed.
    """

    def __init__(  # noqa: PLR0913 - all but name and rates by name
        self,
        name: str,
        *rates: str,
        by: By = Whose.CALLER,
        unit: str = REQUESTS,
        concurrent: int | Mapping[str, Any] | None = None,
        cost: int | CostFunction = 1,
        count: Literal["all", "failures"] | Counts = "all",
        rates_for: RatesFunction | None = None,
        when: Condition | None = None,
        shadow: bool | None = None,
        on_failure: OnFailure | None = None,
    ) -> None:
        """`by` is whose count it is: see `ratelimit_mw.by`. `unit` is what the rates count: requests, or a
        metered unit such as `tokens`, which is settled. `concurrent` is a number of slots, or a table as in
        the settings. `cost` is how many units a request uses. `count` says which requests count: all,
        failures (status 400 and above, or an exception), or those for whose status it returns true. A request
        is charged when it comes, and given back when its answer doesn't count. `rates_for` gives some callers
        other rates, and `when` says whether the limit applies to a request. With `shadow` it is decided and
        reported, and refuses nobody. `on_failure` is as in the settings; of all limits of a request, the
        strictest counts.
        """
        self.name: str = _checked_name(name)
        self.unit: str = unit if unit == REQUESTS else valid(_units(), unit, f"{name}: unit")
        self.rates: tuple[Window, ...] = rates_of(rates, self.unit, name)
        self.concurrent: Slots | None = None
        if concurrent is not None:
            self.concurrent = valid(_slots(), concurrent, f"{name}: concurrent")
        if not (self.rates or self.concurrent or rates_for):
            raise ValueError(f"{name}: a limit needs a rate such as '60/minute', or concurrent")
        if not isinstance(by, Whose | PathPart | HeaderValue) and not callable(by):
            raise ValueError(f"{name}: by must be one of ratelimit_mw.by, or a function, not {by!r:.60}")
        for what, function in (("rates_for", rates_for), ("when", when)):
            if function is not None and not callable(function):
                raise ValueError(f"{name}: {what} must be a function, not {function!r:.60}")
        self.by: By = by
        self.cost: int | CostFunction = cost if callable(cost) else self.check_cost(cost)
        self.count: Literal["all", "failures"] | Counts = self._check_count(count)
        self.rates_for: RatesFunction | None = rates_for
        self.when: Condition | None = when
        self.shadow: bool | None = shadow
        self.on_failure: OnFailure | None = on_failure
        if on_failure not in (None, *STRICTNESS):
            raise ValueError(
                f"{name}: on_failure must be one of {', '.join(STRICTNESS)}, not {on_failure!r:.40}"
            )
        declared.add(self)

    def on(self, key: Key, *, cost: int | None = None) -> "KeyedLimit":
        """Count by this key, whatever the limit itself counts by; `cost` takes the place of its own.

        Raises TypeError for what is not a key, and ValueError for what is not a cost.
        """
        return KeyedLimit(self, text_of(key), None if cost is None else self.check_cost(cost))

    def check_cost(self, cost: object) -> int:
        """Return a cost that can be charged. Raises ValueError for any other."""
        least = 1 if self.unit == REQUESTS else 0
        if isinstance(cost, bool) or not isinstance(cost, int) or not least <= cost <= MAX_AMOUNT:
            raise ValueError(
                f"{self.name}: a cost must be a whole number from {least} to {MAX_AMOUNT}, not {cost!r:.40}"
            )
        return cost

    @property
    def counts(self) -> Counts | None:
        """Whether an answer of a status counts; None if all do."""
        if self.count == "all":
            return None
        return is_failure if self.count == "failures" else self.count

    def _check_count(self, count: Literal["all", "failures"] | Counts) -> Literal["all", "failures"] | Counts:
        if count != "all" and self.unit != REQUESTS:
            raise ValueError(f"{self.name}: count is for requests alone; the app settles {self.unit}")
        if count not in ("all", "failures"):
            if not callable(count):
                raise ValueError(
                    f"{self.name}: count must be 'all', 'failures' or a function, not {count!r:.60}"
                )
            check_plain(count, f"{self.name}: count", "")
        return count

    def is_like(self, other: "Limit") -> bool:
        """Whether another declaration of the name says the same of amounts."""
        mine, others = (each.__dict__.copy() for each in (self, other))
        for name in (
            "by",
            "cost",
            "count",
            "rates_for",
            "when",
        ):  # functions are others after each reload of a module
            del mine[name], others[name]
        return mine == others

    def __repr__(self) -> str:
        rates = "".join([f", {rate.text!r}" for rate in self.rates])
        return f"Limit({self.name!r}{rates})"


@dataclass(frozen=True, slots=True, repr=False)
class KeyedLimit:
    """A limit with the key that it is to be counted by. `Limit.on` makes one."""

    limit: Limit
    key: str
    cost: int | None = None

    def __repr__(self) -> str:  # without the key, which may be an e-mail address
        return f"{self.limit!r}.on(...)"


def is_failure(status: int) -> bool:
    """Whether a request has failed, by the status of its answer."""
    return status >= 400


def _checked_name(name: object) -> str:
    if isinstance(name, str) and name.strip() and len(name) <= MAX_NAME and name.isprintable():
        return name
    raise ValueError(f"the name of a limit must be 1 to {MAX_NAME} printable characters, not {name!r:.60}")


def text_of(key: object) -> str:
    """Return a key as text. Raises TypeError for what is not a key."""
    if isinstance(key, str):
        return key
    if isinstance(key, bytes):
        return key.decode("utf-8", "surrogateescape")
    if isinstance(key, UUID) or (isinstance(key, int) and not isinstance(key, bool)):
        return str(key)
    raise TypeError(f"a key must be text, bytes, a whole number or a UUID, not {type(key).__name__}")


def partition_of_key(key: str, secret: str) -> str:
    """Return the partition that counts by a key. Any text is safe: only its hash is kept."""
    return f"l:{hash_api_key(key.encode('utf-8', 'surrogatepass'), secret).partition(':')[2][:32]}"


def rates_of(rates: object, unit: str, name: str) -> tuple[Window, ...]:
    """Return rates as windows that count a unit. Raises ValueError."""
    written = (rates,) if isinstance(rates, str | Window) else rates
    if not isinstance(written, Iterable):
        raise ValueError(f"{name}: rates must be text such as '60/minute', not {rates!r:.60}")
    return counting(unit, valid(_rates(), tuple(written), f"{name}: rates"))


# Made when they are first used: an app without limits in code has no need of them.


@cache
def _rates() -> TypeAdapter[tuple[Window, ...]]:
    return TypeAdapter(Rates)


@cache
def _slots() -> TypeAdapter[Slots]:
    return TypeAdapter(Concurrent)


@cache
def _units() -> TypeAdapter[str]:
    return TypeAdapter(UnitName)


def valid(kind: TypeAdapter[_T], value: object, what: str) -> _T:
    """Return a value as the settings would read it. Raises ValueError."""
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        (line, *_) = in_our_words(error, ()).errors(include_url=False)
        expected = line["ctx"]["expected"]
        raise ValueError(
            f"{what} {line['ctx']['what']}" + (f"; expected {expected}" if expected else "")
        ) from None
