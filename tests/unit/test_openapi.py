"""The description of the API says what the route table says, both ways, and refers to nothing that it lacks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import pytest

from queen.routes import ROUTES, Route
from queen.routes.openapi import PATH_NAMES, document, operation_id
from queen.routes.wire.query import parameters_of

DOCUMENT: Final[dict[str, Any]] = json.loads(document())


def operation_of(route: Route) -> Any:
    path = route.path.replace("<", "{").replace(">", "}")
    return DOCUMENT["paths"][path][route.method.lower()]


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for inner in part.values():
            yield from references(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from references(inner)


def test_every_route_is_described_and_nothing_else() -> None:
    described = {
        (method.upper(), path.replace("{", "<").replace("}", ">"))
        for path, operations in DOCUMENT["paths"].items()
        for method in operations
    }

    served = {(route.method, route.path) for route in ROUTES}
    assert described == served | {("HEAD", route.path) for route in ROUTES if route.probe}


def test_every_reference_leads_somewhere_and_every_schema_is_used() -> None:
    used = set(references(DOCUMENT))

    kinds = ("schemas", "responses", "headers")
    assert used == {f"#/components/{kind}/{name}" for kind in kinds for name in DOCUMENT["components"][kind]}


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [operation["operationId"] for operations in DOCUMENT["paths"].values() for operation in operations.values()]

    assert len(set(names)) == len(names)


@pytest.mark.parametrize("route", ROUTES, ids=operation_id)
def test_the_parameters_of_a_route_are_those_that_it_reads(route: Route) -> None:
    parameters = operation_of(route).get("parameters", [])

    assert [each["name"] for each in parameters if each["in"] == "path"] == [
        part[1:-1] for part in route.path.split("/") if part.startswith("<")
    ]
    query = {each["name"]: each for each in parameters if each["in"] == "query"}
    declared = {} if route.query is None else parameters_of(route.query)
    assert set(query) == set(declared)
    assert all(query[name]["required"] == declared[name].required for name in declared)
    assert all(isinstance(each["schema"].get("type"), str) for each in query.values())


@pytest.mark.parametrize("route", ROUTES, ids=operation_id)
def test_a_route_is_described_with_all_its_answers(route: Route) -> None:
    responses = operation_of(route)["responses"]

    expected = set(route.answers) | {error.status for error in route.refusals} | {400, 408, 431, 500, 501, 503}
    expected |= {401, 403} if route.level else set()
    assert {int(status) for status in responses} == expected | ({413} if route.body else set())
    assert route.answers or route.refusals
    assert route.summary


def test_every_name_in_a_path_has_a_schema() -> None:
    names = {part[1:-1] for route in ROUTES for part in route.path.split("/") if part.startswith("<")}

    assert names == set(PATH_NAMES)


def test_a_body_that_may_be_absent_is_not_required() -> None:
    bodies = {route.path: operation_of(route)["requestBody"]["required"] for route in ROUTES if route.body is not None}

    assert bodies["/api/v1/push"] is True
    assert bodies["/api/v1/lease/<lease_id>/extend"] is False


def test_bounds_and_defaults_are_those_that_are_kept() -> None:
    query = {each["name"]: each["schema"] for each in DOCUMENT["paths"]["/api/v1/dlq"]["get"]["parameters"]}

    assert query["limit"] == {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}
    assert query["from"] == {"type": "string", "format": "date-time"}
