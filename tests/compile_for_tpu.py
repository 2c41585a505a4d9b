"""Compile the decode kernels for real TPU generations on a machine without one; prints one JSON line a case.

A child process of test_tpu_compile.py, because libtpu reads its environment before JAX starts.
Run by hand, it makes the chapter's table: `python tests/compile_for_tpu.py v5e:2x2 v6e:2x2`.
"""

import json
import os
import sys
import time
from functools import partial

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="true",
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_mini_sglang.kernels.paged_decode import page_per_step_decode, paged_decode

SHAPES = [(9, 3, 64), (32, 8, 128)]  # query heads, KV heads, head size: SmolLM2-135M and Llama-3-8B


def compile_case(kernel, heads, kv_heads, dim, page, dtype, place):
    """Compile one decode of 32 rows over a pool of 1,001 pages; seconds and bytes of temporaries."""
    shapes = [
        ((32, heads, dim), dtype),
        ((1001, kv_heads, page, 2 * dim), dtype),
        ((32, 64), jnp.int32),
        ((32,), jnp.int32),
    ]
    args = [jax.ShapeDtypeStruct(shape, kind, sharding=place) for shape, kind in shapes]
    begun = time.perf_counter()
    compiled = jax.jit(partial(kernel, scale=dim**-0.5)).lower(*args).compile()
    return {
        "seconds": round(time.perf_counter() - begun, 1),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "pool_bytes": 1001 * kv_heads * page * 2 * dim * jnp.dtype(dtype).itemsize,
    }


def main(generations):
    """Every kernel, shape and dtype for each generation."""
    for name in generations:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
        mesh = Mesh(np.array(topology.devices[:1]), ("x",))
        place = NamedSharding(mesh, PartitionSpec())
        for heads, kv_heads, dim in SHAPES:
            for dtype in ("bfloat16", "float32"):
                for kernel in (page_per_step_decode, paged_decode):
                    with jax.set_mesh(mesh):
                        result = compile_case(kernel, heads, kv_heads, dim, 16, dtype, place)
                    case = {"tpu": name, "kernel": kernel.__name__, "dim": dim, "dtype": dtype, "jax": jax.__version__}
                    print(json.dumps(case | result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["v5e:2x2"])
