"""``queen-trio top``: the running server, again and again, until Ctrl-C. On a terminal in place, else line by line."""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from queen.cli.ask import Line, NotRunning, add_server_arguments
from queen.cli.run import Commands
from queen.cli.show import COLUMNS, RIGHT, headline, row, table
from queen.errors import StartupError
from queen.model.snapshot import Snapshot

if TYPE_CHECKING:
    from rich.console import RenderableType

BARS: Final = "▁▂▃▄▅▆▇█"
WIDE: Final = 112  # columns that all figures need
FOR_WIDE: Final = frozenset({"gen", "lag p50", "p99", "flight"})
HISTORY: Final = 60  # points of a curve
COLOURS: Final = {
    "serving": "green",
    "reloading": "cyan",
    "starting": "yellow",
    "booting": "yellow",
    "waiting": "red",
    "degraded": "red",
    "parked": "bold red",
    "draining": "magenta",
    "stopping": "magenta",
}


def add_parser(commands: Commands) -> None:
    """Add this command and its flags."""
    parser = commands.add_parser(
        "top",
        help="watch the running server",
        description="Show how the server is, again and again, until Ctrl-C. Where standard output is no terminal, a "
        "table each time.",
    )
    parser.set_defaults(command=top)
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (1)")
    parser.add_argument("--count", type=int, metavar="N", help="looks, then end; without end if not given")
    add_server_arguments(parser)


def top(arguments: argparse.Namespace) -> int:
    """Watch until interrupted. Returns the exit code."""
    if arguments.interval <= 0:
        raise StartupError("--interval must be more than 0 seconds")
    Line(arguments).close()  # nobody there from the start is an answer; later it may be a restart
    try:
        if sys.stdout.isatty():
            _watch(arguments)
        else:
            _print(arguments)
    except (KeyboardInterrupt, BrokenPipeError):  # or whoever read it, has enough
        pass
    return 0


def looks(arguments: argparse.Namespace) -> Iterator[Snapshot | str]:
    """A snapshot each time, or why there is none."""
    line: Line | None = None
    number = 0
    try:
        while True:
            seen: Snapshot | str
            try:
                if line is None:
                    line = Line(arguments)
                seen = line.status()
            except NotRunning as error:
                if line is not None:
                    line.close()
                    line = None
                seen = error.detail
            number += 1
            yield seen
            if number == arguments.count:
                return
            time.sleep(arguments.interval)
    finally:
        if line is not None:
            line.close()


def _print(arguments: argparse.Namespace) -> None:
    for seen in looks(arguments):
        if isinstance(seen, str):
            print(seen, flush=True)
        else:
            print(headline(seen), *table([row(slot) for slot in seen.slots]), "", sep="\n", flush=True)


def _watch(arguments: argparse.Namespace) -> None:
    # Not at the top: no other command needs it, and `run` should not carry it.
    from rich.live import Live

    curves = Curves()
    with Live(screen=True, auto_refresh=False) as screen:
        for seen in looks(arguments):
            curves.add(seen)
            screen.update(picture(seen, curves, screen.console.width), refresh=True)


class Curves:
    """What was seen lately: requests and messages a second of the whole server, and its greatest loop lag."""

    def __init__(self) -> None:
        self.requests: deque[float] = deque(maxlen=HISTORY)
        self.messages: deque[float] = deque(maxlen=HISTORY)
        self.lag_ms: deque[float] = deque(maxlen=HISTORY)

    def add(self, seen: Snapshot | str) -> None:
        slots = () if isinstance(seen, str) else seen.slots
        self.requests.append(sum(slot.requests_per_second for slot in slots))
        self.messages.append(sum(slot.messages_per_second for slot in slots))
        self.lag_ms.append(max((slot.loop_lag_max_ms for slot in slots), default=0.0))


def curve(values: deque[float]) -> str:
    """Values as bars, the greatest as high as there is room."""
    greatest = max(values, default=0.0)
    if greatest <= 0:
        return BARS[0] * len(values)
    return "".join(BARS[min(len(BARS) - 1, int(value / greatest * len(BARS)))] for value in values)


def picture(seen: Snapshot | str, curves: Curves, width: int = WIDE) -> RenderableType:
    """The screen, of that many columns."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if isinstance(seen, str):
        return Text(seen, style="bold red")
    columns = [name for name in COLUMNS if name != "last exit" and not (width < WIDE and name in FOR_WIDE)]
    workers = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in columns:
        workers.add_column(name, justify="right" if name in RIGHT else "left", no_wrap=True)
    for slot in seen.slots:
        cells = dict(zip(COLUMNS, row(slot), strict=True))
        colour = COLOURS.get(slot.state, "")
        workers.add_row(*(Text(cells[name], style=colour if name == "state" else "") for name in columns))
    exits = [Text(f"slot {slot.slot} before: {slot.last_exit}", style="dim") for slot in seen.slots if slot.last_exit]
    lines = Table.grid(padding=(0, 2))
    for name, values, unit in (
        ("requests", curves.requests, "/s"),
        ("messages", curves.messages, "/s"),
        ("loop lag", curves.lag_ms, "ms at most"),
    ):
        lines.add_row(name, Text(f"{values[-1]:,.1f} {unit}", style="bold"), Text(curve(values), style="cyan"))
    return Group(Text(headline(seen), style=COLOURS.get(seen.state, "")), "", lines, workers, *exits)
