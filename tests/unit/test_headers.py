"""`X-RateLimit-*` and the IETF's headers: what they say after each kind of decision."""

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import SECOND, Slots, Window
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_RESERVATION
from ratelimit_mw._internal.model.status import SlotStatus, WindowStatus
from ratelimit_mw._internal.policy.decision import Decision, LimitStatus, Refusal
from ratelimit_mw._internal.responses.headers import HeaderWriter, add_headers
from ratelimit_mw._internal.settings import ResponseSettings
from tests.support.asgi import START, FakeClock, limited_client, shown

MINUTE, HOUR = Window(60, 1, "minute"), Window(1_000, 1, "hour")


def headers_of(decision: Decision, *names: str, reset: str = "unix") -> dict[str, str]:
    """Return the headers that are written about a decision."""
    settings = ResponseSettings.model_validate({"headers": names or ("x-ratelimit",), "reset": reset})
    return {name.decode(): value.decode() for name, value in HeaderWriter(settings)(decision)}


def decision_of(*windows: tuple[Window, int], cost: int = 1, reset_after: int = SECOND) -> Decision:
    """A decision on windows of the caller, each with what is used of it."""
    limit_statuses = [
        LimitStatus(Counter("k:1", "p", w), WindowStatus(used, reset_after, 0)) for w, used in windows
    ]
    return Decision(True, START * SECOND, cost, limits=tuple(limit_statuses))


async def test_headers_count_down_and_come_back() -> None:
    """Remaining falls by what each request costs, and grows when the oldest leaves the window."""
    clock = FakeClock()
    async with limited_client('plans.default.requests = ["3/minute"]', clock, x_api_key="a") as client:
        seen = []
        for second in (0, 10, 20, 60, 70):
            clock.set(second)
            seen.append(shown(await client.get("/")))
    resets = [str(START + seconds) for seconds in (60, 60, 60, 70, 80)]
    assert seen == [("3", left, reset) for left, reset in zip("21000", resets, strict=True)]


async def test_reset_in_seconds() -> None:
    """With `reset = "seconds"` the reset is the time from now until remaining next grows."""
    clock = FakeClock()
    text = 'plans.default.requests = ["3/minute"]\nresponse.reset = "seconds"'
    async with limited_client(text, clock, x_api_key="a") as client:
        await client.get("/")
        clock.set(10.25)
        assert shown(await client.get("/")) == ("3", "1", "50")


@pytest.mark.parametrize(
    ("reset", "after", "expected"),
    [
        ("unix", 1, START + 1),
        ("unix", SECOND, START + 1),
        ("unix", SECOND + 1, START + 2),
        ("seconds", 1, 1),
        ("seconds", SECOND, 1),
        ("seconds", SECOND + 1, 2),
    ],
)
def test_resets_are_rounded_up(reset: str, after: int, expected: int) -> None:
    """At the reset shown, remaining has grown; a second rounded down would promise too early."""
    written = headers_of(decision_of((MINUTE, 1), reset_after=after), reset=reset)
    assert written["x-ratelimit-reset"] == str(expected)


@pytest.mark.parametrize(
    ("windows", "cost", "limit", "remaining"),
    [
        ([(MINUTE, 10), (HOUR, 10)], 1, "60", "50"),
        ([(MINUTE, 10), (HOUR, 960)], 1, "1000", "40"),
        ([(MINUTE, 10), (HOUR, 950)], 1, "1000", "50"),
        ([(HOUR, 950), (MINUTE, 10)], 1, "1000", "50"),
        ([(MINUTE, 40), (HOUR, 965)], 10, "60", "20"),
        ([(MINUTE, 35), (HOUR, 971)], 10, "1000", "29"),
        ([(MINUTE, 59), (HOUR, 999)], 1, "1000", "1"),
        ([(MINUTE, 60), (HOUR, 999)], 1, "60", "0"),
        ([(MINUTE, 70), (HOUR, 1_000)], 1, "1000", "0"),
    ],
    ids=[
        "fewest",
        "fewest longer",
        "tie",
        "tie turned",
        "by cost",
        "tie by cost",
        "last one",
        "none before one",
        "over limit",
    ],
)
def test_window_shown(windows: list[tuple[Window, int]], cost: int, limit: str, remaining: str) -> None:
    """Shown is the window under which the fewest more requests of this cost fit; of equals the longer."""
    written = headers_of(decision_of(*windows, cost=cost))
    assert (written["x-ratelimit-limit"], written["x-ratelimit-remaining"]) == (limit, remaining)


