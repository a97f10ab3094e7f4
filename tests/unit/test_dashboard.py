"""The dashboard over HTTP: who gets in, and what no answer of it lacks."""

import re
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from ratelimit_mw import RateLimitMiddleware
from ratelimit_mw._internal.dashboard import access
from ratelimit_mw._internal.dashboard.answers import page_files
from tests.support.asgi import client_of, ok_app, settings_of, statuses
from tests.support.dashboard_client import CHANGE, PLANS, TOKEN, bearer, behind, log_in, settings

READ = [
    ("GET", "/events"),
    ("GET", "/snapshot"),
    ("GET", "/audit"),
    ("POST", "/caller"),
    ("POST", "/search"),
    ("GET", "/static/app.js"),
]
OTHERS = [("GET", ""), ("GET", "/"), ("HEAD", "/"), ("POST", "/logout"), ("DELETE", "/"), ("GET", "/none")]


# who gets in ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), [*READ, *CHANGE, *OTHERS])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": b"Bearer"},
        {"Authorization": b"Bearer wrong"},
        {"Authorization": b"Bearer " + TOKEN.encode()[:-1]},
        {"Authorization": b"Basic " + TOKEN.encode()},
        {"Cookie": f"{access.COOKIE}=9999999999.{'0' * 64}"},
        {"Cookie": f"{access.COOKIE}=99999999999999999999.\xff".encode("latin-1")},
        {"Cookie": f"{access.COOKIE}={access.new_session(TOKEN, 1000.0)}"},
        {"Cookie": f"{access.COOKIE}={access.new_session('another token', 9e9)}"},
    ],
)
async def test_nothing_is_served_without_the_token(method: str, path: str, headers: Any) -> None:
    """A request without the token is answered 401 and told nothing, for everything under the path."""
    async with behind(dashboard_changes=True) as client:
        answer = await client.request(method, f"/ops{path}", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert "default" not in answer.text


async def test_a_token_in_the_address_is_no_token() -> None:
    """A token in a URL opens nothing, since it ends up in logs and histories."""
    async with behind() as client:
        assert (await client.get("/ops/snapshot", params={"token": TOKEN})).status_code == 401
        assert (await client.post("/ops/", params={"token": TOKEN})).status_code == 401


async def test_the_token_opens_everything_as_a_bearer_token() -> None:
    """Scripts send the token itself."""
    async with behind() as client:
        assert (await client.get("/ops/snapshot", headers=bearer())).json()["changes"] is False
        assert (await client.get("/ops/", headers=bearer())).text.startswith("<!doctype html>")
        assert (await client.get("/ops/static/app.js", headers=bearer())).status_code == 200


async def test_the_login_form_opens_a_session() -> None:
    """The form's token becomes a cookie that scripts can't read and other sites don't send."""
    async with behind() as client:
        form = await client.get("/ops")
        assert 'action="./ops/"' in form.text
        answer = await log_in(client)
        assert (answer.status_code, answer.headers["location"]) == (303, "./")
        cookie = answer.headers["set-cookie"]
        assert {"HttpOnly", "SameSite=strict", f"Max-Age={access.SESSION_SECONDS}"} <= set(cookie.split("; "))
        assert "path" not in cookie.lower()  # the browser's default: the folder that answered
        assert "secure" not in cookie.lower()
        assert TOKEN not in cookie
        assert (await client.get("/ops/snapshot")).status_code == 200
        for path, folder in (("/ops", "./ops/"), ("/ops/", "./")):
            assert f'src="{folder}static/app.js"' in (await client.get(path)).text
        (await client.post("/ops/logout")).raise_for_status()
        assert (await client.get("/ops/snapshot")).status_code == 401


@pytest.mark.parametrize(
    ("headers", "secure"),
    [
        ({"Origin": "https://example.com", "Sec-Fetch-Site": "same-origin"}, True),
        ({"X-Forwarded-Proto": "https"}, True),
        ({"X-Forwarded-Proto": "HTTPS, http"}, True),
        ({"Forwarded": 'for=192.0.2.1; Proto="https", for=10.0.0.1;proto=http'}, True),
        ({"X-Forwarded-Proto": "http"}, False),
        ({"X-Forwarded-Proto": "httpsx"}, False),
        ({"Forwarded": "for=192.0.2.1;host=proto=https.example"}, False),
        ({"Origin": "http://app", "Sec-Fetch-Site": "same-origin"}, False),
    ],
)
async def test_the_cookie_is_secure_behind_a_proxy_that_ends_tls(
    headers: dict[str, str], *, secure: bool
) -> None:
    """A server that reads no proxy headers takes the page for one without TLS; its browser knows better."""
    async with behind() as client:
        answer = await log_in(client, **headers)
        assert answer.status_code == 303
        assert ("; Secure" in answer.headers["set-cookie"]) is secure


async def test_the_cookie_of_an_https_page_is_secure() -> None:
    """It never travels in the clear."""
    app = RateLimitMiddleware(ok_app(), settings=settings())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="https://app") as client:
        assert "; Secure" in (await log_in(client)).headers["set-cookie"]


