"""The engine's promise on a real (tiny, random) model: a request's tokens depend on nothing but the request."""

import itertools
import random
from dataclasses import replace

import jax
import pytest
from flax import nnx
from jax.sharding import Mesh

from tpu_mini_sglang.entrypoints.engine import Engine, Parts
from tpu_mini_sglang.managers.detokenizer_manager import toy_tokenizer
from tpu_mini_sglang.managers.io_struct import AbortReq, GenerateReq
from tpu_mini_sglang.managers.schedule_policy import NewTokenRatio
from tpu_mini_sglang.managers.scheduler import Limits, Scheduler, check_pages, stats
from tpu_mini_sglang.managers.tokenizer_manager import Limits as FrontLimits
from tpu_mini_sglang.managers.tokenizer_manager import RequestError
from tpu_mini_sglang.model_config import ModelConfig
from tpu_mini_sglang.model_executor.model_runner import Bucket, Buckets, ModelRunner
from tpu_mini_sglang.models.decoder import DecoderLM
from tpu_mini_sglang.sampling.sampling_params import SamplingParams
from tpu_mini_sglang.sharding import make_mesh

TINY = ModelConfig("LlamaForCausalLM", 61, 32, 64, 2, 4, 2, 8, 128, dtype="float32", eos_token_ids=(0,))
PAGE, CHUNK, ROWS = 4, 32, 4


def new_runner(mesh: Mesh, pages: int = 40, chunk: int = CHUNK, rows: int = ROWS) -> ModelRunner:
    """A warm runner, unless told otherwise with few pages."""
    model = DecoderLM(TINY, rngs=nnx.Rngs(1), dtype="float32")
    # a random model's logits are nearly flat: sharpen them, so that sampling has something to choose
    model.embed_tokens.embedding.value = model.embed_tokens.embedding.value * 30
    scoring = [Bucket(min(chunk, 64), rows, 16, scored=min(chunk, 64))]
    runner = ModelRunner(model, TINY, mesh, pages, PAGE, Buckets(chunk, rows, q_block=16, scoring=scoring))
    runner.warmup(lambda line: None)
    return runner


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    """One runner; its programs serve every test of this file."""
    return new_runner(make_mesh())


def new_scheduler(runner: ModelRunner, policy: str = "fcfs", cache: bool = True, overlap: bool = True) -> Scheduler:
    """A scheduler over the shared runner, with nothing cached; it promises no memory, so that pages run out."""
    most = runner.buckets.extend[-1]
    limits = Limits(TINY.context_len, TINY.vocab_size, (0,), most.tokens, most.rows, policy, cache, overlap)
    return Scheduler(runner, replace(limits, conservativeness=0))


def other_order(scheduler: Scheduler) -> None:
    """From now on with overlap, if it was without, and the other way round."""
    state = scheduler.state
    assert not state.flights
    state.limits = replace(state.limits, overlap=not state.limits.overlap)


def random_request(rid: str, rng: random.Random, longest: int = 8) -> GenerateReq:
    """Any mixture of parameters; prompts from three prefixes, so that some are found in the cache."""
    tail = [rng.randrange(1, 61) for _ in range(rng.randint(1, longest))]
    prompt = [rng.randrange(3) + 1] * rng.choice([4, 9, 17]) + tail
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.3]),
        top_k=rng.choice([-1, 3, 20]),
        top_p=rng.choice([1.0, 0.8]),
        min_p=rng.choice([0.0, 0.05]),
        frequency_penalty=rng.choice([0.0, 0.5]),
        presence_penalty=rng.choice([0.0, -0.5]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        logit_bias=rng.choice([None, {7: 2.0, 9: -100.0}]),
        seed=rng.randrange(2**32),
        max_new_tokens=rng.randint(1, 30),
        min_new_tokens=rng.choice([0, 1]),
        ignore_eos=rng.random() < 0.5,
    )
    start = rng.choice([None] * 7 + [-1, 0, rng.randrange(len(prompt))])  # None: no logprobs, -1: none of the prompt
    return GenerateReq(rid, prompt, params, start is not None, 2, logprob_start_len=-1 if start is None else start)


