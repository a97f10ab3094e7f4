"""Several servers that make one backend: a primary with replicas and sentinels, a cluster."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from ratelimit_mw._internal.backends.cluster.nodes import hash_slot
from tests.support.processes import HOST
from tests.support.servers import StoreServer

DOWN_AFTER = 1_500
"""Milliseconds of silence after which sentinels, or the nodes of a cluster, call a server down."""
SERVICE = "mymaster"
READY_SECONDS = 60.0


class SentinelServer(StoreServer):
    """A sentinel: the same binary in another mode, with a file that it rewrites itself."""

    def __init__(self, kind: str, folder: Path, primary: StoreServer, password: str = "") -> None:
        super().__init__(kind, folder, password=password)
        self._primary = primary

    def command(self) -> list[str]:
        """Its file says what it watches; another start on the same port goes on with what it learnt."""
        file = self.folder / f"sentinel-{self.port}.conf"
        if not file.exists():
            file.write_text(
                f"port {self.port}\nbind {HOST}\ndir {self.folder}\n"
                f"sentinel monitor {SERVICE} {HOST} {self._primary.port} 2\n"
                f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER}\n"
                f"sentinel failover-timeout {SERVICE} 5000\n"
                f"sentinel parallel-syncs {SERVICE} 1\n" + self._logins()
            )
        return [super().command()[0], str(file), "--sentinel"]

    def _logins(self) -> str:
        own = (
            f'requirepass "{self.password}"\nsentinel sentinel-pass "{self.password}"\n'
            if self.password
            else ""
        )
        primary = self._primary.password
        return own + (f'sentinel auth-pass {SERVICE} "{primary}"\n' if primary else "")


class Sentinels:
    """One primary, two replicas, and three sentinels that agree on them."""

    def __init__(self, kind: str, folder: Path, *, password: str = "", sentinel_password: str = "") -> None:
        arguments = (*_FAST_SYNC, *(("--masterauth", password) if password else ()))
        self.servers = [
            StoreServer(kind, folder / f"server-{n}", *arguments, password=password) for n in range(3)
        ]
        self.sentinels = [
            SentinelServer(kind, folder / f"sentinel-{n}", self.servers[0], sentinel_password)
            for n in range(3)
        ]

    @property
    def url(self) -> str:
        """Its address as the settings write it, without logins."""
        hosts = ",".join(f"{HOST}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{SERVICE}"

    @property
    def primary(self) -> StoreServer:
        """The server that the sentinels call the primary."""
        with next(each for each in self.sentinels if each.alive).client() as client:
            # During a fail-over, `SENTINEL MASTER` tells of the old one.
            _, port = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        return next(server for server in self.servers if server.port == int(port))

    def start(self) -> None:
        """Start all of it and wait until everybody knows of everybody."""
        primary, *replicas = self.servers
        primary.start()
        for replica in replicas:
            replica.start()
            with replica.client() as client:
                client.replicaof(HOST, str(primary.port))
        for sentinel in self.sentinels:
            sentinel.start()
        wait_until(self._is_ready, "sentinels")

    def stop(self) -> None:
        """End all of it."""
        for server in (*self.sentinels, *self.servers):
            server.kill()

    def _is_ready(self) -> bool:
        for sentinel in self.sentinels:
            state = master_of(sentinel)
            with sentinel.client() as client:
                links = [each["master-link-status"] for each in client.sentinel_slaves(SERVICE)]
            if state["num-other-sentinels"] != 2 or links != ["ok", "ok"]:
                return False
        return True


def master_of(sentinel: SentinelServer) -> dict[str, Any]:
    """A sentinel's view of the service. `sentinel_master` of redis-py 6 can't read its own answer."""
    with sentinel.client() as client:
        return dict(client.execute_command("SENTINEL MASTER", SERVICE))


class Cluster:
    """A cluster of so many primaries, each with as many replicas; `arguments` are its servers' own."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        *arguments: str,
        primaries: int = 3,
        replicas: int = 0,
        server: Callable[..., StoreServer] = StoreServer,
    ) -> None:
        self.kind = kind
        number = primaries * (1 + replicas)
        self.nodes = [
            server(kind, folder / f"node-{n}", *_CLUSTER, *_FAST_SYNC, *arguments) for n in range(number)
        ]
        self._primaries = primaries

    @property
    def url(self) -> str:
        """Its address as the settings write it: two of its nodes, or the one."""
        return "redis+cluster://" + ",".join([f"{HOST}:{node.port}" for node in self.nodes[:2]])

    def start(self) -> None:
        """Start the nodes, have them meet, share out the slots, and wait until all of them agree."""
        for node in self.nodes:
            node.start()
        for number, node in enumerate(self.nodes[: self._primaries]):
            first, last = (round(n * SLOTS / self._primaries) for n in (number, number + 1))
            with node.client() as client:
                client.execute_command("CLUSTER", "ADDSLOTS", *range(first, last))
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        with self.nodes[0].client() as client:
            for node in self.nodes[1:]:
                client.execute_command("CLUSTER", "MEET", HOST, node.port)
        wait_until(lambda: all(self._knows_all(node) for node in self.nodes), "cluster")
        for number, node in enumerate(self.nodes[self._primaries :]):
            with node.client() as client:
                client.execute_command(
                    "CLUSTER", "REPLICATE", self.id_of(self.nodes[number % self._primaries])
                )
        wait_until(lambda: all(self._is_ready(node) for node in self.nodes), "cluster")

    def stop(self) -> None:
        """End all of it."""
        for node in self.nodes:
            node.kill()

    def add(self) -> StoreServer:
        """Have another node join, which serves no slot."""
        folder = self.nodes[0].folder.with_name(f"node-{len(self.nodes)}")
        node = StoreServer(self.kind, folder, *_CLUSTER, *_FAST_SYNC)
        node.start()
        self.nodes.append(node)
        with self.nodes[0].client() as client:
            client.execute_command("CLUSTER", "MEET", HOST, node.port)
            wait_until(lambda: all(self._knows_all(each) for each in self.nodes), "new node")
        with node.client() as client:
            wait_until(
                lambda: "cluster_state:ok" in text(client.execute_command("CLUSTER", "INFO")), "new node"
            )
        return node

    def empty(self) -> None:
        """Remove all data."""
        for node in self.nodes[: self._primaries]:
            with node.client() as client:
                client.flushall()

    def id_of(self, node: StoreServer) -> str:
        """Return the cluster's id of a node."""
        with node.client() as client:
            return text(client.execute_command("CLUSTER", "MYID"))

    def owner_of(self, slot: int) -> StoreServer:
        """The node that serves a slot, as the first node that runs sees it."""
        asked = next(node for node in self.nodes if node.alive)
        with asked.client() as client:
            for first, last, (_, port, *_), *_ in client.execute_command("CLUSTER", "SLOTS"):
                if first <= slot <= last:
                    return next(node for node in self.nodes if node.port == port)
        raise LookupError(f"nobody serves slot {slot}")

    def open_migration(self, slot: int, target: StoreServer) -> None:
        """Begin to move a slot: its keys are asked for at either node from now on."""
        source = self.owner_of(slot)
        with target.client() as client:
            client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        with source.client() as client:
            client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(target))

    def move_keys(self, slot: int, source: StoreServer, target: StoreServer) -> int:
        """Move the keys of a slot that is being moved; how many there were."""
        moved = 0
        with source.client() as client:
            while keys := client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
                client.execute_command("MIGRATE", HOST, target.port, "", 0, 5_000, "KEYS", *keys)
                moved += len(keys)
        return moved

    def close_migration(self, slot: int, target: StoreServer) -> None:
        """Have all nodes know who serves the slot now, the new one first."""
        target_id = self.id_of(target)
        for node in (target, *(each for each in self.nodes if each is not target and each.alive)):
            with node.client() as client:
                client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target_id)

    def migrate(self, slot: int, target: StoreServer) -> int:
        """Move a slot as `redis-cli --cluster reshard` does; how many keys it had."""
        source = self.owner_of(slot)
        self.open_migration(slot, target)
        moved = self.move_keys(slot, source, target)
        self.close_migration(slot, target)
        return moved

    def _knows_all(self, node: StoreServer) -> bool:
        with node.client() as client:
            lines = text(client.execute_command("CLUSTER", "NODES")).splitlines()
        return len(lines) == len(self.nodes) and not any("handshake" in line for line in lines)

    def _is_ready(self, node: StoreServer) -> bool:
        with node.client() as client:
            info = text(client.execute_command("CLUSTER", "INFO"))
            ranges = client.execute_command("CLUSTER", "SLOTS")
            link = client.info("replication").get("master_link_status", "up")
        replicated = sum(len(each) - 2 for each in ranges) == len(self.nodes)
        return "cluster_state:ok" in info and replicated and link == "up"


SLOTS = 16_384
_FAST_SYNC = ("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0")
_CLUSTER = (
    "--cluster-enabled",
    "yes",
    "--cluster-node-timeout",
    str(DOWN_AFTER),
    "--cluster-config-file",
    "n.conf",
    "--cluster-require-full-coverage",
    "no",
)


@contextmanager
def running(topology: Sentinels | Cluster) -> Iterator[None]:
    """Start it, and end it whatever happens."""
    try:
        topology.start()
        yield
    finally:
        topology.stop()


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Wait until servers have agreed."""
    give_up = time.monotonic() + READY_SECONDS
    while time.monotonic() < give_up:
        try:
            if holds():
                return
        except redis.RedisError:
            pass
        time.sleep(0.05)
    raise TimeoutError(f"the {what} never got ready")


def slot_of(partition: str) -> int:
    """Return the hash slot of a partition without braces."""
    return hash_slot(partition.encode())


def text(answer: object) -> str:
    """An answer as redis-py gives it, as text."""
    return answer.decode() if isinstance(answer, bytes) else str(answer)
