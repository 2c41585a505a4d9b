"""What a token costs the front end: 256 streams at 20 tokens a second each, from an engine that computes nothing.

`python tests/front_load.py [--streams 256] [--rate 20] [--seconds 10] [--path /v1/chat/completions]` prints the CPU
time of each process for each token, and how far the streams fall behind the engine's pace.
"""

import argparse
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tpu_mini_sglang.entrypoints.engine import toy_front
from tpu_mini_sglang.launch_server import Builders, launch
from tpu_mini_sglang.managers.detokenizer_manager import EchoScheduler, toy_detokenizer, toy_scheduler
from tpu_mini_sglang.managers.io_struct import Message
from tpu_mini_sglang.server_args import ServerArgs

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "In the beginning was the word, and "}]},
    "/v1/completions": {"prompt": "In the beginning was the word, and "},
    "/generate": {"text": "In the beginning was the word, and "},
}


class Steady(EchoScheduler):
    """A token for every request at a fixed pace, whatever the others do; late steps are made up for."""

    period, due = 0.05, 0.0

    def step(self, incoming: list[Message]) -> list[Message]:
        self.due = max(self.due + self.period, time.monotonic() - 1)
        time.sleep(max(0.0, self.due - time.monotonic()))
        return super().step(incoming)


def steady_scheduler(args: ServerArgs) -> Steady:
    scheduler = Steady(toy_scheduler(args).eos)
    scheduler.period = 1 / float(sys.argv[2])
    return scheduler


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def request(path: str, tokens: int) -> bytes:
    """A stream of so many tokens."""
    count = {"max_new_tokens" if path == "/generate" else "max_tokens": tokens, "ignore_eos": True}
    body = BODIES[path] | ({"sampling_params": count} if path == "/generate" else count) | {"stream": True}
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def read_streams(url: str, path: str, streams: int, tokens: int) -> tuple[list[list[float]], int]:
    """When each event of each stream came, and all bytes; a client that does as little as it can."""
    host, port = url.removeprefix("http://").split(":")
    poll, times, total, left = selectors.DefaultSelector(), [list[float]() for _ in range(streams)], 0, streams
    for i in range(streams):
        connection = socket.create_connection((host, int(port)))
        connection.sendall(request(path, tokens))
        poll.register(connection, selectors.EVENT_READ, i)
    while left:
        for key, _ in poll.select():
            data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
            now = time.monotonic()
            times[key.data] += [now] * data.count(b"data: {")
            total += len(data)
            if not data or b"[DONE]" in data:
                poll.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
                left -= 1
    return times, total


def measure(path: str, streams: int, rate: float, seconds: float) -> dict[str, Any]:
    """One run."""
    command = [sys.executable, __file__, "--serve", str(rate)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    url = next(line.split()[-1] for line in server.stderr if line.startswith("Ready"))
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    spawned = [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    pids = dict(zip(("front", "scheduler", "detokenizer"), [server.pid, *spawned], strict=True))
    tokens = int(rate * seconds)
    try:
        read_streams(url, path, 4, 8)  # the template's process, and what else comes up late
        before, begin = {name: cpu_seconds(pid) for name, pid in pids.items()}, time.monotonic()
        times, total = read_streams(url, path, streams, tokens)
        wall = time.monotonic() - begin
        spent = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}
    finally:
        server.terminate()
        server.wait(30)
    events = sum(map(len, times))
    late = [t[-1] - t[0] - (tokens - 1) / rate for t in times]
    return {
        "path": path, "streams": streams, "tokens/s of each": rate, "tokens": streams * tokens, "events": events,
        "bytes": total, "seconds": round(wall, 2),
        "CPU us a token": {name: round(1e6 * s / (streams * tokens), 1) for name, s in spent.items()},
        "front end, share of a core at this pace": round(spent["front"] / (streams * tokens) * streams * rate, 2),
        "behind at the end, s, median": round(statistics.median(late), 2),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=float, help="be the server, at this pace")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--path", choices=BODIES, default="/v1/chat/completions")
    args = parser.parse_args()
    if args.serve:
        fields = {"served_model_name": "steady", "context_length": 4096, "log_level": "warning"}
        return launch(ServerArgs(port=0, **fields), Builders(toy_front, steady_scheduler, toy_detokenizer))
    print(json.dumps(measure(args.path, args.streams, args.rate, args.seconds), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