@given(
    used=st.lists(st.tuples(st.sampled_from([MINUTE, HOUR, Window(60, 2, "minute")]), st.integers(0, 40))),
    cost=st.integers(1, 20),
)
def test_an_admitted_request_is_told_of_the_same_window(used: list[tuple[Window, int]], cost: int) -> None:
    """The window found without any status, as for most responses, is the window that the decision names."""
    windows = [(window, window.quota - left) for window, left in used]
    charge = Charge([Counter("k:1", "p", window) for window, _ in windows], cost)
    statuses = [WindowStatus(used, SECOND, 0) for _, used in windows]
    outcome = Outcome.from_statuses(True, START * SECOND, statuses, NO_RESERVATION)
    found = outcome.nearest_of(charge.windows)
    nearest = decision_of(*windows, cost=cost).nearest()
    assert (found and (found.window, windows[found.place][1])) == (nearest and (nearest[0], nearest[1].used))


def test_refusing_window_is_shown() -> None:
    """On a refusal by one of the caller's own windows that one is shown, however little another has left."""
    decision = decision_of((MINUTE, 58), (HOUR, 999), cost=5)
    refusal = Refusal("rate", decision.limits[0], SECOND)
    refused = Decision(False, decision.now_us, 5, limits=decision.limits, refusal=refusal)
    assert headers_of(refused)["x-ratelimit-limit"] == "60"


@pytest.mark.parametrize("owner", ["everyone", "address"])
def test_shared_windows_are_never_shown(owner: Literal["everyone", "address"]) -> None:
    """A window that others draw on too is never shown, not even if it refuses or nothing else is there."""
    counter = Counter("app", "app", Window(1, 1, "second"), owner)
    shared = LimitStatus(counter, WindowStatus(1, SECOND, SECOND))
    own = decision_of((MINUTE, 1)).limits
    refusal = Refusal("capacity" if owner == "everyone" else "rate", shared, SECOND)
    refused = Decision(False, 0, limits=(*own, shared), refusal=refusal)
    assert headers_of(refused)["x-ratelimit-limit"] == "60"
    assert headers_of(Decision(False, 0, limits=(shared,), refusal=refusal)) == {}


@pytest.mark.parametrize("names", [("x-ratelimit",), ("ietf",)])
def test_remaining_is_never_negative(names: tuple[str, ...]) -> None:
    """A limit lowered below what was used has nothing left, not less."""
    text = " ".join(headers_of(decision_of((MINUTE, 90)), *names).values())
    assert "-" not in text
    assert ("r=0;" in text) == ("ietf" in names)


async def test_route_window_is_shown_when_nearer() -> None:
    """A route's own limit is the caller's too, and shown where fewer requests fit under it."""
    text = 'plans.default.requests = ["60/minute"]\nroutes = [{path = "/slow", requests = ["2/second"]}]'
    async with limited_client(text, FakeClock(), x_api_key="a") as client:
        assert shown(await client.get("/slow"))[:2] == ("2", "1")
        assert shown(await client.get("/fast"))[:2] == ("60", "58")


async def test_plan_without_rates_has_no_headers() -> None:
    """A caller without a rate limit gets no headers about one."""
    async with limited_client("plans.default.concurrent = 1", FakeClock(), x_api_key="a") as client:
        assert shown(await client.get("/")) == (None, None, None)


