"""A settings file that is none, that hangs, or that never stops changing: live changes go on."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ratelimit_mw import Limiter
from ratelimit_mw._internal.live import registry, reload
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from tests.integration.test_reload import file, heard, limits, quick, quota_of, remove, reported, settle
from tests.support.apps import ROOT
from tests.support.live import replace_file
from tests.support.servers import StoreServer
from tests.support.settings_files import written
from tests.support.slots import until_async

pytestmark = pytest.mark.rerun

__all__ = ["file", "heard", "quick"]


async def test_a_fifo_in_place_of_the_file_ends_nothing(
    file: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reported and never waited for; the file that comes after it applies."""
    async with Limiter.from_settings(file) as limiter:
        await settle()
        remove(file)
        os.mkfifo(file)
        await until_async(lambda: reported(heard))
        assert "is a FIFO, not a file" in reported(heard)[0]
        assert quota_of(limiter) == 5
        remove(file)
        written(file, limits(7))
        await until_async(lambda: quota_of(limiter) == 7)


def unread(heard: pytest.LogCaptureFixture) -> list[str]:
    """Return the reports of a file that can't be read in time."""
    return [text for text in reported(heard) if "can't be read" in text]


class HangingDisk:
    """A disk that doesn't answer when it is asked about one file, until it is mended."""

    def __init__(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self._mended = 0, threading.Event()
        stat = Path.stat

        def hang(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
            if path == file:
                self.asked += 1
                self._mended.wait(60)
            return stat(path, follow_symlinks=follow_symlinks)

        monkeypatch.setattr(Path, "stat", hang)

    def mend(self) -> None:
        """Answer from now on."""
        self._mended.set()


async def test_a_disk_that_hangs_is_said_and_waited_for_by_nobody(
    file: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, redis_server: StoreServer
) -> None:
    """One look hangs, not more; live keys apply meanwhile, closing is quick, and later the file is read."""
    monkeypatch.setattr(reload, "READ_SECONDS", 0.1)
    monkeypatch.setattr(registry, "POLL_SECONDS", 0.05)
    url = f'backend.url = "{redis_server.url}"\n'
    written(file, limits(5, url) + "[plans.pro]\n")
    async with (
        Limiter.from_settings(file) as limiter,
        Limiter(limiter.settings.model_copy(update={"shadow": False})) as other,
    ):
        await settle()
        disk = HangingDisk(file, monkeypatch)
        written(file, limits(7, url) + "[plans.pro]\n")
        await until_async(lambda: unread(heard))
        assert "can't be read within 0.1 s; the previous settings stay" in unread(heard)[0]
        await other.engine.live.set_keys({f"sha256:{'0' * 64}": KeyEntry("pro")})
        await until_async(lambda: limiter.engine.live.rules.registered)
        asked = disk.asked
        await asyncio.sleep(0.5)
        assert disk.asked == asked <= 2
        assert len(unread(heard)) == 1
        disk.mend()
        await until_async(lambda: quota_of(limiter) == 7)
        assert any("can be read again" in text for text in reported(heard))


def test_a_process_ends_while_the_disk_hangs(tmp_path: Path) -> None:
    """A look at the file that never returns keeps no process from stopping."""
    file = written(tmp_path / "s.toml", limits(5))
    code = """
import asyncio, pathlib, sys, threading
from ratelimit_mw import Limiter
from ratelimit_mw._internal.live import registry, reload
from ratelimit_mw._internal.policy.key_entry import KeyEntry
reload.POLL_SECONDS = reload.READ_SECONDS = 0.05

async def main():
    async with Limiter.from_settings(sys.argv[1]) as limiter:
        pathlib.Path.stat = lambda *_, **__: threading.Event().wait()
        await asyncio.sleep(0.5)
        print((await limiter.acquire(api_key="k")).allowed)

asyncio.run(main())
"""
    command = [sys.executable, "-W", "error", "-c", code, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True\n"
    assert "can't be read within 0.05 s" in done.stderr


async def test_a_file_that_is_replaced_without_end_is_read(file: Path) -> None:
    """Changes apply while they go on, if what comes in the file's place comes as a whole."""
    over = threading.Event()

    def replace() -> None:
        number = 0
        while not over.wait(0.003):
            number += 1
            replace_file(file, limits(1_000 + number))

    async with Limiter.from_settings(file) as limiter:
        thread = threading.Thread(target=replace)
        thread.start()
        try:
            await until_async(lambda: quota_of(limiter) > 1_000)
            first = quota_of(limiter)
            await until_async(lambda: quota_of(limiter) > first)
        finally:
            over.set()
            thread.join()


async def test_a_file_that_is_rewritten_without_end_is_never_half_read(
    file: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is written in place is used only once it stays as it is, however long that takes."""
    # A busy machine makes the writer pause, too, though not for as long.
    monkeypatch.setattr(reload, "POLL_SECONDS", 0.4)
    monkeypatch.setattr(reload, "STILL_SECONDS", 1.5)
    monkeypatch.setattr(reload, "READ_SECONDS", 20)
    over = threading.Event()

    def rewrite() -> None:
        while not over.wait(0.002):
            with file.open("w", encoding="utf-8") as opened:
                for line in limits(9).splitlines():
                    opened.write(f"{line}\n")
                    opened.flush()
                    time.sleep(0.002)

    async with Limiter.from_settings(file) as limiter:
        thread = threading.Thread(target=rewrite)
        thread.start()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            assert quota_of(limiter) in {5, 9}
            await asyncio.sleep(0.02)
        over.set()
        thread.join()
        await until_async(lambda: quota_of(limiter) == 9)
    assert not reported(heard)
