"""SGLang's own router in front of two of our servers: the endpoints it needs, its balance, a replica that dies.

The router is a program, not a library: SGLANG_ROUTER names a Python that has `sglang-router` installed.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from test_server import Server, start_toy

PYTHON = os.environ.get("SGLANG_ROUTER") or (sys.executable if importlib.util.find_spec("sglang_router") else "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs sglang-router: SGLANG_ROUTER=<a Python that has it>"),
]


def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Router:
    """The router in a process of its own, in front of some servers."""

    def __init__(self, workers: list[Server]):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        flags = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
        flags += ["--policy", "round_robin", "--health-check-interval-secs", "1", "--health-failure-threshold", "1"]
        flags += ["--worker-urls", *(worker.url for worker in workers)]
        command = [PYTHON, "-m", "sglang_router.launch_router", *flags]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # it may be another Python
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        self.wait(len(workers))

    def get(self, path: str) -> httpx.Response:
        """GET, patiently."""
        return httpx.get(self.url + path, timeout=20)

    def wait(self, healthy: int, limit: float = 60) -> None:
        """Until it knows so many healthy workers."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            try:
                if self.get("/readiness").json().get("healthy_workers") == healthy:
                    return
            except httpx.HTTPError:
                pass
            assert self.process.poll() is None, "the router ended"
            time.sleep(0.2)
        raise AssertionError(f"the router does not see {healthy} healthy workers")


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Router, list[Server]]]:
    """A router and two servers without a model: they answer each prompt with itself."""
    workers = [start_toy(), start_toy()]
    router = Router(workers)
    yield router, workers
    router.process.kill()
    router.process.wait()
    for worker in workers:
        worker.end()


def served(worker: Server) -> int:
    """Requests that have reached a server, by its own count."""
    return httpx.get(worker.url + "/server_info", timeout=20).json()["internal_states"][0]["arrivals"]


def test_all_apis_through_the_router(pair):
    """The official client, streaming and not, and SGLang's own API."""
    router, _ = pair
    client = openai.OpenAI(base_url=router.url + "/v1", api_key="none", max_retries=0)
    chat = [{"role": "user", "content": "ping"}]
    whole = client.chat.completions.create(model="toy", messages=chat, max_tokens=40, temperature=0)
    parts = client.chat.completions.create(model="toy", messages=chat, max_tokens=40, temperature=0, stream=True)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert "ping" in whole.choices[0].message.content and streamed == whole.choices[0].message.content
    assert client.completions.create(model="toy", prompt="Hello", max_tokens=5).choices[0].text == "Hello"
    body = {"text": "Hello", "sampling_params": {"max_new_tokens": 5}}
    assert httpx.post(router.url + "/generate", json=body, timeout=20).json()["text"] == "Hello"
    assert [model.id for model in client.models.list()] == ["toy"]


def test_what_a_balancer_asks(pair):
    """Loads of both replicas, and one call that empties both caches."""
    router, workers = pair
    loads = router.get("/get_loads").json()["workers"]
    assert {entry["worker"] for entry in loads} == {worker.url for worker in workers}
    assert all(entry["load"] >= 0 for entry in loads)
    assert httpx.post(router.url + "/flush_cache", timeout=20).json()["workers_flushed"] == 2


def test_both_replicas_work(pair):
    """Twenty requests in turn: ten each."""
    router, workers = pair
    before = [served(worker) for worker in workers]
    for i in range(20):
        body = {"text": f"number {i}", "sampling_params": {"max_new_tokens": 3}}
        assert httpx.post(router.url + "/generate", json=body, timeout=20).status_code == 200
    assert [served(worker) - n for worker, n in zip(workers, before)] == [10, 10]


def test_bad_input_comes_back_as_400(pair):
    """Our error, through the router; the replica that said it stays in service."""
    router, _ = pair
    reply = httpx.post(router.url + "/generate", json={"text": "x", "sampling_params": {"top_p": 7}}, timeout=20)
    assert reply.status_code == 400 and "top_p" in reply.text
    assert router.get("/readiness").json()["healthy_workers"] == 2


def test_a_dead_replica_is_left_out(pair):
    """One server is killed: the router notices, and every later request is answered by the other."""
    router, workers = pair
    workers[0].end(9)
    router.wait(1)
    for i in range(6):
        body = {"text": f"still there {i}", "sampling_params": {"max_new_tokens": 3}}
        assert httpx.post(router.url + "/generate", json=body, timeout=20).status_code == 200
