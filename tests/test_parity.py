"""Every family's logits and greedy tokens equal transformers', in float32, through the engine's own load path.

The references in tests/data come from make_parity_reference.py; where PyTorch is installed the same comparison also
runs live, on a checkpoint that transformers itself initialised and saved.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity_models import VARIANTS, prompt_ids, write_checkpoint

from tpu_mini_sglang.kernels.attention import AttentionBatch
from tpu_mini_sglang.managers.io_struct import GenerateReq, TokenLogprob
from tpu_mini_sglang.managers.scheduler import Limits, Scheduler, check_pages
from tpu_mini_sglang.model_executor.model_runner import Bucket, Buckets, ModelRunner
from tpu_mini_sglang.models.hub import load_model_config, open_checkpoint
from tpu_mini_sglang.models.weights import load_model
from tpu_mini_sglang.sampling.sampling_params import SamplingParams
from tpu_mini_sglang.sharding import make_mesh

DATA = Path(__file__).parent / "data"
PAGE, WIDTH, STEPS, ROWS = 8, 14, 64, 4
TOLERANCE = 1e-4


class Driver:
    """One sequence on shuffled, non-contiguous pages, advanced by any number of tokens at a time."""

    def __init__(self, folder: Path) -> None:
        self.config = load_model_config(folder, dtype="float32")
        model = load_model(self.config, open_checkpoint(folder), dtype="float32", progress=False)
        graph, self.state = nnx.split(model)

        @partial(jax.jit, donate_argnums=(2,))
        def step(state: nnx.State, ids: jax.Array, kv: list, batch: AttentionBatch) -> tuple[jax.Array, list]:
            model = nnx.merge(graph, state)
            hidden, kv = model(ids, kv, batch)
            return model.logits(hidden), kv

        self.step: Callable = step
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """An empty sequence whose pages hold another's garbage, so that reading a stale slot shows."""
        pages = np.random.default_rng(seed).permutation(np.arange(1, 2 * WIDTH + 1))[:WIDTH]
        self.table, self.length = jnp.asarray(pages[None], jnp.int32), 0
        shape = (2 * WIDTH + 1, self.config.num_kv_heads, PAGE, 2 * self.config.head_dim)
        self.kv = [jnp.full(shape, jnp.nan, jnp.float32) for _ in range(self.config.num_layers)]

    def feed(self, ids: np.ndarray, bucket: int) -> np.ndarray:
        """Logits [len(ids), V] of the next tokens, in a flat axis padded to `bucket`."""
        n, self.length = len(ids), self.length + len(ids)
        padded = np.zeros(bucket, np.int32)
        padded[:n] = ids
        starts, lens = jnp.array([0, n], jnp.int32), jnp.array([self.length], jnp.int32)
        batch = AttentionBatch(starts, lens, self.table, 1 if bucket == 1 else 16)
        logits, self.kv = self.step(self.state, jnp.asarray(padded), self.kv, batch)
        return np.asarray(logits)[:n]

    def greedy(self, logits: np.ndarray, steps: int = STEPS) -> list[int]:
        """`steps` greedy tokens, the first from these logits, the rest decoded one by one."""
        tokens = [int(logits[-1].argmax())]
        while len(tokens) < steps:
            tokens.append(int(self.feed(np.array(tokens[-1:]), 1)[-1].argmax()))
        return tokens


def compare(driver: Driver, prompt: np.ndarray, logits: np.ndarray, tokens: list[int], kept: slice) -> None:
    """Whole prefill, chunked prefill and token-by-token decode against one reference."""
    for seed, chunk in enumerate((len(prompt), 16, 1)):
        driver.reset(seed)
        bucket = 48 if chunk == len(prompt) else chunk
        parts = [driver.feed(prompt[i : i + chunk], bucket) for i in range(0, len(prompt), chunk)]
        found = np.concatenate(parts)
        np.testing.assert_allclose(found[kept], logits, atol=TOLERANCE, rtol=0, err_msg=f"chunks of {chunk}")
        assert driver.greedy(found) == tokens, f"greedy tokens after chunks of {chunk}"


@pytest.mark.parametrize("name", VARIANTS)
def test_family_equals_committed_reference(name: str, tmp_path: Path) -> None:
    """Seeded weights, no PyTorch: safetensors in one file for even variants, in three shards for odd ones."""
    folder = write_checkpoint(tmp_path / name, VARIANTS[name], shards=1 + 2 * (list(VARIANTS).index(name) % 2))
    with np.load(DATA / f"parity_{name}.npz") as reference:
        logits, tokens = reference["logits"], reference["tokens"].tolist()
    assert len(tokens) == STEPS
    compare(Driver(folder), prompt_ids(name), logits, tokens, slice(0, None, 5))


