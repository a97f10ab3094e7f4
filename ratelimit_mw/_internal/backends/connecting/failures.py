"""Failures of redis-py, as the errors that backends raise."""

from redis.exceptions import AuthenticationError, RedisError, ResponseError

from ratelimit_mw._internal.backends.connecting.errors import ReplyError
from ratelimit_mw._internal.model.backend import BackendError

FAILURES = (RedisError, OSError, TimeoutError, ValueError, RuntimeError)
"""Exceptions of redis-py for a server that can't be reached, does not answer, or refuses.

uvloop raises the RuntimeError, for a write to a connection that has just ended."""


def as_backend_error(error: Exception) -> BackendError:
    """Turn an exception of redis-py, or of reading an answer, into a `BackendError`."""
    if isinstance(error, BackendError):
        return error
    if not isinstance(error, FAILURES):
        return BackendError(reason_of(error))
    refused = isinstance(error, ResponseError) and not isinstance(error, AuthenticationError)
    return (ReplyError if refused else BackendError)(reason_of(error))


def reason_of(error: Exception) -> str:
    """Return the message of an error, with its type if it is not an error of a server or a network."""
    if isinstance(error, (RedisError, OSError, ValueError, RuntimeError, BackendError)):
        return str(error) or "no answer in time"
    return f"{type(error).__name__}: {error}"
