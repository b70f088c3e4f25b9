"""Whether SuperLink and front answer, asked from outside as their callers would."""

import socket
import ssl
import urllib.error
import urllib.request
from enum import Enum, auto

from server.provisioning.operator_config import OperatorConfig, OperatorFolder, split_address


class Answer(Enum):
    """What came back."""

    WELL = auto()
    UNTRUSTED = auto()
    """Somebody answers with a certificate that is not to be trusted: expired, or another program's."""
    NONE = auto()

    @property
    def is_well(self) -> bool:
        """Whether a caller would be served."""
        return self is Answer.WELL


def superlink_answer(folder: OperatorFolder, config: OperatorConfig, *, timeout_s: float = 2.0) -> Answer:
    """Ask for `/health` on the SuperLink's port."""
    context = ssl.create_default_context(cafile=str(folder.ca_certificate))
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    url = f"https://127.0.0.1:{config.network.superlink_port}/health"
    try:
        with opener.open(url, timeout=timeout_s) as got:
            return Answer.WELL if got.status == 200 else Answer.NONE
    except urllib.error.URLError as error:
        return Answer.UNTRUSTED if isinstance(error.reason, ssl.SSLCertVerificationError) else Answer.NONE
    except OSError:
        return Answer.NONE


def front_answer(folder: OperatorFolder, config: OperatorConfig, *, timeout_s: float = 2.0) -> Answer:
    """Shake hands with the door over TLS, from this machine."""
    host, port = split_address(config.network.listen)
    context = ssl.create_default_context(cafile=str(folder.ca_certificate))
    context.check_hostname = False  # it listens on every address, and the certificate holds the public name
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with (
            socket.create_connection((here, port), timeout=timeout_s) as plain,
            context.wrap_socket(plain),
        ):
            return Answer.WELL
    except ssl.SSLCertVerificationError:
        return Answer.UNTRUSTED
    except OSError:
        return Answer.NONE
