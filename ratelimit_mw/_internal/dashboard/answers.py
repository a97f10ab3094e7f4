"""The parts of the dashboard's answers: their headers, its files, what it refuses, what it is sent."""

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

MAX_BODY = 65_536
"""Bytes of what is posted to the dashboard."""

_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".txt": "text/plain"}

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src {styles}; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    # Not `no-referrer`: under that, browsers send `Origin: null` with the form of the login page.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Robots-Tag": "noindex",
}


class DashboardError(Exception):
    """Refusal of a request that the dashboard does not serve: a status and a sentence."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class File:
    """A file of the page."""

    body: bytes
    media_type: str
    etag: str


@cache
def page_files() -> Mapping[str, File]:
    """Every file that the page may ask for, by its path below the dashboard."""
    folder = files(__package__).joinpath("static")
    found = {f"static/{each.name}": each for each in folder.iterdir() if each.is_file()}
    found |= {f"static/vendor/{each.name}": each for each in folder.joinpath("vendor").iterdir()}
    return {path: _file(path, each.read_bytes()) for path, each in found.items()}


def file_response(path: str, request: Request) -> Response | None:
    """The answer to a request for a file of the page; None where there is none of this path."""
    file = page_files().get(path)
    if file is None:
        return None
    # Looked after each time, so that a new version of this package is seen at once; then it is sent again.
    headers = {"ETag": file.etag, "Cache-Control": "private, no-cache"}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers=headers, media_type=file.media_type)


def main_page(folder: str) -> Response:
    """The page, which finds everything in a folder that is given relative to its own address.

    So it doesn't matter under which path a proxy shows it, nor whether that ends with a slash.
    """
    text = page_files()["static/index.html"].body.decode()
    return Response(text.replace("{folder}", escape(folder)), media_type="text/html")


def login_page(action: str, message: str, status: int, headers: Mapping[str, str]) -> Response:
    """The form that asks for the token. It needs no other file, since all of those are behind the token."""
    text = page_files()["static/login.html"].body.decode()
    text = text.replace("{action}", escape(action)).replace("{message}", escape(message))
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = _POLICY.format(styles=f"'sha256-{digest}'")
    headers = {**headers, "Content-Security-Policy": policy}
    return Response(text, status, headers, media_type="text/html")


def json_response(values: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON, all ASCII: a name from outside need not be valid Unicode."""
    return Response(json.dumps(values), status, headers, media_type="application/json")


def refusal(error: DashboardError) -> Response:
    """The answer to a request that is refused."""
    return json_response({"error": error.message}, error.status, error.headers)


def protect(response: Response) -> Response:
    """Add what every answer of the dashboard carries, unless it has its own."""
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.setdefault("Content-Security-Policy", _POLICY.format(styles="'self'"))
    return response


async def read_body(request: Request) -> bytes:
    """Return the body that was posted. Raises `DashboardError` for more than `MAX_BODY` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise DashboardError(413, f"More than {MAX_BODY} bytes were sent.")
    return bytes(body)


async def read_json(request: Request) -> dict[str, Any]:
    """The object that was posted as JSON. Raises `DashboardError` for anything else.

    No form of another site can send this content type.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise DashboardError(415, "The body must be JSON, with the content type application/json.")
    try:
        value = json.loads(await read_body(request))
    except (ValueError, RecursionError):
        raise DashboardError(400, "The body is not JSON.") from None
    if not isinstance(value, dict):
        raise DashboardError(400, "The body is not a JSON object.")
    return value


def _file(path: str, body: bytes) -> File:
    media_type = _TYPES["." + path.rpartition(".")[2]]
    return File(body, media_type, f'"{hashlib.sha256(body).hexdigest()[:16]}"')