async def test_a_session_ends_with_its_token_and_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session ends with its time, and a change of the token shuts out all who had the old one."""
    session = access.new_session(TOKEN, 1000.0)
    monkeypatch.setattr("ratelimit_mw._internal.dashboard.access.time", SimpleNamespace(time=lambda: 999.0))
    assert access.is_session(session, TOKEN)
    assert not access.is_session(session, "another token")
    assert not access.is_session(session.replace("1000", "2000"), TOKEN)
    monkeypatch.setattr("ratelimit_mw._internal.dashboard.access.time", SimpleNamespace(time=lambda: 1000.0))
    assert not access.is_session(session, TOKEN)


async def test_wrong_tokens_are_limited_by_address() -> None:
    """A guesser is soon not even looked at, others and open sessions are; nothing of it is counted."""
    app = RateLimitMiddleware(ok_app(), settings=settings())
    async with client_of(app) as guesser, client_of(app, address="192.0.2.2") as other:
        assert (await log_in(guesser)).status_code == 303
        session = dict(guesser.cookies)
        guesser.cookies.clear()
        for _ in range(access.WRONG_TOKENS.quota // 2):
            assert (await log_in(guesser, "wrong")).status_code == 401
            assert (await guesser.get("/ops/snapshot", headers=bearer("wrong"))).status_code == 401
        assert "retry-after" not in (await other.get("/ops/snapshot", headers=bearer("wrong"))).headers
        for answer in (await log_in(guesser), await guesser.get("/ops/snapshot", headers=bearer())):
            assert answer.status_code == 401
            assert 0 < int(answer.headers["retry-after"]) <= 60
        assert "Too many wrong tokens" in (await guesser.get("/ops/", headers=bearer())).text
        assert (await other.get("/ops/snapshot", headers=bearer())).status_code == 200
        guesser.cookies.update(session)
        assert (await guesser.get("/ops/snapshot")).status_code == 200
        assert await statuses(guesser, 2) == [200, 429]  # one a minute without a key, untouched until here


# other sites ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://app"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://app.evil.example"},
        {"Origin": "null"},
    ],
)
async def test_a_page_of_another_site_can_neither_read_nor_change(headers: dict[str, str]) -> None:
    """Even if a browser sent the session along, which SameSite forbids."""
    async with behind(dashboard_changes=True) as client:
        assert (await log_in(client, **headers)).status_code == 403
        assert (await log_in(client)).status_code == 303
        for method, path in [*READ, *CHANGE, ("POST", "/logout")]:
            body = {"caller": "k:0"} if method == "POST" else None
            answer = await client.request(method, f"/ops{path}", json=body, headers=headers)
            assert answer.status_code == 403, path


@pytest.mark.parametrize(
    "headers", [{"Sec-Fetch-Site": "same-origin", "Origin": "http://inside:8000"}, {"Origin": "http://app"}]
)
async def test_its_own_page_may(headers: dict[str, str]) -> None:
    """Also behind a proxy that changes the `Host` header, as far as the browser says where it comes from."""
    async with behind(dashboard_changes=True) as client:
        assert (await log_in(client, **headers)).status_code == 303
        answer = await client.post("/ops/reset", json={"caller": "ip:192.0.2.1"}, headers=headers)
        assert answer.json()["cleared"] == 1


async def test_changes_need_json() -> None:
    """A form, which any page can send anywhere, changes nothing."""
    async with behind(dashboard_changes=True) as client:
        for content_type in ("application/x-www-form-urlencoded", "text/plain", ""):
            headers = {**bearer(), "Content-Type": content_type}
            answer = await client.post("/ops/reset", content=b'{"caller": "k:0"}', headers=headers)
            assert answer.status_code == 415


# what every answer has --------------------------------------------------------------------------


async def test_every_answer_forbids_frames_scripts_and_caches() -> None:
    """Pages can't be framed and load nothing from elsewhere; figures are kept by nobody."""
    async with behind() as client:
        answers = [
            await client.get("/ops/"),
            await client.get("/ops/snapshot"),
            await client.get("/ops/", headers=bearer()),
            await client.get("/ops", headers=bearer()),
            await client.get("/ops/snapshot", headers=bearer()),
            await client.get("/ops/none", headers=bearer()),
            await client.get("/ops/static/app.js", headers=bearer()),
        ]
    for answer in answers:
        policy = dict(each.split(" ", 1) for each in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == policy["form-action"] == "'self'"
        assert "unsafe" not in str(policy)
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        kept = "private, no-cache" if answer.url.path.startswith("/ops/static") else "no-store"
        assert answer.headers["cache-control"] == kept


async def test_the_page_needs_nothing_from_elsewhere() -> None:
    """Every address in its files is one of its own, and there is no script or style beside the files'."""
    own = {"https://github.com/leeoniya/uPlot"}
    for path, file in page_files().items():
        text = file.body.decode()
        assert set(re.findall(r"https?://[^\s)\"'`]+", text)) <= own, path
        assert "innerHTML" not in text or "vendor" in path
    html = page_files()["static/index.html"].body.decode()
    assert not re.search(r"\son\w+=|style=|<style|<script>", html)
    named = set(re.findall(r'(?:src|href)="\{folder\}(static/[^"]+)"', html))
    assert named
    assert named <= set(page_files())
    scripts = [each for each in page_files() if each.endswith(".js") and "vendor" not in each]
    imported = {
        found for each in scripts for found in re.findall(rb'from "\./([^"]+)"', page_files()[each].body)
    }
    assert {f"static/{each.decode()}" for each in imported} <= set(scripts)


async def test_files_are_sent_again_only_when_they_changed() -> None:
    """The browser asks with the tag it was given."""
    async with behind() as client:
        first = await client.get("/ops/static/style.css", headers=bearer())
        assert first.headers["content-type"].startswith("text/css")
        again = {**bearer(), "If-None-Match": first.headers["etag"]}
        second = await client.get("/ops/static/style.css", headers=again)
        assert (second.status_code, second.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/ops/static/../app.py",
        "/ops/static/..%2fapp.py",
        "/ops/static//style.css",
        "/ops/static/",
        "/ops/static/vendor",
        "/ops//",
        "/ops/none",
        "/ops/snapshot/",
        "/ops/events%0a",
    ],
)
async def test_there_is_nothing_beside_its_files(path: str) -> None:
    """No spelling of a path reaches another file, or the app."""
    async with behind() as client:
        assert (await client.get(path, headers=bearer())).status_code == 404


