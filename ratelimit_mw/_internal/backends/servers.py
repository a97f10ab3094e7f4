"""Backends and clients of a server: Redis or Valkey, alone, behind sentinels or in a cluster.

Imported where the settings name one.
"""

from collections.abc import Callable
from functools import partial

from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.cluster.nodes import Nodes
from ratelimit_mw._internal.backends.connecting.client import Client
from ratelimit_mw._internal.backends.connecting.connectors import connector_to
from ratelimit_mw._internal.backends.connecting.shared import SharedConnection
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


def clients(
    settings: BackendSettings, key: str, timeout: float, beside: Backend | None = None
) -> Callable[[], Client]:
    """Make clients for the server that has a key; a command may take so many seconds.

    Their short commands go over the connection of the backend that they are `beside`.
    """
    url, timeout, options = (
        settings.url.get_secret_value(),
        max(timeout, settings.timeout),
        settings.tls_options,
    )
    if _is_cluster(settings):
        new_client = Nodes(url, timeout=timeout, options=options).client_for(key)
    else:
        new_client = connector_to(url, timeout=timeout, options=options).client
    if not isinstance(beside, (RedisBackend, ClusterBackend)):
        return new_client
    find = partial(beside.loops.connection_to, key.encode())

    def new_beside() -> Client:
        client = new_client()
        client.shared = SharedConnection(find, timeout)
        return client

    return new_beside


def _is_cluster(settings: BackendSettings) -> bool:
    return settings.safe_url.partition("://")[0].endswith("+cluster")
