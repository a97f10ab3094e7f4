"""Sentinels and clusters over TLS, each hop of it, and as users with no right too many."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import redis

from ratelimit_mw import Limiter, Settings
from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.cluster.nodes import hash_slot
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge
from tests.integration.test_acl import users
from tests.integration.test_connections import complaints, decided_by
from tests.integration.test_deploy import DEPLOY
from tests.support.certificates import Certificates
from tests.support.conformance import daily, new_id, slots, window
from tests.support.processes import HOST
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer
from tests.support.statuses import peeked
from tests.support.topologies import SERVICE, Cluster, Sentinels, SentinelServer, running

pytestmark = pytest.mark.rerun

CLUSTER_RIGHTS = "+cluster|slots +asking"
"""Rights that docs/deployment.md adds for a cluster to the rights of users.acl."""
SENTINEL_RIGHTS = (
    "resetkeys resetchannels &+switch-master &+promoted-slave -@all"
    " +auth +subscribe +client|setname +sentinel|get-master-addr-by-name +sentinel|master"
)
"""Rights that docs/deployment.md gives to the user on the sentinels."""


# TLS --------------------------------------------------------------------------------------------
# The servers of the wheels don't speak it: what clients meet are proxies, which the servers name to them.


@asynccontextmanager
async def tls_sentinel(
    kind: str, folder: Path, certificates: Certificates, *, inner: Certificates | None = None
) -> AsyncIterator[str]:
    """The URL of a sentinel that names a primary, each of them behind TLS that asks for a certificate.

    The primary has its certificate from `inner`, where there is one.
    """
    async with AsyncExitStack() as stack:
        primary = StoreServer(kind, folder / "primary")
        stack.callback(primary.kill)
        primary.start()
        sentinel = SentinelServer(kind, folder / "sentinel", primary)
        stack.callback(sentinel.kill)
        sentinel.start()
        primary_tls = (inner or certificates).server(asks=inner is None)
        before_primary = await stack.enter_async_context(Proxy(primary.port, tls=primary_tls))
        before_sentinel = await stack.enter_async_context(
            Proxy(sentinel.port, tls=certificates.server(asks=True))
        )
        with sentinel.client() as client:
            client.sentinel_remove(SERVICE)
            client.sentinel_monitor(SERVICE, HOST, before_primary.port, 1)
        yield f"redis+sentinel://{HOST}:{before_sentinel.port}/{SERVICE}"


@asynccontextmanager
async def tls_cluster(
    kind: str, folder: Path, certificates: Certificates
) -> AsyncIterator[tuple[Cluster, str]]:
    """A cluster whose nodes announce ports where TLS is spoken, and its URL with one of those."""
    cluster = Cluster(kind, folder)
    async with AsyncExitStack() as stack:
        proxies = [Proxy(node.port, tls=certificates.server(asks=True)) for node in cluster.nodes]
        for node, proxy in zip(cluster.nodes, proxies, strict=True):
            await stack.enter_async_context(proxy)
            node.arguments += ("--cluster-announce-port", str(proxy.port))
            node.arguments += ("--cluster-announce-bus-port", str(node.port + 10_000))
        stack.enter_context(running(cluster))
        yield cluster, f"redis+cluster://{HOST}:{proxies[0].port}"


def files_of(certificates: Certificates) -> dict[str, str]:
    """The settings that name certificates."""
    return {
        "tls_ca_file": certificates.ca_file,
        "tls_cert_file": certificates.cert_file,
        "tls_key_file": certificates.key_file,
    }


@asynccontextmanager
async def limiter_on(url: str, **tls: str) -> AsyncIterator[Limiter]:
    """An open limiter."""
    async with Limiter(Settings.model_validate({"backend": {"url": url, "timeout": 5, **tls}})) as limiter:
        yield limiter


async def test_sentinel_and_primary_are_asked_over_tls(
    kind: str, tmp_path: Path, certificates: Certificates
) -> None:
    """With TLS files among the settings, both connections are encrypted, and both show our certificate."""
    async with (
        tls_sentinel(kind, tmp_path, certificates) as url,
        limiter_on(url, **files_of(certificates)) as limiter,
    ):
        assert [await decided_by(limiter) for _ in range(3)] == ["shared"] * 3


async def test_sentinel_and_primary_are_asked_over_tls_by_options_of_the_url(
    tmp_path: Path, certificates: Certificates
) -> None:
    """TLS options of the URL hold for the sentinels as for the servers that they name."""
    files = files_of(certificates)
    query = f"ssl_ca_certs={files['tls_ca_file']}&ssl_certfile={files['tls_cert_file']}"
    async with (
        tls_sentinel("redis", tmp_path, certificates) as url,
        limiter_on(f"{url}?{query}&ssl_keyfile={files['tls_key_file']}") as limiter,
    ):
        assert await decided_by(limiter) == "shared"


async def test_a_primary_with_a_wrong_certificate_is_not_believed(
    tmp_path: Path, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """A primary with a wrong certificate is away though a sentinel named it; the log says why, once."""
    (tmp_path / "other").mkdir()
    other = Certificates(tmp_path / "other")
    async with (
        tls_sentinel("redis", tmp_path, certificates, inner=other) as url,
        limiter_on(url, **files_of(certificates)) as limiter,
    ):
        assert [await decided_by(limiter) for _ in range(3)] == ["local"] * 3
        (said,) = complaints(caplog)
        assert "certificate verify failed" in said


async def test_all_nodes_of_a_cluster_are_asked_over_tls(
    kind: str, tmp_path: Path, certificates: Certificates
) -> None:
    """The seeds, and the nodes that they name; a node that is asked without our certificate says nothing."""
    async with tls_cluster(kind, tmp_path, certificates) as (cluster, url):
        async with limiter_on(url, **files_of(certificates)) as limiter:
            for number in range(20):
                lease = await limiter.acquire(api_key=f"key {number}")
                assert lease.decision.policy == "shared"
        for node in cluster.nodes:
            with node.client() as client:
                assert client.dbsize() > 0
        async with limiter_on(url, tls_ca_file=certificates.ca_file) as limiter:
            assert await decided_by(limiter) == "local"


# users ------------------------------------------------------------------------------------------


def test_the_deployment_guide_names_these_rights() -> None:
    """The deployment guide says to grant the rights that the tests here grant."""
    guide = (DEPLOY.parents[1] / "docs" / "deployment.md").read_text()
    guide = " ".join(guide.split())  # lines may end anywhere
    for rights in (CLUSTER_RIGHTS, SENTINEL_RIGHTS):
        assert f"`{rights}`" in guide


def give(server: StoreServer, user: str, rights: str) -> None:
    """Make a user, whose password is `secret`."""
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", user, "on", ">secret", *rights.split())


def worker_rights() -> str:
    """The rights of the worker in users.acl."""
    return users()["ratelimit"].replace("on resetpass ", "")


async def use(backend: RedisBackend | ClusterBackend) -> None:
    """Do everything that a worker does with counts, in several partitions."""
    counters = [slots(5, of="least"), daily(900, of="least"), window(5, of="app")]
    reservation = (await backend.acquire(Charge(counters), new_id(), 100)).reservation
    assert await backend.renew(reservation, 30)
    assert await backend.settle(reservation, 7) is Settlement.SETTLED
    await backend.finish(reservation, EstimateAction.KEEP)
    used = (await peeked(backend, Charge(counters))).counted
    assert used == [0, 7, 1]
    await backend.reset(Charge(counters))


async def test_sentinels_have_a_user_of_their_own(kind: str, tmp_path: Path) -> None:
    """It may ask for the primary and nothing else; the servers' user is that of users.acl."""
    sentinels = Sentinels(kind, tmp_path)
    with running(sentinels):
        for server in sentinels.servers:
            give(server, "ratelimit", worker_rights())
        for sentinel in sentinels.sentinels:
            give(sentinel, "finder", SENTINEL_RIGHTS)
            with sentinel.client() as client:
                client.execute_command("ACL", "SETUSER", "default", "resetpass", "-@all", "+auth", "+info")
        hosts = sentinels.url.partition("://")[2]
        login = "sentinel_username=finder&sentinel_password=secret"
        backend = RedisBackend(f"redis+sentinel://ratelimit:secret@{hosts}/0?{login}", timeout=5)
        await use(backend)
        await backend.close()
        stranger = RedisBackend(f"redis+sentinel://ratelimit:secret@{hosts}/0", timeout=1)
        with pytest.raises(BackendError):
            await stranger.acquire(Charge([window(5)]), new_id())
        await stranger.close()
        with redis.Redis(
            host=HOST, port=sentinels.sentinels[0].port, username="finder", password="secret"
        ) as client:
            for command in (
                ("FAILOVER", SERVICE),
                ("SET", SERVICE, "quorum", "1"),
                ("REMOVE", SERVICE),
                ("MASTERS",),
            ):
                with pytest.raises(redis.ResponseError, match=r"(?i)permission"):
                    client.execute_command("SENTINEL", *command)


async def test_a_cluster_takes_two_rights_more(cluster: Cluster) -> None:
    """The user of users.acl with `CLUSTER SLOTS` and `ASKING`: keys are found while and after they move."""
    for node in cluster.nodes:
        give(node, "ratelimit", f"{worker_rights()} {CLUSTER_RIGHTS}")
    backend = ClusterBackend(cluster.url.replace("//", "//ratelimit:secret@"), timeout=5)
    await use(backend)
    slot = hash_slot(b"least")
    source = cluster.owner_of(slot)
    target = next(node for node in cluster.nodes if node is not source)
    cluster.open_migration(slot, target)
    assert (await backend.acquire(Charge([window(5, of="least")]), new_id())).admitted
    cluster.move_keys(slot, source, target)
    cluster.close_migration(slot, target)
    await use(backend)
    await backend.close()
    with redis.Redis(host=HOST, port=target.port, username="ratelimit", password="secret") as client:
        for command in (
            ("RESET",),
            ("FORGET", "0" * 40),
            ("SETSLOT", slot, "STABLE"),
            ("FAILOVER",),
            ("NODES",),
        ):
            with pytest.raises(redis.ResponseError, match=r"(?i)permission"):
                client.execute_command("CLUSTER", *command)
