"""The pages under docs/: complete, linked, and true where a test can tell."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import Secret

from ratelimit_mw import Settings
from ratelimit_mw._internal.model.limits import Slots
from ratelimit_mw._internal.settings import (
    ApplicationSettings,
    BackendSettings,
    IdentitySettings,
    KeySettings,
    OperationsSettings,
    PlanSettings,
    ResponseSettings,
    RouteSettings,
    SpendingSettings,
)
from ratelimit_mw._internal.settings.limits import SlotsTable
from ratelimit_mw._internal.settings.values import Table
from tests.support.apps import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
TABLES: dict[str, type[Table]] = {
    "[backend]": BackendSettings,
    "[identity]": IdentitySettings,
    "[response]": ResponseSettings,
    "[operations]": OperationsSettings,
    "[application]": ApplicationSettings,
    "[plans.NAME]": PlanSettings,
    "[[keys]]": KeySettings,
    "[[routes]]": RouteSettings,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    """A page that is moved or renamed takes its links along."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_settings_block_loads(page: Path) -> None:
    """What is printed as settings is accepted as settings."""
    for text in re.findall(
        r"^```toml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        Settings(**tomllib.loads(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_compiles(page: Path) -> None:
    """What is printed as Python is Python; it stands inside a coroutine."""
    for text in re.findall(
        r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        compile("async def f():\n" + re.sub(r"^", "    ", text, flags=re.MULTILINE), page.name, "exec")


def test_the_reference_has_every_setting_and_no_other() -> None:
    """Each table of the settings is a section, with a row for each of its names."""
    reference = _reference()
    assert set(reference) == {"Top level", *(f"`{name}`" for name in TABLES)}
    for name, table in TABLES.items():
        expected = set(table.names_in_file())
        if table is PlanSettings:
            expected |= {f"concurrent.{each}" for each in SlotsTable.model_fields}
            expected |= {f"spending.{each}" for each in SpendingSettings.model_fields}
        assert set(reference[f"`{name}`"]) == expected
    assert set(reference["Top level"]) == {"shadow"}


def test_the_reference_has_the_defaults() -> None:
    """A default that is written as a value is the one that holds."""
    reference = _reference()
    checked = 0
    for name, table in TABLES.items():
        for setting, default in reference[f"`{name}`"].items():
            written = re.fullmatch(r"`(.*)`", default)
            if written and setting in table.model_fields:
                value = table.model_fields[setting].get_default(call_default_factory=True)
                value = list(value) if isinstance(value, tuple) else value
                value = value.get_secret_value() if isinstance(value, Secret) else value
                assert value == tomllib.loads(f"x = {written[1]}")["x"], setting
                checked += 1
    assert checked > 20
    assert Slots(1).lease == 30
    assert SpendingSettings.model_fields["timezone"].default == "UTC"


def _reference() -> dict[str, dict[str, str]]:
    """The default of each setting, by section and name."""
    sections: dict[str, dict[str, str]] = {}
    for section in re.split(
        r"^## ", (ROOT / "docs" / "settings.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    ):
        rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| ", section, re.MULTILINE)
        if rows:
            sections[section.partition("\n")[0]] = dict(rows)
    return sections
