"""Campaign 5: requests come ten times as fast as they can be served, whether or not anybody has been answered."""

import asyncio
import json
import random
import time
from typing import Any

import h11

from tpu_mini_sglang.trust import goodput, percentile

from .harness import Body, Server

ANSWER = 12  # tokens of each answer
STEP_SECONDS = 0.1  # what a step takes on top: a device that is slow in a known way
QUEUE = 16  # --max-queued-requests of the server under test


class Raw:
    """One request over its own connection, by h11: lighter than a whole client, so that the load is the server's."""

    def __init__(self, url: str):
        host, port = url.removeprefix("http://").split(":")
        self.host, self.port = host, int(port)

    async def ask(self, body: Body) -> tuple[int, dict[str, str], Body, float]:
        """Status, headers, body, and seconds from the first byte sent to the last received."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            start, data, peer = time.perf_counter(), json.dumps(body).encode(), h11.Connection(h11.CLIENT)
            headers = [("Host", "x"), ("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
            request = h11.Request(method="POST", target="/generate", headers=[*headers, ("Connection", "close")])
            writer.write(
                b"".join(peer.send(part) or b"" for part in (request, h11.Data(data=data), h11.EndOfMessage()))
            )
            status, got, received = 0, {}, b""
            while True:
                event = peer.next_event()
                if event is h11.NEED_DATA:
                    peer.receive_data(await reader.read(65536))
                elif isinstance(event, h11.Response):
                    status, got = event.status_code, {k.decode(): v.decode() for k, v in event.headers}
                elif isinstance(event, h11.Data):
                    received += event.data
                elif isinstance(event, h11.EndOfMessage):
                    return status, got, json.loads(received), time.perf_counter() - start
                else:
                    raise ConnectionError(f"it hung up: {event!r}")
        finally:
            writer.close()


def body_of(i: int) -> Body:
    """A request that nobody else makes, greedy and of known length."""
    rng = random.Random(i % 50)
    text = "".join(rng.choice("abcdefgh ") for _ in range(20))
    return {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": ANSWER, "ignore_eos": True}}


async def closed_loop(raw: Raw, seconds: float, at_once: int) -> float:
    """Answers a second when there is always somebody waiting, and never anybody to refuse: the capacity."""
    end, answered = time.perf_counter() + seconds, 0

    async def worker(first: int) -> None:
        nonlocal answered
        i = first
        while time.perf_counter() < end:
            status, _, _, _ = await raw.ask(body_of(i))
            assert status == 200, status
            answered += time.perf_counter() < end
            i += at_once

    await asyncio.gather(*(worker(i) for i in range(at_once)))
    return answered / seconds


async def open_loop(raw: Raw, seconds: float, rate: float, patience: float) -> list[tuple[int, Any, float, float]]:
    """Requests at a fixed rate; (number, outcome, seconds it took, when it ended) of each."""
    begin, results = time.perf_counter(), []

    async def one(i: int) -> None:
        try:
            outcome = await asyncio.wait_for(raw.ask(body_of(i)), patience)
            results.append((i, outcome, outcome[3], time.perf_counter() - begin))
        except Exception as error:
            results.append((i, repr(error), 0.0, time.perf_counter() - begin))

    tasks = []
    for i in range(int(seconds * rate)):
        await asyncio.sleep(max(0.0, begin + i / rate - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one(i)))
    await asyncio.gather(*tasks)
    return results


async def run(server: Server, seconds: float, tell: Any = print, patience: float = 60) -> dict[str, Any]:
    """Capacity, then ten times as much."""
    raw = Raw(server.url)
    right = {i: (await raw.ask(body_of(i)))[2]["output_ids"] for i in range(50)}
    server.plant(slow=STEP_SECONDS)
    try:
        capacity = await closed_loop(raw, seconds, QUEUE // 2 + 8)
        tell(f"capacity: {capacity:.1f} answers/s")
        results = await open_loop(raw, seconds, 10 * capacity, patience)
    finally:
        server.plant(slow=None)
    broken = [outcome for _, outcome, _, _ in results if isinstance(outcome, str)]
    whole = [r for r in results if not isinstance(r[1], str)]
    accepted = [r for r in whole if r[1][0] == 200]
    refused = [r for r in whole if r[1][0] == 503]
    wrong = [i for i, outcome, _, _ in accepted if outcome[2]["output_ids"] != right[i % 50]]
    waits = [took for _, _, took, _ in refused]
    good = goodput([end for i, _, _, end in accepted if i not in wrong], seconds)
    return {
        "load seconds": seconds,
        "capacity, answers/s": round(capacity, 2), "offered, requests/s": round(10 * capacity, 2),
        "accepted": len(accepted), "refused": len(refused), "other": len(results) - len(accepted) - len(refused),
        "wrong": len(wrong), "broken": broken[:3],
        "refused without Retry-After": sum("retry-after" not in outcome[1] for _, outcome, _, _ in refused),
        "goodput, answers/s": round(good, 2), "goodput / capacity": round(good / capacity, 3),
        "refusal, ms": {f"p{p}": round(1000 * percentile(waits, p), 1) for p in (50, 99, 100)},
    }  # fmt: skip


def problems(figures: dict[str, Any], p99_ms: float = 100.0, least: float = 0.9) -> list[str]:
    """What overload must not do."""
    names = ("wrong", "other", "refused without Retry-After")
    found = [f"{figures[name]} {name}" for name in names if figures[name]]
    found += [] if figures["refused"] else ["nobody was refused: this was no overload"]
    if figures["refusal, ms"]["p99"] > p99_ms:
        found.append(f"refusals took {figures['refusal, ms']['p99']} ms at the 99th percentile")
    return found + ([] if figures["goodput / capacity"] >= least else [f"goodput {figures['goodput / capacity']:.0%}"])
