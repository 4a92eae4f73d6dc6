"""Both servers keep what /openapi.json says: schemathesis makes requests of it, good ones and bad ones, and judges.

Not judged, and why:

- ``negative_data_rejection``, beyond the routes of STRICT: the contract wants leniency. A query parameter that cannot
  be read means its default, an acknowledgement whose status is no text ``completed``, a label that is no text none.
- ``ignored_auth``: these servers do not authenticate. tests/http/test_auth.py asks every route with every role.
- Of a pop by labels and of a seek, that they want one of several parameters, and of a re-encryption, that it goes on
  from where one was: OpenAPI has no words for it.
- 501 ``not_supported`` is the documented answer of what this server has no use for, and no server error.
"""

from __future__ import annotations

import json
import os
from typing import Any, Final

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import ignored_auth, negative_data_rejection, positive_data_acceptance

from queen.routes.openapi import document

from .conftest import Asked

EXAMPLES: Final = int(os.environ.get("QUEEN_CONTRACT_EXAMPLES", "25"))

STRICT: Final = {
    ("POST", "/api/v1/lease/{lease_id}/extend"),
    ("POST", "/api/v1/consumer-groups/{group}/subscription"),
    ("POST", "/api/v1/system/maintenance/pop"),
    ("POST", "/streams/v1/queries"),
}
"""Where the wire is as strict as its description."""

INDESCRIBABLE: Final = (
    "namespace or task is required",
    "Must specify either 'toEnd': true or 'timestamp'",
    "after must be what the step before has answered",
)

load_all_checks()
schema = schemathesis.openapi.from_dict(json.loads(document()))


@schema.hook
def map_path_parameters(context: Any, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Half of the time, name something that exists."""
    for name, value in (parameters or {}).items():
        if isinstance(value, str) and len(value) % 2 == 0 and name in known:
            parameters[name] = known[name]  # type: ignore[index]
    return parameters


@schema.hook
def map_body(context: Any, body: Any) -> Any:
    """What is an integer to JSON Schema is one to the server only when it is written as one."""
    return whole(body)


def whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: whole(inner) for name, inner in value.items()}
    return [whole(inner) for inner in value] if isinstance(value, list) else value


known: dict[str, str] = {
    "queue": "orders",
    "partition": "eu",
    "group": "billing",
    "name": "slow",
    "transaction_id": "t",
}


@pytest.fixture(params=["application", "server"])
def asked(request: pytest.FixtureRequest) -> Asked:
    """A server with a queue, messages in it, a lease, a dead letter and a trace."""
    asked: Asked = request.getfixturevalue(request.param)
    for switch in ("", "/pop"):
        asked.call("POST", f"/api/v1/system/maintenance{switch}", {"enabled": False})
    items = [
        {"queue": "orders", "partition": "eu", "payload": {"n": n}, "transactionId": f"t{n or ''}"} for n in range(5)
    ]
    pushed = asked.call("POST", "/api/v1/push", {"items": items})
    assert pushed.status_code == 201, pushed.text
    known["partition_id"] = partition_id = pushed.json()[0]["partitionId"]
    asked.call("POST", f"/api/v1/messages/{partition_id}/t4/dlq")
    popped = asked.call("GET", "/api/v1/pop/queue/orders?consumerGroup=billing&batch=2")
    if popped.status_code == 200:
        known["lease_id"] = popped.json()["leaseId"]
    trace = {"transactionId": "t", "partitionId": partition_id, "data": {"took": 1}, "traceNames": ["slow"]}
    asked.call("POST", "/api/v1/traces", trace)
    return asked


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_what_is_described_is_what_is_served(case: schemathesis.Case[Any], asked: Asked) -> None:
    operation = (case.method.upper(), case.operation.path)
    response = case.call(base_url=asked.url, session=asked.session)

    excluded: list[Any] = [ignored_auth]
    if operation not in STRICT:
        excluded.append(negative_data_rejection)
    if response.status_code == 501 and response.json()["code"] == "not_supported":
        excluded.append(not_a_server_error)
    if response.status_code == 400 and response.json()["error"] in INDESCRIBABLE:
        excluded.append(positive_data_acceptance)
    checks: list[Any] = [check for check in CHECKS.get_all() if check not in excluded]
    case.validate_response(response, checks=checks)
