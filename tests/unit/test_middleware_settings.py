"""Settings that don't load never start an app, and never leave one without limits."""

import logging
from pathlib import Path

import httpx
import pytest
from starlette.types import Message, Scope

from ratelimit_mw import RateLimitMiddleware
from tests.conftest import StartApp
from tests.support.apps import AppServer
from tests.support.asgi import client_of, ok_app, shown
from tests.support.processes import ServerError

BAD = """
[plans.default]
requests = ["60/minit"]
concurent = 5

[identity]
default_plan = "gold"
"""
ERRORS = [
    "plans.default.requests[0]: '60/minit' is not a rate",
    "plans.default.concurent: unknown name",
    "identity.default_plan: there is no plan 'gold'",
]


@pytest.fixture
def bad_file(tmp_path: Path) -> Path:
    """A settings file with three mistakes."""
    file = tmp_path / "bad.toml"
    file.write_text(BAD)
    return file


async def lifespan_of(served: RateLimitMiddleware) -> list[Message]:
    """Return the messages to a server that starts up."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        sent.append(message)

    await served({"type": "lifespan"}, receive, send)
    return sent


async def test_start_up_fails_with_every_error(bad_file: Path) -> None:
    """The constructor doesn't raise; the start-up fails, and its message lists all that is wrong."""
    (message,) = await lifespan_of(RateLimitMiddleware(ok_app(), settings=bad_file))
    assert message["type"] == "lifespan.startup.failed"
    lines = message["message"].splitlines()
    assert len(lines) == len(ERRORS)
    assert all(line.startswith(f"{bad_file}: ") for line in lines)
    assert all(error in message["message"] for error in ERRORS)


@pytest.mark.parametrize("named", ["argument", "environment"])
async def test_missing_file_is_an_error(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that does not exist is an error, never a silent default."""
    missing = tmp_path / "nowhere.toml"
    monkeypatch.setenv("RATELIMIT_SETTINGS", str(missing) if named == "environment" else "")
    settings = missing if named == "argument" else None
    (message,) = await lifespan_of(RateLimitMiddleware(ok_app(), settings))
    assert message["type"] == "lifespan.startup.failed"
    assert "nowhere.toml" in message["message"]


async def test_environment_mistake_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of ours that sets nothing fails the start as the file would."""
    monkeypatch.setenv("RATELIMIT_BACKEND__ON_FAILUR", "deny")
    (message,) = await lifespan_of(RateLimitMiddleware(ok_app()))
    assert "RATELIMIT_BACKEND__ON_FAILUR" in message["message"]


async def test_without_lifespan_every_request_is_refused(
    bad_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every request is answered 503 if no lifespan is spoken, and the errors are logged once."""
    with caplog.at_level(logging.ERROR, "ratelimit_mw"):
        async with client_of(RateLimitMiddleware(ok_app(), settings=str(bad_file))) as client:
            responses = [await client.get(path) for path in ("/", "/health", "/")]
    assert [response.status_code for response in responses] == [503] * 3
    error = responses[0].json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "SETTINGS_ERROR")
    assert "plans" not in responses[0].text
    assert str(bad_file) not in responses[0].text
    assert len(caplog.records) == 1
    assert all(error in caplog.text for error in ERRORS)


async def test_without_lifespan_websockets_are_refused(bad_file: Path) -> None:
    """A WebSocket is refused as well, by a rejected handshake where it can be no other way."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "websocket", "path": "/", "headers": []}
    await RateLimitMiddleware(ok_app(), settings=bad_file)(scope, receive, send)
    assert sent[0]["type"] == "websocket.close"
    scope["extensions"] = {"websocket.http.response": {}}
    await RateLimitMiddleware(ok_app(), settings=bad_file)(scope, receive, send)
    assert sent[1]["status"] == 503


@pytest.mark.parametrize("app", ["tests.support.served:app", "tests.support.served:limited_bare"])
def test_uvicorn_does_not_start(app: str, bad_file: Path, tmp_path: Path) -> None:
    """A server ends with an error status and prints every error, whatever the app itself supports."""
    server = AppServer(app, tmp_path / "app", environment={"RATELIMIT_SETTINGS": str(bad_file)})
    with pytest.raises(ServerError):
        server.start()
    status = server.stop()
    assert status not in {0, None}
    assert all(error in server.log for error in ERRORS)
    assert "Traceback" not in server.log


def test_uvicorn_without_lifespan_serves_nothing(start_app: StartApp, bad_file: Path) -> None:
    """With `--lifespan off` the server runs, and refuses every request."""
    environment = {"RATELIMIT_SETTINGS": str(bad_file)}
    server = start_app("tests.support.served:app", "--lifespan", "off", environment=environment)
    assert [httpx.get(server.url).status_code for _ in range(3)] == [503] * 3
    assert [server.log.count(error) for error in ERRORS] == [1, 1, 1]


def test_uvicorn_with_settings_of_the_environment(start_app: StartApp, tmp_path: Path) -> None:
    """The file that `RATELIMIT_SETTINGS` names counts, and single values come from the environment."""
    file = tmp_path / "ratelimit.toml"
    file.write_text('plans.anonymous.requests = ["9/minute"]')
    environment = {"RATELIMIT_SETTINGS": str(file), "RATELIMIT_RESPONSE__RESET": "seconds"}
    server = start_app("tests.support.served:app", environment=environment)
    assert shown(httpx.get(server.url)) == ("9", "8", "60")
