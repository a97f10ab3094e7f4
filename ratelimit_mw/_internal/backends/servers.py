"""Backends and clients of a server: Redis or Valkey, alone, behind sentinels or in a cluster.

Imported where the settings name one.
"""

from collections.abc import Callable

from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.cluster.nodes import Nodes
from ratelimit_mw._internal.backends.connecting.client import Client
from ratelimit_mw._internal.backends.connecting.connectors import connector_to
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import Backend
from ratelimit_mw._internal.settings.backend import BackendSettings


def open_backend(settings: BackendSettings) -> Backend:
    """The backend on the server or cluster that the settings name."""
    backend = ClusterBackend if _is_cluster(settings) else RedisBackend
    return backend(
        settings.url.get_secret_value(),
        namespace=settings.namespace,
        timeout=settings.timeout,
        options=settings.tls_options,
    )


def clients(settings: BackendSettings, key: str, timeout: float) -> Callable[[], Client]:
    """Make clients for the server that has a key; a command may take so many seconds."""
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
