"""Other durable queues doing the same work on the same machine in the same run; `nox -s peers`.

    __main__.py     starts each server, runs the load against it, prints the table, writes JSON
    load.py         the process that pushes, takes and acknowledges, over one client of a peer or of queen-trio
    servers.py      how RabbitMQ and NATS are started; the others share the PostgreSQL of a queen-trio server
    queen_trio.py, pgmq.py, pgqueuer.py, procrastinate.py, rabbitmq.py, nats.py     one client each

A client is a module with ``PUSHES`` (batch sizes that it can push as one), ``async prepare(url)`` and ``async
connect(url)``, which returns what :class:`perf.peers.load.Client` says.
"""
