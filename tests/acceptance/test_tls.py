"""TLS with real processes: every worker speaks it, and SIGHUP gives all of them the new certificate."""

from __future__ import annotations

import datetime
import http.client
import signal
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from .conftest import StartServer
from .support import NO_DATABASE, TINY, Server, eventually


def write_certificate(name: str, certificate: Path, key_file: Path) -> bytes:
    """A certificate that signs itself, and its key. Returns it as a client is shown it."""
    key = generate_private_key(SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(key, SHA256())
    )
    certificate.write_bytes(made.public_bytes(Encoding.PEM))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return made.public_bytes(Encoding.DER)


def connect(server: Server) -> tuple[http.client.HTTPSConnection, bytes]:
    """A connection, and the certificate it was shown."""
    trusting = ssl.create_default_context()
    trusting.check_hostname = False
    trusting.verify_mode = ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=5, context=trusting)
    connection.connect()
    shown = connection.sock.getpeercert(binary_form=True)
    assert shown is not None
    return connection, shown


def ask(connection: http.client.HTTPSConnection) -> str:
    """Who answers: the process id of a worker."""
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert answer.status == 200
    return answer.read().decode()


def test_a_hang_up_brings_a_new_certificate_and_drops_no_connection(start_server: StartServer, scratch: Path) -> None:
    certificate, key = scratch / "server.pem", scratch / "server.key"
    first = write_certificate("first", certificate, key)
    server = start_server(
        *TINY,
        *NO_DATABASE,
        workers=2,
        environment={"QUEEN_TLS_CERT": str(certificate), "QUEEN_TLS_KEY": str(key)},
    ).wait_ready()
    assert "listening on https://" in server.output
    kept = [connect(server) for _ in range(8)]
    before = [ask(connection) for connection, _ in kept]
    assert {shown for _, shown in kept} == {first}

    second = write_certificate("second", certificate, key)
    server.process.send_signal(signal.SIGHUP)
    eventually(5, lambda: server.log.count("certificate reloaded") == 2)

    for _ in range(8):
        connection, shown = connect(server)
        assert shown == second
        ask(connection)
        connection.close()
    assert [ask(connection) for connection, _ in kept] == before
    eventually(20, lambda: '"reloaded"' in server.log)
    for connection, _ in kept:
        connection.close()

    certificate.write_text("nothing of use")
    server.process.send_signal(signal.SIGHUP)
    eventually(5, lambda: server.log.count("certificate not reloaded, the old one stays") >= 2)
    eventually(20, lambda: "reload given up, the old workers stay" in server.log)
    connection, shown = connect(server)
    assert shown == second
    connection.close()
    assert server.stop() == 0


def test_a_certificate_that_cannot_be_used_is_said_at_the_start(start_server: StartServer, scratch: Path) -> None:
    server = start_server(
        *TINY,
        *NO_DATABASE,
        environment={"QUEEN_TLS_CERT": str(scratch / "nowhere"), "QUEEN_TLS_KEY": str(scratch / "nowhere")},
    )

    assert server.wait_exit() == 3
    assert server.log.splitlines()[-1] == (
        f"queen-trio: the TLS file {scratch}/nowhere cannot be read: No such file or directory"
    )
