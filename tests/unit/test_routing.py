"""Route rules that requests fall under: always those that Starlette's own patterns say."""

from collections.abc import Sequence
from uuid import UUID

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette._utils import get_route_path
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, compile_path
from starlette.types import Receive, Scope, Send

from ratelimit_mw._internal.policy.routing import RouteTable, route_path
from ratelimit_mw._internal.settings import RouteSettings

Rule = tuple[str, frozenset[str] | None]

UUID_TEXT = str(UUID(int=7))


def table(*rules: str | tuple[str, set[str] | None]) -> RouteTable:
    """Rules as paths, or as paths with methods."""
    pairs = [(rule, None) if isinstance(rule, str) else rule for rule in rules]
    return RouteTable(
        [
            RouteSettings(path=path, methods=None if names is None else frozenset(names))
            for path, names in pairs
        ]
    )


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("/v1/predictions", "/v1/predictions", True),
        ("/v1/predictions", "/v1/predictions\n", True),
        ("/v1/predictions", "/v1/predictions\n\n", False),
        ("/v1/predictions", "/v1/predictions/", False),
        ("/v1/predictions", "//v1/predictions", False),
        ("/v1/predictions", "/v1/./predictions", False),
        ("/v1/predictions", "/v1/x/../predictions", False),
        ("/v1/predictions", "/V1/predictions", False),
        ("/v1/predictions", "/v1/predictions;a=b", False),
        ("/v1/predictions", "/v1/predictions ", False),
        ("/v1/predictions", "/v1/predictions\0", False),
        ("/v1/predictions", "/v1/%70redictions", False),
        ("/v1/predictions", "v1/predictions", False),
        ("/v1/predictions", "*", False),
        ("/v1/predictions", "", False),
        ("/v1/predictions/{id}", "/v1/predictions/7", True),
        ("/v1/predictions/{id}", "/v1/predictions/", False),
        ("/v1/predictions/{id}", "/v1/predictions/\n", True),
        ("/v1/predictions/{id}", "/v1/predictions/7/8", False),
        ("/v1/predictions/{id:int}", "/v1/predictions/7\n", True),
        ("/v1/predictions/{id:int}", "/v1/predictions/seven", False),
        ("/v1/predictions/{id:int}", "/v1/predictions/\u0667", False),
        ("/v1/predictions/{id:int}", "/v1/predictions/" + "9" * 5_000, True),
        ("/price/{x:float}", "/price/0.5", True),
        ("/price/{x:float}", "/price/.5", False),
        ("/by/{x:uuid}/log", f"/by/{UUID_TEXT}/log", True),
        ("/by/{x:uuid}/log", f"/by/{UUID_TEXT.replace('-', '')}/log", True),
        ("/by/{x:uuid}/log", "/by/me/log", False),
        ("/files/{rest:path}", "/files/", True),
        ("/files/{rest:path}", "/files", False),
        ("/files/{rest:path}", "/files/a/b//c", True),
        ("/files/{rest:path}", "/files/a\nb", False),
        ("/files/{rest:path}", "/files/a\n", True),
        ("/files/x{rest:path}", "/files/xy/z", True),
        ("/files/{rest:path}/raw", "/files/a/b/raw", True),
        ("/files/{rest:path}/raw", "/files/a/b/raw\n", True),
        ("/files/{rest:path}/raw", "/files/raw", False),
        ("/{kind}-{rest:path}", "/b-c/d", True),
        ("/{kind}-{rest:path}", "/b/c-d", False),
        ("/{id}.json", "/a.json", True),
        ("/{id}.json", "/.json", False),
        ("/model-{id}:run", "/model-7:run", True),
        ("/model-{id}:run", "/model-:run", False),
        ("/{a}-{b}", "/x-y", True),
        ("/{not a parameter}", "/{not a parameter}", True),
        ("/", "/", True),
        ("/", "", False),
    ],
)
def test_pattern_matches_what_starlette_matches(pattern: str, path: str, matches: bool) -> None:
    """A rule is for exactly the paths that Starlette's router would take to its route."""
    assert (compile_path(pattern)[0].match(path) is not None) is matches
    assert table(pattern).match("GET", path) == (0 if matches else None)


@pytest.mark.parametrize(
    ("methods", "method", "matches"),
    [
        (None, "GET", True),
        (None, "BREW", True),
        ({"GET"}, "HEAD", True),
        ({"HEAD"}, "HEAD", True),
        ({"HEAD"}, "GET", False),
        ({"GET"}, "OPTIONS", False),
        ({"GET"}, "get", False),
        ({"GET"}, "", False),
        ({"GET"}, "\0", False),
        ({"POST"}, "HEAD", False),
        ({"POST", "DELETE"}, "DELETE", True),
    ],
)
@pytest.mark.parametrize("path", ["/v1/x", "/v1/{id}"])
def test_methods_are_those_listed_and_head_counts_as_get(
    path: str, methods: set[str] | None, method: str, matches: bool
) -> None:
    """A rule without methods is for all; HEAD falls under a rule for GET; nothing else is assumed."""
    assert table((path, methods)).match(method, "/v1/x") == (0 if matches else None)


