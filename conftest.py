"""pytest runs each notebook as one test: `nbdev_test` in a fresh process, on the CPU, under a time limit."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports JAX

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Started in the background, this process would have been told to ignore Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent
NBDEV_TEST = Path(sys.executable).with_name("nbdev_test")
# Notebooks compile hundreds of tiny programs, many of them the same: quickly, and kept for the next notebook and run.
QUICK_COMPILES = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
LIMIT_S = 600
SLOW_LIMIT_S = 1200
# Files of some minutes. They start first, or one worker is left with them when the other has nothing to do.
LONGEST = (
    "test_mesh",
    "test_campaigns",
    "test_server",
    "test_survives",
    "test_kv_dtypes",
    "41_cli",
    "test_promises",
    "test_hosts",
    "test_parity",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run slow tests, and cells flagged `#| slow`")
    parser.addoption("--exhaustive", action="store_true", help="also run every combination: an hour and more")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "NotebookFile | None":
    if file_path.suffix == ".ipynb" and file_path.parent == ROOT / "nbs":
        return NotebookFile.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))
    for flag in ("slow", "exhaustive"):
        if config.getoption(f"--{flag}"):
            continue
        for item in items:
            if item.get_closest_marker(flag) and not isinstance(item, Notebook):
                item.add_marker(pytest.mark.skip(reason=f"needs --{flag}"))


class NotebookFailed(Exception):
    """A notebook's cell failed, or the notebook ran past its limit; the message is its output."""


class NotebookFile(pytest.File):
    def collect(self) -> Iterator["Notebook"]:
        yield Notebook.from_parent(self, name=self.path.stem)


class Notebook(pytest.Item):
    """One notebook. Its slow cells run only with --slow; `-m slow` selects the notebooks that have some."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.add_marker(pytest.mark.timeout(0))  # the limit below also ends the processes that a cell started
        if '"#| slow' in self.path.read_text(encoding="utf-8"):
            self.add_marker("slow")

    def runtest(self) -> None:
        slow = self.config.getoption("--slow")
        command = [NBDEV_TEST, "--path", self.path, "--flags", "slow" if slow else ""]
        # CI=true gives hypothesis its repeatable profile without deadlines, which a busy machine would miss.
        env = os.environ | QUICK_COMPILES | {"MPLBACKEND": "agg", "CI": "true"}
        limit = SLOW_LIMIT_S if slow else LIMIT_S
        with tempfile.TemporaryFile("w+") as out:  # not a pipe, which a process left behind would hold open
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
            try:
                process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                out.write(f"\n{self.path.name} was still running after {limit} s\n")
            finally:
                self.end_group(process)
            out.seek(0)
            if process.returncode:
                raise NotebookFailed(out.read().strip())

    @staticmethod
    def end_group(process: subprocess.Popen) -> None:
        """End what the notebook left behind: a server that a failed cell couldn't stop, for one."""
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()

    def repr_failure(self, excinfo: pytest.ExceptionInfo, style: str | None = None) -> str:
        if isinstance(excinfo.value, NotebookFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.path.stem
