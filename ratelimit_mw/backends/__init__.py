"""Where counts live: in this process, or in a Redis or Valkey that all workers share."""

from typing import Any

from ratelimit_mw.backends.memory import MemoryBackend
from ratelimit_mw.backends.redis import RedisBackend
from ratelimit_mw.charge import Backend
from ratelimit_mw.settings.tables import BackendSettings


def open_backend(settings: BackendSettings) -> Backend:
    """The backend that the settings name. It connects when it is first used, or opened."""
    if settings.url.startswith("memory:"):
        return MemoryBackend()
    return RedisBackend(
        settings.url, namespace=settings.namespace, timeout=settings.timeout, options=_tls(settings)
    )


def _tls(settings: BackendSettings) -> dict[str, Any]:
    files = {
        "ssl_ca_certs": settings.tls_ca_file,
        "ssl_certfile": settings.tls_cert_file,
        "ssl_keyfile": settings.tls_key_file,
    }
    return {name: file for name, file in files.items() if file is not None}
