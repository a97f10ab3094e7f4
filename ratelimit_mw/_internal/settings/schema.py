"""The JSON schema of the settings file, by which editors complete and check it while it is written.

It tells every name, type and range, and what each means. It accepts whatever the file may have; some mistakes
it can't see, such as a plan that doesn't exist: those are for `ratelimit-mw check`.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from ratelimit_mw._internal.settings.findings import DOCS
from ratelimit_mw._internal.settings.limits import RATE
from ratelimit_mw._internal.settings.loader import Settings
from ratelimit_mw._internal.settings.values import Table

SCHEMA_URL = f"{DOCS}/ratelimit.schema.json"
"""Address at which the documentation has the schema of the latest release."""


class _Generator(GenerateJsonSchema):
    """The generator of pydantic, without the titles that it makes of names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the settings file."""
    schema = Settings.model_json_schema(schema_generator=_Generator)
    parts = {"Settings": schema, **schema.pop("$defs")}
    models: dict[str, type[BaseModel]] = {"Settings": Settings}
    models |= {table.__name__: table for table in _tables(Table)}
    shared: dict[str, Any] = {}
    tables = {name: _tidy(part, shared) for name, part in parts.items()}
    tables |= {title: part for title, part in shared.items() if title in models}
    for name, table in tables.items():
        del table["title"]
        _describe(table["properties"], field_docs(models[name]))
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_URL,
        "title": "Settings of ratelimit_mw",
        "description": "Rate limits of an ASGI app: what is limited, who is calling, where counts are kept.",
    }
    settings = tables.pop("Settings")
    return {**head, **settings, **head, "$defs": dict(sorted({**shared, **tables}.items()))}


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """Return what is written below each field of a model. Needs the source, which every wheel has."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    docs = {}
    for field, text in pairwise(definition.body if isinstance(definition, ast.ClassDef) else ()):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = " ".join(doc.split())
    return docs


def _tables(base: type[Table]) -> Iterator[type[Table]]:
    for table in base.__subclasses__():
        yield table
        yield from _tables(table)


def _describe(properties: dict[str, Any], docs: dict[str, str]) -> None:
    """Write what each name means beside its type."""
    for name, text in docs.items():
        if name in properties:
            properties[name]["description"] = text


def _tidy(schema: dict[str, Any], shared: dict[str, Any], *, inner: bool = False) -> dict[str, Any]:
    """Return a schema for TOML: without null, and without defaults that are not a value of a file.

    Rates, and tables inside of tables, are moved to `shared` by their titles, and referred to.
    """
    tidy = dict(schema)
    for name in ("properties", "patternProperties"):
        if name in schema:
            tidy[name] = {key: _tidy(value, shared, inner=True) for key, value in schema[name].items()}
    if "patternProperties" in schema:
        tidy["additionalProperties"] = False
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            tidy[name] = _tidy(schema[name], shared, inner=True)
    if tidy.get("default", 0) in (None, "", []) or isinstance(tidy.get("default"), dict):
        del tidy["default"]
    choices = [_tidy(each, shared, inner=True) for each in tidy.pop("anyOf", ()) if each != {"type": "null"}]
    if len(choices) == 1:
        tidy = {**choices[0], **tidy}
    elif choices:
        tidy["anyOf"] = choices
    title = tidy.get("title", "")
    if inner and (title == RATE or "properties" in tidy):
        kept = {name: tidy.pop(name) for name in ("default",) if name in tidy}
        shared[title] = tidy
        return {"$ref": f"#/$defs/{title}", **kept}
    return tidy
