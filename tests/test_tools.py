"""Tools and thoughts as the official client meets them: a real server, whose answers the questions bring along."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel
from test_server import Server, start_toy

CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
THOUGHTS = "<think>\nA tool, then.\n</think>\n\n"


class GetWeather(BaseModel):
    """The weather in a city."""

    city: str
    days: int


class Answer(BaseModel):
    """What was asked for."""

    city: str
    warm: bool


WEATHER = openai.pydantic_function_tool(GetWeather)
NOW = {"type": "function", "function": {"name": "now"}}
PARIS = CALL % ("GetWeather", '{"city": "Paris \\"}\\" <tool_call>", "days": 3}')


@pytest.fixture(scope="module")
def toy() -> Iterator[Server]:
    template = str(Path(__file__).with_name("data") / "toy_tools.jinja")
    server = start_toy(chat_template=template, reasoning_parser="qwen3")
    yield server
    assert server.end() == 0, "".join(server.lines)


@pytest.fixture
def client(toy: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=toy.url + "/v1", api_key="-", max_retries=0, _strict_response_validation=True)


def say(text: str, **more: object) -> dict:
    """A request whose answer is this text."""
    return {"model": "toy", "messages": [{"role": "user", "content": f"SAY({text})SAY"}]} | more


def put_together(client: openai.OpenAI, **request: object) -> ChatCompletion:
    """What the client's own helper makes of a stream."""
    with client.chat.completions.stream(**request) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion()


def told(completion: ChatCompletion) -> tuple:
    """What matters of an answer."""
    (choice,) = completion.choices
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or []]
    thoughts = getattr(choice.message, "reasoning_content", None)
    return choice.finish_reason, choice.message.content, thoughts, calls


ANSWERS = {
    "text": ("Just text.", ("stop", "Just text.", None, [])),
    "call": (PARIS, ("tool_calls", None, None, [("GetWeather", {"city": 'Paris "}" <tool_call>', "days": 3})])),
    "thoughts": (THOUGHTS + "None needed.", ("stop", "None needed.", "A tool, then.", [])),
    "everything": (
        f"{THOUGHTS}Let me see.\n{CALL % ('now', '{}')}\n{CALL % ('now', '{}')}",
        ("tool_calls", "Let me see.", "A tool, then.", [("now", {}), ("now", {})]),
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_whole_and_streamed(client: openai.OpenAI, name: str) -> None:
    text, expected = ANSWERS[name]
    request = say(text, tools=[WEATHER, NOW])
    assert told(client.chat.completions.create(**request)) == expected
    assert told(put_together(client, **request)) == expected
    chunks = list(client.chat.completions.create(**request, stream=True, logprobs=True))
    tokens = [t.token for c in chunks for t in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])]
    assert "".join(tokens) == text
    opening = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert [call.index for call in opening if call.id] == list(range(len(expected[3])))
    assert all(call.function.name is None for call in opening if not call.id)


def test_the_client_parses_arguments_and_answers(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(**say(PARIS, tools=[WEATHER]))
    arguments = parsed.choices[0].message.tool_calls[0].function.parsed_arguments
    assert arguments == GetWeather(city='Paris "}" <tool_call>', days=3)
    parsed = client.chat.completions.parse(
        **say('<think>18?</think>{"city": "Rome", "warm": true}'), response_format=Answer
    )
    assert parsed.choices[0].message.parsed == Answer(city="Rome", warm=True)


def test_an_agent_s_loop(client: openai.OpenAI) -> None:
    request = say(PARIS, tools=[WEATHER, NOW])
    message = client.chat.completions.create(**request).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "SAY(18 degrees)SAY"}
    again = request | {"messages": [*request["messages"], message, result]}
    assert told(client.chat.completions.create(**again)) == ("stop", "18 degrees", None, [])


