"""TLS on the port: who is spoken to, what a new certificate changes, and what cannot be started with."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from queen.config.settings import Settings
from queen.config.sources import load_settings
from queen.errors import StartupError
from queen.serving.tls import Certificate, open_certificate

from .support import Client, Server, open_server, request

Pair = tuple[x509.Certificate, EllipticCurvePrivateKey]
LIVEZ = request("GET", "/livez")


def issue(name: str, issuer: Pair | None = None) -> Pair:
    """A certificate for 127.0.0.1 and its key; without an issuer it is an authority that signs itself."""
    key = generate_private_key(SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("queen.test")]), critical=False)
        # what RFC 5280 asks for, and Python 3.13 too
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key((issuer[1] if issuer else key).public_key()),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=issuer is None,
                crl_sign=False,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    return builder.sign(issuer[1] if issuer else key, SHA256()), key


class Files:
    """Certificates and keys as a server and its clients are given them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.authority = issue("authority")
        self.certificate, self.key = home / "server.pem", home / "server.key"
        self.authorities = home / "authorities.pem"
        self.authorities.write_bytes(self.authority[0].public_bytes(Encoding.PEM))
        self.renew("first")

    def renew(self, name: str) -> None:
        """Another certificate of the server, in the same files."""
        self.write(issue(name, self.authority), self.certificate, self.key)

    @staticmethod
    def write(pair: Pair, certificate: Path, key: Path, encryption: KeySerializationEncryption | None = None) -> None:
        certificate.write_bytes(pair[0].public_bytes(Encoding.PEM))
        key.write_bytes(pair[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()))

    def client_context(self, name: str | None = None, authority: Pair | None = None) -> ssl.SSLContext:
        """What a client begins with, showing a certificate of that name if it has one."""
        context = ssl.create_default_context(cafile=self.authorities)
        if name is not None:
            certificate, key = self.home / f"{name}.pem", self.home / f"{name}.key"
            self.write(issue(name, authority or self.authority), certificate, key)
            context.load_cert_chain(certificate, key)
        return context


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def connect(server: Server, context: ssl.SSLContext) -> tuple[Client, str]:
    """A connection, and the name in the certificate it was shown."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    secure: Any = trio.SSLStream(stream, context, server_hostname="queen.test", https_compatible=True)
    await secure.do_handshake()
    subject = dict(entry[0] for entry in secure.getpeercert()["subject"])
    return Client(secure), subject["commonName"]


async def is_served(server: Server, context: ssl.SSLContext) -> bool:
    """Whether a client gets an answer. In TLS 1.3 one learns of its refusal with the first read."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    try:
        secure = trio.SSLStream(stream, context, server_hostname="queen.test", https_compatible=True)
        await secure.send_all(LIVEZ)
        return bytes(await secure.receive_some()).startswith(b"HTTP/1.1 200 ")
    except trio.BrokenResourceError:
        return False
    finally:
        await trio.aclose_forcefully(stream)


async def test_requests_are_answered_over_tls(settings: Settings, files: Files) -> None:
    certificate = Certificate(files.certificate, files.key, None)
    async with open_server(settings, fast=True, certificate=certificate) as server:
        client, name = await connect(server, files.client_context())
        async with client:
            pushed = await client.exchange(request("POST", "/api/v1/push", b'{"items":[{"queue":"q","payload":1}]}'))
            popped = await client.exchange(request("GET", "/api/v1/pop/queue/q"))

    assert name == "first"
    assert (pushed.status, popped.status) == (201, 200)
    assert popped.json["messages"][0]["data"] == 1


async def test_http2_is_offered(settings: Settings, files: Files) -> None:
    context = files.client_context()
    context.set_alpn_protocols(["h2", "http/1.1"])
    certificate = Certificate(files.certificate, files.key, None)
    async with open_server(settings, fast=True, certificate=certificate) as server:
        client, _ = await connect(server, context)
        async with client:
            stream: Any = client.stream
            assert stream.selected_alpn_protocol() == "h2"


async def test_who_does_not_speak_tls_gets_no_answer_and_harms_nobody(settings: Settings, files: Files) -> None:
    certificate = Certificate(files.certificate, files.key, None)
    async with open_server(settings, fast=True, certificate=certificate) as server:
        async with await server.connect() as plain:
            await plain.send(LIVEZ)
            assert await plain.stream.receive_some() in (b"", b"\x15\x03\x01\x00\x02\x02F")  # nothing, or an alert
        old = files.client_context()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        client, _ = await connect(server, old)
        async with client:
            assert (await client.exchange(LIVEZ)).status == 200


