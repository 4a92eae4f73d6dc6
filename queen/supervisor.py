"""The task tree of the parent process: what is started in which order, what a signal does, what is told.

Its parts are in supervision/: how one worker is kept running is in slot.py, how PostgreSQL is in database.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import msgspec
import structlog
import trio

from queen._version import __version__
from queen.balance import Pool
from queen.config.settings import Settings
from queen.errors import StartupError
from queen.model.snapshot import ServerState, Snapshot
from queen.model.tree import Branch
from queen.observability import logs
from queen.supervision import handover
from queen.supervision.children import BOOT_CRASHES, NEVER_SERVED
from queen.supervision.control_socket import (
    ControlSocket,
    ControlSocketTaken,
    Refused,
    control_path,
    make_runtime_directory,
)
from queen.supervision.database import Embedded, choose_database
from queen.supervision.handover import Handover
from queen.supervision.limits import Limits
from queen.supervision.listeners import PassedPort, Port
from queen.supervision.nursery import Place, RestartPolicy, Vigil
from queen.supervision.pidfile import pidfile
from queen.supervision.process import KILL_MARGIN_SECONDS, WorkerProcess
from queen.supervision.reaper import run_reaper
from queen.supervision.service_manager import ServiceManager
from queen.supervision.slot import BOOT_SECONDS, TALLIES, Slot
from queen.supervision.tree import draw_server

log = structlog.get_logger(__name__)

PORT_SECONDS: Final = 2.0  # for a port held by workers of a killed supervisor, who leave within one
STATUS_SECONDS: Final = 60.0
TREE_SECONDS: Final = 3.0  # for workers to say what they are doing; one that hangs does not
MAX_WORKERS: Final = 1024
TRIAL_SECONDS: Final = 30.0  # for the program to show that it could take over; its imports, mostly
SILENT_SECONDS: Final = 1.5  # three heartbeats missed: what waits for such a worker is better off with another
RELIEF_SECONDS: Final = 0.25  # between two looks at what waits there
LIMITS_SECONDS: Final = 1.0  # a leak of 100 MB/s is seen 100 MB late
LIMITS_RETRY_SECONDS: Final = 60.0  # after a successor that did not come up
DEFAULT_APP: Final = "queen.worker.app:create_app"


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
    if handover.is_trial(os.environ):
        return 0
    left = handover.take_handover(os.environ)
    manager = ServiceManager.take_environment(os.environ)
    try:
        with pidfile(settings.pidfile), open_port(settings, manager, left) as port:
            supervisor = Supervisor(settings, port, app=app, announce=announce, manager=manager, left=left)
            exit_code = trio.run(supervisor.run)
    except* StartupError as group:
        never_served = first_error(group)
    if never_served is not None:
        raise never_served
    return exit_code


def open_port(settings: Settings, manager: ServiceManager, left: Handover | None = None) -> Port:
    """The port that we have already, or that the service manager passed, or else the one of the settings."""
    if left is not None:
        return (PassedPort if left.passed else Port).left(left.port)
    passed = manager.passed_listener()
    if passed is not None:
        return PassedPort(passed)
    return Port(settings.host, settings.port, patience_seconds=PORT_SECONDS)


def first_error(group: BaseExceptionGroup[Any]) -> StartupError:
    """The first error in the group. Others, of children that failed for the same reason, say the same."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, StartupError)
    return error


