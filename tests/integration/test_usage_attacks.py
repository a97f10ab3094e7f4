"""Attacks on the usage path over real HTTP: no spelling is free, nobody reads of another, no flood passes."""

import json
from collections.abc import Iterator

import pytest

from ratelimit_mw._internal.asgi.usage import EACH_CALLER
from tests.support.apps import AppServer
from tests.support.attacks import asked, header, new_api_key
from tests.support.raw import RawConnection, head, pipelined

pytestmark = pytest.mark.rerun

PLAN = 1000
SETTINGS = f"""
operations = {{ usage_path = "/limits" }}
plans.default = {{ requests = ["{PLAN}/hour"] }}
plans.anonymous = {{ requests = ["900/hour"] }}
routes = [{{ path = "/health", exempt = true }}]
"""


@pytest.fixture(scope="module", params=["httptools", "h11"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    """The app on each of uvicorn's parsers."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "ratelimit.toml").write_text(SETTINGS)
    environment = {"RATELIMIT_SETTINGS": str(folder / "ratelimit.toml")}
    app = AppServer("tests.support.attack_app:app", folder, "--http", request.param, environment=environment)
    app.start()
    yield app
    app.stop()


@pytest.fixture
def line() -> bytes:
    """The header of a key that no other test has."""
    return header(new_api_key())


def used(server: AppServer, line: bytes) -> int:
    """Return the number of units of its plan that the caller is told to have used."""
    answer = asked(server, line, target="/limits")
    assert answer.status == 200
    return int(json.loads(answer.body)["requests"][0]["used"])


@pytest.mark.parametrize("target", ["/limits", "/limits?x=1", "/%6cimits"])
def test_the_path_is_what_routes_would_see(server: AppServer, line: bytes, target: str) -> None:
    """A query and percent signs change nothing."""
    answer = asked(server, line, target=target)
    assert answer.status == 200
    assert json.loads(answer.body)["plan"] == "default"


@pytest.mark.parametrize(
    "target",
    [
        "/limits/",
        "//limits",
        "/LIMITS",
        "/./limits",
        "/health/../limits",
        "/limits;x",
        "/limits%0A",
        "/limits%2f",
        "/limits%00",
        "/limits%20",
    ],
)
def test_any_other_spelling_is_the_apps_and_counts(server: AppServer, line: bytes, target: str) -> None:
    """A path that is not exactly the usage path is the app's, and its request is charged like any other."""
    answer = asked(server, line, target=target)
    assert (answer.status, answer.limit, answer.remaining) == (404, PLAN, PLAN - 1)
    assert used(server, line) == 1


def test_nobody_reads_of_another(server: AppServer, line: bytes) -> None:
    """Each reads of the key that it sends; two at once are nobody, and nothing else names a caller."""
    for _ in range(3):
        asked(server, line)
    assert used(server, line) == 3
    other = header(new_api_key())
    assert used(server, other) == 0
    both = asked(server, line, b"Authorization: Bearer another", target="/limits")
    assert (both.status, both.limit) == (400, None)
    assert b"AMBIGUOUS_API_KEY" in both.body
    key = line.partition(b": ")[2].decode()
    for lines, target in [
        ((other,), f"/limits?key={key}&api_key={key}&X-API-Key={key}"),
        ((other, b"X-Original-URL: /limits", b"X-Account: " + key.encode()), "/limits"),
        ((other, b"Cookie: X-API-Key=" + key.encode()), "/limits"),
    ]:
        answer = asked(server, *lines, target=target)
        assert json.loads(answer.body)["requests"][0]["used"] == 0


def test_a_header_leads_nobody_to_it(server: AppServer, line: bytes) -> None:
    """Neither a header makes another path free, nor another method of this one."""
    for evil in (b"X-Original-URL: /limits", b"X-Rewrite-URL: /limits", b"X-HTTP-Method-Override: GET"):
        assert asked(server, line, evil).body == b"ran GET /"
        assert asked(server, line, evil, target="/limits", method="POST").status == 405
    assert used(server, line) == 3


def test_a_refused_body_spoils_nothing(server: AppServer, line: bytes) -> None:
    """A body that is sent with a refused method is not taken for the next request."""
    smuggled = head("/", line)
    post = head("/limits", line, b"Content-Length: %d" % len(smuggled), method="POST") + smuggled
    answers = pipelined(server.port, [post, head("/limits", line)])
    assert [answer.status for answer in answers] == [405, 200]
    assert json.loads(answers[1].body)["requests"][0]["used"] == 0


def test_a_flood_is_refused_and_costs_nothing(server: AppServer, line: bytes) -> None:
    """Of hundreds of questions at once as many are answered as may be, and the app is still to be had."""
    answers = pipelined(server.port, [head("/limits", line)] * 300)
    assert [answer.status for answer in answers] == [200] * EACH_CALLER.quota + [429] * (
        300 - EACH_CALLER.quota
    )
    assert answers[-1].headers["cache-control"] == "no-store"
    assert 0 < int(answers[-1].headers["retry-after"]) <= EACH_CALLER.seconds
    assert asked(server, line).remaining == PLAN - 1
    assert asked(server, header(new_api_key()), target="/limits").status == 200


def test_head_has_no_body_on_the_wire(server: AppServer, line: bytes) -> None:
    """It has the length of what `GET` answers, and the next request on the connection is understood."""
    with RawConnection(server.port) as connection:
        answers = []
        for method in ("GET", "HEAD", "GET"):
            connection.send(head("/limits", line, method=method))
            answer = connection.answer(method=method)
            assert answer is not None
            answers.append(answer)
    by_get, by_head, again = answers
    assert (by_head.status, by_head.headers["content-length"]) == (200, str(len(by_get.body)))
    assert again.body == by_get.body
