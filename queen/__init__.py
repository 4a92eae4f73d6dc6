"""queen-trio: a durable, partitioned message queue server on Trio and PostgreSQL.

Layers, top to bottom; a room imports rooms below it, never above:
``cli -> supervisor -> supervision | worker | asgi -> serving | app -> service -> routes -> streaming -> engine ->
storage -> observability | config -> model -> errors``.
"""

from queen._version import __version__

__all__ = ["__version__"]
