"""Tokens by which a lease goes from the request to the workers after it."""

import base64
import hashlib
import hmac
import time
from typing import Annotated, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.limits import UNIT_SECONDS, Window
from ratelimit_mw._internal.model.metered import MAX_AMOUNT, Meter
from ratelimit_mw._internal.model.reservation import Reservation, ReservationKey
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.policy import Policy

MAX_TTL = 30 * 86_400
"""The longest that a detached slot can wait for a worker, in seconds."""

_VERSION = "rl1"
_MAC_SIZE = 16
_MAX_KEYS = 16
_MAX_WINDOWS = 32

_NOTHING = Charge(())
JOB = Policy(
    identity=Identity("", ""),
    route=None,
    charge=_NOTHING,
    priced_charge=_NOTHING,
    price=None,
    currency=None,
    too_small=None,
    on_failure="allow",
    on_failure_priced="allow",
    shadow=False,
    is_exempt=True,
    prefetch_state=None,
)
"""Policy of a lease that is known by its token alone: nothing limits it any more."""


class LeaseError(ValueError):
    """A token that is damaged, forged or of another secret, or a ttl or amount that is not one."""


class Ticket(NamedTuple):
    """Contents of a lease token."""

    reservation: Reservation
    give_up_at: float | None = None
    """Time to give the slots up, by this process's `time.monotonic`."""
    money: Reservation | None = None
    """Estimate of money, where it has an id of its own; `reservation` has none then."""


def check_ttl(ttl: object) -> float:
    """A ttl in seconds, or `LeaseError`."""
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= MAX_TTL:
        raise LeaseError(f"ttl must be a positive number of seconds, at most {MAX_TTL}, not {ttl!r}")
    return float(ttl)


def write_token(ticket: Ticket, secret: str) -> str:
    """A ticket as an opaque string, signed under `secret`; without one it only has a checksum."""
    reservation, money = ticket.reservation, ticket.money or ticket.reservation
    fields = _Fields(
        i=reservation.id.hex(),
        s=tuple(held[:2] for held in reservation.slots),
        b=tuple(tuple(held) for held in money.periods),
        l=reservation.lease_seconds,
        p=money.price,
        c=money.currency,
        g=None if ticket.give_up_at is None else ticket.give_up_at - time.monotonic() + time.time(),
        u=tuple(_meter_fields(*each) for each in zip(reservation.meters, reservation.estimates, strict=True)),
        m=None if ticket.money is None else money.id.hex(),
    )
    # As other versions write and read it.
    left_out = {name for name, value in (("u", reservation.meters), ("m", ticket.money)) if not value}
    payload = _encode(fields.model_dump_json(exclude=left_out).encode())
    return f"{_VERSION}.{payload}.{_encode(_mac(payload, secret))}"


def read_token(token: object, secret: str) -> Ticket:
    """The ticket in a token. Raises `LeaseError` where it is damaged, forged or of another secret."""
    if not isinstance(token, str):
        raise LeaseError(f"a lease token must be a string, not {type(token).__name__}")
    parts = token.split(".")
    if len(parts) != 3 or parts[0] != _VERSION:
        raise LeaseError("this is not a lease token")
    try:
        if hmac.compare_digest(_decode(parts[2]), _mac(parts[1], secret)):
            # Checked also when genuine: without a secret anybody can write a checksum.
            return _ticket(_Fields.model_validate_json(_decode(parts[1])))
    except ValueError:  # no base64, no text, or not these fields
        pass
    raise LeaseError("the lease token is damaged, forged or signed under another hash_secret")


_WindowFields = tuple[
    Annotated[int, Field(ge=1)],
    Annotated[int, Field(ge=1)],
    Annotated[str, Field(pattern=f"^({'|'.join(UNIT_SECONDS)})$")],
]
"""A window's quota, multiple and unit of time."""
_MeterFields = tuple[
    str,
    str,
    str,
    Annotated[tuple[_WindowFields, ...], Field(min_length=1, max_length=_MAX_WINDOWS)],
    Annotated[int, Field(ge=0, le=MAX_AMOUNT)],
]
"""A meter's partition, scope, unit, windows and estimate."""


class _Fields(BaseModel):
    """The payload of a token, under short names since tokens go into queues and databases."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)

    i: Annotated[str, Field(pattern="^([0-9a-f]{32})?$")]
    """The lease's id."""
    s: Annotated[tuple[tuple[str, str], ...], Field(max_length=_MAX_KEYS)]
    """Slots: partition and scope of each."""
    b: Annotated[tuple[tuple[str, str, int], ...], Field(max_length=_MAX_KEYS)]
    """Periods: partition, scope and end of each."""
    l: Annotated[float, Field(ge=0)]  # noqa: E741
    """Seconds that the slots last past a renewal."""
    p: Annotated[int, Field(ge=0)]
    """The estimate, in units of the currency."""
    c: str
    """The currency."""
    g: float | None
    """Time to give the slots up, in seconds since 1970: the one clock that machines have in common."""
    u: Annotated[tuple[_MeterFields, ...], Field(max_length=_MAX_KEYS)] = ()
    """Metered units."""
    m: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = None
    """The id of the estimate of money, where that is another than the lease's."""


def _meter_fields(meter: Meter, estimate: int) -> _MeterFields:
    windows = [(each.whole or each.quota, each.multiple, each.unit) for each in meter.windows]
    return (meter.partition, meter.scope, meter.unit, tuple(windows), estimate)


def _meter(fields: _MeterFields) -> Meter:
    partition, scope, unit, windows, _ = fields
    return Meter(partition, scope, unit, tuple([Window(*each, unit) for each in windows]))


def _ticket(fields: _Fields) -> Ticket:
    periods, money = tuple(ReservationKey(*held) for held in fields.b), None
    if fields.m is not None:
        money = Reservation(bytes.fromhex(fields.m), (), periods, fields.l, fields.p, fields.c)
    reservation = Reservation(
        bytes.fromhex(fields.i),
        tuple(ReservationKey(*held) for held in fields.s),
        periods if money is None else (),
        fields.l,
        fields.p if money is None else 0,
        fields.c,
        tuple(_meter(each) for each in fields.u),
        tuple(each[4] for each in fields.u),
    )
    return Ticket(reservation, None if fields.g is None else fields.g - time.time() + time.monotonic(), money)


def _mac(payload: str, secret: str) -> bytes:
    if secret:
        # A key of its own, so that no token doubles as the hash of an API key.
        return hmac.digest(b"lease:" + secret.encode(), payload.encode(), "sha256")[:_MAC_SIZE]
    return hashlib.sha256(payload.encode()).digest()[:_MAC_SIZE]


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    """The bytes of which `_encode` makes this text. Raises ValueError where it makes another, or none."""
    data = base64.b64decode(text.encode() + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if _encode(data) != text:
        raise ValueError("another text stands for these bytes")
    return data
