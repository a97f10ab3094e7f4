"""The FastAPI example under Schemathesis: whatever it is sent, it answers as its schema says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import StartApp

pytestmark = [pytest.mark.rerun, pytest.mark.once]

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
def test_example_answers_as_its_schema_says(start_app: StartApp, tmp_path: Path) -> None:
    """No input is a server error, and every answer, refusals included, is one that the schema describes.

    A key without a budget sends sixty requests a minute at most, so that many of them are refused.
    """
    app = start_app("examples.fastapi_app:app")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{app.url}/openapi.json"),
        *("--header", "X-API-Key: anybody", "--checks", CHECKS, "--max-examples", "15", "--seed", "1"),
        *("--generation-database", "none", "--request-timeout", "15", "--no-color"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stdout
    assert "429 Too Many Requests" in done.stdout
    found = re.search(r"(\d+) generated", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) > 60
