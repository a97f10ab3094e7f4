"""Settings: what a file may say, and what it means."""

import hashlib
import hmac
import json
from decimal import Decimal
from ipaddress import ip_network
from pathlib import Path
from pprint import pformat
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from ratelimit_mw._internal.model.limits import Budget, Slots, Window
from ratelimit_mw._internal.settings import (
    BackendSettings,
    IdentitySettings,
    KeySettings,
    OperationsSettings,
    Settings,
    SettingsError,
)
from tests.support.settings_files import load

pytestmark = pytest.mark.usefixtures("no_environment")

HERE = Path(__file__).parents[1]
GOOD = sorted((HERE / "settings_good").glob("*.toml"))


@pytest.mark.parametrize("file", GOOD, ids=lambda file: file.stem)
def test_a_good_file_loads_the_same_each_time(file: Path) -> None:
    """A good file loads, its settings can be compared, and they know where they came from."""
    loaded = Settings.load(file)
    assert loaded == Settings.load(file)
    assert loaded.source == str(file)
    assert loaded != Settings()


def test_defaults() -> None:
    """Without a file: memory, 60 a minute and 5 at once for a key, 20 a minute and 1 at once without one."""
    defaults = Settings.load()
    assert defaults == Settings()
    assert defaults.source == "built-in defaults"
    assert (defaults.shadow, defaults.backend.safe_url, defaults.backend.timeout) == (False, "memory://", 0.1)
    assert defaults.plans["default"].requests == (Window(60, 1, "minute"),)
    assert defaults.plans["default"].concurrent == Slots(5, "request", 30.0, None)
    assert defaults.plans["anonymous"].requests == (Window(20, 1, "minute"),)
    assert defaults.plans["anonymous"].concurrent == Slots(1)


def test_a_file_may_be_empty(tmp_path: Path) -> None:
    """An empty file is the defaults under another name."""
    loaded = load(tmp_path, "")
    assert (loaded.plans, loaded.backend, loaded.keys) == (Settings().plans, BackendSettings(), ())


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Editors that mark UTF-8 text do no harm."""
    assert load(tmp_path, "\ufeffshadow = true").shadow


def test_a_plan_in_the_file_replaces_the_whole_built_in_one() -> None:
    """A plan in the file limits nothing that it doesn't write; the other built-in plan stays."""
    loaded = Settings.load(HERE / "settings_good" / "odd_but_right.toml")
    assert loaded.plans["default"].requests == ()
    assert loaded.plans["default"].concurrent == Slots(3)
    assert loaded.plans["anonymous"] == Settings().plans["anonymous"]


def test_the_reference_file_means_what_its_comments_say() -> None:
    """Every name of the reference file arrives as the value it stands for; empty text is the default."""
    loaded = Settings.load(HERE / "settings_good" / "ratelimit.toml")
    assert (loaded.backend.tls_ca_file, loaded.operations.dashboard_path) == (None, None)
    assert loaded.backend.local_share == 0.25
    assert loaded.identity.trusted_proxies == (ip_network("127.0.0.1/32"), ip_network("::1/128"))
    assert loaded.identity.per_address == (Window(6000, 1, "minute"),)
    assert loaded.application.concurrent == Slots(500)
    assert loaded.plans["default"].concurrent == Slots(5, "prediction", 30.0, 3600.0)
    spending = loaded.plans["enterprise"].spending
    assert spending is not None
    assert spending.budget == Budget(25_000_000, 500_000_000, "USD", "UTC", 0.8)
    assert spending.on_failure == "deny"
    chat, health, predictions, prediction, batch, rest = loaded.routes
    assert chat.units == {"tokens": 2000}
    assert (health.exempt, health.methods, rest.slot) == (True, None, False)
    assert (predictions.methods, predictions.price) == (frozenset({"POST"}), Decimal("0.02"))
    assert prediction.requests == (Window(10, 1, "second"),)
    assert (batch.cost, batch.total, batch.shadow) == (10, (Window(100, 1, "second"),), True)


def test_a_clear_key_is_hashed_and_forgotten() -> None:
    """Nothing of the loaded settings shows a key that the file has in the clear."""
    loaded = Settings.load(HERE / "settings_good" / "ratelimit.toml")
    assert loaded.keys[2].hash == "sha256:" + hashlib.sha256(b"demo-research").hexdigest()
    assert loaded.keys[2].requests == (Window(2000, 1, "minute"),)
    assert loaded.keys[0].requests is None
    assert "demo-" not in repr(loaded)


