"""Writes tests/data/parity_*.npz and smollm2_greedy.json with transformers on PyTorch, in float32 on the CPU.

python tests/make_parity_reference.py            # the tiny families; or some of them, by name
python tests/make_parity_reference.py smollm2    # the real model, twenty prompts
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from parity_models import VARIANTS, prompt_ids, write_checkpoint
from transformers import AutoModelForCausalLM, GgufConfig

DATA = Path(__file__).parent / "data"
KEPT = slice(0, None, 5)  # positions whose logits are stored
PROMPTS = (
    "What is the capital of France?", "What is 12 + 30?", "Name three colours.", "Who wrote Romeo and Juliet?",
    "What is the largest planet?", "Translate 'good morning' into French.", "Write a haiku about rain.",
    "Why is the sky blue?", "What does a CPU do?", "List the days of the week.", "How do plants make food?",
    "What is the boiling point of water?", "Give me a synonym for happy.", "What is a prime number?",
    "Explain gravity to a child.", "Wie heißt die Hauptstadt von Österreich?", "日本の首都はどこですか?",
    "Write a Python function that adds two numbers.", "What is the opposite of cold? Answer with one word.", "Hi 👋🏽!",
)  # fmt: skip


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: list[int], steps: int) -> tuple[list[int], float]:
    """The greedy continuation without a cache, and the smallest lead that a chosen token had over the next best."""
    ids, lead = list(ids), float("inf")
    start = len(ids)
    for _ in range(steps):
        top = model(torch.tensor([ids])).logits[0, -1].topk(2)
        lead = min(lead, float(top.values[0] - top.values[1]))
        ids.append(int(top.indices[0]))
    return ids[start:], lead


def tiny_model(hf: dict) -> torch.nn.Module:
    """transformers' model of the seeded checkpoint; a tensor that either side lacks is an error."""
    with tempfile.TemporaryDirectory() as folder:
        model, found = AutoModelForCausalLM.from_pretrained(
            write_checkpoint(Path(folder), hf),
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    assert not any(found.values()), found
    return model.eval()


def tiny_references(names: list[str]) -> None:
    """Logits at every fifth prompt position and 64 greedy tokens for each variant."""
    for name in names:
        model, prompt = tiny_model(VARIANTS[name]), prompt_ids(name)
        with torch.no_grad():
            logits = model(torch.from_numpy(prompt)[None].long()).logits[0].numpy()
        tokens, lead = greedy(model, prompt.tolist(), 64)
        print(f"{name}: |logits| {np.abs(logits).max():.1f}, smallest lead {lead:.4f}, {len(set(tokens))} ids")
        np.savez_compressed(DATA / f"parity_{name}.npz", logits=logits[KEPT], tokens=np.array(tokens, np.uint8))


@torch.no_grad()
def batched_draft(model: torch.nn.Module, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """Greedy tokens of one left-padded batch: fast, and right but for what padding does to rounding."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, eos_token_id=None)
    return out[:, width:].tolist()


@torch.no_grad()
def verified(model: torch.nn.Module, ids: list[int], draft: list[int]) -> tuple[list[int], float]:
    """The draft, if each of its tokens is the best one after all before it, unpadded; else decoded from scratch."""
    logits = model(torch.tensor([ids + draft[:-1]])).logits[0, len(ids) - 1 :]
    top = logits.topk(2)
    if top.indices[:, 0].tolist() != draft:
        return greedy(model, ids, len(draft))
    return draft, float((top.values[:, 0] - top.values[:, 1]).min())


def smollm2_reference(steps: int = 32) -> None:
    """Prompt ids through the chat template and the greedy tokens that transformers gives."""
    from tpu_mini_sglang.models.hub import resolve_model
    from tpu_mini_sglang.tokenizer import load_tokenizer

    path = resolve_model(None)
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    all_ids = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    rows = []
    for prompt, ids, draft in zip(PROMPTS, all_ids, batched_draft(model, all_ids, steps), strict=True):
        tokens, lead = verified(model, ids, draft)
        rows.append({"prompt": prompt, "ids": ids, "tokens": tokens})
        print(f"{prompt!r}: smallest lead {lead:.4f}", flush=True)
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__}, CPU, float32"
    text = json.dumps({"made_by": made_by, "rows": rows}, ensure_ascii=False)
    (DATA / "smollm2_greedy.json").write_text(text.replace("}, {", "},\n{") + "\n", encoding="utf-8")


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    smollm2_reference() if sys.argv[1:] == ["smollm2"] else tiny_references(sys.argv[1:] or list(VARIANTS))
