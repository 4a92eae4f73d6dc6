"""How much a list gives where the operator has said so: API_DEFAULT_LIMIT, API_MAX_LIMIT, API_DEFAULT_OFFSET."""

from __future__ import annotations

from queen.config.settings import PageSettings
from queen.routes import Route
from queen.routes.call import Call
from queen.routes.wire.query import parameters_of


def limit_page(route: Route, call: Call, pages: PageSettings) -> None:
    """Put the operator's bounds into what a request for a list asks for; what a route has by itself still holds.

    What cannot be read means its default, here as everywhere.
    """
    if route.query is None or route.method != "GET":
        return
    parameters, query = parameters_of(route.query), dict(call.query)
    if (limit := parameters.get("limit")) is not None:
        asked = limit.read(query.get("limit", ""))
        if asked is None:
            asked = pages.default_limit
        if pages.max_limit is not None:
            asked = min(pages.max_limit, limit.default if asked is None else asked)
        if asked is not None:
            query["limit"] = str(asked)
    offset = parameters.get("offset")
    if offset is not None and pages.default_offset and offset.read(query.get("offset", "")) is None:
        query["offset"] = str(pages.default_offset)
    call.query = query
