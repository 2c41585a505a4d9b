"""Compile the kernels for real TPU generations on a machine without one; prints one JSON line a case.

A child process of test_tpu_compile.py, because libtpu reads its environment before JAX starts.
Run by hand, it makes the chapters' tables. Every configuration, 300 programs and some ten minutes a generation:
`python tests/compile_for_tpu.py --all v5e:2x2 v6e:2x2 v5p:2x2x1 tpu7x:2x2x1`.
"""

import argparse
import importlib.metadata
import json
import os
import time
from functools import partial
from itertools import product

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
from tpu_mini_sglang.kernels.grouped_mlp import Experts, Map, block_rows, blocks_pallas, mix
from tpu_mini_sglang.kernels.kv_write import page_write, stored_head_dim
from tpu_mini_sglang.kernels.paged_decode import paged_decode
from tpu_mini_sglang.kernels.ragged_prefill import ragged_prefill

if jax.__version_info__ < (0, 8):  # it asks the TPU's client for its age and its layouts, and here there is none
    from jax._src import tpu_custom_call
    from jax._src.interpreters import pxla

    tpu_custom_call.is_cloud_tpu_older_than = lambda *date_and_backend: True
    pxla.is_default_layout = lambda *layout_sharding_aval: True

PAGES = 1001  # of the pool
TABLE = (32, 64)  # sequences, and pages that each may have


def decode_rows(q, kv, pages, batch):
    """Attention of rows with one token."""
    return paged_decode(q, pages, batch.page_table, batch.kv_lens, scale=0.1)


def prefill_rows(q, kv, pages, batch):
    """Attention of rows with many."""
    return ragged_prefill(q, pages, batch, scale=0.1)


def write_rows(q, kv, pages, batch):
    """The write."""
    return page_write(kv, pages, batch)


# kernel, tokens of the step (None: one a row), query tokens a block holds
STEPS = {
    "decode": (decode_rows, None, 1),
    "prefill": (prefill_rows, 512, 64),
    "write 1": (write_rows, None, 1),
    "write": (write_rows, 512, 64),
}


def compile_case(mesh, step, dim, page_size, dtype, kv_dtype, heads, kv_heads, rows, row_pages):
    """Compile one kernel; seconds, bytes of temporaries and of the pool, or what the compiler says against it."""
    function, tokens, q_block = STEPS[step]
    tokens = tokens or rows
    wide = stored_head_dim(dim, "pallas")
    shapes = [((tokens, heads, wide), dtype), ((tokens, kv_heads, 2 * wide), dtype)]
    shapes += [((PAGES, kv_heads, page_size, 2 * wide), kv_dtype)]
    shapes += [((rows + 1,), jnp.int32), ((rows,), jnp.int32), ((rows, row_pages), jnp.int32)]
    place = NamedSharding(mesh, PartitionSpec())
    args = [jax.ShapeDtypeStruct(shape, kind, sharding=place) for shape, kind in shapes]

    def run(q, kv, pages, cu_q_lens, kv_lens, page_table):
        return function(q, kv, pages, AttentionBatch(cu_q_lens, kv_lens, page_table, q_block))

    begun = time.perf_counter()
    donated = (2,) if step.startswith("write") else ()
    try:
        with jax.set_mesh(mesh):
            compiled = jax.jit(run, donate_argnums=donated).lower(*args).compile()
    except Exception as error:  # the compiler's refusals have no common type
        return {"error": " ".join(str(error).split())[:300]}
    temp = compiled.memory_analysis().temp_size_in_bytes
    pool = PAGES * kv_heads * page_size * 2 * wide * jnp.dtype(kv_dtype).itemsize
    return {"seconds": round(time.perf_counter() - begun, 1), "temp_bytes": temp, "pool_bytes": pool}


def compile_experts(mesh, tokens, taken, experts, hidden, ffn, dtype, weights):
    """As compile_case, for chapter 10e's kernel: a step of a layer's experts on one device."""
    place = NamedSharding(mesh, PartitionSpec())

    def shaped(*shape, kind=dtype):
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    def stack(a, b):
        return Map(
            shaped(experts, a, b, kind=weights), shaped(experts, 1, b, kind="float32") if weights == "int8" else None
        )

    maps = Experts(stack(hidden, ffn), stack(hidden, ffn), stack(ffn, hidden))
    args = shaped(tokens, hidden), shaped(tokens, taken, kind="int32"), shaped(tokens, taken, kind="float32"), maps
    begun = time.perf_counter()
    run = partial(mix, rows=block_rows(tokens * taken, experts), run=blocks_pallas)
    try:
        with jax.set_mesh(mesh):
            memory = jax.jit(run).lower(*args).compile().memory_analysis()
    except Exception as error:  # the compiler's refusals have no common type
        return {"error": " ".join(str(error).split())[:300]}
    sizes = {
        "temp_bytes": memory.temp_size_in_bytes,
        "weight_bytes": 3 * experts * hidden * ffn * jnp.dtype(weights).itemsize,
    }
    return {"seconds": round(time.perf_counter() - begun, 1), **sizes}


