"""The campaigns' short forms, and the proof that each of them can fail: a fault is planted, and the campaign sees it.

The long forms: `python -m tests.campaigns --long`. What is measured in time is run here, and judged only there.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from campaigns import bad_input, cache, ends, overload, soak, traces
from campaigns.harness import Server, make_model

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(model: Path) -> Iterator[Server]:
    """One server for all campaigns that leave it alive."""
    server = Server(model, max_queued_requests=overload.QUEUE)
    yield server
    assert server.end() == 0, "".join(server.lines)


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    """It, and afterwards without any fault and at rest."""
    yield shared
    names = "slow retract_every ignore_salt lose_token wrong_when_cached skip_mask leak_slot leak_memory".split()
    shared.plant(**dict.fromkeys([*names, "swallow_reject", "fragile_parser", "deaf"]))
    httpx.post(shared.url + "/abort_request", json={"abort_all": True})


def quiet(line: str) -> None:
    """Progress that nobody watches."""


def played(server: Server, count: int = 2) -> list[str]:
    return traces.problems(asyncio.run(traces.play(server, server, range(count), quiet)))


def soaked(server: Server, count: int = 120, growth: float = 1.0) -> list[str]:
    return soak.problems(asyncio.run(soak.run(server, count, 40, quiet)), growth)


def paired(server: Server, count: int = 12) -> list[str]:
    return cache.problems(asyncio.run(cache.run(server, count, quiet)))


def test_traces(server: Server) -> None:
    assert played(server, 3) == []


def test_traces_see_a_lost_token(server: Server) -> None:
    server.plant(lose_token=40)
    assert any("lost" in problem or "different" in problem for problem in played(server))


def test_traces_see_a_skipped_mask(server: Server) -> None:
    server.plant(skip_mask=3)
    assert played(server) != []


def test_cached_and_cold(server: Server) -> None:
    assert paired(server, 15) == []


def test_cached_and_cold_see_a_wrong_token(server: Server) -> None:
    server.plant(wrong_when_cached=10)
    assert any("different" in problem for problem in paired(server))


def test_cached_and_cold_see_a_salt_that_is_ignored(server: Server) -> None:
    server.plant(ignore_salt=True)
    assert any("found without cache" in problem for problem in paired(server))


def test_soak(server: Server) -> None:
    """Memory has no time to settle in a run this short: the long form is the judge of it."""
    assert soaked(server, 200) == []


def test_soak_sees_slots_and_memory_that_leak(server: Server) -> None:
    server.plant(leak_memory=1_000_000, leak_slot=True)
    found = soaked(server, growth=0.2)
    assert any("slots left over" in problem for problem in found), found
    assert any("scheduler grew" in problem for problem in found), found


def test_bad_input(server: Server, tmp_path: Path) -> None:
    assert bad_input.problems(asyncio.run(bad_input.run(server, 60, str(tmp_path), quiet))) == []


def test_bad_input_sees_a_500(server: Server) -> None:
    server.plant(fragile_parser=True)
    found = bad_input.problems({"curated": asyncio.run(bad_input.curated(server, quiet))})
    assert found and all("NaN: 500" in problem for problem in found)


def test_overload(server: Server) -> None:
    """Right answers, and a refusal for everybody else; how quickly is for a quiet machine to say."""
    figures = asyncio.run(overload.run(server, 6, quiet))
    assert overload.problems(figures, p99_ms=float("inf"), least=0.0) == []


def test_overload_sees_a_refusal_that_never_comes(server: Server) -> None:
    server.plant(swallow_reject=True)
    figures = asyncio.run(overload.run(server, 4, quiet, patience=20))
    assert any("other" in problem for problem in overload.problems(figures))


@pytest.mark.timeout(400)
def test_ends(model: Path) -> None:
    """A second SIGTERM is in test_survives.py."""
    assert ends.problems(asyncio.run(ends.run(model, 1, 1, quiet))) == []


@pytest.mark.exhaustive
@pytest.mark.timeout(400)
def test_ends_see_an_orphan_and_clients_who_hear_nothing(model: Path) -> None:
    found = ends.problems(
        {"SIGKILL of the scheduler": [asyncio.run(ends.one(model, 9, 2.0, faults={"deaf": 1, "orphan": 1}))]}
    )
    assert "orphans" in found[0] and "hung" in found[0], found


def test_a_page_that_leaks_is_seen(model: Path, shared: Server) -> None:
    """Last, for it is gone for good."""
    httpx.post(shared.url + "/flush_cache")
    shared.plant(leak_page=True)
    found = soaked(shared, 60)
    assert "1 pages left over" in found and "1 pages after a flush left over" in found, found


def test_the_released_server_knows_no_faults() -> None:
    """Nothing in the package names the hook: it is tests/campaigns/server.py alone."""
    package = Path(__file__).resolve().parent.parent / "tpu_mini_sglang"
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in ("tests.campaigns", "Faulty", "leak_page")), path
