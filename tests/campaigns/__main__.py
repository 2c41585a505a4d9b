"""Run campaigns: `python -m tests.campaigns [NAME...] [--long] [--json FILE]`, from the repository's root."""

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from . import bad_input, cache, ends, overload, soak, traces
from .harness import Server, make_model

Outcome = tuple[dict[str, Any], list[str]]  # figures, and what is wrong with them
Tell = Callable[[str], None]
# Settings under which a trace must give the tokens that its requests get alone under the usual ones.
VARIANTS: list[dict[str, Any]] = [
    {}, {"chunked_prefill_size": 16}, {"chunked_prefill_size": 128, "schedule_policy": "lpm"},
    {"disable_overlap_schedule": True, "max_total_tokens": 400},
    {"disable_radix_cache": True, "max_running_requests": 4},
]  # fmt: skip


def run_traces(model: Path, long: bool, tell: Tell) -> Outcome:
    """1: random traces against the same requests alone."""
    count, found = (40 if long else 4), {}
    single = Server(model)
    try:
        for i, fields in enumerate(VARIANTS if long else VARIANTS[:1]):
            name = ", ".join(f"{k}={v}" for k, v in fields.items()) or "as it comes"
            server = Server(model, **fields) if fields else single
            try:
                seeds = range(1000 * i, 1000 * i + count)
                found[name] = asyncio.run(traces.play(server, single, seeds, lambda line, n=name: tell(f"{n}: {line}")))
            finally:
                server.end() if server is not single else None
    finally:
        single.end()
    return found, [f"{name}: {p}" for name, figures in found.items() for p in traces.problems(figures)]


def run_cache(model: Path, long: bool, tell: Tell) -> Outcome:
    """2: cached against cold, and with a retraction at every third step."""
    server = Server(model)
    try:
        found = asyncio.run(cache.run(server, 1000 if long else 30, tell))
    finally:
        server.end()
    return found, cache.problems(found)


def run_soak(model: Path, long: bool, tell: Tell) -> Outcome:
    """3: a soak."""
    server = Server(model)
    try:
        found = asyncio.run(soak.run(server, *((9000, 1000) if long else (300, 300)), tell))
    finally:
        server.end()
    return found, soak.problems(found)


def run_bad_input(model: Path, long: bool, tell: Tell) -> Outcome:
    """4: curated and generated bad input."""
    server = Server(model)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = asyncio.run(bad_input.run(server, 2000 if long else 80, folder, tell))
    finally:
        server.end()
    return found, bad_input.problems(found)


def run_overload(model: Path, long: bool, tell: Tell) -> Outcome:
    """5: ten times the capacity."""
    server = Server(model, max_queued_requests=overload.QUEUE)
    try:
        found = asyncio.run(overload.run(server, 60 if long else 8, tell))
    finally:
        server.end()
    return found, overload.problems(found)


def run_ends(model: Path, long: bool, tell: Tell) -> Outcome:
    """6: SIGTERM and SIGKILL under load."""
    found = asyncio.run(ends.run(model, *((20, 10) if long else (2, 1)), tell))
    return found, ends.problems(found)


CAMPAIGNS = {
    "traces": run_traces, "cache": run_cache, "soak": run_soak, "bad_input": run_bad_input, "overload": run_overload,
    "ends": run_ends,
}  # fmt: skip


def machine() -> str:
    """The CPU, for whoever reads the figures."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "CPU")
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def main() -> int:
    """Run what was named, or all; 1 if anything went wrong."""
    parser = argparse.ArgumentParser("tests.campaigns", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CAMPAIGNS)} (default: all)")
    parser.add_argument("--long", action="store_true", help="the long form, for an hour")
    parser.add_argument("--json", type=Path, help="write the figures there, beside those that it has already")
    args = parser.parse_args()
    if unknown := set(args.names) - set(CAMPAIGNS):
        parser.error(f"no such campaign: {', '.join(sorted(unknown))}")
    random.seed(0)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        for name in args.names or CAMPAIGNS:
            begin = time.time()
            figures, problems = CAMPAIGNS[name](
                model, args.long, lambda line, n=name: print(f"{n}: {line}", flush=True)
            )
            about = {"date": str(date.today()), "machine": machine(), "seconds": round(time.time() - begin)}
            for problem in problems:
                print(f"{name}: WRONG: {problem}", flush=True)
            print(f"{name}: {len(problems)} problems in {about['seconds']} s", flush=True)
            wrong += len(problems)
            if args.json:
                known = json.loads(args.json.read_text()) if args.json.exists() else {}
                known[name] = about | {"form": "long" if args.long else "short", "problems": problems} | figures
                args.json.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
