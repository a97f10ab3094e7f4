"""The command line `ratelimit-mw`. This file alone needs none of the packages of the extra `cli`.

- `commands.py`, `key_commands.py`: the commands, with their parameters and help (`options.py`,
  `examples.py`).
- A module for each: `check.py`, `routes.py`, `explain.py`, `counts.py` (`show` and `reset`), `keys.py`,
  `audit.py`, `top.py` (its table is in `top_table.py`, its keys in `keyboard.py`).
- `sources.py`, `apps.py`: the settings and the app that a command is about.
- `callers.py`, `names.py`: the callers that it is about. `completion.py`: names for the shell.
- `output.py`, `texts.py`: what it prints. `durations.py`: times. `recording.py`: changes, for `audit`.
"""

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
