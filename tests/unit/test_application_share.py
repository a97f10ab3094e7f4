"""`application_share`: room on shared limits that some plans leave to others."""

import asyncio
from pathlib import Path

import pytest

from ratelimit_mw import Limiter, Settings
from ratelimit_mw._internal.cache.refusals import RefusalCache
from ratelimit_mw._internal.checks.plain import findings
from ratelimit_mw._internal.model.limits import SECOND, Slots, Window, part_of
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_RESERVATION
from ratelimit_mw._internal.model.status import SlotStatus, Status, WindowStatus
from ratelimit_mw._internal.outage.fallback import LocalPolicy
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.policy import Policies
from tests.support.apps import ROOT
from tests.support.asgi import FakeClock, client_of, limited, settings_of
from tests.support.commands import Commands
from tests.support.settings_files import problems, written
from tests.unit.test_local import Pair

TEXT = """
[application]
requests = ["10/minute"]
concurrent = 4
[plans.default]
[plans.anonymous]
application_share = 0.5
[[routes]]
path = "/total"
total = ["5/minute"]
"""


@pytest.mark.parametrize(
    ("amount", "share", "part"),
    [
        (500, 0.8, 400),
        (100, 0.29, 29),
        (10, 0.7, 7),
        (1, 0.5, 1),
        (3, 0.99, 2),
        (3, 0.01, 1),
        (7, 1.0, 7),
        (5, 0.999999, 4),
    ],
)
def test_a_share_is_rounded_down_and_at_least_one(amount: int, share: float, part: int) -> None:
    """The share counts as the settings write it, not as binary fractions have it."""
    assert part_of(amount, share) == part
    assert Window(amount, 1, "minute").at_share(share).quota == part
    assert Slots(amount).at_share(share).limit == part


async def test_the_share_is_felt_by_its_callers_alone() -> None:
    """Anonymous callers are refused at half of the rate, by the code of shared limits; others at all."""
    app = limited(TEXT, FakeClock())
    async with client_of(app) as anonymous, client_of(app, x_api_key="k") as keyed:
        assert [(await anonymous.get("/")).status_code for _ in range(6)] == [200] * 5 + [429]
        refused = await anonymous.get("/")
        assert refused.json()["error"]["code"] == "CAPACITY_EXCEEDED"
        assert refused.json()["error"]["details"] == {"retry_after": 60}
        assert refused.headers["retry-after"] == "60"
        assert [(await keyed.get("/")).status_code for _ in range(6)] == [200] * 5 + [429]
        assert not [name for name in refused.headers if name.startswith("x-ratelimit")]


async def test_what_others_use_counts_for_the_share() -> None:
    """One count: where others have used up the share, its callers are refused, and others go on."""
    app = limited(TEXT, FakeClock())
    async with client_of(app, address="192.0.2.9") as anonymous, client_of(app, x_api_key="k") as keyed:
        assert [(await keyed.get("/")).status_code for _ in range(5)] == [200] * 5
        assert (await anonymous.get("/")).status_code == 429
        assert (await keyed.get("/")).status_code == 200


async def test_a_routes_total_keeps_room_too() -> None:
    """Half of five is two, rounded down."""
    app = limited(TEXT, FakeClock())
    async with client_of(app) as anonymous, client_of(app, x_api_key="k") as keyed:
        assert [(await anonymous.get("/total")).status_code for _ in range(3)] == [200, 200, 429]
        assert [(await keyed.get("/total")).status_code for _ in range(4)] == [200, 200, 200, 429]


