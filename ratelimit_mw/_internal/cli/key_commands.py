"""Commands `ratelimit-mw keys set`, `list` and `remove`, with their parameters."""

from typing import Annotated

import typer

from ratelimit_mw._internal.cli import keys
from ratelimit_mw._internal.cli.completion import complete_caller, complete_plan
from ratelimit_mw._internal.cli.durations import parse_duration
from ratelimit_mw._internal.cli.examples import with_examples
from ratelimit_mw._internal.cli.options import Json, SettingsFile
from ratelimit_mw._internal.cli.sources import load_usable
from ratelimit_mw._internal.policy.key_entry import KeyEntry

Keys = Annotated[
    list[str],
    typer.Argument(
        metavar="KEY",
        autocompletion=complete_caller,
        help="API keys, their hashes, names of callers or beginnings of them, networks or addresses, or - to "
        "read one from standard input.",
    ),
]


def add_key_commands(app: typer.Typer) -> None:
    """Add the commands to those of `ratelimit-mw keys`."""
    app.command("set", **with_examples("set"))(set_keys)
    app.command("list", **with_examples("list"))(list_keys)
    app.command("remove", **with_examples("remove"))(remove_keys)


def set_keys(  # noqa: PLR0913, PLR0917 - an option each
    keys_: Keys,
    plan: Annotated[
        str,
        typer.Option("--plan", metavar="PLAN", autocompletion=complete_plan, help="A plan of the settings."),
    ],
    account: Annotated[
        str | None, typer.Option("--account", metavar="ACCOUNT", help="The account the keys belong to.")
    ] = None,
    requests: Annotated[
        list[str] | None,
        typer.Option(
            "--requests",
            metavar="RATE",
            help="A rate in place of the plan's, such as 100/minute; repeat the option for several.",
        ),
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option("--concurrent", metavar="N", help="Slots in place of the plan's.")
    ] = None,
    daily: Annotated[
        str | None,
        typer.Option("--daily", metavar="AMOUNT", help="A daily budget, in place of the plan's budget."),
    ] = None,
    monthly: Annotated[
        str | None,
        typer.Option("--monthly", metavar="AMOUNT", help="A monthly budget, in place of the plan's budget."),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option("--label", metavar="TEXT", help="A text that is shown beside the keys' names."),
    ] = None,
    units: Annotated[
        list[str] | None,
        typer.Option(
            "--units",
            metavar="UNIT=RATE",
            help="A rate of a metered unit, such as tokens=200000/minute, in place of all of the plan's; "
            "repeat the option for several.",
        ),
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="DURATION",
            help="How long the change lasts, such as 30m, 2h or 1d12h; then what held before applies again.",
        ),
    ] = None,
    settings: SettingsFile = None,
    json: Json = False,
) -> None:
    """Give API keys a plan and limits of their own, or callers of a network a plan, live.

    Replaces what was set live before, and what the settings say of the same keys. A key keeps its account
    and its label unless new ones are given. Every worker uses the change within 2 seconds; counts are kept.
    Several keys are set together: all or none.
    """
    seconds = None if for_ is None else parse_duration(for_)
    entry = KeyEntry(
        plan, account, requests or None, concurrent, daily, monthly, label, keys.read_units(units)
    )
    keys.set_keys(load_usable(settings), keys_, entry, seconds, as_json=json)


def list_keys(settings: SettingsFile = None, json: Json = False) -> None:
    """List the API keys and networks that are set live and those in the settings.

    Limits that they have in place of their plan's are shown beside them.
    """
    keys.list_keys(load_usable(settings), as_json=json)


def remove_keys(keys_: Keys, settings: SettingsFile = None, json: Json = False) -> None:
    """Take back what was set live for API keys or networks.

    Then they have what the settings say of them, or are unknown. Counts are kept.
    """
    keys.remove_keys(load_usable(settings), keys_, as_json=json)
