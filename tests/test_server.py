"""A server as its users meet it: processes, sockets, the official client, bad input, and sudden death."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

LINUX = sys.platform == "linux"
TOY = [sys.executable, str(Path(__file__).with_name("toy_server.py"))]
FOREVER = {"prompt": "Hello ", "max_tokens": 3_900_000, "ignore_eos": True}


class Server:
    """A server in processes of its own."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("Ready"):
                self.url = line.split()[-1]
                break
        else:
            raise AssertionError("the server did not start:\n" + "".join(self.lines))
        self.rest = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self.rest.start()

    def children(self) -> list[int]:
        """Process ids of scheduler and detokenizer, in this order."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in pids}
        return [pid for pid, command in commands.items() if "spawn_main" in command]

    def end(self, sign: int = signal.SIGTERM, limit: float = 60) -> int:
        """Send a signal and wait; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sign)
        try:
            code = self.process.wait(limit)
        finally:
            self.process.kill()
        self.rest.join()
        return code


def start_toy(port: int = 0, key: str = "", **fields: object) -> Server:
    return Server([*TOY, str(port), key, *(f"{name}={json.dumps(value)}" for name, value in fields.items())])


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def toy(traces: Path) -> Iterator[Server]:
    server = start_toy(profile_dir=str(traces))
    yield server
    assert server.end() == 0, "".join(server.lines)


@pytest.fixture
def client(toy: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=toy.url + "/v1", api_key="-", max_retries=0, _strict_response_validation=True)


def eventually(condition: Callable[[], bool], limit: float = 10) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_idle(url: str) -> bool:
    info = httpx.get(url + "/get_server_info").json()
    return info["pending"] == 0 and info["internal_states"][0]["running"] == 0


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def in_background(calls: list[Callable[[], httpx.Response]]) -> Callable[[], list[tuple[int, str]]]:
    """Start calls on threads; the function that waits for their statuses and texts."""
    results: list[tuple[int, str]] = []

    def run(call: Callable[[], httpx.Response]) -> None:
        reply = call()
        results.append((reply.status_code, reply.text))

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()

    def wait() -> list[tuple[int, str]]:
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"
        return results

    return wait


def ask_forever(url: str) -> Callable[[], list[tuple[int, str]]]:
    """Two clients, a stream that has begun and a whole answer, whose requests are running when this returns."""
    begun = threading.Event()

    def stream() -> httpx.Response:
        with httpx.stream("POST", url + "/v1/completions", json=FOREVER | {"stream": True}, timeout=60) as reply:
            begun.set()  # the status is sent: whatever happens from now on is told inside the stream
            reply.read()
        return reply

    wait = in_background([stream, lambda: httpx.post(url + "/v1/completions", json=FOREVER, timeout=60)])
    running = lambda: httpx.get(url + "/get_server_info").json()["pending"]  # noqa: E731
    assert begun.wait(30) and eventually(lambda: running() == 2)
    return wait


def test_official_client(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Füße 🚀"}]
    whole = client.chat.completions.create(model="toy", messages=messages, n=2, logprobs=True, top_logprobs=2, seed=1)
    assert [c.message.content for c in whole.choices] == ["user\nFüße 🚀"] * 2
    assert {c.finish_reason for c in whole.choices} == {"stop"}
    assert (
        whole.usage is not None
        and whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    )
    content = whole.choices[0].logprobs.content
    assert bytes(b for t in content[1:] for b in t.bytes).decode() == "user\nFüße 🚀"

    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="toy", messages=messages, stream=True, stream_options=options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "user\nFüße 🚀"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], whole.usage.completion_tokens // 2)

    texts = client.completions.create(model="toy", prompt=["abc", "de"], max_tokens=3, logprobs=1, echo=None)
    assert [c.text for c in texts.choices] == ["abc", "ded"]
    assert [m.id for m in client.models.list()] == ["toy"] and client.models.retrieve("toy").id == "toy"


def test_official_client_errors(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="toy", messages=messages, temperature=3)
    assert refused.value.param == "temperature" and "less than or equal to 2" in refused.value.message
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="toy", messages=messages, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    schema = {"name": "it", "schema": {"type": "thing"}, "strict": True}
    with pytest.raises(openai.BadRequestError, match="thing") as refused:
        client.chat.completions.create(
            model="toy", messages=messages, response_format={"type": "json_schema", "json_schema": schema}
        )
    assert refused.value.param == "response_format"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=messages)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


