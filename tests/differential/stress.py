"""Compare the engine with its twin for a long time: `python -m tests.differential.stress ITERATIONS SEED`.

One iteration is a fresh machine and 300 random operations. What differs prints the line that repeats it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from pair import random_run

LENGTH = 300


def main(arguments: list[str]) -> int:
    """Run the iterations; 0 if all were equal, 1 at the first difference, 2 if the arguments are not two numbers."""
    try:
        iterations, seed = (int(word) for word in arguments)
    except ValueError:
        print("usage: python -m tests.differential.stress ITERATIONS SEED", file=sys.stderr)
        return 2
    for number in range(seed, seed + iterations):
        try:
            random_run(number, LENGTH)
        except Exception:
            print(f"engine and twin differ; repeat: python -m tests.differential.stress 1 {number}", file=sys.stderr)
            raise
    print(f"{iterations * LENGTH} operations, engine and twin equal after each")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
