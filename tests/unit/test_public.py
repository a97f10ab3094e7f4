"""Tests of files that the repository's host and contributors' tools read.

The files are workflows, templates, hooks and public pages.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from ratelimit_mw import __version__
from tests.support.apps import ROOT

pytestmark = pytest.mark.once

HOST = ROOT / ".github"
WORKFLOWS = sorted((HOST / "workflows").glob("*.yml"))
CHECKED = {
    "vendor.github-workflows": WORKFLOWS,
    "vendor.github-issue-forms": [
        HOST / "ISSUE_TEMPLATE" / "bug.yml",
        HOST / "ISSUE_TEMPLATE" / "feature.yml",
    ],
    "vendor.github-issue-config": [HOST / "ISSUE_TEMPLATE" / "config.yml"],
    "vendor.dependabot": [HOST / "dependabot.yml"],
}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def jobs(workflow: Path) -> dict[str, Any]:
    """The jobs of a workflow by name."""
    found: dict[str, Any] = yaml.safe_load(workflow.read_text())["jobs"]
    return found


def steps(workflow: Path) -> list[dict[str, Any]]:
    """All steps of a workflow."""
    return [step for job in jobs(workflow).values() for step in job.get("steps", ())]


@pytest.mark.parametrize("schema", CHECKED)
def test_files_of_the_host_follow_their_schema(schema: str) -> None:
    """Each name in them is one that the repository's host knows."""
    files = [str(file.relative_to(ROOT)) for file in CHECKED[schema]]
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_few_rights_and_an_end(workflow: Path) -> None:
    """Jobs read and no more unless they say so, end by themselves, and run no stranger's code with rights."""
    whole = yaml.safe_load(workflow.read_text())
    assert whole["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in whole[True], "`on`, which YAML reads as a truth"
    for job in jobs(workflow).values():
        assert "timeout-minutes" in job or "uses" in job
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        # What a pull request may choose, such as its title, never becomes a part of a script.
        assert "${{ github." not in step.get("run", "")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_every_value_that_a_workflow_reads_is_there(workflow: Path) -> None:
    """Outputs are those of a step that has the name, needed jobs exist, and so do all `make` targets."""
    text = workflow.read_text()
    names = set(jobs(workflow))
    identified = {step["id"] for step in steps(workflow) if "id" in step}
    assert set(re.findall(r"\bsteps\.(\w+)\.", text)) <= identified
    assert set(re.findall(r"\bneeds\.(\w+)\.", text)) <= names
    for job in jobs(workflow).values():
        matrix = job.get("strategy", {}).get("matrix", {})
        used = set(re.findall(r"matrix\.(\w+)", yaml.safe_dump(job)))
        assert used <= set(matrix)
        assert {job["needs"]} <= names if "needs" in job else True
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"run: make ([\w-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_declared_python_is_tested() -> None:
    """The workflow runs the tests on each Python that the package declares."""
    declared = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    workflow = HOST / "workflows" / "test.yml"
    (first,) = re.findall(r'python-version: "([\d.]+)"', workflow.read_text())
    others = jobs(workflow)["pythons"]["strategy"]["matrix"]["python"]
    assert {first, *others} >= set(declared)


def test_a_release_needs_no_secret() -> None:
    """The index believes the workflow itself: trusted publishing."""
    text = (HOST / "workflows" / "release.yml").read_text()
    assert "secrets." not in text
    assert jobs(HOST / "workflows" / "release.yml")["publish"]["permissions"]["id-token"] == "write"


def test_hooks_of_pre_commit_can_be_read() -> None:
    """The hooks for contributors, and the one for users, are as pre-commit wants them."""
    for command, file in (
        ("validate-config", ".pre-commit-config.yaml"),
        ("validate-manifest", ".pre-commit-hooks.yaml"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "pre_commit", command, file],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_users_have_their_settings_checked_at_each_commit(tmp_path: Path) -> None:
    """The hook passes good files, and fails and says why where one of several is bad."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    (tmp_path / "ratelimit.toml").write_text('[plans.default]\nrequests = ["5/minute"]\n')
    (tmp_path / "ratelimit-two words.toml").write_text('[plans.default]\nrequest = ["5/minute"]\n')
    assert all(re.search(hook["files"], str(path.relative_to(tmp_path))) for path in tmp_path.iterdir())
    assert re.search(hook["files"], "conf/ratelimit.prod.toml")
    assert not re.search(hook["files"], "pyproject.toml")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    outcomes = []
    for files in (["ratelimit.toml"], ["ratelimit-two words.toml", "ratelimit.toml"]):
        done = subprocess.run(
            [*shlex.split(hook["entry"]), *files],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        outcomes.append((done.returncode, "plans.default.request" in done.stderr))
    assert outcomes == [(0, False), (1, True)]


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md"])
def test_public_pages_lead_somewhere(name: str) -> None:
    """Each link into the repository is one to a file that is there."""
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!https://|#)([^)#]+)", text):
        assert (ROOT / target).exists(), target


def test_the_changelog_begins_with_the_version() -> None:
    """Its first heading is the version of the package."""
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings == [__version__]
