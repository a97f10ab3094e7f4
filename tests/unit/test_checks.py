"""The start-up checks: what each finds, and that it says so once."""

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Mount

from ratelimit_mw import Limiter, RateLimitMiddleware, Settings
from ratelimit_mw._internal.checks.plain import findings as findings_of
from ratelimit_mw._internal.checks.startup import log_findings
from ratelimit_mw._internal.checks.surroundings import server_findings, worker_count
from ratelimit_mw._internal.live import reload, state
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.runtime.compiled import PURE
from ratelimit_mw._internal.settings import findings
from ratelimit_mw._internal.settings.findings import Finding, say_once
from tests.support.apps import ROOT
from tests.support.asgi import FakeClock, client_of, limited, ok_app, settings_of
from tests.support.settings_files import written
from tests.support.slots import until_async

pytestmark = pytest.mark.usefixtures("nothing_said")

REDIS = 'backend = { url = "redis://127.0.0.1:6379/0" }\nidentity = { hash_secret = "s" }\n'
PAGE = ROOT / "docs" / f"{findings.PAGE.removeprefix(findings.DOCS).strip('/')}.md"


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ('identity = { trusted_proxies = ["0.0.0.0/0"] }', "everyone-trusted", "trusted_proxies[0]"),
        ('identity = { trusted_proxies = ["10.0.0.0/8", "::/0"] }', "everyone-trusted", "trusted_proxies[1]"),
        ('identity = { blocked_networks = ["::/0"] }', "everyone-blocked", "every caller of IPv6"),
        ('[[addresses]]\nnetwork = "10.0.0.0/8"\nplan = "default"', "network-of-proxies", "plan default"),
        ("[plans.no]\nblocked = true\nconcurrent = 1", "no-effect", "[plans.no] is blocked"),
        (
            'application = { requests = ["500/second"], prefetch = true }',
            "no-effect",
            "no backend has to be asked",
        ),
        (REDIS + "application = { prefetch = true }", "no-effect", "[application] requests has no rate"),
        (
            REDIS + 'application = { requests = ["9000/minute", "40/second"], prefetch = true }',
            "no-effect",
            "40/second is too small, as fewer than 50 requests fit into it",
        ),
        (
            REDIS + '[[routes]]\npath = "/x"\ncost = 3\ntotal = ["140/second"]\ntotal_prefetch = true',
            "no-effect",
            "routes[0].total_prefetch has no effect: 140/second",
        ),
        (
            REDIS + 'application = { requests = ["500/second"] }\nplans.default = { prefetch = true }',
            "no-effect",
            "[plans.default] prefetch has no effect: each request draws on [application]",
        ),
        ('backend = { url = "redis://127.0.0.1/0" }', "no-hash-secret", "hash_secret"),
        ('backend = { url = "redis://:pw@db.example:6379" }', "redis-without-tls", "db.example:6379 is"),
        ('backend = { url = "valkey+cluster://127.0.0.1,far:7" }', "redis-without-tls", "far:7 is"),
        ('[plans.gold]\nrequests = ["5/minute"]', "unreachable-plan", "[plans.gold]"),
        ('[[routes]]\npath = "/x"\ncost = 61', "cost-above-limit", "60/minute of plans.default"),
        ('[[routes]]\npath = "/x"\ncost = 9\ntotal = ["5/hour"]', "cost-above-limit", "5/hour of its total"),
        (
            '[[routes]]\npath = "/x"\nprice = "2"\n[plans.default]\nspending = { daily = "1.00" }',
            "price-above-budget",
            "daily 1.00 USD of plans.default",
        ),
        ('[[routes]]\npath = "/x/{id"', "unmatched-braces", "/x/{id"),
        ('[[routes]]\npath = "/x/{9}"', "unmatched-braces", "/x/{9}"),
        ('[[routes]]\npath = "/a%20b"', "undecoded-path", "/a%20b"),
        ('[[routes]]\npath = "/a?b"', "undecoded-path", "without query"),
    ],
)
def test_each_check_finds_what_it_is_for(text: str, name: str, words: str) -> None:
    """A setting that does less, or more, than it seems to is told, with its place in the file."""
    assert [(finding.name, words in finding.text) for finding in findings_of(settings_of(text))].count(
        (name, True)
    ) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        REDIS,
        'backend = { url = "rediss://db.example" }\nidentity = { hash_secret = "s" }',
        'backend = { url = "unix:///run/redis.sock" }\nidentity = { hash_secret = "s" }',
        'backend = { url = "redis://localhost" }\nidentity = { hash_secret = "s" }',
        'backend = { url = "redis://[::1]:6379" }\nidentity = { hash_secret = "s" }',
        'identity = { trusted_proxies = ["10.0.0.0/8", "fc00::/7", "unix"] }',
        'identity = { unknown_keys = "anonymous" }',
        'identity = { anonymous_plan = "free" }\n[plans.free]\nrequests = ["5/minute"]',
        '[[routes]]\npath = "/x/{id:uuid}"\n[[routes]]\npath = "/x/{id}"',
    ],
)
def test_sound_settings_are_silent(text: str) -> None:
    """A check that cries for nothing is one that nobody reads."""
    assert findings_of(settings_of(text)) == ()


