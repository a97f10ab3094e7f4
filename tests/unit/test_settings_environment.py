"""The environment over the settings file: what it may set, and how its errors name the variable."""

from ipaddress import ip_network
from pathlib import Path

import pytest
from pydantic import Secret, SecretStr

from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.settings import Settings, SettingsError
from tests.support.settings_files import load, problems, written

pytestmark = pytest.mark.usefixtures("no_environment")


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("RATELIMIT_SHADOW", "true", True),
        ("RATELIMIT_SHADOW", "OFF", False),
        ("RATELIMIT_BACKEND__URL", "redis://localhost", "redis://localhost"),
        ("RATELIMIT_BACKEND__TIMEOUT", "0.5", 0.5),
        ("RATELIMIT_BACKEND__TIMEOUT", "1", 1.0),
        ("RATELIMIT_BACKEND__TLS_CA_FILE", "", None),
        ("RATELIMIT_IDENTITY__API_KEY_HEADERS", "X-Key, Authorization", ("X-Key", "Authorization")),
        ("RATELIMIT_IDENTITY__API_KEY_HEADERS", '["X-Key"]', ("X-Key",)),
        ("RATELIMIT_IDENTITY__TRUSTED_PROXIES", "", ()),
        ("RATELIMIT_IDENTITY__TRUSTED_PROXIES", "unix,10.0.0.0/8", ("unix", ip_network("10.0.0.0/8"))),
        (
            "RATELIMIT_IDENTITY__PER_ADDRESS",
            "5/second,9/hour",
            (Window(5, 1, "second"), Window(9, 1, "hour")),
        ),
        ("RATELIMIT_IDENTITY__HASH_SECRET", "5", "5"),
        ("RATELIMIT_RESPONSE__CAPACITY_STATUS", "503", 503),
        ("RATELIMIT_RESPONSE__HEADERS", "ietf", ("ietf",)),
        ("RATELIMIT_OPERATIONS__USAGE_PATH", "/usage", "/usage"),
        ("RATELIMIT_OPERATIONS__DASHBOARD_CHANGES", "yes", True),
    ],
)
def test_the_environment_overrides_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, text: str, value: object
) -> None:
    """A variable sets its value in the value's own type, and leaves the rest of its table to the file."""
    monkeypatch.setenv(variable, text)
    loaded: object = load(
        tmp_path, 'backend.namespace = "mine"\nshadow = true\nidentity.unknown_keys = "anonymous"'
    )
    assert isinstance(loaded, Settings)
    assert (loaded.backend.namespace, loaded.identity.unknown_keys) == ("mine", "anonymous")
    found: object = loaded
    for name in variable.removeprefix("RATELIMIT_").lower().split("__"):
        found = getattr(found, name)
    if isinstance(found, Secret | SecretStr):
        found = found.get_secret_value()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("variable", "text", "problem"),
    [
        (
            "SHADOW",
            "maybe",
            "'maybe' is not a possible value; expected 'true', '1', 'yes', 'on', 'false', '0', 'no' or 'off'",
        ),
        ("BACKEND__TIMEOUT", "fast", "'fast' is not a possible value; expected a number"),
        ("BACKEND__TIMEOUT", "-1", "-1.0 is out of range; expected more than 0"),
        ("BACKEND__TIMEOUT", "nan", "nan is not a finite number"),
        (
            "BACKEND__ON_FAILURE",
            "alow",
            "'alow' is not a choice; expected 'local', 'allow' or 'deny'; did you mean 'allow'?",
        ),
        ("RESPONSE__CAPACITY_STATUS", "418", "'418' is not a possible value; expected '429' or '503'"),
        (
            "IDENTITY__DEFAULT_PLAN",
            "anonymus",
            "there is no plan 'anonymus'; expected 'default' or 'anonymous'; did you mean 'anonymous'?",
        ),
        ("IDENTITY__HASH_SECRET", "hunter2\udcff", "is not UTF-8 text"),
    ],
)
def test_errors_of_the_environment_name_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, text: str, problem: str
) -> None:
    """A wrong value in the environment is reported there, not at the file."""
    monkeypatch.setenv(f"RATELIMIT_{variable}", text)
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, "")
    assert str(caught.value) == f"environment: RATELIMIT_{variable}: {problem}"


def test_errors_within_a_list_of_the_environment_name_the_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of several wrong values is found by its index, and a broken list is not a list."""
    monkeypatch.setenv("RATELIMIT_IDENTITY__API_KEY_HEADERS", "X-Key,X Key")
    monkeypatch.setenv("RATELIMIT_IDENTITY__TRUSTED_PROXIES", '["10.0.0.0/8"')
    lists, item = problems(tmp_path)
    assert (
        "RATELIMIT_IDENTITY__TRUSTED_PROXIES: '[\"10.0.0.0/8\"' is not a possible value; expected a list"
        in lists
    )
    assert item.startswith("RATELIMIT_IDENTITY__API_KEY_HEADERS[1]: 'X Key' is not a name in HTTP")


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("RATELIMIT_BACKEND__ULR", "RATELIMIT_BACKEND__URL"),
        ("RATELIMIT_BACKND__URL", "RATELIMIT_BACKEND__URL"),
        ("RATELIMIT_PLANS__DEFAULT", None),
        ("RATELIMIT_SHADOW__X", "RATELIMIT_SHADOW"),
    ],
)
def test_an_unknown_variable_of_ours_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, nearest: str | None
) -> None:
    """A misspelt variable is not silently without effect, and its value is not shown."""
    monkeypatch.setenv(variable, "hunter2")
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"{variable}: unknown name; expected ")
    assert nearest is None or problem.endswith(f"did you mean '{nearest}'?")
    assert "hunter2" not in problem


def test_variables_without_two_underscores_are_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other programs may use names like ours."""
    monkeypatch.setenv("RATELIMIT_ENABLED", "1")
    monkeypatch.setenv("OTHER_RATELIMIT_BACKEND__X", "1")
    assert load(tmp_path, "").plans == Settings().plans


def test_the_environment_and_the_file_are_reported_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One look finds what is wrong in both."""
    monkeypatch.setenv("RATELIMIT_BACKEND__TIMEOUT", "fast")
    monkeypatch.setenv("RATELIMIT_IDENTITY__DEFAULT_PLAN", "x")
    assert [line.split(":")[0] for line in problems(tmp_path, "backend = 5\nsahdow = true")] == [
        "RATELIMIT_BACKEND__TIMEOUT",
        "backend",
        "sahdow",
        "RATELIMIT_IDENTITY__DEFAULT_PLAN",
    ]


def test_the_environment_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`RATELIMIT_SETTINGS` is used where no path is given, must exist, and is none where it is empty."""
    file = written(tmp_path / "named.toml", "shadow = true")
    monkeypatch.setenv("RATELIMIT_SETTINGS", str(file))
    assert Settings.load().source == str(file)
    assert load(tmp_path, "").source != str(file)
    monkeypatch.setenv("RATELIMIT_SETTINGS", "gone.toml")
    with pytest.raises(SettingsError, match=r"gone\.toml: there is no such file"):
        Settings.load()
    monkeypatch.setenv("RATELIMIT_SETTINGS", "")
    assert Settings.load().source == "built-in defaults"


def test_built_in_code_settings_ignore_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Settings()` is the same everywhere; only `load` looks around."""
    monkeypatch.setenv("RATELIMIT_SHADOW", "true")
    monkeypatch.setenv("SHADOW", "true")
    assert not Settings().shadow
    assert Settings.load().shadow
