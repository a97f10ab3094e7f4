"""Identification of callers: keys in headers, listed and unknown, and accounts."""

import base64
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.policy import identity
from ratelimit_mw._internal.policy.api_key_reader import ApiKeyReader, IdentityError
from ratelimit_mw._internal.policy.client_address import AddressReader, Hop
from ratelimit_mw._internal.policy.identity import (
    Identifier,
    Identity,
    account_partition,
    partition_of,
)
from ratelimit_mw._internal.settings import Settings

PEER = "192.0.2.1"
HEADERS = ("X-API-Key", "Authorization")
PLANS = {"pro": {"requests": ["100/minute"]}, "team": {"requests": ["9/minute"], "share": "account"}}

Headers = list[tuple[str | bytes, str | bytes]]


def identifier(**tables: Any) -> Identifier:
    """An identifier for settings with these tables and two more plans."""
    return Identifier(settings(**tables))


def settings(**tables: Any) -> Settings:
    """Settings with these tables and two more plans."""
    return Settings.model_validate({"plans": PLANS} | tables)


def scope(*headers: tuple[str | bytes, str | bytes], peer: str = PEER) -> dict[str, Any]:
    """A request with these headers, names as they are written."""
    pairs = [tuple(item.encode() if isinstance(item, str) else item for item in pair) for pair in headers]
    return {"type": "http", "client": (peer, 1), "headers": pairs}


def basic(user_pass: bytes) -> bytes:
    """An `Authorization` value of the `Basic` scheme."""
    return b"Basic " + base64.b64encode(user_pass)


@pytest.mark.parametrize(
    ("name", "value", "api_key"),
    [
        ("x-api-key", "A", b"A"),
        ("X-API-KEY", "A", b"A"),
        ("x-api-key", " \tA\t ", b"A"),
        ("x-api-key", "A B", b"A B"),
        ("x-api-key", "Bearer A", b"Bearer A"),
        ("x-api-key", "", None),
        ("x-api-key", " \t ", None),
        ("x-api-key", b"\xff\x00\xfe", b"\xff\x00\xfe"),
        ("x-api-key", "\x0bA\xa0", "\x0bA\xa0".encode()),
        ("x_api_key", "A", None),
        ("x-api-keys", "A", None),
        ("authorization", "Bearer A", b"A"),
        ("AUTHORIZATION", "bearer A", b"A"),
        ("Authorization", "BEARER   A  ", b"A"),
        ("authorization", "Bearer\tA\t", b"A"),
        ("authorization", "  Bearer \t A", b"A"),
        ("authorization", "Bearer A B", b"A B"),
        ("authorization", "Bearer\tA B\tC", b"A B\tC"),
        ("authorization", "Bearer", None),
        ("authorization", "bearer  ", None),
        ("authorization", "A", b"A"),
        ("authorization", " A ", b"A"),
        ("authorization", b"\xc3\x28", b"\xc3\x28"),
        ("authorization", "BearerA", b"BearerA"),
        ("authorization", "Token A", None),
        ("authorization", "Digest username=A", None),
        ("authorization", "Token\tA", None),
        ("authorization", "", None),
        ("authorization", basic(b"A:"), b"A"),
        ("authorization", basic(b"A:secret:more"), b"A"),
        ("authorization", basic(b"A"), b"A"),
        ("authorization", basic(b" A\t:"), b"A"),
        ("authorization", basic(b"\xff:"), b"\xff"),
        ("authorization", basic(b"A:").replace(b"Basic ", b"bASIC \t "), b"A"),
        ("authorization", basic(b":secret"), None),
        ("authorization", "Basic", None),
        ("authorization", "Basic QTo", None),
        ("authorization", "Basic QT o=", None),
        ("authorization", "Basic \xe9", None),
        ("authorization", "Basic !QTo=", None),
        ("proxy-authorization", "Bearer A", None),
    ],
)
def test_key_is_read_as_bytes_without_blanks_around_it(
    name: str, value: str | bytes, api_key: bytes | None
) -> None:
    """Any spelling of a header and scheme gives the same key; other schemes and empty ones give none."""
    assert ApiKeyReader(HEADERS).read(scope(("host", "test"), (name, value))["headers"]) == (api_key or b"")


@pytest.mark.parametrize("value", [b"Bearer A", b"Basic QTo=", b"Token A"])
def test_only_authorization_has_schemes(value: bytes) -> None:
    """Any header but `Authorization` has the key as it stands, even if `Authorization` is not read at all."""
    for headers in (["X-API-Key"], ["X-API-Key", "Authorization"], ["Authorization", "X-API-Key"]):
        assert ApiKeyReader(headers).read(scope(("x-api-key", value))["headers"]) == value


