"""Every way to a single server: TLS with certificates of both sides, and a socket of this machine."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ratelimit_mw import Limiter, Settings
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from tests.conftest import StartServer
from tests.support.certificates import Certificates
from tests.support.conformance import eventually
from tests.support.processes import HOST
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer

pytestmark = pytest.mark.rerun


@asynccontextmanager
async def limiter_on(url: str, **tls: str) -> AsyncIterator[Limiter]:
    """An open limiter on a server."""
    async with Limiter(Settings.model_validate({"backend": {"url": url, "timeout": 2, **tls}})) as limiter:
        yield limiter


async def decided_by(limiter: Limiter) -> str:
    """Return the policy that decided about a request."""
    return (await limiter.acquire(api_key="a")).decision.policy


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of the log about the backend."""
    said = [record for record in caplog.records if record.name == "ratelimit_mw"]
    return [each.message for each in said if each.levelno >= logging.WARNING and "backend" in each.message]


async def test_tls_with_an_authority_of_ones_own(server: StoreServer, certificates: Certificates) -> None:
    """With `tls_ca_file` the server's certificate is checked against that authority."""
    async with (
        Proxy(server.port, tls=certificates.server()) as proxy,
        limiter_on(proxy.url, tls_ca_file=certificates.ca_file) as limiter,
    ):
        assert [await decided_by(limiter) for _ in range(3)] == ["shared"] * 3


async def test_tls_with_a_certificate_of_the_clients(server: StoreServer, certificates: Certificates) -> None:
    """A server that asks for a certificate gets the one of `tls_cert_file` and `tls_key_file`."""
    async with (
        Proxy(server.port, tls=certificates.server(asks=True)) as proxy,
        limiter_on(
            proxy.url,
            tls_ca_file=certificates.ca_file,
            tls_cert_file=certificates.cert_file,
            tls_key_file=certificates.key_file,
        ) as limiter,
    ):
        assert await decided_by(limiter) == "shared"


@pytest.mark.parametrize("query", ["ssl_cert_reqs=none", "ssl_check_hostname=no&ssl_ca_certs={ca}"])
async def test_tls_by_options_of_the_url(
    query: str, redis_server: StoreServer, certificates: Certificates
) -> None:
    """A certificate under another name is believed where the URL's options say so."""
    async with (
        Proxy(redis_server.port, tls=certificates.server("other.example.org")) as proxy,
        limiter_on(f"{proxy.url}?{query.format(ca=certificates.ca_file)}") as limiter,
    ):
        assert await decided_by(limiter) == "shared"


async def test_a_clients_certificate_by_options_of_the_url(
    redis_server: StoreServer, certificates: Certificates
) -> None:
    """The URL's options can name the client's certificate, for the counts and for the live keys."""
    files = f"ssl_ca_certs={certificates.ca_file}&ssl_certfile={certificates.cert_file}"
    async with (
        Proxy(redis_server.port, tls=certificates.server(asks=True)) as proxy,
        limiter_on(f"{proxy.url}?{files}&ssl_keyfile={certificates.key_file}") as limiter,
    ):
        assert await decided_by(limiter) == "shared"
        await limiter.engine.live.set_keys({f"sha256:{'0' * 64}": KeyEntry("default")})
        assert limiter.engine.live.keys


async def test_a_login_and_a_database_by_options_of_the_url(start_server: StartServer) -> None:
    """Password, database and name of the client may stand in the query."""
    server = start_server("redis", password="p&=%w")
    url = f"redis://{HOST}:{server.port}?password=p%26%3D%25w&db=3&client_name=api-1"
    async with limiter_on(url) as limiter:
        assert await decided_by(limiter) == "shared"
        with server.client() as client:
            assert client.info("keyspace")["db3"]["keys"] > 0
            assert "api-1" in {each["name"] for each in client.client_list()}


Broken = tuple[Callable[[Certificates], ssl.SSLContext | None], dict[str, str], str]
BROKEN: dict[str, Broken] = {
    "authority": (lambda c: c.server(), {}, "certificate verify failed"),
    "name": (lambda c: c.server("other.example.org"), {"tls_ca_file": "ca"}, "IP address mismatch"),
    "client": (lambda c: c.server(asks=True), {"tls_ca_file": "ca"}, ""),
    "plain": (lambda _: None, {"tls_ca_file": "ca"}, ""),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_what_is_wrong_with_tls_is_said_once(
    what: str, redis_server: StoreServer, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong certificate fails neither a start nor a request; the log has one line with the reason."""
    make, tls, reason = BROKEN[what]
    tls = {name: certificates.ca_file if file == "ca" else file for name, file in tls.items()}
    async with (
        Proxy(redis_server.port, tls=make(certificates)) as proxy,
        limiter_on(proxy.url.replace("redis://", "rediss://"), **tls) as limiter,
    ):
        for _ in range(5):
            assert await decided_by(limiter) == "local"
            await asyncio.sleep(0.1)
        said = complaints(caplog)
        assert len(said) == 1
        assert said[0].startswith("backend is away: ")
        assert reason in said[0]


async def test_a_wrong_password_is_said_once(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A password that is wrong, or changed while all runs, costs one line; the right one mends it."""
    server = start_server("redis", password="right")
    async with limiter_on(server.url) as limiter:
        assert await decided_by(limiter) == "shared"
        with server.client() as client:
            client.config_set("requirepass", "other")
            client.client_kill_filter(_type="normal", skipme=True)
            for _ in range(8):
                assert await decided_by(limiter) == "local"
                await asyncio.sleep(0.1)
            client.config_set("requirepass", "right")

        async def is_shared() -> bool:
            return await decided_by(limiter) == "shared"

        assert await eventually(is_shared) < 2
    said = complaints(caplog)
    assert [line[:16] for line in said] == ["backend is away:", "backend is back"]
    assert "right" not in caplog.text


async def test_a_socket_of_this_machine(start_server: StartServer, tmp_path: Path) -> None:
    """`unix://` and its aliases lead to a server's socket file."""
    path = tmp_path / "s"
    start_server("redis", "--unixsocket", str(path))
    for scheme in ("unix", "redis+unix", "valkey+unix"):
        async with limiter_on(f"{scheme}://{path}") as limiter:
            assert await decided_by(limiter) == "shared"
