"""The commands of `ratelimit-mw`: what each takes, and how each ends."""

import logging
import re
from collections.abc import Sequence
from typing import Annotated

import typer

from ratelimit_mw._internal.backends.rights import missing_rights
from ratelimit_mw._internal.cli import check as check_command
from ratelimit_mw._internal.cli import counts, keys, sources
from ratelimit_mw._internal.cli.apps import import_app
from ratelimit_mw._internal.cli.audit import audit
from ratelimit_mw._internal.cli.callers import NamedCaller
from ratelimit_mw._internal.cli.completion import (
    complete_account,
    complete_caller,
    complete_file,
    completing_in_bash,
)
from ratelimit_mw._internal.cli.examples import with_examples
from ratelimit_mw._internal.cli.explain import explain as explain_request
from ratelimit_mw._internal.cli.key_commands import add_key_commands
from ratelimit_mw._internal.cli.options import AppFolder, AppName, Json, SettingsFile
from ratelimit_mw._internal.cli.output import (
    AWAY,
    MISUSED,
    REFUSED,
    CommandError,
    console,
    escape_what_is_not_in_encoding,
    print_error,
    print_json,
    print_notes,
    take_notes,
)
from ratelimit_mw._internal.cli.routes import routes
from ratelimit_mw._internal.cli.top import top
from ratelimit_mw._internal.demo import app as demo_api
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.runtime.compiled import build_text
from ratelimit_mw._internal.settings import SettingsError
from ratelimit_mw._internal.settings.schema import json_schema

app = typer.Typer(
    help="Check the rate limits of an app; see and clear what it has counted.",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    **with_examples(""),
)
keys_app = typer.Typer(
    help="Set, list, remove and hash API keys.",
    invoke_without_command=True,
    rich_markup_mode=None,
    **with_examples("keys"),
)
app.add_typer(keys_app, name="keys")
app.command(**with_examples("routes"))(routes)
app.command(**with_examples("top"))(top)
app.command(**with_examples("audit"))(audit)
add_key_commands(keys_app)

