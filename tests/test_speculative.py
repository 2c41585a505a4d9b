"""Speculation changes when tokens come, never which: a real (tiny, random) model with drafts against one without."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from test_promises import CHUNK, PAGE, ROWS, TINY, random_request

from tpu_mini_sglang.entrypoints.engine import Engine, Parts
from tpu_mini_sglang.managers.detokenizer_manager import toy_tokenizer
from tpu_mini_sglang.managers.io_struct import AbortReq, GenerateReq, TokenLogprob
from tpu_mini_sglang.managers.schedule_batch import Drafter
from tpu_mini_sglang.managers.scheduler import Limits, Scheduler, check_pages
from tpu_mini_sglang.managers.tokenizer_manager import Limits as FrontLimits
from tpu_mini_sglang.mem_cache.pool import pages_for
from tpu_mini_sglang.model_executor.model_runner import Bucket, Buckets, ModelRunner
from tpu_mini_sglang.models.decoder import DecoderLM
from tpu_mini_sglang.sampling.sampling_params import SamplingParams
from tpu_mini_sglang.sharding import make_mesh
from tpu_mini_sglang.speculative.ngram import NGram

SHAPES = [Bucket(size, min(size, ROWS), 8, scored=size) for size in (8, 32)]


def new_runner(mesh: Mesh, backend: str = "xla") -> ModelRunner:
    """That of test_promises.py, with shapes that score several tokens."""
    model = DecoderLM(TINY, rngs=nnx.Rngs(1), dtype="float32")
    model.embed_tokens.embedding.value = model.embed_tokens.embedding.value * 30
    buckets = Buckets(CHUNK, ROWS, q_block=16, scoring=SHAPES)
    return ModelRunner(model, TINY, mesh, 40, PAGE, buckets, backend)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    """One runner; its programs serve every test of this file."""
    runner = new_runner(make_mesh())
    runner.warmup(lambda line: None)
    return runner


class Noise(NGram):
    """The real drafter, which never rests; and where it knows nothing, it guesses at random."""

    def __init__(self) -> None:
        super().__init__(most=7, shortest=1, longest=4)
        self.rng = random.Random(0)

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        """Some tokens, nearly always."""
        self.patience.rest = 0
        found = super().propose(token_ids, most)
        if found and self.rng.random() < 0.3:
            found[self.rng.randrange(len(found))] = self.rng.randrange(TINY.vocab_size)
        return found or [self.rng.randrange(TINY.vocab_size) for _ in range(min(most, self.rng.randint(0, 3)))]


def new_scheduler(
    runner: ModelRunner, draft: Callable[[], Drafter] | None = Noise, policy: str = "fcfs", cache: bool = True
) -> Scheduler:
    """A scheduler over the shared runner, with nothing cached, that admits until pages run out."""
    limits = Limits(TINY.context_len, TINY.vocab_size, TINY.eos_token_ids, CHUNK, ROWS, policy, cache, draft is None)
    return Scheduler(runner, replace(limits, conservativeness=0), draft=draft)


Answer = tuple[list[int], str, list[TokenLogprob]]


def serve(scheduler: Scheduler, waves: list[list[GenerateReq]], aborts: Sequence[str] = ()) -> dict[str, Answer]:
    """Tokens, finish and logprobs of each request. Who was aborted is aborted every third step, one after the other."""
    found: dict[str, tuple[list[int], list[str], list[TokenLogprob]]] = {}
    leaving = list(aborts)
    for step in range(4000):
        incoming: list = waves[step // 2] if step % 2 == 0 and step // 2 < len(waves) else []
        if step % 3 == 2 and leaving:
            incoming = [*incoming, AbortReq(leaving.pop(0))]
        for out in scheduler.step(incoming):
            tokens, ends, logprobs = found.setdefault(out.rid, ([], [], []))
            tokens += out.token_ids
            ends.append(out.finish.type if out.finish else "?")
            logprobs += out.logprobs or []
        check_pages(scheduler.state)
        for req in scheduler.state.running:  # between steps nobody holds a page for what was only guessed
            assert req.num_unread or len(req.pages) <= pages_for(len(req.token_ids), PAGE)
        if not scheduler.has_work and step // 2 >= len(waves):
            return {rid: (tokens, ends[-1], logprobs) for rid, (tokens, ends, logprobs) in found.items()}
    raise TimeoutError("still busy")


def alone(runner: ModelRunner, spec: GenerateReq) -> Answer:
    """What the request gets when nobody else is there, nothing is cached and nobody guesses."""
    return serve(new_scheduler(runner, None, cache=False), [[spec]])[spec.rid]


def check_same(got: Answer, want: Answer) -> None:
    """The same tokens and end; the same logprobs, but for the rounding of another program."""
    assert got[:2] == want[:2]
    assert len(got[2]) == len(want[2])
    for a, b in zip(got[2], want[2], strict=True):
        assert (a.token_id, [i for i, _ in a.top]) == (b.token_id, [i for i, _ in b.top])
        np.testing.assert_allclose([a.logprob, *[p for _, p in a.top]], [b.logprob, *[p for _, p in b.top]], atol=1e-4)


def requests(seed: int, count: int) -> list[GenerateReq]:
    """Any mixture of parameters, streams among them; stop ids that do occur."""
    rng = random.Random(seed)
    specs = []
    for i in range(count):
        spec = random_request(f"r{i}", rng)
        params = {"stop_token_ids": rng.sample(range(1, 61), 3)} if rng.random() < 0.3 else {}
        params |= {"min_new_tokens": rng.randint(2, 5)} if spec.sampling.max_new_tokens > 5 else {}
        sampling = SamplingParams(**{f: getattr(spec.sampling, f) for f in spec.sampling.__struct_fields__} | params)
        specs.append(
            GenerateReq(spec.rid, spec.input_ids, sampling, spec.logprobs, spec.top_logprobs, rng.random() < 0.5)
        )
    return specs


@pytest.mark.parametrize("seed,policy,cache", [(0, "fcfs", True), (1, "lpm", True), (2, "fcfs", False)])
def test_tokens_and_logprobs_are_those_without_speculation(runner, seed, policy, cache):
    """A crowd on 40 pages, twice, so that whole prompts are cached the second time."""
    specs = requests(seed, 24)
    scheduler = new_scheduler(runner, policy=policy, cache=cache)
    waves = [specs[i : i + 6] for i in range(0, 24, 6)]
    first, again = serve(scheduler, waves), serve(scheduler, [specs])
    counters = scheduler.state.counters
    assert counters.spec_verify_calls > 100 and 0 < counters.spec_accepted_tokens < counters.spec_drafted_tokens
    assert not cache or counters.cached_tokens > 0, "the test never met the cache"
    for spec in specs:
        want = alone(runner, spec)
        check_same(first[spec.rid], want)
        check_same(again[spec.rid], want)


def test_retraction_with_drafts(runner):
    """Long answers: more is admitted than fits, so that requests must give way, whoever guesses."""
    params = [SamplingParams(temperature=float(i % 2), seed=i, max_new_tokens=60, ignore_eos=True) for i in range(6)]
    specs = [GenerateReq(f"r{i}", [i + 1, 2, 3], p) for i, p in enumerate(params)]
    scheduler = new_scheduler(runner)
    crowd = serve(scheduler, [specs])
    assert scheduler.state.counters.retractions > 0, "the test never met a retraction"
    assert scheduler.state.counters.spec_accepted_tokens > 50
    for spec in specs:
        check_same(crowd[spec.rid], alone(runner, spec))


def test_aborted_neighbours(runner):
    """Every second request is aborted on its way."""
    specs = requests(5, 12)
    crowd = serve(new_scheduler(runner), [specs], [spec.rid for spec in specs[::2]])
    for spec in specs[1::2]:
        check_same(crowd[spec.rid], alone(runner, spec))


def test_the_real_drafter_saves_steps(runner):
    """Greedy answers of a random model run in circles, so that guesses are right; every token counts, none twice."""
    params = SamplingParams(temperature=0.0, max_new_tokens=100, ignore_eos=True)
    spec = GenerateReq("r", [1, 2, 3], params)
    plain, scheduler = new_scheduler(runner, None), new_scheduler(runner, lambda: NGram(7, 2, 12))
    check_same(serve(scheduler, [[spec]])["r"], serve(plain, [[spec]])["r"])
    before, after = plain.state.counters, scheduler.state.counters
    assert after.steps < before.steps / 2
    assert after.output_tokens == before.output_tokens == 100
    assert after.steps + after.spec_accepted_tokens == 100


def test_nothing_compiles_after_warmup(runner):
    """Steps with drafts of any number give the compiler no work."""
    compiled = []

    def listen(event: str, seconds: float, **about: object) -> None:
        compiled.extend([event] * ("backend_compile" in event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    serve(new_scheduler(runner), [requests(7, 12)])
    assert not compiled
    assert runner.num_compiles == len(runner.buckets.all()) + len(runner.buckets.samplers())


def test_n_answers_and_stop_strings(runner):
    """Through the whole engine: n, a stop string from the middle of an answer, streams."""
    ask = {"max_new_tokens": 40, "n": 2, "seed": 3, "temperature": 0.3, "ignore_eos": True}
    prompt, found, stop = list(range(1, 30)), [], ""
    for draft in (None, Noise):
        parts = Parts(toy_tokenizer(), FrontLimits(TINY.vocab_size, 128), lambda d=draft: new_scheduler(runner, d))
        with Engine(parts=parts) as engine:
            answers = engine.generate(input_ids=prompt, sampling_params=ask)
            stop = stop or answers[1]["text"][20:22]
            answers += engine.generate(input_ids=prompt, sampling_params=ask | {"stop": [stop]})
            *_, last = engine.generate(input_ids=prompt, sampling_params=ask | {"n": 1}, stream=True)
            found.append([(a["output_ids"], a["text"], a["meta_info"]["finish_reason"]) for a in [*answers, last]])
            info = engine.get_server_info()
    assert found[0] == found[1]
    assert found[0][3][2] == {"type": "stop", "matched": stop}
    assert (
        info["spec_drafted_tokens"] > info["spec_accepted_tokens"] > 0
        and info["free_pages"] + info["cached_pages"] == info["total_pages"]
    )


def test_a_planted_mistake_is_seen(runner, monkeypatch):
    """A draft that is believed without a look changes tokens."""
    from tpu_mini_sglang.managers import scheduler as module

    def credulous(state, one, out):
        tokens = out.tokens.copy()
        tokens[one.first : one.first + len(one.drafts)] = one.drafts
        real(state, one, replace(out, tokens=tokens))

    real = module.take_tokens
    spec = GenerateReq("r", [1, 2, 3], SamplingParams(temperature=1.0, seed=1, max_new_tokens=30, ignore_eos=True))
    want = alone(runner, spec)
    monkeypatch.setattr(module, "take_tokens", credulous)
    with pytest.raises((AssertionError, ValueError)):
        check_same(serve(new_scheduler(runner), [[spec]])["r"], want)


@pytest.mark.exhaustive  # test_mesh.py has less of the same
@pytest.mark.timeout(900)
def test_pallas_kernels_interpreted(runner):
    """The ragged kernel with small blocks checks the drafts: tokens as with XLA's attention."""
    specs = requests(3, 4)
    pallas = new_runner(make_mesh(), "pallas")
    found = serve(new_scheduler(pallas), [specs])
    for spec in specs:
        check_same(found[spec.rid], alone(runner, spec))
