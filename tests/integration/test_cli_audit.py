"""`ratelimit-mw audit`: what commands have changed, and who did, on real servers."""

import getpass
import socket
from pathlib import Path

import pytest

from ratelimit_mw._internal.backends import open_audit_store
from ratelimit_mw._internal.backends.audit_store import KEPT
from ratelimit_mw._internal.live.audit import AuditLog
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.policy.identity import key_partition
from ratelimit_mw._internal.settings import BackendSettings
from ratelimit_mw._internal.settings.url import SecretURL
from tests.support.commands import Commands
from tests.support.servers import StoreServer
from tests.support.settings_files import written

pytestmark = pytest.mark.rerun

K = key_partition(hash_api_key(b"k", ""))


def test_commands_record_what_they_change(
    commands: Commands, tmp_path: Path, redis_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records name operator, time, callers and change, latest first; a mere look or a refusal leaves none."""
    plans = '[plans.default]\nrequests = ["9/hour", "5/minute"]\n[plans.pro]\n'
    text = f'backend.url = "{redis_server.url}"\n{plans}'
    file = str(written(tmp_path / "s.toml", text))
    monkeypatch.setenv("RATELIMIT_SETTINGS", file)
    assert commands.good("audit") == "no changes\n"
    commands.good("keys", "set", "k", "--plan", "pro")
    commands.good("keys", "remove", "k")
    commands.good("reset", "k")
    commands.good("show", "k")
    commands.bad("keys", "set", "k", "--plan", "prp")
    found = commands.json("audit")["changes"]
    assert [(each["action"], each["detail"]) for each in found] == [
        ("reset", "2 counters cleared"),
        ("take-back", "what was set live is taken back"),
        ("plan", "plan pro"),
    ]
    assert {(*each["callers"], each["who"]) for each in found} == {
        (K, f"{getpass.getuser()}@{socket.gethostname()}")
    }
    assert K in commands.good("audit", "-n", "1")
    assert len(commands.json("audit", "-n", "1")["changes"]) == 1


def test_memory_has_no_changes_to_show(commands: Commands, tmp_path: Path) -> None:
    """No command can look into the memory of a process."""
    file = str(written(tmp_path / "s.toml", ""))
    assert "in the memory of each process" in commands.bad("audit", "--settings", file)


async def test_a_server_keeps_the_latest(server: StoreServer) -> None:
    """A server keeps the latest records, up to the limit `KEPT`, in their order."""
    log = AuditLog(open_audit_store(BackendSettings(url=SecretURL(server.url), timeout=5)))
    try:
        for number in range(KEPT + 3):
            await log.add("who", "reset", ["k:1"], str(number))
        found = await log.latest(KEPT + 3)
    finally:
        await log.close()
    assert [each.detail for each in found] == [str(number) for number in range(KEPT + 2, 2, -1)]
