"""The certificate of the API port: read at the start, and again when told. Who sends the signal is not known here."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

import structlog
import trio

from queen.config.settings import Settings
from queen.errors import StartupError

PROTOCOLS: Final = ["h2", "http/1.1"]

log = structlog.get_logger("queen.tls")


class Certificate:
    """``context`` is what a new connection is begun with; those that are begun keep the one they have.

    Each reading makes a context of its own, so that authorities for clients can also be taken away.

    Raises:
        StartupError: the files are not what they should be.
    """

    def __init__(self, certificate: Path, key: Path, client_authorities: Path | None) -> None:
        self._files = (certificate, key, client_authorities)
        self.context = read_context(*self._files)

    async def reload(self) -> None:
        """Read the files again. What cannot be used is said in the log and changes nothing."""
        try:
            self.context = await trio.to_thread.run_sync(read_context, *self._files)
        except StartupError as error:
            log.error("certificate not reloaded, the old one stays", error=error.detail)
        else:
            log.info("certificate reloaded", certificate=str(self._files[0]))


def open_certificate(settings: Settings) -> Certificate | None:
    """What the settings ask for; None: the port speaks in clear. Raises StartupError."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return Certificate(settings.tls_cert, settings.tls_key, settings.tls_client_ca)


def read_context(certificate: Path, key: Path, client_authorities: Path | None) -> ssl.SSLContext:
    """What the files say. May block.

    Args:
        client_authorities: who must have signed the certificate that a client then has to show.

    Raises:
        StartupError: with one sentence.
    """

    def refuse_passphrase() -> str:  # or OpenSSL would ask for it on the terminal
        raise StartupError(f"the TLS key {key} is protected by a passphrase: give it without one")

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(PROTOCOLS)
    for path in (certificate, key):
        _check_readable(path)
    try:
        context.load_cert_chain(certificate, key, refuse_passphrase)
    except ssl.SSLError as error:
        reason = "they do not belong together" if error.reason == "KEY_VALUES_MISMATCH" else "they are not in PEM form"
        raise StartupError(f"the TLS certificate {certificate} and key {key} cannot be used: {reason}") from None
    if client_authorities is not None:
        _check_readable(client_authorities)
        try:
            context.load_verify_locations(client_authorities)
        except ssl.SSLError:
            raise StartupError(f"{client_authorities} holds no certificate to check clients with") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise StartupError(f"the TLS file {path} cannot be read: {error.strerror}") from None
