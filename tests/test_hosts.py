"""Several hosts, as processes of this machine: the same tokens as one process, and one end for all."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from parity_models import variant, write_checkpoint
from test_server import Server

from tpu_mini_sglang.managers.detokenizer_manager import toy_tokenizer

ENV = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer, in Hugging Face's files."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, variant("llama", "LlamaForCausalLM", vocab_size=258))
    toy_tokenizer().hf.save_pretrained(folder)
    return folder


def command(model: Path, *more: str) -> list[str]:
    """A server of that model with few and small programs."""
    flags = ["--model-path", str(model), "--port", "0", "--page-size", "8", "--max-total-tokens", "1024"]
    flags += ["--max-running-requests", "2", "--chunked-prefill-size", "64", "--dtype", "float32"]
    flags += ["--compilation-cache-dir", str(model / "xla")]
    return [sys.executable, "-m", "tpu_mini_sglang.launch_server", *flags, *more]


class Node:
    """A follower's process, with what it says."""

    def __init__(self, line: list[str]):
        self.process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=ENV)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self.reader.start()

    def end(self, limit: float) -> tuple[int, str]:
        """Wait for its own end; exit code and all that it said."""
        try:
            code = self.process.wait(limit)
        finally:
            self.process.kill()
            self.reader.join()
        return code, "".join(self.lines)


def free_port() -> int:
    """A port that is free, as is the next one, most likely."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return min(s.getsockname()[1], 60000)


def start_pair(model: Path, tp: int = 2, dp: int = 1) -> tuple[Server, Node]:
    """Node 0, ready, and node 1; each has half of the tp * dp CPU devices."""
    devices = f"XLA_FLAGS=--xla_force_host_platform_device_count={tp * dp // 2}"
    group = ["--tp-size", str(tp), "--dp-size", str(dp), "--nnodes", "2"]
    group += ["--dist-init-addr", f"127.0.0.1:{free_port()}"]
    node = Node(["env", devices, *command(model, *group, "--node-rank", "1")])
    try:
        return Server(["env", devices, *command(model, *group, "--node-rank", "0")]), node
    except BaseException:
        node.process.kill()
        raise


def answers(url: str, at_once: int = 1) -> list[list[int]]:
    """Tokens of a few prompts, greedy and sampled, the second and third with a shared prefix, longer than a chunk."""
    prompts = ["Hello", "abc " * 30, "abc " * 29 + "xyz"]
    kinds = [{"temperature": 0}, {"temperature": 0.8, "seed": 7}, {"temperature": 1.2, "seed": 3, "top_p": 0.9}]
    bodies = [
        {"text": text, "sampling_params": kind | {"max_new_tokens": 12, "ignore_eos": True}}
        for text in prompts
        for kind in kinds
    ]
    with ThreadPoolExecutor(at_once) as pool:
        return list(
            pool.map(lambda body: httpx.post(url + "/generate", json=body, timeout=60).json()["output_ids"], bodies)
        )


def likelihoods(url: str) -> np.ndarray:
    """Log-probabilities of a prompt that is longer than a chunk."""
    body = {"text": "abc " * 29 + "xyz", "return_logprob": True, "logprob_start_len": 1}
    info = httpx.post(url + "/generate", json=body | {"sampling_params": {"max_new_tokens": 0}}, timeout=60).json()
    return np.array([logprob for logprob, _, _ in info["meta_info"]["input_token_logprobs"]])


@pytest.fixture(scope="module")
def pair(model: Path) -> Iterator[tuple[Server, Node]]:
    """A running group of two."""
    server, node = start_pair(model)
    yield server, node
    server.end(signal.SIGKILL)
    node.process.kill()
    node.reader.join()


@pytest.fixture(scope="module")
def alone(model: Path) -> tuple[list[list[int]], np.ndarray]:
    """What one process answers."""
    server = Server(command(model))
    try:
        return answers(server.url), likelihoods(server.url)
    finally:
        server.end()


@pytest.fixture(scope="module")
def expected(alone) -> list[list[int]]:
    """Its tokens."""
    assert len({tuple(row) for row in alone[0]}) > 6  # or a comparison would say little
    return alone[0]


def test_same_tokens_as_one_process(pair, expected):
    """Two processes with half of the model each."""
    assert answers(pair[0].url) == expected


def test_same_prompt_logprobs_as_one_process(pair, alone):
    found = likelihoods(pair[0].url)
    assert found.std() > 0.01
    np.testing.assert_allclose(found, alone[1], atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_group_of_devices_on_each_host(model, expected):
    """Two processes with the whole model each, split over their own devices, and each with pages of its own."""
    server, node = start_pair(model, tp=2, dp=2)
    try:
        assert answers(server.url, at_once=9) == expected
        assert "2 times 128 pages" in "".join(server.lines), server.lines
    finally:
        server.end(signal.SIGKILL)
        node.process.kill()
        node.reader.join()


def test_a_killed_follower_ends_the_leader(pair):
    """The client that waits gets an error within seconds, the server says why and ends."""
    server, node = pair
    outcome: list[object] = []
    answered = threading.Event()

    def ask() -> None:
        body = {"text": "Hello", "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}
        try:
            while not outcome:
                reply = httpx.post(server.url + "/generate", json=body, timeout=60)
                answered.set()
                if reply.status_code != 200:
                    outcome.append(reply.status_code)
        except httpx.HTTPError as error:
            outcome.append(error)

    client = threading.Thread(target=ask)
    client.start()
    assert answered.wait(60), "the group computes nothing"
    node.process.kill()
    assert server.process.wait(60) != 0
    client.join(60)
    assert outcome, "the client waits on"
    server.rest.join()
    assert "node 1 has ended or is out of reach" in "".join(server.lines)


def test_a_killed_leader_ends_the_follower(model):
    """Node 0 is killed with all its processes: node 1 says so and ends."""
    server, node = start_pair(model)
    server.end(signal.SIGKILL)
    code, said = node.end(20)
    assert code != 0 and "node 0 has ended or is out of reach" in said, said


def test_different_settings_are_refused_by_all(model):
    """Another page size on node 1: both end before anything is compiled, and both say what differs."""
    group = ["--tp-size", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}"]
    nodes = [Node(command(model, *group, "--node-rank", str(rank), "--page-size", str(8 << rank))) for rank in (0, 1)]
    for code, said in [node.end(100) for node in nodes]:
        assert code == 1 and "node 1 has page_size = 16, node 0 has 8" in said, said


def test_a_node_that_never_comes(model):
    """Node 0 alone gives up after --dist-timeout and names the missing node."""
    group = ["--tp-size", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}", "--dist-timeout", "1"]
    code, said = Node(command(model, *group)).end(60)
    assert code == 1 and "node(s) [1] of 2 did not come" in said, said