@pytest.mark.parametrize("wanted", [False, True])
def test_it_is_told_that_nothing_is_compiled(tmp_path: Path, *, wanted: bool) -> None:
    """An installation without compiled modules says so, unless the environment asks for that."""
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "ratelimit_mw", tmp_path / "ratelimit_mw", ignore=ignored)
    environment = {name: value for name, value in os.environ.items() if name != PURE}
    environment |= {PURE: "1"} if wanted else {}
    start = "import asyncio, logging, ratelimit_mw; logging.basicConfig(); limiter = ratelimit_mw.Limiter()\n"
    start += "asyncio.run(limiter.open())"
    for arguments in (["-m", "ratelimit_mw", "check"], ["-c", start]):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=True,
        )
        assert ("not compiled" in done.stdout) is not wanted
        assert ("checks/#not-compiled" in done.stdout) is not wanted
        assert (str(tmp_path / "ratelimit_mw") in done.stdout) is not wanted


@pytest.mark.parametrize("is_on", [True, False])
def test_it_is_told_that_the_gil_is_off(monkeypatch: pytest.MonkeyPatch, *, is_on: bool) -> None:
    """A process without the GIL is warned about, and one of a free-threaded Python that has it on is not."""
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: is_on, raising=False)
    assert [finding.name for finding in findings_of(settings_of(""))] == ([] if is_on else ["without-gil"])


