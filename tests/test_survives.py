"""What a server of a real (tiny) model survives: NaN, a device that fails, one that hangs, rude clients."""

import asyncio
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from campaigns.harness import Server, client_of, eventually, make_model

from tpu_mini_sglang.trust import Answer

POISON = {"text": "\x07" * 20, "sampling_params": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}}
PLAIN = {"text": "The quick brown fox", "sampling_params": {"max_new_tokens": 30, "temperature": 0, "ignore_eos": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    server = Server(model, watchdog_timeout=3, max_total_tokens=4096)
    yield server
    assert server.end() == 0, "".join(server.lines)


def ask(server: Server, *bodies: dict, at_once: bool = True) -> list[Answer]:
    """The answers to some requests."""

    async def all_of_them() -> list[Answer]:
        async with client_of(server) as client:
            if at_once:
                return await asyncio.gather(*(client.ask(body) for body in bodies))
            return [await client.ask(body) for body in bodies]

    return asyncio.run(all_of_them())


def is_clean(server: Server) -> bool:
    """Nothing runs, and every page is free or cached."""
    return server.left_over() == {"pages": 0, "slots": 0}


def test_nan_fails_one_request_and_is_not_cached(server: Server) -> None:
    """Its pages hold NaN for real; its neighbours, its pages' next owners and its own next try get what they should."""
    others = [PLAIN | {"text": f"{i} {PLAIN['text']}"} for i in range(6)]
    expected = ask(server, POISON, *others, at_once=False)
    assert httpx.post(server.url + "/flush_cache").json()["success"]
    server.plant(poison=True)
    hurt, *got = ask(server, POISON, *others)
    server.plant(poison=None)
    assert (hurt.status, hurt.error) == (500, "the model produced NaN logits for this request")
    assert [a.tokens for a in got] == [a.tokens for a in expected[1:]]
    again, *next_owners = ask(server, POISON, *(o | {"text": o["text"] * 3} for o in others), at_once=False)
    assert (again.cached, again.tokens) == (0, expected[0].tokens)
    assert httpx.post(server.url + "/flush_cache").json()["success"]
    assert [a.tokens for a in next_owners] == [
        a.tokens for a in ask(server, *(o | {"text": o["text"] * 3} for o in others), at_once=False)
    ]
    assert is_clean(server)


def test_a_failed_step_fails_its_requests_and_the_server_goes_on(server: Server) -> None:
    """The pool is really gone: its arrays were deleted under the step."""
    bodies = [PLAIN | {"text": f"{i} {PLAIN['text']}"} for i in range(12)]  # of which eight run
    expected = ask(server, *bodies)
    server.plant(slow=0.02)
    with httpx.Client() as client:

        async def struck() -> list[Answer]:
            async with client_of(server) as clients:
                tasks = [asyncio.ensure_future(clients.ask(body)) for body in bodies]
                await asyncio.to_thread(eventually, lambda: server.info()["running"] == 8)
                await asyncio.to_thread(server.plant, device_error=True)
                return await asyncio.gather(*tasks)

        got = asyncio.run(struck())
        server.plant(slow=None)
        failed = [a for a in got if a.status != 200]
        assert 1 <= len(failed) <= 8 and {a.status for a in failed} == {500}, got
        assert all(a.tokens == e.tokens for a, e in zip(got, expected, strict=True) if a.status == 200)
        assert [a.tokens for a in ask(server, *bodies)] == [a.tokens for a in expected]
        assert is_clean(server) and client.get(server.url + "/health_generate", timeout=30).status_code == 200


def readiness(server: Server, timeout: float) -> int:
    """The status of the question whether it is ready; 0 if no answer comes in time."""
    try:
        return httpx.get(server.url + "/health_generate", timeout=timeout).status_code
    except httpx.TimeoutException:
        return 0


def test_a_step_that_hangs_turns_readiness_off(server: Server) -> None:
    """Alive, but not ready; the log says where it hangs; when the device comes back, so does everything else."""
    before = len(server.lines)
    server.plant(stall=12)

    async def beside() -> Answer:
        async with client_of(server) as client:
            waits = asyncio.ensure_future(client.ask(PLAIN))
            assert await asyncio.to_thread(eventually, lambda: readiness(server, 1) == 503)
            assert httpx.get(server.url + "/health", timeout=5).status_code == 200
            return await waits

    assert asyncio.run(beside()).status == 200
    assert eventually(lambda: readiness(server, 30) == 200)
    assert any("in step" in line and "server.py" in line for line in server.lines[before:])


def test_idle_costs_next_to_nothing(server: Server) -> None:
    """CPU time, which a busy machine hardly changes, of all three processes together: below 2 % of a core."""
    assert is_clean(server)
    before, begin = server.cpu_seconds(), time.monotonic()
    time.sleep(10)
    after, seconds = server.cpu_seconds(), time.monotonic() - begin
    share = {name: (after[name] - before[name]) / seconds for name in after}
    print({name: f"{part:.2%}" for name, part in share.items()})
    assert sum(share.values()) < 0.02, share


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["running", "waiting"])
def test_a_client_who_leaves_frees_everything(server: Server, stream: bool, phase: str) -> None:
    """In time measured in the scheduler's own steps, which are slow here: a few after the departure."""
    long = {"text": "x", "sampling_params": {"max_new_tokens": 250, "ignore_eos": True}, "stream": stream}
    body, (host, port) = json.dumps(long).encode(), server.url.removeprefix("http://").split(":")
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    server.plant(slow=0.05)
    clients = [socket.create_connection((host, int(port))) for _ in range(9 if phase == "waiting" else 1)]
    for client in clients:
        client.sendall(head.encode() + body)
    assert eventually(lambda: server.info()["pending"] == len(clients))
    assert eventually(lambda: server.info()["running"] and bool(server.info()["waiting"]) == (phase == "waiting"))
    for client in clients[::-1]:  # those who wait first
        client.close()
    begun, steps = time.monotonic(), server.info()["steps"]
    assert eventually(lambda: is_clean(server))
    print(f"clean after {time.monotonic() - begun:.2f} s")
    assert server.info()["steps"] - steps < 100, "somebody was served to the end"
    server.plant(slow=None)


def test_a_second_sigterm_does_not_wait_for_a_client_who_does_not_read(model: Path) -> None:
    """Ten minutes of grace, and a stream whose reader sleeps: the second signal ends both."""
    server = Server(model, shutdown_timeout=600, context_length=4096, max_total_tokens=4096)
    long = {"text": "x", "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}, "stream": True}
    body, (host, port) = json.dumps(long).encode(), server.url.removeprefix("http://").split(":")
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect((host, int(port)))
        lazy.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        lazy.sendall(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: server.info()["output_tokens"] > 2000, 60), "its events grow: nobody buffers so much"
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: "shutting down\n" in server.lines)
        assert server.process.poll() is None
        assert server.end(signal.SIGTERM, limit=60) == 0
