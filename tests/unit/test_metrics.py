"""Figures of a limiter, for Python and for Prometheus."""

import asyncio
import platform
import re

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from ratelimit_mw import Lease, Limiter, __version__
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.runtime.compiled import is_compiled
from ratelimit_mw.prometheus import LimiterCollector
from tests.conftest import StartServer
from tests.support.asgi import Down, FakeClock, limiter_of, settings_of
from tests.support.servers import StoreServer

SETTINGS = """
[plans.default]
requests = ["2/minute"]
concurrent = { limit = 1, lease = 5 }
spending = { daily = "1.00" }
[[routes]]
path = "/priced"
price = "0.10"
slot = false
[[routes]]
path = "/shadowed"
shadow = true
slot = false
"""


async def enter(limiter: Limiter, path: str = "/") -> Lease:
    """Ask for one request of the key `a`."""
    return await limiter.acquire(api_key="a", path=path)


def scraped(limiter: Limiter) -> str:
    """Return the text that Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(LimiterCollector(limiter))
    return generate_latest(registry).decode()


async def test_decisions_are_counted_by_plan_and_outcome() -> None:
    """Admitted, refused by its reason, and what shadow mode let through, each once."""
    limiter = limiter_of(SETTINGS, FakeClock())
    held = await enter(limiter)
    assert not (await enter(limiter)).allowed  # the slot is taken
    assert limiter.stats().leases == 1
    await held.release()
    async with await enter(limiter, "/priced") as lease:
        await lease.settle("0.05")
        await lease.settle("0.07")
    assert not (await enter(limiter)).allowed  # the window is full
    assert (await enter(limiter, "/shadowed")).allowed
    stats = limiter.stats()
    assert stats.decisions == {
        ("default", "admitted"): 2,
        ("default", "concurrency"): 1,
        ("default", "rate"): 1,
        ("default", "shadow"): 1,
    }
    assert (stats.leases, stats.settles_ignored, stats.slots_lost) == (0, 1, 0)


async def test_prometheus_reads_the_same_figures() -> None:
    """Every metric is there under its name, with labels from the settings alone."""
    limiter = limiter_of(SETTINGS, FakeClock())
    await enter(limiter)
    text = scraped(limiter)
    assert 'ratelimit_decisions_total{limit="",outcome="admitted",plan="default",route=""} 1.0' in text
    assert "ratelimit_backend_up 1.0" in text
    assert "ratelimit_leases 1.0" in text
    assert f'ratelimit_settings_info{{version="{limiter.version}"}} 1.0' in text
    assert "sha256" not in text


def families() -> list[Family]:
    """Every family of metrics that Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(LimiterCollector(limiter_of(SETTINGS, FakeClock())))
    return list(registry.collect())


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_names_are_as_prometheus_wants_them(family: Family) -> None:
    """The rules of `promtool check metrics`, and of its guide to naming."""
    words = family.name.split("_")
    assert re.fullmatch(r"ratelimit(_[a-z]+)+", family.name), "small letters, under one name for all"
    assert family.documentation.endswith("."), "a help text, which is a sentence"
    assert family.type in {"counter", "gauge", "histogram"}
    assert not {"counter", "gauge", "histogram", "summary", "metric"} & set(words), "no type in a name"
    assert not {"milliseconds", "ms", "minutes", "kilobytes", "percent"} & set(words), "base units alone"
    assert not {"secs", "sec", "bytes_total", "cnt", "num"} & set(words), "no abbreviation of a unit"
    reserved = ("_total", "_count", "_sum", "_bucket", "_created")
    assert not family.name.endswith(reserved), "such an end says what a series is"
    if family.name.endswith("_info"):
        assert family.type == "gauge"
    if family.type == "histogram":
        assert family.name.endswith("_seconds"), "its unit is in its name"
    for sample in family.samples:
        end = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[
            family.type
        ]
        assert sample.name in {family.name + suffix for suffix in end}
        assert family.type == "histogram" or not {"le", "quantile"} & set(sample.labels)
        for label in sample.labels:
            assert re.fullmatch("[a-z]+(_[a-z]+)*", label)
            assert label not in words, "a label's name in a metric's says nothing"


async def test_calls_of_the_backend_are_a_histogram(server: StoreServer) -> None:
    """Buckets hold all shorter calls too, the last one all calls, and the sum is that of their seconds."""
    settings = settings_of(f'backend = {{ url = "{server.url}", timeout = 5.0 }}\n{SETTINGS}')
    async with Limiter(settings) as limiter:
        await enter(limiter)
        text, load = scraped(limiter), limiter.stats().load
    (family,) = [
        each
        for each in text_string_to_metric_families(text)
        if each.name == "ratelimit_backend_call_duration_seconds"
    ]
    assert family.type == "histogram"
    buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    totals = {sample.name.rpartition("_")[2]: sample.value for sample in family.samples if not sample.labels}
    assert totals == {"count": sum(load.waits), "sum": pytest.approx(load.waited)}
    assert buckets[-1] == sum(load.waits) >= 1


async def test_it_is_told_what_runs() -> None:
    """Version, Python, and whether the modules of the request path are compiled."""
    text = scraped(limiter_of(SETTINGS, FakeClock()))
    compiled, python = str(is_compiled()).lower(), platform.python_version()
    assert f'ratelimit_info{{compiled="{compiled}",python="{python}",version="{__version__}"}} 1.0' in text


async def test_decisions_without_the_backend_are_counted_apart() -> None:
    """A decision made while the backend was away shows under the policy that decided."""
    limiter = limiter_of(SETTINGS, FakeClock(), Down(clock=FakeClock()))
    await enter(limiter)
    assert limiter.stats().decisions_without_backend == {"local": 1, "allow": 0, "deny": 0}
    assert limiter.stats().unsynced > 0
    assert 'ratelimit_decisions_without_backend_total{policy="local"} 1.0' in scraped(limiter)
    await limiter.close()


@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_settles_that_wait_show_until_they_are_written(kind: str, start_server: StartServer) -> None:
    """While the server hangs they are owed; when it is back there is none, and nothing was lost."""
    server = start_server(kind)
    backend = RedisBackend(server.url, timeout=1)
    async with Limiter(settings_of(SETTINGS), backend=backend) as limiter:
        lease = await enter(limiter, "/priced")
        assert limiter.stats().load.operations > 0
        server.stop_signal()
        await lease.settle("0.04")
        assert limiter.stats().load.owed == 1
        async with asyncio.timeout(10):
            while limiter.stats().backend_up:
                await asyncio.sleep(0.02)
        server.continue_signal()
        async with asyncio.timeout(10):
            while limiter.stats().load.owed:
                await asyncio.sleep(0.02)
        policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="a"), "GET", "/priced")
        assert (await limiter.engine.peek(policy)).limits[-1].status[:2] == (40_000, 0)
        assert limiter.stats().backend_up is True
