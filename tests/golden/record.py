"""Record the golden answers anew, from the code as it is: `python -m tests.golden.record`.

The file of a scenario has a line for each request: its trace, which is the same on each of its backends.
"""

import asyncio
import json
import tempfile
from pathlib import Path

from tests.golden.scenarios import SCENARIOS, Scenario
from tests.golden.world import Trace, answers
from tests.support.servers import StoreServer

FOLDER = Path(__file__).parent / "answers"


def recorded(scenario: Scenario) -> list[Trace]:
    """Read what was recorded of a scenario."""
    traces: list[Trace] = json.loads(_file_of(scenario).read_text())
    return traces


def _file_of(scenario: Scenario) -> Path:
    return FOLDER / f"{scenario.name}.json"


def _record(scenario: Scenario, server: StoreServer) -> None:
    server.empty()
    urls = [None if backend == "memory" else server.url for backend in scenario.backends]
    traces, *others = [asyncio.run(answers(scenario, url)) for url in urls]
    if any(other != traces for other in others):
        raise SystemExit(f"{scenario}: memory and Redis answer differently")
    lines = ",\n".join(json.dumps(trace, ensure_ascii=False) for trace in traces)
    _file_of(scenario).write_text(f"[\n{lines}\n]\n")


def main() -> None:
    """Play every scenario on each of its backends."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        server = StoreServer("redis", Path(folder))
        server.start()
        try:
            for scenario in SCENARIOS:
                _record(scenario, server)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
