"""The page "Who is calling": its settings and its apps, run as they are printed."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest

from ratelimit_mw import Identity, Limiter, Settings
from tests.support.apps import ROOT
from tests.support.asgi import client_of, shown, statuses
from tests.support.pages import MakeModule, modules_of, write_settings

PAGE = (ROOT / "docs" / "callers.md").read_text("utf-8")


@pytest.fixture(autouse=True)
def settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The settings of the page, in the working folder."""
    file = write_settings(PAGE, tmp_path)
    monkeypatch.chdir(tmp_path)
    return file


@pytest.fixture
def page() -> Iterator[MakeModule]:
    """Modules of the page, made by name."""
    with modules_of(PAGE) as module:
        yield module


def token(module: Any, **claims: object) -> str:
    """An `Authorization` header with a token."""
    return "Bearer " + jwt.encode({"exp": time.time() + 600, **claims}, module.SECRET, algorithm="HS256")


async def test_users_of_a_jwt(page: MakeModule) -> None:
    """Each subject has a count on the plan of its claim; an invalid token is 401, none is by address."""
    module = page("jwt_app")
    for subject, claims, expected in [
        ("ann", {}, ("3", "2")),
        ("ann", {}, ("3", "1")),
        ("bob", {}, ("3", "2")),
        ("cid", {"plan": "pro"}, ("100", "99")),
    ]:
        async with client_of(module.app, authorization=token(module, sub=subject, **claims)) as client:
            assert shown(await client.get("/"))[:2] == expected
    for wrong in ("Bearer x", token(module, sub="ann", exp=1), token(module)):
        async with client_of(module.app, authorization=wrong) as client:
            response = await client.get("/")
        assert (response.status_code, response.json()) == (401, {"detail": "invalid token"})
        assert response.headers["www-authenticate"] == "Bearer"
    async with client_of(module.app) as client:
        assert shown(await client.get("/"))[:2] == ("20", "19")


async def test_users_of_a_session(page: MakeModule) -> None:
    """Whoever has logged in is the user of the session, and anybody else is counted by address."""
    module = page("session_app")
    async with client_of(module.app) as client:
        assert shown(await client.get("/"))[0] == "20"
        assert (await client.post("/login/ann")).status_code == 200
        assert shown(await client.get("/"))[:2] == ("100", "99")


async def test_tenants_of_a_database(page: MakeModule) -> None:
    """Users of a tenant share its count, or have limits of their own; a host of nobody's is 404."""
    module = page("tenant_app")

    async def asked(host: str, user: str) -> Any:
        async with client_of(module.app, host=host, x_user=user) as client:
            return await client.get("/")

    left = [shown(await asked("acme.example.com", user))[:2] for user in ("ann", "bob", "ann")]
    assert left == [("5", "4"), ("5", "3"), ("5", "2")]
    left = [shown(await asked("globex.example.com", user))[:2] for user in ("ann", "bob", "ann")]
    assert left == [("7", "6"), ("7", "6"), ("7", "5")]
    assert (await asked("nobody.example.com", "ann")).status_code == 404


async def test_keys_of_a_database(page: MakeModule) -> None:
    """A key has the plan that the database says, is refused as the hook says, or is unknown."""
    module = page("keys_app")
    for key, limit in [("key-of-acme", "5"), ("key-of-ann", "100"), ("invented", "60")]:
        async with client_of(module.app, x_api_key=key) as client:
            assert shown(await client.get("/"))[0] == limit
    async with client_of(module.app, x_api_key="old") as client:
        assert await statuses(client, 1) == [402]


async def test_callers_by_hand(
    page: MakeModule, settings_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The body runs for admitted callers alone, and a hook's caller is the same one."""
    module = page("by_hand")
    limiter = Limiter(Settings.load(settings_file))
    assert await module.send_reports(limiter, ["ann", "ann", "ann", "ann", "bob"]) == ["ann"] * 3 + ["bob"]
    assert re.fullmatch(r"ann waits for \d+ s\n", capsys.readouterr().out)
    assert (await limiter.acquire(Identity("user:bob", "free"))).decision.remaining == 1
