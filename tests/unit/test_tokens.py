"""Tokens of detached jobs: opaque, signed, and safe to keep in a queue or a database."""

import base64
import hashlib
import json
import re
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_mw import LeaseError
from ratelimit_mw._internal.lease.token import MAX_TTL, Ticket, check_ttl, read_token, write_token
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, Reservation, ReservationKey

HOLD = Reservation(
    bytes(range(16)),
    (ReservationKey("k:0123", "p"), ReservationKey("app", "app")),
    (ReservationKey("k:0123", "USD:2026-11-21", 1_795_305_600_000_000),),
    30.0,
    20_000,
    "USD",
)
TICKET = Ticket(HOLD)
ONE_SLOT = (ReservationKey("k:0123", "p"),)
ALPHABET = string.ascii_letters + string.digits + "-_"


def checksummed(payload: bytes) -> str:
    """A token that anybody can write where there is no secret."""
    text = base64.urlsafe_b64encode(payload).rstrip(b"=")
    mac = base64.urlsafe_b64encode(hashlib.sha256(text).digest()[:16]).rstrip(b"=")
    return f"rl1.{text.decode()}.{mac.decode()}"


def fields_of(token: str) -> dict[str, object]:
    """Return the fields of a token."""
    payload = token.split(".")[1]
    return dict(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))))


@pytest.mark.parametrize("secret", ["", "secret"])
@pytest.mark.parametrize("reservation", [HOLD, NO_RESERVATION, Reservation(HOLD.id, ONE_SLOT, (), 1.5)])
def test_a_token_gives_back_what_it_was_made_of(reservation: Reservation, secret: str) -> None:
    """A reservation of any kind survives the way through a queue."""
    assert read_token(write_token(Ticket(reservation), secret), secret) == Ticket(reservation)


@pytest.mark.parametrize("reservation", [NO_RESERVATION, Reservation(HOLD.id, ONE_SLOT, (), 1.5)])
def test_an_estimate_with_an_id_of_its_own_goes_with_the_token(reservation: Reservation) -> None:
    """An estimate that was opened while the backend was away has another id than the slot beside it."""
    money = Reservation(bytes(range(16, 32)), (), HOLD.periods, reservation.lease_seconds, 0, "EUR")
    found = read_token(write_token(Ticket(reservation, None, money), "s"), "s")
    assert (found.money, found.reservation.id, found.reservation.slots) == (
        money,
        reservation.id,
        reservation.slots,
    )
    assert found.reservation.periods == ()
    assert "m" not in fields_of(write_token(TICKET, "s"))


def test_a_token_is_safe_in_urls_queues_and_databases() -> None:
    """Letters, digits, `-`, `_` and `.` alone, and short enough for any column."""
    token = write_token(TICKET, "secret")
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,512}", token)


def test_the_same_lease_makes_the_same_token() -> None:
    """Nothing random is added."""
    assert write_token(TICKET, "secret") == write_token(TICKET, "secret")


@given(
    number=st.integers(0, 40),
    partition=st.text(max_size=40),
    price=st.integers(0, 10**15),
    lease=st.floats(1, 1e8, allow_nan=False),
)
def test_any_hold_survives(number: int, partition: str, price: int, lease: float) -> None:
    """Partitions are any text, and amounts are exact."""
    reservation = Reservation(
        number.to_bytes(16, "big"),
        (ReservationKey(partition, "p"),),
        (ReservationKey(partition, "USD:x", 1),),
        lease,
        price,
    )
    try:
        partition.encode()
    except UnicodeEncodeError:
        return  # no partition holds a lone surrogate: they are made of hashes and plain names
    assert read_token(write_token(Ticket(reservation), "s"), "s").reservation == reservation


def test_the_time_to_give_up_goes_with_the_token() -> None:
    """`max_hold` goes on while a job waits and when another process has it."""
    give_up_at = time.monotonic() + 100
    found = read_token(write_token(Ticket(HOLD, give_up_at), "s"), "s").give_up_at
    assert found == pytest.approx(give_up_at, abs=0.5)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "rl1",
        "rl1..",
        "rl1.a.b",
        "rl2.a.b",
        "rl1.é.é",
        "rl1.\ud800.\ud800",
        "....",
        "rl1.a.b.c",
        "x" * 10_000,
        None,
        1,
        b"rl1.a.b",
        True,
    ],
)
def test_what_is_no_token_is_a_lease_error(token: object) -> None:
    """Anything at all may come out of a queue."""
    with pytest.raises(LeaseError):
        read_token(token, "secret")


