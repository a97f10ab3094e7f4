"""Paths that stand for a route pattern, to ask which rule they fall under.

Two patterns are compared by what they match, not by how they are spelled: `/v1/{a}` holds all that
`/v1/{b:int}` does. The samples of a pattern are odd enough that another pattern matches them only where
it was meant for any such path.
"""

from itertools import islice, product

from starlette.convertors import CONVERTOR_TYPES
from starlette.routing import PARAM_REGEX

MAX_SAMPLES = 64

_TEXT = "~q7.Z~"
_OF_CONVERTOR = {
    "str": (_TEXT,),
    "int": ("0", "90817263544536271809"),
    "float": ("7", "0.5"),
    "uuid": ("deadbeef-0000-4000-8000-00000badf00d",),
    "path": ("", _TEXT, f"{_TEXT}/", "/".join(f"~{n}~" for n in range(9))),
}
_STARLETTES_OWN = {name: CONVERTOR_TYPES[name] for name in _OF_CONVERTOR}


def samples(pattern: str) -> tuple[str, ...]:
    """Paths that a pattern of Starlette's matches; none where a convertor is the app's own."""
    parts = PARAM_REGEX.split(pattern)
    texts, kinds = parts[0::3], [(kind or ":str")[1:] for kind in parts[2::3]]
    if any(CONVERTOR_TYPES.get(kind) is not _STARLETTES_OWN.get(kind, object()) for kind in kinds):
        return ()
    choices = product(*[_OF_CONVERTOR[kind] for kind in kinds])
    return tuple(_filled(texts, values) for values in islice(choices, MAX_SAMPLES))


def _filled(texts: list[str], values: tuple[str, ...]) -> str:
    return texts[0] + "".join(value + text for value, text in zip(values, texts[1:], strict=True))
