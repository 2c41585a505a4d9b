"""Campaign 1: random traces of 20 requests at once against the same requests alone."""

import asyncio
import json
import random
from typing import Any

from tpu_mini_sglang.trust import Answer, verdict

from .harness import Body, Client, Server, alone, client_of, eventually, gather_all, random_body

SIZE = 20  # requests of a trace
HOW = ("stay", "stay", "stay", "stay", "leave", "abort")  # how a client may behave


async def act(client: Client, rng: random.Random, body: Body) -> tuple[str, Answer]:
    """One client of a trace: it stays, leaves its stream early, or has its request aborted by name."""
    how = rng.choice(HOW)
    await asyncio.sleep(rng.random() * 0.3)
    if how == "leave":
        return how, await client.streamed(body | {"stream": True}, leave_after=rng.randint(1, 8))
    if how == "abort":
        asked = asyncio.ensure_future(client.ask(body))
        await asyncio.sleep(rng.random() * 0.2)
        await client.post("/abort_request", {"rid": body["rid"]})
        return how, await asked
    return how, await client.ask(body)


def obeys(body: Body, answer: Answer) -> bool:
    """Whether a finished answer is what its schema or expression says."""
    params = body["sampling_params"]
    if answer.finish != "stop" or "json_schema" not in params:
        return True
    try:
        value = json.loads(answer.text)
    except ValueError:
        return False
    return value.keys() == {"n", "ok"} and 0 <= value["n"] <= 99 and isinstance(value["ok"], bool)


async def one_trace(crowd: Client, single: Client, seed: int, bad: dict[str, list[str]]) -> dict[str, int]:
    """Play a trace, then its requests one by one; note what went wrong by kind."""
    rng = random.Random(seed)
    bodies = [random_body(rng, f"trace-{seed}-{i}") for i in range(SIZE)]
    results = await gather_all([act(crowd, random.Random(f"{seed}-{i}"), b) for i, b in enumerate(bodies)], 120)
    early = 0
    for i, (body, result) in enumerate(zip(bodies, results, strict=True)):
        if isinstance(result, str | BaseException):
            bad.setdefault("hung" if result == "hung" else "crashed", []).append(f"{body['rid']}: {result!r}")
            continue
        how, got = result
        expected = await alone(single, body, f"{seed}-{i}")
        early += got.finish in ("abort", "")
        problem = verdict(got, expected, how != "stay") or ("" if obeys(body, got) else "disobedient")
        if problem:
            bad.setdefault(problem, []).append(f"{body['rid']} ({how}): {got} instead of {expected}")
    return {"requests": SIZE, "ended early": early}


async def play(server: Server, single: Server, seeds: range, tell: Any = print) -> dict[str, Any]:
    """All traces on one server, each request again alone on the other (or the same) one."""
    bad: dict[str, list[str]] = {}
    total = {"requests": 0, "ended early": 0}
    before = server.info()
    async with client_of(server) as crowd, client_of(single) as lone:
        for seed in seeds:
            counts = await one_trace(crowd, lone, seed, bad)
            total = {name: total[name] + counts[name] for name in total}
            tell(f"trace {seed}: {total['requests']} requests, {sum(map(len, bad.values()))} wrong")
    after = server.info()
    met = {name: after[name] - before[name] for name in ("retractions", "cached_tokens", "prompt_tokens", "steps")}
    left = server.left_over() if eventually(server.is_idle) else {"slots": -1}
    return {"traces": len(seeds)} | total | met | {"wrong": {k: len(v) for k, v in bad.items()}, "left over": left,
            "examples": [text[:2000] for texts in bad.values() for text in texts[:2]]}  # fmt: skip


def problems(figures: dict[str, Any]) -> list[str]:
    """What must be nothing."""
    found = [f"{count} {kind}" for kind, count in figures["wrong"].items()]
    return found + [f"{n} {kind} left over" for kind, n in figures["left over"].items() if n]
