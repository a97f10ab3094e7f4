"""WebSockets: the handshake counts as a GET and takes a slot until the app has returned."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from ratelimit_mw import Lease, RateLimitMiddleware
from tests.conftest import StartApp
from tests.support.asgi import Counting, Down, FakeClock, limited, limiter_of

TWO = 'plans.anonymous.requests = ["2/minute"]\n'
DENIAL: dict[str, Any] = {"websocket.http.response": {}}


def websocket_scope(**more: Any) -> Scope:
    """A handshake from one address."""
    return {"type": "websocket", "path": "/", "headers": [], "client": ("192.0.2.1", 1)} | more


async def accept(scope: Scope, receive: Receive, send: Send) -> None:
    """Accept, with a header and a subprotocol of the app's own, and end."""
    await receive()
    await send({"type": "websocket.accept", "subprotocol": "chat", "headers": [(b"x-own", b"1")]})


class Socket:
    """A client's side of one handshake."""

    def __init__(self, *incoming: str) -> None:
        self.sent: list[Message] = []
        self._incoming = [{"type": f"websocket.{name}"} for name in incoming or ("connect", "disconnect")]

    async def receive(self) -> Message:
        """Return the next message of the client."""
        return self._incoming.pop(0)

    async def send(self, message: Message) -> None:
        """Keep a message of the server."""
        self.sent.append(message)


async def handshake(served: RateLimitMiddleware, **more: Any) -> list[Message]:
    """Serve a client that knocks and leaves; return the messages to it."""
    socket = Socket()
    await served(websocket_scope(**more), socket.receive, socket.send)
    return socket.sent


async def test_accepted_handshake_carries_the_headers() -> None:
    """The headers come with the acceptance, beside the app's own."""
    (accepted,) = await handshake(limited(TWO, FakeClock(), accept))
    assert (accepted["type"], accepted["subprotocol"]) == ("websocket.accept", "chat")
    headers = dict(accepted["headers"])
    assert (headers[b"x-own"], headers[b"x-ratelimit-remaining"]) == (b"1", b"1")


async def deny(scope: Scope, receive: Receive, send: Send) -> None:
    """Reject the handshake."""
    await receive()
    await send({"type": "websocket.http.response.start", "status": 403, "headers": []})
    await send({"type": "websocket.http.response.body"})


@pytest.mark.parametrize(("app", "limit"), [(accept, 2), (deny, 9)], ids=["accepted", "denied"])
async def test_an_accepted_socket_is_charged_its_price(app: ASGIApp, limit: int) -> None:
    """A socket that the app accepted keeps its estimate as charged; one that the app denied gives it back."""
    text = """
        plans.anonymous.spending.daily = "0.20"
        routes = [{path = "/", price = "0.10"}]
    """
    served = limited(text, FakeClock(), app)
    kinds = [(await handshake(served, extensions=DENIAL))[0] for _ in range(9)]
    refused = [message for message in kinds if message.get("status") == 429]
    assert len(refused) == 9 - limit


async def test_handshake_counts_as_get() -> None:
    """A rule for GET holds for handshakes, cost and all; one for other methods doesn't."""
    text = """
        plans.anonymous.requests = ["99/minute"]
        routes = [{path = "/", methods = ["POST"], exempt = true}, {path = "/", methods = ["GET"], cost = 10}]
    """
    (accepted,) = await handshake(limited(text, FakeClock(), accept))
    assert dict(accepted["headers"])[b"x-ratelimit-remaining"] == b"89"


async def test_refused_handshake_is_denied_in_full() -> None:
    """Through the denial-response extension a client gets the same refusal as over HTTP."""
    served = limited(TWO, FakeClock(), accept)
    for _ in range(2):
        await handshake(served)
    start, body = await handshake(served, extensions=DENIAL)
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 429)
    headers = dict(start["headers"])
    assert (headers[b"retry-after"], headers[b"x-ratelimit-remaining"]) == (b"60", b"0")
    assert body["type"] == "websocket.http.response.body"
    assert json.loads(body["body"])["error"]["code"] == "RATE_LIMIT_EXCEEDED"


@pytest.mark.parametrize("extensions", [{}, {"extensions": {}}, {"extensions": None}])
async def test_refused_handshake_is_rejected_without_the_extension(extensions: dict[str, Any]) -> None:
    """A server that knows no denial responses is asked to reject the handshake."""
    served = limited(TWO, FakeClock(), accept)
    for _ in range(2):
        await handshake(served)
    (closed,) = await handshake(served, **extensions)
    assert closed["type"] == "websocket.close"


