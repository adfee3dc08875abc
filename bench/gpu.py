"""Tests and benchmarks on one GPU, in one command and one file.

    python bench gpu                                # under 9 minutes, writes build/gpu_result.json
    python bench gpu --toy --output toy.json        # the same code on a CPU in tiny sizes, under a minute

Every part is a process of its own with a limit of its own; one that fails or hangs is recorded and the next runs.
The file is rewritten after every part, so that an interruption loses at most the part that was running.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
BUDGET = 520.0  # seconds: what is left of nine minutes goes to starting and ending
_GRACE = 10.0
_TAIL = 4000

Read = Callable[[str, Path], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        arguments: its arguments after `python`; {scratch} is a folder of its own.
        limit: seconds after which it is killed.
        read: (output, folder) -> the part's results, also from what a killed process has left.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float
    read: Read


def machine(output: str, scratch: Path) -> dict[str, Any]:
    """The JSON line of `python bench machine`."""
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


def outcomes(output: str, scratch: Path) -> dict[str, Any]:
    """Counts by outcome, and the names of what failed, from the lines of `pytest -v`."""
    lines = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", output, re.MULTILINE)
    counts = Counter(outcome.lower() for _, outcome in lines)
    return {"counts": dict(counts), "failed": sorted({name for name, state in lines if state in ("FAILED", "ERROR")})}


def benchmarks(output: str, scratch: Path) -> dict[str, Any]:
    """The benchmarks' JSON, what failed there, and the tables that were printed."""
    found = {**outcomes(output, scratch), "text": output.splitlines(), "benchmarks": [], "targets": []}
    file = scratch / "benchmarks.json"
    if file.exists() and file.stat().st_size:
        found |= json.loads(file.read_text(encoding="utf-8"))
    return found


def parts(toy: bool) -> list[Part]:
    """What runs, in this order; the fused ops take what time is left."""
    pytest = ("-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider")
    bench = (*pytest, "bench", "--benchmark-only", "--benchmark-columns=median", "-W", "ignore")
    bench = (*bench, "--benchmark-json={scratch}/benchmarks.json", f"--bench-device={'cpu' if toy else 'cuda'}", "-k")
    size = ("--toy",) if toy else ()
    tests = ("tests/kernels/test_dispatch.py",) if toy else ("tests/kernels", "tests/engine", "-k", "cuda")
    some = "sd15 and (posterior_mean or (forward and (noise_given or philox)))" if toy else "not training_step"
    return [
        Part("machine", ("bench", "machine"), 60, machine),
        Part("tests", (*pytest, *tests), 150, outcomes),
        Part("training step", (*bench, "training_step", *size), 600 if toy else 190, benchmarks),
        Part("benchmarks", (*bench, some, *size), 420, benchmarks),
    ]


def run(part: Part, limit: float) -> dict[str, Any]:
    """Run a part for at most `limit` seconds: how it ended, its results, and the end of its output if it failed."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        arguments = [argument.replace("{scratch}", folder) for argument in part.arguments]
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            # The package as it is installed, never the folder we stand in.
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        timed_out = _wait(process, limit)
        output.seek(0)
        text = output.read()
        found: dict[str, Any] = {"status": "timed out" if timed_out else "ok" if process.returncode == 0 else "failed"}
        found["exit_code"] = process.returncode
        try:
            found["result"] = part.read(text, Path(folder))
        except (ValueError, LookupError) as error:
            found["status"] = "timed out" if timed_out else "failed"
            found["error"] = f"no result to read: {type(error).__name__}: {error}"
    if found["status"] != "ok":
        found["output_end"] = text[-_TAIL:]
    found["seconds"] = round(time.monotonic() - started, 1)
    return found


def _wait(process: subprocess.Popen[Any], limit: float) -> bool:
    """Wait; past the limit interrupt, so that pytest writes what it has, then kill the whole group."""
    for deadline, then in ((limit, signal.SIGINT), (_GRACE, signal.SIGKILL)):
        try:
            process.wait(deadline)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, then)
        else:
            return then != signal.SIGINT
    process.wait()
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="tiny sizes on the CPU: does it run, not how fast")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu_result.json")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="default: %(default)g")
    given = parser.parse_args(arguments)
    if not (given.toy or torch.cuda.is_available()):
        parser.error("PyTorch sees no CUDA GPU here; --toy runs the same code on the CPU")
    return measure(parts(given.toy), given.budget, given.output, given.toy)


def measure(chosen: Sequence[Part], budget: float, output: Path, toy: bool) -> int:
    """Run the parts inside the budget and write the file; 0 if all of them ran and succeeded, else 1."""
    started = time.monotonic()
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "toy": toy,
        "commit": _commit(),
        "parts": {},
        "left_out": [part.name for part in chosen],
    }
    for part in chosen:
        left = budget - (time.monotonic() - started) - _GRACE
        if left <= 0:
            break
        print(f"{part.name} ...", flush=True)
        result["parts"][part.name] = run(part, min(part.limit, left))
        result["left_out"].remove(part.name)
        result["seconds"] = round(time.monotonic() - started, 1)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{part.name}: {result['parts'][part.name]['status']}, {result['parts'][part.name]['seconds']} s")
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name in result["left_out"]:
        print(f"{name}: left out, the time is up")
    print(output)
    complete = not result["left_out"] and all(part["status"] == "ok" for part in result["parts"].values())
    return 0 if complete else 1


def _commit() -> str | None:
    """The checkout's commit, "+changes" when files differ from it; None outside a repository or without git."""
    describe = ("describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*")
    git = shutil.which("git")
    found = git and subprocess.run([git, "-C", str(ROOT), *describe], capture_output=True, text=True).stdout.strip()
    return found or None
