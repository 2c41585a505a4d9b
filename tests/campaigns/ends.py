"""Campaign 6: a server is asked to end, or its scheduler is killed, while clients wait."""

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from tpu_mini_sglang.trust import Answer

from .harness import Client, Server, client_of, eventually, random_body

CLIENTS = 24  # of which 8 run and 16 wait
LONG = {"max_new_tokens": 120, "ignore_eos": True}


async def patient(client: Client, i: int, ends: list[tuple[float, Answer | str]], stream: bool) -> None:
    """A client with a long request; when and how it heard of its end."""
    body = random_body(random.Random(i), f"end-{i}") | {"sampling_params": LONG, "stream": stream}
    try:
        answer: Answer | str = await client.ask(body)
    except Exception as error:
        answer = repr(error)
    ends.append((time.monotonic(), answer))


async def one(
    model: Path, sign: int, grace: float, again: bool = False, faults: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Start, load, send the signal, and look at what is left."""
    server = await asyncio.to_thread(Server, model, shutdown_timeout=grace, max_total_tokens=4096)
    server.plant(slow=0.1, **(faults or {}))
    ends: list[tuple[float, Answer | str]] = []
    try:
        async with client_of(server) as client:
            tasks = [asyncio.ensure_future(patient(client, i, ends, i % 2 == 0)) for i in range(CLIENTS)]
            busy = lambda: server.info()["running"] == 8 and server.info()["pending"] == CLIENTS  # noqa: E731
            assert await asyncio.to_thread(eventually, busy, 60), server.info()
            victim = server.pids["scheduler"] if sign == signal.SIGKILL else server.process.pid
            os.kill(victim, sign)
            begin = time.monotonic()
            if again:
                await asyncio.to_thread(eventually, lambda: "shutting down" in "".join(server.lines[-50:]))
                os.kill(victim, sign)
            _, hung = await asyncio.wait(tasks, timeout=grace + 20)
            for task in hung:
                task.cancel()
        gone = await asyncio.to_thread(eventually, lambda: server.process.poll() is not None, 20)
        took = time.monotonic() - begin
        await asyncio.to_thread(eventually, lambda: not server.family(), 5)
        orphans = len(server.family())
    finally:
        code = await asyncio.to_thread(server.end, signal.SIGKILL)
    told = [(at - begin, a) for at, a in ends]
    return {
        "exit": code if gone else None, "seconds": round(took, 2), "orphans": orphans, "hung": len(hung),
        "answered": sum(isinstance(a, Answer) and a.status == 200 and not a.error for _, a in told),
        "errors": sum(isinstance(a, Answer) and bool(a.error) for _, a in told),
        "cut off": sum(isinstance(a, str) for _, a in told),
        "last heard, s": round(max((at for at, _ in told), default=0.0), 2),
    }  # fmt: skip


async def run(model: Path, terms: int, kills: int, tell: Any = print) -> dict[str, Any]:
    """SIGTERM and SIGKILL so many times each; every second SIGTERM is followed by another one."""
    figures: dict[str, Any] = {"SIGTERM": [], "SIGTERM twice": [], "SIGKILL of the scheduler": []}
    for i in range(terms):
        name = "SIGTERM twice" if i % 2 else "SIGTERM"
        figures[name].append(await one(model, signal.SIGTERM, 60.0 if i % 2 else 2.0, again=bool(i % 2)))
        tell(f"{name} {i + 1}: {figures[name][-1]}")
    for i in range(kills):
        figures["SIGKILL of the scheduler"].append(await one(model, signal.SIGKILL, 2.0))
        tell(f"SIGKILL {i + 1}: {figures['SIGKILL of the scheduler'][-1]}")
    return figures


def problems(figures: dict[str, Any]) -> list[str]:
    """Whoever waits hears of it in time, nothing is left, and the exit code says how it was."""
    expected = {"SIGTERM": (0, 2 + 5), "SIGTERM twice": (0, 5), "SIGKILL of the scheduler": (1, 5)}
    found = []
    for name, ends in figures.items():
        code, seconds = expected[name]
        for end in ends:
            bad = [f"{end[k]} {k}" for k in ("orphans", "hung", "cut off") if end[k]]
            bad += [] if end["exit"] == code else [f"exit code {end['exit']}"]
            bad += [] if end["last heard, s"] <= seconds else [f"heard after {end['last heard, s']} s"]
            bad += [] if end["answered"] + end["errors"] == CLIENTS else ["not everybody heard of it"]
            found += [f"{name}: {', '.join(bad)}"] if bad else []
    return found