BAD: dict[str, tuple[str, object, int]] = {
    "empty": ("/generate", b"", 400),
    "cut off": ("/generate", b'{"text": "a', 400),
    "not an object": ("/generate", b"[]", 400),
    "not UTF-8": ("/generate", b'{"text": "\xff"}', 400),
    "half a surrogate pair": ("/v1/completions", b'{"prompt": "\\ud800"}', 400),
    "NaN": ("/v1/completions", b'{"prompt": "x", "temperature": NaN}', 400),
    "Infinity by overflow": ("/v1/completions", b'{"prompt": "x", "temperature": 1e999}', 400),
    "twice the same key": ("/generate", b'{"text": "x", "text": "y"}', 400),
    "deep nesting": ("/generate", b"[" * 200_000, 400),
    "huge integer": ("/generate", b'{"text": ' + b"1" * 10_000 + b"}", 400),
    "too large": ("/generate", b" " * (5 << 20), 413),
    "unknown field": ("/generate", {"text": "x", "foo": 1}, 400),
    "unknown parameter": ("/generate", {"text": "x", "sampling_params": {"temprature": 1}}, 400),
    "no prompt": ("/generate", {}, 400),
    "two prompts": ("/generate", {"text": "x", "input_ids": [1]}, 400),
    "token out of range": ("/generate", {"input_ids": [258]}, 400),
    "negative token": ("/generate", {"input_ids": [-1]}, 400),
    "no tokens": ("/generate", {"input_ids": []}, 400),
    "boolean token": ("/generate", {"input_ids": [True]}, 400),
    "too many new tokens": ("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 4_000_000}}, 400),
    "error in a stream": ("/generate", {"text": "", "stream": True}, 400),
    "bad grammar in a stream": ("/generate", {"text": "x", "stream": True, "sampling_params": {"regex": "("}}, 400),
    "two grammars": ("/v1/completions", {"prompt": "x", "regex": "a", "ebnf": "root ::= x"}, 400),
    "empty messages": ("/v1/chat/completions", {"messages": []}, 400),
    "unknown role": ("/v1/chat/completions", {"messages": [{"role": "boss", "content": "x"}]}, 400),
    "image": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400),
    "text as a number": ("/v1/completions", {"prompt": "x", "temperature": "1"}, 400),
    "n of zero": ("/v1/completions", {"prompt": "x", "n": 0}, 400),
    "n beyond all bounds": ("/v1/completions", {"prompt": ["x"] * 100, "n": 128}, 400),
    "too many stops": ("/v1/completions", {"prompt": "x", "stop": ["a"] * 17}, 400),
    "logit_bias without a token": ("/v1/completions", {"prompt": "x", "logit_bias": {"a": 1}}, 400),
    "unsupported": ("/v1/completions", {"prompt": "x", "best_of": 2}, 400),
    "wrong model": ("/v1/completions", {"prompt": "x", "model": "gpt"}, 404),
    "wrong path": ("/v1/nothing", {}, 404),
    "nothing to abort": ("/abort_request", {}, 400),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(toy: Server, name: str) -> None:
    path, body, status = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        reply = httpx.post(toy.url + path, content=content, headers={"content-type": "application/json"}, timeout=20)
    except httpx.WriteError:  # it hung up while we were still sending, as it may with 413
        assert status == 413
        return
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]