def serve(scheduler: Scheduler, waves: list[list[GenerateReq]]) -> dict[str, tuple[list[int], str]]:
    """Step until idle, one wave of arrivals each second step; tokens and finish of each request."""
    tokens: dict[str, list[int]] = {}
    finish: dict[str, str] = {}
    for step in range(4000):
        incoming = waves[step // 2] if step % 2 == 0 and step // 2 < len(waves) else []
        for out in scheduler.step(incoming):
            tokens.setdefault(out.rid, []).extend(out.token_ids)
            finish[out.rid] = out.finish.type if out.finish else "?"
        check_pages(scheduler.state)
        if not scheduler.has_work and step // 2 >= len(waves):
            return {rid: (tokens[rid], finish[rid]) for rid in tokens}
    raise TimeoutError("still busy")


def alone(runner: ModelRunner, spec: GenerateReq) -> tuple[list[int], str]:
    """What the request gets when nobody else is there and nothing is cached."""
    return serve(new_scheduler(runner, cache=False, overlap=False), [[spec]])[spec.rid]


@pytest.mark.parametrize("seed,policy,cache", [(0, "fcfs", True), (1, "lpm", True), (2, "fcfs", False)])
def test_same_tokens_alone_in_a_crowd_cached_and_retracted(runner, seed, policy, cache):
    """40 pages for up to 4 requests of up to 14 pages: the crowd meets the cache, chunked prefill and retraction."""
    rng = random.Random(seed)
    specs = [random_request(f"r{i}", rng) for i in range(24)]
    scheduler = new_scheduler(runner, policy, cache)
    crowd = serve(scheduler, [specs[i : i + 6] for i in range(0, 24, 6)])
    other_order(scheduler)
    again = serve(scheduler, [specs])  # now whole prompts lie in the cache, and no step overlaps the next
    assert again == crowd
    assert not cache or stats(scheduler.state)["cached_tokens"] > 0, "the test never met the cache"
    for spec in specs:  # other schedulers over the same pool: from here on the first one's cache is void
        assert crowd[spec.rid] == alone(runner, spec), spec


def test_retraction_changes_no_token(runner):
    """Long answers from short prompts: more is admitted than fits, so that requests must give way."""
    params = [SamplingParams(temperature=1.0, seed=i, max_new_tokens=60, ignore_eos=True) for i in range(6)]
    specs = [GenerateReq(f"r{i}", [i + 1, 2, 3], p) for i, p in enumerate(params)]
    scheduler = new_scheduler(runner)
    crowd = serve(scheduler, [specs])
    assert stats(scheduler.state)["retractions"] > 0, "the test never met a retraction"
    for spec in specs:
        assert crowd[spec.rid] == alone(runner, spec)
    kept = new_scheduler(runner)
    kept.state.ratio = NewTokenRatio()  # what a server does unless told otherwise
    assert serve(kept, [specs]) == crowd
    assert stats(kept.state)["retractions"] == 0, "their lengths are certain, so that there is no need"


def test_aborted_neighbours_change_no_token(runner):
    """Every second request is aborted on its way."""
    rng = random.Random(5)
    specs = [random_request(f"r{i}", rng) for i in range(12)]
    scheduler, got = new_scheduler(runner), {}
    incoming: list = list(specs)
    for step in range(600):
        for out in scheduler.step(incoming):
            got[out.rid] = (out.token_ids, out.finish.type if out.finish else "?")
        check_pages(scheduler.state)
        incoming = [AbortReq(f"r{step}")] if step % 2 and step < 12 else []
    assert not scheduler.has_work
    for spec in specs[::2]:
        assert got[spec.rid] == alone(runner, spec)


def test_salts_share_no_prefix(runner):
    """The same prompt under three salts, each asked twice: found only under its own, the tokens are the same."""
    params = SamplingParams(temperature=0.0, max_new_tokens=4, ignore_eos=True)
    scheduler, prompt = new_scheduler(runner), list(range(1, 30))

    def ask(rid: str, salt: str) -> tuple[list[int], int]:
        out = scheduler.step([GenerateReq(rid, prompt, params, cache_salt=salt)])
        while scheduler.has_work:
            out += scheduler.step([])
        return out[-1].token_ids, out[-1].cached_tokens

    first, second = ([ask(f"{turn}{salt}", salt) for salt in ("", "ann", "bob")] for turn in "12")
    assert [cached for _, cached in first] == [0, 0, 0]
    assert [cached for _, cached in second] == [28, 28, 28]
    assert len({tuple(tokens) for tokens, _ in first + second}) == 1
    check_pages(scheduler.state)


@pytest.mark.parametrize("phase,status", [("waiting", 503), ("running", 408)])
def test_a_deadline_reaches_the_caller_and_frees_the_pages(runner, phase, status):
    """On a clock that ticks whenever somebody looks: who is late hears it, whoever is not gets its tokens."""
    scheduler, ticks = new_scheduler(runner), itertools.count()
    scheduler.state.clock = lambda: float(next(ticks))
    scheduler.state.limits = replace(scheduler.state.limits, **{f"{phase}_timeout": 20.0})
    prompts, params = [[i + 1, 2, 3] for i in range(ROWS + 2)], {"max_new_tokens": 40, "ignore_eos": True}
    with Engine(parts=Parts(toy_tokenizer(), FrontLimits(TINY.vocab_size, 128), lambda: scheduler)) as engine:
        with pytest.raises(RequestError, match=f"{phase} for more than 20 s") as late:
            engine.generate(input_ids=prompts, sampling_params=params)
        assert late.value.status == status
        short = engine.generate(input_ids=prompts[0], sampling_params=params | {"max_new_tokens": 2})
        assert len(short["output_ids"]) == 2
        info = engine.get_server_info()
    assert info["free_pages"] + info["cached_pages"] == info["total_pages"]


class Compiles:
    """What JAX compiles from now on, whoever might have asked for it."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event: str, seconds: float, **about: object) -> None:
        self.heard.extend([event] * ("backend_compile" in event))


@pytest.mark.timeout(1800)
def test_nothing_compiles_after_warmup(request):
    """Eight shapes and their samplers; 2,000 requests with --slow."""
    count = 2000 if request.config.getoption("--slow") else 300
    mixed_traffic(new_runner(make_mesh(), pages=300, chunk=256, rows=16), count)


def mixed_traffic(runner: ModelRunner, count: int) -> None:
    """Requests of any length and kind, come and gone in any order, meet every shape and give the compiler no work."""
    rng, scheduler, compiles, met = random.Random(8), new_scheduler(runner), Compiles(), set()
    forward = runner.forward
    runner.forward = lambda rows, sampling, bucket: met.add(bucket) or forward(rows, sampling, bucket)
    left = [random_request(f"r{i}", rng, longest=rng.choice([8, 90, 90])) for i in range(count)]
    while left or scheduler.has_work:
        incoming: list = [left.pop() for _ in range(min(rng.choice([0, 0, 1, 2, 7]), len(left)))]
        if scheduler.state.running and not rng.randrange(40):
            incoming.append(AbortReq(rng.choice([*scheduler.state.running]).rid))
        scheduler.step(incoming)
    del runner.forward
    assert met == set(runner.buckets.all()), "some shape was never met"
    assert not compiles.heard
    assert runner.num_compiles == len(runner.buckets.all()) + len(runner.buckets.samplers())
    jax.jit(lambda x: x - 12.5)(3.0)
    assert compiles.heard, "the listener hears nothing"