class Supervisor:
    """The parent process: its state and its one task tree.

    ::

        signals, status line, vigil, reaper
        database ── PostgreSQL, the last to stop
          └── lives ── worker processes, also those that drain while another has their slot
                └── places ── Slot 0 … N-1, the spare
                      └── errands ── a reload, the end of a worker that hangs
    """

    def __init__(
        self,
        settings: Settings,
        port: Port,
        *,
        app: str,
        announce: Callable[[str], None],
        manager: ServiceManager | None = None,
        left: Handover | None = None,
    ) -> None:
        self.settings = msgspec.structs.replace(settings, log_format=logs.resolve_format(settings.log_format))
        self.app = app
        self.stopping = trio.Event()  # drain and exit
        self.hurry = trio.Event()  # exit now
        self.database = choose_database(settings, self.hurry)
        self.slots: list[Slot] = []
        self.spare: Place[WorkerProcess] | None = None
        self._leaving: list[Slot] = []  # fewer workers are wanted: these drain
        self._done_before: Counter[str] = Counter()  # by slots that are no more
        self._restarts_before = 0
        self._wanted = settings.workers
        self._left = left  # by the program that this process executed before
        self._generation = 0
        self.pool: Pool | None = None  # of connections, while it runs
        self._port = port
        self._announce = announce
        self._manager = manager or ServiceManager({})
        self._announced = False
        self._reload_wanted = trio.Event()
        self._reloading = False
        self._replacing = trio.Lock()  # one worker at a time is replaced, whatever for
        self._lives: trio.Nursery
        self._places: trio.Nursery
        self._errands: trio.Nursery
        self._started_at = time.monotonic()
        self._upgrading = False
        if left is not None:
            self._wanted = len(left.slots)
            self._generation = left.generation
            self._started_at -= left.uptime_seconds
            self._announced = True
            if left.server is not None and isinstance(self.database, Embedded):
                self.database.take_over(left.server)
        self._everything = trio.CancelScope()
        self._exit_code = 0

    async def run(self) -> int:
        """Until a signal has stopped it all. Returns the exit code.

        Raises:
            ExceptionGroup: of StartupError, if it never served.
        """
        with contextlib.closing(Pool(self._left.pool if self._left is not None else None)) as self.pool:
            return await self._run()

    async def _run(self) -> int:
        async with trio.open_nursery() as watch:
            await watch.start(self._watch_signals)
            watch.start_soon(self.report_status)
            watch.start_soon(self._open_control_socket)
            watch.start_soon(self._manager.run_watchdog, self._is_healthy)
            watch.start_soon(run_reaper)
            with self._everything:
                async with trio.open_nursery() as database:
                    database.start_soon(self.database.run)
                    async with (
                        trio.open_nursery() as self._lives,
                        trio.open_nursery() as self._places,
                        trio.open_nursery() as self._errands,
                    ):
                        watch.start_soon(Vigil(self.settings.hang_seconds).run, self._all_workers, self._note_silent)
                        taken_over = self._left is not None
                        self.set_workers(self._wanted)
                        if taken_over:
                            log.info("taken over", workers=self._wanted, version=__version__)
                            self._manager.reloading("replacing the workers one by one")
                            self._reload_wanted.set()
                        self._errands.start_soon(self._run_reloads)
                        self._errands.start_soon(self._run_limits)
                        self._errands.start_soon(self._run_relief)
                        await self.stopping.wait()
                        for slot in self.slots:
                            slot.close()
                        if self.spare is not None:
                            self.spare.close(KILL_MARGIN_SECONDS)
                        self._errands.cancel_scope.cancel()
                    database.cancel_scope.cancel()
            watch.cancel_scope.cancel()
        log.info("stopped", exit_code=self._exit_code)
        return self._exit_code

    # -- what an operator asks for -------------------------------------------------------------------------------------

    def set_workers(self, count: int) -> None:
        """Run that many workers from now on. Fewer: the last slots drain.

        Raises:
            Refused: there is no such number of workers.
        """
        if not 1 <= count <= MAX_WORKERS:
            raise Refused(f"{count} workers cannot be run: give a number from 1 to {MAX_WORKERS}")
        if self.stopping.is_set():
            return
        if self.slots:
            log.info("workers wanted", before=len(self.slots), now=count)
        self._wanted = count
        if self.pool is not None:
            self.pool.board.slots = count
        while len(self.slots) < count:
            index = len(self.slots)
            left = self._left.slots[index] if self._left is not None and index < len(self._left.slots) else None
            slot = Slot(self, index, self._port, self._lives, self._policy(), self._take_spare, left)
            self.slots.append(slot)
            self._places.start_soon(slot.run)
        while len(self.slots) > count:
            self._places.start_soon(self._close_slot, self.slots.pop())
        self._left = None
        self.settings = msgspec.structs.replace(self.settings, workers=count)

    def reload(self) -> None:
        """Begin to replace the workers one by one. Asked for while that goes on, it is done once more after it."""
        log.info("reloading")
        self._manager.reloading("replacing the workers one by one")
        for worker in self._all_workers():
            self._errands.start_soon(worker.reload_certificate)
        self._reload_wanted.set()

    def upgrade(self) -> None:
        """Begin to go on under the program that is there now: this process executes it anew."""
        if self._upgrading or self.stopping.is_set() or not self._announced:
            log.warning("no upgrade now", state=self._state(), upgrading=self._upgrading)
            return
        log.info("upgrading")
        self._upgrading = True
        self._errands.start_soon(self._upgrade)

    def stop(self, why: str = "asked to") -> None:
        """Begin to drain, then exit."""
        if not self.stopping.is_set():
            log.info("stopping", why=why, grace_seconds=self.settings.grace_seconds)
            self._manager.stopping("finishing what is begun")
            self.stopping.set()

    def exit_now(self, code: int) -> None:
        """Whatever is not done is left undone."""
        self._exit_code = code
        self.hurry.set()
        self._everything.cancel()

    def snapshot(self) -> Snapshot:
        """How the server is now."""
        return Snapshot(
            pid=os.getpid(),
            version=__version__,
            state=self._state(),
            uptime_seconds=round(time.monotonic() - self._started_at, 3),
            url=self.url,
            database=self.database.where,
            workers_wanted=self._wanted,
            workers_active=sum(slot.ready for slot in self.slots),
            restarts=self._restarts(),
            reloading=self._is_reloading,
            upgrading=self._upgrading,
            slots=tuple(slot.snapshot() for slot in (*self.slots, *self._leaving)),
        )

    @property
    def url(self) -> str:
        return self._port.url if self.settings.tls_cert is None else self._port.url.replace("http:", "https:", 1)

    def _state(self) -> ServerState:
        if self.stopping.is_set():
            return "stopping"
        if not self._announced:
            return "starting"
        if any(slot.place.is_failing for slot in self.slots):
            return "degraded"
        return "reloading" if self._is_reloading else "serving"

    @property
    def _is_reloading(self) -> bool:
        return self._reloading or self._reload_wanted.is_set()

    # -- workers -------------------------------------------------------------------------------------------------------

    def next_generation(self) -> int:
        self._generation += 1
        return self._generation

    def note_ready(self) -> None:
        """A worker became ready: with the last of them, tell where the server listens."""
        if not self._announced and all(slot.ready for slot in self.slots):
            self._announced = True
            workers = f"{len(self.slots)} worker{'s' if len(self.slots) > 1 else ''}"
            details = f"{workers}, {self.database.where}, pid {os.getpid()}"
            self._manager.ready(f"{workers}, listening on {self.url}")
            self._announce(f"queen-trio {__version__} listening on {self.url} ({details})")
            self._keep_spare()

    def note_boot_failure(self) -> None:
        """A worker did not come up. If none does and none ever served, it is no use going on.

        Raises:
            StartupError: with what a worker said.
        """
        if any(slot.ever_ready for slot in self.slots):
            return
        if all(slot.boot_failure for slot in self.slots) and (
            all(slot.hopeless for slot in self.slots) or sum(slot.boot_crashes for slot in self.slots) >= BOOT_CRASHES
        ):
            raise StartupError(self.slots[0].boot_failure)

    def _policy(self) -> RestartPolicy:
        return RestartPolicy()

    def _keep_spare(self) -> None:
        """From now on, if one is wanted."""
        wanted = self.settings.spare if self.settings.spare is not None else len(self.slots) > 1
        if wanted and self.spare is None:
            self.spare = Place(self._lives, self._make_spare, self._policy(), after_death=self._spare_died)
            self._places.start_soon(self.spare.run)

    def _make_spare(self) -> WorkerProcess:
        worker = WorkerProcess(self, gently=True)
        worker.serves = lambda: log.info("spare worker ready", pid=worker.pid, generation=worker.generation)
        return worker

    def _take_spare(self) -> WorkerProcess | None:
        return None if self.spare is None else self.spare.take()

    def _spare_died(self, worker: WorkerProcess, wait_seconds: float) -> None:
        log.error("spare worker died", pid=worker.pid, how=worker.how, again_in_seconds=round(wait_seconds, 1))

    def _all_workers(self) -> list[WorkerProcess]:
        places = [slot.place for slot in (*self.slots, *self._leaving)]
        if self.spare is not None:
            places.append(self.spare)
        return [worker for place in places for worker in place.lives()]

    def _note_silent(self, worker: WorkerProcess) -> None:
        seconds = round(worker.silent_seconds)
        log.error("worker hangs: its loop gives no sign of life", slot=worker.slot, pid=worker.pid, seconds=seconds)
        self._errands.start_soon(worker.put_down, f"hung: no sign of life for {seconds} s")

    async def _close_slot(self, slot: Slot) -> None:
        self._leaving.append(slot)
        slot.close(others=True)
        await slot.place.wait_closed()
        self._leaving.remove(slot)
        self._done_before += slot.done
        self._restarts_before += slot.restarts

    async def _run_reloads(self) -> None:
        while not self.stopping.is_set():
            await self._reload_wanted.wait()
            self._reload_wanted = trio.Event()
            self._reloading = True
            try:
                await self._reload_workers()
            finally:
                self._reloading = False
                self._keep_spare()
                self._manager.ready(f"{len(self.slots)} workers, listening on {self.url}")

    async def _run_relief(self) -> None:
        """Have others accept what waits for a worker that is silent, long before it is certain that it hangs."""
        while True:
            await trio.sleep(RELIEF_SECONDS)
            ready = [slot for slot in self.slots if slot.ready]
            silent = [
                slot for slot in ready if slot.worker is not None and slot.worker.silent_seconds >= SILENT_SECONDS
            ]
            if len(silent) < len(ready):
                for slot in silent:
                    slot.give_backlog()

    async def _run_limits(self) -> None:
        """Replace workers that have grown too large or too old, one at a time."""
        limits = Limits(self.settings.max_worker_rss_bytes, self.settings.max_worker_age_seconds)
        not_before: dict[Slot, float] = {}
        while True:
            await trio.sleep(LIMITS_SECONDS)
            for slot in list(self.slots):
                worker, now = slot.worker, trio.current_time()
                if worker is None or not slot.ready or not_before.get(slot, now) > now:
                    continue
                why = limits.exceeded(worker.heartbeat.rss_bytes, worker.served_seconds(), worker.lot)
                if why:
                    async with self._replacing:
                        if slot.worker is worker and slot in self.slots and await slot.replace(why):
                            not_before[slot] = trio.current_time() + LIMITS_RETRY_SECONDS

    async def _reload_workers(self) -> None:
        """The spare first: it shows at nobody's cost whether the code that is there now comes up."""
        async with self._replacing:
            if self.spare is not None:
                failure = await self.spare.replace(KILL_MARGIN_SECONDS, BOOT_SECONDS)
                if failure:
                    log.error("reload given up, the old workers stay", failure=failure)
                    return
            for slot in list(self.slots):
                if slot in self.slots and (failure := await slot.replace("reload")):
                    log.error("reload given up, the old workers stay", failure=failure)
                    return
            log.info("reloaded", workers=len(self.slots))

    # -- going on under new code ---------------------------------------------------------------------------------------

    async def _upgrade(self) -> None:
        try:
            async with self._replacing:
                if failure := await self._try_upgrade():
                    log.error("upgrade given up, the old server goes on", failure=failure)
        finally:
            self._upgrading = False

    async def _try_upgrade(self) -> str:
        """Execute our program anew, if it and a worker come up. Returns only where that fails, and why.

        What drains is waited for: of a worker that is about to end there is nothing to be left to anybody.
        """
        environment = {**os.environ, **self._manager.environment}
        with trio.move_on_after(TRIAL_SECONDS) as trying:
            if failure := await handover.try_program(self._leave(), environment):
                return failure
        if trying.cancelled_caught:
            return f"the program did not come up within {TRIAL_SECONDS:g} s"
        if failure := await self._try_worker():
            return failure
        for slot in (*self.slots, *self._leaving):
            for worker in slot.place.predecessors:
                await worker.ended.wait()
        if self.spare is not None:
            self.spare.close(KILL_MARGIN_SECONDS)
            await self.spare.wait_closed()
            self.spare = None
        try:
            handover.execute_anew(self._leave(), environment)
        except OSError as error:
            self._keep_spare()
            return f"{error.strerror}"

    async def _try_worker(self) -> str:
        """Whether a worker comes up. Returns why not."""
        worker, news = WorkerProcess(self, gently=True), trio.Event()
        worker.begun, worker.tell = True, news.set
        self._lives.start_soon(worker.run)
        with trio.move_on_after(BOOT_SECONDS):
            await news.wait()
        came_up = worker.ready.is_set()
        worker.drain(KILL_MARGIN_SECONDS)
        await worker.ended.wait()
        return "" if came_up else worker.how

    def _leave(self) -> Handover:
        """What the program that is executed next has to know."""
        assert self.pool is not None
        return Handover(
            form=handover.FORM,
            port=self._port.fileno(),
            passed=isinstance(self._port, PassedPort),
            pool=self.pool.descriptors,
            slots=tuple(slot.leave() for slot in self.slots),
            server=self.database.leave() if isinstance(self.database, Embedded) else None,
            generation=self._generation,
            uptime_seconds=time.monotonic() - self._started_at,
        )

    # -- operators and service managers --------------------------------------------------------------------------------

    async def tree(self) -> Branch:
        """What the server is doing, as far as its workers say in time."""
        workers = self._all_workers()
        answers: dict[WorkerProcess, tuple[Branch, ...] | None] = {}

        async def ask(worker: WorkerProcess) -> None:
            with trio.move_on_after(TREE_SECONDS):
                answers[worker] = await worker.describe()

        async with trio.open_nursery() as asking:
            for worker in workers:
                asking.start_soon(ask, worker)
        return draw_server(self.snapshot(), [(worker, answers.get(worker)) for worker in workers])

    async def _open_control_socket(self) -> None:
        """Answer on the control socket, from when its directory is there.

        Raises:
            StartupError: it cannot be made where it was asked for, or another server answers on it.
        """
        await self.database.prepared.wait()
        path = control_path(self.settings, self._port.address[1])
        try:
            if self.settings.control_socket is None and self.settings.database_url is not None:
                make_runtime_directory(path.parent)
            control = ControlSocket(path)
        except ControlSocketTaken:
            raise
        except StartupError as error:
            if self.settings.control_socket is not None:
                raise
            log.warning("no control socket", error=error.detail)  # nobody asked for it: no reason not to serve
            return
        with control:
            log.debug("control socket open", path=str(path))
            await control.run(self)

    def _is_healthy(self) -> bool:
        return self.stopping.is_set() or any(slot.ready for slot in self.slots)

    # -- signals and the status line -----------------------------------------------------------------------------------

    async def _watch_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        # SIGHUP also under nohup, which has it ignored: a terminal that hangs up costs a reload, an operator who is not
        # heard a deploy.
        with trio.open_signal_receiver(*handover.HELD_SIGNALS) as signals:
            handover.hear_signals_again()
            task_status.started()
            async for number in signals:
                name = signal.Signals(number).name
                match number:
                    case signal.SIGHUP:
                        self.reload()
                    case signal.SIGUSR2:
                        self.upgrade()
                    case signal.SIGTTIN:
                        self.set_workers(min(self._wanted + 1, MAX_WORKERS))
                    case signal.SIGTTOU:
                        self.set_workers(max(self._wanted - 1, 1))
                    case _ if not self.stopping.is_set():
                        self.stop(name)
                    case _:
                        log.warning("exiting now", signal=name)
                        self.exit_now(128 + number)

    async def report_status(self) -> None:
        """A line every minute: who works, how often one was replaced, what was done."""
        started_at = reported_at = trio.current_time()
        before = self._done()
        while True:
            await trio.sleep(STATUS_SECONDS)
            now, done = trio.current_time(), self._done()
            seconds = now - reported_at
            server = self.snapshot()
            log.info(
                "status",
                state=server.state,
                active_workers=sum(slot.ready for slot in self.slots),
                wanted_workers=len(self.slots),
                degraded_slots=list(server.degraded_slots),
                restarts=self._restarts(),
                uptime_seconds=round(now - started_at),
                **{f"{name}_per_second": round((done[name] - before[name]) / seconds, 1) for name in TALLIES},
            )
            reported_at, before = now, done

    def _done(self) -> Counter[str]:
        return sum((slot.done for slot in (*self.slots, *self._leaving)), Counter(self._done_before))

    def _restarts(self) -> int:
        return self._restarts_before + sum(slot.restarts for slot in (*self.slots, *self._leaving))
