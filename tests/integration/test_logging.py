"""The recipe of docs/logging.md under real servers: each line has its time, its level and its logger."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.apps import ROOT
from tests.support.processes import HOST, ServerProcess
from tests.support.slots import until

pytestmark = [pytest.mark.rerun, pytest.mark.once]

PAGE = (ROOT / "docs" / "logging.md").read_text(encoding="utf-8")
COMMANDS = {
    each.split()[0]: each
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for each in block.splitlines()
}
# The page names it in a sentence.
COMMANDS["granian"] = f"granian app:app --log-config {re.findall(r'`--log-config (log[^`]+)`', PAGE)[0]}"
# The page's other worker; its class stands in uvicorn, too, where it is deprecated.
UVICORN_WORKER = "gunicorn with uvicorn's worker"
assert "`--worker-class uvicorn_worker.UvicornWorker`" in PAGE
COMMANDS[UVICORN_WORKER] = COMMANDS["gunicorn"].replace("asgi", "uvicorn.workers.UvicornWorker")
ADDRESS = {
    "uvicorn": ["--host", HOST, "--port", "PORT"],
    "gunicorn": ["--bind", f"{HOST}:PORT"],
    "granian": ["--interface", "asgi", "--host", HOST, "--port", "PORT"],
}
APP = """
from starlette.responses import PlainTextResponse

from ratelimit_mw import RateLimitMiddleware

app = RateLimitMiddleware(PlainTextResponse("hello"), settings="ratelimit.toml")
"""
SETTINGS = """
[plans.anonymous]
requests = ["1/minute"]
shadow = true
[plans.nobodys]
requests = ["1/minute"]
"""


class LoggingServer(ServerProcess):
    """A server that the page's command starts in a folder as its reader has it."""

    own_process_group = True

    def __init__(self, server: str, file: str, folder: Path) -> None:
        super().__init__(server, folder)
        (folder / "app.py").write_text(APP)
        (folder / "ratelimit.toml").write_text(SETTINGS)
        shutil.copy(ROOT / "examples" / "logging" / file, folder / "log.json")

    def command(self) -> list[str]:
        """The page's command, on a free port."""
        program, *arguments = shlex.split(COMMANDS[self.name])
        arguments += [each.replace("PORT", str(self.port)) for each in ADDRESS[program]]
        path = Path(sys.executable).with_name(program)
        return [
            "sh",
            "-c",
            f"cd {shlex.quote(str(self.folder))} && exec {shlex.join([str(path), *arguments])}",
        ]

    def answers(self) -> bool:
        """Whether it serves."""
        try:
            return httpx.get(f"http://{HOST}:{self.port}/").text == "hello"
        except httpx.TransportError:
            return False


def logged(server: str, file: str, folder: Path, is_there: Callable[[str], object]) -> str:
    """Run a server until `is_there` holds for its log, and return the log.

    Meanwhile one caller sends more requests than its limit allows.
    """
    process = LoggingServer(server, file, folder)
    process.start()
    try:
        until(lambda: process.answers() and is_there(process.log), 30)
        return process.log
    finally:
        process.stop()


@pytest.mark.parametrize("server", COMMANDS)
def test_each_line_has_time_level_and_logger(server: str, tmp_path: Path) -> None:
    """Warnings and notes of this package are lines like those of everything else."""
    start = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
    warning = rf"{start}WARNING ratelimit_mw: would have been refused"
    note = rf"{start}INFO    ratelimit_mw\.checks: \[plans\.nobodys\]"

    def is_there(text: str) -> bool:
        return all(re.search(line, text, re.MULTILINE) for line in (warning, note))

    lines = logged(server, "plain.json", tmp_path, is_there).splitlines()
    bare = [line for line in lines if not re.match(start, line)]
    assert [line for line in bare if "ratelimit" in line or "refused" in line] == []


def test_uvicorns_worker_logs_as_uvicorn_does(tmp_path: Path) -> None:
    """Under gunicorn, lines of uvicorn's worker about its start and each request are shown, once each."""
    start = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO    uvicorn\."
    lines = (rf"{start}error: Application startup complete\.$", rf'{start}access: .*"GET / HTTP/1\.1" 200$')

    def is_there(text: str) -> bool:
        return all(re.search(line, text, re.MULTILINE) for line in lines)

    log = logged(UVICORN_WORKER, "plain.json", tmp_path, is_there)
    assert [len(re.findall(line, log, re.MULTILINE)) for line in lines[:1]] == [1]


@pytest.mark.parametrize("server", COMMANDS)
def test_json_lines_have_the_fields_of_each_record(server: str, tmp_path: Path) -> None:
    """A JSON line tells an event in fields, which need not be read out of a message."""

    def records(text: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    def of_shadow(text: str) -> list[dict[str, Any]]:
        return [each for each in records(text) if each.get("ratelimit", {}).get("event") == "shadow"]

    text = logged(server, "json.json", tmp_path, of_shadow)
    shadow = of_shadow(text)[0]
    assert (shadow["level"], shadow["logger"]) == ("WARNING", "ratelimit_mw")
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}$", shadow["time"])
    assert shadow["message"].startswith("would have been refused")
    assert (
        shadow["ratelimit"] | {"plan": "anonymous", "reason": "rate", "limit": "1/minute"}
        == shadow["ratelimit"]
    )
    assert "unreachable-plan" in {each.get("check") for each in records(text)}


def test_the_page_shows_the_file_itself() -> None:
    """Whoever has the page alone can copy the configuration from it."""
    (shown,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert shown == (ROOT / "examples" / "logging" / "plain.json").read_text(encoding="utf-8")


def test_two_lines_in_the_app_do_as_well() -> None:
    """The page's `basicConfig` is one that Python takes, and shows lines as the file does."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    plain = json.loads((ROOT / "examples" / "logging" / "plain.json").read_text())
    assert plain["formatters"]["line"]["format"] in code
    compile(code, "docs/logging.md", "exec")
