"""``hypercorn -k trio queen.asgi:app``: the server as an ASGI application, configured by the environment.

To mount it in an application of your own, or to give it other settings, use ``queen.app.create_app``. There is no
embedded PostgreSQL and no supervisor here; ``queen-trio run`` has both.
"""

from __future__ import annotations

import logging

import structlog

from queen.app import create_app
from queen.config.sources import NO_KEY, SERIOUS, load_settings
from queen.observability import logs

settings, notes = load_settings()
if not structlog.is_configured():
    logs.configure(settings.log_level, logs.resolve_format(settings.log_format), timestamp=settings.log_timestamp)
    logging.getLogger("hypercorn.error").propagate = False  # its command writes these lines itself
for note in notes:
    log = structlog.get_logger("queen.asgi")
    (log.error if note in SERIOUS else log.warning)("setting not honoured", reason=note)
if settings.encryption_key is None:
    structlog.get_logger("queen.asgi").warning(NO_KEY)

app = create_app(settings)
