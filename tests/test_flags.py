"""Tokens are the same under every combination of flags: some random ones, other ones in each run.

A run prints its seed; `FLAGS_SEED=7 pytest tests/test_flags.py` draws what the run with seed 7 drew. The combinations
are tried in a child process, which has several fake devices: `python tests/test_flags.py SEED COUNT` by hand.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

# One line for a flag: its values, of which none may change a token.
FLAGS: dict[str, list[Any]] = {
    "disable_overlap_schedule": [False, True],
    "disable_radix_cache": [False, True],
    "schedule_policy": ["fcfs", "lpm"],
    "schedule_conservativeness": [0.0, 0.3, 1.0, 3.0],
    "page_size": [4, 8, 16],
    "chunked_prefill_size": [16, 32, 48, 128],
    "max_running_requests": [1, 4, 9, 12],
    "max_total_tokens": [256, 320, 2048],
    "tp_size": [1, 1, 2],
    "dp_size": [1, 1, 2],
    "speculative_algorithm": [None, None, "NGRAM"],
    "skip_server_warmup": [False, True],
}
LONG_RUNS: dict[str, list[Any]] = {"attention_backend": ["xla", "xla", "xla", "pallas"]}  # interpreting takes minutes
# What computes with other numbers gives other tokens: these are compared with the plainest setting of the same ones.
NUMBERS: dict[str, list[Any]] = {"kv_cache_dtype": ["auto", "auto", "bfloat16"]}
MANY = 10  # combinations: a long run
PLAIN = {
    "disable_overlap_schedule": True, "disable_radix_cache": True, "max_running_requests": 1, "page_size": 16,
    "chunked_prefill_size": 128, "max_total_tokens": 2048, "skip_server_warmup": True,
}  # fmt: skip


def drawn(seed: int, long_run: bool) -> dict[str, Any]:
    """A combination."""
    rng, names = random.Random(seed), FLAGS | NUMBERS | (LONG_RUNS if long_run else {})
    return {name: rng.choice(values) for name, values in names.items()}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [3, pytest.param(60, marks=[pytest.mark.exhaustive, pytest.mark.timeout(10800)])])
def test_no_flag_changes_a_token(count: int) -> None:
    seed = int(os.environ.get("FLAGS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"FLAGS_SEED={seed}")  # pytest shows it where the test fails
    devices = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    command = [sys.executable, __file__, str(seed), str(count)]
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    assert child.returncode == 0, f"FLAGS_SEED={seed}\n{child.stdout[-1000:]}{child.stderr[-3000:]}"
    found = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(found) == count
    for one in found:
        assert not one["differ"], f"FLAGS_SEED={seed}: {one}"
    if count > MANY:  # a test that never meets the hard cases proves nothing
        assert sum(one["retractions"] > 0 for one in found) > 2 and sum(one["cached"] > 0 for one in found) > 10


class Combinations:
    """Servers over one tiny checkpoint, asked the same."""

    def __init__(self, folder: Path, count: int = 12):
        import parity_models
        import test_promises

        rng = random.Random(0)
        self.specs = [test_promises.random_request(f"r{i}", rng) for i in range(count)]
        self.folder = parity_models.write_checkpoint(folder / "model", parity_models.VARIANTS["llama"])
        self.plain: dict[str, Any] = {}  # by numbers

    def scheduler(self, flags: dict[str, Any]) -> Any:
        """As a server builds it; off a TPU it would refuse Pallas, which is interpreted here."""
        from tpu_mini_sglang.managers import startup
        from tpu_mini_sglang.server_args import ServerArgs
        from tpu_mini_sglang.speculative.ngram import drafter

        startup.choose_backend = lambda wanted, platform: "pallas" if wanted == "pallas" else "xla"
        args = ServerArgs(model_path=str(self.folder), compilation_cache_dir=str(self.folder / "xla"), **flags)
        return startup.build_scheduler(args, lambda line: None, draft=drafter(args))

    def alone(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """What each request gets from the plainest server when nobody else is there."""
        import test_promises

        key = json.dumps(numbers)
        if key not in self.plain:
            scheduler = self.scheduler(PLAIN | numbers)
            self.plain[key] = {s.rid: test_promises.serve(scheduler, [[s]])[s.rid] for s in self.specs}
        return self.plain[key]

    def compare(self, flags: dict[str, Any]) -> dict[str, Any]:
        """Which requests get something else from a server with these flags, in a crowd, and asked once more."""
        import test_promises

        scheduler = self.scheduler(flags)
        expected = self.alone({name: flags[name] for name in NUMBERS})
        crowds = [self.specs[:7], self.specs[7:]], [self.specs]
        found = [test_promises.serve(scheduler, crowd) for crowd in crowds]
        counters = scheduler.state.counters
        differ = [rid for got in found for rid in expected if got.get(rid) != expected[rid]]
        return {"differ": differ, "retractions": counters.retractions, "cached": counters.cached_tokens}


if __name__ == "__main__":
    seed, count = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as tmp:
        servers = Combinations(Path(tmp))
        for i in range(count):
            flags = drawn(seed + i, count > MANY)
            print(json.dumps({"flags": flags} | servers.compare(flags)), flush=True)