@pytest.mark.parametrize(
    ("method", "path", "index"),
    [
        ("GET", "/v1/a", 0),
        ("POST", "/v1/a", 1),
        ("PUT", "/v1/a", 3),
        ("POST", "/v1/b", 2),
        ("PUT", "/v1/b", 3),
        ("GET", "/v1/b", 0),
        ("GET", "/v2", 3),
    ],
)
def test_first_match_in_file_order_wins(method: str, path: str, index: int) -> None:
    """A literal path doesn't come before an earlier pattern, nor a narrow pattern before a wide one."""
    rules = table(
        ("/v1/{id}", {"GET"}), ("/v1/a", {"POST"}), ("/v1/{name}", {"POST"}), "/{rest:path}", "/v1/b"
    )
    assert rules.match(method, path) == index


@pytest.mark.parametrize(
    ("rules", "path", "index"),
    [
        (["/v1/{id:int}", "/v1/{id}"], "/v1/a", 1),
        (["/v1/{id:int}", "/v1/{id}"], "/v1/7", 0),
        (["/{a}/{b:int}", "/{a}/{b}"], "/v1/a", 1),
        (["/{a:int}/{b}", "/{a}/{b}"], "/v1/a", 1),
        (["/v1/{id}", "/v1/{name}"], "/v1/a", 0),
        (["/v1/{id}", ("/v1/{name}", {"GET"})], "/v1/a", 0),
    ],
)
def test_rules_of_one_pattern_differ_in_names_alone(
    rules: list[str | tuple[str, set[str] | None]], path: str, index: int
) -> None:
    """Patterns are the same whatever their parameters are called, but not whatever these stand for."""
    assert table(*rules).match("GET", path) == index


def test_rule_list_may_be_empty() -> None:
    """Without route rules no request matches one."""
    assert table().match("GET", "/") is None


def test_pattern_without_leading_slash_is_refused() -> None:
    """A pattern that Starlette would read as a host name never becomes a rule."""
    with pytest.raises(ValueError, match="must start with a slash"):
        RouteTable([RouteSettings.model_construct(path="{host}", methods=None)])


@pytest.mark.parametrize(
    ("scope", "index"),
    [
        ({"type": "http", "method": "POST", "path": "/v1/jobs"}, 0),
        ({"type": "http", "method": "GET", "path": "/v1/jobs"}, 1),
        ({"type": "websocket", "path": "/v1/jobs"}, 1),
        ({"type": "http", "method": "POST", "path": "/api/v1/jobs", "root_path": "/api"}, 0),
        ({"type": "websocket", "path": "/api/v1/jobs", "root_path": "/api"}, 1),
        ({"type": "http", "method": "GET", "path": "/v2/jobs"}, None),
    ],
)
def test_a_scope_falls_under_the_rule_of_its_path_and_method(scope: Scope, index: int | None) -> None:
    """A handshake of a WebSocket falls under the rules for `GET`; `root_path` is not a part of the path."""
    assert table(("/v1/jobs", {"POST"}), ("/v1/jobs", {"GET"})).of_scope(scope) == index
    assert table().of_scope(scope) is None


