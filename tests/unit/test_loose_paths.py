"""Route rules under `paths = "loose"`: one rule for every spelling of its path."""

import re
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_mw import Settings, SettingsError
from ratelimit_mw._internal.policy.loose_paths import loosened, route_table
from ratelimit_mw._internal.settings import findings
from tests.support.asgi import FakeClock, limited
from tests.unit.test_checks_routers import RULE, checks, litestar_app


def matched(path: str, *rules: str, raw: bytes | None = None, method: str = "GET") -> int | None:
    """Index of the rule that holds for a request; a rule is a path, with `!` before an exempt one."""
    routes = [{"path": rule.removeprefix("!"), "exempt": rule.startswith("!")} for rule in rules]
    table = route_table(Settings.model_validate({"paths": "loose", "routes": routes}))
    scope = {
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape") if raw is None else raw,
        "method": method,
    }
    assert raw is not None or table.match(method, path) == table.of_scope(scope)
    return table.of_scope(scope)


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("/v1/x/", "/v1/x"),
        ("/v1/x", "/v1/x/"),
        ("//V1///X//", "/v1/x"),
        ("/v1/x", "/V1//X"),
        ("/", "/"),
        ("//", "/"),
        ("", "/"),
        ("/P/a/", "/p/{Id}"),
        ("/P/7", "/p/{id:int}/"),
        ("/F", "/f/{rest:path}"),
        ("/F/", "/f/{rest:path}"),
        ("/f//a//", "/f/{rest:path}"),
        ("/a/B/c", "/{x}/b/{y}"),
        ("/STRASSE", "/straße"),
        ("/v1/ITEM\u017f", "/v1/\u0130tems"),
        ("/DEADBEEF-0000-4000-8000-00000BADF00D", "/{id:uuid}"),
        ("/\udcff/X", "/{any}/x"),
    ],
)
def test_every_spelling_is_the_rules(path: str, rule: str) -> None:
    """Slashes at the end, several slashes and the case of letters make no other path."""
    assert matched(path, rule) == 0


@pytest.mark.parametrize(
    ("path", "rule"), [("/v1/y", "/v1/x"), ("/v1", "/v1/x"), ("/v1/x/y", "/v1/{x}"), ("/p/x", "/p/{id:int}")]
)
def test_another_path_is_none_of_the_rules(path: str, rule: str) -> None:
    """A rule takes no path that differs in more than its spelling."""
    assert matched(path, rule) is None


def test_the_first_rule_counts_and_the_exact_one_of_one_path() -> None:
    """Rules hold in the order of the file; of two for one path, the one with the request's own spelling."""
    rules = ("/v1/Models", "/v1/models", "/{rest:path}")
    assert [matched(path, *rules) for path in ("/v1/Models", "/v1/models", "/V1/MODELS", "/v1/x")] == [
        0,
        1,
        0,
        2,
    ]


def test_an_exempt_rule_holds_for_its_own_spelling_alone() -> None:
    """Another spelling of an exempt path is limited: it may be another route of the app's."""
    rules = ("!/health", "/v1/x", "!/{rest:path}")
    assert [matched(path, *rules) for path in ("/health", "/Health", "/V1/X/", "/v1/x")] == [0, 2, 1, 1]
    assert matched("/Health", "!/health") is None


@pytest.mark.parametrize("raw", [b"/p/a%2Fb", b"/P/a%2fb/", b"//p/a%2F%2f", b"/p/a%2Fb?x=%2F", b"/p/%2F"])
def test_an_encoded_slash_may_be_within_a_segment(raw: bytes) -> None:
    """A router that splits paths before it decodes them runs `/p/{id}` for `/p/a%2Fb`."""
    path = unquote(raw.partition(b"?")[0].decode())
    assert matched(path, "/p/{id}", raw=raw) == 0
    assert matched(path, "/{rest:path}", "/p/{id}", raw=raw) == 0


def test_the_setting_is_checked_and_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is none is an error with the choices; `RATELIMIT_PATHS` sets it, too."""
    with pytest.raises(SettingsError, match=r'"exact"|exact'):
        Settings.of_file("x.toml", {"paths": "lose"})
    monkeypatch.setenv("RATELIMIT_PATHS", "loose")
    assert Settings.load().paths == "loose"


def test_with_loose_paths_no_router_is_a_finding(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of other routers names the setting, and is silent once it is set."""
    monkeypatch.setattr(findings, "_said", set())
    limited(RULE, FakeClock(), litestar_app())
    assert 'paths = "loose"' in caplog.text
    caplog.clear()
    monkeypatch.setattr(findings, "_said", set())
    limited(f'paths = "loose"\n{RULE}', FakeClock(), litestar_app())
    assert checks(caplog) == []


@given(st.text(max_size=30))
def test_the_form_is_one_for_all_spellings(text: str) -> None:
    """Changing the case of letters that have one other, or doubling slashes, changes no form."""
    path = f"/{text}"
    form = loosened(path)
    assert loosened(form) == form
    assert loosened(path.replace("/", "//") + "/") == form
    assert "//" not in form
    plain = "".join(letter for letter in path if re.match(r"[ -~]", letter))
    assert loosened(plain.upper()) == loosened(plain.lower())
