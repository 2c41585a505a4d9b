"""A notebook filter for Quarto: a figure's alternative text, kept in its output's metadata, becomes `fig-alt`."""

import json
import sys


def alt_text(
    cell: dict,  # a code cell
) -> str | None:
    """The first alternative text among the cell's stored pictures."""
    for output in cell.get("outputs", []):
        for metadata in output.get("metadata", {}).values():
            if isinstance(metadata, dict) and "alt" in metadata:
                return metadata["alt"]
    return None


def add_alt_text(
    notebook: dict,  # as read from the file
) -> dict:
    """The notebook with `#| fig-alt` on top of each cell that shows a picture and doesn't set it itself."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        alt = alt_text(cell) if cell["cell_type"] == "code" else None
        if alt and "#| fig-alt" not in source:
            cell["source"] = [f"#| fig-alt: {json.dumps(alt)}\n", *source.splitlines(keepends=True)]
    return notebook


if __name__ == "__main__":
    json.dump(add_alt_text(json.load(sys.stdin)), sys.stdout)
