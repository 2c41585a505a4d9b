"""Campaign 4: what nobody should send. No answer of 5xx, no hang, one shape of errors, and nobody else notices."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from .harness import Server

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection"
)
JSON = {"content-type": "application/json"}
WRONG: list[Any] = [None, True, -1, 1.5, 10**30, "", "x", [], [None], {}, {"a": 1}]  # for fields of another type


def bodies() -> dict[str, tuple[str, bytes, dict[str, str]]]:
    """Curated bad requests by name: path, body, headers."""
    found: dict[str, tuple[str, bytes, dict[str, str]]] = {}

    def add(name: str, path: str, body: Any, headers: dict[str, str] = JSON) -> None:
        found[f"{path} {name}"] = (path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)

    chat, text, native = "/v1/chat/completions", "/v1/completions", "/generate"
    least = {chat: {"messages": [{"role": "user", "content": "x"}]}, text: {"prompt": "x"}, native: {"text": "x"}}
    broken = {
        "empty": b"", "cut off": b'{"text": "a', "not an object": b"[]", "a string": b'"x"', "null": b"null",
        "not UTF-8": b'{"text": "\xff"}', "half a character": b'{"text": "\\ud800", "prompt": "\\udfff"}',
        "NaN": b'{"prompt": "x", "temperature": NaN}', "Infinity": b'{"text": "x", "n": Infinity}',
        "1e999": b'{"prompt": "x", "temperature": 1e999}', "same key twice": b'{"text": "x", "text": "y"}',
        "deep nesting": b"[" * 200_000, "deep objects": b'{"a":' * 50_000,
        "huge integer": b'{"text": ' + b"1" * 9999 + b"}",
        "a NUL": b'{"text": \x00}', "many keys": json.dumps({f"k{i}": i for i in range(100_000)}).encode(),
        "a long key": json.dumps({"k" * 1_000_000: 1}).encode(), "too large": b" " * (5 << 20),
    }  # fmt: skip
    for path in (chat, text, native):
        for name, body in broken.items():
            add(name, path, body)
        add("text/plain", path, least[path], {"content-type": "text/plain"})
        add("gzip", path, least[path], JSON | {"content-encoding": "gzip"})
        add("unknown field", path, least[path] | {"foo": 1})
    limits = {
        "temperature": [-0.1, 1e7, "1", None.__class__.__name__], "top_p": [0, 1.1, -1], "n": [0, 129, 1.5, True],
        "seed": [2**64, 0.5], "frequency_penalty": [2.1, -2.1], "presence_penalty": ["a"], "min_p": [1.5],
        "repetition_penalty": [0, 9], "top_k": [0, -2, 2**40], "stop": [[""], ["a"] * 17, ["a" * 300], [1], 5],
        "stop_token_ids": [[-1], [10**6], [1] * 17], "logit_bias": [{"a": 1}, {"-1": 1}, {"999": 1}, {"1": 101}, [1]],
        "regex": ["(", "[", 5], "ebnf": ["", "x", "root ::= y"], "json_schema": ["", "{", '{"type": "thing"}', 5],
        "ignore_eos": [1, "yes"], "skip_special_tokens": [0],
    }  # fmt: skip
    for field, values in limits.items():
        for i, value in enumerate(values):
            add(f"{field} {i}", text, {"prompt": "x", field: value})
            add(f"{field} {i}", native, {"text": "x", "sampling_params": {field: value}})
    for field, value in {
        "max_new_tokens": -1,
        "min_new_tokens": -1,
        "temprature": 1,
        "": 1,
        "t" * 1_000_000: 1,
    }.items():
        add(f"params {field[:20]!r}", native, {"text": "x", "sampling_params": {field: value}})
    more_native: dict[str, Any] = {
        "no prompt": {}, "two prompts": {"text": "x", "input_ids": [1]}, "no tokens": {"input_ids": []},
        "out of range": {"input_ids": [258]}, "negative": {"input_ids": [-1]}, "a boolean": {"input_ids": [True]},
        "floats": {"input_ids": [1.5] * 100_000}, "mixed": {"input_ids": [[1], 2]}, "empty text": {"text": ""},
        "many texts": {"text": ["x"] * 100_000}, "params as a list": {"text": "x", "sampling_params": [{}, {}]},
        "a long text": {"text": "x" * 4_000_000}, "rid a number": {"text": "x", "rid": 5},
        "salt": {"text": "x", "cache_salt": "s" * 300},
        "top without logprobs": {"text": "x", "top_logprobs_num": 3}, "stream a word": {"text": "x", "stream": "yes"},
        "a stream refused": {"text": "", "stream": True}, "params null": {"text": "x", "sampling_params": "x"},
    }  # fmt: skip
    for name, body in more_native.items():
        add(name, native, body)
    for i, value in enumerate(WRONG):
        if value not in ("x", ""):
            add(f"messages {i}", chat, {"messages": value})
            add(f"a message {i}", chat, {"messages": [value]})
        if value != "x" and value is not None:
            add(f"prompt {i}", text, {"prompt": value})
    parts = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
    contents: dict[str, Any] = {
        "an image": [parts], "a file": [{"type": "file", "file": {"file_id": "x"}}], "audio": [{"type": "input_audio"}],
        "a part of nothing": [{}], "a number": 5, "many parts": [1] * 100_000,
    }  # fmt: skip
    for name, content in contents.items():
        add(name, chat, {"messages": [{"role": "user", "content": content}]})
    add("unknown role", chat, {"messages": [{"role": "boss", "content": "x"}]})
    add("another model", chat, least[chat] | {"model": "../../etc/passwd"})
    add("many bad messages", chat, {"messages": [{"x": 1}] * 100_000})
    add("huge n", text, {"prompt": ["x"] * 100, "n": 128})
    add("metadata", chat, least[chat] | {"metadata": {str(i): i for i in range(4000)}})
    add("options without a stream", chat, least[chat] | {"stream_options": {"include_usage": True}})
    return found


RAW = {
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "length minus one": b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n{}",
    "two lengths": b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
    "length and chunks": b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a bad chunk": b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "a long header": b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
    "a long path": b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a bad method": b"P\x00ST / HTTP/1.1\r\nHost: x\r\n\r\n",
}
CONTROL = {
    "text": "The quick brown fox",
    "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
}


def is_envelope(text: str) -> bool:
    """Whether a body is OpenAI's error object."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return (
        {"message", "type", "param", "code"} == error.keys()
        and isinstance(error["message"], str)
        and bool(error["message"])
    )


