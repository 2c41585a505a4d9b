"""A server without a model, in three processes. It answers each prompt with itself, or with what the prompt asks for:
the text between the last `SAY(` and `)SAY`; but it obeys grammars, as a model would.

`toy_server.py PORT API_KEY [FIELD=VALUE]...`, fields of ServerArgs with values in JSON. TOY_WISHES in the environment
may hold more to say, as a JSON object: words of a prompt, and the answer to it.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from tpu_mini_sglang.constrained.grammar import Constraint, Grammars
from tpu_mini_sglang.entrypoints.engine import toy_front
from tpu_mini_sglang.launch_server import Builders, Profiled, StartError, launch
from tpu_mini_sglang.managers.detokenizer_manager import (
    Echo,
    EchoScheduler,
    toy_detokenizer,
    toy_scheduler,
    toy_tokenizer,
)
from tpu_mini_sglang.managers.io_struct import (
    AbortReq,
    ControlOut,
    FinishReason,
    GenerateReq,
    Message,
    TokenLogprob,
    TokenOut,
)
from tpu_mini_sglang.managers.tokenizer_manager import Limits
from tpu_mini_sglang.server_args import ServerArgs
from tpu_mini_sglang.tokenizer import Tokenizer

STALL = [*b"stall"]  # a prompt that stops the scheduler for seven seconds
WISHES = json.loads(os.environ.get("TOY_WISHES", "{}"))
VOCABULARY, BRIEF = 258, [*b'"}],:0{o']  # what ends an answer soonest; and `<tool_call>` rather than `<think>`


class Obeying:
    """A request with a grammar: it says what it wishes as long as it may, and then as little as it must."""

    def __init__(self, req: GenerateReq, constraint: Constraint):
        self.echo, self.constraint, self.wish = Echo(req), constraint, req.input_ids

    def next(self, eos: int) -> TokenOut:
        """Its next token, which may be its last."""
        self.constraint.wait(60)
        bits = np.zeros(-(-VOCABULARY // 32), np.int32)
        self.constraint.allow(bits)
        allowed = [token for token in range(VOCABULARY) if bits[token // 32] >> (token % 32) & 1]
        wish = self.wish[self.echo.done] if self.echo.done < len(self.wish) else eos
        self.wish = self.wish if wish in allowed else []
        allowed.sort(key={*b" \t\r\n"}.__contains__)
        token = next(token for token in (wish, eos, *BRIEF, *allowed) if token in allowed)
        self.echo.done += 1
        judged = [TokenLogprob(token, -0.5)] if self.echo.req.logprobs else None  # one for each token, the last one too
        if token == eos:
            return self.echo.out([token], FinishReason("stop", matched=token), judged)
        self.constraint.accept(token)
        full = self.echo.done == self.echo.req.sampling.max_new_tokens
        done = FinishReason("stop") if self.constraint.complete else FinishReason("length") if full else None
        return self.echo.out([token], done, judged)


def scripted(message: GenerateReq, eos: list[int]) -> GenerateReq:
    """A request that tells what to say becomes one for that text and an end."""
    prompt = bytes(token for token in message.input_ids if token < 256)
    _, mark, rest = prompt.rpartition(b"SAY(")
    said = [rest.partition(b")SAY")[0]] if mark else []
    said += [answer.encode() for words, answer in WISHES.items() if words.encode() in prompt]
    return msgspec.structs.replace(message, input_ids=[*said[0], *eos]) if said else message


class PacedScheduler(EchoScheduler):
    """At most a thousand steps a second, so that a long answer is slow rather than a flood; counts its requests."""

    def __init__(self, eos_token_ids: list[int]):
        super().__init__(eos_token_ids)
        self.arrivals, self.obeying = 0, dict[str, Obeying]()
        self.grammars: Grammars | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.live or self.obeying)

    def take(self, message: Message) -> list[Message]:
        """What is left of a message for the echo."""
        if isinstance(message, AbortReq):
            gone = [self.obeying.pop(rid) for rid in [*self.obeying] if message.rid in ("", rid)]
            self.late += [it.echo.out([], FinishReason("abort", message="aborted")) for it in gone]
        if not isinstance(message, GenerateReq):
            return [message]
        message = scripted(message, self.eos)
        if message.sampling.grammar is None:
            return [message]
        self.grammars = self.grammars or Grammars(toy_tokenizer, VOCABULARY, tuple(self.eos))
        self.obeying[message.rid] = Obeying(message, self.grammars(message.sampling))
        return []

    def step(self, incoming: list[Message]) -> list[Message]:
        if self.has_work:
            time.sleep(0.001)
        if any(isinstance(message, GenerateReq) and message.input_ids == STALL for message in incoming):
            time.sleep(7)
        self.arrivals += sum(isinstance(message, GenerateReq) for message in incoming)
        self.late: list[Message] = []
        out = super().step([left for message in incoming for left in self.take(message)]) + self.late
        for rid, it in [*self.obeying.items()]:
            out.append(it.next(self.eos[0]))
            if out[-1].finish is not None:
                del self.obeying[rid]
        for message in out:
            if isinstance(message, ControlOut):
                message.data["arrivals"] = self.arrivals
        return out


def front(args: ServerArgs) -> tuple[ServerArgs, Tokenizer, Limits]:
    """The toy's front, with the template that it was told to use."""
    args, tokenizer, limits = toy_front(args)
    if args.chat_template is not None:
        tokenizer.hf.chat_template = Path(args.chat_template).read_text(encoding="utf-8")
    return args, tokenizer, limits


def paced_scheduler(args: ServerArgs) -> Profiled:
    return Profiled(PacedScheduler(toy_scheduler(args).eos), args.profile_dir)


if __name__ == "__main__":
    port, key, *fields = sys.argv[1:]
    logging.basicConfig(level="INFO", format="%(name)s %(message)s")
    more = {name: json.loads(value) for name, value in (field.split("=", 1) for field in fields)}
    own = {"served_model_name": "toy", "context_length": 4_000_000, "api_key": key or None}
    args = ServerArgs(port=int(port), **(own | more))
    try:
        sys.exit(launch(args, Builders(front, paced_scheduler, toy_detokenizer)))
    except StartError as error:
        sys.exit(f"error: {error}")
