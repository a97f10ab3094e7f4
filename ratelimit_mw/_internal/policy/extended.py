"""Policies with limits in code: those of plan and route, and those that the app declares, as one charge."""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from ratelimit_mw._internal.model.charge import CODE_SCOPE, Charge, Counter
from ratelimit_mw._internal.model.limits import ANSWERS, Allowance, OnFailure, Slots, Window
from ratelimit_mw._internal.policy.code_limits import STRICTNESS, KeyedLimit, Limit, partition_of_key
from ratelimit_mw._internal.policy.policy import Counts, Policy
from ratelimit_mw._internal.runtime.bounded import evict_oldest
from ratelimit_mw._internal.runtime.forks import renew_after_fork
from ratelimit_mw._internal.settings import Settings
from ratelimit_mw._internal.settings.tables import LimitSettings
from ratelimit_mw._internal.settings.units import counting

MAX_POLICIES = 16_384
"""Policies kept for callers and keys seen before; those made first go first."""
MAX_MODELS = 4_096
"""Policies kept that others are made from, and limits as they count."""
MAX_LIMITS = 255
"""The most limits of one charge, as the script counts them in a byte."""


class CodeLimit:
    """One declared limit as it counts under the settings in force."""

    __slots__ = ("cost", "counts", "limits", "name", "on_failure", "shadow")

    def __init__(
        self, name: str, limits: Sequence[Window | Slots], cost: int, counts: Counts | None = None
    ) -> None:
        self.name: str = name
        self.limits: Sequence[Window | Slots] = limits
        self.cost: int = cost
        self.counts: Counts | None = counts
        """Whether an answer of a status counts; None if all do."""
        self.shadow: bool = False
        self.on_failure: OnFailure | None = None


class AskedLimit(NamedTuple):
    """A limit in code that a request meets."""

    limit: CodeLimit
    owner: Literal["caller", "address", "key", "everyone"]
    partition: str
    """Partition that counts it; "" for the caller's own."""


AskedLimits = tuple[AskedLimit, ...]


class CodeLimits:
    """Puts limits in code together with policies, under one state of the settings."""

    def __init__(self, settings: Settings) -> None:
        self._secret = settings.identity.hash_secret.get_secret_value()
        self._settings = settings.limits
        self._chosen: dict[tuple[object, ...], CodeLimit] = {}
        self._models: dict[tuple[object, ...], Policy] = {}
        self._extended: dict[tuple[Policy, AskedLimits, bool], Policy] = {}
        self.by_caller: dict[Limit, None] = {}
        """Limits that a handler or a job has charged by caller."""
        self._lock = threading.Lock()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Have a lock that no thread of the parent process holds."""
        self._lock = threading.Lock()

    def partition_of(self, key: str) -> str:
        """Return the partition that counts by a key."""
        return partition_of_key(key, self._secret)

    def choose(
        self, limit: Limit, rates: tuple[Window, ...] | None = None, cost: int = 1
    ) -> CodeLimit | None:
        """Return a limit as it counts, with other rates than its own perhaps; None if it is switched off.

        The settings have the last word.
        """
        key = (limit, rates, cost)
        chosen = self._chosen.get(key)
        if chosen is None:
            said = self._settings.get(limit.name) or LimitSettings.model_construct()
            if said.off:
                return None
            chosen = _chosen(limit, said, limit.rates if rates is None else rates, cost)
            with self._lock:
                evict_oldest(self._chosen, MAX_MODELS)
                self._chosen[key] = chosen
        return chosen

    def note_by_caller(self, limit: Limit) -> None:
        """Note that a limit counts by caller, though it is on no route."""
        if limit not in self.by_caller:
            with self._lock:
                evict_oldest(self.by_caller, MAX_MODELS)
                self.by_caller[limit] = None

    def counters_of(
        self, limits: Iterable[tuple[Limit, tuple[Window, ...] | None]], caller: str
    ) -> Iterator[Counter]:
        """The counters of limits that count by caller, each with other rates than its own perhaps."""
        chosen = [self.choose(limit, rates) for limit, rates in limits]
        yield from _counters_of(
            tuple([(each, "caller", -1) for each in chosen if each is not None]), caller, ()
        )

    def asked_on(self, keyed: KeyedLimit, rates: tuple[Window, ...] | None) -> AskedLimit | None:
        """Return a limit with its key as a request meets it. Raises ValueError for an unknown cost."""
        limit, cost = keyed.limit, keyed.cost
        if cost is None:
            if callable(limit.cost):
                raise ValueError(
                    f"{limit!r} has a function for its cost: name the cost, as in .on(key, cost=1)"
                )
            cost = limit.cost
        chosen = self.choose(limit, rates, cost)
        return None if chosen is None else AskedLimit(chosen, "key", self.partition_of(keyed.key))

    def extend(self, policy: Policy, asked: AskedLimits, *, alone: bool = False) -> Policy:
        """Return a policy with these limits beside its own, or with these `alone`.

        Raises ValueError for more limits than one charge can have.
        """
        key = (policy, asked, alone)
        extended = self._extended.get(key)
        if extended is None:
            extended = self._extend(policy, asked, alone)
            with self._lock:
                for forgotten in evict_oldest(self._extended, MAX_POLICIES):
                    forgotten.charge.forget()
                self._extended[key] = extended
        return extended

    def _extend(self, policy: Policy, asked: AskedLimits, alone: bool) -> Policy:
        keys = tuple(dict.fromkeys([each.partition for each in asked if each.partition]))
        owned = tuple(
            [(each.limit, each.owner, keys.index(each.partition) if each.partition else -1) for each in asked]
        )
        base = policy.charge.model or policy.charge
        key = (base, policy.priced_charge.model, owned, alone)  # which are of one plan and rule
        model = self._models.get(key)
        if model is None:
            model = _model_of(policy, base, owned, alone)
            with self._lock:
                evict_oldest(self._models, MAX_MODELS)
                self._models[key] = model
        extended = model.for_caller(policy.identity, policy.charge.address, keys)
        shadowed = [each for each in asked if each.limit.shadow]
        if shadowed:
            extended.shadowed = frozenset([f"{CODE_SCOPE}{each.limit.name}" for each in shadowed])
            enforced = tuple([each for each in asked if not each.limit.shadow])
            extended.enforced = self.extend(policy, enforced, alone=alone) if enforced or alone else policy
        return extended


def _chosen(limit: Limit, said: LimitSettings, rates: tuple[Window, ...], cost: int) -> CodeLimit:
    """Return a limit with these rates, unless the settings say others."""
    if said.requests is not None:
        rates = counting(limit.unit, said.requests)
    if limit.counts is not None:
        rates = counting(f"{ANSWERS}{limit.name}", rates)
    concurrent = said.concurrent or limit.concurrent
    slots = () if concurrent is None else (concurrent,)
    chosen = CodeLimit(limit.name, (*rates, *slots), cost, limit.counts)
    chosen.shadow = bool(limit.shadow if said.shadow is None else said.shadow)
    chosen.on_failure = said.on_failure or limit.on_failure
    return chosen


OwnedLimits = tuple[tuple[CodeLimit, Literal["caller", "address", "key", "everyone"], int], ...]
"""Limits in code with whose each is, and the number of its key; -1 for the caller's own."""


