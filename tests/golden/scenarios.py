"""The traffic of the golden answers: settings, hooks and seeded steps of each scenario.

A change here makes the recorded answers those of other traffic: they have to be recorded anew, by code that
is known to be right.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from ratelimit_mw._internal.model.api_key_hash import hash_api_key

SECRET = "of the traffic"
SETTINGS = """
backend.timeout = 5.0
identity.hash_secret = "of the traffic"
identity.trusted_proxies = ["10.0.0.0/8"]
operations.usage_path = "/usage"

[application]
requests = ["90/minute"]
concurrent = 20

[plans.default]
requests = ["7/second", "40/minute"]
concurrent = 3

[plans.anonymous]
requests = ["5/second"]

[plans.pro]
requests = ["1200/second"]
concurrent = { limit = 2, unit = "prediction", max_hold = 600 }

[plans.budget]
requests = ["50/minute"]
spending = { daily = "1.00", monthly = "20.00", warn_at = 0.5 }

[plans.team]
requests = ["30/minute"]
share = "account"

[plans.abroad]
requests = ["5000/minute", "9000/hour"]
concurrent = 4
spending = { monthly = "0.30", currency = "EUR", timezone = "Asia/Kolkata", warn_at = 0.1 }

[plans.tried]
requests = ["2/minute"]
shadow = true

[plans.nothing]

[[keys]]
hash = "two"
plan = "pro"

[[keys]]
hash = "three"
plan = "budget"

[[keys]]
hash = "five"
plan = "team"
account = "acme"

[[keys]]
hash = "six"
plan = "team"
account = "acme"

[[keys]]
hash = "seven"
plan = "abroad"

[[keys]]
hash = "eight"
plan = "tried"

[[keys]]
hash = "nine"
plan = "nothing"

[[keys]]
hash = "ten"
plan = "budget"
requests = ["3/second"]
concurrent = 1

[[routes]]
path = "/free"
exempt = true

[[routes]]
path = "/dear"
methods = ["POST"]
cost = 3
requests = ["4/second"]

[[routes]]
path = "/priced"
price = "0.13"

[[routes]]
path = "/huge"
cost = 1000

[[routes]]
path = "/unaffordable"
price = "2.00"

[[routes]]
path = "/tried"
requests = ["2/second"]
shadow = true

[[routes]]
path = "/things/{id}"
total = ["9/second"]
slot = false
"""
PREFETCH = """
backend.timeout = 5.0
[plans.default]
requests = ["4000/minute", "100000/hour"]
prefetch = true
[plans.anonymous]
requests = ["50/minute"]
[plans.small]
requests = ["30/minute"]
prefetch = true
[[keys]]
key = "two"
plan = "small"
[plans.unlimited]
requests = ["1000000/second"]
[[keys]]
key = "somebody else"
plan = "unlimited"
[[routes]]
path = "/things/{id}"
cost = 2
"""
KEYS = (
    b"one", b"one", b"two", b"three", b" two", b"four\t", b"five", b"six", b"seven", b"eight", b"nine",
    b"ten", b"", b"x" * 20_000,
)  # fmt: skip
NAMES = (b"x-api-key", b"x-api-key", b"x-api-key", b"X-Api-Key", b"authorization", b"x-other")
PATHS = (
    "/", "/", "/", "/free", "/priced", "/priced", "/dear", "/huge", "/things/1", "/things/1\n", "/elsewhere",
    "/unaffordable", "/tried", "/usage",
)  # fmt: skip
CLIENTS = (("192.0.2.1", 1), ("192.0.2.1", 2), ("2001:db8::7", 1), ("10.0.0.1", 1), None)
APP_HEADERS: tuple[list[tuple[bytes, bytes]] | None, ...] = (
    [(b"content-type", b"text/plain")],
    [(b"X-RateLimit-Limit", b"3"), (b"content-length", b"0")],
    [(b"x-request-id", b"1"), (b"ratelimitless", b"1")],
    [(b"RateLimit", b"mine")],
    [],
    None,
)
DOORS = (0, 1, 2, 3)
"""Doors in the app at which requests wait until they are let out."""
AMOUNTS = ("0", "0.01", "0.031", "0.0000001", "3", "much")
WAITS = (1, 1000, 140_000, 500_000, 1_000_000, 1_000_000, 7_000_000, 30_000_000)
LONG_WAITS = (3_600_000_000, 86_400_000_000, -300_000)


@dataclass(frozen=True)
class Ask:
    """One request, or several of a kind at once, and what the app does about it."""

    about: dict[str, Any]
    how: dict[str, Any]
    at_once: int = 1

    def scope(self) -> Scope:
        """Make the scope anew: it is changed on its way."""
        about = {**self.about, "headers": list(self.about["headers"])}
        return about if about.pop("has_no_state") else {**about, "state": {}}


@dataclass(frozen=True)
class Wait:
    """Time that passes."""

    microseconds: int


@dataclass(frozen=True)
class Open:
    """A door through which requests end that wait in the app."""

    door: int


@dataclass(frozen=True)
class Token:
    """One use of the token of a detached lease, as by a worker."""

    use: str
    place: int
    amount: str


@dataclass(frozen=True)
class WaitAsTold:
    """The time that the last refusal told to wait."""


Step = Ask | Wait | WaitAsTold | Open | Token


@dataclass(frozen=True)
class Scenario:
    """Traffic of one kind."""

    name: str
    seed: int
    settings: str = SETTINGS
    hooks: dict[str, str] = field(default_factory=dict)
    """Hooks by argument of the middleware: each a method of `World`, without its underscore."""
    length: int = 120
    keys: tuple[bytes, ...] = KEYS
    paths: tuple[str, ...] = PATHS
    kinds: tuple[str, ...] = ("http", "http", "http", "http", "websocket")
    is_plain: bool = False
    """Whether the app only answers."""
    names: tuple[bytes, ...] = NAMES
    clients: tuple[tuple[str, int] | None, ...] = CLIENTS
    has_prefetch: bool = False
    is_away: bool = False
    """Whether the backend can't be reached."""
    backends: tuple[str, ...] = ("memory", "redis")
    """Backends on which the answers are those recorded."""

    def steps(self) -> Iterator[Step]:
        """Make the steps, always the same."""
        traffic = _Traffic(self)
        for _ in range(self.length):
            yield traffic.step()

    def __str__(self) -> str:
        return self.name


