"""The backend's URL: every kind of Redis and Valkey, and no password in an error."""

from pathlib import Path

import pytest

from ratelimit_mw import Limiter
from ratelimit_mw._internal.settings import BackendSettings, Settings, SettingsError, url_options
from ratelimit_mw._internal.settings.url import split_url
from ratelimit_mw._internal.settings.url_options import OPTIONS
from tests.support.settings_files import problems, written


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
        "redis+cluster://[::1]:7000,h2,[2001:db8::2]:7001",
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


GOOD_OPTIONS = {
    "redis://h": [
        *("db=0", "db=15", "username=u&password=p%26w", "client_name=api-1", "socket_timeout=0.5"),
        *("socket_connect_timeout=2", "socket_keepalive=yes", "health_check_interval=30", "", "db=1&"),
    ],
    "rediss://h": [
        *("ssl_cert_reqs=none", "ssl_cert_reqs=optional", "ssl_check_hostname=false", "ssl_ca_path=/"),
        *("ssl_min_version=771", "ssl_ciphers=ECDHE%2BAESGCM", "db=1&ssl_cert_reqs=required"),
        "ssl_include_verify_flags=VERIFY_X509_STRICT,VERIFY_X509_PARTIAL_CHAIN",
        "ssl_exclude_verify_flags=[VERIFY_X509_STRICT]",
    ],
    "unix:///run/s": ["db=3", "username=u&password=p", "socket_timeout=1"],
    "redis+sentinel://h/m": [
        *("db=3", "sentinel_username=u&sentinel_password=p", "sentinel_password=p", "ssl_cert_reqs=none"),
    ],
    "redis+cluster://h": ["password=p", "ssl_cert_reqs=none", "socket_keepalive=0"],
}
BAD_OPTIONS = {
    "redis://h?foo=bar": "unknown option 'foo'; expected 'db', 'username'",
    "redis://h?pasword=hunter2": "did you mean 'password'?",
    "redis://h?socket_timeot=1": "did you mean 'socket_timeout'?",
    "redis://h?foo": "unknown option 'foo'",
    "redis://h?hunter2@x": "has a query that is not NAME=VALUE",
    "redis://h?db=-1": "option 'db': '-1' is wrong; expected a number from 0 to 99999",
    "redis://h?db=one": "option 'db': 'one' is wrong",
    "redis://h?db=": "option 'db': '' is wrong",
    "redis://h?db": "option 'db': '' is wrong",
    "redis://h?db=1&db=2": "option 'db' is given twice",
    "redis://h/1?db=2": "names the database twice",
    "redis+sentinel://h/m/1?db=2": "names the database twice",
    "redis+cluster://h?db=0": "option 'db' is not allowed in a URL of redis+cluster://",
    "redis://h?password=": "option 'password': its value is wrong",
    "redis://h?socket_timeout=0": "option 'socket_timeout': '0' is wrong; expected seconds",
    "redis://h?socket_timeout=-1": "option 'socket_timeout': '-1' is wrong",
    "redis://h?socket_timeout=inf": "option 'socket_timeout': 'inf' is wrong",
    "redis://h?socket_timeout=None": "option 'socket_timeout': 'None' is wrong",
    "redis://h?socket_connect_timeout=999": "option 'socket_connect_timeout': '999' is wrong",
    "redis://h?socket_keepalive=off": "option 'socket_keepalive': 'off' is wrong; expected true or false",
    "redis://h?health_check_interval=1.5": "option 'health_check_interval': '1.5' is wrong",
    "redis://h?client_name=a%20b": "option 'client_name': 'a b' is wrong",
    "redis://h?decode_responses=true": "option 'decode_responses' can't be set in the URL",
    "redis://h?protocol=3": "option 'protocol' can't be set in the URL",
    "redis://h?encoding=utf-16": "option 'encoding' can't be set in the URL",
    "redis://h?retry_on_timeout=true": "option 'retry_on_timeout' can't be set in the URL",
    "redis://h?max_connections=1": "option 'max_connections' can't be set in the URL",
    "redis://h?ssl_cert_reqs=none": "option 'ssl_cert_reqs' is not allowed in a URL of redis://",
    "valkey://h?ssl_ca_certs=/x": "option 'ssl_ca_certs' is not allowed in a URL of valkey://",
    "unix:///run/s?ssl_cert_reqs=none": "option 'ssl_cert_reqs' is not allowed",
    "unix:///run/s?socket_keepalive=1": "option 'socket_keepalive' is not allowed",
    "redis://h?sentinel_password=hunter2": "option 'sentinel_password' is not allowed",
    "redis+sentinel://h/m?sentinel_username=u": "option 'sentinel_username' is given without",
    "memory://?db=1": "option 'db' is not allowed in a URL of memory://; expected no options",
    "memory://?foo=1": "unknown option 'foo'; expected no options",
    "rediss://h?ssl_cert_reqs=CERT_NONE": "'CERT_NONE' is wrong; expected 'none', 'optional' or 'required'",
    "rediss://h?ssl_check_hostname=off": "option 'ssl_check_hostname': 'off' is wrong",
    "rediss://h?ssl_ca_certs=/no/such": "'/no/such' is wrong; expected the path of a file",
    "rediss://h?ssl_ca_path=/no/such": "option 'ssl_ca_path': '/no/such' is wrong",
    "rediss://h?ssl_ca_data=hunter2": "the certificates to trust can't be used",
    "rediss://h?ssl_min_version=3": "option 'ssl_min_version': '3' is wrong; expected 771 (TLS 1.2)",
    "rediss://h?ssl_ciphers=rot13": "the ciphers can't be used",
    "rediss://h?ssl_include_verify_flags=STRICT": "option 'ssl_include_verify_flags': 'STRICT' is wrong",
    "rediss://h?ssl_keyfile=/etc/hosts": "option 'ssl_keyfile' is given without",
    "rediss://h?ssl_certfile=/etc/hosts": "the client certificate and key can't be used",
    "redis://h/0#x": "contains '#'",
    "redis://h/0#": "contains '#'",
    "redis://h:0": "the host or its port is missing or wrong",
    "redis://h:": "the host or its port is missing or wrong",
    "redis://[:::1]": "is not a URL|the host or its port",
    "redis+sentinel://h,[1::2::3]/m": "is not a URL|the host or its port",
    "redis://a,b": "names several hosts; expected one, or a scheme such as",
    "unix://run/redis.sock": "names a host; expected no host before the path",
    "redis://u:hunter2%ff@h": "contains percent-encoded bytes that are not UTF-8",
    "redis://h?password=hunter2%ff": "contains percent-encoded bytes that are not UTF-8",
}


