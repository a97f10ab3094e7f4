"""Options that several commands take."""

from typing import Annotated

import typer

SettingsFile = Annotated[
    str | None,
    typer.Option(
        "--settings",
        metavar="FILE",
        help="The settings file. Default: $RATELIMIT_SETTINGS, else ratelimit.toml here.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
