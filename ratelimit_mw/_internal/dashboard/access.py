"""Access to the dashboard with its token: as a bearer token, or in exchange for a session cookie.

A session is a time and a signature under the token, so that every worker knows it and none keeps anything.
Another token ends all sessions.
"""

import hashlib
import hmac
import os
import re
import time
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

COOKIE = "ratelimit_dashboard"
SESSION_SECONDS = 12 * 3600
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="dashboard"'}

WRONG_TOKENS = Window(30, 1, "minute")
"""Wrong tokens from one address, in each process, after which none from there is looked at for a while."""
MAX_ADDRESSES = 10_000
"""Addresses whose wrong tokens are remembered; beyond it the one not seen for longest is forgotten."""


_FORWARDED_BY_HTTPS = re.compile(r"(?:^|;)[ \t]*proto=\"?https\"?[ \t]*(?:;|$)", re.IGNORECASE)


class Access:
    """Tells who has the token. What is asked of it costs the callers' limits nothing."""

    def __init__(self) -> None:
        self._wrong = MemoryBackend(max_windows=MAX_ADDRESSES)

    async def is_granted(self, request: Request, token: str, address: str) -> bool:
        """Whether a request carries a session or the token itself.

        Raises `DashboardError` where too many wrong tokens came from its address.
        """
        if is_session(request.cookies.get(COOKIE, ""), token):
            return True
        scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        return await self.is_token(credentials.encode("latin-1"), token, address)

    async def is_token(self, given: bytes, token: str, address: str) -> bool:
        """Whether this is the token. Raises `DashboardError` where too many wrong ones came from there."""
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
        if hmac.compare_digest(given.strip(), token.strip().encode()):
            return True
        await self._wrong.acquire(charge, os.urandom(LEASE_ID_SIZE))
        return False


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
