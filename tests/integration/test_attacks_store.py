"""Attacks on what is kept: inventing callers costs Redis no memory, and no key is anywhere in the clear."""

import base64
import contextlib
import ipaddress
import itertools
import random
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.apps import AppServer
from tests.support.processes import HOST
from tests.support.raw import Answer, RawConnection, exchange, head, pipelined
from tests.support.servers import StoreServer
from tests.support.slots import until

pytestmark = pytest.mark.rerun

FLOOD = 10_000
PER_ADDRESS = 50
SECRET = b"sk-live-7f3a9c51d2"
SETTINGS = f"""
[identity]
hash_secret = "a secret for the tests"
trusted_proxies = ["127.0.0.1/32"]
per_address = ["{PER_ADDRESS}/hour"]

[plans.default]
requests = ["30/hour"]
concurrent = 2

[plans.anonymous]
requests = ["20/hour"]

[plans.paid]
requests = ["8/hour"]
concurrent = 1
spending = {{ daily = "1.00", warn_at = 0.01 }}

[[keys]]
key = "{SECRET.decode()}"
plan = "paid"

[[routes]]
path = "/peak"
exempt = true

[[routes]]
path = "/v1/jobs"
price = "0.05"
"""

_addresses = (f"203.0.113.{number}" for number in itertools.count(1))


@dataclass(frozen=True, slots=True)
class Target:
    """A server and the Redis that it counts in."""

    app: AppServer
    store: StoreServer

    def footprint(self) -> tuple[int, int]:
        """Return the number of keys that the limits have in the store, and of bytes that they take.

        The figures of the fleet are bounded by themselves: see test_fleet_faults.py.
        """
        with self.store.client() as client:
            names = [name for name in client.scan_iter(count=10_000) if b"{fleet}" not in name]
            return len(names), sum(client.memory_usage(name) or 0 for name in names)

    def asked(self, *lines: bytes, target: str = "/", address: str, method: str = "GET") -> Answer:
        """Return the answer to a caller at an address, through a proxy that is trusted."""
        forwarded = f"X-Forwarded-For: {address}".encode()
        answer = exchange(self.app.port, head(target, forwarded, *lines, method=method))
        assert answer is not None
        return answer


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """One worker and a Redis of its own."""
    folder = tmp_path_factory.mktemp("attacked")
    store = StoreServer("redis", folder / "store")
    store.start()
    (folder / "ratelimit.toml").write_text(SETTINGS)
    environment = {
        "RATELIMIT_SETTINGS": str(folder / "ratelimit.toml"),
        "RATELIMIT_BACKEND__URL": store.url,
        "RATELIMIT_BACKEND__TIMEOUT": "1",
    }
    app = AppServer("tests.support.attack_app:app", folder, "--no-proxy-headers", environment=environment)
    app.start()
    yield Target(app, store)
    app.stop()
    store.stop()


def flood(target: Target, lines: list[list[bytes]]) -> list[int]:
    """Send so many requests, each with header lines of its own; return their statuses."""
    requests = (head("/", *each) for each in lines)
    return [answer.status for answer in pipelined(target.app.port, requests)]


def test_ten_thousand_invented_keys_cost_redis_nothing(target: Target) -> None:
    """`per_address` admits as many as it says; the refused ones write nothing at all."""
    address = f"X-Forwarded-For: {next(_addresses)}".encode()
    lines = [[address, b"X-API-Key: invented-%d" % number] for number in range(FLOOD)]
    assert flood(target, lines[:PER_ADDRESS]) == [200] * PER_ADDRESS
    before = target.footprint()
    assert set(flood(target, lines[PER_ADDRESS:])) == {429}
    assert target.footprint() == before


def test_ten_thousand_addresses_of_one_network_are_one_caller(target: Target) -> None:
    """One subscriber holds a whole /64: whatever address of it a request comes from, one count."""
    network = ipaddress.IPv6Network("2001:db8:1:2::/64")
    sources = [network[random.getrandbits(64)] for _ in range(FLOOD)]
    lines = [[f"X-Forwarded-For: {source}".encode()] for source in sources]
    keys, _ = target.footprint()
    assert flood(target, lines[:20]) == [200] * 20
    before = target.footprint()
    assert before[0] <= keys + 3
    assert set(flood(target, lines[20:])) == {429}
    assert target.footprint() == before


