"""Reads the API key of a request from the headers that the settings name."""

import base64
import binascii
from collections.abc import Iterable, Sequence

from ratelimit_mw._internal.settings.keys import MAX_KEY

_BLANKS = b" \t"


class IdentityError(Exception):
    """A request that doesn't say clearly who is calling."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class ApiKeyReader:
    """Reads API keys from some headers. Keys are bytes, as they were sent, without the blanks around them."""

    __slots__ = ("_authorization", "_longest", "_names", "_shown", "_sizes")

    def __init__(self, headers: Sequence[str]) -> None:
        """`headers` are their names, as `identity.api_key_headers` lists them."""
        self._names = {header.lower().encode("latin-1"): at for at, header in enumerate(headers)}
        self._authorization = self._names.get(b"authorization", -1)
        sizes = {len(name) for name in self._names}
        self._longest = max(sizes)
        self._sizes = bytes([size in sizes for size in range(self._longest + 1)])
        """Whether any of the names has so many letters, by their number."""
        self._shown = ", ".join(headers)

    def read(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Read the key from the headers of a scope; empty where there is none.

        Of a header that comes more than once, the first counts, as Starlette reads it. Raises IdentityError
        for a key that is too long, and for two headers with different keys.
        """
        api_key = b""
        found_in: list[int] = []
        for name, value in headers:
            size = len(name)
            if size > self._longest or not self._sizes[size]:  # most headers are passed over by this
                continue
            at = self._names.get(name)
            if at is None:
                at = self._names.get(name.lower())
            if at is None or at in found_in:
                continue
            found_in.append(at)
            found = _from_authorization(value) if at == self._authorization else value.strip(_BLANKS)
            if len(found) > MAX_KEY:
                message = f"API key too long. At most {MAX_KEY} bytes are allowed."
                raise IdentityError(431, "API_KEY_TOO_LONG", message)
            if found and api_key and found != api_key:
                message = f"Ambiguous API key. Send the same one, or only one, in {self._shown}."
                raise IdentityError(400, "AMBIGUOUS_API_KEY", message)
            api_key = api_key or found
        return api_key


def _from_authorization(value: bytes) -> bytes:
    """The key in an `Authorization` header, empty where there is none."""
    if value[:7] == b"Bearer ":  # as nearly all write it, and what follows says the same
        return value[7:].strip(_BLANKS)
    value = value.strip(_BLANKS)
    scheme, _, rest = value.partition(b" ")
    if b"\t" in scheme:
        scheme, _, rest = value.partition(b"\t")
    name = scheme.lower()
    if name == b"bearer":
        return rest.lstrip(_BLANKS)
    if name == b"basic":
        return _user_name(rest.lstrip(_BLANKS))
    return b"" if rest else scheme


def _user_name(credentials: bytes) -> bytes:
    """The user name in `Basic` credentials (RFC 7617), empty where they are malformed."""
    try:
        decoded = base64.b64decode(credentials, validate=True)
    except binascii.Error:
        return b""
    return decoded.partition(b":")[0].strip(_BLANKS)
