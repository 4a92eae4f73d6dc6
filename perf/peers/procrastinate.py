"""procrastinate: one row a job and one an event of it; deferring in batches, fetching one job at a time as it does.

Its worker fetches, runs and finishes jobs one by one; so do these calls of its own job manager, without the worker.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import procrastinate
from procrastinate.jobs import Status

QUEUE = "peers"


class Procrastinate:
    def __init__(self, app: procrastinate.App) -> None:
        self._app = app
        self._worker: int | None = None

    async def push(self, payloads: Sequence[str]) -> None:
        task = self._app.configure_task("peers.nothing", queue=QUEUE)
        await task.batch_defer_async(*({"payload": payload} for payload in payloads))

    async def take(self, most: int) -> list[str]:
        manager: Any = self._app.job_manager
        if self._worker is None:
            self._worker = await manager.register_worker()
        taken: list[str] = []
        while len(taken) < most and (job := await manager.fetch_job(queues=[QUEUE], worker_id=self._worker)):
            await manager.finish_job(job, status=Status.SUCCEEDED, delete_job=True)
            taken.append(job.task_kwargs["payload"])
        return taken

    async def aclose(self) -> None:
        await self._app.close_async()


async def prepare(url: str) -> None:
    app = await _open(url)
    await app.schema_manager.apply_schema_async()
    await app.close_async()


async def connect(url: str) -> Procrastinate:
    return Procrastinate(await _open(url))


async def _open(url: str) -> procrastinate.App:
    connector = procrastinate.PsycopgConnector(conninfo=url, min_size=1, max_size=1, json_dumps=json.dumps)
    app = procrastinate.App(connector=connector)
    await app.open_async()
    return app
