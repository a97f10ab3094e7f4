"""A brute-force limiter: plain lists of everything ever admitted, looked through for every answer.

Written from the rules alone. Where two answers are right, it knows both ends: what a backend may have
forgotten when its clock steps back, and how much later a unit of a large quota may leave its window.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

from ratelimit_mw._internal.model.backend import EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Counter
from ratelimit_mw._internal.model.limits import SECOND, Allowance, Slots, Window
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, Status, WindowStatus

EXACT = 1_000
"""Quotas above it may remember a unit a thousandth of the window longer."""
UNIT = Decimal("0.000001")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

CounterKey = tuple[str, ...]


@dataclass
class Unit:
    """A charge on a window."""

    at: int
    """Time under which it is stored at the latest."""
    cost: int
    has_left: bool = False
    """Seen outside the window: it may be forgotten, though the clock should step back."""
    more: int = 0
    """Units that may be counted besides `cost`: perhaps of an estimate that was given back."""
    estimate: "Estimate | None" = None
    """Of which it is, until that is settled or over."""
    since: int = field(init=False)
    """Time under which it is stored at the earliest.

    Whatever is done to its window after the clock has stepped back may have moved it there.
    """

    def __post_init__(self) -> None:
        self.since = self.at


@dataclass
class Estimate:
    """Estimate of one charge for one metered unit, and the time for which it is held."""

    amount: int
    lease: int
    held_until: int
    steps: int
    """Number of times that the clock had stepped back before the estimate was made.

    An entry that was stored under a later time than the clock shows is found no more.
    """
    bases: list[tuple[CounterKey, Unit]] = field(default_factory=list)
    may_have_lapsed: bool = False
    never_lapses: bool = False
    settled: int | None = None
    settled_at: int = 0
    extras: list[tuple[CounterKey, Unit]] = field(default_factory=list)

    def has_lapsed(self, now: int) -> bool:
        """Whether it is not held any more for sure, once somebody looks."""
        return not self.never_lapses and now >= self.held_until

    def is_held(self, now: int) -> bool:
        """Whether it is held for sure."""
        return self.never_lapses or (now < self.held_until and not self.may_have_lapsed)


@dataclass
class Lease:
    """A slot held under an id."""

    expires: int
    has_expired: bool = False
    """Seen expired: the same."""


@dataclass
class Bill:
    """A priced charge, in the books of its periods until it is settled or closed."""

    keys: list[CounterKey]
    estimate: Decimal
    lease: int
    held_until: int
    """Until when its estimate is held for sure, unless it is kept."""
    lapsed_from: int
    """From when on it is not held any more for sure."""
    may_have_lapsed: bool = False
    """Seen at a time at which it may not be held: it may be given back, though the clock should step back."""
    never_lapses: bool = False
    counted: Decimal | None = None
    """The price, once it is known or decided; what is not counted is held."""
    is_settled: bool = False
    settled_at: int = 0
    is_closed: bool = False

    def holds(self, now: int) -> tuple[Decimal, Decimal]:
        """Return the amounts that it holds: at least, at most."""
        if self.counted is not None or self.is_closed:
            return Decimal(0), Decimal(0)
        if self.never_lapses:
            return self.estimate, self.estimate
        surely = now < self.held_until and not self.may_have_lapsed
        maybe = surely or now < self.lapsed_from
        return self.estimate * surely, self.estimate * maybe


@dataclass
class Oracle:
    """Everything admitted so far, and the only clock."""

    now: int
    units: dict[CounterKey, list[Unit]] = field(default_factory=dict)
    leases: dict[CounterKey, dict[bytes, Lease]] = field(default_factory=dict)
    bills: dict[bytes, Bill] = field(default_factory=dict)
    latest: int = 0
    """The latest time that the clock has ever shown."""
    estimates: dict[bytes, dict[str, Estimate]] = field(default_factory=dict)
    """Of running requests, by lease id and unit."""
    steps: int = 0
    """Number of times that the clock has stepped back."""
    slack: dict[CounterKey, int] = field(default_factory=dict)
    """Amount that may have been taken off other charges' entries after the clock had stepped back."""
    charged: dict[bytes, list[Unit]] = field(default_factory=dict)
    """Units that each charge has in windows of requests."""
    large: set[CounterKey] = field(default_factory=set)
    """Windows that were ever under a quota above `EXACT`."""

    # charges ------------------------------------------------------------------------------------

    def check(
        self,
        counters: list[Counter],
        cost: int,
        price: int,
        lease_id: bytes | None,
        got: Outcome,
        units: dict[str, int] | None = None,
    ) -> None:
        """Compare an answer with what it has to be, and count the charge if it was admitted."""
        self._notice_what_is_over()
        needs = [need_of(counter, cost, units or {}) for counter in counters]
        fits = [self.fits(counter, need, price) for counter, need in zip(counters, needs, strict=True)]
        if all(sure for sure, _ in fits):
            assert got.admitted
        if not all(maybe for _, maybe in fits):
            assert not got.admitted
        assert got.now == self.now
        if got.admitted and lease_id is not None:
            self._charge(counters, needs, price, lease_id)
            self._estimate(counters, units or {}, lease_id)
        for place, counter in enumerate(counters):
            status, need = got.status(place, counter.limit), needs[place]
            self._check_status(counter, need, price, status, got.admitted, charged=lease_id is not None)

    def _notice_what_is_over(self) -> None:
        """Note everything that is over by now, since any charge may have a backend forget it."""
        for key, units in self.units.items():
            for unit in units:
                unit.since = min(unit.since, self.now)
                unit.has_left = unit.has_left or unit.since + int(key[-1]) * SECOND <= self.now
        for leases in self.leases.values():
            for lease in leases.values():
                lease.has_expired = lease.has_expired or lease.expires <= self.now
        self.latest = max(self.latest, self.now)
        for bill in self.bills.values():
            bill.may_have_lapsed = bill.may_have_lapsed or bill.held_until <= self.now
        for estimates in self.estimates.values():
            for estimate in estimates.values():
                estimate.may_have_lapsed = estimate.may_have_lapsed or estimate.held_until <= self.now

    def fits(self, counter: Counter, cost: int, price: int) -> tuple[bool, bool]:
        """Whether a limit has room for sure, and whether it may have."""
        limit, key = counter.limit, counter_key(counter, self.now)
        if isinstance(limit, Window):
            least, most = self.used(key, limit)
            return most + cost <= limit.quota, least + cost <= limit.quota
        if isinstance(limit, Slots):
            least, most = self.active(key)
            return most < limit.limit, least < limit.limit
        spent, least_held, most_held = self.money(key)
        left = limit.amount * UNIT - spent - price * UNIT
        return most_held <= left, least_held <= left

    def used(self, key: CounterKey, limit: Window) -> tuple[int, int]:
        """Units in the window: at least, at most."""
        length = limit.seconds * SECOND
        if limit.quota > EXACT:
            self.large.add(key)
        late = length // 1_000 if key in self.large else 0
        for unit in self.units.get(key, []):
            unit.at = min(unit.at, self.now)
        units = self.units.get(key, [])
        live = [unit for unit in units if unit.since + length > self.now and not unit.has_left]
        least = sum(self._at_least(unit) for unit in live) - self.slack.get(key, 0)
        most = sum(self._at_most(key, unit) for unit in units if unit.at + length + late > self.now)
        return max(least, 0), most

    def _at_least(self, unit: Unit) -> int:
        """Return the amount of a unit that is certainly counted."""
        return 0 if unit.estimate is not None and not unit.estimate.is_held(self.now) else unit.cost

    def _at_most(self, key: CounterKey, unit: Unit, *, seen: bool = False) -> int:
        """Return the largest amount of a unit that may be counted.

        A lapsed estimate refuses nobody, but may be `seen`.
        """
        estimate = unit.estimate
        if estimate is None or seen or not estimate.has_lapsed(self.now):
            return unit.cost + unit.more
        return 0 if self._is_found(estimate, key) else unit.cost + unit.more

    def _is_found(self, estimate: Estimate, key: CounterKey) -> bool:
        """Whether what a charge has counted is found where it was counted."""
        return estimate.steps == self.steps and key not in self.large

    def active(self, key: CounterKey) -> tuple[int, int]:
        """Live leases: at least, at most."""
        live = [lease for lease in self.leases.get(key, {}).values() if lease.expires > self.now]
        return sum(not lease.has_expired for lease in live), len(live)

    def money(self, key: CounterKey) -> tuple[Decimal, Decimal, Decimal]:
        """Spent; held at least, and at most."""
        bills = [bill for bill in self.bills.values() if key in bill.keys]
        spent = sum((bill.counted for bill in bills if bill.counted is not None), Decimal(0))
        held = [bill.holds(self.now) for bill in bills]
        return (
            spent,
            sum((least for least, _ in held), Decimal(0)),
            sum((most for _, most in held), Decimal(0)),
        )

    def _charge(self, counters: list[Counter], needs: list[int], price: int, lease_id: bytes) -> None:
        books: list[CounterKey] = []
        for counter, need in zip(counters, needs, strict=True):
            key = counter_key(counter, self.now)
            if isinstance(counter.limit, Window):
                if not counter.limit.is_metered:
                    unit = Unit(self.now, need)
                    self.units.setdefault(key, []).append(unit)
                    self.charged.setdefault(lease_id, []).append(unit)
            elif isinstance(counter.limit, Slots):
                expires = self.now + int(counter.limit.lease_seconds * SECOND)
                self.leases.setdefault(key, {})[lease_id] = Lease(expires)
            else:
                books.append(key)
        if books:
            leases = [counter.limit.lease_seconds for counter in counters if isinstance(counter.limit, Slots)]
            lease = int(min(leases, default=30) * SECOND)
            self.bills[lease_id] = Bill(books, price * UNIT, lease, *self._lapses(lease))

    def _lapses(self, lease: int) -> tuple[int, int]:
        """Until when an estimate is held that is held or renewed now, and until when at most.

        It lasts to the end of a 32nd of its lease, or beyond what has lapsed before the clock stepped back.
        """
        return self.now + lease, max(self.now + lease + lease // 32, self.latest + 1)

    def _check_status(
        self, counter: Counter, cost: int, price: int, got: Status, admitted: bool, *, charged: bool
    ) -> None:
        limit, key = counter.limit, counter_key(counter, self.now)
        if isinstance(limit, Window):
            assert isinstance(got, WindowStatus)
            self._check_window(limit, key, 0 if admitted else cost, got)
        elif isinstance(limit, Slots):
            assert isinstance(got, SlotStatus)
            least, most = self.active(key)
            if charged and admitted:
                most = max(most, limit.limit)  # a server counts expired ones until the room is needed
            assert least <= got.active <= most
            assert got.is_full == (not admitted and got.active >= limit.limit)
        else:
            assert isinstance(got, BudgetStatus)
            spent, least_held, most_held = self.money(key)
            assert got.spent * UNIT == spent
            assert least_held <= got.held * UNIT <= most_held
            room = got.taken + price <= limit.amount
            assert got.is_short == (not admitted and not room)

    def _check_window(self, limit: Window, key: CounterKey, cost: int, got: WindowStatus) -> None:
        length = limit.seconds * SECOND
        least, most = self.used(key, limit)
        late = length // 1_000 if key in self.large else 0
        counted = [unit for unit in self.units.get(key, []) if unit.at + length + late > self.now]
        assert least <= got.used <= sum(self._at_most(key, unit, seen=True) for unit in counted)
        refused = cost > 0 and got.used + cost > limit.quota
        assert got.refuses == refused
        assert 0 <= got.reset_after_us <= length
        assert got.retry_after_us <= length
        if least != got.used or least != most or key in self.large:
            return
        live = [unit for unit in self.units.get(key, []) if unit.at + length > self.now and unit.cost]
        live = [unit for unit in live if self._at_least(unit)]
        if self.steps and live:  # a charge of before a step back may have joined a later one, or not
            stored = got.reset_after_us - length + self.now
            assert min(unit.since for unit in live) <= stored <= max(unit.at for unit in live)
            return
        assert got.reset_after_us == (live[0].at + length - self.now if live else 0)
        if refused:
            leaves = [unit.at + length for unit in live for _ in range(unit.cost)]
            needed = least + cost - limit.quota
            assert got.retry_after_us == (leaves[needed - 1] - self.now if needed <= len(leaves) else length)

    def _estimate(self, counters: list[Counter], units: dict[str, int], lease_id: bytes) -> None:
        """Count what a charge has estimated of metered units."""
        leases = [counter.limit.lease_seconds for counter in counters if isinstance(counter.limit, Slots)]
        lease = int(min(leases, default=30) * SECOND)
        for counter in counters:
            if not (isinstance(counter.limit, Window) and counter.limit.is_metered):
                continue
            unit = counter.limit.counts
            known = self.estimates.setdefault(lease_id, {})
            if unit not in known:
                amount = units.get(counter.scope, units.get(unit, 0))
                known[unit] = Estimate(amount, lease, self.now + lease, self.steps)
            key = counter_key(counter, self.now)
            entry = Unit(self.now, known[unit].amount, estimate=known[unit])
            self.units.setdefault(key, []).append(entry)
            known[unit].bases.append((key, entry))

    # what follows a charge ----------------------------------------------------------------------

    def knows_units(self, lease_id: bytes) -> bool:
        """Whether the record of a charge lives for sure: a day while anything of it is not settled."""
        known = self.estimates.get(lease_id, {})
        settled = [estimate.settled_at for estimate in known.values() if estimate.settled is not None]
        began = min([estimate.held_until - estimate.lease for estimate in known.values()], default=0)
        return self.latest < began + 86_400 * SECOND and all(self.latest < at + 60 * SECOND for at in settled)

    def settle_units(self, lease_id: bytes, units: dict[str, int], *, replace: bool) -> Settlement:
        """Settle metered units, and return the expected settlement."""
        self._notice_what_is_over()
        known = self.estimates.get(lease_id)
        if known is None:
            return Settlement.UNKNOWN
        met = {self._settle_unit(known[unit], used, replace=replace) for unit, used in units.items()}
        order = (Settlement.DIFFERENT, Settlement.SETTLED, Settlement.REPEATED)
        return next(each for each in order if each in met)

    def _settle_unit(self, estimate: Estimate, used: int, *, replace: bool) -> Settlement:
        if estimate.settled == used:
            return Settlement.REPEATED
        if estimate.settled is not None and not replace:
            return Settlement.DIFFERENT
        for key, extra in estimate.extras:
            self._cut(estimate, key, extra, 0)
        estimate.extras = []
        for key, base in estimate.bases:
            was_sure = estimate.settled is not None or estimate.is_held(self.now)
            before = base.cost + base.more
            if not was_sure:
                base.cost, base.more = 0, before
            base.estimate = None
            above = (max(used - before, 0), max(used - base.cost, 0))
            self._cut(estimate, key, base, used)
            added = Unit(self.now, above[0], more=above[1] - above[0])
            self.units[key].append(added)
            estimate.extras.append((key, added))
        estimate.settled, estimate.settled_at = used, self.now
        return Settlement.SETTLED

    def _cut(self, estimate: Estimate, key: CounterKey, unit: Unit, most: int) -> None:
        """Count at most so much of a unit; it may not be found any more once the clock has stepped back."""
        least, total = min(unit.cost, most), unit.cost + unit.more
        is_found = self._is_found(estimate, key)
        if not is_found:
            self.slack[key] = self.slack.get(key, 0) + total - least
        unit.cost, unit.more = least, (min(total, most) if is_found else total) - least

    def hold_units(self, lease_id: bytes) -> None:
        """Hold estimates until they are settled."""
        self._notice_what_is_over()
        for estimate in self.estimates.get(lease_id, {}).values():
            if not estimate.is_held(self.now):
                self._doubt(estimate)
            estimate.never_lapses = True

    def _doubt(self, estimate: Estimate) -> None:
        """Whether it is counted is unknown from now on: it was given back where somebody had looked."""
        for _, base in estimate.bases if estimate.settled is None else ():
            base.cost, base.more = 0, base.cost + base.more

    def answer(self, lease_id: bytes, counts: Callable[[str], bool | None]) -> None:
        """Decide about units that count requests by their answers; None for any other unit."""
        for unit, estimate in self.estimates.get(lease_id, {}).items():
            if (verdict := counts(unit)) is not None:
                self._settle_unit(estimate, estimate.amount if verdict else 0, replace=False)

    def give_back(self, keys: Iterable[CounterKey], lease_id: bytes) -> None:
        """Undo a charge whose request was refused after all."""
        for unit in self.charged.get(lease_id, []):
            unit.cost = 0
        self.finish(keys, lease_id, EstimateAction.GIVE_BACK)

    def finish_units(self, lease_id: bytes, action: EstimateAction) -> None:
        """End what is not settled."""
        self._notice_what_is_over()
        for estimate in self.estimates.pop(lease_id, {}).values():
            if estimate.settled is not None:
                continue
            if not estimate.is_held(self.now):
                self._doubt(estimate)
            for key, base in estimate.bases:
                base.estimate = None
                if action is EstimateAction.GIVE_BACK:
                    self._cut(estimate, key, base, 0)

    def check_renewed(self, keys: Iterable[CounterKey], lease_id: bytes, lease: float, kept: bool) -> None:
        """Compare the answer to a renewal, and renew."""
        self._notice_what_is_over()
        sure = maybe = True
        for key in keys:
            found = self.leases.get(key, {}).get(lease_id)
            live = found is not None and found.expires > self.now
            sure = sure and live and found is not None and not found.has_expired
            maybe = maybe and live
            if found is None:
                continue
            if live:
                # Of a reservation that is lost, a slot may be left: it was renewed, if it was not forgotten.
                found.expires = self.now + int(lease * SECOND)
                found.has_expired = found.has_expired and not kept
            else:
                del self.leases[key][lease_id]
        assert kept or not sure
        assert maybe or not kept
        for estimate in self.estimates.get(lease_id, {}).values():
            if not estimate.has_lapsed(self.now):
                estimate.held_until = self.now + estimate.lease
        bill = self.bills.get(lease_id)
        if bill is None or bill.never_lapses:
            return
        if self.now >= bill.lapsed_from:
            bill.held_until = bill.lapsed_from = 0
        else:
            bill.held_until, bill.lapsed_from = self._lapses(bill.lease)

    def hold_estimate(self, lease_id: bytes) -> None:
        """Hold an estimate until it is settled."""
        self.bills[lease_id].never_lapses = True

    def can_be_settled(self, lease_id: bytes) -> bool:
        """Whether an amount that was settled before can still be replaced."""
        bill = self.bills[lease_id]
        return not bill.is_settled or self.latest < bill.settled_at + 86_400 * SECOND

    def finish(self, keys: Iterable[CounterKey], lease_id: bytes, action: EstimateAction) -> None:
        """Free the slots and decide about the estimate."""
        for key in keys:
            self.leases.get(key, {}).pop(lease_id, None)
        if action is not EstimateAction.UNTOUCHED:
            self.finish_units(lease_id, action)
        bill = self.bills.get(lease_id)
        if bill is not None and action is not EstimateAction.UNTOUCHED and not bill.is_closed:
            bill.is_closed = True
            if bill.counted is None:
                bill.counted = bill.estimate if action is EstimateAction.KEEP else Decimal(0)

    def settle(self, lease_id: bytes, amount: int, *, replace: bool) -> Settlement:
        """Settle a bill; return the result that settling meets."""
        bill = self.bills.get(lease_id)
        if bill is None or bill.is_closed:
            return Settlement.UNKNOWN
        if bill.is_settled and bill.counted == amount * UNIT:
            return Settlement.REPEATED
        if bill.is_settled and not replace:
            return Settlement.DIFFERENT
        bill.settled_at = bill.settled_at if bill.is_settled else self.now
        bill.counted, bill.is_settled = amount * UNIT, True
        return Settlement.SETTLED

    def edges(self) -> list[int]:
        """Moments at which something changes: a unit leaves, a lease expires, a day begins somewhere."""
        moments = {lease.expires for leases in self.leases.values() for lease in leases.values()}
        for bill in self.bills.values():
            moments |= {bill.held_until, bill.lapsed_from}
        moments |= {each.held_until for known in self.estimates.values() for each in known.values()}
        for key, units in self.units.items():
            moments |= {unit.at + int(key[-1]) * SECOND for unit in units}
        day = EPOCH + timedelta(microseconds=self.now)
        midnight = day.replace(hour=0, minute=0, second=0, microsecond=0)
        offsets = [-13 * 60, -120, -60, 0, 4 * 60, 5 * 60, 18 * 60 + 15, 24 * 60]
        moments |= {
            (midnight + timedelta(minutes=offset) - EPOCH) // timedelta(microseconds=1) for offset in offsets
        }
        return sorted(moment for moment in moments if moment > self.now)


def need_of(counter: Counter, cost: int, units: dict[str, int]) -> int:
    """Return the amount a limit must have left: the cost; for a metered unit the estimate, at least 1.

    A limit in code has a cost of its own, by its scope.
    """
    limit = counter.limit
    if isinstance(limit, Window) and limit.is_metered:
        return max(units.get(counter.scope, units.get(limit.counts, 0)), 1)
    return units.get(counter.scope, cost)


def counter_key(counter: Counter, now: int) -> CounterKey:
    """Return the key that a limit is counted under at a time."""
    limit = counter.limit
    if isinstance(limit, Allowance):
        local = (EPOCH + timedelta(microseconds=now)).astimezone(ZoneInfo(limit.timezone))
        label = f"{local:%Y-%m-%d}" if limit.period == "daily" else f"{local:%Y-%m}"
        return counter.partition, limit.currency, label
    if isinstance(limit, Slots):
        return counter.partition, counter.scope
    return counter.partition, counter.scope, str(limit.seconds)
