"""The client address: what callers without a known API key are counted by."""

import logging
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_mw._internal.policy.client_address import AddressReader, canonical_address
from ratelimit_mw._internal.settings import IdentitySettings

pytestmark = pytest.mark.usefixtures("nothing_said")

PROXIES = ["10.0.0.0/8", "2001:db8:ffff::/48", "unix"]
PROXY = "10.0.0.1"


def reader(trusted: list[str] | None = None, header: str = "X-Forwarded-For") -> AddressReader:
    """A reader for settings that trust these proxies."""
    proxies = PROXIES if trusted is None else trusted
    return AddressReader(
        IdentitySettings.model_validate({"trusted_proxies": proxies, "forwarded_header": header})
    )


def scope(peer: str | None, *lines: str, name: str = "x-forwarded-for") -> dict[str, Any]:
    """A request from a peer, with the lines of one header."""
    headers = [(name.encode(), line.encode("latin-1")) for line in lines]
    return {"type": "http", "client": None if peer is None else (peer, 1), "headers": headers}


@pytest.mark.parametrize(
    ("peer", "counted"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1:5678", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", "2001:db8:1:2::/64"),
        ("2001:0db8:0001:0002:ffff::1", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2::9]:443", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("fe80::1%25eth0", "fe80::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::ffff:c000:201", "192.0.2.1"),
        ("0:0:0:0:0:FFFF:192.0.2.1", "192.0.2.1"),
        ("[::ffff:192.0.2.1]:80", "192.0.2.1"),
        ("64:ff9b::192.0.2.1", "192.0.2.1"),
        ("64:ff9b::c000:201", "192.0.2.1"),
        ("[64:ff9b::192.0.2.1]:443", "192.0.2.1"),
        ("64:ff9b:1::192.0.2.1", "192.0.2.1"),
        ("64:ff9b:1:fffe::c000:201", "192.0.2.1"),
        ("64:ff9b:1:c000:2:100::", "64:ff9b:1:c000::/64"),
        ("64:ff9b:2::192.0.2.1", "64:ff9b:2::/64"),
        ("64:ff9b:0:0:1::192.0.2.1", "64:ff9b::/64"),
        ("::ffff:0:192.0.2.1", "192.0.2.1"),
        ("::FFFF:0:c000:0201", "192.0.2.1"),
        ("2002:c000:201::1", "192.0.2.1"),
        ("2002:c000:201:ffff:1:2:3:4", "192.0.2.1"),
        ("2001:0:4136:e378:8000:63bf:3fff:fdfe", "192.0.2.1"),
        ("2001:1::192.0.2.1", "2001:1::/64"),
        ("::192.0.2.1", "::/64"),
        ("::1", "::/64"),
        (None, "unix"),
        ("", "unix"),
        ("testclient", "peer:testclient"),
        ("192.0.2.01", "peer:192.0.2.01"),
        ("a b", "peer:sha256-" + "c8687a08aa5d6ed2044328fa6a697ab8"),
    ],
)
def test_peer_is_counted_by_its_bits_not_by_its_spelling(peer: str | None, counted: str) -> None:
    """IPv6 by /64, IPv4-mapped as IPv4, zones and ports dropped, names as safe text."""
    assert reader([])(scope(peer)) == counted
    assert reader([])(scope(peer)) == counted
    assert canonical_address(counted) == counted


@pytest.mark.parametrize("form", ["::ffff:{}", "64:ff9b::{}", "64:ff9b:1::{}", "::ffff:0:{}"])
def test_two_mapped_addresses_are_two_callers(form: str) -> None:
    """IPv4 clients that reach an IPv6 socket never share the one /64 that all are written in."""
    read = reader([])
    assert read(scope(form.format("192.0.2.1"))) != read(scope(form.format("192.0.2.2")))