@pytest.mark.parametrize(
    ("headers", "api_key"),
    [
        ([("x-api-key", "A"), ("x-api-key", "B")], b"A"),
        ([("X-Api-Key", "A"), ("x-api-key", "B")], b"A"),
        ([("x-api-key", ""), ("x-api-key", "B")], None),
        ([("authorization", "Bearer A"), ("authorization", "Bearer B")], b"A"),
        ([("authorization", "Token A"), ("authorization", "Bearer B")], None),
        ([("x-api-key", "A"), ("authorization", "Bearer A")], b"A"),
        ([("authorization", "A"), ("x-api-key", " A")], b"A"),
        ([("x-api-key", "A"), ("authorization", "Token B")], b"A"),
        ([("x-api-key", ""), ("authorization", "Bearer B")], b"B"),
        ([("cookie", "x-api-key=B"), ("x-api-key", "A")], b"A"),
        ([("x-ray-key", "B"), ("x-api-key", "A")], b"A"),
        ([("x-api-key", "A"), ("x-api-key", "B"), ("authorization", "Bearer A")], b"A"),
        ([("x-api-key", ""), ("x-api-key", "B"), ("authorization", "Bearer A")], b"A"),
    ],
)
def test_first_value_of_a_repeated_header_counts(headers: Headers, api_key: bytes | None) -> None:
    """The first of several values is the key, whatever the later ones are; equal keys are one."""
    assert ApiKeyReader(HEADERS).read(scope(*headers)["headers"]) == (api_key or b"")


@pytest.mark.parametrize(
    "headers",
    [
        [("x-api-key", "A"), ("authorization", "Bearer B")],
        [("authorization", basic(b"B:")), ("x-api-key", "A")],
        [("x-api-key", "caf\u00e9"), ("authorization", "Bearer cafe\u0301")],
    ],
)
def test_two_different_keys_are_refused(headers: Headers) -> None:
    """Two listed headers with different keys leave open who is calling: 400, without the keys."""
    with pytest.raises(IdentityError) as caught:
        identifier()(scope(*headers))
    assert (caught.value.status, caught.value.code) == (400, "AMBIGUOUS_API_KEY")
    assert (
        caught.value.message
        == "Ambiguous API key. Send the same one, or only one, in X-API-Key, Authorization."
    )