@pytest.mark.parametrize("kind", ["memory", "redis", "valkey"])
async def test_load_is_shed_where_nobody_pays(kind: str, request: pytest.FixtureRequest) -> None:
    """Anonymous traffic at ten times the application's slots, and not one refusal for the paying plan."""
    url = "memory://" if kind == "memory" else request.getfixturevalue(f"{kind}_server").url
    text = f"""
    backend = {{ url = "{url}", timeout = 10.0 }}
    [application]
    concurrent = 10
    [plans.anonymous]
    application_share = 0.8
    [plans.paying]
    concurrent = 2
    [[keys]]
    key = "pays"
    plan = "paying"
    """
    running = most = refused = 0
    done = asyncio.Event()

    async with Limiter(settings_of(text)) as limiter:

        async def crowd(number: int) -> None:
            nonlocal running, most, refused
            while not done.is_set():
                lease = await limiter.acquire(address=f"192.0.2.{number}")
                if not lease.allowed:
                    refused += 1
                    await asyncio.sleep(0)
                    continue
                running += 1
                most = max(most, running)
                await asyncio.sleep(0.002)
                running -= 1
                await lease.release()

        async def pays() -> list[bool]:
            answers = []
            for _ in range(50):
                lease = await limiter.acquire(api_key="pays")
                answers.append(lease.allowed)
                await asyncio.sleep(0.001)
                await lease.release()
            return answers

        waiting = [asyncio.create_task(crowd(number)) for number in range(100)]
        while not refused:
            await asyncio.sleep(0.001)
        answers = [*await asyncio.gather(pays(), pays())]
        done.set()
        await asyncio.gather(*waiting)
    assert answers == [[True] * 50] * 2
    assert most == 8
    assert refused > 100


async def test_an_outage_keeps_the_room() -> None:
    """On its own a process grants a share of its own part, and tells the backend of one count afterwards."""
    text = 'backend.local_share = 0.25\n[application]\nrequests = ["10/minute"]\nconcurrent = 10\n'
    pair = Pair(text + "[plans.default]\n[plans.anonymous]\napplication_share = 0.9\n")
    pair.backend.away = True

    async def admitted(number: int, **who: str) -> int:
        leases = [await pair.limiter.acquire(**who) for _ in range(number)]  # type: ignore[arg-type]
        return sum(lease.allowed for lease in leases)

    assert await admitted(5, address="192.0.2.1") == 2
    assert await admitted(5, api_key="k") == 1
    await pair.back()
    (window, *_) = await pair.statuses()
    assert window[0] == 3
    await pair.limiter.close()


async def test_what_is_known_of_the_whole_counts_in_an_outage() -> None:
    """Whoever comes first, the local count begins with what is left of the whole limit."""
    text = 'backend.local_share = 0.5\n[application]\nrequests = ["100/minute"]\n'
    text += "[plans.default]\n[plans.anonymous]\napplication_share = 0.8\n"
    for first in ("anonymous", "keyed"):
        pair = Pair(text)
        pair.limiter.engine.decider.local = LocalPolicy(pair.backend, clock=pair.clock)
        who = {"anonymous": {"address": "192.0.2.1"}, "keyed": {"api_key": "a"}}
        assert await pair.admitted(60) == 60
        assert (await pair.limiter.acquire(address="192.0.2.1")).allowed
        pair.backend.away = True
        order = ["anonymous", "keyed"] if first == "anonymous" else ["keyed", "anonymous"]
        granted = {}
        for name in order:
            leases = [await pair.limiter.acquire(**who[name]) for _ in range(60)]  # type: ignore[arg-type]
            granted[name] = sum(lease.allowed for lease in leases)
        # 61 of 100 are used: of 50 here 20 are left, and the anonymous, who stop at 40, have 10 of them.
        assert granted["anonymous"] == (10 if first == "anonymous" else 0)
        assert sum(granted.values()) == 20
        await pair.limiter.close()


