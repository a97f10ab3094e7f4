"""Makes docs/settings-reference.md of the settings' models: `python -m tools.settings_reference`.

A setting has its name, type, default and meaning from `ratelimit_mw._internal.settings.schema`.
"""

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ratelimit_mw._internal.settings.schema import json_schema

PAGE = Path(__file__).parents[1] / "docs" / "settings-reference.md"

_HEAD = """# Settings reference

<!-- Made by `make docs` from ratelimit_mw/_internal/settings: change it there. -->

Every name that the settings file may have, generated from the code that reads the file.
[settings.md](settings.md) is the guide: where settings come from, how rates, durations and money
are written, and what applies while the app runs. `ratelimit-mw schema` prints the same as a JSON
schema for [editors](settings.md#in-an-editor).
"""
_ORDER = (
    "Backend",
    "Identity",
    "Response",
    "Operations",
    "Operator",
    "Application",
    "Plan",
    "Slots",
    "Spending",
    "Key",
    "Address",
    "Route",
    "Limit",
)
_TYPES = {
    "string": "text",
    "number": "number",
    "integer": "whole number",
    "boolean": "`true` or `false`",
    "object": "table",
}


def reference() -> str:
    """Return the page."""
    schema = json_schema()
    tables = {name: part for name, part in schema["$defs"].items() if "properties" in part}
    single = {name: each for name, each in schema["properties"].items() if not _is_table(each)}
    top = {"description": "`Top level`: names outside of all tables.", "properties": single}
    parts = [top, *(tables[name] for name in sorted(tables, key=_place))]
    return "\n".join([_HEAD, *(line for part in parts for line in _section(part, schema["$defs"]))])


def _place(name: str) -> int:
    """Return where a table stands on the page; one that is new comes last."""
    return next((place for place, start in enumerate(_ORDER) if name.startswith(start)), len(_ORDER))


def _is_table(field: dict[str, Any]) -> bool:
    return "$ref" in field or field.get("type") in ("object", "array")


def _section(table: dict[str, Any], shared: dict[str, Any]) -> Iterator[str]:
    name, _, text = table["description"].partition(": ")
    name = name.strip("`") if name == "`Top level`" else name
    yield f"## {name}"
    yield ""
    text = " ".join(text.split())
    yield textwrap.fill(text[0].upper() + text[1:], 100, break_on_hyphens=False)
    yield ""
    yield "| name | type | default | meaning |"
    yield "|---|---|---|---|"
    needed = table.get("required", ())
    for field, says in table["properties"].items():
        meaning, _, default = says["description"].partition(" Default: ")
        default = "required" if field in needed else _default(says, default.removesuffix("."))
        row = (f"`{field}`", _type(says, shared), default, meaning.removesuffix("."))
        yield f"| {' | '.join([cell.replace('|', chr(92) + '|') for cell in row])} |"
    yield ""


def _default(field: dict[str, Any], text: str) -> str:
    """Return what holds without a line: the value if it is one, else what is written about it."""
    return f"`{json.dumps(field['default'])}`" if "default" in field else text


def _type(field: dict[str, Any], shared: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join([_type(each, shared) for each in field["anyOf"]])
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        part = shared[name]
        if "properties" not in part:
            return _type(part, shared)
        heading = part["description"].partition(": ")[0]
        return f"table [{heading}](#{re.sub(r'[^0-9a-z_ -]', '', heading)})"
    if "enum" in field:
        return ", ".join([f"`{json.dumps(value)}`" for value in field["enum"]])
    if field["type"] == "array":
        inner = _type(field["items"], shared)
        if inner.startswith("table "):
            return f"list of {inner.replace('table', 'tables', 1)}"
        return f"list of {inner}" + ("" if inner.startswith("`") else "s")
    if field["type"] == "object":
        (inner,) = field.get("patternProperties", {"": field.get("additionalProperties")}).values()
        return f"table: {_type(inner, shared)} by name"
    return f"{field.get('title') or _TYPES[field['type']]}{_range(field)}"


def _range(field: dict[str, Any]) -> str:
    said = [
        f"{text} {field[name]:g}" if isinstance(field[name], float) else f"{text} {field[name]:,}"
        for name, text in (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"))
        if name in field
    ]
    return f" {' '.join(said)}" if said else ""


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
