"""Keys that are pressed at a terminal, one by one and without a line's end."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator

_ESCAPE_SEQUENCE = "\x1b["


class Keyboard:
    """The keys pressed since they were asked for last."""

    def __init__(self) -> None:
        self._keys: asyncio.Queue[str] = asyncio.Queue()
        self.is_open = False

    async def pressed(self, seconds: float) -> str | None:
        """The next key within so many seconds, None where none is pressed.

        Arrow keys and their like are none.
        """
        try:
            return await asyncio.wait_for(self._keys.get(), seconds)
        except TimeoutError:
            return None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Read keys in the running event loop; the terminal is as before at the end.

        Nothing is read where standard input is not a terminal, or the system has no such terminals.
        """
        try:
            import termios  # noqa: PLC0415 - not on Windows
            import tty  # noqa: PLC0415 - the same
        except ImportError:
            yield
            return
        if not sys.stdin.isatty():
            yield
            return
        descriptor, loop = sys.stdin.fileno(), asyncio.get_running_loop()
        before = termios.tcgetattr(descriptor)
        try:
            tty.setcbreak(descriptor)
            loop.add_reader(descriptor, self._read, descriptor)
            self.is_open = True
            yield
        finally:
            loop.remove_reader(descriptor)
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)

    def _read(self, descriptor: int) -> None:
        text = os.read(descriptor, 1_024).decode(errors="ignore")
        if text.startswith(_ESCAPE_SEQUENCE):
            return
        for key in text:
            self._keys.put_nowait(key)