def test_a_clear_key_is_hashed_under_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The secret may come from the environment and still be the one that listed keys are hashed under."""
    monkeypatch.setenv("RATELIMIT_IDENTITY__HASH_SECRET", "correct horse")
    loaded = load(tmp_path, '[[keys]]\nkey = " kä "\nplan = "default"')
    digest = hmac.new(b"correct horse", "kä".encode(), hashlib.sha256).hexdigest()
    assert loaded.keys[0].hash == f"hmac-sha256:{digest}"


def shown_in_every_way(loaded: Settings) -> str:
    """All the texts that a settings object can be made into, with those of its tables."""
    parts: list[BaseModel] = [loaded, loaded.backend, loaded.identity, loaded.operations]
    texts = [f"{part!r} {part} {part.model_dump()} {part.model_dump_json()}" for part in parts]
    texts += [f"{part.model_dump(mode='json')} {list(part)} {vars(part)}" for part in parts]
    secrets = (loaded.identity.hash_secret, loaded.operations.dashboard_token, loaded.backend.url)
    texts += [f"{secret!r} {secret}" for secret in secrets]
    return " ".join([*texts, pformat(loaded.model_dump()), json.dumps(loaded.model_dump(mode="json"))])


def test_no_text_of_the_settings_has_a_secret(tmp_path: Path) -> None:
    """No log, print or dump of settings has a secret, a token or a password of a URL."""
    loaded = load(
        tmp_path,
        """
        backend.url = "redis://alice-hunter2:hunter2@localhost/0?password=hunter2"
        identity = { hash_secret = "hunter2" }
        operations = { dashboard_path = "/ops", dashboard_token = "hunter2" }
        """,
    )
    texts = shown_in_every_way(loaded)
    assert "hunter2" not in texts
    assert "redis://localhost/0" in texts
    assert loaded.identity.hash_secret.get_secret_value() == "hunter2"
    assert Settings(**loaded.model_dump()).model_dump() == loaded.model_dump()


@pytest.mark.parametrize(
    "table",
    [
        {"backend": {"url": "redis://:hunter2@h", "timeout": "hunter2"}},
        {"backend": {"url": ["hunter2"]}},
        {"backend": {"url": "redis://:hunter2@h/zero"}},
        {"identity": {"hash_secret": ["hunter2"]}},
        {"operations": {"dashboard_token": {"a": "hunter2"}}},
        {"operations": {"dashboard_token": "hunter2", "dashboard_path": "ops"}},
    ],
)
def test_no_validation_error_has_a_secret(table: dict[str, Any]) -> None:
    """A secret is in no text and no part of the error about it or about what stands beside it."""
    ((name, values),) = table.items()
    tables: dict[str, type[BaseModel]] = {
        "backend": BackendSettings,
        "identity": IdentitySettings,
        "operations": OperationsSettings,
    }
    with pytest.raises(ValidationError) as caught:
        tables[name].model_validate(values)
    texts = f"{caught.value!r} {caught.value} {caught.value.errors()} {caught.value.json()}"
    with pytest.raises(SettingsError) as wrapped:
        Settings(**table)
    texts += f"{wrapped.value!r} {wrapped.value.problems}"
    assert "hunter2" not in texts


@pytest.mark.parametrize(
    ("rate", "window"),
    [
        ("60/minute", Window(60, 1, "minute")),
        ("1000 per hour", Window(1000, 1, "hour")),
        ("5/2 seconds", Window(5, 2, "second")),
        (" 1 PER 3 Days ", Window(1, 3, "day")),
        ("7/month", Window(7, 1, "month")),
        ("7/10 years", Window(7, 10, "year")),
        ("1000000000/second", Window(10**9, 1, "second")),
    ],
)
def test_a_rate_is_a_count_and_a_unit(tmp_path: Path, rate: str, window: Window) -> None:
    """A rate is a count, a unit and perhaps a multiple, with "/" or "per" between them."""
    assert load(tmp_path, f'application.requests = ["{rate}"]').application.requests == (window,)


@pytest.mark.parametrize(
    ("concurrent", "slots"),
    [
        ("5", Slots(5)),
        ("{ limit = 5 }", Slots(5, "request", 30.0, None)),
        ("{ limit = 5, lease = 1, max_hold = 1.5 }", Slots(5, "request", 1.0, 1.5)),
        ("{ limit = 5, max_hold = 10 }", Slots(5, "request", 10.0, 10.0)),
        ('{ limit = 5, max_hold = 3600, unit = "GPU job" }', Slots(5, "GPU job", 30.0, 3600.0)),
    ],
)
def test_concurrent_is_a_number_or_a_table(tmp_path: Path, concurrent: str, slots: Slots) -> None:
    """A bare number is the limit; a lease not written is no longer than `max_hold`."""
    assert load(tmp_path, f"plans.pro.concurrent = {concurrent}").plans["pro"].concurrent == slots


def test_keys_of_an_account_share_a_plan() -> None:
    """Accounts of a plan that counts by key are only labels: their keys may have several plans."""
    loaded = Settings.load(HERE / "settings_good" / "odd_but_right.toml")
    assert {key.plan for key in loaded.keys if key.account == "acme"} == {"default", "pro"}


def test_settings_are_immutable() -> None:
    """Nothing changes settings once they are loaded."""
    with pytest.raises(ValueError, match="frozen"):
        Settings().backend.timeout = 1.0  # type: ignore[misc]


def test_settings_built_in_code_are_checked_alike() -> None:
    """`Settings(...)` raises what `Settings.load` would, so that there is one kind of error."""
    data: dict[str, Any] = {"keys": [{"key": "k", "plan": "pr"}], "plans": {"pro": {}}, "sahdow": True}
    with pytest.raises(SettingsError) as caught:
        Settings(**data)
    assert {problem.path for problem in caught.value.problems} == {"keys[0].plan", "sahdow"}


def test_a_key_is_there_once_however_it_is_given() -> None:
    """Keys that code lists are compared like those of a file."""
    key = KeySettings(hash=f"sha256:{'a' * 64}", plan="default")
    with pytest.raises(SettingsError, match=r"keys\[1\]\.hash: is the same API key as keys\[0\]\.hash"):
        Settings(keys=(key, key))
