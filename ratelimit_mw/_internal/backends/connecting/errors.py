"""Errors of connections, as backends raise them."""

from ratelimit_mw._internal.model.backend import BackendError


class ConnectionEndedError(BackendError):
    """The other side, or the network between, has closed a connection."""


class ReplyError(BackendError):
    """The server answered, and the answer was an error: no permission, a key of another type."""


class ServerMovedError(BackendError):
    """Another server is the one to go to. Nothing is wrong with the connection that ends for it."""
