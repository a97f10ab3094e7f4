"""Input from clients: never an error of ours, never a quota that is free or somebody else's."""

import asyncio
import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from ratelimit_mw import RateLimitMiddleware
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.outcome import Outcome
from tests.support.asgi import FakeClock, limiter_of

Headers = list[tuple[bytes, bytes]]

TEXT = """
    identity.per_address = ["1000000/minute"]
    plans.default.requests = ["100/minute"]
    plans.anonymous.requests = ["50/minute"]
    keys = [{key = "listed", plan = "default"}]
    routes = [
        {path = "/free", exempt = true},
        {path = "/v1/{id:int}", methods = ["GET"], cost = 2},
        {path = "/files/{rest:path}", requests = ["5000/hour"]},
    ]
"""


class Recorded(MemoryBackend):
    """Remembers where each charge was counted first."""

    def __init__(self) -> None:
        super().__init__(clock=FakeClock())
        self.partitions: list[str] = []

    def decide(self, charge: Charge, lease_id: bytes | None, price: int) -> Outcome:
        """Decide, and remember the caller's partition."""
        self.partitions.append(charge.counters[0].partition)
        return super().decide(charge, lease_id, price)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer any connection with no more than the protocol asks for."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})


def answer(served: RateLimitMiddleware, scope: Scope) -> Message:
    """Return the answer of `first_message`, in an event loop of its own."""
    return asyncio.run(first_message(served, scope))


async def first_message(served: RateLimitMiddleware, scope: Scope) -> Message:
    """The first message sent for a scope."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect" if scope["type"] == "websocket" else "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    await served(scope, receive, send)
    return sent[0]


def served_with(backend: MemoryBackend) -> RateLimitMiddleware:
    """The app behind the middleware with `TEXT`."""
    return RateLimitMiddleware(app, limiter=limiter_of(TEXT, FakeClock(), backend))


def http(headers: Headers, **more: Any) -> Scope:
    """A request from one address."""
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": ("192.0.2.1", 1)}
    return scope | more


HEADER = st.tuples(
    st.sampled_from([b"x-api-key", b"X-API-KEY", b"authorization", b"Authorization", b"x-forwarded-for"])
    | st.binary(max_size=12),
    st.binary(max_size=40)
    | st.binary(max_size=20).map(lambda value: b"Bearer " + value)
    | st.binary(max_size=20).map(lambda value: b"Basic " + base64.b64encode(value))
    | st.sampled_from([b"", b" ", b"listed", b"Bearer", b"Basic", b"Basic ====", b"Digest x", b"k" * 20_000]),
)
CLIENT = st.none() | st.tuples(
    st.sampled_from(["192.0.2.1", "2001:db8::1%eth0", "", "testclient", "\udcff", "a" * 300]) | st.text(),
    st.integers(0, 65_535),
)
PATH = st.sampled_from(["/free", "/free/", "/v1/7", "/v1/x", "/files/a/b", "", "*", "/v1/7\n"]) | st.text()
EXTENSIONS: list[dict[str, Any]] = [{}, {"extensions": {}}, {"extensions": {"websocket.http.response": {}}}]


@given(
    kind=st.sampled_from(["http", "http", "websocket"]),
    headers=st.lists(HEADER, max_size=4),
    client=CLIENT,
    path=PATH,
    method=st.sampled_from(["GET", "HEAD", "get", "BREW", "", "\x00"]) | st.text(max_size=8),
    more=st.sampled_from([*EXTENSIONS, {"state": {"own": 1}}, {"root_path": "/v1"}, {"root_path": ""}]),
)
def test_any_scope_is_counted_or_refused(
    kind: str, headers: Headers, client: Any, path: str, method: str, more: dict[str, Any]
) -> None:
    """Any scope is answered: counted with headers, refused for its key, or exempt; nothing raises."""
    backend = Recorded()
    scope = http(headers, type=kind, client=client, path=path, **more)
    if kind == "http":
        scope["method"] = method
    message = answer(served_with(backend), scope)
    status = message.get("status", 200)
    if message["type"] == "websocket.close" or status in {400, 431}:
        assert backend.partitions == []
    elif path == "/free" or (more.get("root_path") and path == "/v1/free"):
        assert (status, backend.partitions) == (200, [])
    else:
        assert (status, len(backend.partitions)) == (200, 1)
        names = [name for name, _ in message["headers"]]
        assert names == [b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset"]


KEYS = [
    b"a",
    b"A",
    b"a b",
    b"a\x00",
    b"\x00a",
    b"{a}",
    b"{a}b",
    b"*",
    b":",
    b"a:b",
    b"k:a",
    b"ip:192.0.2.1",
    b"a\nb",
    b"a\r\nx: y",
    b"\xff\xfe",
    b"caf\xe9",
    "café".encode(),
    "cafe\u0301".encode(),
    "\uff41".encode(),
    b"%61",
    b"k" * 16_384,
]


@pytest.mark.parametrize("name", [b"x-api-key", b"authorization"])
def test_strange_keys_have_quotas_of_their_own(name: bytes) -> None:
    """Keys are bytes: no two that differ share a count, and none gets another caller's."""
    backend = Recorded()
    served = served_with(backend)
    for key in KEYS:
        value = key if name == b"x-api-key" else b"Bearer " + key
        for remaining in (b"99", b"98"):
            message = answer(served, http([(name, value)]))
            assert dict(message["headers"])[b"x-ratelimit-remaining"] == remaining, key
    assert len(set(backend.partitions)) == len(KEYS)
    assert all(partition.startswith("k:") and len(partition) == 34 for partition in backend.partitions)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"x-api-key", b"")],
        [(b"x-api-key", b" \t ")],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer   ")],
        [(b"authorization", b"Basic")],
        [(b"authorization", b"Basic !!!")],
        [(b"authorization", b"Basic " + base64.b64encode(b":secret"))],
        [(b"authorization", b"Digest username=a")],
        [(b"x-api-key", b""), (b"x-api-key", b"a")],
        [(b"x_api_key", b"a"), (b"api-key", b"b")],
        [(b"x-forwarded-for", b"203.0.113.9")],
    ],
)
def test_no_key_is_anonymous_by_address(headers: Headers) -> None:
    """A request that holds no key is an anonymous caller's, counted with all others at its address."""
    backend = Recorded()
    message = answer(served_with(backend), http(headers))
    assert dict(message["headers"])[b"x-ratelimit-limit"] == b"50"
    assert backend.partitions == ["ip:192.0.2.1"]


