"""Access to the dashboard with its token: as a bearer token, or in exchange for a session cookie.

A session is a time and a signature under the token, so that every worker knows it and none keeps anything.
Another token ends all sessions.
"""

import hashlib
import hmac
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.dashboard.answers import DashboardError
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.model.reservation import LEASE_ID_SIZE
from ratelimit_mw._internal.model.status import WindowStatus
from ratelimit_mw._internal.settings.operations import OperationsSettings

COOKIE = "ratelimit_dashboard"
SESSION_SECONDS = 12 * 3600
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="dashboard"'}

WRONG_TOKENS = Window(30, 1, "minute")
"""Wrong tokens from one address, in each process, after which none from there is looked at for a while."""
MAX_ADDRESSES = 10_000
"""Addresses whose wrong tokens are remembered; beyond it the one not seen for longest is forgotten."""


_FORWARDED_BY_HTTPS = re.compile(r"(?:^|;)[ \t]*proto=\"?https\"?[ \t]*(?:;|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Operator:
    """Somebody who may open the dashboard."""

    name: str
    """The name that changes bear: that of the token, or `dashboard` for `operations.dashboard_token`."""
    token: str
    may_change: bool

    def is_same(self, other: "Operator") -> bool:
        """Whether both are one operator with one token, whatever it may do."""
        return (self.name, self.token) == (other.name, other.token)


def operators_of(operations: OperationsSettings) -> list[Operator]:
    """Everybody who may open the dashboard, as the settings have them."""
    can_change = operations.dashboard_changes
    found = [
        Operator(each.name, each.token.get_secret_value(), can_change and each.changes)
        for each in operations.dashboard_tokens
    ]
    token = operations.dashboard_token.get_secret_value()
    return [Operator("dashboard", token, can_change), *found] if token.strip() else found


class Access:
    """Tells who has a token. What is asked of it costs the callers' limits nothing."""

    def __init__(self) -> None:
        self._wrong = MemoryBackend(max_windows=MAX_ADDRESSES)

    async def granted(self, request: Request, operators: Sequence[Operator], address: str) -> Operator | None:
        """The operator whose session or token a request carries; None for nobody.

        Raises `DashboardError` where too many wrong tokens came from its address.
        """
        cookie = request.cookies.get(COOKIE, "")
        for operator in operators:
            if is_session(cookie, operator.token):
                return operator
        scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        return await self.by_token(credentials.encode("latin-1"), operators, address)

    async def by_token(self, given: bytes, operators: Sequence[Operator], address: str) -> Operator | None:
        """The operator with this token. Raises `DashboardError` where too many wrong ones came from there."""
        charge = Charge([Counter(address, "dashboard", WRONG_TOKENS)])
        outcome = await self._wrong.peek(charge)
        if not outcome.admitted:
            wait = max(
                each.retry_after_us for each in charge.statuses(outcome) if isinstance(each, WindowStatus)
            )
            seconds = str(ceil(wait / 1_000_000))
            message = f"Too many wrong tokens from your address. Try again in {seconds} s."
            # Still 401, as anything without the token.
            raise DashboardError(401, message, {**CHALLENGE, "Retry-After": seconds})
        token = given.strip()
        found = [each for each in operators if hmac.compare_digest(token, each.token.strip().encode())]
        if found:
            return found[0]
        await self._wrong.acquire(charge, os.urandom(LEASE_ID_SIZE))
        return None


def start_session(response: Response, request: Request, token: str) -> None:
    """Give the browser a session. Without a path of its own the cookie is for the folder that answered.

    That is the dashboard's, under whatever path a proxy shows it to the browser.
    """
    _set_cookie(response, request, new_session(token, time.time() + SESSION_SECONDS), SESSION_SECONDS)


def end_session(response: Response, request: Request) -> None:
    """Take the session back from the browser."""
    _set_cookie(response, request, "", 0)


def new_session(token: str, expires: float) -> str:
    """A session that lasts until this time, in seconds since 1970."""
    return f"{int(expires)}.{_signature(token, int(expires))}"


def is_session(text: str, token: str) -> bool:
    """Whether `new_session` made this under the same token, and it has not expired."""
    expires, _, signature = text.partition(".")
    if not expires.isascii() or not expires.isdigit() or len(expires) > 12:
        return False
    good = hmac.compare_digest(signature.encode("utf-8", "replace"), _signature(token, int(expires)).encode())
    return good and time.time() < int(expires)


def is_foreign(headers: Headers) -> bool:
    """Whether a browser says that another site's page sent this request.

    `Sec-Fetch-Site` is believed before `Origin`: a page can set neither, but what `Host` says may have
    changed on the way through a proxy. Other clients than browsers send neither.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()


def _signature(token: str, expires: int) -> str:
    message = f"ratelimit_mw dashboard session until {expires}".encode()
    return hmac.new(token.strip().encode(), message, hashlib.sha256).hexdigest()


def _set_cookie(response: Response, request: Request, value: str, seconds: int) -> None:
    secure = _is_encrypted(request)
    response.set_cookie(COOKIE, value, seconds, path=None, secure=secure, httponly=True, samesite="strict")


def _is_encrypted(request: Request) -> bool:
    """Whether the browser came by HTTPS, as far as the server, the browser or a proxy says so.

    Anybody is believed: who claims it falsely gets a cookie that its own browser keeps to itself.
    """
    headers = request.headers
    forwarded = headers.get("forwarded", "").partition(",")[0]
    return (
        request.url.scheme == "https"
        or urlsplit(headers.get("origin", "")).scheme == "https"
        or headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower() == "https"
        or _FORWARDED_BY_HTTPS.search(forwarded) is not None
    )
