"""Structured output on a tiny random model: a thousand generations under schemas, and every one of them obeys."""

import json
import random
import re

import pytest
from flax import nnx

from tpu_mini_sglang.constrained.grammar import Grammars
from tpu_mini_sglang.function_call.function_call_parser import CALL_STYLES, CallReader, Tool, calls_grammar
from tpu_mini_sglang.managers import scheduler as scheduler_module
from tpu_mini_sglang.managers.detokenizer_manager import toy_tokenizer
from tpu_mini_sglang.managers.io_struct import GenerateReq
from tpu_mini_sglang.managers.scheduler import Limits, Scheduler, check_pages
from tpu_mini_sglang.model_config import ModelConfig
from tpu_mini_sglang.model_executor.model_runner import Buckets, ModelRunner
from tpu_mini_sglang.models.decoder import DecoderLM
from tpu_mini_sglang.parser.reasoning_parser import Prelude, read
from tpu_mini_sglang.sampling.sampling_params import SamplingParams
from tpu_mini_sglang.sharding import make_mesh

TOKENIZER = toy_tokenizer()
(EOS,) = TOKENIZER.eos_token_ids
TINY = ModelConfig(
    "LlamaForCausalLM", TOKENIZER.vocab_size + 5, 32, 64, 2, 4, 2, 8, 512, dtype="float32", eos_token_ids=(EOS,)
)
ROWS, CHUNK = 32, 64


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    """A warm runner with too few pages for a full house."""
    model = DecoderLM(TINY, rngs=nnx.Rngs(0), dtype="float32")
    runner = ModelRunner(model, TINY, make_mesh(), 32 * 5, 8, Buckets(CHUNK, ROWS, q_block=16))
    runner.warmup(lambda line: None)
    return runner


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(lambda: TOKENIZER, TINY.vocab_size, (EOS,))


def new_scheduler(runner: ModelRunner, grammars: Grammars) -> Scheduler:
    limits = Limits(512, TINY.vocab_size, (EOS,), CHUNK, ROWS, overlap=True, conservativeness=0)  # until pages run out
    return Scheduler(runner, limits, grammars)


class Kind:
    """A random property of a schema, and what its values must be; knows nothing of masks."""

    def __init__(self, rng: random.Random):
        self.low, self.high = rng.randint(-50, 0), rng.randint(1, 500)
        self.words = rng.sample(["red", "blue", "größe", "x y", '"quoted"', "1"], 3)
        self.name = rng.choice(["integer", "string", "boolean", "enum", "array", "pattern", "null"])

    def schema(self) -> dict:
        return {
            "integer": {"type": "integer", "minimum": self.low, "maximum": self.high},
            "string": {"type": "string", "maxLength": self.high % 10},
            "boolean": {"type": "boolean"},
            "enum": {"enum": self.words},
            "array": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 4},
            "pattern": {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]+$", "maxLength": 9},
            "null": {"type": "null"},
        }[self.name]

    def has(self, value: object) -> bool:
        match self.name:
            case "integer":
                return type(value) is int and self.low <= value <= self.high
            case "string":
                return isinstance(value, str) and len(value) <= self.high % 10
            case "array":
                return (
                    isinstance(value, list) and len(value) <= 4 and all(type(x) is int and 0 <= x <= 9 for x in value)
                )
            case "pattern":
                return isinstance(value, str) and len(value) <= 9 and bool(re.fullmatch("[a-c]{2,4}-[0-9]+", value))
            case "enum":
                return value in self.words
        return value is None if self.name == "null" else isinstance(value, bool)


class Schema:
    """An object of one to four such properties, some of them optional."""

    def __init__(self, seed: int):
        rng = random.Random(seed)
        self.kinds = {f"key {i}": Kind(rng) for i in range(rng.randint(1, 4))}
        self.required = [name for name in self.kinds if rng.random() < 0.7]

    def text(self) -> str:
        properties = {name: kind.schema() for name, kind in self.kinds.items()}
        rest = {"required": self.required, "additionalProperties": False}
        return json.dumps({"type": "object", "properties": properties} | rest)

    def obeyed_by(self, text: str) -> bool:
        try:
            value = json.loads(text)
        except ValueError:
            return False
        names = isinstance(value, dict) and {*self.required} <= value.keys() <= self.kinds.keys()
        return names and all(self.kinds[name].has(part) for name, part in value.items())