async def test_other_methods_are_told_which_there_are() -> None:
    """A known path with an unknown method is a 405."""
    async with behind() as client:
        answer = await client.get("/ops/reset", headers=bearer())
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert (await client.head("/ops/events", headers=bearer())).status_code == 405


@pytest.mark.parametrize("path", ["/opsx", "/ops.html", "/OPS", "//ops", "/x/ops", "/"])
async def test_what_only_looks_like_its_path_is_the_apps(path: str) -> None:
    """The dashboard takes its own path and what lies under it, nothing else."""
    async with behind() as client:
        assert (await client.get(f"http://app{path}")).text == "ok"


async def test_it_is_off_without_a_path() -> None:
    """A dashboard without a path is off."""
    app = RateLimitMiddleware(ok_app(), settings=settings_of(PLANS))
    async with client_of(app) as client:
        assert (await client.get("/ops/", headers=bearer())).text == "ok"


async def test_its_requests_cost_no_limits() -> None:
    """An operator who looks, or somebody who guesses, uses up nobody's quota."""
    async with behind() as client:
        for _ in range(5):
            assert "x-ratelimit-limit" not in (await client.get("/ops/snapshot", headers=bearer())).headers
            await client.get("/ops/")
        assert await statuses(client, 2) == [200, 429]


async def test_it_is_found_where_the_app_is_mounted() -> None:
    """A dashboard in a mounted app is found: as with routes, `root_path` is not a part of its path."""
    app = RateLimitMiddleware(ok_app(), settings=settings())
    transport = httpx.ASGITransport(app, root_path="/api")
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        answer = await client.post("/api/ops/", data={"token": TOKEN})
        assert answer.status_code == 303
        assert (await client.get("/api/ops/snapshot")).status_code == 200


async def test_a_websocket_to_it_is_rejected() -> None:
    """There is none, with or without the token."""
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    app = RateLimitMiddleware(ok_app(), settings=settings())
    scope = {"type": "websocket", "path": "/ops/events", "headers": [], "client": ("192.0.2.1", 1)}
    await app(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]
