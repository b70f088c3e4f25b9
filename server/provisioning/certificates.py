"""The federation's own certificate authority and the server's certificate (X.509, NIST P-384).

Hospitals trust this authority and no other, so no public one is asked and none can be tricked.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError
from common.files import write_bytes_atomically
from common.node_keys import refuse_readable_by_others, write_secret

AUTHORITY_DAYS, SERVER_DAYS = 3653, 365
_BACKDATED = datetime.timedelta(days=1)
"""Certificates begin a day ago: a hospital's clock that is a little behind must not refuse them."""


def make_authority(key_file: Path, certificate_file: Path, *, federation: str) -> None:
    """Make the authority, valid for ten years. Raises ConfigError rather than write over a key."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("certificate authority", federation)
    now = datetime.datetime.now(datetime.UTC)
    builder = _builder(name, name, key, now - _BACKDATED, now + datetime.timedelta(days=AUTHORITY_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    certificate = builder.sign(key, hashes.SHA384())
    write_secret(key_file, _pem_of(key))
    write_bytes_atomically(certificate_file, certificate.public_bytes(serialization.Encoding.PEM))


def issue_server_certificate(
    key_file: Path,
    certificate_file: Path,
    *,
    authority_key: Path,
    authority: Path,
    names: Sequence[str],
    days: float = SERVER_DAYS,
) -> None:
    """Make a new key and certificate for the server under `names` (DNS names or IP addresses).

    Both replace older ones; the certificate never outlives the authority. Raises ConfigError when the
    authority's key is missing, readable by others, or not that of its certificate.
    """
    signer, issuer = load_tls_key(authority_key), load_certificate(authority)
    if issuer.public_key() != signer.public_key():
        raise ConfigError(
            f"{authority_key} is not the key of {authority}", fix="restore both from the same backup"
        )
    now = datetime.datetime.now(datetime.UTC)
    ends = min(now + datetime.timedelta(days=days), issuer.not_valid_after_utc)
    begins = max(min(now, ends) - _BACKDATED, issuer.not_valid_before_utc)
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _builder(_name("server", names[0]), issuer.subject, key, begins, ends)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(
        x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
    )
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    certificate = builder.add_extension(identifier, critical=False).sign(signer, hashes.SHA384())
    write_bytes_atomically(key_file, _pem_of(key), mode=0o600)
    write_bytes_atomically(certificate_file, certificate.public_bytes(serialization.Encoding.PEM))


def days_left(path: Path) -> float:
    """Days until the certificate in `path` ends; negative afterwards."""
    left = load_certificate(path).not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left.total_seconds() / 86_400


def begins_at(path: Path) -> datetime.datetime:
    """From when on the certificate in `path` is valid."""
    return load_certificate(path).not_valid_before_utc


def names_of(path: Path) -> tuple[str, ...]:
    """DNS names and IP addresses that the certificate in `path` is for."""
    try:
        names = load_certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return (*names.get_values_for_type(x509.DNSName), *addresses)


def is_key_of(key_file: Path, certificate_file: Path) -> bool:
    """Whether the private key in one file belongs to the certificate in the other."""
    return load_tls_key(key_file).public_key() == load_certificate(certificate_file).public_key()


def is_issued_by(certificate_file: Path, authority: Path) -> bool:
    """Whether `authority` has signed the certificate."""
    try:
        load_certificate(certificate_file).verify_directly_issued_by(load_certificate(authority))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def load_certificate(path: Path) -> x509.Certificate:
    """Read one PEM certificate. Raises ConfigError."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}", fix="restore it from your backup") from None
    except ValueError:
        raise ConfigError(
            f"{path} is not a certificate in PEM form", fix="restore it from your backup"
        ) from None


def load_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key that only its owner can read. Raises ConfigError."""
    refuse_readable_by_others(path)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{path} is not a private key in PEM form",
            why="expected an elliptic-curve key without passphrase",
            fix="restore it from your backup; the server's own key comes anew with flower-server renew",
        )
    return key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    begins: datetime.datetime,
    ends: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(role: str, common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "hospital-federation"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            # X.509 ends a common name after 64 characters; the names that count are the alternative ones.
            x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64]),
        ]
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
