"""The certificate that a server shows: seen during a handshake, and looked at when it was refused."""

import ssl
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx
from cryptography import x509

from common.errors import ConfigError, printable


def tls_context(ca_certificate: str) -> ssl.SSLContext:
    """Trust this certificate authority (PEM) and no other; raises ConfigError when it is none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=ca_certificate)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            "ca-certificate in enrolment.toml is not a certificate",
            why=str(error),
            fix="put the file that the operator has sent here again, unchanged",
        ) from None
    return context


@dataclass(frozen=True, kw_only=True)
class SeenCertificate:
    """What a server showed."""

    subject: str
    issuer: str
    names: tuple[str, ...]
    """DNS names and IP addresses that it is valid for."""
    not_before: datetime
    not_after: datetime

    @classmethod
    def read(cls, der: bytes) -> "SeenCertificate":
        """Read DER; names are made printable. Raises ValueError when it cannot be parsed."""
        try:
            return cls._read(der)
        except Exception as error:  # the library has half a dozen kinds for what servers show
            raise ValueError("no certificate that can be read") from error

    @classmethod
    def _read(cls, der: bytes) -> "SeenCertificate":
        certificate = x509.load_der_x509_certificate(der)
        names: tuple[str, ...] = ()
        with suppress(x509.ExtensionNotFound):
            found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            addresses = found.get_values_for_type(x509.IPAddress)
            names = (*found.get_values_for_type(x509.DNSName), *map(str, addresses))
        return cls(
            subject=printable(certificate.subject.rfc4514_string()),
            issuer=printable(certificate.issuer.rfc4514_string()),
            names=tuple(map(printable, names)),
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
        )


class CertificateWatch:
    """Sees the certificate go by in a TLS handshake of httpx (its `trace` extension)."""

    def __init__(self) -> None:
        self.certificate: SeenCertificate | None = None

    @property
    def not_after(self) -> datetime | None:
        """End of validity, None when no certificate was seen."""
        return self.certificate.not_after if self.certificate else None

    def __call__(self, event: str, info: dict[str, Any]) -> None:
        """Called by httpx at every step of a request."""
        if event.endswith("start_tls.complete"):
            der = info["return_value"].get_extra_info("ssl_object").getpeercert(True)
            with suppress(ValueError):
                self.certificate = SeenCertificate.read(der or b"")


class _EndOfHandshakeError(Exception):
    pass


def look_at(address: str, *, proxy: str, timeout_s: float) -> SeenCertificate | None:
    """Shake hands without trust, read the certificate, hang up before a byte of a request; None in vain."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    watch = CertificateWatch()

    def hang_up(event: str, info: dict[str, Any]) -> None:
        watch(event, info)
        if watch.certificate:
            info["return_value"].close()
            raise _EndOfHandshakeError

    client = httpx.Client(verify=context, proxy=proxy or None, trust_env=False, timeout=timeout_s)
    with client, suppress(_EndOfHandshakeError, httpx.HTTPError, ValueError):
        client.get(f"https://{address}/", extensions={"trace": hang_up})
    return watch.certificate
