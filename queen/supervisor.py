"""The task tree of the parent process: what is started in which order, what a signal does, what is told.

Its parts are in supervision/: how one worker is kept running is in slot.py, how PostgreSQL is in database.py.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import msgspec
import structlog
import trio

from queen._version import __version__
from queen.config.settings import Settings
from queen.errors import StartupError
from queen.observability import logs
from queen.supervision.children import NEVER_SERVED
from queen.supervision.database import choose_database
from queen.supervision.listeners import Port
from queen.supervision.slot import TALLIES, Slot

log = structlog.get_logger(__name__)

PORT_SECONDS: Final = 2.0  # for a port held by workers of a killed supervisor, who leave within one
STATUS_SECONDS: Final = 60.0
DEFAULT_APP: Final = "queen.app:create_app"


def run_supervisor(settings: Settings, *, app: str = DEFAULT_APP, announce: Callable[[str], None]) -> int:
    """Run the server until it is told to stop. Returns the exit code.

    Args:
        app: ``module:factory`` of the ASGI application that workers serve.
        announce: told once, in one line, where the server listens, when all workers are ready.

    Raises:
        StartupError: it never served; the sentence says why.
    """
    never_served: StartupError | None = None
    exit_code = NEVER_SERVED
    try:
        with Port(settings.host, settings.port, patience_seconds=PORT_SECONDS) as port:
            exit_code = trio.run(Supervisor(settings, port, app=app, announce=announce).run)
    except* StartupError as group:
        never_served = first_error(group)
    if never_served is not None:
        raise never_served
    return exit_code


def first_error(group: BaseExceptionGroup[Any]) -> StartupError:
    """The first error in the group. Others, of children that failed for the same reason, say the same."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, StartupError)
    return error


class Supervisor:
    """The parent process: its state and its one task tree."""

    def __init__(self, settings: Settings, port: Port, *, app: str, announce: Callable[[str], None]) -> None:
        self.settings = msgspec.structs.replace(settings, log_format=logs.resolve_format(settings.log_format))
        self.app = app
        self.stopping = trio.Event()  # drain and exit
        self.hurry = trio.Event()  # exit now
        self.database = choose_database(settings, self.hurry)
        self.slots = [Slot(self, index, port) for index in range(settings.workers)]
        self._port = port
        self._announce = announce
        self._announced = False
        self._everything = trio.CancelScope()
        self._exit_code = 0

    async def run(self) -> int:
        """Until a signal has stopped it all. Returns the exit code.

        Raises:
            ExceptionGroup: of StartupError, if it never served.
        """
        async with trio.open_nursery() as watch:
            await watch.start(self._watch_signals, watch)
            watch.start_soon(self.report_status)
            with self._everything:
                async with trio.open_nursery() as database:
                    database.start_soon(self.database.run)
                    async with trio.open_nursery() as workers:
                        for slot in self.slots:
                            workers.start_soon(slot.run)
                        await self.stopping.wait()
                        for slot in self.slots:
                            slot.close_listener()  # or the kernel would go on taking connections for nobody
                    database.cancel_scope.cancel()
            watch.cancel_scope.cancel()
        log.info("stopped", exit_code=self._exit_code)
        return self._exit_code

    async def _watch_signals(
        self, reloads: trio.Nursery, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
            numbers.append(signal.SIGHUP)
        with trio.open_signal_receiver(*numbers) as signals:
            task_status.started()
            async for number in signals:
                name = signal.Signals(number).name
                if number == signal.SIGHUP and self.settings.tls_cert is not None:
                    for slot in self.slots:
                        reloads.start_soon(slot.reload_certificate)
                elif not self.stopping.is_set():
                    log.info("stopping", signal=name, grace_seconds=self.settings.grace_seconds)
                    self.stopping.set()
                else:
                    log.warning("exiting now", signal=name)
                    self._exit_code = 128 + number
                    self.hurry.set()
                    self._everything.cancel()

    async def report_status(self) -> None:
        """A line every minute: who works, how often one was replaced, what was done."""
        started_at = reported_at = trio.current_time()
        before = self._done()
        while True:
            await trio.sleep(STATUS_SECONDS)
            now, done = trio.current_time(), self._done()
            seconds = now - reported_at
            log.info(
                "status",
                active_workers=sum(slot.ready for slot in self.slots),
                wanted_workers=len(self.slots),
                restarts=sum(slot.restarts for slot in self.slots),
                uptime_seconds=round(now - started_at),
                **{f"{name}_per_second": round((done[name] - before[name]) / seconds, 1) for name in TALLIES},
            )
            reported_at, before = now, done

    def _done(self) -> Counter[str]:
        return sum((slot.done for slot in self.slots), Counter())

    def note_ready(self) -> None:
        """A worker became ready: with the last of them, tell where the server listens."""
        if not self._announced and all(slot.ready for slot in self.slots):
            self._announced = True
            workers = f"{len(self.slots)} worker{'s' if len(self.slots) > 1 else ''}"
            details = f"{workers}, {self.database.where}, pid {os.getpid()}"
            url = self._port.url if self.settings.tls_cert is None else self._port.url.replace("http:", "https:", 1)
            self._announce(f"queen-trio {__version__} listening on {url} ({details})")

    def note_hopeless(self) -> None:
        """A slot cannot bring a worker up. If none can and no worker ever served, it is no use going on.

        Raises:
            StartupError: with what a worker said.
        """
        if all(slot.hopeless and not slot.ever_ready for slot in self.slots):
            raise StartupError(self.slots[0].hopeless)