EXPERTS = (  # tokens, experts that each takes, experts here, hidden size, their width here, dtype, dtype of the weights
    (64, 8, 128, 2048, 768, "bfloat16", "bfloat16"),  # Qwen3-30B-A3B, a layer on one device
    (2048, 8, 128, 2048, 768, "bfloat16", "int8"),
    (64, 8, 16, 2048, 768, "bfloat16", "bfloat16"),  # an eighth of its experts
    (64, 8, 128, 2048, 96, "bfloat16", "bfloat16"),  # an eighth of their width
    (512, 2, 8, 4096, 14336, "bfloat16", "bfloat16"),  # Mixtral-8x7B
    (64, 2, 8, 4096, 1792, "bfloat16", "int8"),
    (16, 2, 8, 512, 1024, "float32", "float32"),
    (64, 2, 8, 4096, 1376, "bfloat16", "bfloat16"),  # what experts_refusal refuses
)


def configurations(how_many):
    """Kernel, head size, page size, dtypes of queries and pool, and heads, of what is compiled: all, some or few."""
    dims, sizes, heads = (64, 128, 256), (16, 32, 64, 128, 256), ((32, 8),)  # 80 and 96 are stored as 128
    kinds = [(q, kv) for q in ("bfloat16", "float32") for kv in (q, "int8", "float8_e4m3fn")]
    if how_many != "all":  # some: every head size, every page size, every dtype and every kernel at least once
        some = [(64, 16, "bfloat16", "bfloat16", (9, 3)), (80, 32, "float32", "int8", (32, 8))]
        some += [(96, 16, "bfloat16", "float8_e4m3fn", (8, 8)), (128, 16, "bfloat16", "bfloat16", (32, 8))]
        some += [(128, 64, "bfloat16", "int8", (4, 1)), (128, 128, "float32", "float32", (32, 8))]
        some += [(256, 256, "bfloat16", "bfloat16", (32, 8)), (64, 16, "float32", "bfloat16", (9, 3))]
        beyond = [(128, 16, "float16", "float16", (32, 8), TABLE), (64, 2, "bfloat16", "bfloat16", (9, 3), TABLE)]
        beyond += [(256, 256, "float32", "float32", (32, 8), TABLE)]
        beyond += [(128, 16, "bfloat16", "bfloat16", (32, 8), (64, 8192))]  # what some compiler refuses
        cases = [(*case, TABLE) for case in some] + beyond
        cases = cases[2::3] if how_many == "few" else cases
        return [(step, *case[:4], *case[4], *case[5]) for case in cases for step in STEPS]
    rest = product(dims, sizes, kinds, heads, STEPS)
    same = ("float32", "int8"), ("float32", "float8_e4m3fn")  # to the write, which knows the pool's dtype alone
    rest = (case for case in rest if not (case[2] in same and case[4].startswith("write")))
    return [(step, dim, size, *kind, *n, *TABLE) for dim, size, kind, n, step in rest]


def main():
    """Every case for each generation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("generations", nargs="*", default=["v5e:2x2"])
    parser.add_argument("--all", dest="how_many", action="store_const", const="all", default="some")
    parser.add_argument("--few", dest="how_many", action="store_const", const="few")
    parser.add_argument("--experts", action="store_true", help="the kernel for experts, not those for attention")
    given = parser.parse_args()
    versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    for name in given.generations:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
        mesh = Mesh(np.array(topology.devices[:1]), ("x",))
        for case in EXPERTS if given.experts else ():
            keys = ("tokens", "taken", "experts", "hidden", "ffn", "dtype", "weights")
            about = {"tpu": name, **dict(zip(keys, case, strict=True)), **versions}
            print(json.dumps(about | compile_experts(mesh, *case)), flush=True)
        if given.experts:
            continue
        for case in configurations(given.how_many):
            keys = ("kernel", "head_dim", "page_size", "dtype", "kv_dtype", "q_heads", "kv_heads", "rows", "row_pages")
            about = {"tpu": name, "full": given.how_many == "all", **dict(zip(keys, case, strict=True)), **versions}
            print(json.dumps(about | compile_case(mesh, *case)), flush=True)


if __name__ == "__main__":
    main()
