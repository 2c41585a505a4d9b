"""The Pallas kernels compile for real TPU generations, with nothing but libtpu and a CPU, or are refused beforehand."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tpu_mini_sglang.kernels.grouped_mlp import block_rows
from tpu_mini_sglang.kernels.kv_write import pallas_refusal

CHILD = Path(__file__).parent / "compile_for_tpu.py"


GENERATIONS = ["v5e:2x2", "v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'")
@pytest.mark.parametrize("turn", range(4), ids=GENERATIONS)
def test_kernels_compile(turn):
    """What we don't refuse compiles, and no pool is copied: each configuration for one or two of them."""
    done = subprocess.run(
        [sys.executable, str(CHILD), GENERATIONS[turn], "--turn", str(turn)],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    attention, experts = ([case for case in cases if ("kernel" in case) == is_one] for is_one in (True, False))
    assert (len(attention), len(experts)) == (21, 2)
    names = ("head_dim", "page_size", "q_heads", "kv_heads", "dtype", "kv_dtype")
    for case in attention:
        refused = pallas_refusal(**{k: case[k] for k in names}, table=(case["rows"], case["row_pages"]))
        assert refused or "error" not in case, case
        if "error" not in case and case["pool_bytes"] > 1e8:
            assert case["temp_bytes"] < case["pool_bytes"] / 20, case
    assert any("error" in case for case in attention)  # the list goes beyond what compiles
    for case in experts:  # temporaries are the rows, as they go in and as they come out
        assert "error" not in case, case
        pairs = case["tokens"] * case["taken"]
        size = block_rows(pairs, case["experts"])
        rows = (pairs // size + min(case["experts"], pairs)) * size
        assert case["temp_bytes"] < 1e6 + rows * case["hidden"] * (4 + 2), case