@pytest.mark.parametrize("secret", ["", "secret"])
def test_a_token_damaged_anywhere_is_a_lease_error(secret: str) -> None:
    """Each character counts: changed, lost or added."""
    token = write_token(TICKET, secret)
    for at in range(len(token) - 1):
        other = "A" if token[at] != "A" else "B"
        for damaged in (token[:at] + other + token[at + 1 :], token[:at] + token[at + 1 :], token[:at]):
            with pytest.raises(LeaseError):
                read_token(damaged, secret)
    with pytest.raises(LeaseError):
        read_token(token + "AAAA", secret)


@pytest.mark.parametrize("secret", ["", "secret"])
def test_no_two_texts_are_one_token(secret: str) -> None:
    """Bits beyond the last byte, padding, the other alphabet, blanks: of all spellings one is the token's."""
    refused = 0
    for partition in ("k:0", "k:01", "k:012", "k:>>>???>>>???"):
        token = write_token(
            Ticket(HOLD.with_keys((ReservationKey(partition, "p"),), HOLD.periods, (), ())), secret
        )
        head, payload, mac = token.split(".")
        texts = [f"{token}=", f"{token}==", f" {token}", f"{token}\n", f"{head}.{payload}=.{mac}"]
        texts += [token.replace("-", "+"), token.replace("_", "/"), token.upper()]
        for place, text in ((1, payload), (2, mac)):
            for last in ALPHABET:
                parts = [head, payload, mac]
                parts[place] = text[:-1] + last
                texts.append(".".join(parts))
        assert read_token(token, secret).reservation.slots[0].partition == partition
        for text in texts:
            if text != token:
                with pytest.raises(LeaseError):
                    read_token(text, secret)
                refused += 1
    assert refused > 4 * 2 * 60


@pytest.mark.parametrize(("signed", "read"), [("secret", "other"), ("secret", ""), ("", "secret")])
def test_a_token_of_another_secret_is_a_lease_error(signed: str, read: str) -> None:
    """Signed under one secret, or under none, it is worth nothing under another."""
    with pytest.raises(LeaseError, match="hash_secret"):
        read_token(write_token(TICKET, signed), read)


def test_a_token_of_ones_own_making_is_a_lease_error() -> None:
    """With a secret, nobody can free another tenant's slot by writing its partition into a token."""
    fields = fields_of(write_token(TICKET, "secret"))
    fields["s"] = [["k:victim", "p"]]
    with pytest.raises(LeaseError):
        read_token(checksummed(json.dumps(fields).encode()), "secret")


GOOD = fields_of(write_token(TICKET, ""))


@pytest.mark.parametrize(
    "change",
    [
        {"i": "zz"},
        {"i": "00"},
        {"i": None},
        {"s": "k"},
        {"s": [["k:1"]]},
        {"s": [["k:1", "p"]] * 300},
        {"b": [["k:1", "USD:x", "soon"]]},
        {"l": -1},
        {"l": "NaN"},
        {"p": -1},
        {"p": 1.5},
        {"c": 1},
        {"g": "x"},
        {"z": 1},
    ],
    ids=str,
)
def test_without_a_secret_malformed_fields_are_a_lease_error(change: dict[str, object]) -> None:
    """A checksum proves nothing, so what it covers is checked before it is believed."""
    assert read_token(checksummed(json.dumps(GOOD).encode()), "").reservation == HOLD
    with pytest.raises(LeaseError):
        read_token(checksummed(json.dumps({**GOOD, **change}).encode()), "")


@pytest.mark.parametrize("payload", [b"", b"[]", b"null", b"{}", b"\xff", b'{"i": 1}'])
def test_without_a_secret_another_payload_is_a_lease_error(payload: bytes) -> None:
    """Fields that are missing, and what is not an object at all."""
    with pytest.raises(LeaseError):
        read_token(checksummed(payload), "")


@pytest.mark.parametrize(
    "ttl", [0, -1, float("nan"), float("inf"), MAX_TTL + 1, True, "60", None, 10**400, 1j]
)
def test_a_ttl_is_a_positive_number(ttl: object) -> None:
    """Everything else is a clear error."""
    with pytest.raises(LeaseError, match="ttl must be a positive number of seconds"):
        check_ttl(ttl)


@pytest.mark.parametrize("ttl", [0.001, 1, 600, MAX_TTL])
def test_a_ttl_may_be_a_fraction(ttl: float) -> None:
    """From the blink of an eye to 30 days."""
    assert check_ttl(ttl) == ttl