def talk(url: str, data: bytes) -> bytes:
    """Send raw bytes, read to the end."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(data)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except TimeoutError:
            pass
        return received


def test_raw_http(toy: Server) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    assert b" 400 " in talk(toy.url, b"not http at all\r\n\r\n")[:20]
    assert b" 400 " in talk(toy.url, head + b"Content-Length: minus one\r\n\r\n{}")[:20]
    assert b" 413 " in talk(toy.url, head + b"Content-Length: 99999999999\r\n\r\n{}")[:20]
    assert b" 400 " in talk(toy.url, head + b'Content-Length: 5\r\n\r\n{"text": "x"}')[:20]
    assert (
        b" 400 "
        in talk(toy.url, head.replace(b"application/json", b"text/plain") + b"Content-Length: 2\r\n\r\n{}")[:20]
    )
    assert httpx.get(toy.url + "/health").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_who_leaves_is_aborted(toy: Server, stream: bool) -> None:
    body = json.dumps(FOREVER | {"stream": stream}).encode()
    host, port = toy.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        assert eventually(lambda: not is_idle(toy.url))
    assert eventually(lambda: is_idle(toy.url))


def test_stop_string_ends_the_request(toy: Server) -> None:
    reply = httpx.post(toy.url + "/v1/completions", json=FOREVER | {"prompt": "one END two", "stop": "END"}).json()
    assert (reply["choices"][0]["text"], reply["choices"][0]["finish_reason"]) == ("one ", "stop")
    assert eventually(lambda: is_idle(toy.url))


def test_abort_by_name(toy: Server) -> None:
    body = {"text": "x", "rid": "mine", "sampling_params": {"max_new_tokens": 3_000_000}}
    wait = in_background([lambda: httpx.post(toy.url + "/generate", json=body, timeout=60)])
    assert eventually(lambda: httpx.post(toy.url + "/abort_request", json={"rid": "mine"}).json()["aborted"] == 1)
    ((status, text),) = wait()
    assert status == 200 and json.loads(text)["meta_info"]["finish_reason"]["type"] == "abort"
    assert eventually(lambda: is_idle(toy.url))


def test_sglang_routes(toy: Server) -> None:
    assert httpx.get(toy.url + "/health_generate").status_code == 200
    assert httpx.get(toy.url + "/get_model_info").json()["served_model_name"] == "toy"
    assert httpx.post(toy.url + "/flush_cache").json()["success"]
    body = {"text": ["ab", "c"], "sampling_params": [{"max_new_tokens": 2}, {"max_new_tokens": 1, "n": 2}]}
    answers = httpx.post(toy.url + "/generate", json=body | {"return_logprob": True}).json()
    assert [a["text"] for a in answers] == ["ab", "c", "c"]
    assert len(answers[0]["meta_info"]["output_token_logprobs"]) == 2
    lines = httpx.post(toy.url + "/generate", json={"text": "abc", "stream": True}).text.split("\n\n")
    assert (
        lines[-2:] == ["data: [DONE]", ""]
        and json.loads(lines[-3][6:])["meta_info"]["finish_reason"]["type"] == "length"
    )


def test_metrics_and_a_log_line(toy: Server) -> None:
    def counted() -> dict[str, float]:
        families = text_string_to_metric_families(httpx.get(toy.url + "/metrics").text)
        return {sample.name: sample.value for family in families for sample in family.samples}

    before = counted()
    body = {"text": "confidential words", "rid": "log-me", "sampling_params": {"max_new_tokens": 6}}
    assert httpx.post(toy.url + "/generate", json=body).status_code == 200
    grown = {name: value - before[name] for name, value in counted().items()}
    assert (grown["sglang:num_requests_total"], grown["sglang:generation_tokens_total"]) == (1, 6)
    assert (grown["sglang:time_to_first_token_seconds_count"], grown["sglang:num_aborted_requests_total"]) == (1, 0)
    assert eventually(lambda: any("log-me" in line for line in toy.lines))
    line = json.loads(next(line for line in toy.lines if "log-me" in line).split(" ", 1)[1])
    assert (line["finish"], line["completion_tokens"]) == ("length", 6)
    assert 0 <= line["ttft_s"] <= line["e2e_s"]
    assert "confidential" not in "".join(toy.lines)


def test_a_profile_is_written_where_the_server_was_told(toy: Server, traces: Path) -> None:
    def post(path: str, body: dict | None = None) -> tuple[int, str]:
        reply = httpx.post(toy.url + path, json=body, timeout=120)
        return reply.status_code, reply.text

    for body, word in ({"output_dir": "/"}, "output_dir"), ({"num_steps": 0}, "num_steps"), ({"x": 1}, "unknown"):
        status, text = post("/start_profile", body)
        assert status == 400 and word in text
    assert post("/stop_profile")[0] == 400, "none is running"
    assert post("/start_profile", {"num_steps": 3})[0] == 200
    assert post("/generate", {"text": "abc", "sampling_params": {"max_new_tokens": 9}})[0] == 200
    assert eventually(lambda: list(traces.rglob("*.xplane.pb")) != [])
    assert post("/stop_profile")[0] == 400, "it has ended by itself"
    assert post("/start_profile")[0] == 200 and post("/stop_profile")[0] == 200


def test_many_clients_get_their_own_answers(toy: Server) -> None:
    def post(i: int) -> httpx.Response:
        return httpx.post(toy.url + "/generate", json={"text": f"[{i}]", "sampling_params": {"max_new_tokens": 40 + i}})

    results = in_background([lambda i=i: post(i) for i in range(40)])()
    answers = [json.loads(text)["text"] for status, text in results if status == 200]
    assert sorted(answers) == sorted((f"[{i}]" * 99)[: 40 + i] for i in range(40))


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_the_front_end_loads_no_jax(toy: Server) -> None:
    assert "jaxlib" not in Path(f"/proc/{toy.process.pid}/maps").read_text()


def test_api_key_and_port() -> None:
    server = start_toy(key="s3cret")
    try:
        replies = [httpx.get(server.url + "/v1/models", headers=h) for h in ({}, {"authorization": "Bearer s3cret"})]
        assert [r.status_code for r in replies] == [401, 200]
        assert httpx.get(server.url + "/health").status_code == 200
        assert "s3cret" not in "".join(server.lines)
        port = server.url.rsplit(":", 1)[1]
        second = subprocess.run([*TOY, port, ""], capture_output=True, text=True, timeout=60)
        assert (second.returncode, f"--port {port}" in second.stderr) == (1, True)
    finally:
        assert server.end(signal.SIGINT) == 0


def wide_schema(size: int) -> dict:
    """An object with so many properties that the schema just fits."""
    properties = {f"number {i:04}": {"type": "number", "minimum": 10_000.1 + i} for i in range(size // 56)}
    schema = {"type": "object", "properties": properties}
    assert 0.9 * size < len(json.dumps(schema)) < size
    return schema


MEGABYTE = {"prompt": "word " * 200_000, "max_tokens": 1}
SHAPED = {"type": "json_schema", "json_schema": {"name": "wide", "schema": wide_schema(1 << 16)}}


@pytest.mark.parametrize(
    "body",
    [MEGABYTE, {"prompt": [[120]] * 4, "max_tokens": 1, "response_format": SHAPED}],
    ids=["prompt", "schema"],
)
def test_health_answers_while_something_long_is_prepared(toy: Server, body: dict) -> None:
    """A prompt of a megabyte is tokenised, or a schema of 64 KB compiled four times: the event loop is free."""
    first = body | {"prompt": "x", "response_format": {"type": "json_object"}}
    assert (
        httpx.post(toy.url + "/v1/completions", json=first, timeout=60).status_code == 200
    )  # all that loads is loaded
    done = threading.Event()

    def long() -> httpx.Response:
        reply = httpx.post(toy.url + "/v1/completions", json=body, timeout=60)
        done.set()
        return reply

    wait, waits, begin = in_background([long]), [], time.monotonic()
    with httpx.Client() as client:
        while not done.is_set():
            asked = time.monotonic()
            assert client.get(toy.url + "/health", timeout=60).status_code == 200
            waits.append(time.monotonic() - asked)
    assert [status for status, _ in wait()] == [200]
    total = time.monotonic() - begin
    assert max(waits) < total / 3, f"one of {len(waits)} answers took {max(waits):.1f} s of {total:.1f} s"


def test_a_stalled_step_turns_readiness_off_and_logs_its_stack() -> None:
    server = start_toy(watchdog_timeout=3)
    ready = lambda: httpx.get(server.url + "/health_generate", timeout=30)  # noqa: E731

    def at_once(path: str) -> str:
        """The answer of somebody who asks for no token; empty if it takes a second."""
        try:
            return httpx.get(server.url + path, timeout=1).text
        except httpx.TimeoutException:
            return ""

    try:
        assert ready().status_code == 200
        wait = in_background([lambda: httpx.post(server.url + "/generate", json={"text": "stall"}, timeout=30)])
        assert eventually(lambda: any(line.startswith("Timeout (0:00:03)!") for line in server.lines))
        assert eventually(lambda: "nothing heard of the scheduler for 3 s" in at_once("/health_generate"))
        assert httpx.get(server.url + "/health").status_code == 200, "alive all the while"
        assert [status for status, _ in wait()] == [200]
        assert eventually(lambda: ready().status_code == 200)
        assert any("toy_server.py" in line and "in step" in line for line in server.lines), "where it hung"
    finally:
        assert server.end() == 0


@pytest.mark.skipif(not LINUX, reason="reads /proc")
@pytest.mark.parametrize("victim", [0, 1], ids=["scheduler", "detokenizer"])
def test_death_of_a_child_reaches_everybody(victim: int) -> None:
    server = start_toy()
    children = server.children()
    wait = ask_forever(server.url)
    os.kill(children[victim], signal.SIGKILL)
    results = sorted(wait())
    assert [status for status, _ in results] == [200, 503]
    assert "ended unexpectedly" in results[1][1]
    assert results[0][1].endswith("data: [DONE]\n\n") and '"error"' in results[0][1].split("\n\n")[-3]
    assert server.process.wait(60) == 1
    server.end()
    assert any("ended unexpectedly" in line for line in server.lines)
    assert eventually(lambda: all(is_gone(pid) for pid in children))


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_sigterm_ends_everything_in_good_order() -> None:
    server = start_toy()
    children = server.children()
    wait = ask_forever(server.url)
    assert server.end() == 0
    assert sorted(status for status, _ in wait()) == [200, 503]
    assert eventually(lambda: all(is_gone(pid) for pid in children))


def test_a_server_whose_terminal_is_gone_still_ends() -> None:
    """Who read its messages was killed: to write one is an error now, and must not keep it from ending."""
    process = subprocess.Popen([*TOY, "0", ""], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(line.startswith("Ready") for line in process.stderr)
    process.stderr.close()
    process.terminate()
    try:
        assert process.wait(60) in (0, 120), "120: Python could not flush its last words"
    finally:
        process.kill()


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_children_die_with_a_killed_parent() -> None:
    server = start_toy()
    children = server.children()
    server.end(signal.SIGKILL)
    assert len(children) == 2 and eventually(lambda: all(is_gone(pid) for pid in children))


@pytest.mark.slow
def test_the_default_model_over_http() -> None:
    """The engine's whole way, with the model that needs no argument."""
    small = ["--context-length", "512", "--max-running-requests", "4", "--chunked-prefill-size", "64"]
    small += ["--dtype", "float32"]  # a processor with 16-bit arithmetic rounds differently in steps of other sizes
    server = Server([sys.executable, "-m", "tpu_mini_sglang.launch_server", "--port", "0", *small])
    try:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="-", timeout=120, max_retries=0)
        model = client.models.list().data[0].id
        ask = {"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
        greedy = client.chat.completions.create(**ask, temperature=0, max_tokens=24)
        assert "Paris" in greedy.choices[0].message.content
        pieces = client.chat.completions.create(**ask, temperature=0, max_tokens=24, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in pieces) == greedy.choices[0].message.content
        sampled = [client.chat.completions.create(**ask, seed=7, max_tokens=16) for _ in range(2)]
        assert sampled[0].choices[0].message.content == sampled[1].choices[0].message.content
        place = {
            "type": "object",
            "properties": {"capital": {"type": "string", "maxLength": 20}},
            "required": ["capital"],
        }
        shape = {"type": "json_schema", "json_schema": {"name": "place", "schema": place, "strict": True}}
        formed = client.chat.completions.create(**ask, temperature=0, max_tokens=64, response_format=shape).choices[0]
        assert (formed.finish_reason, {*json.loads(formed.message.content)} >= {"capital"}) == ("stop", True)
        crowd: dict[int, str] = {}

        def sample(seed: int) -> str:
            return client.chat.completions.create(**ask, seed=seed, max_tokens=16).choices[0].message.content

        threads = [threading.Thread(target=lambda s=s: crowd.update({s: sample(s)})) for s in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert crowd == {seed: sample(seed) for seed in range(8)}, "a crowd of eight on four rows changes an answer"
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.chat.completions.create(**ask, max_tokens=5000)
        assert httpx.get(server.url + "/health_generate", timeout=60).status_code == 200
        info = httpx.get(server.url + "/get_server_info").json()["internal_states"][0]
        assert info["running"] == 0 and info["cached_tokens"] > 0
    finally:
        assert server.end() == 0