def test_links_lead_to_the_documentation() -> None:
    """A reader who has only the wheel can follow a warning's link to a page of the documentation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"{findings.DOCS}/" == project["urls"]["Documentation"]
    finding = Finding("not-compiled", "why")
    assert str(finding) == f"why [{findings.DOCS}/checks/#not-compiled]"
    assert PAGE.name == "checks.md"


def routes(*rules: str) -> str:
    """A settings file with these rules, such as `GET,POST /x` or `exempt /x`."""
    text = ""
    for rule in rules:
        *before, path = rule.split()
        text += f'[[routes]]\npath = "{path}"\n'
        text += "exempt = true\n" if "exempt" in before else ""
        methods = [name for name in before if name != "exempt"]
        text += f"methods = {methods[0].split(',')}\n" if methods else ""
    return text


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        (["/x/{a}", "/x/y"], "shadowed-route"),
        (["/x/{a}", "/x/{b:int}"], "shadowed-route"),
        (["/{rest:path}", "/x"], "shadowed-route"),
        (["/x/{rest:path}", "/x/{a}/{b}"], "shadowed-route"),
        (["GET /x", "POST /x", "GET,POST /x"], "shadowed-route"),
        (["GET /x", "HEAD /x"], "shadowed-route"),
        (["GET /x", "GET,POST /x"], "shadowed-route"),
        (["/x", "/x"], "shadowed-route"),
        (["/x/{a:int}", "/x/{a:float}", "/x/{b:int}"], "shadowed-route"),
        (["exempt /x/{rest:path}", "/x/y"], "exempt-covers-route"),
        (["exempt GET /x", "GET,POST /x"], "exempt-covers-route"),
        (["exempt /{rest:path}", "/x", "/y"], "exempt-covers-route"),
    ],
)
def test_rules_that_never_apply_are_found(rules: list[str], name: str) -> None:
    """A rule whose requests earlier rules take never applies, however the patterns are spelled."""
    found = findings_of(settings_of(routes(*rules)))
    assert {finding.name for finding in found} == {name}
    assert "its requests match routes[" in found[0].text


@pytest.mark.parametrize(
    "rules",
    [
        ["/x/y", "/x/{a}"],
        ["/x/{b:int}", "/x/{a}"],
        ["GET /x", "POST /x"],
        ["GET /x", "/x"],
        ["exempt OPTIONS /{rest:path}", "/x"],
        ["exempt /x/health", "/x/{a}", "/{rest:path}"],
        ["exempt /health", "exempt /{rest:path}"],
        ["/x/{a}", "/x/{a}/"],
        ["/x/{a}.json", "/x/{a}"],
        ["/x/{a:int}", "/x/{a:float}"],
    ],
)
def test_rules_that_apply_are_not_called_dead(rules: list[str]) -> None:
    """An exception before its rule is how files are meant to be written."""
    assert findings_of(settings_of(routes(*rules))) == ()


@pytest.mark.parametrize(
    ("arguments", "environment", "workers"),
    [
        (["uvicorn", "app:app"], {}, 1),
        (["uvicorn", "app:app", "--workers", "4"], {}, 4),
        (["uvicorn", "--workers=3", "app:app"], {"WEB_CONCURRENCY": "8"}, 3),
        (["gunicorn", "-w", "2", "app:app"], {}, 2),
        (["gunicorn", "-w2", "app:app"], {}, 2),
        (["uvicorn", "app:app"], {"WEB_CONCURRENCY": "8"}, 8),
        (["granian", "app:app"], {"GRANIAN_WORKERS": "3"}, 3),
        (["uvicorn", "app:app"], {"WEB_CONCURRENCY": "many"}, 1),
        (["uvicorn", "app:app", "--workers"], {}, 1),
    ],
)
def test_workers_are_counted(arguments: Sequence[str], environment: Mapping[str, str], workers: int) -> None:
    """The number of processes that serve is read where servers read it."""
    assert worker_count(arguments, environment) == workers


def test_memory_backend_with_workers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options tell the number of workers if no process can be seen; a shared backend may have any."""
    arguments = ["uvicorn", "app:app", "--workers", "4"]
    monkeypatch.setattr("sys.platform", "darwin")
    (found,) = server_findings(settings_of(""), arguments, {})
    assert found.name == "memory-with-workers"
    assert not list(server_findings(settings_of(REDIS), arguments, {}))


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["uvicorn", "a:a", "--forwarded-allow-ips", "*"], {}),
        (["uvicorn", "a:a", "--forwarded-allow-ips=*"], {}),
        (["uvicorn", "a:a"], {"FORWARDED_ALLOW_IPS": "*"}),
    ],
)
def test_server_that_trusts_everyone_is_told(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> None:
    """With `*` the server itself takes the left-most address, which the client wrote."""
    (found,) = server_findings(settings_of(""), arguments, environment)
    assert found.name == "server-trusts-everyone"


def test_a_file_that_the_environment_names_in_vain_is_told(tmp_path: Path) -> None:
    """The file that code names is in force; the same file under another name is not a contradiction."""
    file = tmp_path / "ratelimit.toml"
    file.write_text("")
    (tmp_path / "link.toml").symlink_to(file)
    settings = Settings.load(file)
    for environment in ({}, {"RATELIMIT_SETTINGS": str(tmp_path / "link.toml")}):
        assert not list(server_findings(settings, (), environment))
    (found,) = server_findings(settings, (), {"RATELIMIT_SETTINGS": "/etc/api/other.toml"})
    assert found.name == "settings-named-twice"
    assert f"names /etc/api/other.toml, but the app's code names {file}" in found.text


async def test_middleware_mounted_twice_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Twice around one app, it is seen at once; around a mounted app as well, at the first request."""
    clock = FakeClock()
    RateLimitMiddleware(RateLimitMiddleware(ok_app()))
    assert [record.__dict__["check"] for record in caplog.records] == ["mounted-twice"]
    findings._said.clear()
    app = limited("", clock, Starlette(routes=[Mount("/sub", limited("", clock))]))
    async with client_of(app) as client:
        for _ in range(2):
            assert (await client.get("/sub/x")).status_code == 200
    assert [record.__dict__["check"] for record in caplog.records] == ["mounted-twice"] * 2


@pytest.mark.parametrize("outside", [True, False])
async def test_order_with_cors_is_told(caplog: pytest.LogCaptureFixture, *, outside: bool) -> None:
    """CORSMiddleware has to be outside; the other order is told when the app is put together."""
    app = ok_app()
    both = [Middleware(RateLimitMiddleware), Middleware(CORSMiddleware, allow_origins=["*"])]
    app.user_middleware += both[::-1] if outside else both
    async with client_of(app) as client:
        await client.get("/")
    assert [record.__dict__["check"] for record in caplog.records] == ([] if outside else ["cors-inside"])


def test_order_with_cors_is_told_of_a_wrapped_app(caplog: pytest.LogCaptureFixture) -> None:
    """Wrapped around a whole app, the middleware is always outside."""
    app = ok_app()
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    RateLimitMiddleware(app)
    assert "cors-inside" in caplog.text


def test_findings_are_said_once_and_as_loud_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    """Warnings warn, notes inform, and a second start in one process says nothing new."""
    settings = settings_of('identity = { trusted_proxies = ["::/0"] }\n[plans.gold]\nrequests = ["5/minute"]')
    with caplog.at_level(logging.INFO, "ratelimit_mw"):
        log_findings(settings)
        log_findings(settings)
    assert [(record.__dict__["check"], record.levelname) for record in caplog.records] == [
        ("everyone-trusted", "WARNING"),
        ("unreachable-plan", "INFO"),
    ]
    assert "/checks/#everyone-trusted" in caplog.text


def test_checks_take_as_many_steps_as_there_are_keys_and_routes() -> None:
    """Thousands of keys and hundreds of routes are checked at once, and few words are made of it."""
    spending = [{"daily": str(1 + number)} for number in range(5)]
    keys = [
        {"hash": f"sha256:{number:064x}", "plan": "default", "requests": [f"{1 + number % 7}/minute"]}
        | {"spending": spending[number % 5]}
        for number in range(3_000)
    ]
    routes = [
        {"path": f"/r{number}/{{id}}", "cost": 1 + number % 5, "price": "2.00"} for number in range(1_000)
    ]
    settings = Settings.model_validate({"keys": keys, "routes": routes})
    began = time.process_time()
    found = findings_of(settings)
    assert time.process_time() - began < 10
    assert 0 < len(found) <= 12 * len(routes)
    text = "routes[1] (/r1/{id}): its cost of 2 never fits into 1/minute of keys[0]: callers with this limit"
    assert f"{text} are always refused." in [finding.text for finding in found]
    assert any("other limits of plans and keys" in finding.text for finding in found)


async def test_findings_wait_until_a_change_is_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed file applies before it is checked, and neither live keys nor requests wait for the checks."""
    checked, over = threading.Event(), threading.Event()

    def check(_settings: Settings) -> None:
        checked.set()
        over.wait(60)

    monkeypatch.setattr(reload, "POLL_SECONDS", 0.02)
    file = written(tmp_path / "s.toml", '[plans.default]\nrequests = ["5/hour"]')
    async with Limiter.from_settings(file) as limiter:
        monkeypatch.setattr(state, "log_findings", check)
        written(file, '[plans.default]\nrequests = ["7/hour"]')
        await until_async(checked.is_set)
        assert limiter.settings.plans["default"].requests[0].quota == 7
        await limiter.engine.live.set_keys({f"sha256:{'0' * 64}": KeyEntry("default")})
        assert limiter.engine.live.rules.registered
        over.set()


def test_memory_of_what_was_said_is_bounded() -> None:
    """Findings that name peers can't fill the memory."""
    for number in range(2_000):
        say_once(Finding("untrusted-proxy", str(number), "note"))
    assert len(findings._said) == 1_000


def test_every_check_has_its_section() -> None:
    """The link that a finding carries leads to an explanation, and no section is about nothing."""
    sources = "".join(path.read_text() for path in (ROOT / "ratelimit_mw").rglob("*.py"))
    page = PAGE.read_text()
    sections = {line.removeprefix("### ") for line in page.splitlines() if line.startswith("### ")}
    assert sections
    for section in sections:
        assert f'Finding("{section}"' in sources
    assert sources.count('Finding("') == len(set(sources.split('Finding("')[1:]))
    named = {part.partition('"')[0] for part in sources.split('Finding("')[1:]}
    assert named == sections
