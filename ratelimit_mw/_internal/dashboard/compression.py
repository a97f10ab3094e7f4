"""Answers of the dashboard, compressed for whoever takes gzip.

Figures hardly change from one second to the next: with one window over the whole stream, an event takes a
twentieth. Nothing secret is in an answer beside what others have chosen, which its length could give away.
"""

import gzip
import re
import zlib
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

SMALLEST = 1_000
"""Bytes of a body below which compressing it gains nothing."""
_LEVEL = 6
_GZIP = 16 + zlib.MAX_WBITS
_TAKES = re.compile(r"(?:^|,)\s*(?:gzip|\*)\s*(?:;\s*q\s*=\s*(?P<q>[0-9.]+)\s*)?(?=,|$)", re.IGNORECASE)
_TEXTS = ("text/", "application/json")


def takes_gzip(request: Request) -> bool:
    """Whether a client says that it reads gzip."""
    found = _TAKES.search(request.headers.get("accept-encoding", ""))
    return found is not None and found["q"] not in ("0", "0.0", "0.00", "0.000")


async def compressed_stream(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the events in gzip, each of them readable as soon as it is sent."""
    compressor = zlib.compressobj(_LEVEL, wbits=_GZIP)
    async for event in events:
        yield compressor.compress(event) + compressor.flush(zlib.Z_SYNC_FLUSH)
    yield compressor.flush()


def compress(response: Response, request: Request) -> None:
    """Compress a whole answer in place, if it is a text that is worth it and the client reads it."""
    body = getattr(response, "body", b"")
    media_type = response.headers.get("content-type", "")
    if not isinstance(body, bytes) or len(body) < SMALLEST or not media_type.startswith(_TEXTS):
        return
    response.headers["Vary"] = "Accept-Encoding"
    if takes_gzip(request):
        response.body = gzip.compress(body, _LEVEL, mtime=0)
        response.headers["Content-Encoding"] = "gzip"
        response.headers["Content-Length"] = str(len(response.body))
