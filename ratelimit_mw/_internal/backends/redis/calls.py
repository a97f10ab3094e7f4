"""Calls of the script in the Redis protocol, their replies, and the errors that a reply may carry."""

import hashlib

from ratelimit_mw._internal.backends.connecting.connection import Reply
from ratelimit_mw._internal.backends.redis.operations import bulk
from ratelimit_mw._internal.backends.redis.script import load_script

SCRIPT = load_script("batch").encode()
"""The script that decides, as servers get it."""
MOST_TIME = 2**53
"""The latest time that an answer can show, in microseconds: the script counts exactly up to here."""


def call_head(n_keys: int, n_arguments: int, *, by_digest: bool) -> bytes:
    """Return the beginning of a call of the script: all that comes before its keys.

    Of the arguments behind the keys, the first is not counted: the flags.
    """
    script = _BY_DIGEST if by_digest else _BY_TEXT
    return b"*%d\r\n%b%b" % (4 + n_keys + n_arguments, script, bulk(b"%d" % n_keys))


def read_reply(reply: Reply, number: int) -> tuple[int, list[bytes], bytes]:
    """Read the time, so many answers and what was mended in the reply to a call; raises for anything else."""
    # Exactly a list: what a server sends unasked is one of another kind.
    if reply.__class__ is not list or len(reply) not in (number + 1, number + 2):
        raise ValueError(f"{reply!r} instead of {number} answers")
    told, *answers = reply
    mended = answers.pop() if len(answers) > number else b""
    if mended.__class__ is not bytes:
        raise ValueError(f"{mended!r} instead of the name of a repaired count")
    if told.__class__ is not int or not 0 <= told <= MOST_TIME:
        raise ValueError(f"{told!r} instead of the server's time")
    return told, answers, mended


TAKES_NO_WRITES = ("READONLY", "MISCONF", "NOREPLICAS")
"""Errors of a single command that tell of the whole server: it is as good as away."""
LATE = "LATE"
"""The error of an operation that was given up before it came to the server."""
MOVING, LATER = "non local key", "TRYAGAIN"
"""A key that the script met lies in a slot that is moving, and was deleted in this very call: so nothing was
done, and the operation has to wait like one whose keys lie on two nodes.
"""
ASKING = b"*1\r\n$6\r\nASKING\r\n"
_BY_DIGEST = bulk(b"EVALSHA") + bulk(hashlib.sha1(SCRIPT, usedforsecurity=False).hexdigest().encode())
_BY_TEXT = bulk(b"EVAL") + bulk(SCRIPT)


def ignore(_reply: Reply) -> None:
    """ASKING went before a command, whose own answer says how it went."""