async def test_identity_errors_deny_too() -> None:
    """A handshake that doesn't say clearly who is calling is denied as a request is."""
    headers = [(b"x-api-key", b"a"), (b"authorization", b"Bearer b")]
    start, _ = await handshake(limited("", FakeClock(), accept), headers=headers, extensions=DENIAL)
    assert start["status"] == 400


async def test_slot_is_held_until_the_app_returns() -> None:
    """A WebSocket holds its slot as long as the app serves it, not only during the handshake."""
    leave = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await accept(scope, receive, send)
        await leave.wait()

    served = limited("plans.anonymous.concurrent = 1", FakeClock(), app)
    first = asyncio.create_task(handshake(served))
    await asyncio.sleep(0.01)
    start, _ = await handshake(served, extensions=DENIAL)
    assert start["status"] == 429
    leave.set()
    await first
    assert (await handshake(served, extensions=DENIAL))[0]["type"] == "websocket.accept"


async def test_close_before_accept_passes() -> None:
    """An app that closes instead of accepting does so unchanged; the handshake counted, its slot is free."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.close", "code": 1008})

    served = limited('plans.anonymous = {requests = ["2/minute"], concurrent = 1}', FakeClock(), app)
    for _ in range(2):
        assert await handshake(served) == [{"type": "websocket.close", "code": 1008}]
    assert (await handshake(served, extensions=DENIAL))[0]["status"] == 429


async def test_denial_of_the_app_carries_the_headers() -> None:
    """An app's own denial is a response as any other, and has the headers."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.http.response.start", "status": 401, "headers": []})
        await send({"type": "websocket.http.response.body", "body": b"who?"})

    start, _ = await handshake(limited(TWO, FakeClock(), app), extensions=DENIAL)
    assert start["status"] == 401
    assert dict(start["headers"])[b"x-ratelimit-remaining"] == b"1"


async def test_messages_pass_unchanged() -> None:
    """After the handshake every message is the app's own, in both directions."""
    text: Message = {"type": "websocket.send", "text": "hello"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await accept(scope, receive, send)
        assert (await receive())["type"] == "websocket.receive"
        await send(text)

    socket = Socket("connect", "receive")
    await limited(TWO, FakeClock(), app)(websocket_scope(), socket.receive, socket.send)
    assert socket.sent[1] is text


@pytest.mark.parametrize(
    ("text", "hooked"),
    [
        ("", {}),
        ('routes = [{path = "/", exempt = true}]', {"backend": Counting()}),
        ('backend.on_failure = "allow"', {"backend": Down()}),
        ('shadow = true\nplans.anonymous.requests = ["1/minute"]', {}),
    ],
    ids=["plain", "exempt", "allow", "shadow"],
)
async def test_lease_is_always_there(text: str, hooked: dict[str, Any]) -> None:
    """A WebSocket's handler finds its lease, and its methods do no harm whatever was decided."""
    seen: list[Lease] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        lease = scope["state"]["ratelimit"]
        seen.append(lease)
        await lease.settle("0.01")
        await lease.detach(ttl=5)
        await lease.release()
        await accept(scope, receive, send)

    served = limited(text, FakeClock(), app, **hooked)
    for _ in range(2):
        await handshake(served)
    assert [lease.allowed for lease in seen] == [True, True]


async def test_lease_counts_messages() -> None:
    """A handler can charge each message to the caller of its handshake."""
    limiter = limiter_of('plans.anonymous.requests = ["3/minute"]', FakeClock())
    allowed: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await accept(scope, receive, send)
        identity = limiter.engine.identify(scope)
        allowed.extend([(await limiter.acquire(identity)).allowed for _ in range(3)])

    await handshake(RateLimitMiddleware(app, limiter=limiter))
    assert allowed == [True, True, False]


@pytest.mark.parametrize("implementation", ["websockets", "websockets-sansio"])
async def test_real_client(start_app: StartApp, tmp_path: Path, implementation: str) -> None:
    """A stock client reads the headers of its handshake, and of a refusal status, wait and body."""
    file = tmp_path / "ratelimit.toml"
    file.write_text(TWO)
    environment = {"RATELIMIT_SETTINGS": str(file)}
    server = start_app("tests.support.served:app", "--ws", implementation, environment=environment)
    url = server.url.replace("http", "ws")
    async with connect(f"{url}/echo") as socket:
        assert socket.response is not None
        assert socket.response.headers["x-ratelimit-remaining"] == "1"
        await socket.send("hello")
        assert await socket.recv() == "hello"
    with pytest.raises(InvalidStatus) as shy:
        await connect(f"{url}/shy")
    assert shy.value.response.status_code == 403
    with pytest.raises(InvalidStatus) as refused:
        await connect(f"{url}/echo")
    response = refused.value.response
    assert response.status_code == 429
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert json.loads(response.body)["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    assert "Traceback" not in server.log
