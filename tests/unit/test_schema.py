"""The JSON schema of the settings file: editors complete and check by it what `check` would accept."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from pydantic import BaseModel, Secret

from ratelimit_mw import Settings
from ratelimit_mw._internal.cli.commands import run
from ratelimit_mw._internal.settings.schema import field_docs, json_schema
from ratelimit_mw._internal.settings.values import Table
from tests.support.apps import ROOT
from tools.settings_reference import PAGE, reference

SCHEMA = json_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = sorted([*(ROOT / "tests" / "settings_good").glob("*.toml"), *(ROOT / "examples").rglob("*.toml")])
BAD = sorted((ROOT / "tests" / "settings_bad").glob("*.toml"))
NEED_THE_WHOLE = {
    "accounts",  # one plan for the keys of an account
    "dashboard_tokens_twice",  # a name and a token for each operator
    "backend_certificate",  # a certificate needs its key
    "backend_key",
    "dashboard_everywhere",
    "dashboard_open",  # the token may come from the environment
    "dashboard_same_path",
    "documentation",  # brackets of an IPv6 address
    "keys_line_break",
    "keys_with_secret",  # the secret may come from the environment
    "tls_without_tls",
    "token_prices",  # no price in whole tokens
}
"""Files of settings_bad whose mistake shows only to those who read more than one value."""


def tables(base: type[BaseModel] = Table) -> Iterator[type[BaseModel]]:
    """Find every model of a table."""
    for table in base.__subclasses__():
        yield table
        yield from tables(table)


def is_good(text: str) -> bool:
    """Whether the schema accepts a settings file with this text."""
    return bool(VALIDATOR.is_valid(tomllib.loads(text)))


def test_it_is_a_schema() -> None:
    """The schema is valid by the rules of its draft."""
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("model", [Settings, *tables()], ids=lambda model: model.__name__)
def test_every_field_is_described(model: type[BaseModel]) -> None:
    """Each name of each table has a sentence below it, which editors show."""
    docs = field_docs(model)
    assert [*docs] == [*model.model_fields]
    assert all(re.fullmatch(r"[A-Z].*\.", text) for text in docs.values())
    part = SCHEMA if model is Settings else SCHEMA["$defs"][model.__name__]
    assert [name for name, field in part["properties"].items() if not field["description"]] == []
    assert set(part["properties"]) - {"key"} == set(model.model_fields)


@pytest.mark.parametrize("model", [Settings, *tables()], ids=lambda model: model.__name__)
def test_a_described_default_is_the_one_that_holds(model: type[BaseModel]) -> None:
    """A sentence that names a value as the default names the field's own default."""
    for name, text in field_docs(model).items():
        default = model.model_fields[name].get_default(call_default_factory=True)
        value = default.get_secret_value() if isinstance(default, Secret) else default
        values = value if isinstance(value, tuple) else (value,)
        if values and all(isinstance(each, str | float) and each != "" for each in values):
            written = " and ".join(map(json.dumps, values))
            assert text.endswith(f" Default: {written}."), (model.__name__, name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_good_files_are_good(file: Path) -> None:
    """Every example, and every file that loads, passes."""
    assert is_good(file.read_text("utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_printed_settings_are_good(page: Path) -> None:
    """Each block of settings on a page passes."""
    for text in re.findall(r"^```toml\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        assert is_good(text), text


@pytest.mark.parametrize("file", BAD, ids=lambda file: file.stem)
def test_bad_files_are_bad(file: Path) -> None:
    """A file that doesn't load is refused, but for mistakes that no single value shows."""
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return
    assert VALIDATOR.is_valid(values) == (file.stem in NEED_THE_WHOLE)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('shadow = "yes"', "shadow"),
        ("[backend]\ntimeout = 0", "backend.timeout"),
        ("[backend]\ntimeout = true", "backend.timeout"),
        ('[backend]\nurl = "http://127.0.0.1"', "backend.url"),
        ('[backend]\nurls = "memory://"', "backend"),
        ('[plans.pro]\nrequests = ["60/minit"]', "plans.pro.requests.0"),
        ('[plans.pro]\nrequests = ["0/minute"]', "plans.pro.requests.0"),
        ('[plans.pro]\nrequests = ["60/minute; 5/hour"]', "plans.pro.requests.0"),
        ('[plans.pro]\nunits = { Tokens = ["1/minute"] }', "plans.pro.units"),
        ('[plans.pro]\nunits = { tokens = ["1/minit"] }', "plans.pro.units.tokens.0"),
        ("[plans.pro]\nconcurrent = 0", "plans.pro.concurrent"),
        ("[plans.pro]\nspending = { daily = 25.0 }", "plans.pro.spending.daily"),
        ('[plans.pro]\nspending = { daily = "-1" }', "plans.pro.spending.daily"),
        ('[plans.pro]\nspending = { currency = "EUR" }', "plans.pro.spending"),
        ('[[keys]]\nplan = "pro"', "keys.0"),
        ('[[keys]]\nplan = "pro"\nhash = "abc"', "keys.0.hash"),
        ('[[routes]]\npath = "v1"', "routes.0.path"),
        ('[[routes]]\npath = "/v1"\nmethods = []', "routes.0.methods"),
        ('[[routes]]\npath = "/v1"\nprice = "2 EUR"', "routes.0.price"),
        ('[identity]\ntrusted_proxies = ["localhost"]', "identity.trusted_proxies.0"),
        ('[operations]\nlogs_url = "https://logs.example.com/"', "operations.logs_url"),
    ],
)
def test_a_mistake_is_marked_where_it_is(text: str, place: str) -> None:
    """An editor marks the very value that is wrong."""
    error = best_match(VALIDATOR.iter_errors(tomllib.loads(text)))
    assert error is not None
    while error.context and not error.absolute_path:
        error = error.context[0]
    assert ".".join(map(str, error.absolute_path)) == place


@pytest.mark.parametrize(
    "text",
    [
        '[plans.x]\nrequests = ["60/MINUTE", "1000 per hour", " 5 / 2 Seconds ", "007 PER 01 day"]',
        '[plans.x]\nspending = { daily = "2.5E1", monthly = " +1_000.50 " }',
        '[plans.x]\nspending = { daily = ".5" }',
        '[identity]\ntrusted_proxies = ["10.0.0.0/255.0.0.0", "::/0", "fe80::1", "::ffff:10.0.0.1"]',
        '[response]\ndocumentation_url = "HTTPS://example.com/limits"',
        '[response]\ndocumentation_url = ""',
        '[operations]\nlogs_url = "https://logs.example.com/?q={caller}"\nusage_path = "/me/"',
        '[[keys]]\nkey = "anything, with blanks"\nplan = "default"',
        '[[routes]]\npath = "/a"\nmethods = ["get", "M-SEARCH"]\nprice = "0"\nunits = { tokens = 0 }',
        '[backend]\nurl = "redis+cluster://a:1,b:2"\ntimeout = 1',
        '[backend]\nurl = "valkeys://[::1]:6379/0?ssl_check_hostname=false"',
        "[plans.x]\nconcurrent = { limit = 5, lease = 1, max_hold = 3.5 }",
    ],
)
def test_all_that_loads_passes(text: str) -> None:
    """A form that the file may have is never marked as a mistake, however odd it is."""
    Settings(**tomllib.loads(text))
    assert is_good(text)


def test_its_defaults_are_those_of_the_settings() -> None:
    """A file that writes every default of the schema means the same as an empty one."""
    names = ("backend", "identity", "response", "operations")
    values: dict[str, Any] = {name: {} for name in names}
    for name in names:
        part = SCHEMA["$defs"][SCHEMA["properties"][name]["$ref"].rpartition("/")[2]]
        values[name] = {key: each["default"] for key, each in part["properties"].items() if "default" in each}
    assert sum(map(len, values.values())) > 12
    assert Settings(**values) == Settings()


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    """`ratelimit-mw schema` prints the schema, for a file beside the settings."""
    assert run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA


def test_every_example_names_the_schema() -> None:
    """An editor that opens an example finds the schema by its first line."""
    files = sorted((ROOT / "examples").rglob("*.toml"))
    assert files
    for file in files:
        assert file.read_text("utf-8").startswith(f"#:schema {SCHEMA['$id']}\n"), file.name


def test_the_reference_is_fresh() -> None:
    """docs/settings-reference.md is what the code makes today: else run `make docs`."""
    assert PAGE.read_text("utf-8") == reference()
