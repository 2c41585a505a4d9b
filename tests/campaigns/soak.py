"""Campaign 3: thousands of requests, a fifth of which do not end as they should; nothing may be left of them."""

import asyncio
import random
from collections import Counter
from typing import Any

import httpx

from tpu_mini_sglang.trust import growth

from .harness import Body, Client, Server, client_of, eventually, random_body

AT_ONCE = 16
INVALID: list[Body] = [
    {"text": ""},
    {"text": "x", "temprature": 0},
    {"text": "x", "sampling_params": {"temperature": -1}},
    {"text": "x", "sampling_params": {"regex": "("}},
    {"text": "x", "sampling_params": {"json_schema": '{"type": "thing"}'}},
    {"input_ids": [1, 2, 999]},
    {"text": "x" * 5000},
    {"text": ["a", "b"], "sampling_params": [{}]},
]


async def one(client: Client, rng: random.Random, rid: str) -> str:
    """One client; what became of it."""
    body, dice = random_body(rng, rid), rng.random()
    if dice < 0.10:
        await client.streamed(body | {"stream": True}, leave_after=rng.randint(0, 6))
        return "left"
    if dice < 0.15:
        asked = asyncio.ensure_future(client.ask(body))
        await asyncio.sleep(rng.random() * 0.1)
        await client.post("/abort_request", {"rid": rid})
        return "aborted" if (await asked).status == 200 else "failed"
    if dice < 0.20:
        status = (await client.ask(rng.choice(INVALID))).status
        return "refused" if status == 400 else f"invalid, but {status}"
    answer = await client.ask(body)
    return "answered" if answer.status == 200 else f"failed with {answer.status}"


async def fill_caches(client: Client) -> None:
    """The tokenizers library remembers 10,000 words, some 5 MB: that is no leak, but it would look like one."""
    for i in range(8):
        await client.ask({"text": " ".join(f"w{i}{j}" for j in range(1500))})  # too long: refused once it is tokenised


async def run(server: Server, count: int, warm_up: int, tell: Any = print) -> dict[str, Any]:
    """So many requests after a warm-up; memory before and after."""
    seen: Counter[str] = Counter()
    todo = iter(range(warm_up + count))
    memory: list[dict[str, int]] = []

    async def worker(client: Client) -> None:
        for i in todo:
            try:
                seen[await asyncio.wait_for(one(client, random.Random(i), f"soak-{i}"), 60)] += 1
            except Exception as error:
                seen[f"broken: {type(error).__name__}"] += 1
            if i + 1 == warm_up or (i >= warm_up and (i - warm_up) % max(1, count // 10) == 0):
                memory.append(server.resident())
                tell(f"{i + 1} requests: {dict(seen)}")

    async with client_of(server) as client:
        await fill_caches(client)
        await asyncio.gather(*(worker(client) for _ in range(AT_ONCE)))
    idle = eventually(server.is_idle)
    memory.append(server.resident())
    left = server.left_over()
    flushed = httpx.post(server.url + "/flush_cache", timeout=30).json()["success"]
    info = server.info()
    left["pages after a flush"] = info["total_pages"] - info["free_pages"]
    megabytes = [{name: size >> 20 for name, size in sizes.items()} for sizes in memory]
    return {
        "requests": count + warm_up, "warm-up": warm_up, "outcomes": dict(seen), "left over": left, "idle": idle,
        "flushed": flushed, "growth": growth(memory[0], memory[-1]), "resident, MB": megabytes,
    }  # fmt: skip


def problems(figures: dict[str, Any], most_growth: float = 0.05) -> list[str]:
    """What is left, what grew, and what failed."""
    expected = ("answered", "left", "aborted", "refused")
    found = [f"{n} {what}" for what, n in figures["outcomes"].items() if what not in expected]
    found += [f"{n} {what} left over" for what, n in figures["left over"].items() if n]
    found += [f"{name} grew by {by:.1%}" for name, by in figures["growth"].items() if by >= most_growth]
    return found + ([] if figures["idle"] and figures["flushed"] else ["it does not come to rest"])
