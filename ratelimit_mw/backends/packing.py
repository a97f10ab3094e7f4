"""How charges and other operations are packed for the script `batch.lua`, and what its answers mean.

Whatever of a charge never changes is packed once; what charges have in common, once for all of them.
"""

import struct
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain, repeat

from ratelimit_mw.backends.operations import Operation, Template, bulk, done
from ratelimit_mw.charge import LEASE_ID_SIZE, Charge, Money, Settlement
from ratelimit_mw.limits import SECOND, Limit, Slots, Window

LIMIT = struct.Struct("<cddd")
ACQUIRE = struct.Struct("<cBddd")
FINISH = struct.Struct("<cBBdd")
ID = struct.Struct(f"{LEASE_ID_SIZE}s")
RENEW = struct.Struct("<c16sdB")
SETTLE = struct.Struct("<c16sdBB")
SLOT = LIMIT.pack(b"C", 0, 0, 0)
REFUSED, ADMITTED, OTHER_PERIOD = 0, 1, 2
"""What became of a charge: with the last one the server's time lies outside a period that it names."""
_OVER = bytes([OTHER_PERIOD])


class Packed(Template):
    """A charge without a price, as it is sent; and what its answers mean."""

    __slots__ = ("layout", "owner", "release")

    def __init__(self, owner: object, layout: "Layout", charge: Charge) -> None:
        like, keys = layout.template, layout.keys
        super().__init__(keys.of(charge), like.n_keys, layout.body, LEASE_ID_SIZE, like.unpack, like.head)
        self.steps = layout.steps
        self.charges = keys.only_partition_of(charge)
        self.owner = owner
        """The backend that packed it."""
        self.layout = layout
        self.release: Template | None = None

    def unpack_several(self, answer: bytes, number: int) -> Iterable[tuple[int, ...]]:
        """What each charge would have been told alone, in its turn: whether it is admitted, its figures."""
        *numbers, admitted = self.layout.answer_of_several.unpack(answer)
        if admitted > number or numbers[0] != (ADMITTED if admitted else REFUSED):
            raise ValueError(f"{admitted} of {number} charges admitted, and {numbers[0]} for the first")
        columns: list[Iterable[int]] = [repeat(ADMITTED, admitted)]
        for place, step in enumerate(self.layout.steps):
            used, reset_after, _ = numbers[3 * place + 1 : 3 * place + 4]
            columns += (range(used - (admitted - 1) * step, used + 1, step), repeat(reset_after), repeat(0))
        return chain(zip(*columns, strict=False), repeat((REFUSED, *numbers[1:]), number - admitted))


class Layout:
    """What charges have in common that differ in their partitions alone."""

    def __init__(
        self, charge: Charge, keys: "tuple[Keys, Keys]", limits: bytes, since: int, until: int
    ) -> None:
        self.keys, self.slot_keys = keys
        self.limits = limits
        self.since = since
        self.until = until
        n_keys, kind = len(charge.counters), b"T" if charge.ahead else b"A"
        body = ACQUIRE.pack(kind, n_keys, charge.cost, charge.ahead, 0) + limits
        answer = struct.Struct("<B" + "qqq" * n_keys)
        self.steps = charge.steps
        self.template = Template(b"", n_keys, body, LEASE_ID_SIZE, self.read)
        self.body = body
        self._answer = answer
        self.answer_of_several = struct.Struct(answer.format + "H")
        self._may_be_late = bool(charge.allowances)

    def read(self, answer: bytes) -> tuple[int, ...]:
        """Read what one charge was told: whether it is admitted, and figures unless its period is over."""
        if self._may_be_late and answer == _OVER:
            return (OTHER_PERIOD,)
        numbers = self._answer.unpack(answer)
        if numbers[0] not in (REFUSED, ADMITTED):
            raise ValueError(f"{numbers[0]} says neither that a charge is admitted nor that it is refused")
        return numbers


class Keys:
    """The keys of charges that differ in their partitions alone, as they are sent."""

    def __init__(self, prefix: bytes, places: Iterable[tuple[str, str]]) -> None:
        self._text = b""
        self._places: list[tuple[str, int]] = []
        for partition, suffix in places:
            before, after = prefix + b"{", b"}:" + suffix.encode("utf-8", "surrogatepass")
            parts = [part.replace(b"%", b"%%") for part in (before, after)]
            self._text += b"$%d\r\n" + b"%b".join(parts) + b"\r\n"
            self._places.append((partition, len(before + after)))

    def of(self, charge: Charge) -> bytes:
        """Those of one of the charges."""
        last, tag, filled = None, b"", list[int | bytes]()
        for partition, size in self._places:
            if partition != last:
                last, tag = partition, tag_of(charge.partition_of(partition))
            filled += (size + len(tag), tag)
        return self._text % tuple(filled)

    def only_partition_of(self, charge: Charge) -> str | None:
        """The partition of all of them, None where there are several."""
        partition, *others = {partition for partition, _ in self._places} or {""}
        return None if others else charge.partition_of(partition)


def operation_on(keys: list[bytes], body: bytes, unpack: Callable[[bytes], object] = done) -> Operation:
    """An operation that is like no other."""
    return Operation(Template(b"".join(map(bulk, keys)), len(keys), body, 0, unpack))


def read_renewal(slots: int, answer: bytes) -> bool:
    """Read what a renewal of so many slots was told: whether it still has all of them."""
    if len(answer) != slots or answer.strip(b"\0\1"):
        raise ValueError(f"{answer!r} says nothing about {slots} slots")
    return b"\0" not in answer


def read_settlement(answer: bytes) -> Settlement:
    """Read what a settle has met."""
    (met,) = answer
    return Settlement(met)


def pack_limit(limit: Limit) -> bytes:
    """A window or slots, as the script reads them. Raises TypeError for an allowance."""
    if isinstance(limit, Window):
        return LIMIT.pack(b"W", limit.quota, limit.length, limit.granule)
    if isinstance(limit, Slots):
        return LIMIT.pack(b"C", limit.limit, int(limit.lease * SECOND), 0)
    raise TypeError(f"an allowance is packed with its period: {limit!r}")


def release_template(keys: bytes, slots: int) -> Template:
    """All of a release of slots under these keys but the id of the lease."""
    body, head = _release(slots)
    template = Template(keys, slots, body, LEASE_ID_SIZE, head=head)
    template.charges = ""
    return template


@lru_cache(maxsize=16)
def _release(slots: int) -> tuple[bytes, bytes]:
    """The body of a release of so many slots, up to the id; the same as an argument."""
    body = FINISH.pack(b"F", slots, Money.UNTOUCHED.value, 0, 0) + SLOT * slots
    return body, Template(b"", slots, body, LEASE_ID_SIZE).head


def tag_of(partition: str) -> bytes:
    """A partition as the hash tag of Redis Cluster, which must not hold a brace of its own."""
    tag = partition.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")
    return tag.encode("utf-8", "surrogatepass")