def test_one_6to4_site_is_one_caller() -> None:
    """A holder of one IPv4 address, with its 65,536 /64s of 6to4, is one caller all the same."""
    read = reader([])
    assert {read(scope(f"2002:c000:201:{site:x}::1")) for site in range(200)} == {"192.0.2.1"}


@pytest.mark.parametrize("form", ["64:ff9b::{}", "64:ff9b:1::{}", "::ffff:0:{}", "2002:a00:1::1"])
def test_an_address_that_carries_a_proxys_is_not_trusted_for_it(form: str) -> None:
    """Trust goes by the address that connects: whoever writes a proxy's into its own is counted as that."""
    assert reader()(scope(form.format("10.0.0.1"), "6.6.6.6")) == "10.0.0.1"


def test_a_translated_proxy_is_trusted_by_the_address_that_it_has_here() -> None:
    """A proxy behind a translator is named as it is seen; what it forwards is counted as IPv4."""
    read = reader(["64:ff9b::10.0.0.0/104"])
    assert read(scope("64:ff9b::10.0.0.1", "64:ff9b::192.0.2.1")) == "192.0.2.1"


@pytest.mark.parametrize("peer", ["192.0.2.1", "127.0.0.1", "::1", "testclient", "unix", None])
def test_header_of_an_untrusted_peer_is_ignored(peer: str | None) -> None:
    """Without trusted proxies no header chooses the address, not even for a local peer."""
    read = reader([])
    assert read(scope(peer, "6.6.6.6")) == read(scope(peer))


def test_peer_called_unix_is_no_unix_socket() -> None:
    """Only a peer without an address is trusted as `unix`, not one whose server calls it that."""
    assert reader(["unix"])(scope("unix", "6.6.6.6")) == "unix"
    assert reader(["unix"])(scope(None, "6.6.6.6")) == "6.6.6.6"
    assert reader(["10.0.0.0/8"])(scope(None, "6.6.6.6")) == "unix"


@pytest.mark.parametrize("peer", [PROXY, "::ffff:10.0.0.1", "2001:db8:ffff::1", None])
@pytest.mark.parametrize(
    ("lines", "counted"),
    [
        (["192.0.2.1"], "192.0.2.1"),
        (["6.6.6.6, 192.0.2.1"], "192.0.2.1"),
        (["6.6.6.6,192.0.2.1,\t10.9.9.9 , 2001:db8:ffff::2"], "192.0.2.1"),
        (["6.6.6.6", "192.0.2.1"], "192.0.2.1"),
        (["192.0.2.1", "10.0.0.2"], "192.0.2.1"),
        (["junk, 192.0.2.1"], "192.0.2.1"),
        (["10.0.0.3, 192.0.2.1, ::ffff:10.0.0.2"], "192.0.2.1"),
        (["192.0.2.1:5678"], "192.0.2.1"),
        (["[2001:db8:1:2::9]:443"], "2001:db8:1:2::/64"),
        (["2001:db8:1:2::9"], "2001:db8:1:2::/64"),
        (["10.3.3.3, 10.2.2.2"], "10.3.3.3"),
        (["10.3.3.3"], "10.3.3.3"),
        ([", ".join(["6.6.6.6"] * 200 + ["192.0.2.1"])], "192.0.2.1"),
    ],
)
def test_list_is_read_from_the_right_past_trusted_proxies(
    peer: str | None, lines: list[str], counted: str
) -> None:
    """All lines are one list; its first untrusted address from the right is the client's."""
    assert reader()(scope(peer, *lines)) == counted


