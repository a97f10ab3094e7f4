"""Helpers for the attacks over real HTTP: the server that they are made on, and checks of their answers."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from tests.support.apps import AppServer
from tests.support.raw import Answer, exchange, head

PLAN, ANONYMOUS, GET_RULE, POST_RULE = 1000, 900, 7, 50
SETTINGS = f"""
[operations]
dashboard_path = "/ops"
dashboard_token = "open-sesame"

[plans.default]
requests = ["{PLAN}/hour"]

[plans.anonymous]
requests = ["{ANONYMOUS}/hour"]

[plans.narrow]
requests = ["{PLAN}/hour"]
concurrent = 2

[[keys]]
key = "uploader"
plan = "narrow"

[[keys]]
key = "downloader"
plan = "narrow"

[[keys]]
key = "beginner"
plan = "narrow"

[[routes]]
path = "/health"
exempt = true

[[routes]]
path = "/v1/predictions"
methods = ["GET"]
requests = ["{GET_RULE}/hour"]

[[routes]]
path = "/v1/predictions"
methods = ["POST"]
cost = 5
requests = ["{POST_RULE}/hour"]
"""

_numbers = itertools.count()


def serve(parser: str, folder: Path) -> Iterator[AppServer]:
    """The app on one of uvicorn's parsers, as a fixture yields it."""
    (folder / "ratelimit.toml").write_text(SETTINGS)
    environment = {"RATELIMIT_SETTINGS": str(folder / "ratelimit.toml")}
    app = AppServer(
        "tests.support.attack_app:app",
        folder,
        "--http",
        parser,
        "--no-proxy-headers",
        environment=environment,
    )
    app.start()
    yield app
    app.stop()


def new_api_key() -> bytes:
    """A key that no other test has."""
    return b"key-%d" % next(_numbers)


def asked(server: AppServer, *lines: bytes, target: str = "/", method: str = "GET") -> Answer:
    """Send a request to the server and return its answer, which has to come."""
    answer = exchange(server.port, head(target, *lines, method=method), method=method)
    assert answer is not None
    return answer


def header(api_key: bytes) -> bytes:
    """The usual header with a key."""
    return b"X-API-Key: " + api_key


def used(server: AppServer, api_key: bytes) -> int:
    """Return the number of units of its plan that the key had used before this question."""
    return PLAN - 1 - asked(server, header(api_key)).remaining


def assert_not_free(answer: Answer | None) -> None:
    """Assert that an answer of the app was counted, but for the one exempt route."""
    if answer is None or (answer.status in {400, 404, 405, 431} and answer.limit is None):
        assert answer is None or not answer.body.startswith(b"ran")
        return
    assert answer.limit is not None or answer.body == b"ran GET /health"