@pytest.mark.parametrize(
    "shape", ["/r{}/x", "/r{}/{{id}}", "/{{t}}/r{}", "/r{}-{{id}}", "/{{id}}.r{}", "/r{}/{{x:path}}"]
)
def test_look_up_asks_few_patterns_however_many_there_are(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request costs no more pattern matches among a thousand rules than among two."""
    asked: list[str] = []

    def counting(pattern: str) -> tuple[object, ...]:
        compiled = compile_path(pattern)

        class Counted:
            @staticmethod
            def match(path: str) -> object:
                asked.append(pattern)
                return compiled[0].match(path)

        return Counted, *compiled[1:]

    monkeypatch.setattr("ratelimit_mw._internal.policy.routing.compile_path", counting)
    rules = table(*(shape.format(number) for number in range(1_000)), "/{rest:path}")
    asked.clear()
    for number in (0, 500, 999):
        path = shape.format(number).replace("{t}", "t").replace("{id}", "7").replace("{x:path}", "a/b")
        assert rules.match("GET", path) == number
    assert len(asked) <= (6 if "{{" in shape else 0)  # a path without parameters is looked up as it stands


SEGMENTS = ["", "a", "b", "v1", "é", "%", ".", "..", "a\n", "\n", "7", "7.5", UUID_TEXT, "a-b", "{", " "]
PARAMETERS = ["{}", "{}", "{:str}", "{:int}", "{:float}", "{:uuid}", "{:path}"]
METHODS = ["GET", "HEAD", "POST", "get", ""]


@st.composite
def patterns(draw: st.DrawFn) -> str:
    """Patterns of few distinct pieces, so that they overlap often."""
    pieces = draw(st.lists(st.sampled_from(["/", "/", "/", *SEGMENTS, *PARAMETERS, *PARAMETERS]), max_size=9))
    named = (
        piece.replace("{", f"{{p{at}") if piece in PARAMETERS else piece for at, piece in enumerate(pieces)
    )
    return "/" + "".join(named)


paths = st.one_of(
    st.lists(st.sampled_from(["/", "/", "/", "\n", *SEGMENTS]), max_size=10).map("".join),
    st.lists(st.sampled_from(SEGMENTS), max_size=5).map(lambda parts: "/" + "/".join(parts)),
    st.text(st.sampled_from("/a7.\n"), max_size=8),
    st.text(max_size=8),
)
method_sets = st.none() | st.frozensets(st.sampled_from(["GET", "HEAD", "POST"]), min_size=1)
rule_lists = st.lists(st.tuples(patterns(), method_sets), max_size=8)


def first_match(rules: Sequence[Rule], method: str, path: str) -> int | None:
    """The rule that Starlette's patterns and methods say, one after the other."""
    for index, (pattern, methods) in enumerate(rules):
        listed = methods is None or method in methods or (method == "HEAD" and "GET" in methods)
        if listed and compile_path(pattern)[0].match(path):
            return index
    return None


@given(rules=rule_lists, asked=st.lists(st.tuples(st.sampled_from(METHODS), paths), min_size=1, max_size=20))
@example(rules=[("/{a}\n", None)], asked=[("GET", "/x\n"), ("GET", "/x\n\n"), ("GET", "/\n")])
@example(rules=[("/{a:path}/{b}", None), ("/a{c:path}a", None)], asked=[("GET", "/a"), ("GET", "/aa\n")])
def test_look_up_agrees_with_starlette_on_every_string(
    rules: list[Rule], asked: list[tuple[str, str]]
) -> None:
    """The index is a shortcut only: any rules and any path give what asking each pattern in turn gives."""
    found = RouteTable([RouteSettings.model_construct(path=path, methods=names) for path, names in rules])
    for method, path in [*asked, *((method, pattern) for method in METHODS for pattern, _ in rules)]:
        assert found.match(method, path) == first_match(rules, method, path)


@settings(max_examples=40)  # each makes up to eight paths
@given(rules=rule_lists, filled=st.data())
def test_paths_made_from_patterns_agree_with_starlette(rules: list[Rule], filled: st.DataObject) -> None:
    """Paths that were made to fit a pattern find the rule that Starlette's patterns say."""
    found = RouteTable([RouteSettings.model_construct(path=path, methods=names) for path, names in rules])
    for pattern, _ in rules:
        path = filled.draw(st.from_regex(compile_path(pattern)[0]))
        for method in METHODS:
            assert found.match(method, path) == first_match(rules, method, path)


roots = st.text(st.sampled_from("/ab"), max_size=4)


@given(path=st.text(st.sampled_from("/ab\n"), max_size=6), root_path=roots)
@example(path="/a", root_path="/a")
@example(path="/ab", root_path="/a")
def test_route_path_is_starlettes(path: str, root_path: str) -> None:
    """`root_path` is taken off the path where Starlette takes it off, and only there."""
    scope: Scope = {"type": "http", "path": path, "root_path": root_path}
    assert route_path(scope) == get_route_path(scope)
    assert route_path({"type": "http", "path": path}) == path


async def test_rule_is_that_of_the_mounted_route_that_runs() -> None:
    """Inside a mounted app and behind a `root_path`, rules name the paths that the app's own routes name."""
    rules = table("/jobs/{id:int}")
    seen: list[int | None] = []

    async def job(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(request.path_params["id"]))

    inner = Starlette(routes=[Route("/jobs/{id:int}", job)])

    async def watch(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(rules.match(scope["method"], route_path(scope)))
        await inner(scope, receive, send)

    outer = httpx.ASGITransport(Starlette(routes=[Mount("/api", watch)]), root_path="/proxy")
    async with httpx.AsyncClient(transport=outer, base_url="http://test/proxy") as client:
        assert (await client.get("/api/jobs/7")).text == "7"
        assert (await client.get("/api/jobs/x")).status_code == 404
    assert seen == [0, None]
