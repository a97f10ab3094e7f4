"""Imports: the package loads what every app needs, and the rest when a setting asks for it."""

import subprocess
import sys
import textwrap

import pytest

from tests.support.apps import ROOT

pytestmark = pytest.mark.once

SELDOM = {
    "argcomplete",
    "click",
    "cryptography",
    "difflib",
    "hiredis",
    "opentelemetry",
    "prometheus_client",
    "pydantic_settings",
    "redis",
    "rich",
    "statistics",
    "tomllib",
    "typer",
    "uvicorn",
}
"""Packages that only some settings or commands need."""
OWN = (
    "cli",
    "dashboard.app",
    "demo",
    "fleet",
    "backends.redis.backend",
    "backends.redis.script",
    "backends.cluster",
    "backends.servers",
)
"""Parts of this package of which the same holds."""


def loaded(*code: str) -> set[str]:
    """Return the modules that a process has loaded once it has run this."""
    parts = [*map(textwrap.dedent, code), "import sys\nprint(*sys.modules)"]
    command = [sys.executable, "-c", "\n".join(parts)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def seldom_needed(modules: set[str]) -> set[str]:
    """Return those of these modules that only some settings or commands need."""
    own = tuple(f"ratelimit_mw._internal.{part}" for part in OWN)
    found = {each.partition(".")[0] for each in modules} & SELDOM
    return found | {each for each in modules for part in own if each == part or each.startswith(f"{part}.")}


def test_a_plain_import_loads_only_what_every_app_needs() -> None:
    """A process that serves no dashboard, asks no server and runs no command has none of their modules."""
    assert seldom_needed(loaded("import ratelimit_mw")) == set()


def test_of_pydantic_only_models_are_loaded() -> None:
    """Serializers are written without pydantic's module of them, which defines classes for some time."""
    loaded_anyway = loaded("from pydantic import BaseModel, SecretStr, TypeAdapter")
    assert "pydantic.functional_serializers" not in loaded("import ratelimit_mw") - loaded_anyway


TABLES = """
    import ratelimit_mw
    from ratelimit_mw._internal.settings.tables import PlanSettings
    from ratelimit_mw._internal.settings.values import Table

    def all_below(table):
        return [each for below in table.__subclasses__() for each in (below, *all_below(below))]

    def compiled():
        return [table for table in tables if table.__pydantic_complete__]

    tables = [ratelimit_mw.Settings, *all_below(Table)]
    assert PlanSettings in tables
"""
"""Code that looks which tables of the settings have their checks compiled, as none must have at import."""


def test_an_import_builds_no_model_of_the_settings() -> None:
    """A table is compiled when the first settings are made: a job that only reads tokens has no need."""
    code = """
        assert not compiled()
        from ratelimit_mw._internal.policy import code_limits
        assert not any(each.cache_info().currsize for each in (code_limits._rates, code_limits._slots))
        assert ratelimit_mw.Settings().plans["default"].requests
    """
    assert "ratelimit_mw" in loaded(TABLES, code)


def test_a_start_and_requests_compile_the_checks_of_the_settings_once() -> None:
    """The settings have the checks of all tables in theirs: no table compiles its own, least in a request."""
    code = """
        from starlette.applications import Starlette
        from starlette.responses import PlainTextResponse
        from starlette.routing import Route
        from starlette.testclient import TestClient

        def done(request):
            return PlainTextResponse("done")

        uploads = ratelimit_mw.Limit("uploads", "10/minute")
        app = Starlette(routes=[Route("/", ratelimit_mw.limited(uploads)(done))])
        written = {"plans": {"pro": {"requests": ["5/minute"]}}, "operations": {"usage_path": "/usage"}}
        settings = ratelimit_mw.Settings.model_validate(written)
        app.add_middleware(ratelimit_mw.RateLimitMiddleware, settings=settings)
        with TestClient(app) as client:
            for path in ("/", "/other", "/usage"):
                assert "x-ratelimit-limit" in client.get(path).headers
        assert compiled() == [ratelimit_mw.Settings], compiled()
    """
    assert "ratelimit_mw" in loaded(TABLES, code)


OF_REDIS_PY = {"cryptography", "opentelemetry"}
"""Packages that redis-py loads where they are installed."""
APP = """
    from ratelimit_mw import RateLimitMiddleware, Settings
    tables = {tables}
    RateLimitMiddleware(None, settings=Settings.model_validate(tables))
"""


@pytest.mark.parametrize(
    ("tables", "needed"),
    [
        ({}, set()),
        ({"plans": {"default": {"requests": ["5/minute"]}}}, set()),
        ({"backend": {"url": "redis://127.0.0.1:1"}}, {"redis", "hiredis"}),
        ({"operations": {"dashboard_path": "/ops", "dashboard_token": "t"}}, set()),
    ],
    ids=["defaults", "rates", "a server", "a dashboard"],
)
def test_settings_load_what_they_ask_for(tables: dict[str, object], needed: set[str]) -> None:
    """Beside what every app needs, an app has only the packages that its own settings are about."""
    modules = loaded(APP.format(tables=tables))
    packages = {each for each in seldom_needed(modules) if "." not in each}
    assert packages - needed <= (OF_REDIS_PY if "redis" in needed else set())
    assert needed <= packages
    assert ("ratelimit_mw._internal.dashboard.app" in modules) == ("operations" in tables)