@pytest.mark.parametrize(
    "line",
    [
        "",
        " , ,",
        "junk",
        "unknown",
        "_hidden",
        "unix:",
        "192.0.2.1, junk",
        "192.0.2.1, ",
        "192.0.2.1, unknown, 10.0.0.2",
        "192.0.2.1:",
        "192.0.2.1:port",
        "192.0.2.1:123456",
        "192.0.2.1%eth0",
        "192.0.2.1 192.0.2.2",
        "192.0.2.256",
        "192.0.2.0/24",
        "0xC0000201",
        "3221225985",
        "[192.0.2.1]",
        "[2001:db8::1",
        "[2001:db8::1]80",
        "[2001:db8::1]x:80",
        "[2001:db8::1]:",
        "[2001:db8::1]:http",
        "[2001:db8::1]:123456",
        "2001:db8::1]:80",
        "192.0.2.\xb9",
        '"192.0.2.1"',
        "for=192.0.2.1",
        "a" * 4_096,
        "192.0.2.1, " + " " * 8_192 + "192.0.2.2",
        ", ".join(["10.0.0.9"] * 65),
    ],
)
def test_what_does_not_parse_is_the_peer(line: str) -> None:
    """Junk in place of an address, a header too long or with too many hops makes no new caller."""
    assert reader()(scope(PROXY, line)) == PROXY


@pytest.mark.parametrize(
    ("hops", "counted"),
    [
        (["192.0.2.1"] + ["10.0.0.9"] * 63, "192.0.2.1"),
        (["10.0.0.8"] + ["10.0.0.9"] * 63, "10.0.0.8"),
        (["192.0.2.1"] + ["10.0.0.9"] * 64, PROXY),
        (["10.0.0.8"] + ["10.0.0.9"] * 64, PROXY),
    ],
)
def test_as_many_hops_are_read_as_the_bound_says(hops: list[str], counted: str) -> None:
    """A list of 64 addresses is read to its first one, and a longer list is not read."""
    assert reader()(scope(PROXY, ", ".join(hops))) == counted


@pytest.mark.parametrize(
    ("lines", "counted"),
    [
        (["for=192.0.2.1"], "192.0.2.1"),
        (["For=192.0.2.1;proto=https;by=203.0.113.43"], "192.0.2.1"),
        (["proto=https; for=192.0.2.1 ;host=example.com"], "192.0.2.1"),
        (['for="192.0.2.1:47011"'], "192.0.2.1"),
        (['for="[2001:db8:1:2::17]:4711"'], "2001:db8:1:2::/64"),
        (['FOR="[2001:db8:1:2::17]"'], "2001:db8:1:2::/64"),
        (['for="[2001:db8:1:2::17]:_port"'], "2001:db8:1:2::/64"),
        ([r'for="192\.0.2.1"'], "192.0.2.1"),
        (['for=6.6.6.6, for=192.0.2.1;ext="a, for=7.7.7.7;\\""'], "192.0.2.1"),
        (["for=6.6.6.6", "for=192.0.2.1", "for=10.1.1.1"], "192.0.2.1"),
        (['for="6.6.6.6', "for=192.0.2.1"], "192.0.2.1"),
        (["for=unknown, for=192.0.2.1, for=10.0.0.2"], "192.0.2.1"),
        (["secret, for=192.0.2.1"], "192.0.2.1"),
        (["for=10.1.1.1,for=10.2.2.2"], "10.1.1.1"),
        (["for=unknown"], PROXY),
        (["for=_hidden, for=10.0.0.2"], PROXY),
        (["for=192.0.2.1, proto=https"], PROXY),
        (["for=192.0.2.1;for=192.0.2.2"], PROXY),
        (["for=192.0.2.1, for="], PROXY),
        (["for 192.0.2.1"], PROXY),
        (['for="192.0.2.1'], PROXY),
        (['for=6.6.6.6;ext="', 'for="192.0.2.1"'], "192.0.2.1"),
        (['for=6.6.6.6;ext=", for="192.0.2.1"'], PROXY),
        (['for=6.6.6.6", for=192.0.2.1'], PROXY),
        (['for="192.0.2.1"x'], PROXY),
        (["192.0.2.1"], PROXY),
        (['"' + '\\"' * 3_000], PROXY),
    ],
)
def test_forwarded_is_read_as_rfc_7239_writes_it(lines: list[str], counted: str) -> None:
    """Quoted, obfuscated, unknown and IPv6 forms, ports and other parameters."""
    assert reader(header="Forwarded")(scope(PROXY, *lines, name="Forwarded")) == counted


