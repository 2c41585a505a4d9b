"""One engine on 1, 2, 4 and 8 fake devices: equal tokens, counted collectives, promises kept on each shard."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from parity_models import VARIANTS

MESHES = [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4), (1, 8)]  # tp, dp; the models have 2 KV heads
EXPERT_MESHES = [(2, 1, 2), (4, 1, 2), (4, 1, 4), (2, 2, 2), (8, 1, 4), (4, 2, 2), (2, 4, 2)]  # tp, dp, ep
SPARSE = [name for name, hf in VARIANTS.items() if "num_experts_per_tok" in hf]
ROWS = 4  # of a step, on each shard


def run_cases(kind: str, cases: list[dict]) -> list[dict]:
    """What mesh_cases.py prints, in a process that has eight fake devices."""
    command = [sys.executable, str(Path(__file__).with_name("mesh_cases.py")), kind, *map(json.dumps, cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def sizes(*mesh: int) -> dict[str, int]:
    """A mesh's tp, dp and, if it is given, ep, by name."""
    return dict(zip(("tp", "dp", "ep"), mesh))


def check_tokens(name: str, cases: list[dict]) -> None:
    """Greedy and sampled tokens and the ids of the top logprobs equal one device's.

    Tokens, not logits: a sum over devices is rounded in another order than a sum on one.
    """
    alone, *others = run_cases("tokens", [{"name": name} | case for case in [{"tp": 1, "dp": 1}, *cases]])
    assert len(alone["tokens"]) > 4 and len(others) == len(cases)
    for other in others:
        assert other["tokens"] == alone["tokens"], other


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name,meshes",
    [("llama_biases", [(2, 2), (8, 1)]), ("qwen3_tied_biases", [(4, 2)]), ("qwen3_moe_unnormed", [(4, 2, 2)])],
)
def test_tokens_do_not_depend_on_the_mesh(name, meshes):
    check_tokens(name, [sizes(*mesh) for mesh in meshes])


@pytest.mark.exhaustive
@pytest.mark.timeout(1100)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_on_every_mesh(name):
    check_tokens(name, [sizes(*mesh) for mesh in MESHES])


@pytest.mark.exhaustive
@pytest.mark.timeout(1100)
@pytest.mark.parametrize("name", SPARSE)
def test_experts_on_every_mesh(name):
    check_tokens(name, [sizes(*mesh) for mesh in EXPERT_MESHES])


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_the_engine_with_pallas_kernels():
    check_tokens("mistral_window", [sizes(*mesh) | {"backend": "pallas"} for mesh in [(2, 1), (2, 2)]])
    check_tokens("mixtral", [sizes(4, 1, 2) | {"backend": "pallas"}])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_drafts_change_no_token_on_a_mesh():
    check_tokens("mistral_window", [{"tp": tp, "dp": dp, "drafts": True} for tp, dp in [(1, 2), (2, 2)]])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_server_s_flags_make_the_mesh():
    (alone,) = run_cases("tokens", [{"name": "llama", "tp": 1, "dp": 1}])
    (found,) = run_cases("startup", [{"name": "llama", "tp": 4, "dp": 2}])
    assert found["tokens"] == alone["tokens"]
    assert "on 8 of 8" in found["lines"][0] and "2 times 40 pages" in found["lines"][-1], found["lines"]
    (alone,) = run_cases("tokens", [{"name": "mixtral", "tp": 1, "dp": 1}])
    (found,) = run_cases("startup", [{"name": "mixtral", "tp": 8, "dp": 1, "ep": 4}])
    assert found["tokens"] == alone["tokens"] and "experts within" in found["lines"][1], found["lines"]


@pytest.mark.timeout(600)
def test_pallas_kernels_agree_with_xla_on_a_mesh():
    shapes = [{"q_block": 1, "window": None}, {"q_block": 12, "window": 9}]
    for found in run_cases("kernels", [{"tp": 2, "dp": dp} | shape for dp in (1, 2) for shape in shapes]):
        assert found["error"] < 1e-5, found


def check_collectives(name: str, meshes: list[tuple[int, ...]], decode: bool) -> None:
    """Two all-reduces a layer, one for the embedding, small ones in the sampler, and over "data" only the outputs."""
    about = {"name": name, "layers": 2, "decode": decode, "ep": 1}
    cases = run_cases("collectives", [about | sizes(*mesh) for mesh in meshes])
    programs = {(case["tp"], case["dp"], case["ep"]): case for case in cases}
    for (tp, dp, ep), case in programs.items():
        found = Counter((kind, shape) for kind, shape, *_ in case["found"])
        results = [f"s32[{ROWS * dp}]", f"f32[{ROWS * dp}]", f"u8[{ROWS * dp}]"]  # of a SampleOutput
        results += [f"s32[{ROWS * dp},20]", f"f32[{ROWS * dp},20]"]
        outputs = Counter(("all-gather", shape) for shape in results)
        for kind, shape, size, members, _ in case["found"]:
            assert size < case["logits"] / 8, f"{kind} {shape} on {tp} x {dp} devices: are these logits?"
            between_groups = (kind, shape) in outputs and members in (dp, tp * dp)
            assert members == tp or between_groups, f"{kind} {shape} among {members} of {tp} x {dp} devices"
        if dp > 1:
            assert found & outputs == outputs, "what is sampled is needed in every process"
            found -= outputs
            alone = programs.get((tp, 1, ep))
            assert alone is None or found == Counter((kind, shape) for kind, shape, *_ in alone["found"])
        if tp == 1:
            assert not found, f"a group of one device has nobody to talk to: {found}"
            continue
        assert found.pop(("all-reduce", case["hidden"])) == 2 * 2 + 1
        small = {f"[{ROWS}]", f"[{ROWS},1]", f"[{ROWS},{tp}]", f"[{ROWS},20]", f"[{ROWS},{20 * tp}]"}
        assert {shape[3:] for _, shape in found} <= small, found  # sums, maxima and candidates of each row


@pytest.mark.timeout(600)
def test_collectives_of_a_decode_step():
    check_collectives("llama", [(2, 1), (2, 2), (8, 1), (1, 2)], decode=True)
    check_collectives("mixtral", [(4, 1, 2)], decode=True)


@pytest.mark.exhaustive
@pytest.mark.timeout(1100)
@pytest.mark.parametrize("decode", [True, False])
def test_collectives_on_every_mesh(decode):
    check_collectives("llama", MESHES, decode)
    check_collectives("mixtral", EXPERT_MESHES, decode)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dp", [2, 3])
def test_promises_hold_on_every_shard(dp):
    assert [case["kept"] for case in run_cases("promises", [{"tp": 1, "dp": dp}])] == [True]
