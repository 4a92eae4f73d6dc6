"""Gets a key set over HTTP. Imported only where a JWKS endpoint is configured: httpx costs a worker 10 MB."""

from __future__ import annotations

import httpx
import trio

from queen.auth.keys import MAX_SET_BYTES, FetchFailed


async def fetch_key_set(url: str, timeout_seconds: float) -> bytes:
    """The body of the answer.

    Raises:
        FetchFailed: there was no whole answer 200 in time, or it was larger than a key set is.
    """
    body = bytearray()
    try:
        with trio.fail_after(timeout_seconds):
            async with httpx.AsyncClient(timeout=timeout_seconds) as client, client.stream("GET", url) as answer:
                if answer.status_code != httpx.codes.OK:
                    raise FetchFailed(f"the endpoint answered {answer.status_code}")
                async for piece in answer.aiter_bytes():  # to its end: leaving it early leaves httpx's generators open
                    if len(body) <= MAX_SET_BYTES:
                        body += piece
    except trio.TooSlowError:
        raise FetchFailed(f"the endpoint did not answer within {timeout_seconds:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise FetchFailed(type(error).__name__) from None  # its text may repeat the URL
    if len(body) > MAX_SET_BYTES:
        raise FetchFailed(f"the answer is larger than {MAX_SET_BYTES} bytes")
    return bytes(body)
