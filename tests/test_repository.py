"""What the repository promises about itself: one source for each fact, and nothing in it that shouldn't be."""

import ast
import base64
import json
import re
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tpu_mini_sglang"
sys.path.insert(0, str(ROOT / "tools"))

import chapters  # noqa: E402
import figure_alt  # noqa: E402

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# The front end and everything it is made of: these never import JAX, so that `--help` answers at once.
FRONT_END = [
    "model_config",
    "server_args",
    "models.gguf",
    "models.hub",
    "tokenizer",
    "sampling.sampling_params",
    "managers.io_struct",
    "constrained.grammar",
    "managers.detokenizer_manager",
    "managers.template_manager",
    "managers.tokenizer_manager",
    "entrypoints.engine",
    "entrypoints.chat",
    "entrypoints.openai",
    "function_call.function_call_parser",
    "parser.reasoning_parser",
    "entrypoints.http_server",
    "launch_server",
    "cli",
]
# Import names of the run-time requirements in settings.ini, and of what those always bring along.
RUN_TIME = {
    "tpu_mini_sglang",
    *("jax", "flax", "transformers", "tokenizers", "safetensors", "gguf", "huggingface_hub", "fastapi", "uvicorn"),
    *("h11", "msgspec", "zmq", "tqdm", "prometheus_client", "llguidance"),
    *("numpy", "ml_dtypes", "pydantic", "starlette", "jinja2"),
}


def settings() -> dict[str, str]:
    """settings.ini's one section."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def tracked_files() -> list[Path]:
    """Every file git knows or would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def module_name(path: Path) -> str:
    """A module's dotted name, from its file."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def test_the_version_has_one_source():
    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r'__version__ = "(.+)"', text)[1] == settings()["version"]


def test_nbdev_2_and_3_have_the_same_settings():
    ini = settings()
    for key, value in PYPROJECT["tool"]["nbdev"].items():
        if key != "put_version_in_init":  # nbdev 3 would take the version from pyproject.toml
            assert str(value).lower() == ini[key].lower(), key


def test_files_that_name_the_chapters_are_in_step():
    for path, text in chapters.updated().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python tools/chapters.py`"


def test_a_module_comes_from_one_notebook_and_every_module_from_some():
    exported = [c.module for c in chapters.chapters() if c.module]
    assert sorted(exported) == sorted(map(module_name, MODULES))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_opens_with_title_and_summary(path):
    chapter = chapters.read_chapter(path)
    assert re.fullmatch(r"\d\d[a-z]?_[a-z0-9_]+", path.stem)
    assert chapter.title and chapter.summary
    assert chapter.module or "#| export" not in path.read_text(encoding="utf-8"), "a chapter of figures has no module"
    assert len(chapter.summary) <= 200, "the README's table shows the summary: one short sentence"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_word_holds_a_place_for_what_was_to_be_written(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            assert not re.fullmatch(r"\W*[A-Z ]+\W*", text), f"cell {cell['id']}: {text}"
            found = re.search(r"\b(TODO|FIXME|TBD|XXX|PROBLEM|MEASURED|LADDER)\b", text)
            assert not found, f"cell {cell['id']}: {found[0]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_an_exported_cell_carries_no_other_directive(path):
    # nbdev 2 would copy the other one into the module and nbdev 3 would not
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        directives = [line.strip() for line in cell["source"] if line.startswith("#|")]
        assert "#| export" not in directives or directives == ["#| export"], f"cell {cell['id']}: {directives}"


def test_the_import_layers_are_in_force():
    contract = next(c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    assert len(contract["layers"]) == len(MODULES)
    assert "ignore_imports" not in contract


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_needs_only_run_time_requirements(path):
    allowed = RUN_TIME | sys.stdlib_module_names
    if path.name == "figures.py":  # for the notebooks only, as another test shows
        allowed = allowed | {"matplotlib", "IPython"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            assert name.split(".")[0] in allowed, f"{module_name(path)} imports {name}"


@pytest.mark.parametrize("name", FRONT_END)
def test_the_front_end_imports_no_jax(name):
    code = f"import sys, tpu_mini_sglang.{name}; print(*sorted(sys.modules.keys() & {{'jax', 'jaxlib', 'flax'}}))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.split()) == (0, []), result.stderr


def test_no_file_is_too_big_for_a_repository():
    assert [p.name for p in tracked_files() if p.stat().st_size > 1.5e6] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_figures_are_small_and_have_alternative_text(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            for kind, value in output.get("data", {}).items():
                if not kind.startswith("image/"):
                    continue
                text = "".join(value)
                size = len(text) if kind == "image/svg+xml" else len(base64.b64decode(text))
                assert size < 100_000, f"cell {cell['id']}: a figure of {size} bytes"
                assert figure_alt.alt_text(cell), f"cell {cell['id']}: a figure without alternative text"


def test_a_figure_s_alternative_text_reaches_the_site():
    output = {"metadata": {"image/png": {"alt": 'a "page"'}}}
    notebook = {"cells": [{"cell_type": "code", "source": "show()", "outputs": [output]}]}
    assert figure_alt.add_alt_text(notebook)["cells"][0]["source"][0] == '#| fig-alt: "a \\"page\\""\n'


def test_nothing_names_a_registry_or_a_machine():
    hosts = ["pypi" + ".org", "pythonhosted" + ".org", "registry." + "npmjs", "deb." + "debian"]
    places = ["/" + "work/", "/" + "root/", "/" + "opt/", "." + "pyenv"]
    for path in tracked_files():
        # errors="ignore": binary files are looked at too; a picture's base64 could hold any word by chance
        text = re.sub(r"[A-Za-z0-9+/=]{60,}", "", path.read_text(encoding="utf-8", errors="ignore"))
        for word in hosts + places:
            assert word not in text, f"{path.relative_to(ROOT)} names {word}"
