"""Findings in forwarded headers: a proxy that nobody trusts, and a balancer that appends its address."""

from typing import Any

import pytest

from ratelimit_mw._internal.policy.client_address import AddressReader
from tests.support.asgi import settings_of

pytestmark = pytest.mark.usefixtures("nothing_said")


def scope(peer: str | None, forwarded: str | None) -> dict[str, Any]:
    """A request from a peer, with or without the header."""
    headers = [] if forwarded is None else [(b"x-forwarded-for", forwarded.encode())]
    return {"type": "http", "client": None if peer is None else (peer, 1), "headers": headers}


@pytest.mark.parametrize(
    ("peer", "forwarded", "is_said"),
    [
        ("10.0.0.1", "192.0.2.1", True),
        (None, "192.0.2.1", True),
        ("10.0.0.1", None, False),
        ("192.0.2.1", "203.0.113.7, 192.0.2.1", False),
    ],
)
def test_untrusted_proxy_is_told_once(
    peer: str | None, forwarded: str | None, caplog: pytest.LogCaptureFixture, *, is_said: bool
) -> None:
    """A forwarded header from a stranger is told, but not where the server has read it already."""
    reader = AddressReader(settings_of("").identity)
    for _ in range(3):
        reader(scope(peer, forwarded))
    assert [record.__dict__["check"] for record in caplog.records] == ["untrusted-proxy"] * is_said
    assert not is_said or reader.looks == 0  # the look has found what it is for


def test_looking_for_a_proxy_ends() -> None:
    """Callers without a proxy don't pay for the look for ever."""
    reader = AddressReader(settings_of("").identity)
    for number in range(1_100):
        reader(scope(f"192.0.2.{number % 250}", None))
    assert reader.looks == 0


LB = "203.0.113.9"


def chains(number: int, *, appended: str | None = LB) -> list[str]:
    """Return headers of so many clients' requests through a balancer that appends this address of its own."""
    ends = [] if appended is None else [appended]
    return [", ".join([f"198.51.100.{each}", *ends]) for each in range(number)]


@pytest.mark.parametrize(
    ("peer", "forwarded", "is_said"),
    [
        ("10.0.0.1", chains(50), True),
        (LB, chains(50), True),  # a server that has read the header itself
        ("10.0.0.1", [f"6.6.6.6, {line}" for line in chains(50)], True),
        (LB, [None, *chains(50)], True),
        ("10.0.0.1", chains(10), True),
        ("10.0.0.1", chains(9), False),
        (
            "10.0.0.1",
            [line.replace(LB, f"{LB}{number % 2}") for number, line in enumerate(chains(50))],
            False,
        ),
        (LB, [f"{LB}, junk", *chains(50)], False),
        ("10.0.0.1", chains(50, appended=None), False),
        ("10.0.0.1", [f"6.6.6.6, {line}" for line in chains(50, appended=None)], False),
        ("10.0.0.1", chains(50, appended="10.0.0.2"), False),
        ("10.0.0.1", chains(1) * 50, False),
        ("10.0.0.1", [*chains(1, appended=None), *chains(50)], False),
    ],
)
def test_a_balancer_that_appends_its_own_address_is_told(
    peer: str, forwarded: list[str | None], caplog: pytest.LogCaptureFixture, *, is_said: bool
) -> None:
    """Many clients before one right-most address are all counted as that one, which is said once."""
    reader = AddressReader(settings_of('identity.trusted_proxies = ["10.0.0.0/8"]').identity)
    counted = {reader(scope(peer, line)) for line in forwarded}
    assert [record.__dict__["check"] for record in caplog.records] == ["balancer-appended"] * is_said
    assert not is_said or (counted == {LB} and LB in caplog.text)
    assert not is_said or reader.chains == 0  # the look has found what it is for


def test_what_is_remembered_of_forwarded_headers_is_bounded() -> None:
    """A client that writes long and ever new lists costs no memory."""
    reader = AddressReader(settings_of('identity.trusted_proxies = ["10.0.0.0/8"]').identity)
    for number in range(1_100):
        reader(scope("10.0.0.1", f"junk-{number % 3}, {LB}"))
    assert reader.chains == 0