class _Traffic:
    """A source of steps."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._random = random.Random(scenario.seed)
        self._last: Ask | None = None

    def step(self) -> Step:
        """Ask mostly, and often as before: what was refused is met again."""
        chance = self._random.random()
        if chance < 0.3 and self._last is not None:
            return self._last
        if chance < 0.72:
            self._last = self._ask()
            return self._last
        if chance < 0.82:
            return Open(self._pick(DOORS))
        if chance < 0.86 and not self._scenario.is_plain:
            uses = ("resume", "renew", "settle", "release")
            return Token(self._pick(uses), self._random.randrange(4), self._pick(AMOUNTS))
        if chance < 0.88:
            return WaitAsTold()
        return Wait(self._pick(WAITS if chance < 0.99 else LONG_WAITS))

    def _pick(self, choices: tuple[Any, ...]) -> Any:
        return choices[self._random.randrange(len(choices))]

    def _ask(self) -> Ask:
        pick, scenario = self._pick, self._scenario
        headers = [
            (pick(scenario.names), pick((b"", b"", b"Bearer ", b"bearer  ")) + pick(scenario.keys))
            for _ in range(pick((0, 1, 1, 1, 1, 1, 1, 2)))
        ]
        if pick((False, False, True)):
            headers.append((b"x-forwarded-for", pick((b"198.51.100.7", b"nonsense", b"1.2.3.4, 10.0.0.9"))))
        kind = pick(scenario.kinds)
        about = {
            "type": kind,
            "path": pick(scenario.paths),
            "root_path": pick(("", "", "", "/things")),
            "headers": headers,
            "client": pick(scenario.clients),
            "has_no_state": pick((False, False, True)),
        }
        if kind == "http":
            about["method"] = pick(("GET", "GET", "POST", "HEAD"))
        elif pick((True, False)):
            about["extensions"] = {"websocket.http.response": {}}
        how = {"status": 200, "headers": APP_HEADERS[0]} if scenario.is_plain else self._how()
        at_once = pick((1,) * 9 + (4,))
        if scenario.has_prefetch or at_once == 1:
            return Ask(about, how)
        # All of them are decided about before one ends, whatever a decision waits for.
        return Ask(about, {**how, "door": pick(DOORS), "raises": None}, at_once)

    def _how(self) -> dict[str, Any]:
        pick = self._pick
        how = {
            "status": pick((200, 200, 200, 404, 500)),
            "headers": pick(APP_HEADERS),
            "parts": pick((0, 0, 1, 40)),
            "looks": pick((False, True)),
            "door": pick((None, None, None, *DOORS)),
            "raises": pick((None,) * 10 + ("early", "late")),
        }
        use = pick((None,) * 6 + ("settle", "settle", "settle_late", "detach", "detach", "release"))
        if use is not None:
            how[use] = {"detach": pick((60, 0.5, -1)), "release": True}.get(use) or pick(AMOUNTS)
        return how


def _with_hashes(settings: str) -> str:
    """Settings in which keys are listed by their hashes."""
    for key in ("two", "three", "five", "six", "seven", "eight", "nine", "ten"):
        settings = settings.replace(f'hash = "{key}"', f'hash = "{hash_api_key(key.encode(), SECRET)}"')
    return settings


def _with(first: str = "", response: str = "") -> str:
    """The settings with lines before them, and with a table `[response]`."""
    return _with_hashes(f"{first}\n{SETTINGS}\n[response]\n{response}\n")


def _in_tokens() -> str:
    """The settings with budgets and prices in tokens."""
    settings = _with()
    for amount, tokens in [
        ("1.00", "100"),
        ("20.00", "2000"),
        ("0.30", "30"),
        ("0.13", "13"),
        ("2.00", "200"),
    ]:
        settings = settings.replace(f'"{amount}"', f'"{tokens}"')
    settings = settings.replace('currency = "EUR"', 'currency = "token"')
    return settings.replace("spending = { daily", 'spending = { currency = "token", daily')


def _away(policy: str) -> str:
    """The settings where the backend's absence lets some requests through and refuses others."""
    other = {"allow": "deny", "deny": "allow"}[policy]
    settings = _with(f'backend.on_failure = "{policy}"')
    for line in ("[plans.pro]", 'path = "/things/{id}"'):
        settings = settings.replace(line, f'{line}\non_failure = "{other}"')
    return settings.replace("spending = { daily", f'spending = {{ on_failure = "{other}", daily')


