"""Other people's clients meet a server: langchain with its own standard tests, litellm, lm-eval, SGLang's frontend.

They are large, so they are no part of the `dev` extra, and what is not there is skipped:
`pip install -e ".[dev,clients]" && pytest tests/test_clients.py`. SGLang itself asks for CUDA; its frontend does not:
`pip install --no-deps sglang && pip install torch triton orjson pybase64 aiohttp requests`.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from campaigns.harness import make_model
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model in Hugging Face's files."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Iterator[Server]:
    """A real engine with that model."""
    small = "--max-running-requests 8 --chunked-prefill-size 64 --page-size 8 --port 0".split()
    command = [sys.executable, "-m", "tpu_mini_sglang.launch_server", "--model-path", str(folder), "--dtype", "float32"]
    server = Server([*command, "--served-model-name", "tiny", *small])
    yield server
    assert server.end() == 0, "".join(server.lines)


DOCS = [{"question": f"{i} and {i + 1} make", "choices": [str(j) for j in range(3)], "answer": i % 3} for i in range(6)]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} a number.",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """lm-eval with our three tasks, which need no network."""
    lm_eval = pytest.importorskip("lm_eval")
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": f"our_{name}"} | common | task))  # JSON is YAML
    manager = import_module("lm_eval.tasks").TaskManager(include_path=str(tmp_path), include_defaults=False)

    def run(model: str, tasks: list[str], **options: Any) -> dict[str, list[Any]]:
        names = [f"our_{name}" for name in tasks]
        found = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
        return {name: [sample["resps"] for sample in found["samples"][f"our_{name}"]] for name in tasks}

    return run


def test_lm_eval_on_completions(tiny: Server, folder: Path, evaluate) -> None:
    """Its likelihoods over our API are those that it computes itself with the same model."""
    where = {"model": "tiny", "base_url": tiny.url + "/v1/completions", "tokenizer": str(folder), "max_length": 256}
    ours = evaluate(
        "local-completions", [*TASKS], model_args=where | {"tokenizer_backend": "huggingface"}, batch_size=3
    )
    theirs = evaluate("hf", [*TASKS], model_args={"pretrained": str(folder), "dtype": "float32"}, device="cpu")
    assert ours["generation"] == theirs["generation"]
    for kind in ("choices", "rolling"):
        for mine, right in zip(ours[kind], theirs[kind], strict=True):  # of each document: of each request: one answer
            mine, right = np.array([a[0] for a in mine], float), np.array([b[0] for b in right], float)
            assert mine.shape == right.shape and (right[..., :1] < -1).all()
            np.testing.assert_allclose(mine, right, atol=1e-3)  # log-likelihood, and in choices whether it is greedy


def test_lm_eval_on_chats(tiny: Server, evaluate) -> None:
    where = {"model": "tiny", "base_url": tiny.url + "/v1/chat/completions"}
    answers = evaluate("local-chat-completions", ["generation"], model_args=where, apply_chat_template=True)
    assert len(answers["generation"]) == len(DOCS) and all("e" not in text for ((text,),) in answers["generation"])


def test_sglang_frontend(tiny: Server) -> None:
    """SGLang's language for programs: text, streams, batches, forks, grammars, choices."""
    sgl = pytest.importorskip("sglang")
    sgl.set_default_backend(backend := sgl.RuntimeEndpoint(tiny.url))
    assert backend.get_server_info()["served_model_name"] == "tiny"

    @sgl.function
    def ask(s, question):
        s += f"Q: {question} A:" + sgl.gen("answer", max_tokens=8, temperature=0)

    def plain(prompt: str) -> str:
        body = {"text": prompt, "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
        return httpx.post(tiny.url + "/generate", json=body, timeout=60).json()["text"]

    questions = ["one?", "two?", "three?"]
    right = [plain(f"Q: {question} A:") for question in questions]
    assert ask.run(question="one?")["answer"] == right[0]
    assert "".join(ask.run(question="one?", stream=True).text_iter("answer")) == right[0]
    batch = ask.run_batch([{"question": question} for question in questions], progress_bar=False)
    assert [state["answer"] for state in batch] == right

    @sgl.function
    def shaped(s):
        s += "Year " + sgl.gen("year", regex="[0-9]{4}", max_tokens=8)
        s += ", count " + sgl.gen("count", dtype=int, max_tokens=8)
        s += ", JSON " + sgl.gen("json", json_schema=SHAPE, max_tokens=64)

    state = shaped.run()
    assert re.fullmatch("[0-9]{4}", state["year"]) and re.fullmatch("[-+]?[0-9]+[ \n]*", state["count"])
    assert type(json.loads(state["json"])["n"]) is int

    @sgl.function
    def forked(s):
        s += "Two words:"
        for i, fork in enumerate(forks := s.fork(2)):
            fork += f" {i}" + sgl.gen("word", max_tokens=2, temperature=0)
        s += forks[0]["word"] + forks[1]["word"]

    assert forked.run().text() == "Two words:" + "".join(plain(f"Two words: {i}")[:2] for i in range(2))
    backend.cache_prefix("Two words:")
    backend.flush_cache()


SHAPE = '{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": false}'


@pytest.mark.parametrize(
    "method", ["token_length_normalized", "greedy_token_selection", "unconditional_likelihood_normalized"]
)
def test_sglang_choices(tiny: Server, method: str) -> None:
    """Of a random model's choices the likeliest by its own likelihoods."""
    sgl = pytest.importorskip("sglang")
    sgl.set_default_backend(sgl.RuntimeEndpoint(tiny.url))

    @sgl.function
    def choose(s):
        s += "It is " + sgl.gen(
            "what", choices=["red", "blue", "green!"], choices_method=getattr(sgl, method), temperature=0
        )

    state = choose.run()
    info = state.get_meta_info("what")
    assert state["what"] in ("red", "blue", "green!") and len(info["input_token_logprobs"]) == 3
    if method == "unconditional_likelihood_normalized":  # what each choice is worth without the question
        without = info["unconditional_token_logprobs"]
        assert [len(row) for row in without] == [len(row) for row in info["input_token_logprobs"]]
    if method == "token_length_normalized":
        best = max(zip(info["normalized_prompt_logprobs"], ["red", "blue", "green!"]))[1]
        assert state["what"] == best
