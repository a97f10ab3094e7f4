"""`ratelimit-mw demo`: what it prints can be typed in, and does what it says."""

import html
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ratelimit_mw._internal.checks.plain import findings
from ratelimit_mw._internal.demo import app as demo
from ratelimit_mw._internal.demo.app import demo_settings
from ratelimit_mw._internal.demo.traffic import CALLERS
from tests.support.apps import ROOT
from tests.support.processes import free_port
from tests.support.slots import until

pytestmark = pytest.mark.rerun

START_SECONDS = 60.0


class Demo:
    """The demo in a process of its own."""

    def __init__(self, output: Path, port: int, *options: str) -> None:
        self.output = output
        command = [sys.executable, "-m", "ratelimit_mw", "demo", "--port", str(port), *options]
        # A Redis that the settings of whoever runs it name is none of the demo's business.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RATELIMIT_BACKEND__URL": "redis://127.0.0.1:1"}
        with output.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    @property
    def text(self) -> str:
        """Text that it has printed."""
        return self.output.read_text()

    def commands(self) -> list[str]:
        """The commands that it says to try."""
        return re.findall(r"^ {3}(.*)$", self.text, re.MULTILINE)

    def wait_until_it_serves(self) -> str:
        """Wait; returns its address."""
        give_up = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up and self.process.poll() is None:
            found = re.search(r"at (http://127\.0\.0\.1:\d+)\.", self.text)
            if found and self._answers(found[1]):
                return found[1]
            time.sleep(0.05)
        raise AssertionError(f"the demo does not serve; it printed:\n{self.text}")

    def end(self) -> int:
        """Type Ctrl-C; returns its exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def _answers(self, url: str) -> bool:
        try:
            return httpx.get(f"{url}/health", verify=False).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Demo]:
    """A demo on a free port."""
    served = Demo(tmp_path / "output", free_port())
    yield served
    served.process.kill()
    served.process.wait()


def test_the_demo_does_what_it_prints(running: Demo) -> None:
    """Every command runs as it is printed, its answer is what the line above says, and Ctrl-C ends it."""
    running.wait_until_it_serves()
    one, many, why, at_once, spend, spent, anonymous, health = [_run(each) for each in running.commands()]
    assert "201 Created" in one
    assert "x-ratelimit-limit: 10" in one
    assert "x-ratelimit-remaining: 9" in one
    assert many.split() == ["200"] * 10 + ["429"] * 2
    assert "RATE_LIMIT_EXCEEDED" in why
    assert "retry-after: " in why
    assert Counter(at_once.split()) == {"201": 2, "429": 2}
    assert spend.split() == ["201"] * 3 + ["429"]
    assert "SPENDING_LIMIT_EXCEEDED" in spent
    assert "x-spending-remaining: 0.03" in spent
    assert "x-ratelimit-limit: 5" in anonymous
    assert "200 OK" in health
    assert "ratelimit" not in health
    assert running.end() == 0
    assert running.text.endswith("The demo has ended.\n")
    assert "Traceback" not in running.text


def test_the_demo_takes_another_port_where_its_own_is_taken(tmp_path: Path) -> None:
    """A taken port is not an error: it says which one it has instead."""
    with socket.create_server(("127.0.0.1", free_port())) as other:
        port = other.getsockname()[1]
        served = Demo(tmp_path / "output", port)
        try:
            url = served.wait_until_it_serves()
            assert not url.endswith(f":{port}")
            assert f"Port {port} is in use" in served.text
            assert served.end() == 0
        finally:
            served.process.kill()


def test_the_dashboard_moves_from_the_start(running: Demo) -> None:
    """It opens with the printed token, and shows one caller that is refused far more than any other."""
    running.wait_until_it_serves()
    (address,) = re.findall(r"^The dashboard: (.*)$", running.text, re.MULTILINE)
    (token,) = re.findall(r"^Its token: +(.*)$", running.text, re.MULTILINE)
    until(lambda: sum(_refused(address, token)) >= 20 and len(_refused(address, token)) >= 4)
    worst, *others = _refused(address, token)
    assert worst > 5 * sum(others)
    assert "simulated callers" in running.text
    assert running.end() == 0
    assert "/dashboard/" not in running.text.partition("Try, in another terminal")[2]
    assert "Traceback" not in running.text


def test_the_dashboard_can_be_left_to_oneself(tmp_path: Path) -> None:
    """Without simulated callers it shows what is tried by hand, and the token can be chosen."""
    served = Demo(tmp_path / "output", free_port(), "--no-traffic", "--token", "chosen")
    try:
        url = served.wait_until_it_serves()
        assert httpx.get(f"{url}/dashboard/snapshot").status_code == 401
        assert _refused(f"{url}/dashboard", "chosen") == []
        httpx.get(f"{url}/v1/models")
        until(lambda: _refused(f"{url}/dashboard", "chosen") == [0])
        assert "simulated" not in served.text
        assert served.end() == 0
    finally:
        served.process.kill()


async def test_a_browser_is_shown_something() -> None:
    """The first page leads on and says what to try at its own address, the second which limits there are."""
    transport = httpx.ASGITransport(app=demo.create_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8123") as client:
        home, reference = await client.get("/"), await client.get("/docs")
        assert {page.status_code for page in (home, reference)} == {200}
        assert {page.headers["content-type"] for page in (home, reference)} == {"text/html; charset=utf-8"}
        assert "X-API-Key: demo-pro" in html.unescape(home.text)
        assert "http://127.0.0.1:8123/v1/models" in home.text
        links = re.findall(r'href="(/[^"]*)"', home.text + reference.text)
        assert {"/docs", "/dashboard", "/"} == set(links)
        for link in links:
            assert (await client.get(link, follow_redirects=True)).status_code in {200, 401}
        for said in ("60/minute", "0.12 USD a day", "POST /v1/predictions", "holds 0.05", "exempt"):
            assert said in reference.text
        for _ in range(10):  # pages are exempt
            assert (await client.get("/")).status_code == 200
        hostile = await client.get("/", headers={"Host": "<script>alert(1)</script>"})
        assert "<script>" not in hostile.text


def test_simulated_callers_are_nobody_of_the_hints() -> None:
    """They can't use up what somebody tries by hand."""
    hinted = set(re.findall(r"X-API-Key: ([\w-]+)", demo._TRIES))
    assert len(hinted) == 4
    assert not hinted & {caller.name for caller in CALLERS}
    assert demo.HOST not in {caller.address for caller in CALLERS}


async def test_a_prediction_can_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prediction is kept, within bounds, and an unknown one is a 404."""
    monkeypatch.setattr(demo, "PREDICTION_SECONDS", 0.0)
    monkeypatch.setattr(demo, "MAX_KEPT", 1)
    transport = httpx.ASGITransport(app=demo.create_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://demo") as client:
        body = {"prompt": "a very long prompt indeed"}
        first = await client.post("/v1/predictions", json=body, headers={"X-API-Key": "demo-pro"})
        assert first.json()["price"] == "0.05"
        assert (await client.get(first.headers["Location"])).json() == first.json()
        await client.post("/v1/predictions", content="no JSON")
        assert (await client.get(first.headers["Location"])).status_code == 404


def test_the_checks_find_nothing_in_the_demo() -> None:
    """The demo's settings are an example, too."""
    assert findings(demo_settings()) == ()


def _refused(address: str, token: str) -> list[int]:
    """Return each caller's number of refused requests, as the dashboard has it, the largest first."""
    answer = httpx.get(f"{address}/snapshot", headers={"Authorization": f"Bearer {token}"})
    return sorted([sum(each["refused"].values()) for each in answer.json()["callers"]], reverse=True)


def _run(command: str) -> str:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stderr}"
    return done.stdout
