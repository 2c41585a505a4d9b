"""The engine on fake devices: a child process of test_mesh.py, because XLA reads their number before JAX starts.

By hand: `python tests/mesh_cases.py tokens '{"name": "qwen3", "tp": 4, "dp": 2}'` prints one JSON line a case.
"""

import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

# optimising machine code takes longer here than running it; collectives are placed long before that
os.environ.update(
    JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax
import numpy as np
import test_promises
from jax.sharding import NamedSharding, PartitionSpec
from parity_models import VARIANTS, write_checkpoint

from tpu_mini_sglang.kernels.attention import AttentionBatch, paged_attention
from tpu_mini_sglang.kernels.ragged_prefill import attention_kernels
from tpu_mini_sglang.managers.io_struct import GenerateReq
from tpu_mini_sglang.managers.scheduler import Draft, Limits, Scheduler, check_pages, stats
from tpu_mini_sglang.managers.startup import build_scheduler
from tpu_mini_sglang.model_executor.model_runner import Bucket, Buckets, ModelRunner
from tpu_mini_sglang.models.hub import load_model_config, open_checkpoint
from tpu_mini_sglang.models.weights import load_model
from tpu_mini_sglang.sampling.sampling_params import SamplingParams
from tpu_mini_sglang.server_args import ServerArgs
from tpu_mini_sglang.sharding import fit_to_devices, make_mesh
from tpu_mini_sglang.tpu.plan import find_collectives

# a vocabulary that no split divides, so that all but one device pad it
SPLITS = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 253}
PAGE, CHUNK, ROWS, PAGES = 4, 32, 4, 40


def load_runner(
    hf: dict, tp: int, dp: int, ep: int = 1, backend: str = "xla", buckets: Buckets | None = None
) -> ModelRunner:
    """The engine's own way from a checkpoint to a runner."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = write_checkpoint(Path(tmp), hf)
        config, mesh = load_model_config(folder, dtype="float32"), make_mesh(tp, dp, ep)
        config = fit_to_devices(config, tp, ep)
        model = load_model(config, open_checkpoint(folder), mesh, progress=False)
        buckets = buckets or Buckets(CHUNK, ROWS, ROWS, 16)
        return ModelRunner(model, config, mesh, PAGES, PAGE, buckets, backend)


def requests(vocab: int, count: int) -> list[GenerateReq]:
    """Prompts that share prefixes and are longer than a chunk; half greedy, half sampled with all that there is."""
    rng, specs = random.Random(0), []
    prefixes = [[rng.randrange(3, vocab) for _ in range(n)] for n in (9, 21, 40)]
    for i in range(count):
        prompt = prefixes[i % 3] + [rng.randrange(3, vocab) for _ in range(rng.randint(1, 9))]
        sampled = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "logit_bias": {7: 1.5}}
        params = SamplingParams(
            **sampled if i % 2 else {"temperature": 0.0}, seed=i, max_new_tokens=8 + i, ignore_eos=True
        )
        judged = {"logprobs": True, "top_logprobs": 3, "logprob_start_len": i - 1} if i % 4 == 1 else {}
        specs.append(GenerateReq(f"r{i}", prompt, params, **judged))
    return specs


def serve(runner: ModelRunner, specs: list[GenerateReq], draft: Draft | None = None) -> dict[str, list[int]]:
    """The tokens of each request, served together through a scheduler; those of top logprobs after them."""
    config = runner.config
    limits = Limits(config.context_len, config.vocab_size, config.eos_token_ids, CHUNK, ROWS, overlap=draft is None)
    scheduler = Scheduler(runner, limits, draft=draft)
    tokens, top = {s.rid: [] for s in specs}, {s.rid: [] for s in specs}
    incoming, used = list(specs), set()
    while incoming or scheduler.has_work:
        for out in scheduler.step(incoming[:3]):
            assert out.finish is None or out.finish.type == "length", out
            tokens[out.rid] += out.token_ids
            entries = [*(out.prompt_logprobs or []), *(out.logprobs or [])]
            top[out.rid] += [i for entry in entries for i, _ in entry.top]
        incoming = incoming[3:]
        check_pages(scheduler.state)
        used |= {r.shard for r in scheduler.state.running}
    assert used == set(range(runner.num_shards)), f"only the shards {used} had work"
    assert draft is None or scheduler.state.counters.spec_accepted_tokens > 0, "no draft was ever right"
    assert runner.num_shards > 2 or stats(scheduler.state)["cached_tokens"] > 0, "no prefix was ever found"
    return {rid: tokens[rid] + top[rid] for rid in tokens}


class Knows:
    """Drafts from texts that are known beforehand, one in four with a mistake."""

    def __init__(self, texts: list[list[int]]):
        self.texts, self.rng = texts, random.Random(0)

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        """Up to six tokens."""
        done, most = len(token_ids), min(most, self.rng.randint(0, 6))
        (drafts,) = [text[done : done + most] for text in self.texts if text[:done] == list(token_ids)]
        if drafts and self.rng.random() < 0.25:
            drafts[self.rng.randrange(len(drafts))] = self.rng.randrange(SPLITS["vocab_size"])
        return drafts

    def learn(self, drafted: int, right: int) -> None:
        """No need to."""


def tokens(
    name: str, tp: int, dp: int, ep: int = 1, backend: str = "xla", count: int = 9, drafts: bool = False
) -> dict:
    """What the requests get from this family on this mesh, perhaps once more with drafts."""
    hf, buckets = VARIANTS[name] | SPLITS, Buckets(CHUNK, ROWS, ROWS, 16, [Bucket(CHUNK, ROWS, 8, scored=CHUNK)])
    runner, specs = load_runner(hf, tp, dp, ep, backend, buckets), requests(hf["vocab_size"], count)
    found = serve(runner, specs)
    if drafts:
        texts = [[*spec.input_ids, *found[spec.rid]] for spec in specs]
        found = serve(runner, specs, lambda: Knows(texts))
    return {"tokens": found}


def startup(name: str, tp: int, dp: int, ep: int = 1) -> dict:
    """The tokens of a scheduler made from the server's own flags, and what its start said."""
    hf, lines = VARIANTS[name] | SPLITS, []
    with tempfile.TemporaryDirectory() as tmp:
        args = ServerArgs(
            model_path=str(write_checkpoint(Path(tmp) / "model", hf)), page_size=PAGE, tp_size=tp, dp_size=dp,
            max_total_tokens=PAGES * PAGE, max_running_requests=ROWS, chunked_prefill_size=CHUNK, dtype="float32",
            ep_size=ep, skip_server_warmup=True, compilation_cache_dir=tmp + "/xla",
        )  # fmt: skip
        runner = build_scheduler(args, lines.append).state.runner
        return {"lines": lines, "tokens": serve(runner, requests(hf["vocab_size"], 9))}


