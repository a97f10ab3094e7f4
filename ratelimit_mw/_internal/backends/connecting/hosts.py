"""URLs that name several hosts: the sentinels of a service, some nodes of a cluster."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from ratelimit_mw._internal.settings.url import split_url

SENTINEL_LOGIN = ("sentinel_username", "sentinel_password")
"""Query parameters of a URL with the login of the sentinels, which have users of their own."""


class Address(NamedTuple):
    """Host and port on which a server listens."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class SeveralHosts:
    """A URL of several hosts, in its parts."""

    hosts: tuple[Address, ...]
    path: tuple[str, ...]
    """The path's parts: the service and the database of sentinels."""
    login: str
    """User and password of the servers as the URL has them, with the `@`."""
    sentinel_login: str
    """User and password of the sentinels, taken from the query of the URL, with the `@`."""
    query: str
    sentinel_query: str
    is_encrypted: bool

    def url_of(self, address: Address, database: str = "") -> str:
        """The URL of one server, with the login that all of them share."""
        return f"{self._base(self.login, address)}/{database}{self.query}"

    def sentinel_url_of(self, address: Address) -> str:
        """The URL of one sentinel: with the TLS and the time limits of the servers, but its own login."""
        return f"{self._base(self.sentinel_login, address)}/{self.sentinel_query}"

    def _base(self, login: str, address: Address) -> str:
        scheme = "rediss" if self.is_encrypted else "redis"
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"{scheme}://{login}{host}:{address.port}"


def read_hosts(url: str, default_port: int, options: dict[str, Any] | None) -> SeveralHosts:
    """Take a URL apart. With TLS among its options, or files for it in `options`, all connections use it."""
    parts = split_url(url)
    login, at, hosts = parts.netloc.rpartition("@")
    query = dict(parse_qsl(parts.query))
    user, password = [quote(query.pop(name, ""), safe="") for name in SENTINEL_LOGIN]
    return SeveralHosts(
        hosts=tuple(_addresses(hosts.split(","), default_port)),
        path=tuple(part for part in parts.path.split("/") if part),
        sentinel_login=f"{user}:{password}@" if password else "",
        login=login + at,
        query=_query(query),
        sentinel_query=_query({n: v for n, v in query.items() if n.startswith(("ssl_", "socket_"))}),
        is_encrypted=any(name.startswith("ssl_") for name in (*query, *(options or {}))),
    )


def _query(options: Mapping[str, str]) -> str:
    return "?" + urlencode(options) if options else ""


def _addresses(hosts: Iterable[str], default_port: int) -> Iterable[Address]:
    for host in hosts:
        parts = urlsplit(f"//{host}")
        yield Address(parts.hostname or "", parts.port or default_port)
