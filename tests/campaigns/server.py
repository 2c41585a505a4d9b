"""The real server of a real (tiny, random) model, started by a test that can plant faults in it while it runs.

`server.py MODEL FOLDER [FIELD=VALUE]...`, fields of ServerArgs with values in JSON. The two processes that can be
made to fail, the front end and the scheduler, each listen at a socket in FOLDER for a line of JSON: faults by name.
No route, flag or environment variable of the released server leads here: this file is the only way, and it is not in
the package.
"""

import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tpu_mini_sglang import launch_server
from tpu_mini_sglang.entrypoints import http_server
from tpu_mini_sglang.launch_server import Builders, StartError, launch, real_detokenizer, real_front, real_scheduler
from tpu_mini_sglang.managers.io_struct import ControlOut, Message, TokenOut
from tpu_mini_sglang.managers.tokenizer_manager import AbortingTable
from tpu_mini_sglang.model_config import ConfigError
from tpu_mini_sglang.server_args import ServerArgs

POISON = [7, 7, 7, 7]  # a prompt that begins so gets NaN into its pages where the fault "poison" is armed
Faults = dict[str, Any]


def listen(name: str, faults: Faults) -> None:
    """Take faults from the test, a connection each: {"name": value}, null takes one back."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{sys.argv[2]}/{name}")
    listener.listen()

    def run() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                for fault, value in json.loads(connection.makefile().readline()).items():
                    if value is None:
                        faults.pop(fault, None)
                    else:
                        faults[fault] = value
                connection.sendall(b"ok\n")

    threading.Thread(target=run, daemon=True).start()


class Faulty:
    """A scheduler that works as ever until it is told to fail."""

    def __init__(self, core: Any):
        self.core, self.state, self.faults = core, core.core.state, Faults()
        self.hoard: list[Any] = []  # what a leak holds on to
        listen("scheduler", self.faults)
        self.wrap_runner()
        self.wrap_masks()
        self.wrap_pages()

    @property
    def has_work(self) -> bool:
        return self.core.has_work

    def step(self, incoming: list[Message]) -> list[Message]:
        if seconds := self.faults.pop("stall", 0):
            time.sleep(seconds)
        if self.faults.pop("orphan", 0):
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        if "slow" in self.faults and self.state.running:
            time.sleep(self.faults["slow"])
        if "leak_memory" in self.faults and self.has_work:
            self.hoard.append(b"x" * self.faults["leak_memory"])
        if "leak_page" in self.faults and self.state.running:
            page = self.state.memories[0].allocator.alloc(1)
            self.hoard.append(page)
            if page is not None:
                del self.faults["leak_page"]
        self.spoil_cache()
        out = self.core.step(incoming)
        return [self.spoil(message) for message in out]

    def spoil_cache(self) -> None:
        """Cached pages of one prompt are found under every salt; or their contents are wrong."""
        cache = self.state.memories[0].cache
        if "ignore_salt" in self.faults:
            match, insert, peek = (getattr(type(cache), name) for name in ("match_prefix", "insert", "peek"))
            cache.match_prefix = lambda ids, salt="": match(cache, ids)
            cache.insert = lambda ids, pages, salt="": insert(cache, ids, pages)
            cache.peek = lambda ids, salt="": peek(cache, ids)
        else:
            for name in ("match_prefix", "insert", "peek"):
                vars(cache).pop(name, None)

    def spoil(self, message: Message) -> Message:
        """A token lost or altered on its way out."""
        if isinstance(message, ControlOut):
            message.data["poisoned"] = self.faults.get("poisoned", 0)
        if not isinstance(message, TokenOut) or len(message.token_ids) < 1:
            return message
        if self.take("lose_token") and message.finish is None:
            return TokenOut(message.rid, message.token_ids[:-1], *list_tail(message))
        if message.cached_tokens and self.take("wrong_when_cached"):
            return TokenOut(
                message.rid, [*message.token_ids[:-1], (message.token_ids[-1] + 1) % 256], *list_tail(message)
            )
        return message

    def take(self, fault: str) -> bool:
        """Whether an armed fault strikes now: every n-th time that it could."""
        if fault not in self.faults:
            return False
        self.faults[f"{fault} count"] = count = self.faults.get(f"{fault} count", 0) + 1
        return count % self.faults[fault] == 0

    def wrap_runner(self) -> None:
        """NaN in a request's pages, a device that lost its memory: below the scheduler, which must not notice us."""
        runner, faults = self.state.runner, self.faults
        forward = runner.forward

        def faulty(rows: Any, sampling: Any, bucket: Any) -> Any:
            import jax
            import jax.numpy as jnp

            if faults.pop("device_error", 0):
                for leaf in jax.tree.leaves(runner.kv):
                    leaf.delete()  # the next step finds its pool gone
            marked = [r for r in rows if "poison" in faults and list(r.token_ids[:4]) == POISON]
            step = forward(rows, sampling, bucket)
            for row in marked:
                pages = jnp.asarray(list(row.pages))
                layers = [pool.at[pages].set(jnp.nan) for pool in runner.kv.layers]
                runner.kv = replace(runner.kv, layers=jax.block_until_ready(layers))
                faults["poisoned"] = faults.get("poisoned", 0) + 1
            return step

        runner.forward = faulty

    def wrap_masks(self) -> None:
        """Every n-th step goes without its masks."""
        from tpu_mini_sglang.managers import scheduler

        allowed_tokens = scheduler.allowed_tokens

        def faulty(state: Any, flight: Any) -> Any:
            bits = allowed_tokens(state, flight)
            return None if bits is None or self.take("skip_mask") else bits

        scheduler.allowed_tokens = faulty

    def wrap_pages(self) -> None:
        """At every n-th step the first request to go on finds no pages, as if there were none."""
        from tpu_mini_sglang.managers import scheduler

        continue_request, grow, short = scheduler.continue_request, scheduler.grow, [0]

        def faulty(state: Any, *args: Any) -> None:
            every, step = self.faults.get("retract_every"), state.counters.steps
            short[0] = bool(every and step % every == 0 and self.faults.get("retracted") != step)
            if short[0]:
                self.faults["retracted"] = step
            continue_request(state, *args)
            short[0] = False

        def hungry(*args: Any) -> bool:
            if short[0]:
                short[0] = False
                return False
            return grow(*args)

        scheduler.continue_request, scheduler.grow = faulty, hungry


