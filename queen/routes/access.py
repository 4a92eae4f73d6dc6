"""Between a request line and its handler: which route it is, and whether its caller may. All serving passes here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from queen.auth.access import Access
from queen.auth.levels import Level
from queen.errors import QueenError
from queen.routes import Route
from queen.routes.table import find_route

UNLISTED: Final = Level.READ_WRITE
"""What a path asks for that is no route: who may not come in is not told what there is."""


async def find_admitted(
    access: Access | None, method: str, path: str, authorization: str
) -> tuple[Route, Mapping[str, str], str | None]:
    """The route, what stands for the names in its path, still encoded, and the subject of the caller's token.

    Args:
        access: the rules of the server; None: there are none, and no subject either.
        path: as it was sent, percent-encoded.
        authorization: the header, ``""`` when there is none.

    Raises:
        RouteNotFound, MethodNotAllowed: as ``find_route``, to those who may know.
        Unauthenticated, Forbidden, KeysUnavailable: the caller may not.
    """
    try:
        route, names = find_route(method, path)
    except QueenError:
        if access is not None:
            await access.admit(path, authorization, UNLISTED)
        raise
    if access is None:
        return route, names, None
    return route, names, await access.admit(path, authorization, route.level)