@pytest.mark.parametrize(
    "headers",
    [
        [(b"X-API-Key", b"listed")],
        [(b"x-api-key", b" listed\t")],
        [(b"x-api-key", b"listed"), (b"x-api-key", b"other")],
        [(b"AUTHORIZATION", b"bearer  listed ")],
        [(b"authorization", b"listed")],
        [(b"authorization", b"Basic " + base64.b64encode(b"listed:"))],
        [(b"x-api-key", b"listed"), (b"authorization", b"Bearer listed")],
    ],
)
def test_one_key_is_one_caller_however_sent(headers: Headers) -> None:
    """A key is the same caller in whichever header and notation it comes."""
    backend = Recorded()
    served = served_with(backend)
    answer(served, http([(b"x-api-key", b"listed")]))
    message = answer(served, http(headers))
    assert dict(message["headers"])[b"x-ratelimit-remaining"] == b"98"
    assert len(set(backend.partitions)) == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"x-api-key", b"k" * 16_385)], 431),
        ([(b"x-api-key", b"k" * 1_000_000)], 431),
        ([(b"authorization", b"Basic " + base64.b64encode(b"k" * 16_385))], 431),
        ([(b"x-api-key", b"a"), (b"authorization", b"Bearer b")], 400),
        ([(b"authorization", b"Bearer b"), (b"x-api-key", b"a"), (b"x-api-key", b"b")], 400),
    ],
)
def test_unclear_keys_are_refused_uncounted(headers: Headers, status: int) -> None:
    """A request that doesn't say clearly who is calling reaches neither the app nor a counter."""
    backend = Recorded()
    assert answer(served_with(backend), http(headers))["status"] == status
    assert backend.partitions == []


async def test_inventing_keys_and_paths_forgets_nobody() -> None:
    """However many keys and paths a flood invents, what a caller has used stays counted."""
    served = served_with(MemoryBackend(clock=FakeClock()))
    await first_message(served, http([(b"x-api-key", b"a")]))
    for number in range(5_000):
        await first_message(served, http([(b"x-api-key", b"%d" % number)], path=f"/{number}"))
    message = await first_message(served, http([(b"x-api-key", b"a")]))
    assert dict(message["headers"])[b"x-ratelimit-remaining"] == b"98"
