"""A brute-force limiter: plain lists of everything ever admitted, looked through for every answer.

Written from the rules alone. Where two answers are right, it knows both ends: what a backend may have
forgotten when its clock steps back, and how much later a unit of a large quota may leave its window.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

from ratelimit_mw._internal.model.charge import Counter, EstimateAction, Outcome, Settlement
from ratelimit_mw._internal.model.limits import SECOND, Allowance, Slots, Window
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, Status, WindowStatus

EXACT = 1_000
"""Quotas above it may remember a unit a thousandth of the window longer."""
UNIT = Decimal("0.000001")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Place = tuple[str, ...]


@dataclass
class Unit:
    """A charge on a window."""

    at: int
    cost: int
    has_left: bool = False
    """Seen outside the window: it may be forgotten, though the clock should step back."""


@dataclass
class Lease:
    """A slot held under an id."""

    expires: int
    has_expired: bool = False
    """Seen expired: the same."""


@dataclass
class Bill:
    """A priced charge, in the books of its periods until it is settled or closed."""

    places: list[Place]
    estimate: Decimal
    lease: int
    held_until: int
    """Until when its estimate is held for sure, unless it is kept."""
    lapsed_from: int
    """From when on it is not held any more for sure."""
    may_have_lapsed: bool = False
    """Seen at a time at which it may not be held: it may be given back, though the clock should step back."""
    is_kept: bool = False
    counted: Decimal | None = None
    """The price, once it is known or decided; what is not counted is held."""
    is_settled: bool = False
    settled_at: int = 0
    is_closed: bool = False

    def holds(self, now: int) -> tuple[Decimal, Decimal]:
        """What it holds: at least, at most."""
        if self.counted is not None or self.is_closed:
            return Decimal(0), Decimal(0)
        if self.is_kept:
            return self.estimate, self.estimate
        surely = now < self.held_until and not self.may_have_lapsed
        maybe = surely or now < self.lapsed_from
        return self.estimate * surely, self.estimate * maybe


@dataclass
class Oracle:
    """Everything admitted so far, and the only clock."""

    now: int
    units: dict[Place, list[Unit]] = field(default_factory=dict)
    leases: dict[Place, dict[bytes, Lease]] = field(default_factory=dict)
    bills: dict[bytes, Bill] = field(default_factory=dict)
    latest: int = 0
    """The latest time that the clock has ever shown."""
    large: set[Place] = field(default_factory=set)
    """Windows that were ever under a quota above `EXACT`."""

    # charges ------------------------------------------------------------------------------------

    def check(
        self, counters: list[Counter], cost: int, price: int, lease_id: bytes | None, got: Outcome
    ) -> None:
        """Compare an answer with what it has to be, and count the charge if it was admitted."""
        self._notice_what_is_over()
        fits = [self.fits(counter, cost, price) for counter in counters]
        if all(sure for sure, _ in fits):
            assert got.admitted
        if not all(maybe for _, maybe in fits):
            assert not got.admitted
        assert got.now == self.now
        if got.admitted and lease_id is not None:
            self._charge(counters, cost, price, lease_id)
        for place, counter in enumerate(counters):
            status = got.status(place, counter.limit)
            self._check_status(counter, cost, price, status, got.admitted, charged=lease_id is not None)

    def _notice_what_is_over(self) -> None:
        """Whoever charges anything may have a backend forget what is over by now, wherever it was counted."""
        for place, units in self.units.items():
            for unit in units:
                unit.has_left = unit.has_left or unit.at + int(place[-1]) * SECOND <= self.now
        for leases in self.leases.values():
            for lease in leases.values():
                lease.has_expired = lease.has_expired or lease.expires <= self.now
        self.latest = max(self.latest, self.now)
        for bill in self.bills.values():
            bill.may_have_lapsed = bill.may_have_lapsed or bill.held_until <= self.now

    def fits(self, counter: Counter, cost: int, price: int) -> tuple[bool, bool]:
        """Whether a limit has room for sure, and whether it may have."""
        limit, place = counter.limit, place_of(counter, self.now)
        if isinstance(limit, Window):
            least, most = self.used(place, limit)
            return most + cost <= limit.quota, least + cost <= limit.quota
        if isinstance(limit, Slots):
            least, most = self.active(place)
            return most < limit.limit, least < limit.limit
        spent, least_held, most_held = self.money(place)
        left = limit.amount * UNIT - spent - price * UNIT
        return most_held <= left, least_held <= left

    def used(self, place: Place, limit: Window) -> tuple[int, int]:
        """Units in the window: at least, at most."""
        length = limit.seconds * SECOND
        if limit.quota > EXACT:
            self.large.add(place)
        late = length // 1_000 if place in self.large else 0
        for unit in self.units.get(place, []):
            unit.at = min(unit.at, self.now)
        units = self.units.get(place, [])
        least = sum(unit.cost for unit in units if unit.at + length > self.now and not unit.has_left)
        return least, sum(unit.cost for unit in units if unit.at + length + late > self.now)

    def active(self, place: Place) -> tuple[int, int]:
        """Live leases: at least, at most."""
        live = [lease for lease in self.leases.get(place, {}).values() if lease.expires > self.now]
        return sum(not lease.has_expired for lease in live), len(live)

    def money(self, place: Place) -> tuple[Decimal, Decimal, Decimal]:
        """Spent; held at least, and at most."""
        bills = [bill for bill in self.bills.values() if place in bill.places]
        spent = sum((bill.counted for bill in bills if bill.counted is not None), Decimal(0))
        held = [bill.holds(self.now) for bill in bills]
        return (
            spent,
            sum((least for least, _ in held), Decimal(0)),
            sum((most for _, most in held), Decimal(0)),
        )

    def _charge(self, counters: list[Counter], cost: int, price: int, lease_id: bytes) -> None:
        books: list[Place] = []
        for counter in counters:
            place = place_of(counter, self.now)
            if isinstance(counter.limit, Window):
                self.units.setdefault(place, []).append(Unit(self.now, cost))
            elif isinstance(counter.limit, Slots):
                expires = self.now + int(counter.limit.lease * SECOND)
                self.leases.setdefault(place, {})[lease_id] = Lease(expires)
            else:
                books.append(place)
        if books:
            leases = [counter.limit.lease for counter in counters if isinstance(counter.limit, Slots)]
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
        limit, place = counter.limit, place_of(counter, self.now)
        if isinstance(limit, Window):
            assert isinstance(got, WindowStatus)
            self._check_window(limit, place, 0 if admitted else cost, got)
        elif isinstance(limit, Slots):
            assert isinstance(got, SlotStatus)
            least, most = self.active(place)
            if charged and admitted:
                most = max(most, limit.limit)  # a server counts expired ones until the room is needed
            assert least <= got.active <= most
            assert got.is_full == (not admitted and got.active >= limit.limit)
        else:
            assert isinstance(got, BudgetStatus)
            spent, least_held, most_held = self.money(place)
            assert got.spent * UNIT == spent
            assert least_held <= got.held * UNIT <= most_held
            room = got.taken + price <= limit.amount
            assert got.is_short == (not admitted and not room)

    def _check_window(self, limit: Window, place: Place, cost: int, got: WindowStatus) -> None:
        length = limit.seconds * SECOND
        least, most = self.used(place, limit)
        assert least <= got.used <= most
        refused = cost > 0 and got.used + cost > limit.quota
        assert got.refuses == refused
        assert 0 <= got.reset_after_us <= length
        assert got.retry_after_us <= length
        if least != most or place in self.large:
            return
        live = [unit for unit in self.units.get(place, []) if unit.at + length > self.now]
        assert got.reset_after_us == (live[0].at + length - self.now if live else 0)
        if refused:
            leaves = [unit.at + length for unit in live for _ in range(unit.cost)]
            needed = least + cost - limit.quota
            assert got.retry_after_us == (leaves[needed - 1] - self.now if needed <= len(leaves) else length)

    # what follows a charge ----------------------------------------------------------------------

    def check_renewed(self, places: Iterable[Place], lease_id: bytes, lease: float, kept: bool) -> None:
        """Compare the answer to a renewal, and renew."""
        self._notice_what_is_over()
        sure = maybe = True
        for place in places:
            found = self.leases.get(place, {}).get(lease_id)
            live = found is not None and found.expires > self.now
            sure = sure and live and found is not None and not found.has_expired
            maybe = maybe and live
            if found is None:
                continue
            if live:
                # Of a hold that is lost, a slot may be left: it was renewed, if it was not forgotten.
                found.expires = self.now + int(lease * SECOND)
                found.has_expired = found.has_expired and not kept
            else:
                del self.leases[place][lease_id]
        assert kept or not sure
        assert maybe or not kept
        bill = self.bills.get(lease_id)
        if bill is None or bill.is_kept:
            return
        if self.now >= bill.lapsed_from:
            bill.held_until = bill.lapsed_from = 0
        else:
            bill.held_until, bill.lapsed_from = self._lapses(bill.lease)

    def keep(self, lease_id: bytes) -> None:
        """Hold an estimate until it is settled."""
        self.bills[lease_id].is_kept = True

    def can_be_settled(self, lease_id: bytes) -> bool:
        """Whether an amount that was settled before can still be replaced."""
        bill = self.bills[lease_id]
        return not bill.is_settled or self.latest < bill.settled_at + 86_400 * SECOND

    def finish(self, places: Iterable[Place], lease_id: bytes, money: EstimateAction) -> None:
        """Free the slots and decide about the estimate."""
        for place in places:
            self.leases.get(place, {}).pop(lease_id, None)
        bill = self.bills.get(lease_id)
        if bill is not None and money is not EstimateAction.UNTOUCHED and not bill.is_closed:
            bill.is_closed = True
            if bill.counted is None:
                bill.counted = bill.estimate if money is EstimateAction.KEEP else Decimal(0)

    def settle(self, lease_id: bytes, amount: int, *, replace: bool) -> Settlement:
        """What settling meets."""
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
        for place, units in self.units.items():
            moments |= {unit.at + int(place[-1]) * SECOND for unit in units}
        day = EPOCH + timedelta(microseconds=self.now)
        midnight = day.replace(hour=0, minute=0, second=0, microsecond=0)
        offsets = [-13 * 60, -120, -60, 0, 4 * 60, 5 * 60, 18 * 60 + 15, 24 * 60]
        moments |= {
            (midnight + timedelta(minutes=offset) - EPOCH) // timedelta(microseconds=1) for offset in offsets
        }
        return sorted(moment for moment in moments if moment > self.now)


def place_of(counter: Counter, now: int) -> Place:
    """Where a limit is counted at a time."""
    limit = counter.limit
    if isinstance(limit, Allowance):
        local = (EPOCH + timedelta(microseconds=now)).astimezone(ZoneInfo(limit.timezone))
        label = f"{local:%Y-%m-%d}" if limit.period == "daily" else f"{local:%Y-%m}"
        return counter.partition, limit.currency, label
    if isinstance(limit, Slots):
        return counter.partition, counter.scope
    return counter.partition, counter.scope, str(limit.seconds)
