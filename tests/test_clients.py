"""Other people's clients meet a server: langchain with its own standard tests, litellm, lm-eval, SGLang's frontend.

They are large, so they are no part of the `dev` extra, and what is not there is skipped:
`pip install -e ".[dev,clients]" && pytest tests/test_clients.py`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_server import Server, start_toy
from test_tools import CALL

TEMPLATE = str(Path(__file__).with_name("data") / "toy_tools.jinja")
MESSAGES = [{"role": "user", "content": "Füße 🚀"}]
# what a model would make of the questions in langchain's tests
WISHES = {
    "magic_function(3)": CALL % ("magic_function", '{"input": 3}'),
    "magic_function_no_args()": CALL % ("magic_function_no_args", "{}"),
    "你好啊集团": CALL % ("unicode_customer", '{"customer_name": "你好啊集团", "description": "x"}'),
    "こんにちは株式会社": CALL % ("unicode_customer", '{"customer_name": "こんにちは株式会社", "description": "x"}'),
    "weather in San Francisco": CALL % ("get_weather", '{"location": "San Francisco"}'),
    "Pirate greeting": CALL % ("greeting_generator", '{"answer_style": "Pirate"}'),
    "a JSON with 'setup' and": '{"setup": "Why?", "punchline": "Because."}',
    "joke": '{"setup": "Why?", "punchline": "Because."}',
    "Füße": "Schuhe 🚀",
    "Hello": "Hello there.",
}


@pytest.fixture(scope="module")
def toy() -> Iterator[Server]:
    os.environ["TOY_WISHES"] = json.dumps(WISHES)
    try:
        server = start_toy(chat_template=TEMPLATE, context_length=100_000)
    finally:
        del os.environ["TOY_WISHES"]
    yield server
    assert server.end() == 0, "".join(server.lines)


try:
    from langchain_openai import ChatOpenAI
    from langchain_tests.integration_tests import ChatModelIntegrationTests
except ImportError:
    ChatModelIntegrationTests = None

if ChatModelIntegrationTests is not None:

    @pytest.mark.asyncio(loop_scope="module")  # langchain keeps its connections, which belong to a loop
    class TestLangchain(ChatModelIntegrationTests):
        """langchain's standard tests. What is not claimed below is skipped: pictures, PDF files, sound."""

        @pytest.fixture(autouse=True, scope="class")
        @classmethod
        def server(cls, toy: Server) -> None:
            cls.url = toy.url + "/v1"

        @property
        def chat_model_class(self) -> type[ChatOpenAI]:
            return ChatOpenAI

        @property
        def chat_model_params(self) -> dict[str, Any]:
            return {"base_url": self.url, "api_key": "-", "model": "toy", "max_retries": 0, "stream_usage": True}

        @property
        def supports_json_mode(self) -> bool:
            return True

        @property
        def supports_model_override(self) -> bool:
            return True

        @property
        def model_override_value(self) -> str:
            return "toy"

    class TestLangchainByFunctions(TestLangchain):
        """The same with structured output by function calling, langchain's other way."""

        @property
        def structured_output_kwargs(self) -> dict[str, Any]:
            return {"method": "function_calling"}


def test_litellm(toy: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network for prices
    completion = pytest.importorskip("litellm").completion
    ask = {"model": "openai/toy", "api_base": toy.url + "/v1", "api_key": "-", "messages": MESSAGES}
    assert completion(**ask).choices[0].message.content == "Schuhe 🚀"
    pieces = [chunk.choices[0].delta.content or "" for chunk in completion(**ask, stream=True)]
    assert "".join(pieces) == "Schuhe 🚀"
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
    called = completion(**ask, tools=tools, tool_choice="required").choices[0]
    assert (called.finish_reason, called.message.tool_calls[0].function.name) == ("tool_calls", "now")
