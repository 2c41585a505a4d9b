"""The Pallas kernels compile for real TPU generations, with nothing but libtpu and a CPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).parent / "compile_for_tpu.py"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'")
@pytest.mark.parametrize("generation", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1"])
def test_kernels_compile(generation):
    """All kernels, head sizes 64 and 128, bfloat16 and float32; no copy of the pool among the temporaries."""
    done = subprocess.run(
        [sys.executable, str(CHILD), generation], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(cases) == 16
    for case in cases:
        assert case["temp_bytes"] < case["pool_bytes"] / 10, case