def schema_of(seed: int) -> dict[str, str]:
    """What an answer must obey: one schema."""
    return {"json_schema": Schema(seed).text()}


def answers(scheduler: Scheduler, seeds: range, grammar_of=schema_of, most: int = 400) -> dict[int, tuple[str, str]]:
    """The text under each seed's grammar, and how it ended."""
    tokens: dict[int, list[int]] = {seed: [] for seed in seeds}
    ends: dict[int, str] = {}
    incoming = []
    for seed in seeds:
        params = SamplingParams(max_new_tokens=most, seed=seed, **grammar_of(seed))
        incoming.append(GenerateReq(str(seed), [1 + seed % 7] * (1 + seed % 30), params))
    while incoming or scheduler.has_work:
        for out in scheduler.step(incoming):
            tokens[int(out.rid)] += out.token_ids
            ends[int(out.rid)] = out.finish.type
        check_pages(scheduler.state)
        incoming = []
    return {seed: (TOKENIZER.decode(ids), ends[seed]) for seed, ids in tokens.items()}


def count_obedient(found: dict[int, tuple[str, str]]) -> int:
    return sum(end == "stop" and Schema(seed).obeyed_by(text) for seed, (text, end) in found.items())


def test_a_hundred_answers_under_a_hundred_schemas(runner: ModelRunner, grammars: Grammars) -> None:
    warm = runner.num_compiles
    assert count_obedient(answers(new_scheduler(runner, grammars), range(100))) == 100
    assert runner.num_compiles == warm and len(grammars.kept) <= grammars.most


def style_at(seed: int) -> str:
    return [*CALL_STYLES][seed % len(CALL_STYLES)]


def calls_of(seed: int) -> dict[str, str]:
    """What an answer must obey: one call of one of two tools, in some family's style."""
    tools = [Tool(f"tool_{i}", json.loads(Schema(2 * seed + i).text()), strict=True) for i in range(2)]
    style = CALL_STYLES[style_at(seed)]
    return {"llguidance": calls_grammar(style, tools, "required", False, Prelude(), None, lambda tag: None)}


def is_a_call(seed: int, text: str) -> bool:
    """Whether an answer is one call of a tool that exists, with arguments that obey its schema."""
    calls = CallReader(CALL_STYLES[style_at(seed)], ["tool_0", "tool_1"])
    parts = read(calls, list(text))
    if [kind for kind, _ in parts] != ["call", "arguments"]:
        return False
    (_, name), (_, arguments) = parts
    return calls.complete and Schema(2 * seed + int(name[-1])).obeyed_by(arguments)


def test_sixty_calls_of_a_hundred_and_twenty_tools(runner: ModelRunner, grammars: Grammars) -> None:
    warm = runner.num_compiles
    found = answers(new_scheduler(runner, grammars), range(60), calls_of, 480)
    whole = {seed: text for seed, (text, end) in found.items() if end == "stop"}
    assert all(is_a_call(seed, text) for seed, text in whole.items())
    assert len(whole) > 40 and {end for _, end in found.values()} <= {"stop", "length"}
    assert runner.num_compiles == warm


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_a_thousand_answers_under_a_thousand_schemas(runner: ModelRunner, grammars: Grammars) -> None:
    scheduler = new_scheduler(runner, grammars)
    assert count_obedient(answers(scheduler, range(1000))) == 1000
    assert scheduler.state.counters.retractions > 10, "the pool was too large to test anything"


def test_a_skipped_mask_is_seen(runner: ModelRunner, grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    real = scheduler_module.allowed_tokens

    def skip_some(state, flight):
        return None if state.counters.steps % 50 == 9 else real(state, flight)

    monkeypatch.setattr(scheduler_module, "allowed_tokens", skip_some)
    assert count_obedient(answers(new_scheduler(runner, grammars), range(20))) < 20
