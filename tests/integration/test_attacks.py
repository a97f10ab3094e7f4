"""Attacks by keys, paths and methods over real HTTP, as bytes: nothing that runs is free."""

import base64
from collections.abc import Iterator

import pytest

from tests.support.apps import AppServer
from tests.support.attacks import (
    ANONYMOUS,
    GET_RULE,
    PLAN,
    POST_RULE,
    asked,
    assert_not_free,
    header,
    new_api_key,
    serve,
    used,
)
from tests.support.raw import exchange, head, pipelined

pytestmark = pytest.mark.rerun


@pytest.fixture(scope="module", params=["httptools", "h11"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    """The app on each of uvicorn's parsers."""
    yield from serve(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def api_key() -> bytes:
    """A key that no other test has."""
    return new_api_key()


# keys -------------------------------------------------------------------------------------------


def spellings(api_key: bytes) -> list[tuple[bytes, ...]]:
    """Header lines that all say the same key."""
    basic = base64.b64encode(api_key + b":")
    return [
        (b"X-API-KEY: " + api_key,),
        (b"x-api-key:" + api_key,),
        (b"X-Api-Key: \t " + api_key + b" \t ",),
        (b"Authorization: Bearer " + api_key,),
        (b"AUTHORIZATION: bEARER   " + api_key + b"  ",),
        (b"authorization: Basic " + basic,),
        (b"authorization: " + api_key,),
        (b"X-API-Key: " + api_key, b"X-API-Key: another"),
        (b"X-API-Key: " + api_key, b"Authorization: Bearer " + api_key),
        (b"Authorization: Bearer " + api_key, b"Authorization: Bearer another"),
        (b"X-API-Key: " + api_key, b"X_API_Key: another", b"X-API-Keys: another"),
    ]


def test_one_key_is_one_caller_however_it_is_sent(server: AppServer, api_key: bytes) -> None:
    """Case, blanks, notation and repetition of the header give no second quota."""
    for number, lines in enumerate(spellings(api_key)):
        assert asked(server, *lines).remaining == PLAN - 1 - number, lines


@pytest.mark.parametrize(
    "line",
    [
        b"X-API-Key: %s\r\n folded",
        b"X-API-Key : %s",
        b"X-API-Key: %s\x00",
        b"X-API-Key: %s\x1b[31m",
        b"X-API-Key: %s\rX-Evil: 1",
        b"X-API-Key:\x0b%s",
        b" X-API-Key: %s",
        b"X-API-Key\x00: %s",
    ],
)
def test_malformed_header_lines_make_nothing_free(server: AppServer, api_key: bytes, line: bytes) -> None:
    """The server refuses them, or somebody is charged; none ends up in another's header."""
    answer = exchange(server.port, head("/", line % api_key))
    assert_not_free(answer)
    assert answer is None or "x-evil" not in answer.headers


@pytest.mark.parametrize(
    "lines",
    [
        (),
        (b"X-API-Key:",),
        (b"X-API-Key: \t ",),
        (b"Authorization: Bearer",),
        (b"Authorization: Basic ====",),
        (b"Authorization: Negotiate abc",),
        (b"X-API-Key:", b"X-API-Key: second"),
    ],
)
def test_no_key_is_anonymous(server: AppServer, lines: tuple[bytes, ...]) -> None:
    """An empty key, or a header that holds none, is not a key."""
    assert asked(server, *lines).limit == ANONYMOUS


@pytest.mark.parametrize(
    ("key", "status"),
    [
        (b"k" * 8_192, 200),
        (b"caf\xe9", 200),
        ("café".encode(), 200),
        (b"\xff\xfe\xfd", 200),
        (b"a b", 200),
        (b"%0d%0aX-Evil: 1", 200),
        (b"k" * 17_000, 431),
    ],
)
def test_unusual_keys_are_callers_of_their_own(server: AppServer, key: bytes, status: int) -> None:
    """Long keys and any bytes count for themselves; one beyond 16 KiB is refused, by us or the server."""
    lines = (header(key),)
    answer = asked(server, *lines)
    if status != 200:
        assert answer.status in {400, 431}
        return
    assert (answer.status, answer.limit, answer.remaining) == (200, PLAN, PLAN - 1)
    assert asked(server, *lines).remaining == PLAN - 2
    assert b"evil" not in answer.raw_head.lower()


def test_two_different_keys_are_refused(server: AppServer, api_key: bytes) -> None:
    """A request with two different keys is refused: no caller chooses the payer.

    The answer repeats neither.
    """
    answer = asked(server, header(api_key), b"Authorization: Bearer other-key")
    assert answer.status == 400
    assert b"AMBIGUOUS_API_KEY" in answer.body
    assert api_key not in answer.body
    assert b"other-key" not in answer.body
    assert used(server, api_key) == 0


# paths and methods ------------------------------------------------------------------------------

TARGETS = [
    "/v1/predictions",
    "//v1/predictions",
    "/v1//predictions",
    "/./v1/predictions",
    "/v1/./predictions",
    "/x/../v1/predictions",
    "/health/../v1/predictions",
    "/health/%2e%2e/v1/predictions",
    "/health%2F..%2Fv1%2Fpredictions",
    "/v1/x/%2E%2E/predictions",
    "/%2e/v1/predictions",
    "/v1/%70redictions",
    "/v1/%2570redictions",
    "/v1%2Fpredictions",
    "/v1%5Cpredictions",
    "/V1/Predictions",
    "/v1/predictions/",
    "/v1/predictions;x",
    "/v1/predictions%3Bx",
    "/v1/predictions?x=/health",
    "/v1/predictions%3Fx",
    "/v1/predictions#/health",
    "/v1/predictions%00",
    "/v1/predictions%0A",
    "/v1/predictions%20",
    "/v1/predictions%C0%AF",
    "/v1\\predictions",
    "http://app/v1/predictions",
    "http://evil.example/v1/predictions",
    "http://evil.example/health/../v1/predictions",
    "//evil.example/v1/predictions",
    "/health/",
    "/health/x",
    "//health",
    "/HEALTH",
    "/health;x",
    "/health%00",
    "*",
    "v1/predictions",
]


@pytest.mark.parametrize("target", TARGETS)
def test_rule_is_that_of_the_route_that_runs(server: AppServer, api_key: bytes, target: str) -> None:
    """However a path is spelled: where the handler runs its rule applied, where none does the plan did."""
    answer = exchange(server.port, head(target, header(api_key)))
    assert_not_free(answer)
    if answer is None or answer.limit is None:
        return
    runs = answer.body == b"ran GET /v1/predictions"
    assert answer.limit == (GET_RULE if runs else PLAN)
    assert answer.status == (200 if runs else answer.status)
    assert used(server, api_key) == 1


def test_some_spellings_do_reach_the_handler(server: AppServer, api_key: bytes) -> None:
    """So that the test above tests something: encoded letters and slashes, a final newline, other hosts."""
    targets = ["/v1/%70redictions", "/v1%2Fpredictions", "/v1/predictions%0A", "/v1/predictions?x=/health"]
    assert [asked(server, header(api_key), target=target).limit for target in targets] == [GET_RULE] * 4


@pytest.mark.parametrize(
    "method",
    ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "BREW", "get", "Get", "GETS", "PRI", "PROPFIND"],
)
def test_no_method_is_free(server: AppServer, api_key: bytes, method: str) -> None:
    """A request of any method is counted, whatever the app makes of it, or refused by the server."""
    data = head("/v1/predictions", header(api_key), method=method)
    answer = exchange(server.port, data, method=method)
    assert_not_free(answer)
    if answer is not None and answer.limit is not None:
        assert answer.limit == (GET_RULE if method == "HEAD" else PLAN)
        assert used(server, api_key) == 1


@pytest.mark.parametrize("name", [b"X-HTTP-Method-Override", b"X-HTTP-Method", b"X-Method-Override"])
def test_method_overrides_are_ignored(server: AppServer, api_key: bytes, name: bytes) -> None:
    """A POST that calls itself a GET costs what a POST costs."""
    override = name + b": GET"
    answer = asked(
        server,
        header(api_key),
        override,
        b"Content-Length: 0",
        target="/v1/predictions?_method=GET",
        method="POST",
    )
    assert (answer.body, answer.limit) == (b"ran POST /v1/predictions", POST_RULE)
    assert used(server, api_key) == 5


def test_rewriting_headers_are_ignored(server: AppServer, api_key: bytes) -> None:
    """Headers that some proxies and frameworks take a path from choose no rule."""
    lines = [b"X-Original-URL: /health", b"X-Rewrite-URL: /health", b"X-Forwarded-Prefix: /v1"]
    assert asked(server, header(api_key), *lines, target="/v1/predictions").limit == GET_RULE


def test_http_1_0_is_counted(server: AppServer, api_key: bytes) -> None:
    """An old version without Host is a request as any other."""
    answer = exchange(server.port, head("/v1/predictions", header(api_key), version="1.0"))
    assert answer is not None
    assert (answer.status, answer.limit) == (200, GET_RULE)


def test_pipelined_requests_are_counted_one_by_one(server: AppServer, api_key: bytes) -> None:
    """Requests written at once on one connection get exactly what is left."""
    answers = pipelined(server.port, [head("/v1/predictions", header(api_key))] * 10)
    assert [answer.status for answer in answers] == [200] * GET_RULE + [429] * 3
