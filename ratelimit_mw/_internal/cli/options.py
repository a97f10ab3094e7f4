"""Options that several commands take."""

from typing import Annotated

import typer

from ratelimit_mw._internal.cli.completion import complete_file

SettingsFile = Annotated[
    str | None,
    typer.Option(
        "--settings",
        metavar="FILE",
        autocompletion=complete_file,
        help="The settings file. Default: $RATELIMIT_SETTINGS, else ratelimit.toml here.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AppName = Annotated[
    str | None,
    typer.Option(
        "--app",
        metavar="MODULE:APP",
        help="An app such as main:app, whose limits in code are included. It is imported, and not run.",
    ),
]
AppFolder = Annotated[
    str, typer.Option("--app-dir", metavar="FOLDER", help="The folder that the app is imported from.")
]
