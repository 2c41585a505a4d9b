"""A program that reads the server's description and tries everything in it: schemathesis, from the `dev` extra."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_server import Server, start_toy

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection"
)


@pytest.fixture(scope="module")
def toy() -> Iterator[Server]:
    server = start_toy(context_length=200)
    yield server
    assert server.end() == 0, "".join(server.lines)


def test_what_the_description_promises(toy: Server, tmp_path: Path) -> None:
    """Each field of both completion routes, as described and not: no 500, and nothing wrong is taken.

    A body that fits may still be refused, for a model that we do not serve for one.
    """
    program = shutil.which("schemathesis", path=Path(sys.executable).parent) or shutil.which("schemathesis")
    if program is None:
        pytest.skip("needs schemathesis")
    options = (
        f"--checks {CHECKS} --phases coverage --include-path-regex completions --generation-deterministic --no-color"
    )
    command = [program, "run", toy.url + "/openapi.json", *options.split()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr
    tried = re.search(r"(\d+) generated", run.stdout)
    assert tried and int(tried[1]) >= 80
