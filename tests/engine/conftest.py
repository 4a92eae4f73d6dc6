"""The whole folder runs on one bucket, as on a plain PostgreSQL, and on 64, as on Citus."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(params=[int(os.environ["QUEEN_TEST_BUCKETS"])] if "QUEEN_TEST_BUCKETS" in os.environ else [1, 64])
def buckets(request: pytest.FixtureRequest) -> int:
    """The number of buckets of this test's database."""
    number: int = request.param
    return number
