"""What the operator gives a hospital: one small file without secrets, `enrolment.toml`."""

from pydantic import Field

from common.config import PublicPlan
from common.names import ADDRESS, FINGERPRINT, NAME
from common.settings import Section

ENROLMENT = "enrolment.toml"
"""Name of the file at the hospital, beside hospital.toml."""


class Enrolment(Section):
    """Where the federation is, how to recognise it, and what it knows of this hospital."""

    federation: str = Field(pattern=NAME)
    """Name of the study."""
    hospital: str = Field(pattern=NAME)
    """Name on the roster."""
    enrolled_patients: int = Field(ge=1)
    """The public count on the roster."""
    fingerprint: str = Field(pattern=FINGERPRINT)
    """Fingerprint of the hospital's key on the roster."""
    address: str = Field(pattern=ADDRESS)
    """host:port of the server's open path; TLS always."""
    release: str
    """Release of hospital-federation at the server."""
    wire_schema: int = Field(ge=1)
    """Wire schema at the server."""
    bundle_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the app bundle that the server submits."""
    ca_certificate: str
    """PEM of the federation's own certificate authority; nothing else is trusted."""
    plan: PublicPlan = PublicPlan()
    """The study as it was planned at enrolment, so that the hospital can check its data against it."""
