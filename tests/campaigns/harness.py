"""What the campaigns share: a tiny model, a server of it that can be spoilt, a client, the oracle of pages."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tpu_mini_sglang.trust import Answer, left_over

HERE = Path(__file__).resolve().parent
ENV = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
SMALL = {
    "dtype": "float32", "page_size": 8, "max_total_tokens": 640, "max_running_requests": 8,
    "chunked_prefill_size": 64, "context_length": 256, "served_model_name": "tiny",
}  # fmt: skip
Body = dict[str, Any]


def make_model(folder: Path) -> Path:
    """A tiny random Llama over bytes, with a tokenizer and a chat template, in Hugging Face's files."""
    sys.path.insert(0, str(HERE.parent))
    from parity_models import variant, write_checkpoint

    from tpu_mini_sglang.managers.detokenizer_manager import toy_tokenizer

    sizes = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 257, "max_position_embeddings": 4096}
    write_checkpoint(folder, variant("llama", "LlamaForCausalLM", **sizes))
    toy_tokenizer().hf.save_pretrained(folder)
    return folder


def eventually(condition: Callable[[], bool], limit: float = 30) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Server:
    """A server in processes of its own, in which faults can be planted."""

    def __init__(self, model: Path, **fields: Any):
        self.folder = tempfile.mkdtemp(prefix="campaign-")
        args = [f"{name}={json.dumps(value)}" for name, value in (SMALL | fields).items()]
        command = [sys.executable, str(HERE / "server.py"), str(model), self.folder, *args]
        env = ENV | {"TMPDIR": self.folder}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("Ready"):
                self.url = line.split()[-1]
                break
        else:
            raise AssertionError("the server did not start:\n" + "".join(self.lines))
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()))
        self.reader.start()
        self.pids = {"front": self.process.pid} | dict(zip(("scheduler", "detokenizer"), self.children(), strict=True))

    def children(self) -> list[int]:
        """Process ids of scheduler and detokenizer, in this order."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in found if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]

    def plant(self, **faults: Any) -> None:
        """Arm faults by name; None takes one back. Back when both processes know."""
        for process in ("front", "scheduler"):
            with socket.socket(socket.AF_UNIX) as s:
                s.connect(f"{self.folder}/{process}")
                s.sendall(json.dumps(faults).encode() + b"\n")
                assert s.recv(9) == b"ok\n"

    def info(self) -> Body:
        """The scheduler's counters, and what the front end waits for."""
        info = httpx.get(self.url + "/get_server_info", timeout=30).json()
        return info["internal_states"][0] | {"pending": info["pending"]}

    def left_over(self) -> dict[str, int]:
        """Pages and slots that are still taken when nothing should be."""
        info = self.info()
        return left_over(info, info["pending"])

    def is_idle(self) -> bool:
        return self.left_over()["slots"] == 0

    def resident(self) -> dict[str, int]:
        """Bytes of memory of each process that are its own or shared in part."""
        sizes = {}
        for name, pid in self.pids.items():
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            sizes[name] = 1024 * int(text.split("Pss:")[1].split()[0])
        return sizes

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time of each process so far."""
        found, tick = {}, os.sysconf("SC_CLK_TCK")
        for name, pid in self.pids.items():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()
            found[name] = (int(fields[11]) + int(fields[12])) / tick
        return found

    def loop_seconds(self) -> float:
        """CPU time of the front end's main thread, where the event loop runs; a busy machine doesn't change it."""
        fields = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/stat").read_text().rsplit(")")[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def family(self) -> set[int]:
        """Every living process that this server started, whoever its parent is now: their temporary folder is ours."""
        mark, found = f"TMPDIR={self.folder}".encode(), set()
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (place / "environ").read_bytes() and (place / "stat").read_text().split()[2] != "Z":
                    found.add(int(place.name))
            except OSError:
                pass  # it has just ended, or is not ours
        return found

    def end(self, sign: int = signal.SIGTERM, limit: float = 60) -> int:
        """Send a signal and wait; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sign)
        try:
            return self.process.wait(limit)
        finally:
            for pid in self.family():
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
            self.reader.join()
            subprocess.run(["rm", "-r", self.folder])


