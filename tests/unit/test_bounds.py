"""Bounds of the backend's script: it takes all that the settings, live keys and code can ask for."""

from pathlib import Path
from typing import Any

import pytest

from ratelimit_mw import Limiter, RateLimitMiddleware, Settings, SettingsError
from ratelimit_mw._internal.live.key_entries import key_settings
from ratelimit_mw._internal.model.limits import Slots, Window
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.settings.limits import MAX_QUOTA, MAX_RATES, MAX_SLOTS
from ratelimit_mw._internal.settings.tables import PlanSettings
from tests.support.asgi import client_of, ok_app
from tests.support.conformance import KINDS, SharedServer
from tests.support.settings_files import load, problems
from tests.support.statuses import counted

SOME_HASH = "sha256:" + "0" * 64


def rates(number: int) -> list[str]:
    """So many rates, each of a length of its own, under which many requests fit."""
    return [f"{MAX_QUOTA - n}/{n} seconds" for n in range(1, number + 1)]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("plans.pro.requests", "plans.pro.requests = {}"),
        ("application.requests", "application.requests = {}"),
        ("identity.per_address", "identity.per_address = {}"),
        ("routes[0].requests", "[[routes]]\npath = '/'\nrequests = {}"),
        ("routes[0].total", "[[routes]]\npath = '/'\ntotal = {}"),
        ("keys[0].requests", "[[keys]]\nkey = 'k'\nplan = 'default'\nrequests = {}"),
    ],
)
@pytest.mark.parametrize("number", [MAX_RATES + 1, 256])
def test_a_list_of_rates_has_a_bound(tmp_path: Path, path: str, text: str, number: int) -> None:
    """More limits than a charge can carry are an error of the settings, not of each request."""
    found = problems(tmp_path, text.format(rates(number)))
    assert found == [f"{path}: has {number} rates; expected at most {MAX_RATES}"]


def test_live_keys_have_the_same_bounds() -> None:
    """A key that is set live can't ask for more than one of the file."""
    entry = KeyEntry("default", requests=tuple(rates(256)))
    with pytest.raises(SettingsError, match="has 256 rates"):
        key_settings(entry, SOME_HASH, Settings())
    with pytest.raises(SettingsError, match=r"concurrent\.limit"):
        key_settings(KeyEntry("default", concurrent=MAX_SLOTS + 1), SOME_HASH, Settings())


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        ({"requests": (Window(MAX_QUOTA + 1, 1, "minute"),)}, "is too large"),
        ({"requests": (Window(0, 1, "minute"),)}, "never admits anything"),
        ({"requests": (Window(5, 11, "year"),)}, "is too long"),
        ({"requests": (Window(5, 0, "minute"),)}, "never admits anything"),
        ({"requests": (Window(1.5, 1, "minute"),)}, "is not in whole numbers"),  # type: ignore[arg-type]
        ({"concurrent": Slots(MAX_SLOTS + 1)}, "concurrent"),
        ({"concurrent": Slots(0)}, "concurrent"),
        ({"concurrent": Slots(5, lease_seconds=float("nan"))}, "lease"),
        ({"concurrent": Slots(5, lease_seconds=1e12)}, "lease"),
    ],
)
def test_limits_that_code_makes_have_the_same_bounds(limits: dict[str, Any], what: str) -> None:
    """A ready-made limit in place of its text is checked like the text."""
    with pytest.raises(SettingsError, match=what):
        Settings.model_validate({"plans": {"default": limits}})
    assert PlanSettings(requests=(Window(5, 1, "minute"),), concurrent=Slots(5)).concurrent == Slots(5)


@pytest.mark.parametrize("kind", KINDS)
async def test_as_many_limits_as_can_be_set_decide_together(
    kind: str, shared_server: SharedServer, tmp_path: Path
) -> None:
    """Every list full, with slots and budgets: admitted, released and undone like any other request."""
    url = "memory://" if kind == "memory" else shared_server(kind).url
    settings = load(
        tmp_path,
        f"""
        backend.url = "{url}"
        backend.timeout = 5.0
        backend.on_failure = "deny"
        application = {{requests = {rates(MAX_RATES)}, concurrent = 5}}
        identity.per_address = {rates(MAX_RATES)}
        identity.unknown_keys = "anonymous"
        [plans.anonymous]
        requests = {rates(MAX_RATES)}
        concurrent = {{limit = 1, lease = 300_000_000}}
        spending = {{daily = "1", monthly = "1000000000"}}
        [[routes]]
        path = "/"
        price = "0.6"
        requests = {rates(MAX_RATES)}
        total = {rates(MAX_RATES)}
        """,
    )
    async with Limiter(settings) as limiter:
        lease = await limiter.acquire(address="192.0.2.1", cost=1_000)
        assert lease.allowed
        assert len(lease.decision.limits) == 5 * MAX_RATES + 4
        again = await limiter.acquire(address="192.0.2.1")
        assert again.decision.refusal is not None
        assert again.decision.policy == "shared"
        await limiter.release(lease)
        await limiter.settle(lease, "0.1")
        async with client_of(RateLimitMiddleware(ok_app(), limiter=limiter), address="192.0.2.1") as client:
            assert (await client.get("/")).status_code == 200
            assert (await client.get("/elsewhere")).status_code == 200
        decision = await limiter.engine.peek(
            limiter.engine.policies.match(limiter.engine.identity_of(address="192.0.2.1"), "GET", "/")
        )
        assert [counted(each) for each in decision.limits[:MAX_RATES]] == [1_002] * MAX_RATES