def test_only_the_header_that_the_settings_name_is_read() -> None:
    """Of two forwarding headers that differ, the other one is ignored."""
    request = scope(PROXY, "192.0.2.1")
    request["headers"].append((b"forwarded", b"for=6.6.6.6"))
    assert reader()(request) == "192.0.2.1"
    assert reader(header="Forwarded")(request) == "6.6.6.6"


def test_header_of_a_single_address_is_a_list_of_one() -> None:
    """Headers such as `CF-Connecting-IP`, whatever their case, are read too."""
    assert (
        reader(header="CF-Connecting-IP")(scope(PROXY, "192.0.2.1", name="cf-Connecting-IP")) == "192.0.2.1"
    )


def test_missing_header_is_the_peer_and_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    """A trusted proxy that says nothing counts as the caller, and the log says so once per process."""
    with caplog.at_level(logging.WARNING, "ratelimit_mw"):
        for request in (scope(PROXY), scope(PROXY, ""), scope(None)):
            assert reader()(request) in {PROXY, "unix"}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "X-Forwarded-For" in caplog.text


def test_trusted_network_written_as_ipv4_mapped_is_ipv4() -> None:
    """A trusted network means the same hosts in either notation."""
    read = reader(["::ffff:10.0.0.0/104"])
    assert read(scope(PROXY, "192.0.2.1")) == "192.0.2.1"
    assert read(scope("10.200.0.1", "192.0.2.1")) == "192.0.2.1"
    assert read(scope("11.0.0.1", "192.0.2.1")) == "11.0.0.1"
    assert reader(["::ffff:0:0/96"])(scope("11.0.0.1", "12.0.0.1")) == "12.0.0.1"


def test_memory_of_addresses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of addresses or junk takes no more memory than so many of them."""
    monkeypatch.setattr("ratelimit_mw._internal.policy.client_address._MAX_HOSTS", 500)
    read = reader()
    for number in range(2_000):
        read(scope(PROXY, f"junk-{number}"))
        read(scope(str(IPv4Address(number + 1))))
    assert 400 < len(read.hops) <= 500


@given(host=st.ip_addresses(v=6), other=st.integers(0, 2**64 - 1))
def test_one_slash_64_is_one_caller(host: IPv6Address, other: int) -> None:
    """Addresses that agree in their first 64 bits are one caller, unless they stand for IPv4."""
    neighbour = IPv6Address(int(host) >> 64 << 64 | other)
    if all(canonical_address(str(each)).endswith("/64") for each in (host, neighbour)):
        assert canonical_address(str(host)) == canonical_address(str(neighbour))
        assert canonical_address(host.exploded) == canonical_address(f"[{host}]:80")


@given(
    forged=st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=80),
    name=st.sampled_from(["X-Forwarded-For", "Forwarded"]),
    same_line=st.booleans(),
)
def test_forged_header_never_chooses_the_address(forged: str, name: str, same_line: bool) -> None:
    """A caller is the address that the trusted proxy wrote, or the proxy, whatever stands to the left."""
    for true in ("192.0.2.1", "2001:db8:1:2::9"):
        added = true if name != "Forwarded" else f'for="{true}"'
        lines = [f"{forged}, {added}"] if same_line else [forged, added]
        counted = reader(header=name)(scope(PROXY, *lines, name=name))
        assert counted == canonical_address(true) or (name == "Forwarded" and counted == PROXY)


@given(text=st.text(max_size=200))
def test_canonical_text_is_safe_and_stable(text: str) -> None:
    """Any text becomes a short one of harmless characters, and that one stays as it is."""
    counted = canonical_address(text)
    assert len(counted) <= 69
    assert counted.isascii()
    assert not set(counted) - set("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_.-:/")
    assert canonical_address(counted) == counted
