"""Campaign 2: the same prompt from the cache and computed from nothing, and with somebody retracted all the time."""

import asyncio
import random
from typing import Any

from tpu_mini_sglang.trust import Answer, verdict

from .harness import Body, Client, Server, client_of, random_body

AT_ONCE = 6


async def pair(client: Client, body: Body, salt: str) -> tuple[Answer, Answer, Answer]:
    """Filling the cache, from the cache, and under a salt that nobody used."""
    plain = body | {"stream": False}
    fill = await client.ask(plain | {"cache_salt": "shared", "rid": f"fill-{salt}"})
    warm = await client.ask(plain | {"cache_salt": "shared", "rid": f"warm-{salt}"})
    cold = await client.ask(plain | {"cache_salt": f"only-{salt}", "rid": f"cold-{salt}"})
    return fill, warm, cold


async def pairs(server: Server, seeds: range, tell: Any = print) -> dict[str, Any]:
    """Many pairs, some at once; what differs, and what was found under a salt that nobody had used."""
    room = asyncio.Semaphore(AT_ONCE)
    figures: dict[str, Any] = {"pairs": 0, "cached tokens": 0, "found without cache": 0, "different": 0, "failed": 0}
    examples: list[str] = []
    before = server.info()

    async def one(client: Client, seed: int) -> None:
        async with room:
            body = random_body(random.Random(seed), "")
            answers = await pair(client, body, f"{seeds.start}-{seed}")
        fill, warm, cold = answers
        figures["pairs"] += 1
        figures["failed"] += any(a.status != 200 for a in answers)
        figures["cached tokens"] += warm.cached
        figures["found without cache"] += cold.cached > 0
        if verdict(fill, cold) or verdict(warm, cold):
            figures["different"] += 1
            examples.append(str(answers)[:2000])
        if figures["pairs"] % 100 == 0:
            tell(f"{figures['pairs']} pairs: {figures['different']} different, {figures['found without cache']} leaks")

    async with client_of(server) as client:
        await asyncio.gather(*(one(client, seed) for seed in seeds))
    figures["retractions"] = server.info()["retractions"] - before["retractions"]
    return figures | {"examples": examples[:3]}


async def run(server: Server, count: int, tell: Any = print) -> dict[str, Any]:
    """As it comes, and with a retraction forced at every third step."""
    figures = {"plain": await pairs(server, range(count), tell)}
    server.plant(retract_every=3)
    figures["retracted"] = await pairs(server, range(count, 2 * count), tell)
    server.plant(retract_every=None)
    return figures


def problems(figures: dict[str, Any]) -> list[str]:
    """What must be nothing, and what must be something or nothing was tested."""
    found = []
    for name, part in figures.items():
        found += [f"{name}: {part[k]} {k}" for k in ("different", "found without cache", "failed") if part[k]]
        found += [] if part["cached tokens"] else [f"{name}: the cache was never met"]
    return found + ([] if figures["retracted"]["retractions"] else ["nobody was retracted"])
