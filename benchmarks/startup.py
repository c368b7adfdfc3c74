"""How long commands take that load no model: ``scripts/bench startup``. Goal: ``--help`` in under half a second."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = (["--help"], ["--version"], ["serve", "--help"], ["config"], ["models"])


def main() -> None:
    """Print best and median of each command's wall-clock time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    for arguments in COMMANDS:
        seconds = []
        for _ in range(runs):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "evermini", *arguments],
                stdout=subprocess.DEVNULL,
                check=True,
            )
            seconds.append(time.perf_counter() - started)
        name = " ".join(["evermini", *arguments])
        print(f"{name:<22} best {min(seconds):.2f} s, median {statistics.median(seconds):.2f} s")


if __name__ == "__main__":
    main()
