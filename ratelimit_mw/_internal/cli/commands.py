"""The commands of `ratelimit-mw`: what each takes, and how each ends."""

import logging
from collections.abc import Sequence
from typing import Annotated

import typer

from ratelimit_mw._internal.cli import check as check_command
from ratelimit_mw._internal.cli import counts
from ratelimit_mw._internal.cli.callers import Named, hash_of
from ratelimit_mw._internal.cli.explain import explain as explain_request
from ratelimit_mw._internal.cli.key_commands import add_key_commands
from ratelimit_mw._internal.cli.options import Json, SettingsFile
from ratelimit_mw._internal.cli.output import CommandError, console, print_error, print_json
from ratelimit_mw._internal.cli.routes import routes
from ratelimit_mw._internal.cli.top import top
from ratelimit_mw._internal.demo import app as demo_api
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.model.charge import BackendError
from ratelimit_mw._internal.runtime.compiled import build_text
from ratelimit_mw._internal.settings import Settings, SettingsError

app = typer.Typer(
    help="Check the rate limits of an app; see and clear what it has counted.",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(help="API keys.", invoke_without_command=True, rich_markup_mode=None)
app.add_typer(keys_app, name="keys")
app.command()(routes)
app.command()(top)
add_key_commands(keys_app)

Key = Annotated[
    str | None,
    typer.Option(
        "--key", metavar="KEY", help="An API key, its hash, or - to read the key from standard input."
    ),
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="ADDRESS", help="The client address of who has no known key."),
]
Account = Annotated[
    str | None,
    typer.Option("--account", metavar="ACCOUNT", help="An account that keys in the settings belong to."),
]


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Without `arguments`, those of the process."""
    # A command says in one line what is wrong; what the library logs would only say it twice.
    logging.getLogger("ratelimit_mw").addHandler(logging.NullHandler())
    try:
        status = app(arguments, prog_name="ratelimit-mw", standalone_mode=False)
    except SettingsError as error:
        more = len(error.problems) - 1
        hint = f" (and {more} more: ratelimit-mw check)" if more else ""
        print_error(f"{error.problems[0]}{hint}")
        return 1
    except BackendError as error:
        print_error(f"the backend is away: {error}")
        return 1
    except (CommandError, typer.TyperException) as error:
        print_error(error.format_message() if isinstance(error, typer.TyperException) else str(error))
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:  # noqa: BLE001 - whoever is on call at night gets a line, never a traceback
        print_error(f"{type(error).__name__}: {error}")
        return 1
    return int(status or 0)


def print_version(asked: bool) -> None:
    """Print what is installed, and end."""
    if asked:
        console.out(f"ratelimit-mw {build_text()}", highlight=False)
        raise typer.Exit


@keys_app.callback()
def print_help(context: typer.Context) -> None:
    """Print the help where no command is given."""
    if context.invoked_subcommand is None:
        console.out(context.get_help(), highlight=False)


@app.callback()
def main(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=print_version,
            is_eager=True,
            help="Show the version, the Python that runs it, and whether it is compiled.",
        ),
    ] = False,
) -> None:
    """Print the help where no command is given."""
    print_help(context)


@app.command()
def check(
    file: Annotated[
        str | None, typer.Argument(help="The settings file. Default: $RATELIMIT_SETTINGS.")
    ] = None,
    settings: SettingsFile = None,
    json: Json = False,
) -> None:
    """Check a settings file as the app would load it."""
    raise typer.Exit(check_command.check(file or settings, as_json=json))


@app.command()
def explain(
    method: Annotated[str, typer.Argument(help="Such as GET; a WebSocket handshake is a GET.")],
    path: Annotated[str, typer.Argument(help="Such as /v1/predictions, as the app itself sees it.")],
    key: Key = None,
    address: Address = None,
    settings: SettingsFile = None,
    json: Json = False,
) -> None:
    """Say which limits apply to a request, and why.

    Charges nothing, and works while the backend is away.
    """
    limiter = Limiter.from_settings(settings)
    explain_request(limiter, (method, path), Named(key, address), as_json=json)


@app.command()
def show(
    key: Key = None,
    address: Address = None,
    account: Account = None,
    settings: SettingsFile = None,
    json: Json = False,
) -> None:
    """Show what a caller has used, holds and has left.

    Without a caller: how the limits stand that all callers share.
    """
    counts.show(Settings.load(settings), Named(key, address, account), as_json=json)


@app.command()
def reset(
    key: Key = None,
    address: Address = None,
    account: Account = None,
    settings: SettingsFile = None,
    json: Json = False,
) -> None:
    """Clear what was counted of a caller.

    Its requests, its slots, and its spending of this day and month.
    """
    counts.reset(Settings.load(settings), Named(key, address, account), as_json=json)


@keys_app.command("hash")
def hash_key(
    key: Annotated[str, typer.Argument(help="An API key, or - to read it from standard input.")],
    settings: SettingsFile = None,
    json: Json = False,
) -> None:
    """Print the hash of an API key.

    It is what `hash` of [[keys]] in the settings takes, and what logs and the backend show.
    """
    api_key_hash = hash_of(key, Settings.load(settings))
    if json:
        print_json({"hash": api_key_hash})
    else:
        console.out(api_key_hash, highlight=False)


@app.command()
def demo(
    port: Annotated[int, typer.Option("--port", min=0, max=65_535, help="Port on 127.0.0.1.")] = 8000,
    token: Annotated[
        str, typer.Option("--token", metavar="TOKEN", help="Opens the dashboard; a new one if left out.")
    ] = "",
    traffic: Annotated[
        bool, typer.Option("--traffic/--no-traffic", help="Whether simulated callers keep it busy.")
    ] = True,
) -> None:
    """Run a sample API with its dashboard, and print what to try.

    It counts in memory and needs no Redis. Ctrl-C ends it.
    """
    demo_api.run(port, token, traffic=traffic)
