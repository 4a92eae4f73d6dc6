"""Which route a request line means. Looked up by method and by the path as it was sent, percent-encoded.

A dictionary answers for the paths that have no names in them, which are the busy ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from queen.errors import MethodNotAllowed, RouteNotFound
from queen.routes import PAGES, ROUTES, Route
from queen.routes.webapp import is_page

Methods = dict[str, Route]

NO_NAMES: Final[Mapping[str, str]] = {}


class RouteTable:
    """Routes by path. Of two patterns that fit, the one that is literal at the earlier place is asked first.

    What is no route and no part of the API is a page of the dashboard.
    """

    def __init__(self, routes: Iterable[Route]) -> None:
        self._plain: dict[str, Methods] = {}
        patterns: dict[tuple[str, ...], Methods] = {}
        for route in routes:
            parts = tuple(route.path.split("/"))
            methods = patterns.setdefault(parts, {}) if "<" in route.path else self._plain.setdefault(route.path, {})
            methods[route.method] = route
            if route.probe:
                methods["HEAD"] = route
        ordered = sorted(patterns, key=lambda parts: [part.startswith("<") for part in parts])
        self._patterns: dict[int, list[tuple[tuple[str, ...], Methods]]] = {}  # by the number of parts
        for parts in ordered:
            self._patterns.setdefault(len(parts), []).append((parts, patterns[parts]))

    def find(self, method: str, path: str) -> tuple[Route, Mapping[str, str]]:
        """The route, and what stands for the names in its path, still encoded.

        Raises:
            RouteNotFound: no route has such a path.
            MethodNotAllowed: one has, with other methods.
        """
        methods = self._plain.get(path)
        if methods is not None and (route := methods.get(method)) is not None:
            return route, NO_NAMES
        allowed = set(methods or ())
        parts = path.split("/")
        for pattern, methods in self._patterns.get(len(parts), ()):
            names = _fit(pattern, parts)
            if names is not None:
                if (route := methods.get(method)) is not None:
                    return route, names
                allowed.update(methods)
        if allowed:
            raise MethodNotAllowed(sorted(allowed))
        if path.startswith("//"):  # a client put a base URL that ends in a slash before it; Quart forgives that too
            return self.find(method, "/" + path.lstrip("/"))
        if is_page(method, path):
            return PAGES, {"path": path}
        raise RouteNotFound("no_such_route" if path.startswith("/api/v1/") else "Not Found")


def _fit(pattern: tuple[str, ...], parts: list[str]) -> dict[str, str] | None:
    names: dict[str, str] = {}
    for wanted, part in zip(pattern, parts, strict=True):
        if wanted.startswith("<"):
            names[wanted[1:-1]] = part
        elif wanted != part:
            return None
    return names


find_route = RouteTable(ROUTES).find
