"""Carries out the steps of a Dockerfile in an empty folder without Docker: this machine is the base image."""

import os
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from e2b_dockerfile_utils import DockerfileInstruction, PatternMatcher, parse_dockerfile_ast

STEP_SECONDS = 600.0
# How this machine reaches its package index is not a part of an image.
FROM_THE_MACHINE = ("PIP_", "SSL_", "REQUESTS_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


@dataclass(slots=True)
class Stage:
    """One stage of a build: its file system below a folder, and what its last steps left in force."""

    root: Path
    workdir: str = "/"
    environment: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    command: list[str] = field(default_factory=list)
    health_check: list[str] = field(default_factory=list)

    def place(self, path: str) -> Path:
        """The place on this machine of a path inside."""
        return self.root / self.workdir.lstrip("/") / path if path[0] != "/" else self.root / path[1:]

    @property
    def folder(self) -> Path:
        """The working directory."""
        return self.place(".")


def copy_context(source: Path, target: Path) -> None:
    """Copy what `.dockerignore` lets into a build."""
    lines = [line.strip() for line in (source / ".dockerignore").read_text().splitlines()]
    matcher = PatternMatcher([line for line in lines if line and not line.startswith("#")])
    for folder, folders, files in os.walk(source):
        here = Path(folder).relative_to(source)
        # Environments and histories are large; nothing brings back a part of them.
        folders[:] = [name for name in folders if name[0] != "." or not matcher.matches(str(here / name))]
        for name in files:
            if not matcher.matches(str(here / name)):
                (target / here).mkdir(parents=True, exist_ok=True)
                shutil.copy(source / here / name, target / here / name)


def build(dockerfile: Path, context: Path, folder: Path) -> Stage:
    """Carry out all steps; returns the last stage, whose file system is in `folder / "root"`.

    Each stage is made at that same place and moved away after it: what one stage writes into its files about
    their place is true in the next one too, as it is in a container.
    """
    root = folder / "root"
    stages: dict[str, Stage] = {}
    stage, name = Stage(root), ""
    for step in parse_dockerfile_ast(dockerfile.read_text()).instructions:
        if step.name == "FROM":
            if name:
                stages[name] = stage
                stage.root = root.rename(folder / name)
            root.mkdir(parents=True)
            stage = Stage(root, environment=_base_environment())
            name = step.args[2] if len(step.args) == 3 else f"stage-{len(stages)}"
        else:
            _carry_out(step, stage, context, stages)
    return stage


def _base_environment() -> dict[str, str]:
    """The environment that a container of Python's image starts with, as far as it matters."""
    own = {name: value for name, value in os.environ.items() if name.upper().startswith(FROM_THE_MACHINE)}
    return own | {"PATH": f"{Path(sys.base_prefix, 'bin')}:/usr/bin:/bin", "HOME": "/nonexistent"}


def _carry_out(step: DockerfileInstruction, stage: Stage, context: Path, stages: dict[str, Stage]) -> None:
    match step.name:
        case "WORKDIR":
            stage.workdir = step.args[0]
            stage.folder.mkdir(parents=True, exist_ok=True)
        case "ENV":
            for name, value in zip(step.args[::3], step.args[1::3], strict=True):
                here = value.replace(stage.workdir, str(stage.folder))
                stage.environment[name] = string.Template(here).substitute(stage.environment)
        case "COPY":
            _copy(step, stage, context, stages)
        case "RUN":
            done = subprocess.run(
                ["sh", "-c", step.args[0]],
                cwd=stage.folder,
                env=stage.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=STEP_SECONDS,
                check=False,
            )
            assert done.returncode == 0, f"{step.original}\n{done.stdout}"
        case "USER":
            stage.user = step.args[0]
        case "CMD":
            stage.command = step.args
        case "HEALTHCHECK":
            assert step.args[0] == "CMD"
            stage.health_check = step.args[1:]
        case "EXPOSE":
            pass  # says something to readers only
        case _:
            raise AssertionError(f"this test can't carry out {step.original}")


def _copy(step: DockerfileInstruction, stage: Stage, context: Path, stages: dict[str, Stage]) -> None:
    *sources, target = step.args
    origins = [stages[flag.removeprefix("--from=")] for flag in step.flags]
    for each in sources:
        source = origins[0].place(each) if origins else context / each
        place = stage.place(target)
        if source.is_dir():
            shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy(source, place / source.name if target.endswith("/") else place)
