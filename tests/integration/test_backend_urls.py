"""Each kind of URL that names a single server leads to it."""

from pathlib import Path

import pytest

from ratelimit_mw import Limiter, Settings
from ratelimit_mw._internal.settings import BackendSettings, SecretURL
from tests.conftest import StartServer
from tests.support.servers import StoreServer

pytestmark = pytest.mark.rerun


async def decided_by_the_backend(url: str) -> bool:
    """Whether a limiter on this URL asks its backend."""
    settings = Settings(backend=BackendSettings(url=SecretURL(url), timeout=5.0))
    async with Limiter(settings) as limiter, await limiter.acquire(api_key="k") as lease:
        return lease.decision.policy == "shared"


@pytest.mark.parametrize("scheme", ["redis", "valkey"])
async def test_a_host_and_port_lead_to_a_server(scheme: str, redis_server: StoreServer) -> None:
    """A `valkey` scheme means what its `redis` twin means."""
    assert await decided_by_the_backend(redis_server.url.replace("redis", scheme, 1))


async def test_a_socket_leads_to_a_server(tmp_path: Path, start_server: StartServer) -> None:
    """A Unix socket, under each of its schemes, and with a database."""
    path = tmp_path / "s"
    server = start_server("redis", "--unixsocket", str(path))
    for scheme in ("unix", "redis+unix", "valkey+unix"):
        assert await decided_by_the_backend(f"{scheme}://{path}?db=1")
    with server.client() as client:
        assert client.info("keyspace")["db1"]["keys"] > 0