def test_a_choice_is_obeyed_whatever_the_model_would_say(client: openai.OpenAI) -> None:
    def answer(text: str, choice: object, **more: object) -> tuple:
        request = say(text, tools=[WEATHER, NOW], tool_choice=choice, **more)
        whole = told(client.chat.completions.create(**request))
        assert told(put_together(client, **request)) == whole
        return whole

    named = {"type": "function", "function": {"name": "now"}}
    assert answer("No, thanks.", "auto") == ("stop", "No, thanks.", None, [])
    assert answer(PARIS, "none")[3] == [] and "<tool_call>" not in (answer(PARIS, "none")[1] or "")
    assert answer(PARIS, named) == ("tool_calls", None, None, [("now", {})])
    assert answer("No, thanks.", named) == ("tool_calls", None, None, [("now", {})])
    assert answer(f"{THOUGHTS}No.", named) == ("tool_calls", None, "A tool, then.", [("now", {})])
    finish, content, _, ((name, arguments),) = answer("No, thanks.", "required")
    assert (finish, content) == ("tool_calls", None) and (name == "now" or GetWeather(**arguments))
    twice = f"{PARIS}\n{CALL % ('now', '{}')}"
    assert [len(answer(twice, "auto", parallel_tool_calls=p)[3]) for p in (True, False)] == [2, 1]
    wrong = CALL % ("GetWeather", '{"city": "Rome", "days": "many"}')
    assert answer(wrong, "auto")[3] == [("GetWeather", {"city": "Rome", "days": 0})]
    shape = {"type": "json_schema", "json_schema": {"name": "a", "schema": Answer.model_json_schema()}}
    assert json.loads(answer("No.", "auto", response_format=shape)[1]).keys() == {"city", "warm"}
    assert answer(PARIS, "auto", response_format=shape)[0] == "tool_calls"


def test_thoughts_as_the_client_wants_them(client: openai.OpenAI) -> None:
    request = say(THOUGHTS + "None needed.")
    together = client.chat.completions.create(**request, extra_body={"separate_reasoning": False})
    assert together.choices[0].message.content == THOUGHTS + "None needed."
    chunks = client.chat.completions.create(**request, stream=True, extra_body={"stream_reasoning": False})
    deltas = [c.choices[0].delta for c in chunks]
    assert [d.reasoning_content for d in deltas if hasattr(d, "reasoning_content")] == ["A tool, then."]
    off = client.chat.completions.create(**request, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert told(off)[2] is None, "the prompt says that thinking is over, so tags are text"


def test_going_on_from_a_beginning(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "SAY("}, {"role": "assistant", "content": "abc)SAY"}]
    more = client.chat.completions.create(model="toy", messages=messages, extra_body={"continue_final_message": True})
    assert more.choices[0].message.content.endswith("abc")


DEEP = {"type": "object", "properties": {"a": {"type": "thing"}}}
NO_OBJECT = {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
STRICT = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
BAD = {
    "tools.0.function.parameters": {"tools": [NO_OBJECT]},
    "tools.1.function.parameters": {
        "tools": [NOW, {"type": "function", "function": {"name": "f", "parameters": DEEP}}]
    },
    "tools.0.function.name": {"tools": [{"type": "function", "function": {"name": "no spaces"}}]},
    "tools.0.type": {"tools": [{"type": "web_search"}]},
    "tools": {"tools": [NOW | {"function": {"name": f"f{i}"}} for i in range(129)]},
    "tool_choice": {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    "response_format": {
        "tools": [NOW],
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": DEEP}},
    },
    "regex": {"tools": [NOW], "regex": "("},
    "reasoning_effort": {"reasoning_effort": "high"},
    "chat_template_kwargs.colour": {"chat_template_kwargs": {"colour": 1}},
    "chat_template_kwargs.tools": {"chat_template_kwargs": {"tools": []}},
    "continue_final_message": {"continue_final_message": True},
    "messages.0.role": {"messages": [{"role": "boss", "content": "x"}]},
    "messages.0.content": {"messages": [{"role": "assistant", "content": None}]},
    "messages.0.tool_calls": {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
    "messages.0.tool_call_id": {"messages": [{"role": "tool", "content": "x"}]},
    "messages.0.tool_calls.0.function.arguments": {
        "messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[1]"}}]}]
    },
}


@pytest.mark.parametrize("param", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(toy: Server, param: str, stream: bool) -> None:
    reply = httpx.post(toy.url + "/v1/chat/completions", json=say("x", stream=stream) | BAD[param], timeout=60)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), reply.text
    assert param in error["message"]


def test_a_strict_schema_must_be_enforceable(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": STRICT, "strict": True}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        client.chat.completions.create(**say("x", tools=[tool]))
    del tool["function"]["strict"]
    assert client.chat.completions.create(**say("x", tools=[tool])).choices


def test_without_a_template_for_tools() -> None:
    server = start_toy(tool_call_parser="qwen25")
    try:
        client = openai.OpenAI(
            base_url=server.url + "/v1", api_key="-", max_retries=0, _strict_response_validation=True
        )
        assert told(client.chat.completions.create(**say(PARIS, tools=[WEATHER])))[0] == "tool_calls"
        told_of = httpx.post(server.url + "/v1/chat/completions", json=say("x", tools=[NOW], max_tokens=4_000_000))
        assert int(re.search(r"less prompt (\d+)", told_of.text)[1]) > len("You may call these functions") + 100
    finally:
        assert server.end() == 0
