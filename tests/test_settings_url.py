"""The backend's URL: every kind of Redis and Valkey, and no password in an error."""

from pathlib import Path

import pytest

from ratelimit_mw.settings import BackendSettings, Settings
from tests.settings_files import problems


@pytest.mark.parametrize(
    "url",
    [
        "memory://",
        "redis://127.0.0.1:6379/0",
        "redis://:p%40ss@[::1]:6379",
        "rediss://cache.example.com",
        "unix:///run/redis.sock?db=1",
        "redis+unix:///run/redis.sock",
        "redis+sentinel://h1:26379,h2:26379/mymaster",
        "redis+sentinel://user:pass@h1:26379,[::1]/mymaster/3",
        "redis+cluster://h1:6379,h2:6379",
        "valkey://localhost",
        "valkeys://localhost",
        "valkey+unix:///run/valkey.sock",
        "valkey+sentinel://h1/mymaster",
        "valkey+cluster://h1/0",
    ],
)
def test_a_backend_url_names_its_kind(url: str) -> None:
    """Every kind of Redis and of Valkey is to be had by its scheme."""
    backend = BackendSettings(url=url)  # type: ignore[arg-type]
    assert Settings(backend=backend).backend.url.get_secret_value() == url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hunter2", "is no URL"),
        ("", "is no URL"),
        ("hunter2 x://h", "unknown scheme;"),
        ("http://h", "unknown scheme 'http'"),
        ("valky://h", "did you mean 'valkey'"),
        ("memory://h", "has a host or path"),
        ("redis://", "names no host"),
        ("redis://:hunter2/x@h", "names no host"),
        ("redis://h:99999", "names no host"),
        ("redis://h/zero", "names no database"),
        ("redis://[::1", "is no URL"),
        ("redis://h\\u007f", "blanks or control"),
        ("unix://", "names no socket"),
        ("redis+sentinel://h1,h2", "names no service"),
        ("redis+sentinel://h1/m/zero", "names no database"),
        ("redis+cluster://h1,,h2", "names no host"),
        ("valkey+cluster://h1/3", "names a database"),
    ],
)
def test_a_backend_url_is_checked(tmp_path: Path, url: str, message: str) -> None:
    """A URL that leads to no backend is an error, which never repeats the URL."""
    (problem,) = problems(tmp_path, f'backend.url = "{url}"')
    assert problem.startswith("backend.url: ")
    assert message in problem
    assert "hunter2" not in problem