async def test_ietf_headers() -> None:
    """`ietf` writes the draft's two fields, one item for each of the caller's own limits."""
    text = """
        plans.default.requests = ["60/minute", "5/2 seconds"]
        application.requests = ["7/second"]
        response.headers = ["ietf"]
        routes = [{path = "/slow", requests = ["2/second"]}]
    """
    clock = FakeClock()
    async with limited_client(text, clock, x_api_key="a") as client:
        await client.get("/")
        clock.set(0.5)
        headers = (await client.get("/slow")).headers
    assert headers["ratelimit-policy"] == ('"60/minute";q=60;w=60, "5/2 seconds";q=5;w=2, "2/second";q=2;w=1')
    assert headers["ratelimit"] == '"60/minute";r=58;t=60, "5/2 seconds";r=3;t=2, "2/second";r=1;t=1'
    assert "x-ratelimit-limit" not in headers


async def test_both_kinds_together() -> None:
    """Both kinds of headers can be had at once, and neither where the settings name none."""
    both = 'response.headers = ["x-ratelimit", "ietf"]'
    async with limited_client(both, FakeClock(), x_api_key="a") as client:
        headers = (await client.get("/")).headers
        assert headers["x-ratelimit-limit"] == "60"
        assert headers["ratelimit-policy"] == '"60/minute";q=60;w=60'
    async with limited_client("response.headers = []", FakeClock(), x_api_key="a") as client:
        assert not [name for name in (await client.get("/")).headers if "ratelimit" in name]


async def test_slots_have_no_item() -> None:
    """Only rates have headers: without one there are no empty fields."""
    text = 'plans.default.concurrent = 1\nresponse.headers = ["ietf"]'
    async with limited_client(text, FakeClock(), x_api_key="a") as client:
        assert "ratelimit" not in (await client.get("/")).headers


@pytest.mark.parametrize(
    "own", [b"x-ratelimit-limit", b"X-RateLimit-Remaining", b"RateLimit-Policy", b"ratelimit"]
)
def test_headers_of_the_app_stand(own: bytes) -> None:
    """An app that tells of rate limits itself keeps its headers, and none of ours stands beside them."""
    present = [(b"content-type", b"text/plain"), (own, b"7")]
    assert add_headers(present, [(b"x-ratelimit-limit", b"60")]) == present


@pytest.mark.parametrize("other", [b"x-request-id", b"X-Rate", b"retry-after", b"referrer-policy"])
def test_any_other_header_of_the_app_hides_nothing(other: bytes) -> None:
    """Only headers about rate limits take the place of ours, not those that begin a little like them."""
    ours = [(b"x-ratelimit-limit", b"60"), (b"ratelimit", b"r=1")]
    assert add_headers([(other, b"7")], ours) == [(other, b"7"), *ours]


def test_headers_are_added_at_the_end() -> None:
    """The app's headers stay as they are, in their order, repeated ones too; their types may vary."""
    present: Any = [(bytearray(b"set-cookie"), b"a"), [b"set-cookie", b"b"]]
    added = add_headers(present, [(b"x-ratelimit-limit", b"60")])
    shown = [tuple(header) for header in added]
    assert shown == [(b"set-cookie", b"a"), (b"set-cookie", b"b"), (b"x-ratelimit-limit", b"60")]


def test_slots_do_not_choose_the_window() -> None:
    """Slots are not a window: how many are taken changes nothing about what is shown."""
    decision = decision_of((MINUTE, 1))
    slots = LimitStatus(Counter("k:1", "p", Slots(1)), SlotStatus(1, is_full=False))
    assert headers_of(Decision(True, decision.now_us, limits=(slots, *decision.limits))) == headers_of(
        decision
    )


async def test_the_apps_own_headers_leave_the_others_in_place() -> None:
    """An app that tells of rate limits itself still lets shadow mode and budgets tell of theirs."""
    ours = [(b"x-ratelimit-limit", b"1"), (b"x-ratelimit-shadow", b"refused"), (b"x-spending-limit", b"1.00")]
    headers = add_headers([(b"X-RateLimit-Limit", b"7")], ours)
    assert headers == [(b"X-RateLimit-Limit", b"7"), *ours[1:]]
