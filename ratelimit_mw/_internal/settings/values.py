"""Types of single values in the settings: each takes what the file says, or says what is wrong with it."""

import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    Strict,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import core_schema
from starlette.convertors import CONVERTOR_TYPES
from starlette.routing import PARAM_REGEX, compile_path

from ratelimit_mw._internal.model.money import TOKEN
from ratelimit_mw._internal.settings.errors import (
    fault,
    faults,
    in_our_words,
    nearest_name,
    one_of,
    shown,
    type_name,
)

MAX_NAME = 64
"""The longest name of a plan, a unit, a namespace or a time zone."""

MAX_PATH = 2_000
"""Characters of the longest path of a route."""

IPNetwork = IPv4Network | IPv6Network
_T = TypeVar("_T")
_S = TypeVar("_S", bound=str)
_HEADER_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_HASH = re.compile(r"(hmac-)?sha256:[0-9a-f]{64}")
_NO_ZONE = re.compile(r"localtime$|posixrules$|posix/|right/")
"""Files beside the zones: the machine's own zone, and copies that count leap seconds otherwise."""
_CURRENCY = re.compile(r"[A-Z]{3,12}")


class Table(BaseModel):
    """A table of the settings file: immutable, no names but its own, no conversion between types."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        strict=True, extra="forbid", frozen=True, hide_input_in_errors=True, defer_build=True
    )

    @classmethod
    def names_in_file(cls) -> tuple[str, ...]:
        """Return every name that the table may have."""
        return tuple(cls.model_fields)

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise in_our_words(error, cls.names_in_file()) from None


def _label(text: str) -> str:
    if not text.strip() or len(text) > MAX_NAME or not (text.isascii() and text.isprintable()):
        raise fault(f"{shown(text)} is not a label", f"1 to {MAX_NAME} printable ASCII characters")
    return text


def _plan_name(name: str) -> str:
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise fault("is not a plan name", f"1 to {MAX_NAME} printable characters")
    return name


def _account(account: str) -> str:
    if not account.strip() or len(account) > 4 * MAX_NAME or not account.isprintable():
        raise fault(f"{shown(account)} is not an account name", f"1 to {4 * MAX_NAME} printable characters")
    return account


def _key_label(label: str) -> str:
    if not label.strip() or len(label) > 4 * MAX_NAME or not label.isprintable():
        raise fault(f"{shown(label)} is not a label", f"1 to {4 * MAX_NAME} printable characters")
    return label


def _namespace(namespace: str) -> str:
    wrong = re.search(r"[^!-~]|[{}]", namespace)
    if not namespace or wrong or len(namespace) > MAX_NAME:
        raise fault(
            f"{shown(namespace)} is not a namespace",
            f"1 to {MAX_NAME} printable ASCII characters without spaces and braces",
        )
    return namespace


def _header_token(name: str) -> str:
    if not _HEADER_TOKEN.fullmatch(name) or len(name) > 4 * MAX_NAME:
        raise fault(
            f"{shown(name)} is not a name in HTTP", 'letters, digits and "-", as in "X-API-Key" or "GET"'
        )
    return name


def _hash(text: str) -> str:
    if not _HASH.fullmatch(text.lower()):  # not shown: it may be a key in the clear
        raise fault(
            "is not a hash",
            "what `ratelimit-mw keys hash` prints: 'sha256:' or 'hmac-sha256:' and 64 hex digits",
        )
    return text.lower()


def _currency(code: str) -> str:
    if code == TOKEN or _CURRENCY.fullmatch(code):
        return code
    nearest = nearest_name(code, [TOKEN]) or (code.upper() if _CURRENCY.fullmatch(code.upper()) else "")
    raise fault(f"{shown(code)} is not a currency", 'a code in capitals, such as "USD", or "token"', nearest)


def _timezone(name: str) -> str:
    try:
        if len(name) <= MAX_NAME and not _NO_ZONE.match(name):
            return ZoneInfo(name).key
    except (KeyError, ValueError, OSError):
        pass  # said below, as of the others
    nearest = _nearest_zone(name[:MAX_NAME])
    raise fault(f"{shown(name)} is not a time zone", 'an IANA name, such as "Europe/Berlin"', nearest)


@lru_cache
def _nearest_zone(name: str) -> str:
    """Find the zone that a name most likely stands for: a look at all files of the system's zones."""
    zones = [zone for zone in _zones() if not _NO_ZONE.match(zone)]
    area = any(zone.startswith(f"{name}/") for zone in zones)
    return "" if area else nearest_name(name, zones)


@cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones())


def _proxy(text: object) -> IPNetwork | Literal["unix"]:
    if text == "unix":
        return "unix"
    return _network(text, f'{_NETWORK}, or "unix"', ["unix"])


def parse_network(text: object) -> IPNetwork:
    """Return the network that a text stands for; one of IPv4-mapped addresses is the IPv4 network it is."""
    network = _network(text, _NETWORK)
    mapped = network.network_address
    if isinstance(mapped, IPv6Address) and mapped.ipv4_mapped is not None and network.prefixlen >= _MAPPED:
        return IPv4Network((mapped.ipv4_mapped, network.prefixlen - _MAPPED))
    return network


def _network(text: object, expected: str, others: Sequence[str] = ()) -> IPNetwork:
    if isinstance(text, IPv4Network | IPv6Network):
        return text
    if not isinstance(text, str):
        raise fault(f"is {type_name(text)}", expected)
    if "%" in text:
        raise fault(f"{shown(text)} has a zone", expected, re.sub("%[^/]*", "", text))
    try:
        return ip_network(text)
    except ValueError:
        nearest = _network_around(text, others)
    what = "has bits set beyond its prefix" if "/" in nearest else "is not a network"
    raise fault(f"{shown(text)} {what}", expected, nearest)


def _network_around(text: str, others: Sequence[str]) -> str:
    try:
        return str(ip_network(text, strict=False))
    except ValueError:
        return nearest_name(text, others)


_NETWORK = 'a network or address, such as "10.0.0.0/8"'
_MAPPED = 96
"""Bits before the IPv4 address in an IPv4-mapped one (RFC 4291, section 2.5.5.2)."""


def _off_if_empty(value: object) -> object:
    return None if value == "" else value


def _file(path: str) -> str:
    if "\0" in path or not Path(path).is_file():
        raise fault(f"there is no file {shown(path)}")
    return path