@pytest.mark.parametrize(
    ("url", "options"), [(url, each) for url, options in GOOD_OPTIONS.items() for each in options]
)
def test_a_documented_option_is_taken(url: str, options: str) -> None:
    """Every option that a kind of URL may have loads there, and a backend can be made of it."""
    settings = Settings.model_validate({"backend": {"url": f"{url}?{options}"}})
    Limiter(settings)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("redis+sentinel://u:p@h1:26379,[::1]/m/3?db=1", ("u:p@h1:26379,[::1]", "/m/3", "db=1", "")),
        ("redis+cluster://[::1]:7000,h2", ("[::1]:7000,h2", "", "", "")),
        ("unix:///run/redis.sock?db=1", ("", "/run/redis.sock", "db=1", "")),
        ("redis://u:p@h?x=/@#/?", ("u:p@h", "", "x=/@", "/?")),
        ("redis://h/0#x", ("h", "/0", "", "x")),
    ],
)
def test_a_url_of_several_hosts_has_parts(url: str, parts: tuple[str, ...]) -> None:
    """Brackets around the address of one of several hosts are not an error, whatever Python's parser says."""
    assert split_url(url)[1:] == parts


def test_every_option_is_documented() -> None:
    """The reference names each option of the URL."""
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text("utf-8")
    assert [name for name in OPTIONS if f"`{name}`" not in text] == []


@pytest.mark.parametrize("url", BAD_OPTIONS)
def test_a_wrong_option_is_explained(url: str) -> None:
    """An option that is unknown, wrong or out of place is an error of the settings, which names it."""
    with pytest.raises(SettingsError) as caught:
        Settings.model_validate({"backend": {"url": url}})
    (problem,) = map(str, caught.value.problems)
    assert problem.startswith("backend.url: ")
    assert any(message in problem for message in BAD_OPTIONS[url].split("|")), problem
    assert "hunter2" not in problem


def test_tls_files_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    """A file without a certificate, and one that the URL names, too, are found when settings load."""
    file = str(written(tmp_path / "ca.pem", "no certificate"))
    for backend, said in (
        ({"url": "rediss://h", "tls_ca_file": file}, "backend.tls_ca_file: the certificates to trust can't"),
        ({"url": f"rediss://h?ssl_ca_certs={file}"}, "backend.url: the certificates to trust can't"),
        (
            {"url": f"rediss://h?ssl_ca_certs={file}", "tls_ca_file": file},
            "backend.tls_ca_file: is set by option 'ssl_ca_certs' of the URL, too",
        ),
    ):
        with pytest.raises(SettingsError) as caught:
            Settings.model_validate({"backend": backend})
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hunter2", "is not a URL"),
        ("", "is not a URL"),
        ("hunter2 x://h", "unknown scheme;"),
        ("http://h", "unknown scheme 'http'"),
        ("valky://h", "did you mean 'valkey'"),
        ("memory://h", "has a host or path"),
        ("redis://", "the host or its port is missing or wrong"),
        ("redis://:hunter2/x@h", "the host or its port is missing or wrong"),
        ("redis://h:99999", "the host or its port is missing or wrong"),
        ("redis://h/zero", "the database in the path is not a number"),
        ("redis://[::1", "the host or its port is missing or wrong"),
        ("redis://h\\u007f", "spaces or control"),
        ("unix://", "names no socket"),
        ("redis+sentinel://h1,h2", "names no service"),
        ("redis+sentinel://h1/m/zero", "the database in the path is not a number"),
        ("redis+cluster://h1,,h2", "the host or its port is missing or wrong"),
        ("valkey+cluster://h1/3", "names a database"),
    ],
)
def test_a_backend_url_is_checked(tmp_path: Path, url: str, message: str) -> None:
    """A URL that leads to no backend is an error, which never repeats the URL."""
    (problem,) = problems(tmp_path, f'backend.url = "{url}"')
    assert problem.startswith("backend.url: ")
    assert message in problem
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    ("option", "needed"),
    [
        ("ssl_ca_path=/", "7.2"),
        ("ssl_password=p", "7.2"),
        ("ssl_include_verify_flags=VERIFY_X509_STRICT", "7.0"),
    ],
)
def test_an_option_that_the_installed_redis_py_lacks_is_an_error(
    option: str, needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older redis-py would fail at its first connection: the settings say so at the start."""
    monkeypatch.setattr(url_options, "_redis_version", lambda: (6, 4, 0))
    with pytest.raises(SettingsError, match=rf"unknown to the installed redis-py.*redis {needed} or newer"):
        Settings(backend={"url": f"rediss://h?{option}"})  # type: ignore[arg-type]