def list_tail(message: TokenOut) -> list[Any]:
    """The fields of a message after its tokens."""
    names = ("prompt_tokens", "completion_tokens", "cached_tokens", "finish", "logprobs", "init", "prompt_logprobs")
    return [getattr(message, name) for name in names]


def faulty_scheduler(args: ServerArgs) -> Faulty:
    return Faulty(real_scheduler(args))


def faulty_front(args: ServerArgs) -> Any:
    """The front end's half; the patches look at the faults whenever they are called."""
    faults = Faults()
    listen("front", faults)
    error_response, parse_json, child_ended = (
        http_server.error_response,
        http_server.parse_json,
        launch_server.child_ended,
    )

    class Never(http_server.Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await asyncio.sleep(3600)

    def swallow(error: Any) -> Any:
        return Never() if faults.get("swallow_reject") and error.status == 503 else error_response(error)

    def fragile(body: bytes) -> Any:
        if faults.get("fragile_parser") and b"NaN" in body:
            raise KeyError("planted")
        return parse_json(body)

    def deaf(front: Any, child: Any) -> None:
        if not faults.get("deaf"):
            child_ended(front, child)

    def forgetful(table: AbortingTable, call: Any) -> None:
        left = [wire for wire, (c, _) in table.live.items() if c is call]
        close(table, call)
        if left and faults.get("leak_slot"):
            table.live[f"never removed: {left[0]}"] = call, 0

    close = AbortingTable.close
    AbortingTable.close = forgetful  # type: ignore[method-assign]
    http_server.error_response, http_server.parse_json, launch_server.child_ended = swallow, fragile, deaf
    return real_front(args)


if __name__ == "__main__":
    model, folder, *fields = sys.argv[1:]
    logging.basicConfig(level="INFO", format="%(name)s %(message)s")
    more = {name: json.loads(value) for name, value in (field.split("=", 1) for field in fields)}
    args = ServerArgs(model_path=model, port=0, compilation_cache_dir=str(Path(model) / "xla"), **more)
    try:
        sys.exit(launch(args, Builders(faulty_front, faulty_scheduler, real_detokenizer)))
    except (StartError, ConfigError) as error:
        sys.exit(f"error: {error}")
