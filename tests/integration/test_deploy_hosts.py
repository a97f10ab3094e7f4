"""The shipped deployments without Docker: a unit of systemd, and Kubernetes."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ratelimit_mw import Settings
from tests.support.apps import ROOT
from tests.support.pages import blocks

pytestmark = [pytest.mark.rerun, pytest.mark.once]

DEPLOY = ROOT / "examples" / "deploy"
UNIT = (DEPLOY / "api.service").read_text("utf-8").replace("\\\n", "")
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8")))
KINDS: dict[str, Any] = {manifest["kind"]: manifest for manifest in MANIFESTS}
POD: dict[str, Any] = KINDS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
COMMAND = re.findall(r"^CMD (\[.*?\])", (DEPLOY / "Dockerfile").read_text("utf-8"), re.MULTILINE | re.DOTALL)[
    -1
]
WAIT_SECONDS = 60.0


def in_unit(name: str) -> list[str]:
    """Return the values that the unit has under a name."""
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


def option(command: str, name: str) -> float:
    """Return the number that an option of a command has."""
    (value,) = re.findall(rf'{name}[", ]+(\d+)', command)
    return float(value)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path that is short enough for a socket."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def written(folder: Path) -> dict[str, str]:
    """Write the app and the settings of the first steps; returns the environment of the unit."""
    for block in blocks((ROOT / "docs" / "first-steps.md").read_text("utf-8")):
        named = re.match(r"# (app\.py|ratelimit\.toml)\n", block.text)
        if named:
            (folder / named[1]).write_text(block.text, "utf-8")
    variables = dict(line.split("=", 1) for line in in_unit("Environment"))
    variables["RATELIMIT_SETTINGS"] = str(folder / Path(variables["RATELIMIT_SETTINGS"]).name)
    return {**os.environ, "PYTHONPATH": str(ROOT), "RATELIMIT_IDENTITY__HASH_SECRET": "0" * 48, **variables}


def as_here(command: str, folder: Path) -> list[str]:
    """Return a command of the unit with the programs and the folder of this test."""
    program, *rest = shlex.split(command.replace("/run/api/", f"{folder}/"))
    module = {"ratelimit-mw": "ratelimit_mw"}.get(Path(program).name, Path(program).name)
    return [sys.executable, "-m", module, *rest]


def asked(folder: Path, path: str, client: str = "192.0.2.9") -> int:
    """Return the status of an answer through the socket, which is waited for."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(WAIT_SECONDS)
            try:
                connection.connect(str(folder / "api.sock"))
            except OSError:
                assert time.monotonic() < end, "the app does not listen"
                time.sleep(0.1)
                continue
            head = (
                f"GET {path} HTTP/1.1\r\nHost: api\r\nX-Forwarded-For: {client}\r\nConnection: close\r\n\r\n"
            )
            connection.sendall(head.encode())
            return int(connection.makefile("rb").readline().split()[1])


def test_the_unit_serves_on_its_socket(folder: Path) -> None:
    """The unit's commands check the settings, count clients as nginx names them, and end on SIGTERM."""
    environment = written(folder)
    (check,), (start,), (home,) = in_unit("ExecStartPre"), in_unit("ExecStart"), in_unit("WorkingDirectory")
    # The app names its file in code, in the folder that it is started in.
    assert f"RATELIMIT_SETTINGS={home}/ratelimit.toml" in in_unit("Environment")
    subprocess.run(as_here(check, folder), cwd=folder, env=environment, check=True, capture_output=True)
    log = folder / "unit.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            as_here(start, folder),
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        assert asked(folder, "/health") == 200
        # Two workers count in memory, each on its own: of seven, one has met its fourth.
        assert 429 in [asked(folder, "/hello", "192.0.2.1") for _ in range(7)]
        assert asked(folder, "/hello", "192.0.2.2") == 200
        process.send_signal(signal.SIGTERM)
        process.wait(WAIT_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):  # its workers are gone with it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert "Traceback" not in log.read_text("utf-8")


def test_every_process_has_time_to_end() -> None:
    """Whoever stops processes waits for longer than these wait for their last requests."""
    (start,), (stop,) = in_unit("ExecStart"), in_unit("TimeoutStopSec")
    assert float(stop) > option(start, "--timeout-graceful-shutdown")
    sleep = float(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    graceful = option(COMMAND, "--timeout-graceful-shutdown")
    assert POD["terminationGracePeriodSeconds"] > sleep + graceful


def test_the_config_map_is_good(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The settings of the config map load, with the secrets that the deployment adds."""
    (name,) = KINDS["ConfigMap"]["data"]
    file = tmp_path / name
    file.write_text(KINDS["ConfigMap"]["data"][name], "utf-8")
    comment = (DEPLOY / "kubernetes.yaml").read_text("utf-8")
    secrets = dict(re.findall(r"--from-literal=(\w+)=([^\\\s]+)", comment))
    assert set(secrets) == {"RATELIMIT_IDENTITY__HASH_SECRET", "RATELIMIT_BACKEND__URL"}
    for variable, value in secrets.items():
        monkeypatch.setenv(variable, value)
    settings = Settings.load(file)
    (mounted,) = [each["value"] for each in CONTAINER["env"] if each["name"] == "RATELIMIT_SETTINGS"]
    (mount,) = CONTAINER["volumeMounts"]
    assert mounted == f"{mount['mountPath']}/{name}"
    assert "subPath" not in mount
    replicas, workers = KINDS["Deployment"]["spec"]["replicas"], option(COMMAND, "--workers")
    assert settings.backend.local_share == pytest.approx(1 / (replicas * workers), abs=0.01)


def test_probes_are_free() -> None:
    """Each probe asks a route that no limit applies to."""
    (text,) = KINDS["ConfigMap"]["data"].values()
    exempt = [route["path"] for route in tomllib.loads(text)["routes"] if route.get("exempt")]
    probes = [CONTAINER[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    assert [path for path in probes if path not in exempt] == []


def test_the_parts_belong_together() -> None:
    """Service, deployment and disruption budget name the same pods and port."""
    labels = KINDS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert KINDS["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert KINDS["Service"]["spec"]["selector"] == labels
    assert KINDS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    (port,) = CONTAINER["ports"]
    assert KINDS["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert port["containerPort"] == option(COMMAND, "--port")
    names = {KINDS["ConfigMap"]["metadata"]["name"]}
    assert {volume["configMap"]["name"] for volume in POD["volumes"]} == names
