"""Encrypted queues as clients and operators see them: refusals in words, rotation of keys step by step."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from queen.config.settings import Secret, Settings

from .admin_kit import configure, order, pop
from .asgi_driver import Http, open_app

OLD, NEW = Secret("11" * 32), Secret("22" * 32)


@pytest.fixture
def with_keys(settings: Settings) -> Any:
    def change(current: Secret | None, *others: Secret) -> Settings:
        return msgspec.structs.replace(settings, encryption_key=current, encryption_keys=others)

    return change


async def fill(http: Http) -> None:
    await configure(http, "secret", namespace="shop", encryptionEnabled=True)
    await configure(http, "plain", namespace="shop")
    await http.push("secret", "s")
    await http.push("plain", "p")


@pytest.mark.parametrize("key", [None, NEW], ids=["no key", "another key"])
async def test_a_queue_without_its_key_is_refused_and_the_others_are_served(with_keys: Any, key: Secret | None) -> None:
    async with open_app(with_keys(OLD)) as app:
        await fill(Http(app))

    async with open_app(with_keys(key)) as app:
        http = Http(app)
        for _ in range(3):
            refused = await http.get("/api/v1/pop/queue/secret")
            assert (refused.status, refused.json["code"]) == (409, "encryption_unavailable")
            assert "QUEEN_ENCRYPTION_KEY" in refused.error
        answer = await http.get("/api/v1/pop?namespace=shop&batch=10&partitions=10")
        assert [message["data"] for message in answer.json["messages"]] == ["p"]

    async with open_app(with_keys(OLD)) as app:
        (message,) = await pop(Http(app), "secret")
        assert (message["data"], message["deliveryAttempt"], message["retryCount"]) == ("s", 1, 0)


async def test_a_pop_of_labels_under_which_nothing_can_be_read_is_refused(with_keys: Any) -> None:
    async with open_app(with_keys(OLD)) as app:
        await configure(Http(app), "secret", namespace="shop", encryptionEnabled=True)
        await Http(app).push("secret", "s")

    async with open_app(with_keys(NEW)) as app:
        answer = await Http(app).get("/api/v1/pop?namespace=shop")
        assert (answer.status, answer.json["code"]) == (409, "encryption_unavailable")


async def test_a_push_without_a_key_is_refused_and_others_are_taken(with_keys: Any) -> None:
    async with open_app(with_keys(None)) as app:
        http = Http(app)
        await configure(http, "secret", encryptionEnabled=True)
        refused = await http.post("/api/v1/push", {"items": [{"queue": "secret", "payload": 1}]})

        assert (refused.status, refused.json["code"]) == (409, "encryption_unavailable")
        await http.push("plain", 1)


async def test_keys_are_rotated_step_by_step(with_keys: Any) -> None:
    async with open_app(with_keys(OLD)) as app:
        await fill(Http(app))

    async with open_app(with_keys(NEW, OLD)) as app:
        http = Http(app)
        reencrypted, after = 0, None
        while True:
            step = await order(http, "POST", "system", "reencrypt", body={"after": after})
            assert step["missing"] == {}
            reencrypted, after = reencrypted + step["reencrypted"], step["after"]
            if after is None:
                break
        assert reencrypted == 1

    async with open_app(with_keys(NEW)) as app:
        assert [message["data"] for message in await pop(Http(app), "secret")] == ["s"]


@pytest.mark.parametrize("after", ["nonsense", "00", "93", 5])
async def test_a_step_that_goes_on_from_nowhere_is_refused(http: Http, after: Any) -> None:
    answer = await http.post("/api/v1/system/reencrypt", {"after": after})

    assert answer.status == 400


async def test_without_a_key_there_is_nothing_to_encrypt_with(with_keys: Any) -> None:
    async with open_app(with_keys(None)) as app:
        answer = await Http(app).post("/api/v1/system/reencrypt")

    assert (answer.status, answer.json["code"]) == (409, "encryption_unavailable")
