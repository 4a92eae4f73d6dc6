"""GET /openapi.json: the whole API as OpenAPI 3.1, made of the route table and of the types that routes read and write.

What is said here about a request is what decodes it, and what is said about an answer is what mypy checks its writer
against. Beside that stand the answers that every route may give: those of errors.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NotRequired, TypedDict

import msgspec
import trio

from queen._version import __version__
from queen.auth.levels import Level
from queen.errors import (
    Draining,
    Forbidden,
    HeadTooLarge,
    InvalidRequest,
    KeysUnavailable,
    OutcomeUnknown,
    Overloaded,
    QueenError,
    RequestStalled,
    RequestTooLarge,
    StorageUnavailable,
    Unauthenticated,
    UnsupportedCoding,
)
from queen.routes.call import JSON, Answer, Call, Context
from queen.routes.wire.body import NO_NUL, name_schema
from queen.routes.wire.metrics import PROMETHEUS, PrometheusText

if TYPE_CHECKING:
    from queen.routes import Route

Object = dict[str, Any]


class Document(TypedDict):
    """A description of an API in the form of OpenAPI 3.1."""

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]


class ProblemAnswer(TypedDict):
    """An error. ``error`` is for people, ``code`` to branch on; ``results`` where the request had several items."""

    error: str
    code: NotRequired[str]
    type: NotRequired[str]
    title: NotRequired[str]
    status: NotRequired[int]
    detail: NotRequired[str]
    instance: NotRequired[str]
    results: NotRequired[list[dict[str, Any]]]


ANYWHERE: Final = (
    InvalidRequest,
    RequestStalled,
    HeadTooLarge,
    KeysUnavailable,
    UnsupportedCoding,
    StorageUnavailable,
    OutcomeUnknown,
    Overloaded,
    Draining,
)
"""What any route may answer with, and beside these ``QueenError`` itself: a bug of ours."""

GUARDED: Final = (Unauthenticated, Forbidden)
WITH_BODY: Final = (RequestTooLarge,)

DESCRIPTION: Final = """\
A durable, partitioned message queue over HTTP.

