"""A server without a model, in three processes: `toy_server.py PORT API_KEY`. It answers each prompt with itself."""

import logging
import sys
import time

from tpu_mini_sglang.entrypoints.engine import toy_front
from tpu_mini_sglang.launch_server import Builders, StartError, launch
from tpu_mini_sglang.managers.detokenizer_manager import EchoScheduler, toy_detokenizer, toy_scheduler
from tpu_mini_sglang.managers.io_struct import ControlOut, GenerateReq, Message
from tpu_mini_sglang.server_args import ServerArgs


class PacedScheduler(EchoScheduler):
    """At most a thousand steps a second, so that a long answer is slow rather than a flood; counts its requests."""

    arrivals = 0

    def step(self, incoming: list[Message]) -> list[Message]:
        if self.live:
            time.sleep(0.001)
        self.arrivals += sum(isinstance(message, GenerateReq) for message in incoming)
        out = super().step(incoming)
        for message in out:
            if isinstance(message, ControlOut):
                message.data["arrivals"] = self.arrivals
        return out


def paced_scheduler(args: ServerArgs) -> PacedScheduler:
    return PacedScheduler(toy_scheduler(args).eos)


if __name__ == "__main__":
    port, key = sys.argv[1:]
    logging.basicConfig(level="INFO", format="%(name)s %(message)s")
    args = ServerArgs(port=int(port), served_model_name="toy", context_length=4_000_000, api_key=key or None)
    try:
        sys.exit(launch(args, Builders(toy_front, paced_scheduler, toy_detokenizer)))
    except StartError as error:
        sys.exit(f"error: {error}")
