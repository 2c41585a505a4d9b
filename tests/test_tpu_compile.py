"""The Pallas kernels compile for real TPU generations, with nothing but libtpu and a CPU, or are refused beforehand."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tpu_mini_sglang.kernels.kv_write import pallas_refusal

CHILD = Path(__file__).parent / "compile_for_tpu.py"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'")
@pytest.mark.parametrize("flags", ["v5e:2x2", "v6e:2x2 --few", "v5p:2x2x1 --few", "tpu7x:2x2x1 --few"])
def test_kernels_compile(flags):
    """Each head size, page size, dtype and kernel once: what we don't refuse compiles, and no pool is copied."""
    done = subprocess.run(
        [sys.executable, str(CHILD), *flags.split()], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(cases) == (16 if "--few" in flags else 48)
    names = ("head_dim", "page_size", "q_heads", "kv_heads", "dtype", "kv_dtype")
    for case in cases:
        refused = pallas_refusal(**{k: case[k] for k in names}, table=(case["rows"], case["row_pages"]))
        assert refused or "error" not in case, case
        if "error" not in case and case["pool_bytes"] > 1e8:
            assert case["temp_bytes"] < case["pool_bytes"] / 20, case
    assert any("error" in case for case in cases)  # the list goes beyond what compiles
