"""A SuperLink with its front, started once for the tests that leave it as it was."""

import pytest

from server.deployment.children import start_front, start_superlink
from server.deployment.control import Control
from server.provisioning.roster import read_roster
from tests.server.deployment.small_federation import Hospital, make_folder


class Opened:
    """A federation whose doors are open; hospitals `a` (enrolled) and `stranger` (a key, no entry)."""

    def __init__(self, path):
        self.folder = make_folder(path / "operator")
        self.config = self.folder.config()
        self.authority = self.folder.ca_certificate.read_bytes()
        self.a = Hospital(self.folder, "a")
        self.stranger = Hospital(self.folder, "stranger", enrol=False)
        self.superlink = start_superlink(self.folder, self.config, stop=lambda: False)
        with self.control() as control:
            control.enforce(read_roster(self.folder.roster))
        self.front = start_front(self.folder, self.config, stop=lambda: False)

    def control(self):
        return Control(self.config.network.superlink_port, authority=self.authority)

    @property
    def port(self):
        return int(self.config.network.listen.rpartition(":")[2])

    def close(self):
        for hospital in (self.a, self.stranger):
            hospital.stop()
        self.front.process.stop()
        self.superlink.process.stop()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    federation = Opened(tmp_path_factory.mktemp("federation"))
    yield federation
    federation.close()
