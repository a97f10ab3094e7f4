"""Errors about settings that are wrong."""

import os
import socket
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratelimit_mw._internal.settings import (
    BackendSettings,
    RouteSettings,
    Settings,
    SettingsError,
    SettingsProblem,
    sources,
)
from tests.support.settings_files import load, problems, written

pytestmark = pytest.mark.usefixtures("no_environment")

HERE = Path(__file__).parents[1]
BAD = sorted((HERE / "settings_bad").glob("*.toml"))


@pytest.mark.parametrize("file", BAD, ids=lambda file: file.stem)
def test_a_bad_file_is_explained(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything wrong in a file is said at once: where, what, what was expected, and what is near."""
    monkeypatch.chdir(file.parent)
    with pytest.raises(SettingsError) as caught:
        Settings.load(file.name)
    assert str(caught.value) == file.with_suffix(".txt").read_text(encoding="utf-8").rstrip("\n")


@pytest.mark.parametrize("file", BAD, ids=lambda file: file.stem)
def test_no_error_repeats_a_secret(file: Path) -> None:
    """A clear key, a secret, a token or a password is in no error and in no traceback of one."""
    with pytest.raises(SettingsError) as caught:
        Settings.load(file)
    assert "hunter" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


def test_a_problem_has_parts() -> None:
    """A problem can be taken apart by a program."""
    with pytest.raises(SettingsError) as caught:
        Settings.load(HERE / "settings_bad" / "no_headers.toml")
    file = str(HERE / "settings_bad" / "no_headers.toml")
    path = "identity.api_key_headers"
    expected = SettingsProblem(file, path, "is empty", "at least one header name", "")
    assert caught.value.problems == (expected,)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """A path that does not exist is never a silent default."""
    with pytest.raises(SettingsError, match=r"gone\.toml: there is no such file"):
        Settings.load(tmp_path / "gone.toml")


def test_a_directory_is_an_error(tmp_path: Path) -> None:
    """A directory is not a settings file."""
    with pytest.raises(SettingsError, match="is a directory"):
        Settings.load(tmp_path)


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    """A FIFO, a device and a socket are errors, none of which is waited for."""
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path, what in (("fifo", "a FIFO"), ("socket", "a socket"), ("/dev/zero", "a device")):
            with pytest.raises(SettingsError, match=f"is {what}, not a file"):
                Settings.load(tmp_path / path)


def test_a_file_without_an_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is read than a settings file may have."""
    monkeypatch.setattr(sources, "MAX_BYTES", 100)
    with pytest.raises(SettingsError, match="is larger than 100 bytes"):
        load(tmp_path, "#" * 101)


def test_a_disk_that_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start waits for the settings file for a bounded time."""
    mended = threading.Event()
    monkeypatch.setattr(sources, "READ_SECONDS", 0.05)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: mended.wait(60))
    with pytest.raises(SettingsError, match="can't be read within"):
        Settings.load(tmp_path / "s.toml")
    mended.set()


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """A file that the system refuses to read is an error that says why."""
    with pytest.raises(SettingsError, match="can't be read: Not a directory"):
        Settings.load(written(tmp_path / "file", "") / "settings.toml")


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_an_impossible_path_is_an_error(path: str) -> None:
    """A path that no file can have is an error like any other."""
    with pytest.raises(SettingsError):
        Settings.load(path)


@pytest.mark.parametrize("text", ["cost = " + "9" * 5000, "a = " + "[" * 5000])
def test_hostile_toml_is_an_error(tmp_path: Path, text: str) -> None:
    """Endless numbers and endless nesting are errors of the file, not of the program."""
    assert "is not valid TOML" in problems(tmp_path, text)[0]


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=9)
    | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
_names = {
    ("backend", "identity", "response", "operations"): (*BackendSettings.model_fields, "trusted_proxies"),
    ("plans", "application"): ("requests", "concurrent", "spending", "share"),
    ("keys", "routes"): (*RouteSettings.model_fields, "key", "hash", "plan"),
}
_entries = {
    table: st.dictionaries(st.sampled_from(names), _values, max_size=3)
    for tables, names in _names.items()
    for table in tables
}


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries({}, optional={"shadow": _values, **{k: v | _values for k, v in _entries.items()}})
)
def test_whatever_a_file_holds_is_settings_or_a_settings_error(data: dict[str, Any]) -> None:
    """Any values at any names either load or are explained; no other exception comes out."""
    entries = {table: [data[table]] for table in ("keys", "routes") if table in data}
    plans = {"plans": {"pro": data["plans"]}} if "plans" in data else {}
    for variant in (data, data | entries | plans):
        with suppress(SettingsError):
            Settings(**variant)


LONG = [" " * 16_000, "5 " + " " * 16_000, "5/" + "9" * 16_000, "5/minute" * 2_000, "5/" + " minute" * 2_000]


@pytest.mark.parametrize("text", [*LONG, "{a" * 8_000, "/{" * 8_000, "/{a:path}" * 2_000, ";" * 16_000])
def test_a_long_text_takes_no_time(text: str) -> None:
    """A text of any length in a settings file is read or refused at once."""
    began = time.process_time()
    spending = {"daily": text, "currency": text, "timezone": text}
    with pytest.raises(SettingsError):
        Settings.model_validate(
            {
                "backend": {"url": f"redis://h?{text}", "namespace": text},
                "identity": {"trusted_proxies": [text], "api_key_headers": [text], "default_plan": text},
                "response": {"documentation_url": text, "headers": [text]},
                "operations": {"usage_path": f"/{text}"},
                "plans": {"a": {"requests": [text], "concurrent": {"limit": 1, "unit": text}, "share": text}},
                "keys": [{"hash": text, "plan": text, "account": text, "spending": spending}],
                "routes": [{"path": f"/{text}", "price": text, "methods": [text], "total": [text]}],
            }
        )
    for rate in (text, f"5/{text}minute", f"5{text}/minute"):
        with suppress(SettingsError):
            Settings.model_validate({"plans": {"a": {"requests": [rate]}}})
    assert time.process_time() - began < 2


def test_many_wrong_names_take_no_time() -> None:
    """The name nearest to a wrong one is looked for once, however many keys have the wrong one."""
    key = {"plan": "prx", "spending": {"daily": "1", "timezone": "Europe/Berlni"}}
    keys = [{**key, "hash": f"sha256:{number:064x}"} for number in range(1_000)]
    began = time.process_time()
    with pytest.raises(SettingsError, match="did you mean 'Europe/Berlin'"):
        Settings.model_validate({"plans": {f"pro-{number}": {} for number in range(300)}, "keys": keys})
    assert time.process_time() - began < 10


def test_a_listed_key_must_be_one_that_a_request_may_carry(tmp_path: Path) -> None:
    """A key longer than any that is read from a request would never be met."""
    text = '[[keys]]\nkey = "{}"\nplan = "default"'
    assert problems(tmp_path, text.format("k" * 16_385)) == [
        "keys[0].key: is too long; expected at most 16384 bytes"
    ]
    assert load(tmp_path, text.format("k" * 16_384)).keys
