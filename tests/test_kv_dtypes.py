"""What short KV dtypes cost the default model.

Run by hand it prints chapter 30b's figures: `python tests/test_kv_dtypes.py`.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tpu_mini_sglang.kernels.attention import AttentionBatch
from tpu_mini_sglang.managers.startup import CALIBRATION, calibrate
from tpu_mini_sglang.mem_cache.pool import init_kv_cache, pages_for
from tpu_mini_sglang.models.hub import load_model_config, open_checkpoint, resolve_model
from tpu_mini_sglang.models.weights import load_model
from tpu_mini_sglang.server_args import KV_DTYPES
from tpu_mini_sglang.sharding import make_mesh
from tpu_mini_sglang.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {"English": ROOT / "LICENSE", "Python": ROOT / "tools" / "chapters.py"}


def log_probabilities(model, config, ids, dtype, scales):
    """Of every next token of a text that goes through pages of a dtype, [T, V] float32."""
    count = pages_for(len(ids), 16)
    kv = init_kv_cache(config, count, 16, dtype, make_mesh(), "xla", scales)
    batch = AttentionBatch(jnp.array([0, len(ids)]), jnp.array([len(ids)]), jnp.arange(1, count + 1)[None], 64)
    graph, weights = nnx.split(model)

    def run(weights, ids, layers):
        model = nnx.merge(graph, weights)
        return jax.nn.log_softmax(model.logits(model(ids, layers, batch)[0]))

    return np.asarray(jax.jit(run)(weights, jnp.array(ids), kv.layers))


def measure(tokens=512):
    """Loss of each dtype against float32 pages, the model in float32: a row for each text and dtype."""
    path = resolve_model(None, progress=False)
    config = load_model_config(path, "float32")
    model = load_model(config, open_checkpoint(path), make_mesh())
    tokenizer = load_tokenizer(path)
    scales = calibrate(model, config, make_mesh(), tokenizer.encode(CALIBRATION))
    for name, file in TEXTS.items():
        ids = tokenizer.encode(file.read_text(encoding="utf-8"))[:tokens]
        exact = log_probabilities(model, config, ids, "float32", None)
        for flag, dtype in KV_DTYPES.items():
            kept = log_probabilities(model, config, ids, dtype or "float32", scales if dtype == "int8" else None)
            yield {
                "text": name,
                "tokens": len(ids),
                "kv_cache_dtype": flag,
                "same_top": round(float(np.mean(exact.argmax(-1) == kept.argmax(-1))), 4),
                "kl": round(float(np.mean(np.sum(np.exp(exact) * (exact - kept), -1))), 6),
                "nll": round(float(-np.mean(kept[np.arange(len(ids) - 1), ids[1:]])), 4),
            }


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_eight_bits_cost_little():
    """The likeliest next token stays nine times in ten, and the text becomes hardly less likely."""
    rows = {(r["text"], r["kv_cache_dtype"]): r for r in measure(256)}
    for text in TEXTS:
        exact = rows[text, "auto"]
        for flag, least in (("bfloat16", 0.98), ("fp8_e4m3", 0.88), ("int8", 0.88)):
            row = rows[text, flag]
            assert row["same_top"] >= least, row
            assert row["nll"] < exact["nll"] + 0.1, row


if __name__ == "__main__":
    about = {"model": "SmolLM2-135M-Instruct (GGUF Q4_1), weights and activations in float32", "jax": jax.__version__}
    about |= {"device": jax.devices()[0].device_kind, "calibrated_on": "the text of chapter 30b"}
    sys.stdout.write(json.dumps(about | {"rows": list(measure())}, indent=1) + "\n")
