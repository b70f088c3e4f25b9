"""The key in the hospital's folder, which may become another one while a client runs with the one before."""

from client.deployment.hospital_folder import HospitalFolder
from common.enrolment import Enrolment
from common.errors import FederationError
from common.node_keys import load_private_key, public_key_of


class KeyOnDisk:
    """Looks whether it is still the one that is enrolled; the running client goes on with that one."""

    def __init__(self, folder: HospitalFolder, enrolment: Enrolment) -> None:
        self._path, self._enrolment = folder.key_file, enrolment
        self._seen = self._file()

    def news(self) -> str:
        """What a person is to know, once for every new key; empty otherwise."""
        file = self._file()
        if file == self._seen:
            return ""
        self._seen = file
        try:
            found = public_key_of(load_private_key(self._path)).fingerprint
        except (FederationError, OSError):  # half-way through being replaced, or not to be read
            return ""
        if found == self._enrolment.fingerprint:
            return ""
        name, patients = self._enrolment.hospital, self._enrolment.enrolled_patients
        return (
            f"the key was renewed here ({found}) and is not enrolled yet at {self._enrolment.federation}\n"
            "this client goes on with the old one until it is restarted\n"
            f"the operator types: flower-server enroll {name} {self._path.name}.pub --patients {patients} "
            "--replace-key; put the enrolment.toml that comes back here, then restart flower-client"
        )

    def _file(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns
