"""python -m perf.supervision: the same harm to every contender, some runs each, medians; a table and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import trio

from perf.supervision.contenders import CONTENDERS, Contender, make_environment, versions
from perf.supervision.harm import HARMS, Figures, do_harm, open_contestant

HERE = Path(__file__).resolve().parent


def run(contender: Contender, python: str, harm: str) -> Figures:
    with open_contestant(contender, python, harm) as it:
        return trio.run(do_harm, harm, it)


def middle(runs: list[Figures]) -> Figures:
    """The median of every number, and of what is not one what was seen most often."""
    merged: Figures = {}
    for name in dict.fromkeys(name for figures in runs for name in figures):
        values = [figures[name] for figures in runs if name in figures]
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) == len(values):
            merged[name] = round(statistics.median(numbers), 3)
        else:
            texts = [json.dumps(value, sort_keys=True) for value in values]
            merged[name] = json.loads(statistics.mode(texts))
    return merged


def main() -> int:
    parser = argparse.ArgumentParser(prog="perf.supervision", description=__doc__)
    parser.add_argument("--harms", help=f"comma-separated, of: {', '.join(HARMS)}")
    parser.add_argument("--contenders", help=f"comma-separated, of: {', '.join(one.name for one in CONTENDERS)}")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--environment", type=Path, help="directory of the peers' environment; made if it is missing")
    parser.add_argument("--results", type=Path, default=HERE.parent / "results" / "local-supervision.json")
    arguments = parser.parse_args()
    harms = arguments.harms.split(",") if arguments.harms else list(HARMS)
    names = arguments.contenders.split(",") if arguments.contenders else [one.name for one in CONTENDERS]
    if unknown := (set(harms) - set(HARMS)) | (set(names) - {one.name for one in CONTENDERS}):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="queen-peers-") as temporary:
        python = make_environment(arguments.environment or Path(temporary))
        results: dict[str, Any] = {
            "versions": versions(python),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "runs": arguments.runs,
            "harms": {},
        }
        if arguments.results.exists():
            results["harms"] = json.loads(arguments.results.read_text())["harms"]
        for harm in harms:
            for contender in CONTENDERS:
                if contender.name not in names:
                    continue
                seen = [run(contender, python, harm) for _ in range(arguments.runs)]
                results["harms"].setdefault(harm, {})[contender.name] = middle(seen)
                print(f"{harm}: {contender.name}: {json.dumps(middle(seen))}", flush=True)
                arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