INJECTIONS = [
    b"*",
    b"?",
    b"k:00000000000000000000000000000000",
    b"ip:203.0.113.1",
    b"a:acme",
    b"}:w:p:3600",
    b"{app}",
    b"ratelimit:{app}:w:app:1",
    b"a:b",
    b"a\\r\\nFLUSHALL\\r\\n",
    b"$(reboot)",
    b"' OR 1=1 --",
    b"\xff\xfe",
    b"../../etc/passwd",
]


def test_no_key_gets_into_the_names_of_others(target: Target) -> None:
    """Every name in the store is ours: a fixed form of hashes, addresses and scopes, one for each caller."""
    address = next(_addresses)
    for api_key in INJECTIONS:
        for remaining in (29, 28):
            assert target.asked(b"X-API-Key: " + api_key, address=address).remaining == remaining
    form = re.compile(
        rb"ratelimit:\{(k:[0-9a-f]{32}|ip:[0-9a-f.:]+(/64)?)\}:(w:[ap]:3600|s:p|b:USD:[0-9-]+|r:[0-9a-f]{32})"
        rb"|ratelimit:\{fleet\}:([tcrd]:[0-9]+|i|workers|h:[^:{}]+:[0-9]+:[0-9a-f]{4})"
    )
    with target.store.client() as client:
        assert [name for name in client.scan_iter() if not form.fullmatch(name)] == []


class Monitor:
    """Everything that clients send to a store, as its MONITOR shows it."""

    def __init__(self, store: StoreServer) -> None:
        self._store = store
        self._socket = socket.create_connection((HOST, store.port))
        self._socket.sendall(b"MONITOR\r\n")
        self.seen = self._socket.recv(5)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._socket.recv(65_536):
                self.seen += data

    def close(self) -> None:
        """End it, once everything sent so far has been seen."""
        with self._store.client() as client:
            client.echo("the end")
        until(lambda: b"the end" in self.seen)
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()


def test_no_api_key_is_anywhere_in_the_clear(target: Target) -> None:
    """An API key is in no command, value, log or answer, whatever becomes of its request."""
    address, line = next(_addresses), b"X-API-Key: " + SECRET
    with contextlib.closing(Monitor(target.store)) as monitor:
        answers = misused(target, address, line)
    assert b"EVALSHA" in monitor.seen.upper()
    assert {answer.status for answer in answers} >= {200, 400, 404, 429}
    places = [monitor.seen, *(each.raw_head + each.body for each in answers), target.app.log.encode()]
    with target.store.client() as client:
        names = list(client.scan_iter())
        places += [*names, *(client.dump(name) or b"" for name in names)]
    for form in (SECRET, base64.b64encode(SECRET)[:-4], SECRET.hex().encode()):
        assert [place[:80] for place in places if form in place] == []


def misused(target: Target, address: str, line: bytes) -> list[Answer]:
    """Use a key in every way there is, with the store away at last; return the answers."""
    answers = [
        target.asked(line, address=address),
        target.asked(line, b"Authorization: Bearer other-" + SECRET, address=address),
        target.asked(b"X-API-Key: " + SECRET + b"k" * 17_000, address=address),
        target.asked(b"X-API-Key: unknown-" + SECRET, address=address),
        target.asked(b"Authorization: Basic " + base64.b64encode(SECRET + b":"), address=address),
        target.asked(line, target="/nowhere", address=address),
    ]
    with RawConnection(target.app.port) as connection:
        connection.send(head("/v1/slow/0.3", line))
        until(lambda: target.asked(target="/peak", address=address).body.endswith(b" 1"))
        answers.append(target.asked(line, address=address))
    until(lambda: target.asked(target="/peak", address=address).body.endswith(b" 0"))
    job = target.asked(line, b"Content-Length: 0", target="/v1/jobs", address=address, method="POST")
    assert job.body.startswith(b"rl1.")
    answers += [job, *(target.asked(line, address=address) for _ in range(8))]
    target.store.stop_signal()
    try:
        answers.append(target.asked(line, address=address))
    finally:
        target.store.continue_signal()
    return answers