def collectives(name: str, tp: int, dp: int, ep: int, layers: int, decode: bool, vocab: int = 8190) -> dict:
    """(kind, shape, bytes, devices) of each collective in the runner's own program for a step."""
    hf = VARIANTS[name] | SPLITS | {"num_hidden_layers": layers, "vocab_size": vocab}
    runner = load_runner(hf, tp, dp, ep)
    (bucket,) = runner.buckets.decode if decode else runner.buckets.extend
    runner.compile(bucket)
    runner.compile(bucket.sampler)
    programs = runner.programs[bucket], runner.samplers[bucket.sampler][0]
    return {
        "found": [one for program in programs for one in find_collectives(program.as_text())],
        "hidden": f"f32[{bucket.tokens},{hf['hidden_size']}]",
        "logits": bucket.rows * vocab * 4,
    }


def kernels(tp: int, dp: int, q_block: int, window: int | None) -> dict:
    """How far the Pallas kernels, interpreted on this mesh, lie from XLA's attention on one device."""
    rng, mesh, heads, rows = np.random.default_rng(0), make_mesh(tp, dp), 8, 3
    q_lens = [1] * rows if q_block == 1 else [1, 7, 4]
    tokens = q_block if q_block > 1 else rows
    batch = AttentionBatch(
        np.tile(np.cumsum([0, *q_lens], dtype=np.int32), dp),
        rng.integers(8, 30, dp * rows, dtype=np.int32),
        rng.integers(1, 20, (dp * rows, 8), dtype=np.int32),
        q_block,
    )
    q = rng.normal(size=(dp * tokens, 2 * heads, 16)).astype(np.float32)
    pages = rng.normal(size=(dp * 20, heads, 4, 32)).astype(np.float32)

    def attend(backend: str, q: jax.Array, pages: jax.Array, batch: AttentionBatch) -> jax.Array:
        return paged_attention(q, pages, batch, scale=0.25, window=window, **attention_kernels(backend))

    own = PartitionSpec("data")
    with jax.set_mesh(mesh):
        placed = jax.device_put(pages, NamedSharding(mesh, PartitionSpec("data", "tensor")))
        step = partial(attend, "pallas")
        if dp > 1:
            step = jax.shard_map(step, in_specs=own, out_specs=own, axis_names={"data"}, check_vma=False)
        got = np.asarray(jax.jit(step)(q, placed, batch)).reshape(dp, -1)
    parts = [jax.tree.map(lambda x, s=s: np.split(x, dp)[s], (q, pages, batch)) for s in range(dp)]
    want = np.stack([np.asarray(jax.jit(partial(attend, "xla"))(*part)).reshape(-1) for part in parts])
    assert np.abs(want).max() > 0.1
    return {"error": float(np.abs(got - want).max())}


def promises(tp: int, dp: int) -> dict:
    """The tests of test_promises.py over the shards of one runner."""
    runner = test_promises.new_runner(make_mesh(tp, dp))
    test_promises.test_same_tokens_alone_in_a_crowd_cached_and_retracted(runner, 0, "fcfs", True)
    test_promises.test_same_tokens_alone_in_a_crowd_cached_and_retracted(runner, 1, "lpm", False)
    test_promises.test_retraction_changes_no_token(runner)
    test_promises.test_aborted_neighbours_change_no_token(runner)
    test_promises.mixed_traffic(runner, 40)
    return {"kept": True}


def main(kind: str, *cases: str) -> None:
    """Run each case; one JSON line of results each."""
    run = {"tokens": tokens, "collectives": collectives, "promises": promises, "kernels": kernels, "startup": startup}[
        kind
    ]
    for case in cases:
        about = json.loads(case)
        print(json.dumps(about | run(**about)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
