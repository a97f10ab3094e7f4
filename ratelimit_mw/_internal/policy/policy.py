"""Policies: the limits that a request meets, from its caller's plan and its route, made once and kept."""

import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from ratelimit_mw._internal.cache.prefetch_state import PrefetchState, is_taken_ahead
from ratelimit_mw._internal.cache.shared_units import SharedUnits, UnitsAhead
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import DEFAULT_LEASE, Allowance, OnFailure, Window
from ratelimit_mw._internal.model.money import parse_amount
from ratelimit_mw._internal.policy.counters import (
    plan_of,
    route_counters,
    shared_counters,
    shared_scopes_ahead,
)
from ratelimit_mw._internal.policy.identity import Identity, address_partition
from ratelimit_mw._internal.policy.loose_paths import route_table
from ratelimit_mw._internal.runtime.bounded import evict_oldest
from ratelimit_mw._internal.runtime.forks import renew_after_fork
from ratelimit_mw._internal.settings import Settings
from ratelimit_mw._internal.settings.tables import RouteSettings

if TYPE_CHECKING:
    from ratelimit_mw._internal.policy.routing import RouteTable

MAX_POLICIES = 16_384
"""Policies kept for callers seen before; those made first go first."""
MAX_MODELS = 4_096
"""Policies kept that others are made from: of a plan, a rule and a key's own limits."""

_CALLER, _ADDRESS = "caller", "ip:address"
"""The partitions of a model: nothing that everyone shares is called so."""


Counts = Callable[[int], bool]
"""Whether an answer with this status counts."""


class Policy:
    """The limits of one caller on one route. They never change; `DecisionCounts` counts decisions on it."""

    __slots__ = (
        "admitted",
        "ahead",
        "answers",
        "charge",
        "currency",
        "enforced",
        "identity",
        "is_blocked",
        "is_decided",
        "is_exempt",
        "is_latest",
        "on_failure",
        "on_failure_priced",
        "prefetch_state",
        "price",
        "priced_charge",
        "refused",
        "route",
        "shadow",
        "shadowed",
        "too_small",
    )

    def __init__(  # noqa: PLR0913 - a value, all by name
        self,
        *,
        identity: Identity,
        route: RouteSettings | None,
        charge: Charge,
        priced_charge: Charge,
        price: int | None,
        currency: str | None,
        too_small: Counter | None,
        on_failure: OnFailure,
        on_failure_priced: OnFailure,
        shadow: bool,
        is_exempt: bool,
        is_blocked: bool = False,
        prefetch_state: PrefetchState | None,
        ahead: UnitsAhead | None = None,
        answers: Mapping[str, Counts] | None = None,
    ) -> None:
        self.identity: Identity = identity
        self.route: RouteSettings | None = route
        """The rule that matched, None where none did."""
        self.charge: Charge = charge
        """The limits that decide about a request without a price, and its cost."""
        self.priced_charge: Charge = priced_charge
        """Limits of `charge`, and the caller's budgets."""
        self.price: int | None = price
        """The route's estimate in units of `currency`; None without a price or a budget."""
        self.currency: str | None = currency
        """The currency of the caller's budgets, None without any."""
        self.too_small: Counter | None = too_small
        """A window that this cost never fits into, whatever was used."""
        self.on_failure = on_failure
        self.on_failure_priced = on_failure_priced
        self.shadow: bool = shadow
        self.is_exempt: bool = is_exempt
        """Whether nothing limits this request and nothing is counted."""
        self.is_blocked: bool = is_blocked
        """Whether this request is refused, whatever is counted."""
        self.is_decided: bool = is_exempt or is_blocked
        """Whether the request is decided about without asking anybody."""
        self.prefetch_state: PrefetchState | None = prefetch_state
        """Units that this process has taken ahead for requests without a price; None where it takes none."""
        self.ahead: UnitsAhead | None = ahead
        """Limits of all callers of which units are taken ahead, for requests with a price, too."""
        self.shadowed: frozenset[str] = frozenset()
        """Scopes of limits in code that only report, and refuse nobody."""
        self.enforced: Policy | None = None
        """The policy without these limits; None where there are none."""
        self.answers: Mapping[str, Counts] | None = answers
        """For each unit that counts requests by their answers, whether an answer of a status counts."""
        self.is_latest: bool = False
        """Whether `Policies.latest` has it."""
        self.admitted: int = 0
        """Number of requests admitted since they were added up last."""
        self.refused: dict[tuple[str, str], int] | None = None
        """Number of requests refused since then, by outcome and limit; None for none."""

    def for_caller(self, identity: Identity, address: str, keys: tuple[str, ...] = ()) -> "Policy":
        """Make the same policy for another caller; `address` is the partition that counts its address.

        `keys` are those that count limits in code by other keys.
        """
        charge = self.charge.for_caller(identity.partition, address, keys)
        priced = charge
        if self.priced_charge is not self.charge:
            priced = self.priced_charge.for_caller(identity.partition, address, keys)
        too_small = self.too_small
        if too_small is not None:
            too_small = priced.counters[self.priced_charge.counters.index(too_small)]
        return Policy(
            identity=identity,
            route=self.route,
            charge=charge,
            priced_charge=priced,
            price=self.price,
            currency=self.currency,
            too_small=too_small,
            on_failure=self.on_failure,
            on_failure_priced=self.on_failure_priced,
            shadow=self.shadow,
            is_exempt=self.is_exempt,
            is_blocked=self.is_blocked,
            prefetch_state=None if self.prefetch_state is None else PrefetchState(charge),
            ahead=None if self.ahead is None else self.ahead.for_caller(charge),
            answers=self.answers,
        )


