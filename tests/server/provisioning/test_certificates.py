"""Certificates as others see them: openssl, and Python's TLS in a real handshake."""

import shutil
import socket
import ssl
import stat
import subprocess
import threading

import pytest

from common.errors import ConfigError
from server.provisioning.certificates import (
    days_left,
    is_issued_by,
    is_key_of,
    issue_server_certificate,
    load_certificate,
    make_authority,
    names_of,
)

NAMES = ("fl.example.org", "localhost", "127.0.0.1", "2001:db8::7")


class Issued:
    def __init__(self, folder):
        self.folder = folder
        self.ca_key, self.ca = folder / "ca.key", folder / "ca.crt"
        self.key, self.certificate = folder / "server.key", folder / "server.crt"
        make_authority(self.ca_key, self.ca, federation="chest")

    def issue(self, names=NAMES, **options):
        issue_server_certificate(
            self.key, self.certificate, authority_key=self.ca_key, authority=self.ca, names=names, **options
        )
        return self


@pytest.fixture
def issued(tmp_path):
    return Issued(tmp_path).issue()


def handshake(issued, *, name, trusted=None):
    """One real TLS connection over loopback; raises what the client's TLS raises."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(issued.certificate, issued.key)
    client_side = ssl.create_default_context(cafile=str(trusted or issued.ca))
    client_side.verify_flags |= ssl.VERIFY_X509_STRICT
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        connection.settimeout(10)
        try:
            with server_side.wrap_socket(connection, server_side=True) as secured:
                secured.sendall(b"hello")
        except OSError:
            connection.close()

    server = threading.Thread(target=serve)
    server.start()
    try:
        with (
            socket.create_connection(listener.getsockname(), timeout=10) as plain,
            client_side.wrap_socket(plain, server_hostname=name) as secured,
        ):
            return secured.recv(5)
    finally:
        server.join(timeout=20)
        listener.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_trusts_the_authority_gets_through_under_every_name(issued, name):
    assert handshake(issued, name=name) == b"hello"


def test_another_name_another_authority_and_an_expired_certificate_are_refused(issued, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError, match=r"Hostname mismatch.*evil\.example\.org"):
        handshake(issued, name="evil.example.org")
    (tmp_path / "other").mkdir()
    other = Issued(tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(issued, name="localhost", trusted=other.ca)
    assert not is_issued_by(issued.certificate, other.ca)
    issued.issue(days=-0.25)
    assert -0.3 < days_left(issued.certificate) < -0.2
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(issued, name="localhost")


def test_openssl_agrees_strictly_and_reads_what_we_read(issued):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")

    def openssl(*arguments):
        return subprocess.run(
            ["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=30, check=False
        )

    for name in ("fl.example.org", "localhost"):
        verified = openssl(
            *("verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", issued.ca),
            *("-verify_hostname", name, issued.certificate),
        )
        assert verified.returncode == 0, verified.stderr
    text = openssl("x509", "-in", issued.certificate, "-noout", "-text").stdout
    assert "NIST CURVE: P-384" in text
    assert "DNS:fl.example.org, DNS:localhost, IP Address:127.0.0.1" in text
    assert "CA:FALSE" in text
    authority = openssl("x509", "-in", issued.ca, "-noout", "-text").stdout
    assert "CA:TRUE, pathlen:0" in authority
    assert set(names_of(issued.certificate)) == set(NAMES)


def test_terms_and_modes(issued):
    assert 3650 < days_left(issued.ca) < 3654
    assert 364 < days_left(issued.certificate) <= 365
    for secret in (issued.ca_key, issued.key):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert is_key_of(issued.key, issued.certificate)
    assert not is_key_of(issued.ca_key, issued.certificate)


def test_the_certificate_ends_with_the_authority_at_the_latest(issued):
    issued.issue(days=10_000)
    ends = [load_certificate(path).not_valid_after_utc for path in (issued.certificate, issued.ca)]
    assert ends[0] == ends[1]


def test_renewal_makes_a_new_key_that_the_same_trust_accepts(issued):
    before = issued.key.read_bytes()
    issued.issue(names=("other.example.org", "localhost"))
    assert issued.key.read_bytes() != before
    assert handshake(issued, name="other.example.org") == b"hello"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(issued, name="fl.example.org")


def test_an_authority_is_never_written_over_and_its_key_must_be_its_own_and_secret(issued, tmp_path):
    before = issued.ca_key.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        make_authority(issued.ca_key, issued.ca, federation="again")
    assert issued.ca_key.read_bytes() == before
    (tmp_path / "other").mkdir()
    issued.ca.write_bytes(Issued(tmp_path / "other").ca.read_bytes())
    with pytest.raises(ConfigError, match="is not the key of"):
        issued.issue()
    issued.ca_key.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others"):
        issued.issue()
    issued.ca_key.chmod(0o600)
    issued.ca_key.write_text("no key")
    with pytest.raises(ConfigError, match="not a private key"):
        issued.issue()
    issued.ca.write_text("no certificate")
    with pytest.raises(ConfigError, match="not a certificate"):
        days_left(issued.ca)