@pytest.mark.parametrize(
    "value", [lambda key: key, lambda key: b"Bearer " + key, lambda key: basic(key + b":secret")]
)
def test_key_over_16_kib_is_refused_before_it_is_hashed(
    value: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key of 16,384 bytes is one, a byte more is a 431, and no time is spent on it."""
    identify = identifier()
    assert identify(scope(("authorization", value(b"k" * 16_384)))).api_key_hash
    monkeypatch.setattr("ratelimit_mw._internal.policy.identity.hash_api_key", None)
    with pytest.raises(IdentityError, match="too long") as caught:
        identify(scope(("authorization", value(b"k" * 16_385))))
    assert (caught.value.status, caught.value.code) == (431, "API_KEY_TOO_LONG")


def test_caller_without_a_key_is_anonymous_by_address() -> None:
    """Without a key the address is counted, on the anonymous plan."""
    caller = identifier()(scope())
    assert caller == Identity(f"ip:{PEER}", "anonymous", address=PEER)


def test_unknown_key_is_a_caller_on_the_default_plan() -> None:
    """With `unknown_keys = "default_plan"` each key has its own counts; its address is known for the cap."""
    caller = identifier()(scope(("x-api-key", "A")))
    digest = hash_api_key(b"A", "")
    assert caller == Identity(f"k:{digest[7:39]}", "default", digest, address=PEER)


def test_unknown_keys_can_be_anonymous() -> None:
    """With `unknown_keys = "anonymous"` inventing keys opens no new counts."""
    identify = identifier(identity={"unknown_keys": "anonymous", "anonymous_plan": "pro"})
    callers = [identify(scope(("x-api-key", f"invented-{number}"))) for number in range(100)]
    assert {(caller.partition, caller.plan, caller.address) for caller in callers} == {
        (f"ip:{PEER}", "pro", PEER)
    }
    assert callers[7].api_key_hash == hash_api_key(b"invented-7", "")
    assert identify(scope()).partition == f"ip:{PEER}"


def test_listed_key_has_its_plan_and_limits_and_no_address() -> None:
    """A listed key is counted wherever it is used from; only limits that it writes replace its plan's."""
    identify = identifier(
        keys=[
            {"key": "A", "plan": "pro", "account": "acme"},
            {"key": "B", "plan": "pro", "requests": ["5/second"]},
        ]
    )
    plain, own = (identify(scope(("x-api-key", key))) for key in ("A", "B"))
    digest = hash_api_key(b"A", "")
    assert plain == Identity(f"k:{digest[7:39]}", "pro", digest, account="acme")
    assert own.limits is not None
    assert own.limits.requests is not None
    assert own.limits.requests[0].text == "5/second"
    assert identify(scope(("x-api-key", "A"), peer="192.0.2.9")) is plain


def test_key_is_hashed_under_the_secret() -> None:
    """Under a hash secret every hash and partition is an HMAC's."""
    identify = identifier(identity={"hash_secret": "s"}, keys=[{"key": "A", "plan": "pro"}])
    for key in (b"A", b"B"):
        caller = identify(scope(("x-api-key", key)))
        assert caller.api_key_hash == hash_api_key(key, "s")
        assert caller.partition == f"k:{hash_api_key(key, 's').removeprefix('hmac-sha256:')[:32]}"


def test_keys_of_an_account_share_its_partition() -> None:
    """On a plan with `share = "account"` a rotated key doesn't refill the quota."""
    keys = [{"key": key, "plan": "team", "account": "acme"} for key in ("old", "new")]
    identify = identifier(keys=[*keys, {"key": "other", "plan": "team", "account": "a b"}])
    old, new, other = (identify(scope(("x-api-key", key))) for key in ("old", "new", "other"))
    assert old.partition == new.partition == "a:acme"
    assert old.api_key_hash != new.api_key_hash
    assert other.partition == account_partition("a b") == "ah:c8687a08aa5d6ed2044328fa6a697ab8"


def test_keys_are_compared_as_bytes() -> None:
    """No normalisation makes one caller of two: NFC and NFD, UTF-8 and Latin-1, case, inner blanks."""
    word = "caf\u00e9 K"
    spellings = [word.encode(), unicodedata.normalize("NFD", word).encode(), word.encode("latin-1")]
    spellings += [word.lower().encode(), word.replace(" ", "  ").encode()]
    identify = identifier()
    assert len({identify(scope(("x-api-key", key))).partition for key in spellings}) == len(spellings)


def test_address_is_read_only_where_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listed key costs no look at the address."""
    read: list[object] = []

    def noted(_: AddressReader, request: object) -> Hop:
        read.append(request)
        return Hop(PEER)

    monkeypatch.setattr(AddressReader, "hop", noted)
    identify = identifier(keys=[{"key": "k" * 300, "plan": "pro"}])
    identify(scope(("x-api-key", "k" * 300)))
    assert not read
    identify(scope(("x-api-key", "other")))
    assert len(read) == 1


def test_caller_seen_before_is_the_same_object() -> None:
    """Known keys, unknown keys and addresses are put together once; a new address is a new unknown caller."""
    identify = identifier(keys=[{"key": "A", "plan": "pro"}])
    for headers in ([("x-api-key", "A")], [("x-api-key", "B")], []):
        assert identify(scope(*headers)) is identify(scope(*headers))
    here, there = (identify(scope(("x-api-key", "B"), peer=peer)) for peer in (PEER, "192.0.2.9"))
    assert (here.partition, here.address) == (there.partition, PEER)
    assert there.address == "192.0.2.9"


def test_memory_of_callers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of invented keys and addresses is forgotten again, those that came first before the others, and
    long keys are never kept.
    """
    monkeypatch.setattr(identity, "_MAX_REMEMBERED", 500)
    identify = identifier(keys=[{"key": "A", "plan": "pro"}])
    known = identify(scope(("x-api-key", "A")))
    for number in range(2_000):
        identify(scope(("x-api-key", f"{number}"), peer=f"10.0.{number >> 8}.{number & 255}"))
        identify(scope(("x-api-key", f"{number:0300}")))
    assert max(map(len, identify._by_key)) <= 256
    assert 400 < len(identify._by_key) <= 500
    assert 400 < len(identify._unlisted) <= 500
    assert list(identify._by_key)[-2:] == [b"1998", b"1999"]
    assert identify(scope(("x-api-key", "A"))) is known


@given(
    headers=st.lists(
        st.tuples(
            st.sampled_from([b"x-api-key", b"X-API-KEY", b"Authorization", b"host"]) | st.binary(max_size=20),
            st.binary(max_size=40)
            | st.builds(
                lambda scheme, rest: scheme + b" " + rest,
                st.sampled_from([b"Bearer", b"basic", b"Basic\t"]),
                st.binary(max_size=20) | st.binary(max_size=20).map(base64.b64encode),
            ),
        ),
        max_size=4,
    )
)
def test_any_headers_name_a_caller_or_a_clear_refusal(headers: list[tuple[bytes, bytes]]) -> None:
    """Any bytes of a client make a partition of safe characters only, or a clear refusal."""
    caller: Identity | IdentityError
    try:
        caller = identifier()({"type": "http", "client": (PEER, 1), "headers": headers})
    except IdentityError as error:
        caller = error
    if isinstance(caller, IdentityError):
        assert caller.code == "AMBIGUOUS_API_KEY"
        return
    kind, _, rest = caller.partition.partition(":")
    assert (kind == "k" and len(rest) == 32 and set(rest) <= set("0123456789abcdef")) or rest == PEER


@pytest.mark.parametrize(
    "name", ["user-42", "", "a:b", "{tag}*", "line\nfeed\r\n", "\ud800", "k:" + "0" * 32, "x" * 99_999]
)
def test_name_that_a_hook_gives_is_safe_in_a_backend_key(name: str) -> None:
    """A partition of a hook's name is fixed in form and can't be another kind's, for any string."""
    partition = partition_of(name, "s")
    assert partition.startswith("i:")
    assert len(partition) == 34
    assert set(partition[2:]) <= set("0123456789abcdef")
    assert partition != partition_of(name, "t")
    assert partition != partition_of(name + "x", "s")
