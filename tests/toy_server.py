"""A server without a model, in three processes. It answers each prompt with itself, or with what the prompt asks for:
the text between the last `SAY(` and `)SAY`.

`toy_server.py PORT API_KEY [FIELD=VALUE]...`, fields of ServerArgs with values in JSON."""

import json
import logging
import sys
import time
from pathlib import Path

import msgspec

from tpu_mini_sglang.entrypoints.engine import toy_front
from tpu_mini_sglang.launch_server import Builders, Profiled, StartError, launch
from tpu_mini_sglang.managers.detokenizer_manager import EchoScheduler, toy_detokenizer, toy_scheduler
from tpu_mini_sglang.managers.io_struct import ControlOut, GenerateReq, Message
from tpu_mini_sglang.managers.tokenizer_manager import Limits
from tpu_mini_sglang.server_args import ServerArgs
from tpu_mini_sglang.tokenizer import Tokenizer

STALL = [*b"stall"]  # a prompt that stops the scheduler for seven seconds


class PacedScheduler(EchoScheduler):
    """At most a thousand steps a second, so that a long answer is slow rather than a flood; counts its requests."""

    arrivals = 0

    def scripted(self, message: Message) -> Message:
        """A request that tells what to say becomes one for that text and an end."""
        if not isinstance(message, GenerateReq):
            return message
        _, mark, rest = bytes(token for token in message.input_ids if token < 256).rpartition(b"SAY(")
        said = [*rest.partition(b")SAY")[0], *self.eos]
        return msgspec.structs.replace(message, input_ids=said) if mark else message

    def step(self, incoming: list[Message]) -> list[Message]:
        incoming = [self.scripted(message) for message in incoming]
        if self.live:
            time.sleep(0.001)
        if any(isinstance(message, GenerateReq) and message.input_ids == STALL for message in incoming):
            time.sleep(7)
        self.arrivals += sum(isinstance(message, GenerateReq) for message in incoming)
        out = super().step(incoming)
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
