"""`tpu-mini-sglang plan`, the program itself: real compiles where libtpu is, and refusals anywhere."""

import importlib.util
import json
import subprocess
import sys

import pytest

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}  # fmt: skip
SMALL = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}


def plan(tmp_path, numbers, *flags):
    """Run the program on a folder that holds a config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | numbers))
    command = [sys.executable, "-m", "tpu_mini_sglang.cli", "plan", "--model-path", str(tmp_path), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=1900, check=False)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'")
@pytest.mark.parametrize(
    "numbers", [pytest.param(SMALL, marks=pytest.mark.slow), pytest.param({}, marks=pytest.mark.exhaustive)]
)
def test_the_server_s_step_compiles_for_four_chips(tmp_path, numbers):
    done = plan(tmp_path, numbers, "--tpu", "v5e-4", "--context-length", "2048", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    found, layers = json.loads(done.stdout), (LLAMA | numbers)["num_hidden_layers"]
    assert found["fits"] and len(found["programs"]) == 2
    memory = found["memory"]
    for program in found["programs"]:
        assert sum(n for n, _ in program["layer_collectives"].values()) == 2  # after attention and after the MLP
        assert 0 <= program["arguments"] / (memory["weights"] + memory["kv"]) - 1 < 0.05
        assert program["temporaries"] < memory["kv"] / 2 + layers * 2**20, "a copy of the cache"


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much(tmp_path):
    done = plan(tmp_path, LARGE, "--tpu", "v5e-8")
    assert done.returncode == 1
    assert "Does not fit: 5.4" in done.stdout and "would fit: --tp 16 --tpu v5e-16" in done.stdout


@pytest.mark.slow
def test_a_split_that_does_not_divide_is_refused(tmp_path):
    done = plan(tmp_path, LARGE, "--tpu", "v6e-4", "--tp", "3")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: tp_size = 3 does not divide the model's num_heads = 64\n"
