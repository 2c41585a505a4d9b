"""What the repository says about its chapters, written from the notebooks themselves.

`python tools/chapters.py` rewrites the README's table, the site's sidebar and import-linter's layers.
tests/test_repository.py fails while any of the three is out of step.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "tpu_mini_sglang"
COLAB = "https://colab.research.google.com/github/tpu-mini-sglang/tpu-mini-sglang/blob/main/nbs"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
# The first chapter number of each part.
PARTS = {0: "Plan", 10: "Compute", 20: "Memory", 29: "Time", 36: "Product", 50: "TPU"}


@dataclass(frozen=True)
class Chapter:
    """One notebook: its file, its opening words and the module it exports."""

    stem: str
    title: str
    summary: str
    module: str | None

    @property
    def number(self) -> str:
        """The prefix of the file name, such as `10b`."""
        return self.stem.split("_")[0]

    @property
    def part(self) -> str:
        """The part of the course that this number belongs to."""
        first = max(start for start in PARTS if start <= int(re.match(r"\d+", self.number)[0]))
        return PARTS[first]


def opening(
    text: str,  # the chapter's first cell of text
) -> tuple[str, str]:
    """The title (`# ...`, without a number) and the first sentence under it, with or without a quote mark."""
    title = re.search(r"^# (?:\d+[a-z]?[.:]? )?(.+)$", text, re.MULTILINE)
    if not title:
        return "", ""
    paragraphs = (re.sub(r"^>\s?", "", p.strip(), flags=re.MULTILINE) for p in text[title.end() :].split("\n\n"))
    first = next((" ".join(p.split()) for p in paragraphs if p and p[0] not in "<#!|`"), "").strip("*_")
    return title[1].strip(), re.split(r"(?<=[.!?]) (?=[A-Z])", first)[0]


def read_chapter(
    path: Path,  # a notebook
) -> Chapter:
    """The chapter's title, its one-sentence summary and its `default_exp`."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = next(("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"), "")
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    module = re.search(r"^#\|\s*default_exp\s+(\S+)", code, re.MULTILINE)
    return Chapter(path.stem, *opening(first), module[1] if module else None)


def chapters() -> list[Chapter]:
    """Every chapter in the order of the file names, which is the order of the imports."""
    return [read_chapter(path) for path in sorted((ROOT / "nbs").glob("*.ipynb"))]


def readme_table() -> str:
    """The README's table of chapters, one row a notebook."""
    rows = ["| | chapter | what it is about | |", "|---|---|---|---|"]
    part = None
    for c in chapters():
        if c.part != part:
            rows.append(f"| **{c.part}** | | | |")
            part = c.part
        badge = f'<a href="{COLAB}/{c.stem}.ipynb"><img src="{BADGE}" alt="Open {c.number} in Colab"></a>'
        rows.append(f"| {c.number} | [{c.title}](nbs/{c.stem}.ipynb) | {c.summary} | {badge} |")
    return "\n" + "\n".join(rows) + "\n"  # a Markdown table stands between empty lines


def layers() -> str:
    """import-linter's layers: the last chapter's module on top, one module a layer."""
    modules = [c.module for c in chapters() if c.module]
    return "\n".join(f'    "{PACKAGE}.{m}",' for m in reversed(modules))


def sidebar() -> str:
    """The site's sidebar: a section a part, a page a chapter."""
    lines, part = [], None
    for c in chapters():
        if c.part != part:
            lines += [f'        - section: "{c.part}"', "          contents:"]
            part = c.part
        lines += [f'            - text: "{c.number} · {c.title}"', f"              href: nbs/{c.stem}.ipynb"]
    return "\n".join(lines)


def between(
    text: str,  # a whole file
    start: str,  # the line that opens the generated part
    end: str,  # the line that closes it
    new: str,  # what belongs between the two
) -> str:
    """`text` with everything between the two lines replaced."""
    pattern = re.compile(f"({re.escape(start)}\n).*?(^{re.escape(end)})", re.DOTALL | re.MULTILINE)
    result, count = pattern.subn(lambda m: m[1] + new + "\n" + m[2], text)
    assert count == 1, f"expected {start!r} once, found it {count} times"
    return result


def updated() -> dict[Path, str]:
    """Each file that names the chapters, as it should read."""
    parts = {
        "README.md": ("<!-- chapters: written by tools/chapters.py -->", "<!-- /chapters -->", readme_table()),
        "pyproject.toml": ("layers = [", "]", layers()),
        "_quarto.yml": ("        # chapters: written by tools/chapters.py", "        # /chapters", sidebar()),
    }
    return {ROOT / name: between((ROOT / name).read_text(encoding="utf-8"), *part) for name, part in parts.items()}


if __name__ == "__main__":
    for path, text in updated().items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"updated {path.name}")