def _some_header(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise fault("is empty", "at least one header name")
    return no_repeats(names)


def _some_method(names: frozenset[str]) -> frozenset[str]:
    if not names:
        raise fault("is empty", "at least one method, or no `methods` at all for every method")
    return names


def _path(path: str) -> str:
    if not path.startswith("/") or not path.isprintable() or re.search(r"[?#{} ]", path):
        raise fault(
            f"{shown(path)} is not a path", 'a path such as "/rate-limit", without query and parameters'
        )
    return path.rstrip("/") or "/"


def _route_path(path: str) -> str:
    if not path.startswith("/"):
        raise fault(f"{shown(path)} is not a path", 'a path that begins with "/"')
    if len(path) > MAX_PATH:
        raise fault(f"{shown(path)} is too long", f"a path of at most {MAX_PATH} characters")
    for name, convertor in PARAM_REGEX.findall(path):
        if convertor and convertor[1:] not in CONVERTOR_TYPES:
            nearest = nearest_name(convertor[1:], CONVERTOR_TYPES)
            raise fault(f"unknown convertor in '{{{name}{convertor}}}'", one_of(CONVERTOR_TYPES), nearest)
    try:
        compile_path(path)
    except ValueError:
        raise fault(
            f"{shown(path)} has two parameters of one name", "a different name for each parameter"
        ) from None
    return path


def _in_capitals(method: str) -> str:
    # Not `str.upper` itself: pydantic looks at the signature of a validator, which for a function written in
    # C is read out of its docstring with a tokenizer, and takes as long as a third of all other tables.
    return method.upper()


def _web_url(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[^!-~]", url):
        raise fault("is not a web address", 'a URL such as "https://example.com/docs/rate-limits"')
    return url


def _caller_url(url: str) -> str:
    _web_url(url)
    if "{caller}" not in url:
        raise fault("does not contain {caller}", 'a URL such as "https://logs.example.com/?q={caller}"')
    return url


def text(title: str, pattern: str = "", **more: object) -> WithJsonSchema:
    """Return the JSON schema of a text: what editors call it, and a pattern that no good text fails."""
    return WithJsonSchema(
        {"title": title, "type": "string"} | ({"pattern": pattern} if pattern else {}) | more
    )


def read_by(
    parse: Callable[[object], object], write: Callable[[Any], object] | None = None
) -> GetPydanticSchema:
    """Return the schema of a value that one function makes of what the file says, and another writes.

    `PlainValidator` and `PlainSerializer` say the same. But the first compiles the schema of the value's type
    beside it, for nothing, and the second is in a module that takes a millisecond to import.
    """
    written = None if write is None else core_schema.plain_serializer_function_ser_schema(write)
    # One for each place of use: pydantic writes into it.
    return GetPydanticSchema(
        lambda _type, _handler: core_schema.no_info_plain_validator_function(parse, serialization=written)
    )


def any_case(word: str) -> str:
    """Return the pattern of a word in small or capital letters, which JSON schema has no flag for."""
    return "".join([f"[{letter.upper()}{letter}]" for letter in word])


def no_repeats(names: tuple[_S, ...]) -> tuple[_S, ...]:
    """Return `names`, if no two are the same but for case."""
    folded = [name.casefold() for name in names]
    first = {name: index for index, name in reversed([*enumerate(folded)])}
    repeated = [index for index, name in enumerate(folded) if first[name] != index]
    if repeated:
        raise faults(
            ((index,), fault(f"{shown(names[index])} is listed twice", "each name once"))
            for index in repeated
        )
    return names


_PRINTABLE = f"^[ -~]{{1,{MAX_NAME}}}$"
_TOKEN = f"^{_HEADER_TOKEN.pattern}$"
_ANY_HASH = f"^({any_case('hmac')}-)?{any_case('sha')}256:[0-9a-fA-F]{{64}}$"
_IP_NETWORK = "[0-9]{1,3}([.][0-9]{1,3}){3}(/[0-9.]+)?|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*(%[^/]+)?(/[0-9]{1,3})?"
_WEB = f"{any_case('http')}[Ss]?://[!-~]"

Items = Annotated[tuple[_T, ...], Strict(False)]
"""A list in the file, a tuple here."""
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Label = Annotated[str, AfterValidator(_label), text("name", _PRINTABLE)]
PlanName = Annotated[str, AfterValidator(_plan_name), text("plan name", minLength=1, maxLength=MAX_NAME)]
Account = Annotated[str, AfterValidator(_account), text("text", minLength=1, maxLength=4 * MAX_NAME)]
KeyLabel = Annotated[str, AfterValidator(_key_label), text("text", minLength=1, maxLength=4 * MAX_NAME)]
Namespace = Annotated[str, AfterValidator(_namespace), text("name", f"^[!-z|~]{{1,{MAX_NAME}}}$")]
HeaderToken = Annotated[str, AfterValidator(_header_token), text("header name", _TOKEN)]
KeyHash = Annotated[str, AfterValidator(_hash), text("hash", _ANY_HASH)]
Currency = Annotated[str, AfterValidator(_currency), text("currency", f"^({_CURRENCY.pattern}|{TOKEN})$")]
TimeZone = Annotated[str, AfterValidator(_timezone), text("time zone")]
Proxy = Annotated[IPNetwork | Literal["unix"], read_by(_proxy), text("network", f"^(unix|{_IP_NETWORK})$")]
Network = Annotated[IPNetwork, read_by(parse_network), text("network", f"^({_IP_NETWORK})$")]
RoutePath = Annotated[str, AfterValidator(_route_path), text("path", "^/", maxLength=MAX_PATH)]
HeaderNames = Annotated[
    Items[HeaderToken], AfterValidator(_some_header), Field(json_schema_extra={"minItems": 1})
]
Method = Annotated[HeaderToken, AfterValidator(_in_capitals)]
# `Strict(False)`, which pydantic takes on a set from 2.9 on only.
_AnyCollection = GetPydanticSchema(lambda source, handler: {**handler(source), "strict": False})
_METHODS = {"type": "array", "minItems": 1, "items": {"title": "method", "type": "string", "pattern": _TOKEN}}
Methods = Annotated[frozenset[Method], _AnyCollection, AfterValidator(_some_method), WithJsonSchema(_METHODS)]
_Off = BeforeValidator(_off_if_empty)
OptionalFile = Annotated[Annotated[str, AfterValidator(_file), text("file")] | None, _Off]
OptionalPath = Annotated[Annotated[str, AfterValidator(_path), text("path", r"^(/[^?#{} ]*)?$")] | None, _Off]
OptionalURL = Annotated[Annotated[str, AfterValidator(_web_url), text("URL", f"^({_WEB}.*)?$")] | None, _Off]
CallerURL = Annotated[
    Annotated[str, AfterValidator(_caller_url), text("URL", f"^({_WEB}.*\\{{caller\\}}.*)?$")] | None, _Off
]
