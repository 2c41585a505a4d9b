"""What weights in eight bits cost the default model.

Run by hand it prints chapter 12b's figures: `python tests/test_weight_int8.py`.
"""

import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from test_kv_dtypes import TEXTS, log_probabilities

from tpu_mini_sglang.models.hub import load_model_config, open_checkpoint, resolve_model
from tpu_mini_sglang.models.weights import load_model
from tpu_mini_sglang.tokenizer import load_tokenizer


def measure(tokens=512):
    """A row for each text: the model with float32 weights and with eight bits, everything else in float32."""
    path = resolve_model(None, progress=False)
    config, tokenizer = load_model_config(path, "float32"), load_tokenizer(path)
    texts = {name: tokenizer.encode(file.read_text(encoding="utf-8"))[:tokens] for name, file in TEXTS.items()}
    found = []
    for quantization in (None, "int8"):
        one = replace(config, quantization=quantization)
        model = load_model(one, open_checkpoint(path), progress=False)
        found.append({name: log_probabilities(model, one, ids, "float32", None) for name, ids in texts.items()})
    exact, kept = found
    for name, ids in texts.items():
        a, b, at = exact[name], kept[name], np.arange(len(ids) - 1)
        yield {
            "text": name,
            "tokens": len(ids),
            "same_top": round(float(np.mean(a.argmax(-1) == b.argmax(-1))), 4),
            "kl": round(float(np.mean(np.sum(np.exp(a) * (a - b), -1))), 6),
            "nll_exact": round(float(-np.mean(a[at, ids[1:]])), 4),
            "nll": round(float(-np.mean(b[at, ids[1:]])), 4),
        }


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_eight_bit_weights_cost_little():
    """The likeliest next token stays in all but a few places, and the text becomes hardly less likely."""
    for row in measure(256):
        assert row["same_top"] >= 0.93, row
        assert row["nll"] < row["nll_exact"] + 0.05, row
        assert row["kl"] > 0, row  # something was rounded


if __name__ == "__main__":
    config = load_model_config(resolve_model(None, progress=False), "bfloat16")
    sizes = [replace(config, quantization=q).weight_bytes() / 1e6 for q in (None, "int8")]
    about = {"model": "SmolLM2-135M-Instruct (GGUF Q4_1), everything else in float32", "jax": jax.__version__}
    about["bytes"] = f"{sizes[0]:.0f} MB in bfloat16, {sizes[1]:.0f} MB with int8 linear maps"
    sys.stdout.write(json.dumps(about | {"rows": list(measure())}, indent=1) + "\n")
