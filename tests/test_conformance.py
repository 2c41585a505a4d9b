"""Other people's programs meet a server: one that reads its description and tries everything, and two more clients.

The first, schemathesis, comes with the `dev` extra. The clients are large; to run their tests too:
`pip install langchain-openai litellm`.
"""

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
MESSAGES = [{"role": "user", "content": "Füße 🚀"}]
ECHO = "user\nFüße 🚀"


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


def test_langchain(toy: Server) -> None:
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    chat = chat_openai(base_url=toy.url + "/v1", api_key="-", model="toy", max_retries=0)
    answer = chat.invoke([("user", MESSAGES[0]["content"])])
    assert answer.content == ECHO and answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream([("user", MESSAGES[0]["content"])])) == ECHO


def test_litellm(toy: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network for prices
    completion = pytest.importorskip("litellm").completion
    ask = {"model": "openai/toy", "api_base": toy.url + "/v1", "api_key": "-", "messages": MESSAGES}
    assert completion(**ask).choices[0].message.content == ECHO
    pieces = [chunk.choices[0].delta.content or "" for chunk in completion(**ask, stream=True)]
    assert "".join(pieces) == ECHO
