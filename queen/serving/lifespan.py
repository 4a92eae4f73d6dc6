"""The lifespan of an application, from the side of its server: one task that opens it, and closes it when told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog
import trio

if TYPE_CHECKING:
    from hypercorn.typing import ASGIFramework

log = structlog.get_logger("queen.http")


class LifespanFailed(Exception):
    """The application said that it could not start, or not stop; ``args[0]`` is its sentence."""


class Lifespan:
    """Run ``run`` in a task, ``open`` and ``close`` it from another.

    One that ends in an error without a word is let go: what it does not open it may not need. Who serves it sees the
    error in the application's own task.

    Args:
        state: what the application wants its requests to know.
    """

    def __init__(self, app: ASGIFramework, state: dict[str, Any]) -> None:
        self._app = app
        self._state = state
        self._told, self._hears = trio.open_memory_channel[Any](2)  # it is told two things in all
        self._opened = trio.Event()
        self._closed = trio.Event()

    async def run(self) -> None:
        """Until the application is closed.

        Raises:
            LifespanFailed: it said so.
        """
        scope: Any = {"type": "lifespan", "asgi": {"spec_version": "2.0", "version": "3.0"}, "state": self._state}
        try:
            await self._app(scope, self._hears.receive, self._hear)
        except LifespanFailed:
            raise
        except (Exception, BaseExceptionGroup) as error:  # whatever it is, it is the application's own
            if isinstance(error, BaseExceptionGroup):
                ours = error.subgroup((LifespanFailed, trio.Cancelled))
                if ours is not None:
                    raise ours from None
            log.warning("the lifespan of the application ended in an error", exc_info=error)
        finally:
            self._opened.set()
            self._closed.set()

    async def open(self, timeout_seconds: float) -> None:
        """Wait until the application is ready. Raises TooSlowError."""
        self._told.send_nowait({"type": "lifespan.startup"})
        with trio.fail_after(timeout_seconds):
            await self._opened.wait()

    async def close(self, timeout_seconds: float) -> None:
        """Have the application close what it opened. Raises TooSlowError."""
        self._told.send_nowait({"type": "lifespan.shutdown"})
        with trio.fail_after(timeout_seconds):
            await self._closed.wait()

    async def _hear(self, message: Any) -> None:
        match message["type"]:
            case "lifespan.startup.complete":
                self._opened.set()
            case "lifespan.shutdown.complete":
                self._closed.set()
            case "lifespan.startup.failed" | "lifespan.shutdown.failed":
                raise LifespanFailed(message.get("message", ""))
            case unknown:
                raise ValueError(f"{unknown} is no message of a lifespan")
