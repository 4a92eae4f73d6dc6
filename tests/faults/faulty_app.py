"""The application with faults built in, for the supervisor's flag ``--app``: what must never be in the product.

FAULTS_AT_BOOT names a file: while it exists, a worker that boots dies. SIGNALS: `HOLD` blocks the loop for 8 s, `BUSY`
keeps it busy in small steps, `LEAK` makes the process larger by 10 MB a second.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from queen.app import create_app as create_real_app
from queen.config.settings import Settings

HOLD = signal.SIGRTMIN + 5
LEAK = signal.SIGRTMIN + 6
HOLD_SECONDS = 8.0
LEAK_BYTES = 10 << 20

leaked: list[bytearray] = []


def hold_the_loop(number: int, frame: object) -> None:
    """What a driver without a time limit does: the main thread waits, and with it the loop."""
    time.sleep(HOLD_SECONDS)


def begin_to_leak(number: int, frame: object) -> None:
    def leak() -> None:
        while True:
            leaked.append(bytearray(b"x") * LEAK_BYTES)
            time.sleep(1.0)

    threading.Thread(target=leak, daemon=True).start()


def create_app(settings: Settings) -> Any:
    fault = os.environ.get("FAULTS_AT_BOOT")
    if fault and os.path.exists(fault):
        os._exit(9)
    signal.signal(HOLD, hold_the_loop)
    signal.signal(LEAK, begin_to_leak)
    return create_real_app(settings)
