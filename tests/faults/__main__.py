"""python -m tests.faults: play faults on a server under load, some seeds each; a table, and a file of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio

from . import database, parent, workers
from .stage import Figure, Needs, Skipped, Stage, Timing
from .workers import FAULTY, HANGS

TIMINGS = {
    "quick": Timing(before=3.0, fault=7.0, after=2.0),
    "session": Timing(before=5.0, fault=13.0, after=3.0),
    "full": Timing(before=30.0, fault=30.0, after=30.0),
}
SEEDS = {"quick": 1, "session": 5, "full": 5}
LIMIT_SECONDS = 240.0  # of one run: slower than this is a finding


class Fault(NamedTuple):
    name: str
    play: Callable[[Stage], Awaitable[None]]
    needs: Needs = Needs()
    loaded: bool = True  # the load runs beneath it
    prepare: Callable[[Stage], None] | None = None
    proxied: bool = False  # PostgreSQL is reached through a proxy


FAULTS = [
    Fault("F1", workers.kill_workers),
    Fault("F2", parent.kill_the_supervisor),
    Fault("F3", workers.freeze_a_worker, Needs(environment=HANGS, lease_seconds=3.0)),
    Fault("F4", parent.freeze_the_supervisor),
    Fault("F5", workers.block_a_loop, Needs(environment=HANGS, flags=FAULTY)),
    Fault("F6-one", workers.crash_one_slot, Needs(flags=FAULTY)),
    Fault("F6-all", workers.crash_all_slots, Needs(flags=FAULTY), loaded=False),
    Fault(
        "F7",
        parent.stop_with_parked_polls_and_streams,
        Needs(environment={"QUEEN_GRACE_SECONDS": str(int(parent.GRACE_SECONDS))}),
        loaded=False,
    ),
    Fault("F8", parent.reload_ten_times),
    Fault("F9", parent.upgrade_to_broken_code, prepare=parent.copy_the_code),
    Fault("F9-sound", parent.upgrade_to_sound_code),
    Fault("F10", database.restart_postgres),
    Fault("F11", database.kill_backends),
    Fault("F12", database.lose_commit_replies, proxied=True),
    Fault("F24", workers.run_out_of_memory, Needs(flags=FAULTY, environment={"QUEEN_MAX_WORKER_RSS_MB": "200"})),
    Fault("F36", workers.run_out_of_descriptors),
]


class Run(msgspec.Struct):
    """What one fault came to with one seed."""

    fault: str
    seed: int
    seconds: float
    figures: list[Figure]
    wrongs: list[str]
    notes: list[str]
    skipped: str = ""
    load_average: float = 0.0  # of the machine, at the end: what else it had to do shows in every time


def play(fault: Fault, seed: int, timing: Timing, keep: Path | None) -> Run:
    """One run in a directory of its own, which any user may enter: as root, PostgreSQL runs under another."""
    scratch = Path(tempfile.mkdtemp(prefix="queen-faults-"))
    scratch.chmod(0o755)
    needs = msgspec.structs.replace(
        fault.needs, environment={"FAULTS_AT_BOOT": str(scratch / "fault")} | fault.needs.environment
    )
    stage = Stage(scratch, seed, timing, needs)
    began = time.monotonic()
    run = Run(fault.name, seed, 0.0, stage.figures, stage.wrongs, stage.notes)
    try:
        if fault.prepare is not None:
            fault.prepare(stage)
        trio.run(perform, stage, fault)
    except Skipped as reason:
        run.skipped = str(reason)
    except Exception as error:  # noqa: BLE001  # a run that breaks is a finding, and the others go on
        stage.wrong(f"the run broke: {describe(error)}")
    finally:
        stage.end()
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            where = keep / f"{fault.name}-{seed}"
            where.with_suffix(".history.json").write_bytes(msgspec.json.encode(stage.load.history))
            where.with_suffix(".log").write_text(stage.log)
        shutil.rmtree(scratch, ignore_errors=True)
    run.load_average = round(os.getloadavg()[0], 1)
    run.seconds = round(time.monotonic() - began, 1)
    return run


async def perform(stage: Stage, fault: Fault) -> None:
    with trio.move_on_after(LIMIT_SECONDS) as limit:
        async with database.open_foreign(stage) if fault.proxied else nullcontext():
            await (stage.play(fault.play) if fault.loaded else fault.play(stage))
    if limit.cancelled_caught:
        stage.wrong(f"not done within {LIMIT_SECONDS} s")


def describe(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(describe, error.exceptions))
    return f"{type(error).__name__}: {error}"


def table(runs: list[Run]) -> tuple[list[str], bool]:
    """What was seen, a line a figure; and whether all of it is as it should be."""
    lines = [f"{'fault':9} {'figure':44} {'limit':>9} {'median':>9} {'worst':>9}  by seed"]
    good = True
    for name in dict.fromkeys(run.fault for run in runs):
        mine = [run for run in runs if run.fault == name]
        for figure_name in dict.fromkeys(figure.name for run in mine for figure in run.figures):
            figures = [one for run in mine for one in run.figures if one.name == figure_name and one.values]
            if not figures:
                continue
            medians = [figure.median for figure in figures]
            limits = [figure.limit for figure in figures if figure.limit is not None]
            whole = Figure(
                figure_name,
                medians,
                statistics.median(limits) if limits else None,
                figures[0].at_least,
            )
            passed = whole.passes()
            good &= passed
            worst = (min if whole.at_least else max)(figure.worst for figure in figures)
            limit = "" if whole.limit is None else f"{'≥' if whole.at_least else '≤'} {whole.limit:.2f}"
            seeds = " ".join(f"{median:.2f}" for median in medians)
            mark = "" if passed else "  FAILED"
            lines.append(f"{name:9} {figure_name:44} {limit:>9} {whole.median:>9.2f} {worst:>9.2f}  {seeds}{mark}")
        busy = [run.load_average for run in mine]
        lines.append(
            f"{name:9} {'load average of the machine':44} {'':>9} {statistics.median(busy):>9.2f} {max(busy):>9.2f}"
        )
        for run in mine:
            if run.skipped:
                lines.append(f"{name:9} skipped: {run.skipped}")
            lines += [f"{name:9} seed {run.seed}: {note}" for note in dict.fromkeys(run.notes)]
            good &= not run.wrongs
            lines += [f"{name:9} seed {run.seed} VIOLATION {wrong}" for wrong in run.wrongs[:8]]
            if len(run.wrongs) > 8:
                lines.append(f"{name:9} seed {run.seed} and {len(run.wrongs) - 8} more")
    return lines, good


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.faults", description=__doc__)
    parser.add_argument("faults", nargs="*", help=f"of {', '.join(fault.name for fault in FAULTS)}; all of them")
    parser.add_argument("--pace", choices=TIMINGS, default="session", help="how long a run is; full: 30 s in 90 s")
    parser.add_argument("--seeds", type=int, help="runs of each fault (5; 1 with --pace quick)")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--results", type=Path, help="file for the results, JSON")
    parser.add_argument("--keep", type=Path, help="directory for histories and logs")
    arguments = parser.parse_args()
    unknown = set(arguments.faults) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    chosen = [fault for fault in FAULTS if not arguments.faults or fault.name in arguments.faults]
    seeds = arguments.seeds or SEEDS[arguments.pace]
    runs: list[Run] = []
    for fault in chosen:
        for seed in range(arguments.first_seed, arguments.first_seed + seeds):
            run = play(fault, seed, TIMINGS[arguments.pace], arguments.keep)
            runs.append(run)
            verdict = (run.skipped and f"skipped: {run.skipped}") or f"{len(run.wrongs)} violations"
            print(f"{fault.name} seed {seed}: {verdict} in {run.seconds} s", file=sys.stderr, flush=True)
            if run.skipped:
                break
    lines, good = table(runs)
    print("\n".join(lines))
    if arguments.results is not None:
        arguments.results.write_text(json.dumps(results(runs, arguments.pace), indent=1) + "\n")
    return 0 if good else 1


def results(runs: list[Run], pace: str) -> object:
    return {
        "pace": pace,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "root": os.geteuid() == 0,
        "runs": msgspec.to_builtins(runs),
    }


if __name__ == "__main__":
    sys.exit(main())