A query parameter that cannot be read means its default, unless its route says otherwise; unknown parameters and unknown
members are ignored. Members that are null are as good as absent. OPTIONS answers 204 on any path, and every answer
allows any origin (CORS). Every answer has an X-Request-Id: the one that was sent with the request, or a new one."""

_REFERENCE: Final = "#/components/schemas/{name}"

PATH_NAMES: Final[Mapping[str, Object]] = {
    "queue": name_schema(),
    "partition": name_schema(),
    "group": name_schema(),
    "name": name_schema(),
    "partition_id": {"type": "string", "description": "The id of a partition, a UUID."},
    "transaction_id": {"type": "string", "description": "The transaction id of a message."},
    "lease_id": {"type": "string", "description": "The id of a lease, a UUID."},
}
"""What stands for the names in paths. An id that is none belongs to nothing that exists."""


async def show_openapi(context: Context, call: Call) -> Answer:
    return Answer(200, await trio.to_thread.run_sync(document))  # the first time takes a tenth of a second


@cache
def document() -> bytes:
    """The description of this server, made once."""
    from queen.routes import ROUTES  # which has this module in it

    return msgspec.json.encode(describe(ROUTES))


def describe(routes: Iterable[Route]) -> Object:
    """The description of some routes."""
    routes = list(routes)
    schema_of, schemas = _schemas(routes)
    paths: dict[str, Object] = {}
    responses: dict[str, Object] = {}
    for route in routes:
        operation = _operation(route, schema_of, responses)
        path = paths.setdefault(route.path.replace("<", "{").replace(">", "}"), {})
        path[route.method.lower()] = operation
        if route.probe:
            path["head"] = _head_of(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "queen-trio", "version": __version__, "description": DESCRIPTION},
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in sorted({_tag(route) for route in routes})],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "responses": dict(sorted(responses.items())),
            "headers": {
                "RequestId": {"description": "The id of the request, in logs too.", "schema": {"type": "string"}},
                "RetryAfter": {"description": "Seconds to wait before a repeat.", "schema": {"type": "integer"}},
            },
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "If the server authenticates; otherwise everybody may do everything.",
                }
            },
        },
    }


def _schemas(routes: Iterable[Route]) -> tuple[Callable[[Any], Object], dict[str, Object]]:
    """How to refer to a type, and the schemas that are referred to."""
    types: list[Any] = [ProblemAnswer]
    for route in routes:
        types += [kind for kind in (route.body, *route.answers.values()) if kind is not None]
    found, schemas = msgspec.json.schema_components(types, schema_hook=_schema_hook, ref_template=_REFERENCE)
    by_type = {_key(kind): schema for kind, schema in zip(types, found, strict=True)}
    return lambda kind: by_type[_key(kind)], schemas


def _key(kind: Any) -> str:
    return f"{getattr(kind, '__module__', '')}.{kind!r}"


def _schema_hook(kind: type) -> Object:
    if kind is msgspec.Raw:
        return {}
    if kind is PrometheusText:
        return {"type": "string"}
    raise NotImplementedError(f"no schema for {kind}")


def _tag(route: Route) -> str:
    return route.handler.__module__.rpartition(".")[2]


def _operation(route: Route, schema_of: Callable[[Any], Object], responses: dict[str, Object]) -> Object:
    operation: Object = {
        "operationId": operation_id(route),
        "tags": [_tag(route)],
        "summary": route.summary,
        "description": LEVELS[route.level],
    }
    names = [part[1:-1] for part in route.path.split("/") if part.startswith("<")]
    parameters: list[Object] = [
        {"name": name, "in": "path", "required": True, "schema": PATH_NAMES[name]} for name in names
    ]
    if route.query is not None:
        parameters += _parameters(msgspec.json.schema(route.query)["$defs"][route.query.__name__])
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {
            "required": not route.body_optional,
            "content": {JSON: {"schema": schema_of(route.body)}},
        }
    if route.level > Level.OPEN:
        operation["security"] = [{"token": []}, {}]
    operation["responses"] = _responses(route, schema_of, responses)
    return operation


LEVELS: Final = {
    Level.OPEN: "Needs no token.",
    Level.READ_ONLY: "Where the server authenticates, any role may.",
    Level.READ_WRITE: "Where the server authenticates, the roles read-write and admin may.",
    Level.ADMIN: "Where the server authenticates, the role admin may.",
}


def operation_id(route: Route) -> str:
    """A name for code that is generated: the method and the words of the path."""
    words = [route.method.lower(), *route.path.strip("/").removeprefix("api/v1/").split("/")]
    return "_".join(words).replace("<", "").replace(">", "").replace("-", "_").replace(".", "_")


def _parameters(schema: Object) -> list[Object]:
    """The query parameters that a struct declares. None is how a field says that a parameter may be absent."""
    required = set(schema.get("required", ()))
    parameters = []
    for name, declared in schema["properties"].items():
        said = dict(declared)
        choices = said.pop("anyOf", None)
        if choices is not None:
            said = next(choice for choice in choices if choice != {"type": "null"}) | said
        if "enum" in said:
            said |= {"type": "string", "enum": [value for value in said["enum"] if value is not None]}
        if said.get("type") == "string" and not {"enum", "format"} & set(said):
            said = NO_NUL | said
        if said.get("default", 0) is None:
            del said["default"]
        description = said.pop("description", None)
        parameter: Object = {"name": name, "in": "query", "required": name in required, "schema": said}
        if description is not None:
            parameter["description"] = description
        parameters.append(parameter)
    return parameters


def _responses(route: Route, schema_of: Callable[[Any], Object], responses: dict[str, Object]) -> Object:
    errors: dict[int, list[type[QueenError]]] = {}
    own = (*route.refusals, *(GUARDED if route.level > Level.OPEN else ()), *(WITH_BODY if route.body else ()))
    for error in (*own, *ANYWHERE, QueenError):
        errors.setdefault(error.status, []).append(error)
    said: dict[int, Object] = {}
    for status, kind in route.answers.items():
        answer: Object = {"description": _outcome(status), "headers": _HEADERS}
        if kind is not None:
            content_type = PROMETHEUS.partition(";")[0] if kind is PrometheusText else JSON
            schema = schema_of(kind)
            if status in errors:
                schema = {"anyOf": [schema, schema_of(ProblemAnswer)]}
            answer["content"] = {content_type: {"schema": schema}}
        said[status] = answer
    for status, kinds in errors.items():
        if status not in said:
            name = "_or_".join(sorted({kind.code for kind in kinds}))
            responses.setdefault(name, _refusal(kinds, schema_of(ProblemAnswer)))
            said[status] = {"$ref": f"#/components/responses/{name}"}
    return {str(status): said[status] for status in sorted(said)}


def _outcome(status: int) -> str:
    if status == HTTPStatus.NO_CONTENT:
        return "There is nothing."
    return "Done." if status < HTTPStatus.BAD_REQUEST else "Not so: the answer says more."


_HEADERS: Final[Object] = {"X-Request-Id": {"$ref": "#/components/headers/RequestId"}}


def _refusal(kinds: Iterable[type[QueenError]], schema: Object) -> Object:
    kinds = sorted(kinds, key=lambda kind: kind.code)
    headers = dict(_HEADERS)
    if any(kind.retry_after_seconds is not None for kind in kinds):
        headers["Retry-After"] = {"$ref": "#/components/headers/RetryAfter"}
    sentences = [f"`{kind.code}`: {_meaning(kind)}" for kind in kinds]
    return {"description": "\n\n".join(sentences), "headers": headers, "content": {JSON: {"schema": schema}}}


def _meaning(kind: type[QueenError]) -> str:
    if kind is QueenError:
        return "A bug of the server's; its log has it under the id of the request."
    return " ".join((kind.__doc__ or "").partition("\n\n")[0].split())


def _head_of(operation: Object) -> Object:
    """The same without a body."""
    responses = {
        status: {name: value for name, value in answer.items() if name != "content"} | {"description": "As for GET."}
        if "$ref" not in answer
        else answer
        for status, answer in operation["responses"].items()
    }
    return {**operation, "operationId": operation["operationId"].replace("get_", "head_", 1), "responses": responses}