ALL_RESPONSES = """
headers = ["ietf", "x-ratelimit"]
reset = "seconds"
body = "problem"
documentation_url = "https://example.com/limits"
capacity_status = 503
"""
BUDGETS = (b"three", b"seven", b"ten")
PRICED = ("/priced", "/priced", "/", "/unaffordable")
SCENARIOS = [
    *[Scenario(f"mixed-{seed}", seed, _with()) for seed in range(4)],
    Scenario("plain", 10, _with(), is_plain=True, kinds=("http",), keys=(b"one", b"two"), length=250),
    Scenario("priced", 11, _with(), keys=BUDGETS, paths=PRICED),
    Scenario("spending", 9, _with(), keys=BUDGETS, paths=("/priced",), names=(b"x-api-key",), is_plain=True),
    Scenario("tokens", 16, _in_tokens(), keys=BUDGETS, paths=PRICED),
    Scenario("jobs", 12, _with(), keys=(b"two", b"three", b"seven"), paths=("/priced", "/"), kinds=("http",)),
    Scenario("websocket", 13, _with(), kinds=("websocket",)),
    Scenario(
        "capacity",
        14,
        _with().replace("concurrent = 20", "concurrent = 3"),
        keys=(b"two", b"nine", b"one"),
        paths=("/", "/things/1"),
    ),
    Scenario("accounts", 15, _with(), keys=(b"five", b"six", b"eight")),
    Scenario("away-denies", 17, _away("deny"), is_away=True, backends=("memory",)),
    Scenario(
        "away-allows", 18, _away("allow"), {"on_decision": "on_decision"}, is_away=True, backends=("memory",)
    ),
    Scenario("refusals", 19, _with(), is_plain=True, keys=(b"one",), paths=("/", "/dear", "/things/1")),
    Scenario("reset-seconds", 20, _with(response='reset = "seconds"')),
    Scenario("ietf", 21, _with(response='headers = ["ietf"]')),
    Scenario("both-headers", 22, _with(response='headers = ["x-ratelimit", "ietf"]')),
    Scenario("no-headers", 23, _with(response="headers = []")),
    Scenario("problem", 24, _with(response='body = "problem"')),
    Scenario("documented", 25, _with(response='documentation_url = "https://example.com/limits"')),
    Scenario("capacity-503", 26, _with(response="capacity_status = 503")),
    Scenario("all-responses", 27, _with(response=ALL_RESPONSES)),
    Scenario("shadow", 30, _with("shadow = true")),
    Scenario("shadow-ietf", 31, _with("shadow = true", 'headers = ["ietf"]\nreset = "seconds"')),
    Scenario("per-address", 40, _with('identity.per_address = ["9/second", "60/minute"]')),
    Scenario("unknown-anonymous", 41, _with('identity.unknown_keys = "anonymous"')),
    Scenario("on-decision", 50, _with(), {"on_decision": "on_decision"}),
    Scenario("identify", 51, _with(), {"identify": "identify"}),
    Scenario("identify-async", 52, _with(), {"identify": "identify_async"}),
    Scenario("price", 53, _with(), {"price": "price"}),
    Scenario("price-async", 54, _with(), {"price": "price_async"}),
    Scenario("resolve", 55, _with(), {"resolve": "resolve"}),
    Scenario(
        "all-hooks",
        56,
        _with(),
        {"identify": "identify", "price": "price_async", "on_decision": "on_decision"},
    ),
    *[
        Scenario(
            f"prefetch-{backend}",
            60,
            PREFETCH,
            is_plain=True,
            kinds=("http",),
            keys=(b"one", b"one", b"two"),
            paths=("/", "/things/1"),
            clients=CLIENTS[:2],
            length=300,
            has_prefetch=True,
            backends=(backend,),
        )
        for backend in ("memory", "redis")
    ],
]