CallerName = Annotated[
    str | None,
    typer.Argument(
        metavar="CALLER",
        autocompletion=complete_caller,
        help="A caller's name (k:…, a:…, ip:…) or the beginning of one, an API key, its hash, an address "
        "or an account; - reads it from standard input.",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="KEY",
        autocompletion=complete_caller,
        help="An API key, its hash, a caller's name or the beginning of one, or - for standard input.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="ADDRESS", help="The client address of a caller without a known key."),
]
Account = Annotated[
    str | None,
    typer.Option(
        "--account",
        metavar="ACCOUNT",
        autocompletion=complete_account,
        help="An account that known keys belong to.",
    ),
]


_LOGIN = re.compile(r"NOAUTH|WRONGPASS|invalid username-password|invalid password|Authentication required")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Without `arguments`, those of the process."""
    # A command says in one line what is wrong; what the library logs would only say it twice.
    logging.getLogger("ratelimit_mw").addHandler(logging.NullHandler())
    take_notes()
    escape_what_is_not_in_encoding()
    try:
        with completing_in_bash():
            status = app(arguments, prog_name="ratelimit-mw", standalone_mode=False)
    except SettingsError as error:
        more = len(error.problems) - 1
        hint = f" (and {more} more: ratelimit-mw check)" if more else ""
        return _failed(f"{error.problems[0]}{hint}", REFUSED)
    except BackendError as error:
        return _failed(_backend_failure(str(error)), AWAY)
    except CommandError as error:
        return _failed(str(error), error.status)
    except typer.TyperException as error:
        return _failed(error.format_message(), MISUSED)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:  # noqa: BLE001 - whoever is on call at night gets a line, never a traceback
        return _failed(f"{type(error).__name__}: {error}", REFUSED)
    if not status:
        print_notes()
    return int(status or 0)


def print_version(asked: bool) -> None:
    """Print what is installed, and end."""
    if asked:
        console.out(f"ratelimit-mw {build_text()}", highlight=False)
        raise typer.Exit


def _failed(text: str, status: int) -> int:
    """Print the one line that a command fails with, what was noted included; returns its exit status."""
    print_error(" ".join([text, *(f"({each})" for each in take_notes())]))
    return status


def _backend_failure(reason: str) -> str:
    settings = sources.last_loaded()
    gives_them = None if settings is None else missing_rights(reason, settings.backend)
    if gives_them is not None:
        return f"rights are missing in the backend: {reason}. This command gives them: {gives_them}"
    if _LOGIN.search(reason):
        return f"the backend refuses the login of backend.url: {reason}"
    return f"the backend is away: {reason}"


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


@app.command(**with_examples("check"))
def check(
    file: Annotated[
        str | None,
        typer.Argument(
            autocompletion=complete_file,
            help="The settings file. Default: $RATELIMIT_SETTINGS, else ratelimit.toml here.",
        ),
    ] = None,
    settings: SettingsFile = None,
    app_name: AppName = None,
    app_dir: AppFolder = ".",
    json: Json = False,
) -> None:
    """Check a settings file as the app would load it; with --app, also its amounts for limits in code."""
    mounted = None if app_name is None else import_app(app_name, app_dir)
    raise typer.Exit(check_command.check(sources.settings_file(file or settings), mounted, as_json=json))


@app.command(**with_examples("schema"))
def schema() -> None:
    """Print the JSON schema of the settings file, for editors.

    Editors use it to complete and check a file that begins with `#:schema ./ratelimit.schema.json`.
    """
    print_json(json_schema())


@app.command(**with_examples("explain"))
def explain(  # noqa: PLR0913, PLR0917 - an option each
    method: Annotated[str, typer.Argument(help="The method, such as GET; a WebSocket handshake is a GET.")],
    path: Annotated[str, typer.Argument(help="The path as the app sees it, such as /v1/predictions.")],
    key: Key = None,
    address: Address = None,
    settings: SettingsFile = None,
    app_name: AppName = None,
    app_dir: AppFolder = ".",
    json: Json = False,
) -> None:
    """Say which limits apply to a request, and why; with --app, also limits in the app's code.

    Charges nothing, and works while the backend is away.
    """
    mounted = None if app_name is None else import_app(app_name, app_dir)
    limiter = Limiter(sources.load(settings))
    explain_request(limiter, (method, path), NamedCaller(key, address), mounted, as_json=json)


@app.command(**with_examples("show"))
def show(  # noqa: PLR0913, PLR0917 - an option each
    caller: CallerName = None,
    key: Key = None,
    address: Address = None,
    account: Account = None,
    settings: SettingsFile = None,
    app_name: AppName = None,
    app_dir: AppFolder = ".",
    json: Json = False,
) -> None:
    """Show what a caller has used, holds and has left; with --app, also of limits in the app's code.

    Without a caller: the state of the limits that all callers share.
    """
    mounted = None if app_name is None else import_app(app_name, app_dir)
    counts.show(
        sources.load_usable(settings), NamedCaller(key, address, account, caller), mounted, as_json=json
    )


@app.command(**with_examples("reset"))
def reset(  # noqa: PLR0913, PLR0917 - an option each
    caller: CallerName = None,
    key: Key = None,
    address: Address = None,
    account: Account = None,
    settings: SettingsFile = None,
    app_name: AppName = None,
    app_dir: AppFolder = ".",
    json: Json = False,
) -> None:
    """Clear the counts of a caller; with --app, also those of limits in the app's code.

    Clears its requests, its slots, and its spending of this day and month.
    """
    mounted = None if app_name is None else import_app(app_name, app_dir)
    counts.reset(
        sources.load_usable(settings), NamedCaller(key, address, account, caller), mounted, as_json=json
    )


@keys_app.command("hash", **with_examples("hash"))
def hash_key(
    key: Annotated[str, typer.Argument(help="An API key, or - to read it from standard input.")],
    settings: SettingsFile = None,
    json: Json = False,
) -> None:
    """Print the hash of an API key.

    The hash is for `hash` of [[keys]] in the settings. Logs and the backend show the same hash.
    """
    api_key_hash = keys.hash_key(sources.load_usable(settings), key)
    if json:
        print_json({"hash": api_key_hash})
    else:
        console.out(api_key_hash, highlight=False)


@app.command(**with_examples("demo"))
def demo(
    port: Annotated[int, typer.Option("--port", min=0, max=65_535, help="Port on 127.0.0.1.")] = 8000,
    token: Annotated[
        str, typer.Option("--token", metavar="TOKEN", help="Token of the dashboard. Default: a new one.")
    ] = "",
    traffic: Annotated[
        bool, typer.Option("--traffic/--no-traffic", help="Whether simulated callers send requests.")
    ] = True,
) -> None:
    """Run a sample API with its dashboard, and print what to try.

    The demo counts in memory and needs no Redis. Ctrl-C ends it.
    """
    demo_api.run(port, token, traffic=traffic)