@pytest.mark.parametrize(
    "name", ["llama_llama3_rope", "mistral_window", "qwen2", "qwen3", "mixtral", "qwen3_moe_normed"]
)
def test_family_equals_transformers(name: str, tmp_path: Path) -> None:
    """A checkpoint that transformers initialised and saved itself, config.json included."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = {k: v for k, v in VARIANTS[name].items() if k not in ("model_type", "architectures", "torch_dtype")}
    config = transformers.AutoConfig.for_model(VARIANTS[name]["model_type"], initializer_range=0.3, **fields)
    torch.manual_seed(3)
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    reference.save_pretrained(tmp_path)
    prompt = prompt_ids(name)
    with torch.no_grad():
        logits = reference(torch.from_numpy(prompt)[None].long()).logits[0].numpy()
        ids = reference.generate(
            torch.from_numpy(prompt)[None].long(), max_new_tokens=STEPS, do_sample=False, eos_token_id=None
        )
    compare(Driver(tmp_path), prompt, logits, ids[0, len(prompt) :].tolist(), slice(None))


def judge(runner: ModelRunner, prompts: list[list[int]], start: int, chunk: int) -> list[list[TokenLogprob]]:
    """Logprobs of these prompts, twice: together with nothing cached, and one after the other from what is cached."""
    config = runner.config
    limits = Limits(config.context_len, config.vocab_size, (), chunk, ROWS, overlap=True)
    scheduler, found = Scheduler(runner, limits), []
    params = SamplingParams(temperature=0.0, max_new_tokens=4)
    specs = [GenerateReq(f"p{i}", ids, params, True, 5, logprob_start_len=start) for i, ids in enumerate(prompts)]
    for specs_at_once in (specs, *([spec] for spec in specs)):
        outs = scheduler.step(specs_at_once)
        while scheduler.has_work:
            outs += scheduler.step([])
        found += [out.prompt_logprobs for out in sorted(outs, key=lambda out: out.rid)]
        check_pages(scheduler.state)
    return found


@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen3_tied_biases"])
def test_prompt_logprobs_equal_the_reference(name: str, tmp_path: Path) -> None:
    """The log-softmax of the reference's logits, whatever the chunks, the cache and the neighbours; every 5th token."""
    folder = write_checkpoint(tmp_path / name, VARIANTS[name])
    config = load_model_config(folder, dtype="float32")
    model = load_model(config, open_checkpoint(folder), dtype="float32", progress=False)
    buckets = Buckets(64, ROWS, ROWS, 16, [Bucket(32, ROWS, 16, scored=32)])
    runner = ModelRunner(model, config, make_mesh(), 64, PAGE, buckets)
    with np.load(DATA / f"parity_{name}.npz") as reference:
        logits = reference["logits"].astype(np.float64)
    want = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    prompt = prompt_ids(name).tolist()
    neighbour = [5, *prompt[:30]]
    for start, chunk in ((0, 64), (0, 24), (17, 64)):
        first, _, again, _ = judge(runner, [prompt, neighbour], start, chunk)
        for entries in (first, again):
            begin = max(1, start)
            assert [entry.token_id for entry in entries] == prompt[begin:]
            for i in range(-(-(begin - 1) // 5) * 5, len(prompt) - 1, 5):  # the logits at i score the token after it
                entry, row = entries[i + 1 - begin], want[i // 5]
                assert abs(entry.logprob - row[prompt[i + 1]]) < 1e-3
                assert [token for token, _ in entry.top] == np.argsort(-row)[:5].tolist()
                np.testing.assert_allclose([p for _, p in entry.top], np.sort(row)[::-1][:5], atol=1e-3)
    assert runner.num_compiles == 4  # the decode shape, the one that scores, and a sampler for each


@pytest.mark.parametrize("name", ["qwen3"])
def test_a_wrong_detail_is_seen(name: str, tmp_path: Path) -> None:
    """The references tell a model from its neighbour: each planted mistake moves logits past the tolerance."""
    with np.load(DATA / f"parity_{name}.npz") as reference:
        logits = reference["logits"]
    for field, value in (("rope_theta", 20000.0), ("rms_norm_eps", 1e-2)):
        driver = Driver(write_checkpoint(tmp_path / field, VARIANTS[name] | {field: value}))
        found = driver.feed(prompt_ids(name), 48)[::5]
        assert np.abs(found - logits).max() > 10 * TOLERANCE, field


@pytest.mark.slow
def test_smollm2_greedy_tokens_equal_transformers() -> None:
    """Twenty prompts through the chat template, one batch of the real model in float32."""
    from tpu_mini_sglang.models.hub import resolve_model
    from tpu_mini_sglang.tokenizer import load_tokenizer

    rows = json.loads((DATA / "smollm2_greedy.json").read_text(encoding="utf-8"))["rows"]
    path = resolve_model(None)
    tokenizer = load_tokenizer(path)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}]) for row in rows]
    assert prompts == [row["ids"] for row in rows]
    config = load_model_config(path, dtype="float32")
    model = load_model(config, open_checkpoint(path), dtype="float32", progress=False)
    assert greedy_batch(model, prompts, len(rows[0]["tokens"])) == [row["tokens"] for row in rows]


def greedy_batch(model: nnx.Module, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """The greedy continuation of every prompt: one ragged prefill, then one token for each of them a step."""
    config, lens, rows = model.config, np.array([len(p) for p in prompts]), len(prompts)
    width = -(-int(lens.max() + steps) // 16)
    table = np.random.default_rng(0).permutation(np.arange(1, rows * width + 1)).reshape(rows, width)
    shape = (rows * width + 1, config.num_kv_heads, 16, 2 * config.head_dim)
    kv = [jnp.zeros(shape, jnp.float32) for _ in range(config.num_layers)]
    graph, state = nnx.split(model)

    @partial(jax.jit, donate_argnums=(2,))
    def step(state: nnx.State, ids: jax.Array, kv: list, batch: AttentionBatch) -> tuple[jax.Array, list]:
        model = nnx.merge(graph, state)
        hidden, kv = model(ids, kv, batch)
        return model.logits(hidden[batch.cu_q_lens[1:] - 1]).argmax(-1), kv

    starts, table = np.concatenate([[0], np.cumsum(lens)]), jnp.asarray(table, jnp.int32)
    ids, columns = np.concatenate(prompts), []
    for i in range(steps):
        batch = AttentionBatch(jnp.asarray(starts, jnp.int32), jnp.asarray(lens + i, jnp.int32), table, 1 if i else 64)
        ids, kv = step(state, jnp.asarray(ids, jnp.int32), kv, batch)
        columns.append(np.asarray(ids).tolist())
        starts = np.arange(rows + 1)
    return [list(tokens) for tokens in zip(*columns, strict=True)]
