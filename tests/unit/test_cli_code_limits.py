"""Limits in code on the command line and in OpenAPI: shown with what the settings make of them."""

import json
from pathlib import Path

import pytest
from fastapi import FastAPI

from ratelimit_mw import Limit, limited
from ratelimit_mw.openapi import add_rate_limit_responses
from tests.support.asgi import settings_of
from tests.support.commands import Commands

APP = """
from fastapi import APIRouter, Depends, FastAPI
from ratelimit_mw import Limit, RateLimitMiddleware, by, limited

app = FastAPI()
app.add_middleware(RateLimitMiddleware, settings="ratelimit.toml")
login = Limit("cli-login", "5/15 minutes", by=by.address, count="failures")
late = Limit("cli-late", "3/minute", unit="tokens", concurrent=2)

@app.post("/login")
@limited(login)
def handler() -> None: ...

router = APIRouter(dependencies=[Depends(limited("9/minute"))])

@router.get("/items/{id}")
def item(id: int) -> None: ...

app.include_router(router)
"""
SETTINGS = '[limits.cli-login]\nrequests = ["2/hour"]\n[limits.cli-lgin]\noff = true\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A folder with an app, a module of a name that no other test has, and its settings."""
    (tmp_path / "app_with_code_limits.py").write_text(APP)
    (tmp_path / "ratelimit.toml").write_text(SETTINGS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_show_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`routes`, `check --app` and `explain --app` name them, their amounts in force and whose they are."""
    name, commands = "app_with_code_limits:app", Commands(capsys)
    routes = json.loads(commands.any("routes", name, "--json")[1])
    found = {each["path"]: each["code_limits"] for each in routes["routes"] if each["code_limits"]}
    assert found["/login"][0]["name"] == "cli-login"
    assert found["/login"][0]["requests"] == ["2/hour"]
    assert found["/login"][0]["from"] == "limits.cli-login"
    assert found["/items/{id}"][0]["name"] == "GET /items/{id}"
    text = commands.any("routes", name)[1]
    assert "no code declares a limit of this name; did you mean 'cli-login'?" in text
    checked = commands.any("check", "ratelimit.toml", "--app", name)[1]
    assert "cli-login: 2/hour failures for each address" in checked
    assert "cli-late: 3/minute tokens, 2 at once for each caller" in checked
    assert "[limits.cli-lgin]" in checked
    whole = json.loads(commands.any("check", "ratelimit.toml", "--app", name, "--json")[1])
    assert {each["name"] for each in whole["code_limits"]} >= {"cli-login", "cli-late"}
    assert "unknown-limit" in {each["name"] for each in whole["code_warnings"]}
    explained = commands.any("explain", "POST", "/login", "--key", "a", "--app", name)[1]
    assert "cli-login: 2/hour failures for each address" in explained
    plain = json.loads(commands.any("explain", "GET", "/x", "--key", "a", "--app", name, "--json")[1])
    assert plain["code_limits"] == []


def test_openapi_names_them() -> None:
    """An operation's limits in code are in its schema, with the rates in force."""
    app = FastAPI()

    @app.get("/items/{number}")
    @limited(Limit("api-items", "9/minute", "99/hour"), Limit("api-off", "9/minute"))
    def item(number: int) -> None:
        """Return an item."""

    @app.get("/free")
    def free() -> None:
        """Return nothing."""

    text = '[limits.api-items]\nrequests = ["5/minute"]\n[limits.api-off]\noff = true'
    add_rate_limit_responses(app, settings_of(text))
    paths = app.openapi()["paths"]
    assert paths["/items/{number}"]["get"]["x-ratelimit-limits"] == [
        {"name": "api-items", "rates": ["5/minute"]}
    ]
    assert "x-ratelimit-limits" not in paths["/free"]["get"]
