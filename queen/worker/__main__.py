"""The first code of a worker process: a guard against outliving the supervisor, then the imports, then the work.

What takes long to import is imported in ``main``, under the guard; how the worker serves is in run.py.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Final

GENTLE: Final = 10  # of nice
ORPHANED: Final = 1
ORPHAN_SECONDS: Final = 0.7  # the promise is one second; a busy machine takes its share of it


def main() -> int:
    """Serve until told to drain. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="queen.worker", description="One worker process; the supervisor starts it.")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--app", required=True, help="module:factory")
    parser.add_argument("--gently", action="store_true", help="nobody waits for it: import at others' leisure")
    arguments = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # for a thread that waits for it, in dump.py
    guard_against_orphanhood(arguments.control_fd)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    module, _, name = arguments.app.partition(":")
    if arguments.gently:
        import_gently("queen.worker.run", module)

    import trio

    import queen.lean  # noqa: F401  # isort: split
    from queen.control import Failed, encode
    from queen.worker.order import serve_in_order_of_arrival
    from queen.worker.run import NEVER_SERVED, run_worker

    serve_in_order_of_arrival()
    # The app is imported here, while the supervisor still makes the database ready.
    control = socket.socket(fileno=arguments.control_fd)
    try:
        factory = getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001  whatever it is, another try would meet it again
        traceback.print_exc()
        said = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        control.sendall(encode(Failed(error=f"the application {arguments.app} cannot be imported: {said}")))
        return NEVER_SERVED
    return trio.run(run_worker, control, factory)


def import_gently(*modules: str) -> None:
    """Import those, leaving the processor to whoever serves meanwhile. What cannot be imported is for others to find.

    In a thread, which alone is less urgent then: only root makes a whole process urgent again.
    """

    def work() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), GENTLE)
        with contextlib.suppress(Exception):
            for module in modules:
                importlib.import_module(module)

    thread = threading.Thread(target=work, name="imports")
    thread.start()
    thread.join()


def guard_against_orphanhood(control_fd: int) -> None:
    """End this process when its supervisor is gone, whatever else it is doing: importing, or stuck in its loop.

    A thread of its own, for that reason. The loop sees the same end of the channel and drains meanwhile.
    """

    def watch() -> None:
        poll = select.poll()
        poll.register(control_fd, select.POLLRDHUP)
        poll.poll()
        time.sleep(ORPHAN_SECONDS)
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="orphan guard", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