class Policies:
    """Compiles policies from the settings, each once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.routes: RouteTable = route_table(settings)
        self._models: dict[tuple[object, ...], Policy] = {}
        self._others: dict[tuple[object, ...], Policy] = {}
        """Policies that have no place in `latest`: another one has it, or their cost is their own."""
        self._lock = threading.Lock()
        self._shared: SharedUnits = SharedUnits()
        self.latest: dict[tuple[str, int | None], Policy] = {}
        """The shortest way to the policy of a caller who comes again."""
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Have a lock that no thread of the parent process holds."""
        self._lock = threading.Lock()

    def match(self, identity: Identity, method: str, path: str, cost: int | None = None) -> Policy:
        """Return the policy of this caller on this path, a `route_path`. A WebSocket handshake is a `GET`.

        `cost` takes the place of the route's. Raises KeyError for a plan that does not exist.
        """
        return self.at(identity, self.routes.match(method, path), cost)

    def at(self, identity: Identity, index: int | None, cost: int | None = None) -> Policy:
        """Return the policy of this caller under the route rule of this index; None stands for no rule."""
        key = (identity.partition, index)
        latest = self.latest.get(key)
        if latest is not None and cost is None and _is_same(latest.identity, identity):
            latest.identity = identity  # the same caller, read anew since keys were set live
            return latest
        policy = self._others.get(_key(identity, index, cost)) if self._others else None
        if policy is None or not _is_same(policy.identity, identity):
            policy = self._make(identity, index, cost)
        with self._lock:  # one limiter serves the event loops of several threads
            if cost is not None:
                self._keep(_key(identity, index, cost), policy)
                return policy
            latest = self.latest.get(key)  # another thread may have put one there meanwhile
            if latest is None:
                _make_room(self.latest)
            else:
                latest.is_latest = False
                self._keep(_key(latest.identity, index, None), latest)
            self._others.pop(_key(identity, index, None), None)
            policy.identity, policy.is_latest = identity, True
            self.latest[key] = policy
        return policy

    def blocked(self, identity: Identity, index: int | None) -> Policy:
        """Return the policy of a caller from a blocked network under the route rule of this index."""
        key = (*_key(identity, index, None), "blocked")
        policy = self._others.get(key)
        if policy is None or not _is_same(policy.identity, identity):
            policy = self._make(identity, index, None, is_blocked=True)
            with self._lock:
                self._keep(key, policy)
        return policy

    def _keep(self, key: tuple[object, ...], policy: Policy) -> None:
        if key not in self._others:
            _make_room(self._others)
        self._others[key] = policy

    def is_exempt(self, method: str, path: str) -> bool:
        """Whether nothing limits a request on this path, whoever sends it."""
        return self.is_exempt_at(self.routes.match(method, path))

    def is_exempt_at(self, index: int | None) -> bool:
        """Whether nothing limits a request under the rule of this index; None for no rule."""
        return index is not None and self._settings.routes[index].exempt

    def for_partition(self, partition: str) -> list[Policy]:
        """Return the policies of a caller's latest request on each route, as far as they are remembered."""
        indexes = (None, *range(len(self._settings.routes)))
        return [policy for index in indexes if (policy := self.latest.get((partition, index))) is not None]

    def counters_of(self, identity: Identity) -> tuple[Counter, ...]:
        """Every counter that a request of this caller can meet, on whichever route; each once."""
        plan = plan_of(self._settings, identity)
        rules = (_any_route(), *self._settings.routes)
        return tuple(
            dict.fromkeys(
                counter for rule in rules for counter in route_counters(self._settings, identity, plan, rule)
            )
        )

    def shared_counters(self) -> tuple[Counter, ...]:
        """Every counter that all callers share, on whichever route; each once, and whole."""
        rules = (_any_route(), *self._settings.routes)
        return tuple(dict.fromkeys(each for rule in rules for each in shared_counters(self._settings, rule)))

    def _make(
        self, identity: Identity, index: int | None, cost: int | None, *, is_blocked: bool = False
    ) -> Policy:
        """A caller's policy, of the model of all whose limits are the same."""
        address = "" if identity.address is None else address_partition(identity.address)
        # Who is counted by address alone has one partition for both kinds of limit.
        caller = _ADDRESS if identity.partition == address else _CALLER
        own = identity.limits
        limits = own and (own.requests, own.concurrent, own.spending, _frozen(own.units))
        key = (identity.plan, index, cost, caller, not address, limits, is_blocked)
        model = self._models.get(key)
        if model is None:
            anybody = Identity(caller, identity.plan, address="address" if address else None, limits=own)
            model = self._compile(anybody, index, cost, is_blocked=is_blocked)
            with self._lock:
                evict_oldest(self._models, MAX_MODELS)
                self._models[key] = model
        return model.for_caller(identity, address)

    def _compile(
        self, identity: Identity, index: int | None, cost: int | None, *, is_blocked: bool
    ) -> Policy:
        route = None if index is None else self._settings.routes[index]
        rule = route or _any_route()
        plan = plan_of(self._settings, identity)
        if is_blocked:
            plan = plan.model_copy(update={"blocked": True})
        counters = tuple(route_counters(self._settings, identity, plan, rule))
        cost = rule.cost if cost is None else cost
        currency = plan.spending.budget.currency if plan.spending is not None else None
        on_failure = rule.on_failure or plan.on_failure or self._settings.backend.on_failure
        lease_seconds = plan.concurrent.lease_seconds if plan.concurrent is not None else DEFAULT_LEASE
        unpriced = [c for c in counters if not isinstance(c.limit, Allowance)]
        charge = Charge(unpriced, cost, lease_seconds=lease_seconds, estimates=rule.units)
        priced = charge
        if plan.spending is not None:
            priced = Charge(counters, cost, lease_seconds=lease_seconds, estimates=rule.units)
        for each in (charge, priced):
            each.caller, each.address = identity.partition, _ADDRESS
        price = None if rule.price is None or currency is None else parse_amount(rule.price, currency)
        shared = self._shared.states_for(charge, shared_scopes_ahead(self._settings, rule))
        rest = UnitsAhead(shared).rest(charge) if shared else charge
        state = PrefetchState(rest) if plan.prefetch and price is None and is_taken_ahead(rest) else None
        return Policy(
            identity=identity,
            route=route,
            charge=charge,
            priced_charge=priced,
            price=price,
            currency=currency,
            too_small=charge.too_small,
            on_failure=on_failure,
            # Money first: what is said of it means every priced request.
            on_failure_priced=(plan.spending.on_failure if plan.spending else None) or on_failure,
            shadow=_first(rule.shadow, plan.shadow, self._settings.shadow),
            is_exempt=rule.exempt and not plan.blocked,
            is_blocked=plan.blocked,
            prefetch_state=None if shared else state,
            ahead=UnitsAhead(shared, state) if shared else None,
        )


@cache
def _any_route() -> RouteSettings:
    return RouteSettings.model_construct(path="/{rest:path}")  # unchecked: to compile checks holds the loop


def _make_room(policies: dict[Any, Policy]) -> None:
    for forgotten in evict_oldest(policies, MAX_POLICIES):
        forgotten.is_latest = False
        forgotten.charge.forget()


def _key(identity: Identity, index: int | None, cost: int | None) -> tuple[object, ...]:
    return (identity.partition, identity.plan, identity.address, _told_apart(identity), index, cost)


def _told_apart(identity: Identity) -> str | None:
    """Keys of one account are counted together, and told apart where decisions are told."""
    return identity.account and identity.api_key_hash


def _is_same(known: Identity, identity: Identity) -> bool:
    """Whether what holds for a caller holds for another of the same partition."""
    return known is identity or (
        known.plan == identity.plan
        and known.address == identity.address
        and known.account == identity.account
        and _told_apart(known) == _told_apart(identity)
        and known.limits == identity.limits
    )


def _frozen(units: Mapping[str, tuple[Window, ...]] | None) -> tuple[object, ...] | None:
    return None if units is None else tuple(units.items())


def _first(*values: bool | None) -> bool:
    return next(value for value in values if value is not None)