def everyones_partition(name: str) -> str:
    """Return the partition of a limit that all callers share."""
    return f"t:{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _model_of(policy: Policy, base: Charge, owned: OwnedLimits, alone: bool) -> Policy:
    """Return the policy that those of all callers and keys are made from."""
    keys = tuple(
        [f"key:{number}" for number in range(max([number for _, _, number in owned], default=-1) + 1)]
    )
    counters = list(_counters_of(owned, base.caller, keys))
    costs: dict[str, int] = {}
    for limit, _, _ in owned:
        scope = f"{CODE_SCOPE}{limit.name}"
        costs[scope] = max(limit.cost, costs.get(scope, 0))
    priced = policy.priced_charge.model or policy.priced_charge
    charges = []
    for own in (base, priced):
        limits = () if alone else own.counters
        mine = [*limits, *counters]
        mine.sort(key=lambda counter: counter.owner == "everyone")  # last, in their order
        if len(mine) > MAX_LIMITS:
            raise ValueError(f"a request can have at most {MAX_LIMITS} limits, not {len(mine)}")
        cost = 1 if alone else own.cost
        charge = Charge(
            mine, cost, lease_seconds=own.lease_seconds, estimates=costs if alone else own.units | costs
        )
        charge.caller, charge.address, charge.keys = base.caller, base.address, keys
        charges.append(charge)
    charge, priced = charges
    answers = {f"{ANSWERS}{limit.name}": limit.counts for limit, _, _ in owned if limit.counts is not None}
    if not alone:
        answers |= policy.answers or {}
    is_priced = not alone and policy.priced_charge is not policy.charge
    return Policy(
        identity=policy.identity,
        route=policy.route,
        charge=charge,
        priced_charge=priced if is_priced else charge,
        price=None if alone else policy.price,
        currency=None if alone else policy.currency,
        too_small=charge.too_small,
        on_failure=_strictest(owned, policy.on_failure, alone),
        on_failure_priced=_strictest(owned, policy.on_failure_priced, alone),
        shadow=policy.shadow,
        is_exempt=not charge.counters,  # of a late charge whose limits all only report
        prefetch_state=None,
        ahead=None if alone or policy.ahead is None else policy.ahead.without_own(),
        answers=answers or None,
    )


def _strictest(owned: OwnedLimits, own: OnFailure, alone: bool) -> OnFailure:
    """Return the decision for outages of all limits of a request."""
    said = [limit.on_failure for limit, _, _ in owned if limit.on_failure is not None]
    return max(said if alone and said else [own, *said], key=STRICTNESS.index)


def _counters_of(owned: OwnedLimits, caller: str, keys: Sequence[str]) -> Iterator[Counter]:
    """The counters of limits in code; of two with one key the stricter one."""
    strictest: dict[tuple[str, str, int], Counter] = {}
    for code_limit, owner, number in owned:
        partition = caller if number < 0 else keys[number]
        scope = f"{CODE_SCOPE}{code_limit.name}"
        for limit in code_limit.limits:
            key = (partition, scope, limit.length if isinstance(limit, Window) else 0)
            known = strictest.get(key)
            if known is None or _amount(limit) < _amount(known.limit):
                is_reported = code_limit.shadow and owner == "caller"
                strictest[key] = Counter(partition, scope, limit, "reported" if is_reported else owner)
    yield from strictest.values()


def _amount(limit: Window | Slots | Allowance) -> int:
    if isinstance(limit, Window):
        return limit.quota
    return limit.limit if isinstance(limit, Slots) else limit.amount
