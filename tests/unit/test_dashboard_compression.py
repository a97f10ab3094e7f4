"""The dashboard's answers in gzip: what is sent for figures that hardly change, and to whom."""

import gzip
import json
import random
import zlib
from collections.abc import AsyncIterator

import pytest
from starlette.requests import Request

from ratelimit_mw import RateLimitMiddleware
from ratelimit_mw._internal.dashboard.compression import compressed_stream, takes_gzip
from ratelimit_mw._internal.fleet.snapshot import REASONS, CallerFigures, LimitFigures, Outcomes, Snapshot
from ratelimit_mw._internal.fleet.view import PEEKED
from tests.support.asgi import client_of, ok_app
from tests.support.dashboard_client import bearer, settings

CALLERS = 50
MOST = 4_000
"""Bytes that an open page may be sent in a second."""


def figures(number: int, chance: random.Random) -> CallerFigures:
    """A busy caller whose figures change each second, with limits where a snapshot has them."""
    digits = f"{number:032x}"[::-1]
    limits = tuple(limit(name, chance) for name in ("600/minute", "9000/hour", "5/second"))
    refused = {**dict.fromkeys(REASONS, 0), "rate": chance.randint(0, 50)}
    made = Outcomes(chance.randint(100, 5000), 0, refused)
    api_key_hash = f"sha256:{digits * 2}"
    shown = limits if number < PEEKED else ()
    return CallerFigures(f"k:{digits}", "pro", f"acme{number}", "Acme", api_key_hash, made, 1.5, shown)


def limit(name: str, chance: random.Random) -> LimitFigures:
    """A window that is used somehow."""
    used, reset = chance.randint(0, 600), round(chance.uniform(0, 60), 3)
    share = round(used / 600, 4)
    return LimitFigures(name, "window", "plan", used, 600, 0, share, reset, None, str(used), "600", None)


async def test_an_open_page_is_sent_little() -> None:
    """Fifty busy callers take less than 4 kB a second after the first event, and each is readable at once."""
    chance = random.Random(1)
    texts = []
    for second in range(6):
        callers = tuple(figures(number, chance) for number in range(CALLERS))
        snapshot = Snapshot(second, 5, (), (), callers, (), True, True)
        texts.append(f"data: {json.dumps(snapshot.as_dict(), separators=(',', ':'))}\n\n".encode())

    async def events() -> AsyncIterator[bytes]:
        for text in texts:
            yield text

    sent = [chunk async for chunk in compressed_stream(events())]
    reader = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    assert [reader.decompress(chunk) for chunk in sent[:-1]] == texts
    reader.decompress(sent[-1])
    assert reader.eof
    assert min(map(len, texts)) > 5 * MOST
    assert max(len(chunk) for chunk in sent[1:]) < MOST


@pytest.mark.parametrize(
    ("header", "takes"),
    [
        ("gzip", True), ("br, GZIP;q=0.5", True), ("*", True), ("gzip;q=1.0, identity", True), ("", False),
        ("br", False), ("gzip;q=0", False), ("gzip; q=0.000", False), ("x-gzip2", False), ("identity", False),
    ],
)  # fmt: skip
def test_only_who_takes_it_is_sent_gzip(header: str, takes: bool) -> None:
    """A client is sent gzip only if its Accept-Encoding header allows gzip, weights included."""
    headers = [(b"accept-encoding", header.encode())] if header else []
    assert takes_gzip(Request({"type": "http", "headers": headers})) is takes


@pytest.mark.parametrize("path", ["", "/snapshot", "/static/overview.js"])
async def test_pages_files_and_figures_are_compressed(path: str) -> None:
    """The body is the same; caches are told that it depends on the client; small ones stay as they are."""
    app = RateLimitMiddleware(ok_app(), settings=settings())
    async with client_of(app) as client:
        plain = await client.get(f"/ops{path}", headers={**bearer(), "Accept-Encoding": "identity"})
        packed = await client.get(f"/ops{path}", headers={**bearer(), "Accept-Encoding": "gzip"})
        small = await client.post("/ops/logout", headers={**bearer(), "Accept-Encoding": "gzip"})
    assert "content-encoding" not in plain.headers
    assert (packed.headers["content-encoding"], packed.headers["vary"]) == ("gzip", "Accept-Encoding")
    assert int(packed.headers["content-length"]) < len(plain.content)
    assert len(gzip.compress(plain.content)) > 0
    if path != "/snapshot":  # whose clock goes on
        assert packed.content == plain.content
    assert "content-encoding" not in small.headers
