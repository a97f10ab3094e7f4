"""Every ASGI server that an app may be run by, each as its own command starts it."""

import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.apps import ROOT
from tests.support.processes import HOST, ServerProcess

APP = "tests.support.server_app:app"


@dataclass(frozen=True, slots=True)
class Kind:
    """A server, and the options that it is run with."""

    command: str
    """Arguments of `python`, with `HOST` and `PORT`."""
    lifespan: bool = True
    """Whether it tells the app of start and end."""
    denial: bool = True
    """Whether a refused WebSocket gets a response; else its handshake is rejected without one."""
    accept_headers: bool = True
    """Whether the handshake of an accepted WebSocket carries the app's headers."""
    ends_requests: bool = True
    """Whether requests that run may end before the server does."""
    frees_streams: bool = True
    """Whether the slots of streams that a shutdown cuts off are free at once; else when their lease ends."""


GUNICORN = "-m gunicorn --bind HOST:PORT --graceful-timeout 3"
KINDS = {
    "uvicorn": Kind("-m uvicorn --host HOST --port PORT --timeout-graceful-shutdown 3"),
    "uvicorn, lifespan off": Kind(
        "-m uvicorn --host HOST --port PORT --timeout-graceful-shutdown 3 --lifespan off",
        lifespan=False,
        frees_streams=False,
    ),
    "uvicorn, workers": Kind("-m uvicorn --host HOST --port PORT --timeout-graceful-shutdown 3 --workers 2"),
    # From Python 3.12 on it waits for streams without an end, and has to be killed: its issue 308.
    "hypercorn": Kind(
        "-m hypercorn --bind HOST:PORT --graceful-timeout 3", frees_streams=sys.version_info < (3, 12)
    ),
    "granian": Kind(
        "-m granian --interface asgi --host HOST --port PORT --workers-kill-timeout 5",
        accept_headers=False,
        frees_streams=False,
    ),
    "granian, lifespan off": Kind(
        "-m granian --interface asginl --host HOST --port PORT --workers-kill-timeout 5",
        lifespan=False,
        accept_headers=False,
        frees_streams=False,
    ),
    "gunicorn, asgi": Kind(f"{GUNICORN} -k asgi", denial=False, frees_streams=False),
    "gunicorn, asgi, lifespan off": Kind(
        f"{GUNICORN} -k asgi --asgi-lifespan off", lifespan=False, denial=False, frees_streams=False
    ),
    "gunicorn, asgi, preload": Kind(f"{GUNICORN} -k asgi --preload -w 2", denial=False, frees_streams=False),
    "gunicorn, uvicorn, preload": Kind(
        f"{GUNICORN} -k uvicorn.workers.UvicornWorker --preload -w 2", frees_streams=False
    ),
    "daphne": Kind(
        "-m daphne -b HOST -p PORT", lifespan=False, denial=False, accept_headers=False, ends_requests=False
    ),
}


class AsgiServer(ServerProcess):
    """One server with an app, `server_app` unless another is named; a request to `/ready` tells it is up."""

    own_process_group = True

    def __init__(self, kind: Kind, folder: Path, environment: Mapping[str, str]) -> None:
        super().__init__("server", folder)
        self._kind = kind
        self._token = secrets.token_hex(8)
        self._environment = {"SERVER_TOKEN": self._token, **environment}

    @property
    def url(self) -> str:
        """URL at which it is served, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    def command(self) -> list[str]:
        """Its own command, with this Python."""
        words = [
            word.replace("HOST", HOST).replace("PORT", str(self.port)) for word in self._kind.command.split()
        ]
        return [sys.executable, *words, APP]

    def environment(self) -> dict[str, str]:
        """The tests' own, with the settings of the app."""
        return {**super().environment(), "PYTHONPATH": str(ROOT), **self._environment}

    def answers(self) -> bool:
        """Whether this very server answers."""
        try:
            told = httpx.get(f"{self.url}/ready", timeout=5).json()
        except (httpx.HTTPError, ValueError):
            return False
        return bool(told["of"] == self._token)
