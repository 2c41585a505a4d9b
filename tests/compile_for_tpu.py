"""Compile the attention kernels for real TPU generations on a machine without one; prints one JSON line a case.

A child process of test_tpu_compile.py, because libtpu reads its environment before JAX starts.
Run by hand, it makes the chapters' tables: `python tests/compile_for_tpu.py v5e:2x2 v6e:2x2`.
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

from tpu_mini_sglang.kernels.attention import AttentionBatch
from tpu_mini_sglang.kernels.paged_decode import page_per_step_decode, paged_decode
from tpu_mini_sglang.kernels.ragged_prefill import ragged_prefill

SHAPES = [(9, 3, 64), (32, 8, 128)]  # query heads, KV heads, head size: SmolLM2-135M and Llama-3-8B


def compiled_figures(function, shapes, place):
    """Compile a function of arrays of these shapes; seconds and bytes of temporaries."""
    args = [jax.ShapeDtypeStruct(shape, kind, sharding=place) for shape, kind in shapes]
    begun = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    seconds = round(time.perf_counter() - begun, 1)
    return {"seconds": seconds, "temp_bytes": compiled.memory_analysis().temp_size_in_bytes}


def compile_decode(kernel, heads, kv_heads, dim, page, dtype, place):
    """One decode of 32 rows over a pool of 1,001 pages."""
    shapes = [
        ((32, heads, dim), dtype),
        ((1001, kv_heads, page, 2 * dim), dtype),
        ((32, 64), jnp.int32),
        ((32,), jnp.int32),
    ]
    pool = 1001 * kv_heads * page * 2 * dim * jnp.dtype(dtype).itemsize
    return compiled_figures(partial(kernel, scale=dim**-0.5), shapes, place) | {"pool_bytes": pool}


def compile_prefill(q_block, heads, kv_heads, dim, page, dtype, place):
    """One extend step of 512 tokens and at most 32 rows over a pool of 16,001 pages."""
    shapes = [
        ((512, heads, dim), dtype),
        ((16001, kv_heads, page, 2 * dim), dtype),
        ((33,), jnp.int32),
        ((32,), jnp.int32),
        ((32, 64), jnp.int32),
    ]

    def step(q, kv_pages, cu_q_lens, kv_lens, page_table):
        batch = AttentionBatch(cu_q_lens, kv_lens, page_table, q_block)
        return ragged_prefill(q, kv_pages, batch, scale=dim**-0.5)

    pool = 16001 * kv_heads * page * 2 * dim * jnp.dtype(dtype).itemsize
    return compiled_figures(step, shapes, place) | {"q_block": q_block, "pool_bytes": pool}


def main(generations):
    """Every kernel, shape and dtype for each generation."""
    for name in generations:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
        mesh = Mesh(np.array(topology.devices[:1]), ("x",))
        place = NamedSharding(mesh, PartitionSpec())
        jobs = [(k.__name__, partial(compile_decode, k)) for k in (page_per_step_decode, paged_decode)]
        jobs += [("ragged_prefill", partial(compile_prefill, q_block)) for q_block in (64, 128)]
        for heads, kv_heads, dim in SHAPES:
            for dtype in ("bfloat16", "float32"):
                for kernel, job in jobs:
                    with jax.set_mesh(mesh):
                        result = job(heads, kv_heads, dim, 16, dtype, place)
                    case = {"tpu": name, "kernel": kernel, "dim": dim, "dtype": dtype, "jax": jax.__version__}
                    print(json.dumps(case | result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["v5e:2x2"])
