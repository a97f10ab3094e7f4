"""Number of processes that serve together with this one, as the system shows them.

These are the children of this process's parent that listen where it does. Options and variables of servers
are poor evidence: gunicorn has a file of its own, granian variables, and a `WEB_CONCURRENCY` may be read by
nobody. Linux shows the processes; elsewhere nothing can be seen.
"""

import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_TABLES = ("tcp", "tcp6")
_LISTENS = "0A"
"""State of a listening socket in those tables, which begin with them."""
_ACCEPTS = 0x10000
"""Flag of a listening Unix socket."""


def processes_serving() -> int | None:
    """Processes that listen where this one does and have its parent, itself included.

    None where that can't be seen, or where this one doesn't listen (yet).
    """
    try:
        listening = dict(_listening())
        own = {listening[inode] for inode in _sockets("self") if inode in listening}
        siblings = _children(os.getppid()) - {str(os.getpid())}
        own_command = (_PROC / "self" / "cmdline").read_bytes()
    except OSError:
        return None
    if not own:
        return None
    return 1 + sum(_listens_with(pid, own, listening, own_command) for pid in siblings)


def _listens_with(pid: str, addresses: set[str], listening: dict[str, str], own_command: bytes) -> bool:
    try:
        return any(listening.get(inode) in addresses for inode in _sockets(pid))
    except PermissionError:  # of a server that has given up its rights: then what was forked is alike
        return _command(pid) == own_command
    except OSError:
        return False  # it has ended


def _command(pid: str) -> bytes:
    try:
        return (_PROC / pid / "cmdline").read_bytes()
    except OSError:
        return b""


def _children(parent: int) -> set[str]:
    tasks = (_PROC / str(parent) / "task").iterdir()
    return {pid for task in tasks for pid in (task / "children").read_text().split()}


def _sockets(pid: str) -> Iterator[str]:
    """The inodes of a process's open sockets."""
    for file in (_PROC / pid / "fd").iterdir():
        try:
            kind, _, inode = str(file.readlink()).partition(":")
        except FileNotFoundError:
            continue  # closed meanwhile
        if kind == "socket":
            yield inode.strip("[]")


def _listening() -> Iterator[tuple[str, str]]:
    """Each listening socket's inode and where it listens: several may share a port."""
    for table in _TABLES:
        with (_PROC / "self" / "net" / table).open() as rows:
            next(rows)
            for row in rows:
                fields = row.split()
                if fields[3] != _LISTENS:
                    break
                yield fields[9], f"{table} {fields[1]}"
    with (_PROC / "self" / "net" / "unix").open() as rows:
        next(rows)
        for row in rows:
            fields = row.split()
            if int(fields[3], 16) & _ACCEPTS:
                yield fields[6], f"unix {fields[6]}"