@pytest.mark.parametrize(("used", "is_forgotten"), [(5, False), (6, True), (10, True)])
def test_a_remembered_refusal_knows_when_its_share_is_full(used: int, is_forgotten: bool) -> None:
    """Use by others beyond the share changes what a refused caller is told."""
    policies = Policies(settings_of(TEXT + '[plans.slow]\nrequests = ["1/hour"]\napplication_share = 0.6\n'))
    slow = policies.at(Identity("k:slow", "slow"), None).charge
    paid = policies.at(Identity("k:paid", "default"), None).charge
    cache = RefusalCache()
    mine = [WindowStatus(1, 3600 * SECOND, 3600 * SECOND), WindowStatus(1, 60 * SECOND, 0)]
    slow_windows = [each for each in slow.counters if isinstance(each.limit, Window)]
    assert [each.limit.quota for each in slow_windows if isinstance(each.limit, Window)] == [1, 6]
    refused = Outcome.from_statuses(False, 0, [*mine, SlotStatus(0, False)], NO_RESERVATION)
    cache.add(slow, refused, cache.now(), ("rate", ""))
    assert cache.find(slow) is not None
    shared: list[Status] = [WindowStatus(used, 60 * SECOND, 0), SlotStatus(1, False)]
    cache.admitted(paid, Outcome.from_statuses(True, 0, shared, NO_RESERVATION))
    assert (cache.find(slow) is None) == is_forgotten
    cache.clear()
    assert len(cache) == 0


async def test_a_cost_that_no_share_holds_is_never_admitted() -> None:
    """Its code says that waiting is no use; `check` finds it in the file."""
    text = (
        TEXT
        + '[[routes]]\npath = "/big"\ncost = 6\n[[routes]]\npath = "/wide"\ncost = 3\ntotal = ["5/hour"]\n'
    )
    app = limited(text, FakeClock())
    async with client_of(app) as anonymous, client_of(app, x_api_key="k") as keyed:
        for path in ("/big", "/wide"):
            refused = await anonymous.get(path)
            assert refused.json()["error"]["code"] == "COST_EXCEEDS_LIMIT"
            assert "retry-after" not in refused.headers
            assert (await keyed.get(path)).status_code == 200
    said = [finding.text for finding in findings(settings_of(text)) if finding.name == "cost-above-limit"]
    assert any(
        "cost of 6 never fits into 5/minute of application.requests at plans.anonymous.application_share"
        in each
        for each in said
    )
    assert any(
        "cost of 3 never fits into 2/hour of its total at plans.anonymous.application_share" in each
        for each in said
    )


def test_commands_tell_the_share(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`explain` has the part and what it is of; `check` has it beside the plan."""
    path = str(written(tmp_path / "s.toml", TEXT))
    commands = Commands(capsys)
    told = commands.json("explain", "GET", "/total", "--settings", path)["limits"]
    total, rate, slots = [each for each in told if each["owner"] == "everyone"]
    at = ", at plans.anonymous.application_share"
    assert (total["limit"], total["of"], total["from"]) == (2, 5, f"routes[0].total{at}")
    assert (rate["limit"], rate["of"], rate["from"]) == (5, 10, f"application.requests{at}")
    assert (slots["limit"], slots["of"], slots["from"]) == (2, 4, f"application.concurrent{at}")
    keyed = commands.json("explain", "GET", "/total", "--key", "k", "--settings", path)["limits"]
    assert [each["limit"] for each in keyed] == [5, 10, 4]
    assert "anonymous (0.5 of shared limits)" in commands.good("check", path)
    plans = commands.json("check", path)["plans"]
    assert (plans["anonymous"]["application_share"], plans["default"]["application_share"]) == (0.5, 1.0)


@pytest.mark.parametrize("share", ["0", "0.0", "1.01", "-0.5", "nan", "inf", '"0.8"', "true"])
def test_what_is_no_share(tmp_path: Path, share: str) -> None:
    """More than nothing, and at most all."""
    found = problems(tmp_path, f"[plans.default]\napplication_share = {share}")
    assert len(found) == 1
    assert found[0].startswith("plans.default.application_share: ")


def test_the_whole_file_of_the_reference_loads() -> None:
    """Every setting there is, together."""
    settings = Settings.load(ROOT / "tests" / "settings_good" / "ratelimit.toml")
    assert settings.plans["anonymous"].application_share == 0.8
    assert settings.plans["blocked"].blocked
    assert [str(each) for each in settings.identity.blocked_networks] == ["192.0.2.0/24"]
    assert [(str(each.network), each.plan) for each in settings.addresses] == [("10.0.0.0/8", "internal")]
