"""Every test runs on one bucket, as on a plain PostgreSQL; those marked ``buckets`` also on 64, as on Citus.

QUEEN_TEST_BUCKETS=64 runs the whole folder on 64.
"""

from __future__ import annotations

import os

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "buckets" in metafunc.fixturenames:
        several = metafunc.definition.get_closest_marker("buckets") is not None
        given = os.environ.get("QUEEN_TEST_BUCKETS")
        metafunc.parametrize("buckets", [int(given)] if given else [1, 64] if several else [1], indirect=True)


@pytest.fixture
def buckets(request: pytest.FixtureRequest) -> int:
    """The number of buckets of this test's database."""
    number: int = request.param
    return number
