"""Choice of the connector for a URL: to one server, or to the primary that sentinels name."""

from typing import Any

from ratelimit_mw._internal.backends.connecting.connector import Connector, ServerConnector
from ratelimit_mw._internal.backends.connecting.sentinel import SentinelConnector


def connector_to(url: str, *, timeout: float, options: dict[str, Any] | None = None) -> Connector:
    """Connections to the server that `url` names, or to the primary that its sentinels do."""
    is_sentinel = url.partition("://")[0].endswith("+sentinel")
    connector = SentinelConnector if is_sentinel else ServerConnector
    return connector(url, timeout=timeout, options=options)
