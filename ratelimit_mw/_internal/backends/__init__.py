"""Backends that store the counts: in this process, or in a Redis or Valkey that all workers share.

- `memory/`: the backend in this process. `redis/`: on one server. `cluster/`: on a cluster.
- `connecting/`: connections to servers, and which server is the primary.
- `key_store.py`, `figures_store.py`, `audit_store.py`: what is stored beside the counts
  (`memory_figures.py` in memory).
- `servers.py`: the choice by URL. `rights.py`: users of a server that may not do all of this.

All backends have the interface `Backend` in `model/backend.py`, and give the same answers. Those that talk
to a server are imported when a settings file names one: redis-py takes as long to import, and as much
memory, as the rest of this package.
"""

from typing import TYPE_CHECKING

from ratelimit_mw._internal.backends.audit_store import AuditStore, MemoryAuditStore, RedisAuditStore
from ratelimit_mw._internal.backends.figures_store import FiguresStore, RedisFiguresStore, fleet_prefix
from ratelimit_mw._internal.backends.key_store import KeyStore, MemoryKeyStore, RedisKeyStore, keys_hash
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.backends.memory_figures import MemoryFiguresStore
from ratelimit_mw._internal.model.backend import Backend
from ratelimit_mw._internal.settings.backend import BackendSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from ratelimit_mw._internal.backends.connecting.client import Client


def open_backend(settings: BackendSettings) -> Backend:
    """The backend that the settings name. It connects when it is first used, or opened."""
    if not settings.is_shared:
        return MemoryBackend()
    from ratelimit_mw._internal.backends import servers

    return servers.open_backend(settings)


def open_key_store(
    settings: BackendSettings, *, timeout: float = 1.0, beside: Backend | None = None
) -> KeyStore:
    """The live keys of the backend that the settings name. It connects when it is first used.

    `timeout` is how many seconds a command may take; no request waits for one. The store shares the
    connection of the backend that it is used `beside`, and opens one of its own for what takes long.
    """
    if not settings.is_shared:
        return MemoryKeyStore()
    new_client = _clients(settings, keys_hash(settings.namespace), timeout, beside)
    return RedisKeyStore(new_client, settings.namespace)


def open_audit_store(settings: BackendSettings, *, timeout: float = 1.0) -> AuditStore:
    """Records of changes in the backend that the settings name; otherwise as `open_key_store`."""
    if not settings.is_shared:
        return MemoryAuditStore()
    return RedisAuditStore(_clients(settings, keys_hash(settings.namespace), timeout), settings.namespace)


def open_figures_store(
    settings: BackendSettings, *, timeout: float = 1.0, beside: Backend | None = None
) -> FiguresStore:
    """The figures of the fleet in the backend that the settings name; otherwise as `open_key_store`."""
    if not settings.is_shared:
        return MemoryFiguresStore()
    new_client = _clients(settings, fleet_prefix(settings.namespace), timeout, beside)
    return RedisFiguresStore(new_client, settings.namespace)


def _clients(
    settings: BackendSettings, key: str, timeout: float, beside: Backend | None = None
) -> "Callable[[], Client]":
    from ratelimit_mw._internal.backends import servers

    return servers.clients(settings, key, timeout, beside)
