"""The backend's URL: which schemes there are, what each needs, and how it looks without its password."""

import re
from ipaddress import AddressValueError, IPv6Address
from typing import Annotated
from urllib.parse import SplitResult, unquote_to_bytes

from pydantic import AfterValidator, GetPydanticSchema, Secret
from pydantic_core import core_schema

from ratelimit_mw._internal.settings.errors import fault, nearest_name, one_of
from ratelimit_mw._internal.settings.url_options import check_options, kind_of_url
from ratelimit_mw._internal.settings.values import text

SCHEMES = (
    *("memory", "unix"),
    *("redis", "rediss", "redis+unix", "redis+sentinel", "redis+cluster"),
    *("valkey", "valkeys", "valkey+unix", "valkey+sentinel", "valkey+cluster"),
)
"""Schemes that `backend.url` may begin with. Each `valkey` scheme means the same as its `redis` twin."""

_SCHEME = re.compile(r"[a-z][a-z+]{0,20}")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


def check_url(url: str) -> None:
    """Check that a backend can be had from a URL. No message repeats it, since it may hold a password."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise fault("is not a URL", 'a URL such as "memory://" or "redis://127.0.0.1:6379/0"')
    if scheme not in SCHEMES:
        name = f"scheme '{scheme}'" if _SCHEME.fullmatch(scheme) else "scheme"
        raise fault(f"unknown {name}", one_of(SCHEMES), nearest_name(scheme, SCHEMES))
    if not url.isprintable() or " " in url:
        raise fault("contains spaces or control characters", "a URL with such characters percent-encoded")
    try:
        unquote_to_bytes(url).decode()
    except UnicodeDecodeError:
        raise fault(
            "contains percent-encoded bytes that are not UTF-8 text", "percent-encoded UTF-8"
        ) from None
    parts = split_url(url)
    _check_parts(scheme, parts)
    if "#" in url:
        raise fault("contains '#', and nothing behind it would be read", "'%23' in place of '#'")
    options = check_options(scheme, parts.query)
    if "db" in options and _database_of(scheme, parts.path):
        raise fault("names the database twice", "one place: the path or option 'db'")


def split_url(url: str) -> SplitResult:
    """Return the parts of a backend's URL, which may name several hosts.

    Late releases of `urllib` take the brackets of an IPv6 address around the only host and nowhere else.
    """
    scheme, _, rest = url.partition("://")
    rest, _, fragment = rest.partition("#")
    rest, _, query = rest.partition("?")
    netloc, slash, path = rest.partition("/")
    return SplitResult(scheme, netloc, slash + path, query, fragment)


def may_use_tls(url: str) -> bool:
    """Whether a connection to `url` can be encrypted: by its scheme, or by TLS files for several hosts."""
    return kind_of_url(url.partition("://")[0]) in ("server with TLS", "sentinels", "cluster")


def options_of(url: str) -> dict[str, str]:
    """Return the options in the query of a URL that was checked."""
    return check_options(url.partition("://")[0], split_url(url).query)


def without_credentials(url: str) -> str:
    """Return `url` for logs and messages: no user, no password, no query."""
    scheme, _, rest = url.partition("://")
    rest = re.split(r"[?#]", rest)[0]
    return f"{scheme}://{rest.rpartition('@')[2]}"


def _check_parts(scheme: str, parts: SplitResult) -> None:
    if scheme == "memory":
        if parts.netloc or parts.path.strip("/"):
            raise fault("has a host or path", '"memory://" alone')
    elif scheme.endswith("unix"):
        if parts.netloc.rpartition("@")[2]:
            raise fault(
                "names a host", f'no host before the path of a socket, as in "{scheme}:///run/redis.sock"'
            )
        if not parts.path.strip("/"):
            raise fault("names no socket", f'the path of a socket, such as "{scheme}:///run/redis.sock"')
    elif scheme.endswith("+sentinel"):
        _check_hosts(parts.netloc)
        _check_sentinel_path(scheme, parts.path)
    elif scheme.endswith("+cluster"):
        _check_hosts(parts.netloc)
        if parts.path not in ("", "/", "/0"):
            raise fault("names a database", "none, since a cluster has only database 0")
    else:
        _check_hosts(parts.netloc)
        if "," in parts.netloc.rpartition("@")[2]:
            family = scheme.removesuffix("s")
            raise fault(
                "names several hosts", f'one, or a scheme such as "{family}+sentinel" or "{family}+cluster"'
            )
        _check_database(parts.path.strip("/"))


def _check_hosts(netloc: str) -> None:
    hosts = netloc.rpartition("@")[2].split(",")
    if not all(map(_is_host, hosts)):
        expected = "HOST or HOST:PORT with a port from 1 to 65535, after any percent-encoded USER:PASSWORD@"
        raise fault("the host or its port is missing or wrong", expected)


def _is_host(text: str) -> bool:
    found = _HOST.fullmatch(text)
    if not found:
        return False
    if text.startswith("["):
        try:
            IPv6Address(found[1][1:-1])
        except AddressValueError:
            return False
    return not found[2] or 1 <= int(found[2][1:]) <= 65_535


def _database_of(scheme: str, path: str) -> str:
    """Return the database that a path names, or nothing."""
    if scheme.endswith("unix"):
        return ""
    return path.strip("/").partition("/")[2] if scheme.endswith("+sentinel") else path.strip("/")


def _check_sentinel_path(scheme: str, path: str) -> None:
    service, _, database = path.strip("/").partition("/")
    if not service:
        raise fault(
            "names no service", f'the service after the hosts, as in "{scheme}://h1:26379,h2:26379/mymaster"'
        )
    _check_database(database)


def _check_database(database: str) -> None:
    if database and not re.fullmatch(r"[0-9]{1,5}", database):
        raise fault("the database in the path is not a number", "a number such as 0, or nothing")


class SecretURL(Secret[str]):
    """A URL that shows itself without its user, password and query."""

    def _display(self) -> str:
        return without_credentials(self.get_secret_value())


def _checked(url: SecretURL) -> SecretURL:
    check_url(url.get_secret_value())
    return url


def _shown(url: SecretURL) -> str:
    return str(url)


# Before pydantic 2.8 no secret but its own two could be written as JSON.
_WRITTEN = core_schema.plain_serializer_function_ser_schema(_shown, when_used="json")
BackendURL = Annotated[
    SecretURL,
    AfterValidator(_checked),
    GetPydanticSchema(lambda source, handler: {**handler(source), "serialization": _WRITTEN}),
    text("URL", f"^({'|'.join(map(re.escape, SCHEMES))})://"),
]
