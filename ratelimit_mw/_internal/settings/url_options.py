"""The options in the query of the backend's URL: which there are, for which URLs, and what each may be.

redis-py passes whatever a query holds to its connections, where an unknown name or a wrong value shows when
the first of them is opened, if at all. So each option is checked here, and what would change the protocol
that the backend speaks is none.
"""

import functools
import re
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote_plus

from ratelimit_mw._internal.settings.errors import fault, nearest_name, one_of, shown

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_MAX_VALUE = 65_536
_TRUTHS = ("true", "yes", "1", "false", "no", "0")
_TLS_VERSIONS = {"771": "TLS 1.2", "772": "TLS 1.3"}
_VERIFY = ("none", "optional", "required")

_SERVERS = frozenset({"server", "server with TLS", "socket", "sentinels", "cluster"})
_NETWORK = _SERVERS - {"socket"}
_TLS = frozenset({"server with TLS", "sentinels", "cluster"})


class _Option(NamedTuple):
    """One option, and the kinds of URL that may have it."""

    expected: str
    is_good: Callable[[str], object]
    kinds: frozenset[str] = _SERVERS
    is_secret: bool = False
    since: tuple[int, ...] = ()
    """The version of redis-py that knows it first, where that is not the oldest that the package takes."""


def _is_seconds(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,9})?", text)) and 0 < float(text) <= 60


def _are_flags(text: str) -> bool:
    names = [name.strip() for name in text.strip("[]").split(",")]
    return all(name in ssl.VerifyFlags.__members__ for name in names)


def _is_file(text: str) -> bool:
    return "\0" not in text and Path(text).is_file()


def _is_folder(text: str) -> bool:
    return "\0" not in text and Path(text).is_dir()


_SECONDS = "seconds, more than 0 and at most 60"
_A_TRUTH = "true or false"
_FLAGS = "names of ssl.VerifyFlags, separated by commas"
_TEXT = "a text"
_FILE = "the path of a file"


def _is_truth(text: str) -> bool:
    return text.lower() in _TRUTHS


OPTIONS: Mapping[str, _Option] = {
    "db": _Option("a number from 0 to 99999", re.compile(r"[0-9]{1,5}").fullmatch, _SERVERS - {"cluster"}),
    "username": _Option(_TEXT, bool, is_secret=True),
    "password": _Option(_TEXT, bool, is_secret=True),
    "sentinel_username": _Option(_TEXT, bool, frozenset({"sentinels"}), is_secret=True),
    "sentinel_password": _Option(_TEXT, bool, frozenset({"sentinels"}), is_secret=True),
    "client_name": _Option(
        "1 to 64 printable ASCII characters without spaces", re.compile(r"[!-~]{1,64}").fullmatch
    ),
    "socket_timeout": _Option(_SECONDS, _is_seconds),
    "socket_connect_timeout": _Option(_SECONDS, _is_seconds),
    "socket_keepalive": _Option(_A_TRUTH, _is_truth, _NETWORK),
    "health_check_interval": _Option("whole seconds from 0 to 99999", re.compile(r"[0-9]{1,5}").fullmatch),
    "ssl_cert_reqs": _Option(one_of(_VERIFY), _VERIFY.__contains__, _TLS),
    "ssl_check_hostname": _Option(_A_TRUTH, _is_truth, _TLS),
    "ssl_ca_certs": _Option(_FILE, _is_file, _TLS),
    "ssl_ca_path": _Option("the path of a folder", _is_folder, _TLS, since=(7, 2)),
    "ssl_ca_data": _Option("certificates in PEM", bool, _TLS),
    "ssl_certfile": _Option(_FILE, _is_file, _TLS),
    "ssl_keyfile": _Option(_FILE, _is_file, _TLS),
    "ssl_password": _Option(_TEXT, bool, _TLS, is_secret=True, since=(7, 2)),
    "ssl_min_version": _Option(
        " or ".join(f"{number} ({name})" for number, name in _TLS_VERSIONS.items()),
        _TLS_VERSIONS.__contains__,
        _TLS,
        since=(8, 0, 1),
    ),
    "ssl_ciphers": _Option("ciphers as OpenSSL lists them", bool, _TLS),
    "ssl_include_verify_flags": _Option(_FLAGS, _are_flags, _TLS, since=(7, 0)),
    "ssl_exclude_verify_flags": _Option(_FLAGS, _are_flags, _TLS, since=(7, 0)),
}
"""Every option, under redis-py's name for it."""

