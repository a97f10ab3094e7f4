"""Rights on a server that has users: whether one was missing, and what would give it."""

import re
from urllib.parse import unquote

from ratelimit_mw._internal.settings.backend import BackendSettings
from ratelimit_mw._internal.settings.url import split_url

WORKER = (
    "auth", "client|setname", "select", "ping", "evalsha", "eval", "time", "get", "set", "getrange",
    "setrange", "del", "pexpire", "pttl", "zadd", "zcard", "zcount", "zrem", "zremrangebyscore",
    "zscore", "zrange", "zmscore", "zremrangebyrank", "hscan",
)  # fmt: skip
"""Commands that a worker gives."""
ADMIN = ("hget", "hset", "hdel", "watch", "multi", "exec")
"""Commands that change live keys."""

_MISSING = re.compile(
    r"NOPERM|no permissions|can't run this command|can't access at least one", re.IGNORECASE
)
_KEYS = re.compile(r"permissions to access|can't access at least one")
_COMMAND = re.compile(r"run the '([^']+)'")


def missing_rights(reason: str, backend: BackendSettings) -> str | None:
    """The command that gives a user the rights for want of which it was refused; None for another reason."""
    if not _MISSING.search(reason):
        return None
    command = _COMMAND.search(reason)
    name = command[1].lower() if command else ""
    if _KEYS.search(reason):
        rights = [f"~{backend.namespace}:*"]
    elif name in ADMIN:
        rights = [f"+{each}" for each in ADMIN]
    else:
        rights = [f"+{each}" for each in ([name] if name else WORKER)]
    return " ".join(("ACL SETUSER", _user(backend), *rights))


def _user(backend: BackendSettings) -> str:
    """The user that the URL logs in as."""
    name = split_url(backend.url.get_secret_value()).username
    return unquote(name) if name else "default"