async def test_a_new_certificate_is_shown_to_new_connections_and_old_ones_go_on(
    settings: Settings, files: Files
) -> None:
    certificate = Certificate(files.certificate, files.key, None)
    async with open_server(settings, fast=True, certificate=certificate) as server:
        before, _ = await connect(server, files.client_context())
        assert (await before.exchange(LIVEZ)).status == 200
        poll = request("GET", "/api/v1/pop/queue/q?wait=true&timeout=20000")
        waiting, _ = await connect(server, files.client_context())
        await waiting.send(poll)

        files.renew("second")
        await certificate.reload()

        after, name = await connect(server, files.client_context())
        assert name == "second"
        push = request("POST", "/api/v1/push", b'{"items":[{"queue":"q","payload":1}]}')
        assert (await before.exchange(push)).status == 201
        popped = await waiting.receive()
        assert popped is not None
        assert popped.status == 200
        for client in (before, waiting, after):
            await client.aclose()


async def test_a_certificate_that_cannot_be_used_changes_nothing(settings: Settings, files: Files) -> None:
    certificate = Certificate(files.certificate, files.key, None)
    async with open_server(settings, fast=True, certificate=certificate) as server:
        files.certificate.write_text("half of a certificate")
        with structlog.testing.capture_logs() as logs:
            await certificate.reload()

        client, name = await connect(server, files.client_context())
        async with client:
            assert name == "first"
    assert [entry["log_level"] for entry in logs if entry["event"].startswith("certificate")] == ["error"]


async def test_clients_need_a_certificate_where_that_is_asked_for(settings: Settings, files: Files) -> None:
    certificate = Certificate(files.certificate, files.key, files.authorities)
    async with open_server(settings, fast=True, certificate=certificate) as server:
        assert await is_served(server, files.client_context("alice"))
        assert not await is_served(server, files.client_context())
        assert not await is_served(server, files.client_context("mallory", issue("another authority")))


async def test_an_authority_for_clients_can_be_taken_away(settings: Settings, files: Files) -> None:
    clients = files.home / "clients.pem"
    clients.write_bytes(files.authorities.read_bytes())
    certificate = Certificate(files.certificate, files.key, clients)
    async with open_server(settings, fast=True, certificate=certificate) as server:
        alice = files.client_context("alice")
        assert await is_served(server, alice)

        clients.write_bytes(issue("another authority")[0].public_bytes(Encoding.PEM))
        await certificate.reload()

        assert not await is_served(server, alice)


# -- what cannot be started with ----------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_said_in_a_sentence(files: Files) -> None:
    nowhere, text = files.home / "nowhere.pem", files.home / "text.pem"
    text.write_text("no certificate")
    files.write(issue("other"), files.home / "other.pem", files.home / "other.key")
    files.write(issue("x"), files.home / "x.pem", files.home / "locked.key", BestAvailableEncryption(b"phrase"))
    wrong = [
        ((nowhere, files.key, None), "nowhere.pem cannot be read: No such file or directory"),
        ((files.certificate, files.home, None), "cannot be read: Is a directory"),
        ((text, files.key, None), "cannot be used: they are not in PEM form"),
        ((files.certificate, files.home / "other.key", None), "cannot be used: they do not belong together"),
        ((files.home / "x.pem", files.home / "locked.key", None), "is protected by a passphrase"),
        ((files.certificate, files.key, text), "text.pem holds no certificate to check clients with"),
    ]

    for arguments, sentence in wrong:
        with pytest.raises(StartupError) as raised:
            Certificate(*arguments)
        assert sentence in raised.value.detail


@pytest.mark.parametrize(
    "environment",
    [
        {"QUEEN_TLS_CERT": "/c"},
        {"QUEEN_TLS_KEY": "/k"},
        {"QUEEN_TLS_CLIENT_CA": "/ca"},
        {"QUEEN_TLS_CLIENT_CA": "/ca", "QUEEN_TLS_CERT": "/c"},
    ],
)
def test_half_of_it_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(StartupError, match="QUEEN_TLS_"):
        load_settings(environment)


def test_without_it_the_port_speaks_in_clear() -> None:
    assert open_certificate(load_settings({})[0]) is None
