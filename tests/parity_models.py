"""Tiny models of every family, made from a seed: shared by test_parity.py and make_parity_reference.py."""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

BASE = {
    "vocab_size": 256, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


MOE = {"num_experts_per_tok": 3, "moe_intermediate_size": 24, "use_sliding_window": False}


def variant(model_type: str, architecture: str, **changes: object) -> dict[str, object]:
    """A config.json: BASE, a family and what differs."""
    return BASE | {"model_type": model_type, "architectures": [architecture]} | changes


# two families read `sliding_window` and `max_window_layers` differently, so both are here
VARIANTS = {
    "llama": variant("llama", "LlamaForCausalLM"),
    "llama_tied": variant("llama", "LlamaForCausalLM", tie_word_embeddings=True, num_key_value_heads=6),
    "llama_llama3_rope": variant("llama", "LlamaForCausalLM", rope_scaling=LLAMA3_ROPE, num_hidden_layers=3),
    "llama_linear_rope": variant("llama", "LlamaForCausalLM", rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama_biases": variant("llama", "LlamaForCausalLM", attention_bias=True, mlp_bias=True),
    "mistral_window": variant("mistral", "MistralForCausalLM", sliding_window=11),
    "qwen2": variant("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True, use_sliding_window=False),
    "qwen2_window": variant(
        "qwen2", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=9, max_window_layers=1, num_hidden_layers=3
    ),
    "qwen3": variant("qwen3", "Qwen3ForCausalLM", head_dim=16, use_sliding_window=False),
    "qwen3_tied_biases": variant(
        "qwen3", "Qwen3ForCausalLM", tie_word_embeddings=True, attention_bias=True, use_sliding_window=False
    ),
    "mixtral": variant("mixtral", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, rope_theta=1e6),
    "qwen3_moe_normed": variant("qwen3_moe", "Qwen3MoeForCausalLM", num_experts=8, norm_topk_prob=True, **MOE),
    "qwen3_moe_unnormed": variant("qwen3_moe", "Qwen3MoeForCausalLM", num_experts=8, norm_topk_prob=False, **MOE),
}


def mlp_shapes(hf: dict) -> dict[str, tuple[int, int, bool]]:
    """Name, shape and bias of each map of an MLP, or of the router and every expert."""
    h, f, bias = hf["hidden_size"], hf["intermediate_size"], hf.get("mlp_bias", False)
    if count := hf.get("num_local_experts"):
        names, inner = [f"block_sparse_moe.experts.{e}.{{}}" for e in range(count)], ("w1", "w3", "w2")
        router = {"block_sparse_moe.gate": (count, h, False)}
    elif count := hf.get("num_experts"):
        names, inner = [f"mlp.experts.{e}.{{}}" for e in range(count)], ("gate_proj", "up_proj", "down_proj")
        router, f = {"mlp.gate": (count, h, False)}, hf["moe_intermediate_size"]
    else:
        names, inner, router = ["mlp.{}"], ("gate_proj", "up_proj", "down_proj"), {}
    shapes = (f, h, bias), (f, h, bias), (h, f, bias)
    return router | {name.format(i): shape for name in names for i, shape in zip(inner, shapes, strict=True)}


def weight_shapes(hf: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the checkpoint, as Hugging Face stores it: matrices are [out, in]."""
    h, d, family = hf["hidden_size"], hf["head_dim"], hf["model_type"]
    q, kv = hf["num_attention_heads"] * d, hf["num_key_value_heads"] * d
    qkv_bias, o_bias = hf.get("attention_bias", family == "qwen2"), hf.get("attention_bias", False)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (hf["vocab_size"], h), "norm": (h,)}
    for i in range(hf["num_hidden_layers"]):
        maps = {
            "self_attn.q_proj": (q, h, qkv_bias), "self_attn.k_proj": (kv, h, qkv_bias),
            "self_attn.v_proj": (kv, h, qkv_bias), "self_attn.o_proj": (h, q, o_bias),
        } | mlp_shapes(hf)  # fmt: skip
        shapes |= {f"layers.{i}.{name}": s[:2] for name, s in maps.items()}
        shapes |= {f"layers.{i}.{name}.bias": s[:1] for name, s in maps.items() if s[2]}
        norms = {"input_layernorm": h, "post_attention_layernorm": h}
        norms |= {"self_attn.q_norm": d, "self_attn.k_norm": d} if family in ("qwen3", "qwen3_moe") else {}
        shapes |= {f"layers.{i}.{name}": (size,) for name, size in norms.items()}
    named = {f"model.{n}" if n.endswith(".bias") else f"model.{n}.weight": s for n, s in shapes.items()}
    return named if hf["tie_word_embeddings"] else named | {"lm_head.weight": (hf["vocab_size"], h)}


def weight(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """One float32 tensor: NumPy's PCG64 seeded with (seed, CRC-32 of the name), standard normal.

    Norm scales are 1 + 0.2 x, biases 0.5 x, the embedding x, every other matrix 2 x / sqrt(in), so that logits
    spread over several units and a dropped bias, norm or rotation moves them far beyond the tolerance.
    """
    x = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
    if name.endswith(".bias"):
        return np.float32(0.5) * x
    if len(shape) == 1:
        return 1 + np.float32(0.2) * x
    return x if "embed_tokens" in name else np.float32(2 / np.sqrt(shape[1])) * x


def make_weights(hf: dict) -> dict[str, np.ndarray]:
    """All tensors of a variant."""
    return {name: weight(name, shape) for name, shape in weight_shapes(hf).items()}


def prompt_ids(name: str, length: int = 41) -> np.ndarray:
    """The variant's prompt: ids 3..255 from its own stream."""
    return np.random.default_rng([1, zlib.crc32(name.encode())]).integers(3, 256, length, dtype=np.int32)


def write_checkpoint(folder: Path, hf: dict, shards: int = 1) -> Path:
    """config.json and safetensors as Hugging Face writes them; with more than one shard also the index."""
    weights = make_weights(hf)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(weights)}
    for file in set(where.values()):
        save_file({name: weights[name] for name, at in where.items() if at == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
