"""Import every module of the installed package, and show that it is the one in the folder given, not the checkout."""

import importlib
import pkgutil
import sys
from pathlib import Path

import tpu_mini_sglang

if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    found = Path(tpu_mini_sglang.__file__).resolve()
    if not found.is_relative_to(folder):
        sys.exit(f"imported {found}, not the package in {folder}")
    names = [m.name for m in pkgutil.walk_packages(tpu_mini_sglang.__path__, "tpu_mini_sglang.")]
    for name in names:
        importlib.import_module(name)
    print(f"imported {len(names)} modules of the wheel")
