"""Backends that store the counts: in this process, or in a Redis or Valkey that all workers share."""

from collections.abc import Callable

from ratelimit_mw._internal.backends.audit_store import AuditStore, MemoryAuditStore, RedisAuditStore
from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.cluster.nodes import Nodes
from ratelimit_mw._internal.backends.connecting.client import Client
from ratelimit_mw._internal.backends.connecting.connectors import connector_to
from ratelimit_mw._internal.backends.figures_store import (
    FiguresStore,
    MemoryFiguresStore,
    RedisFiguresStore,
    fleet_prefix,
)
from ratelimit_mw._internal.backends.key_store import KeyStore, MemoryKeyStore, RedisKeyStore, keys_hash
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import Backend
from ratelimit_mw._internal.settings.backend import BackendSettings


def open_backend(settings: BackendSettings) -> Backend:
    """The backend that the settings name. It connects when it is first used, or opened."""
    if not settings.is_shared:
        return MemoryBackend()
    backend = ClusterBackend if _is_cluster(settings) else RedisBackend
    return backend(
        settings.url.get_secret_value(),
        namespace=settings.namespace,
        timeout=settings.timeout,
        options=settings.tls_options,
    )


def open_key_store(settings: BackendSettings, *, timeout: float = 1.0) -> KeyStore:
    """The live keys of the backend that the settings name. It connects when it is first used.

    `timeout` is how many seconds a command may take; no request waits for one.
    """
    if not settings.is_shared:
        return MemoryKeyStore()
    return RedisKeyStore(_clients(settings, keys_hash(settings.namespace), timeout), settings.namespace)


def open_audit_store(settings: BackendSettings, *, timeout: float = 1.0) -> AuditStore:
    """Records of changes in the backend that the settings name; otherwise as `open_key_store`."""
    if not settings.is_shared:
        return MemoryAuditStore()
    return RedisAuditStore(_clients(settings, keys_hash(settings.namespace), timeout), settings.namespace)


def open_figures_store(settings: BackendSettings, *, timeout: float = 1.0) -> FiguresStore:
    """The figures of the fleet in the backend that the settings name; otherwise as `open_key_store`."""
    if not settings.is_shared:
        return MemoryFiguresStore()
    return RedisFiguresStore(
        _clients(settings, fleet_prefix(settings.namespace), timeout), settings.namespace
    )


def _clients(settings: BackendSettings, key: str, timeout: float) -> Callable[[], Client]:
    """Makes clients for the server that has a key."""
    url, timeout, options = (
        settings.url.get_secret_value(),
        max(timeout, settings.timeout),
        settings.tls_options,
    )
    if _is_cluster(settings):
        return Nodes(url, timeout=timeout, options=options).client_for(key)
    return connector_to(url, timeout=timeout, options=options).client


def _is_cluster(settings: BackendSettings) -> bool:
    return settings.safe_url.partition("://")[0].endswith("+cluster")
