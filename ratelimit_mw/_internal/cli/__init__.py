"""The command line. This file alone needs none of the packages of the extra `cli`."""

import sys

from ratelimit_mw._internal.runtime.compiled import build_text

_EXTRA = ("typer", "rich", "uvicorn")


def main() -> int:
    """Run `ratelimit-mw` with the arguments of this process; returns its exit status."""
    try:
        from ratelimit_mw._internal.cli.commands import run  # noqa: PLC0415 - may be missing
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        if sys.argv[1:] == ["--version"]:
            sys.stdout.write(f"ratelimit-mw {build_text()}\n")
            return 0
        sys.stderr.write('ratelimit-mw: the command line is an extra: pip install "ratelimit-mw[cli]"\n')
        return 1
    return run()
