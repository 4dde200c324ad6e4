"""Times the two commands of the README as a user runs them, after installation.

The quick study on the embedded digits, the quick study on CIFAR-10 where it is found, and the
tests: wall time, once each, and the peak memory of the largest process. Everything is run again,
forced; the reports in `reports/quick/` are replaced. Takes about a quarter of an hour.

    python benchmarks/commands.py [--out FILE.json]
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from timing import write

from cifar_lib.config import ROOT

STUDY = [sys.executable, "-m", "cifar_lib", "study", "--preset", "quick", "--force"]
AGAIN = STUDY[:-1]
NO_DATA = {"CIFAR10_DIR": "none", "CIFAR10_DOWNLOAD": "0"}
COMMANDS: dict[str, tuple[list[str], dict[str, str]]] = {
    "make study, digits": (STUDY, NO_DATA),
    "make study, CIFAR-10": (STUDY, {"CIFAR10_DOWNLOAD": "0"}),
    "make study again, nothing changed": (AGAIN, {"CIFAR10_DOWNLOAD": "0"}),
    "make test": (["make", "test"], {}),
}


def peak_memory_gib(process: psutil.Process) -> float:
    """Resident memory of the largest process in a tree now, GiB."""
    sizes = [0]
    for member in [process, *process.children(recursive=True)]:
        try:
            sizes.append(member.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return max(sizes) / 2**30


def measure(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Runs one command to its end."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL
    )
    watched, peak = psutil.Process(process.pid), 0.0
    while process.poll() is None:
        try:
            peak = max(peak, peak_memory_gib(watched))
            process.wait(timeout=0.5)
        except (subprocess.TimeoutExpired, psutil.NoSuchProcess):
            continue
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "status": process.returncode, "peak_memory_gib": peak}


def main() -> None:
    """Measures every command once, prints a table and writes what was measured."""
    parser = argparse.ArgumentParser(description="Times the README's commands.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args()
    results = []
    for name in options.only:
        command, environment = COMMANDS[name]
        result = {"name": name, **measure(command, environment)}
        results.append(result)
        print(
            f"{name:36}{result['seconds']:>8.0f} s, exit status {result['status']}, "
            f"largest process {result['peak_memory_gib']:.1f} GiB",
            flush=True,
        )
    write(options.out, results=results)


if __name__ == "__main__":
    main()
