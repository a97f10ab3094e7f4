"""Figures that Prometheus scrapes: names and labels that stay few, and one sum for all workers."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ratelimit_mw import KeyEntry, Limiter
from ratelimit_mw._internal.observe.stats import CALL_DURATION, METRICS
from ratelimit_mw._internal.runtime.liveness import PREFIX, LifeSign
from ratelimit_mw.prometheus import MIRROR_SECONDS, LimiterCollector, export
from tests.conftest import StartApp
from tests.support.apps import ROOT
from tests.support.asgi import FakeClock, client_of, limited, limiter_of, statuses
from tests.support.settings_files import written

PATIENCE = 30.0
SETTINGS = """
plans.default = { requests = ["2/minute"], concurrent = 1 }
plans.pro = { requests = ["9/minute"] }
keys = [{ key = "pro", plan = "pro" }, { key = "special", plan = "pro", requests = ["1/minute"] }]
routes = [
  { path = "/v1/{x}", requests = ["1/second"] },
  { path = "/health", exempt = true },
]
"""


def samples(text: str, name: str) -> dict[tuple[str, ...], float]:
    """The samples of this name in a scraped text, by the values of their labels in the labels' order."""
    return {
        tuple(sample.labels[label] for label in sorted(sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def block_of(language: str, word: str) -> str:
    """Return the block of the page for operators that has a word in it."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (block,) = [each for each in blocks if word in each]
    return str(block)


async def test_scrapes_of_the_pages_app_are_never_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule that the page shows exempts what its example mounts, whatever its callers have used."""
    monkeypatch.chdir(tmp_path)
    plan = 'plans.anonymous.requests = ["1/minute"]\n'
    written(tmp_path / "ratelimit.toml", plan + block_of("toml", "/metrics"))
    before, names = set(REGISTRY._collector_to_names), dict[str, Any]()
    exec(block_of("python", "export(limiter)"), names)
    try:
        async with client_of(names["app"]) as client:
            assert await statuses(client, 2, "/none") == [404, 429]
            assert await statuses(client, 3, "/metrics/") == [200] * 3
    finally:
        for collector in set(REGISTRY._collector_to_names) - before:
            REGISTRY.unregister(collector)
        await names["limiter"].close()


def scraped(limiter: Limiter) -> str:
    """Return the text that Prometheus reads of one process."""
    registry = CollectorRegistry()
    export(limiter, registry)
    return generate_latest(registry).decode()


async def test_decisions_by_plan_route_outcome_and_limit() -> None:
    """Each tells which rule it fell under and which limit refused, under the names of the settings."""
    limiter = limiter_of(SETTINGS, FakeClock())
    for key, path in [("a", "/v1/x"), ("a", "/v1/y"), ("a", "/"), ("a", "/"), ("pro", "/"), ("a", "/health")]:
        await (await limiter.acquire(api_key=key, path=path)).release()
    held = await limiter.acquire(api_key="b")
    assert not (await limiter.acquire(api_key="b")).allowed
    await held.release()
    found = samples(scraped(limiter), "ratelimit_decisions_total")
    limit_outcome_plan_route = {
        ("", "admitted", "default", "/v1/{x}"): 1,
        ("1/second", "rate", "default", "/v1/{x}"): 1,
        ("", "admitted", "default", ""): 2,
        ("2/minute", "rate", "default", ""): 1,
        ("", "admitted", "pro", ""): 1,
        ("slots", "concurrency", "default", ""): 1,
    }
    assert found == limit_outcome_plan_route


async def test_limits_of_single_keys_have_one_name() -> None:
    """However many rates the app's database gives to single keys, there is one label for them all."""

    async def resolve(api_key: str) -> KeyEntry:
        return KeyEntry("pro", requests=(f"{len(api_key)}/minute",))

    limiter = limiter_of(SETTINGS, FakeClock())
    limiter.engine.live.resolve_by(resolve)
    for length in range(2, 12):
        for _ in range(length + 1):
            await limiter.acquire(api_key="k" * length, address="192.0.2.1")
    await limiter.acquire(api_key="special")
    await limiter.acquire(api_key="special")
    refused = {
        each for each in samples(scraped(limiter), "ratelimit_decisions_total") if each[1] != "admitted"
    }
    assert refused == {("own", "rate", "pro", "")}
    await limiter.close()


async def test_no_caller_makes_a_series() -> None:
    """Hundreds of keys, addresses and paths make no more series than the settings have names."""
    app = limited(SETTINGS, FakeClock())
    for number in range(300):
        async with client_of(app, address=f"192.0.2.{number % 250}", x_api_key=f"key-{number}") as client:
            await statuses(client, 3, f"/v1/{number}")
            await statuses(client, 1, f"/somewhere/{number}")
    text = scraped(app.limiter)
    assert len(samples(text, "ratelimit_decisions_total")) < 8
    assert "key-" not in text
    assert "sha256" not in text
    assert "192.0.2" not in text


async def test_every_metric_is_scraped() -> None:
    """All that is counted is exported, each under its own name and with its labels."""
    limiter = limiter_of(SETTINGS, FakeClock())
    await limiter.acquire(api_key="a")
    families = {each.name: each for each in text_string_to_metric_families(scraped(limiter))}
    assert set(families) == {metric.name for metric in METRICS} | {CALL_DURATION.name}
    for metric in METRICS:
        assert families[metric.name].type == metric.kind
        for sample in families[metric.name].samples:
            assert set(sample.labels) == set(metric.labels)


async def test_a_second_limiter_cannot_take_the_names() -> None:
    """Two limiters under the same names would be one unreadable sum."""
    registry = CollectorRegistry(auto_describe=True)
    export(limiter_of(SETTINGS, FakeClock()), registry)
    with pytest.raises(ValueError, match="Duplicated"):
        export(limiter_of(SETTINGS, FakeClock()), registry)


async def test_scraping_from_other_threads_loses_nothing() -> None:
    """While requests are counted, any number of threads may read; in the end every request is there once."""
    limiter = limiter_of('plans.default = { requests = ["20/minute"] }', FakeClock())
    collector, done = LimiterCollector(limiter), threading.Event()

    def scrape() -> None:
        while not done.is_set():
            list(collector.collect())

    threads = [threading.Thread(target=scrape) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(6_000):
        await limiter.acquire(api_key=f"key-{number % 100}")
    done.set()
    for thread in threads:
        thread.join()
    assert limiter.stats().decisions == {("default", "admitted"): 2_000, ("default", "rate"): 4_000}


# several workers --------------------------------------------------------------------------------


def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_one_scrape_tells_of_all_workers(start_app: StartApp, tmp_path: Path) -> None:
    """Whichever of two workers is scraped, it tells the sum of both; a killed one takes its gauges along."""
    (tmp_path / "metrics").mkdir()
    (tmp_path / "ratelimit.toml").write_text(
        'plans.default.requests = ["100000/minute"]\nroutes = [{path = "/metrics/", exempt = true}]'
    )
    environment = {
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics"),
        "RATELIMIT_SETTINGS": str(tmp_path / "ratelimit.toml"),
    }
    served = start_app("tests.support.metrics_app:app", workers=2, environment=environment)

    def scrape(name: str) -> dict[tuple[str, ...], float]:
        return samples(httpx.get(f"{served.url}/metrics/", timeout=PATIENCE, verify=False).text, name)

    def decisions() -> float:
        return sum(scrape("ratelimit_decisions_total").values())

    def ask() -> int:
        """One request on a connection of its own, so that either worker may take it."""
        answer = httpx.get(f"{served.url}/pid", headers={"X-API-Key": "a"}, timeout=PATIENCE, verify=False)
        assert answer.status_code == 200
        return int(answer.text)

    asked = [ask() for _ in range(20)]
    while len(set(asked)) < 2:
        asked.append(ask())
        assert len(asked) < 2_000
    until(lambda: decisions() == len(asked))
    assert scrape("ratelimit_decisions_total") == {("", "admitted", "default", ""): len(asked)}
    assert scrape("ratelimit_backend_up") == {(): 1}
    (workers,) = scrape("ratelimit_info").values()
    assert workers == 2
    (workers,) = scrape("ratelimit_settings_info").values()
    assert workers == 2

    os.kill(asked[0], signal.SIGKILL)
    until(lambda: len(served.worker_pids()) == 2 and served.log.count("startup complete") == 3)
    until(lambda: list(scrape("ratelimit_settings_info").values()) == [2])
    assert decisions() == len(asked)


def test_the_last_second_is_not_lost(start_app: StartApp, tmp_path: Path) -> None:
    """Counts of a worker just before it was told to stop are in the files for the others to add up."""
    (tmp_path / "metrics").mkdir()
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics")}
    served = start_app("tests.support.metrics_app:app", environment=environment)
    for _ in range(5):
        assert httpx.get(f"{served.url}/pid", headers={"X-API-Key": "a"}).status_code == 200
    served.restart()
    text = httpx.get(f"{served.url}/metrics/", headers={"X-API-Key": "b"}).text
    assert samples(text, "ratelimit_decisions_total")["", "admitted", "default", ""] >= 5


def run(script: str, folder: Path) -> str:
    """Run a process with shared files in this folder, which must end well; return its output."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_processes_add_up_to_one_histogram(tmp_path: Path) -> None:
    """Calls that two processes timed are in one set of buckets, and one that is written twice counts once."""
    script = """
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from ratelimit_mw import Limiter, Settings
from ratelimit_mw._internal.model.backend import WAITS, Load
from ratelimit_mw.prometheus import Mirror
limiter = Limiter(Settings())
mirror = Mirror(limiter)
mirror.update()
waits = (1, 0, 2, *[0] * (len(WAITS) - 3), 1)
limiter.engine.backend.load = Load(batches=4, waited=3.5, waits=waits)
mirror.update()
mirror.update()
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    run(script, tmp_path)
    text = run(script, tmp_path)
    name = "ratelimit_backend_call_duration_seconds"
    buckets = {float(le): value for (le,), value in samples(text, f"{name}_bucket").items()}
    assert [buckets[bound] for bound in (0.0005, 0.001, 0.002, 1.0, math.inf)] == [2, 2, 6, 6, 8]
    assert samples(text, f"{name}_sum") == {(): 7.0}
    assert samples(text, f"{name}_count") == {(): 8}


def test_a_changed_version_takes_the_place_of_the_old(tmp_path: Path) -> None:
    """Settings that are no longer in force count no process; and a second limiter can't take the names."""
    script = """
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from ratelimit_mw import Limiter, Settings
from ratelimit_mw.prometheus import Mirror, export
limiter = Limiter(Settings())
mirror = Mirror(limiter)
mirror.update()
before = limiter.version
limiter.apply(Settings(shadow=True))
mirror.update()
registry = CollectorRegistry()
MultiProcessCollector(registry)
text = generate_latest(registry).decode()
assert f'ratelimit_settings_info{{version="{before}"}} 0.0' in text, text
assert f'ratelimit_settings_info{{version="{limiter.version}"}} 1.0' in text, text
export(limiter)
try:
    export(limiter)
except ValueError as error:
    print(error)
"""
    assert "exported already" in run(script, tmp_path)


def test_a_process_that_is_forked_off_writes_its_own_figures(tmp_path: Path) -> None:
    """Counts of a forked process are added to those of its parent, while both count on."""
    script = """
import asyncio, os, struct, time
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from ratelimit_mw import Limiter, Settings
from ratelimit_mw.prometheus import export
limiter = Limiter(Settings())
export(limiter)
registry = CollectorRegistry()
MultiProcessCollector(registry)
labels = {"plan": "default", "route": "", "outcome": "admitted", "limit": ""}

def admitted():
    try:
        return registry.get_sample_value("ratelimit_decisions_total", labels)
    except struct.error:  # prometheus_client meets a file that the other process has made but not filled yet
        return None

async def decide(key, times):
    for _ in range(times):
        await (await limiter.acquire(api_key=key)).release()

def counted(number):
    give_up = time.monotonic() + 20
    while admitted() != number:
        assert time.monotonic() < give_up
        time.sleep(0.05)

child = os.fork()
if child == 0:
    asyncio.run(decide("child", 3))
    counted(5)
    os._exit(0)
asyncio.run(decide("parent", 2))
counted(5)
assert os.waitpid(child, 0)[1] == 0
assert limiter.stats().decisions == {("default", "admitted"): 2}
"""
    run(script, tmp_path)


ALIVE = """
import sys, time
from ratelimit_mw import Limiter, Settings
from ratelimit_mw.prometheus import export
export(Limiter(Settings()))
print(__import__("os").getpid(), flush=True)
time.sleep(float(sys.argv[1]))
"""


def alive(folder: Path, *before: str) -> "subprocess.Popen[str]":
    """A process that exports into this folder, until it is killed."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    command = [*before, sys.executable, "-c", ALIVE, "60"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def number_of(process: "subprocess.Popen[str]") -> int:
    """The number under which a process that was just started knows itself."""
    assert process.stdout is not None
    return int(process.stdout.readline())


def gauges_of(number: int, folder: Path) -> list[Path]:
    """The files with the gauges of a process."""
    return list(folder.glob(f"gauge_live*_{number}.db"))


def test_a_process_of_another_container_is_not_taken_for_dead(tmp_path: Path) -> None:
    """Its number is nobody's here, or somebody else's; its gauges stay until it ends, and then they go."""
    space = ["unshare", "--fork", "--kill-child", "--pid"]
    if not shutil.which("unshare") or subprocess.run([*space, "true"], check=False).returncode:
        pytest.skip("no process may be put into a container of its own here")
    there, here = alive(tmp_path, *space), alive(tmp_path)
    try:
        number, own = number_of(there), number_of(here)
        until(lambda: bool(gauges_of(number, tmp_path) and gauges_of(own, tmp_path)))
        time.sleep(3 * MIRROR_SECONDS)
        assert gauges_of(number, tmp_path)
        there.kill()
        until(lambda: not gauges_of(number, tmp_path))
        assert gauges_of(own, tmp_path)
    finally:
        for process in (there, here):
            process.kill()
            process.communicate()


def test_a_number_is_dead_when_no_process_has_it(tmp_path: Path) -> None:
    """Of two processes with one number in different containers, one that lives keeps the gauges."""
    process = alive(tmp_path)
    try:
        number = number_of(process)
        until(lambda: bool(list(tmp_path.glob(f"{PREFIX}{number}-*"))))
        (tmp_path / f"{PREFIX}{number}-dead").touch()
        (tmp_path / f"{PREFIX}999999-dead").touch()
        assert LifeSign(tmp_path).bury_dead() == {999_999}
        assert LifeSign(tmp_path).bury_dead() == set()
    finally:
        process.kill()
        process.communicate()
    assert LifeSign(tmp_path).bury_dead() == {number}


def test_a_process_that_is_forked_off_lives_by_itself(tmp_path: Path) -> None:
    """A worker keeps no dead parent alive, and its own end ends nothing for the parent."""
    sign = LifeSign(tmp_path)
    sign.give()
    child = os.fork()
    if child == 0:
        sign.give()
        os._exit(0 if len(list(tmp_path.glob(f"{PREFIX}*"))) == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert LifeSign(tmp_path).bury_dead() == {child}
