"""Life signs of processes that share a folder: locks that the system takes back from the dead.

Process numbers would not do: containers that share a folder number their processes each for itself, so that a
number may be nobody's here and somebody's there.
"""

import contextlib
import os
import secrets
from pathlib import Path

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # no such locks on this system: nobody is taken for dead
    _HAS_LOCKS = False
else:
    _HAS_LOCKS = True

PREFIX = "ratelimit_mw-alive-"


class LifeSign:
    """A file in a folder that this process keeps locked as long as it lives."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None
        self._pid = 0

    def give(self) -> None:
        """Make the file and lock it, unless this process has done so."""
        if not _HAS_LOCKS or self._pid == os.getpid():
            return
        if self._descriptor is not None:  # of the process that this one was forked from
            os.close(self._descriptor)
        name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        # Locked under another name first: nobody can find it unlocked, and take its process for dead.
        unlocked = self._folder / f".{name}"
        self._descriptor = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _lock(self._descriptor)
        unlocked.rename(self._folder / name)
        self._pid = os.getpid()

    def bury_dead(self) -> set[int]:
        """Remove the files of processes that have ended; the numbers that no living process has, either."""
        if not _HAS_LOCKS:
            return set()
        living: set[int] = set()
        dead: set[int] = set()
        for file in self._folder.glob(f"{PREFIX}*"):
            number = file.name.removeprefix(PREFIX).partition("-")[0]
            if number.isdecimal():
                (dead if _is_dead(file) else living).add(int(number))
        return dead - living


def _is_dead(file: Path) -> bool:
    """Whether nobody has a file locked; it is then removed."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return False  # another process was quicker
    except OSError:
        return False  # another user's, who looks after it
    try:
        if not _lock(descriptor):
            return False
        with contextlib.suppress(OSError):
            file.unlink()
        return True
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file; false where another process has it locked."""
    try:
        flock(descriptor, LOCK_EX | LOCK_NB)
    except OSError:
        return False
    return True