class Judge:
    """Counts what must not happen."""

    def __init__(self) -> None:
        self.count, self.bad, self.statuses = 0, list[str](), dict[int, int]()
        self.slowest = 0.0  # answer of /health, seconds
        self.dearest = 0.0, ""  # CPU seconds of the event loop, and for which input

    def answer(self, name: str, status: int, text: str) -> None:
        self.count += 1
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status >= 500:
            self.bad.append(f"{name}: {status} {text[:200]}")
        elif status < 400:
            self.bad.append(f"{name}: accepted with {status}")
        elif not is_envelope(text):
            self.bad.append(f"{name}: {status}, but no error object: {text[:200]}")
        elif len(text) > 2000:
            self.bad.append(f"{name}: an error of {len(text)} bytes")


WATCH = """
import http.client, signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGINT is ignored by whatever a shell starts behind itself
slowest, host = 0.0, sys.argv[1].split("//")[1]
print("begun", flush=True)
try:
    while True:
        begin, connection = time.monotonic(), http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        slowest = max(slowest, time.monotonic() - begin)
        time.sleep(0.01)
except KeyboardInterrupt:
    print(slowest)
"""


@contextmanager
def watched(url: str, judge: Judge) -> Iterator[None]:
    """Ask /health all the while, from a process that nobody keeps waiting: the slowest answer."""
    watcher = subprocess.Popen([sys.executable, "-c", WATCH, url], stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None and watcher.stdout.readline() == "begun\n"
    try:
        yield
    finally:
        watcher.terminate()
        judge.slowest = float(watcher.communicate()[0] or "inf")


async def send_raw(url: str, data: bytes) -> bytes:
    """Bytes as they are, and the first answer that comes back."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(30):
            writer.write(data)
            head = await reader.readuntil(b"\r\n\r\n")
            return head + await reader.readexactly(int(re.search(rb"content-length: (\d+)", head.lower())[1]))
    except (ConnectionError, asyncio.IncompleteReadError):
        return b""
    finally:
        writer.close()


async def curated(server: Server, tell: Any = print) -> dict[str, Any]:
    """All curated inputs, one after the other, with a control request every ten."""
    judge, inputs = Judge(), bodies()
    with watched(server.url, judge):
        await try_all(server, inputs, judge)
    tell(f"{judge.count} curated inputs: {len(judge.bad)} wrong")
    return {"inputs": judge.count, "wrong": judge.bad[:20], "count wrong": len(judge.bad), "statuses": judge.statuses,
            "slowest /health, s": round(judge.slowest, 3),
            "dearest for the event loop, CPU s": judge.dearest}  # fmt: skip


async def try_all(server: Server, inputs: dict[str, tuple[str, bytes, dict[str, str]]], judge: Judge) -> None:
    """One after the other."""
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:

        async def control() -> Any:
            return (await client.post("/generate", json=CONTROL)).json()["output_ids"]

        expected = await control()
        for i, (name, (path, body, headers)) in enumerate(inputs.items()):
            begin = server.loop_seconds()
            try:
                reply = await client.post(path, content=body, headers=headers)
                judge.answer(name, reply.status_code, reply.text)
            except httpx.WriteError:  # it hung up while we were still sending, as it may when a body is too large
                judge.count += 1
                judge.bad += [] if "too large" in name else [f"{name}: it hung up"]
            except httpx.HTTPError as error:
                judge.bad.append(f"{name}: {error!r}")
            judge.dearest = max(judge.dearest, (round(server.loop_seconds() - begin, 2), name))
            if i % 10 == 0 and await control() != expected:
                judge.bad.append(f"after {name}: the control request was answered differently")
        for name, data in RAW.items():
            try:
                received = await send_raw(server.url, data)
            except TimeoutError:
                judge.bad.append(f"{name}: no answer")
                continue
            head, _, text = received.partition(b"\r\n\r\n")
            if received or "long" not in name and "many" not in name:  # as above: too large
                judge.answer(name, int(head[9:12] or 0), text.decode())
        if await control() != expected:
            judge.bad.append("the control request was answered differently")


async def generated(server: Server, cases: int, folder: str, tell: Any = print) -> dict[str, Any]:
    """schemathesis reads our description and makes up requests that fit it and that do not."""
    program = shutil.which("schemathesis", path=Path(sys.executable).parent) or shutil.which("schemathesis")
    assert program, "needs schemathesis"
    found: dict[str, Any] = {"cases": 0, "failed runs": 0, "seconds": 0}
    for seed in range(1, 40):
        options = f"--phases fuzzing --max-examples {max(20, cases // 30)} --seed {seed} --checks {CHECKS}"
        options += " --no-color --generation-database none --suppress-health-check all --request-timeout 30"
        options += " --exclude-path-regex (profile|abort|flush)"
        command = [program, "run", server.url + "/openapi.json", *options.split()]
        run = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, cwd=folder)
        tried = re.search(r"(\d+) generated", run.stdout)
        found["cases"] += int(tried[1]) if tried else 0
        if run.returncode:
            found["failed runs"] += 1
            found.setdefault("output", run.stdout[-3000:] + run.stderr[-1000:])
        tell(f"schemathesis, seed {seed}: {found['cases']} cases, {found['failed runs']} failed runs")
        if found["cases"] >= cases or not tried:
            break
    return found


async def run(server: Server, cases: int, folder: str, tell: Any = print) -> dict[str, Any]:
    """Both, and a last look at what is left."""
    figures = {"curated": await curated(server, tell), "generated": await generated(server, cases, folder, tell)}
    return figures | {"left over": server.left_over()}


def problems(figures: dict[str, Any], most: float = 1.0) -> list[str]:
    """What must be nothing."""
    found = list(figures["curated"]["wrong"])
    seconds, name = figures["curated"]["dearest for the event loop, CPU s"]
    found += [f"{name} kept the event loop for {seconds} s"] if seconds > most else []
    if generated := figures.get("generated"):
        found += [generated["output"]] if generated["failed runs"] else []
    return found + [f"{n} {what} left over" for what, n in figures.get("left over", {}).items() if n]