def read_answer(status: int, value: Body) -> Answer:
    """SGLang's answer object, or an error."""
    if "error" in value:
        return Answer(status, error=value["error"]["message"])
    meta = value["meta_info"]
    return Answer(status, value["output_ids"], value["text"], meta["finish_reason"]["type"], meta["cached_tokens"])


class Client:
    """Asks /generate over real connections."""

    def __init__(self, url: str, connections: int = 100):
        limits = httpx.Limits(max_connections=connections, keepalive_expiry=2)
        self.http = httpx.AsyncClient(base_url=url, timeout=60, limits=limits, trust_env=False)

    async def ask(self, body: Body) -> Answer:
        """One request, streamed where it says so."""
        start = time.perf_counter()
        answer = await (self.streamed(body) if body.get("stream") else self.whole(body))
        answer.seconds = time.perf_counter() - start
        return answer

    async def whole(self, body: Body) -> Answer:
        reply = await self.http.post("/generate", json=body)
        return read_answer(reply.status_code, reply.json())

    async def streamed(self, body: Body, leave_after: int | None = None) -> Answer:
        """The last event holds everything; whoever leaves early has what had come by then."""
        answer = Answer()
        async with self.http.stream("POST", "/generate", json=body) as reply:
            if reply.status_code != 200:
                return read_answer(reply.status_code, json.loads(await reply.aread()))
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    return answer
                if line:
                    value = json.loads(line.removeprefix("data: "))
                    if "error" not in value and value["meta_info"]["finish_reason"] is None:
                        value["meta_info"]["finish_reason"] = {"type": ""}
                    answer = read_answer(200, value)
                    if leave_after is not None and len(answer.ids) >= leave_after:
                        return answer
        return Answer(error="the stream ended without [DONE]")

    async def post(self, path: str, body: Body) -> httpx.Response:
        return await self.http.post(path, json=body)


@asynccontextmanager
async def client_of(server: Server, connections: int = 100) -> AsyncIterator[Client]:
    """A client, and its end."""
    client = Client(server.url, connections)
    async with client.http:
        yield client


PREFIXES = ["In the beginning ", "The quick brown fox jumps over the lazy dog. " * 2, '{"role": "user", "content": ']
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


def random_params(rng: random.Random) -> Body:
    """Any mixture of sampling parameters; a third of them must obey something."""
    kind = rng.randrange(6)
    params: Body = {
        "temperature": rng.choice([0.0, 0.7, 1.3]),
        "top_k": rng.choice([-1, 3, 20]),
        "top_p": rng.choice([1.0, 0.8]),
        "min_p": rng.choice([0.0, 0.05]),
        "frequency_penalty": rng.choice([0.0, 0.5]),
        "presence_penalty": rng.choice([0.0, -0.5]),
        "repetition_penalty": rng.choice([1.0, 1.3]),
        "logit_bias": rng.choice([{}, {"65": 2.0, "66": -100.0}]),
        "seed": rng.randrange(2**32),
        "max_new_tokens": rng.randint(1, 24),
        "ignore_eos": rng.random() < 0.5,
        "stop": rng.choice([[], ["e", "zz"]]),
    }
    if kind == 0:
        params |= {"json_schema": json.dumps(SCHEMA), "max_new_tokens": 60, "stop": [], "logit_bias": {}}
    if kind == 1:
        params |= {"regex": "[a-f]{2,12}", "stop": [], "logit_bias": {}}
    return params


def random_body(rng: random.Random, rid: str) -> Body:
    """A request of /generate whose prompt begins like others'."""
    tail = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, 30)))
    return {
        "text": rng.choice(PREFIXES) + tail,
        "sampling_params": random_params(rng),
        "rid": rid,
        "stream": rng.random() < 0.5,
    }


async def alone(client: Client, body: Body, salt: str) -> Answer:
    """What the request gets when nobody else is there and nothing of it is cached."""
    return await client.ask(body | {"cache_salt": salt, "rid": f"alone-{salt}", "stream": False})


async def gather_all(tasks: list[Any], limit: float) -> list[Any]:
    """Every result or exception; a task that does not end in time is a hang, and says so."""
    running = [asyncio.ensure_future(task) for task in tasks]
    done, hung = await asyncio.wait(running, timeout=limit)
    for task in hung:
        task.cancel()
    await asyncio.gather(*hung, return_exceptions=True)
    return ["hung" if t in hung else (t.exception() or t.result()) for t in running]