_OWN = frozenset(
    {
        *("connection_class", "decode_responses", "encoder_class", "encoding", "encoding_errors"),
        *("legacy_responses", "lib_name", "lib_version", "max_connections", "parser_class", "protocol"),
        *("retry", "retry_on_error", "retry_on_timeout", "single_connection_client", "socket_read_size"),
        *("socket_keepalive_options", "socket_type", "timeout"),
    }
)
"""Options of redis-py that the backend decides about itself: its protocol, and how often it tries."""


@functools.cache
def _redis_version() -> tuple[int, ...]:
    import importlib.metadata  # noqa: PLC0415 - for those who have a URL with options

    return tuple(map(int, re.findall(r"\d+", importlib.metadata.version("redis"))[:3]))


def kind_of_url(scheme: str) -> str:
    """Return what a URL of this scheme leads to."""
    if scheme == "memory":
        return "memory"
    for end, kind in (("unix", "socket"), ("+sentinel", "sentinels"), ("+cluster", "cluster")):
        if scheme.endswith(end):
            return kind
    return "server with TLS" if scheme in ("rediss", "valkeys") else "server"


def check_options(scheme: str, query: str) -> dict[str, str]:
    """Return the options of a URL's query by name.

    Raises a fault for the first that is unknown, there twice, of another kind of URL, or has a wrong value.
    """
    options: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        name, separator, value = (unquote_plus(part) for part in pair.partition("="))
        _check(scheme, name, value if separator else "")
        if name in options:
            raise fault(f"option '{name}' is given twice", "each option once")
        options[name] = value
    if "sentinel_username" in options and "sentinel_password" not in options:
        raise fault("option 'sentinel_username' is given without 'sentinel_password'", "both of them")
    if "ssl_keyfile" in options and "ssl_certfile" not in options:
        raise fault("option 'ssl_keyfile' is given without 'ssl_certfile'", "both of them")
    return options


def check_tls(options: Mapping[str, str]) -> None:
    """Check that certificates, keys and ciphers can be used. Raises a fault that names what can't."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authorities = [options.get(name) for name in ("ssl_ca_certs", "ssl_ca_path", "ssl_ca_data")]
    what = "certificates to trust"
    try:
        if any(authorities):
            context.load_verify_locations(*authorities)
        what = "client certificate and key"
        if "ssl_certfile" in options:
            # With a password of no length, OpenSSL never asks for one at the terminal.
            password = options.get("ssl_password", "")
            context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"), password)
        what = "ciphers"
        if "ssl_ciphers" in options:
            context.set_ciphers(options["ssl_ciphers"])
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "not in PEM"
        raise fault(f"the {what} can't be used: {reason}") from None


def _check(scheme: str, name: str, value: str) -> None:
    kind = kind_of_url(scheme)
    names = [each for each, option in OPTIONS.items() if kind in option.kinds]
    expected = one_of(names) if names else "no options"
    option = OPTIONS.get(name)
    if option is None:
        # What doesn't look like a name may be part of a password.
        if not _NAME.fullmatch(name):
            raise fault("has a query that is not NAME=VALUE", expected)
        if name in _OWN:
            raise fault(f"option '{name}' can't be set in the URL", expected)
        raise fault(f"unknown option '{name}'", expected, nearest_name(name, names))
    if kind not in option.kinds:
        hint = 'a URL such as "rediss://…"' if name.startswith("ssl_") and kind == "server" else expected
        raise fault(f"option '{name}' is not allowed in a URL of {scheme}://", hint)
    if option.since > _redis_version():
        needed = ".".join(map(str, option.since))
        raise fault(f"option '{name}' is unknown to the installed redis-py", f"redis {needed} or newer")
    if len(value) > _MAX_VALUE or not option.is_good(value):
        said = "its value" if option.is_secret else shown(value)
        raise fault(f"option '{name}': {said} is wrong", option.expected)
