"""Real balancers other than nginx, from wheels or the PATH, each under the shipped configuration."""

import os
import shutil
import socket
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.apps import ROOT
from tests.support.processes import HOST, ServerProcess

DEPLOY = ROOT / "examples" / "deploy"
REPLICAS = ("app-1", "app-2")


@dataclass(frozen=True, slots=True)
class Kind:
    """A balancer: its configuration, and its command with FILE and PORT."""

    name: str
    file: str
    command: str
    listens: str = ""
    """Text by which the configuration listens, if not the command, and what takes its place."""
    moved: str = ""
    address: str = "{host}:{port}"
    """Address of a replica, as the configuration writes it."""
    ready: str = ""
    """Text that it writes when it serves."""

    @property
    def binary(self) -> str | None:
        """The program; None where it is not installed."""
        return shutil.which(self.name, path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}:/usr/sbin")


KINDS = {
    kind.name: kind
    for kind in (
        Kind("haproxy", "haproxy.cfg", "-W -db -f FILE", "bind :8080", f"bind {HOST}:PORT", ready="success"),
        Kind(
            "envoy",
            "envoy.yaml",
            "-c FILE --disable-hot-restart --concurrency 2 --log-level info",
            "address: 0.0.0.0, port_value: 8080",
            f"address: {HOST}, port_value: PORT",
            address="address: {host}, port_value: {port}",
            ready="starting workers",
        ),
        Kind(
            "caddy",
            "Caddyfile",
            "run --config FILE --adapter caddyfile",
            "\n:8080 {",
            f"\nhttp://:PORT {{\n\tbind {HOST}",
            ready="serving initial configuration",
        ),
        Kind(
            "traefik",
            "traefik.yml",
            f"--entrypoints.edge.address={HOST}:PORT --providers.file.filename=FILE --log.level=INFO",
            ready="Starting provider *file.Provider",
        ),
    )
}


class Balancer(ServerProcess):
    """A balancer before two replicas.

    `replace` maps more of the configuration's text to what is true in the test. Each text has to be there.
    """

    own_process_group = True

    def __init__(
        self, kind: Kind, folder: Path, replicas: tuple[int, int], replace: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(kind.name, folder)
        self.kind = kind
        self.replace = dict(replace or {})
        for name, port in zip(REPLICAS, replicas, strict=True):
            self.replace[_address(kind, name, 8000)] = _address(kind, HOST, port)

    @property
    def url(self) -> str:
        """URL at which it listens, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    def command(self) -> list[str]:
        """Write the configuration for the port of this attempt, and serve it."""
        text = (DEPLOY / self.kind.file).read_text("utf-8")
        moved = {self.kind.listens: self.kind.moved} if self.kind.listens else {}
        for old, new in {**self.replace, **moved}.items():
            if old not in text:
                raise ValueError(f"{self.kind.file} does not say {old!r}")
            text = text.replace(old, new.replace("PORT", str(self.port)))
        file = self.folder / self.kind.file
        file.write_text(text, "utf-8")
        said = self.kind.command.replace("FILE", str(file)).replace("PORT", str(self.port))
        return [str(self.kind.binary), *said.split()]

    def environment(self) -> dict[str, str]:
        """The tests' own, but nothing is kept in the folder of whoever runs them."""
        return {**super().environment(), "HOME": str(self.folder), "XDG_DATA_HOME": str(self.folder)}

    def answers(self) -> bool:
        """Whether it has said that it serves, and the port takes connections."""
        if self.kind.ready not in self.log:
            return False
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0


def _address(kind: Kind, host: str, port: int) -> str:
    return kind.address.format(host=host, port=port)
