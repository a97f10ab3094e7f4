"""Names of the keys in Redis: the namespace, a partition as hash tag, and what is kept under it."""

from collections.abc import Iterable
from functools import lru_cache

from ratelimit_mw._internal.model.charge import Charge, Counter, period_key
from ratelimit_mw._internal.model.limits import Slots, Window
from ratelimit_mw._internal.model.metered import Meter
from ratelimit_mw._internal.model.reservation import LEASE_ID_SIZE, Reservation

_MAX_TAGS = 4_096
"""Partitions whose tag is remembered."""


class KeyNames:
    """The names of keys under one prefix."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix

    def name(self, partition: str, suffix: str) -> bytes:
        """Name the key of a partition that ends so."""
        return b"%b{%b}:%b" % (self._prefix, tag_of(partition), suffix.encode("utf-8", "surrogatepass"))

    def of_counter(self, counter: Counter, now: int) -> bytes:
        """Name the key that a limit is counted in at `now`."""
        return self.name(counter.partition, suffix_of(counter, now))

    def of_slots(self, reservation: Reservation) -> list[bytes]:
        """Name the slot sets that a reservation has a slot of."""
        return [self.name(held.partition, f"s:{held.scope}") for held in reservation.slots]

    def of_periods(self, reservation: Reservation) -> list[bytes]:
        """Name the periods that a reservation has an amount in."""
        return [self.name(held.partition, f"b:{held.scope}") for held in reservation.periods]

    def of_open(self, meter: Meter) -> bytes:
        """Name the estimates of a meter that may lapse."""
        return self.name(meter.partition, f"e:{meter.open_scope}")

    def of_windows(self, meter: Meter) -> list[bytes]:
        """Name the windows of a meter."""
        return [self.name(meter.partition, f"w:{meter.scope}:{each.seconds}") for each in meter.windows]

    def of_record(self, reservation: Reservation) -> bytes:
        """Name the record of what a reservation with periods estimated and settled."""
        return self.name(reservation.periods[0].partition, f"r:{reservation.id.hex()}")

    def record_argument(self, partition: str, kind: str = "r") -> bytes:
        """A record's key as an argument in the Redis protocol, up to the lease's id in hexadecimal digits.

        It is of money, or of units where the `kind` is `u`.
        """
        name = self.name(partition, f"{kind}:")
        return b"$%d\r\n%b" % (len(name) + 2 * LEASE_ID_SIZE, name)


class ChargeKeys:
    """The keys of charges that differ in their partitions alone, as they are sent."""

    def __init__(self, prefix: bytes, names: Iterable[tuple[str, str]]) -> None:
        """`names` are partition and suffix of each key."""
        self._text = b""
        self._sizes: list[tuple[str, int]] = []
        for partition, suffix in names:
            before, after = prefix + b"{", b"}:" + suffix.encode("utf-8", "surrogatepass")
            parts = [part.replace(b"%", b"%%") for part in (before, after)]
            self._text += b"$%d\r\n" + b"%b".join(parts) + b"\r\n"
            self._sizes.append((partition, len(before + after)))

    def for_charge(self, charge: Charge) -> bytes:
        """Return the keys of one of the charges, as arguments in the Redis protocol."""
        last, tag, filled = None, b"", list[int | bytes]()
        for partition, size in self._sizes:
            if partition != last:
                last, tag = partition, tag_of(charge.partition_of(partition))
            filled += (size + len(tag), tag)
        return self._text % tuple(filled)

    def only_partition_of(self, charge: Charge) -> str | None:
        """The partition of all of them, None where there are several."""
        partition, *others = {partition for partition, _ in self._sizes} or {""}
        return None if others else charge.partition_of(partition)


def suffix_of(counter: Counter, now: int) -> str:
    """The end of the name of the key that a limit is counted in at `now`."""
    limit = counter.limit
    if isinstance(limit, Window):
        return f"w:{counter.scope}:{limit.seconds}"
    if isinstance(limit, Slots):
        return f"s:{counter.scope}"
    return f"b:{period_key(counter, now).scope}"


@lru_cache(maxsize=_MAX_TAGS)
def tag_of(partition: str) -> bytes:
    """A partition as the hash tag of Redis Cluster, which must not hold a brace of its own."""
    tag = partition.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")
    return tag.encode("utf-8", "surrogatepass")
