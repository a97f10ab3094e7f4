"""Callers whom an app names by hand, in a real Redis."""

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from ratelimit_mw import Identity, KeyEntry, Limiter
from tests.support.asgi import settings_of
from tests.support.servers import StoreServer

pytestmark = pytest.mark.rerun

NAME = "ann@example.com"
API_KEY = "a key in the clear"


def stored(client: redis.Redis) -> Iterator[Any]:
    """Yield every key of a server and what it holds."""
    readers: dict[Any, Any] = {
        b"string": client.get,
        b"hash": client.hgetall,
        b"list": lambda key: client.lrange(key, 0, -1),
        b"set": client.smembers,
        b"zset": lambda key: client.zrange(key, 0, -1),
        b"stream": client.xrange,
    }
    for key in client.scan_iter(count=10_000):
        yield key, readers[client.type(key)](key)


async def test_a_name_by_hand_stands_nowhere_in_the_clear(server: StoreServer) -> None:
    """Names and keys that `acquire` is handed stand in Redis, in keys and figures, as hashes only."""
    text = f"""
    backend = {{ url = "{server.url}", timeout = 5 }}
    identity.hash_secret = "a secret of a test"
    plans.pro = {{ requests = ["100/minute"], concurrent = 5, spending = {{ daily = "9.00" }} }}
    """
    async with Limiter(settings_of(text)) as limiter:
        for overrides in (None, KeyEntry("pro", requests=["1/minute"])):
            lease = await limiter.acquire(Identity(NAME, "pro", API_KEY, overrides=overrides), price="1.00")
            assert NAME not in repr(lease.identity)
            await limiter.engine.reporter.report()
            with server.client() as client:
                held = repr(list(stored(client)))
            assert "i:" in held
            assert NAME not in held
            assert API_KEY not in held
            assert NAME not in repr(limiter.stats())
            await lease.release()
