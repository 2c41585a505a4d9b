"""`tpu-mini-sglang --help` answers in under half a second, in an environment that holds nothing but the wheel."""

import subprocess
import sys
import time

LIMIT_S = 0.5


def seconds(
    command: list[str],  # a program and its arguments
) -> float:
    """How long the command takes; an error if it fails."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    best = min(seconds([sys.argv[1], "--help"]) for _ in range(5))
    print(f"--help: {best:.3f} s, the best of 5")
    sys.exit(best > LIMIT_S)
