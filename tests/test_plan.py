"""`tpu-mini-sglang plan`, the program itself: real compiles where libtpu is, and refusals anywhere."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from tpu_mini_sglang.tpu.plan import CHILD_ENV, GENERATIONS, GIB

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}  # fmt: skip
SMALL = {"vocab_size": 4095, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
SPARSE = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512,
    "head_dim": 128,
}  # fmt: skip
LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


def start(tmp_path, numbers, *flags):
    """The program, on a folder that holds a config.json and nothing else."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | numbers))
    command = [sys.executable, "-m", "tpu_mini_sglang.cli", "plan", "--model-path", str(tmp_path), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process):
    """Exit code, standard output and standard error."""
    out, err = process.communicate(timeout=1900)
    return process.returncode, out, err


def check_fits(done, layers, tp, dp):
    """A plan that fits, whose programs are those of the arithmetic; which the compiler has seen."""
    code, out, err = done
    assert code == 0, err[-2000:]
    found = json.loads(out)
    assert found["fits"] and len(found["programs"]) == 2
    memory, rows = found["memory"], dp * found["flags"]["max_running_requests"]
    for program in found["programs"]:
        layer, others = program["layer_collectives"], program["other_collectives"]
        assert [n for n, _ in layer.values()] == [2]  # after attention and after the MLP, of the same shape
        assert all(name.startswith("all-reduce") and name.endswith(f"among {tp}") for name in layer)
        for name, (_, size) in others.items():  # a table's row for each token, or a few numbers for each row
            assert name.endswith(f"among {tp}") or size <= 20 * 4 * rows, name
        assert 0 <= program["arguments"] / (memory["weights"] + memory["kv"]) - 1 < 0.05
        assert program["temporaries"] < memory["kv"] / 2 + layers * 2**20, "a copy of the cache"


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(900)  # four programs on a machine that may be busy
def test_two_plans_at_once(tmp_path):
    """Experts in two parts, and two groups of devices; each in a process with a compiler of its own."""
    flags = ["--context-length", "2048", "--json"]
    sparse = start(tmp_path / "sparse", SMALL | SPARSE, "--tpu", "v6e-4", "--ep-size", "2", *flags)
    groups = start(tmp_path / "dense", SMALL, "--tpu", "v5e-8", "--dp-size", "2", *flags)
    one, two = end(sparse), end(groups)
    check_fits(one, 2, tp=4, dp=1)
    assert json.loads(one[1])["flags"]["ep_size"] == 2
    if jax.__version_info__ >= (0, 12):
        check_fits(two, 2, tp=4, dp=2)
    else:  # its compiler would abort
        assert two[0] == 1 and "--dp-size 2 on a TPU needs jax 0.12" in two[2]


@needs_libtpu
@pytest.mark.exhaustive
@pytest.mark.timeout(1900)
def test_llama_3_8b_compiles_for_four_chips(tmp_path):
    check_fits(end(start(tmp_path, {}, "--tpu", "v5e-4", "--context-length", "2048", "--json")), 32, tp=4, dp=1)


@needs_libtpu
@pytest.mark.slow
def test_the_time_limit(tmp_path):
    code, out, err = end(start(tmp_path, SMALL, "--tpu", "v5e-4", "--timeout", "0.5"))
    assert (code, out) == (1, "") and err.endswith("error: compiling took longer than --timeout 0.5 s\n")


TOO_LARGE = """
import sys, jax, re
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tpu_mini_sglang.tpu.plan import GENERATIONS
for gen in GENERATIONS.values():
    grid = f"{gen.name}:{next(iter(gen.grids.values()))}"
    device, *others = topologies.get_topology_desc(platform="tpu", topology_name=grid, **dict(gen.options)).devices
    x = jax.ShapeDtypeStruct((200, 1 << 30), "uint8", sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(x).compile()
    except Exception as error:
        print(gen.name, 1 + len(others), re.search(r"available HBM \\(([\\d.]+)G", str(error))[1])
"""


@needs_libtpu
@pytest.mark.slow
def test_the_compiler_s_own_memory_and_devices():
    """What chapter 50's table says of each generation is what the compiler says of a program that is too large."""
    command, env = [sys.executable, "-c", TOO_LARGE], os.environ | CHILD_ENV
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    told = {name: (int(count), float(size)) for name, count, size in map(str.split, done.stdout.splitlines())}
    table = {gen.name: (min(gen.grids), gen.hbm_bytes / GIB) for gen in GENERATIONS.values()}
    assert told == {name: (count, pytest.approx(size, abs=0.02)) for name, (count, size) in table.items()}, done.stderr


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much(tmp_path):
    code, out, _ = end(start(tmp_path, LARGE, "--tpu", "v5e-8"))
    assert code == 1
    assert "Does not fit: 8.8" in out and "would fit: --tp-size 32 --tpu v5e-32" in out


@pytest.mark.slow
def test_a_split_that_does_not_divide_is_refused(tmp_path):
    done = end(start(tmp_path, LARGE, "--tpu", "v6e-4", "--tp", "3"))
    assert done == (1, "", "error: tp_size = 3 does not divide the model's num_heads = 64\n")
