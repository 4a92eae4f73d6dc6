"""What the tiny application of every contender does on top of answering: it can be made to hang, leak, or not boot.

Standard library only: it is imported under interpreters that have nothing of ours.

CONTEST names a directory: `boots` in it grows by a byte with each import; while `crash` is there an import ends the
process, while `bad` is there it raises. HOLD blocks the main thread, LEAK makes the process larger by 10 MB a second.
"""

from __future__ import annotations

import os
import signal
import threading
import time

HOLD = signal.SIGRTMIN + 5
LEAK = signal.SIGRTMIN + 6
HOLD_SECONDS = 60.0
LEAK_BYTES = 10 << 20

directory = os.environ["CONTEST"]
leaked: list[bytes] = []

with open(os.path.join(directory, "boots"), "ab") as boots:
    boots.write(b".")
if os.path.exists(os.path.join(directory, "crash")):
    os._exit(9)
if os.path.exists(os.path.join(directory, "bad")):
    raise SyntaxError("the new code is broken")


def hold_the_loop(number: int, frame: object) -> None:
    time.sleep(HOLD_SECONDS)


def begin_to_leak(number: int, frame: object) -> None:
    def leak() -> None:
        while True:
            leaked.append(os.urandom(1024) * (LEAK_BYTES // 1024))
            time.sleep(1.0)

    threading.Thread(target=leak, daemon=True).start()


signal.signal(HOLD, hold_the_loop)
signal.signal(LEAK, begin_to_leak)
