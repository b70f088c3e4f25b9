"""The roster while the server runs: enforced at Flower, and who of it is connected."""

import contextlib
import time
from collections.abc import Callable, Mapping

import httpx

from common.errors import ConfigError
from server.deployment.bell import Bell
from server.deployment.control import Control, online_of
from server.provisioning.operator_config import OperatorFolder
from server.provisioning.presence import Presence, presence_of
from server.provisioning.roster import read_roster

ENFORCE_S = 60.0
"""The roster is enforced this often also when it has not changed: what failed, or crept in, is seen to."""


class Attendance:
    """What cannot be done is said once, however often it is tried again."""

    def __init__(
        self,
        folder: OperatorFolder,
        control: Control,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._control, self._say, self._clock = folder, control, say, clock
        self._tone, self._again_at = -1, 0.0
        self._said: set[str] = set()
        self._names: dict[str, str] = {}
        self._online: dict[str, bool] = {}
        self.presence: Mapping[str, Presence] = {}
        """What Flower knew of each key when it could last be asked, by fingerprint."""

    @property
    def online(self) -> list[str]:
        """Fingerprints of who was connected when it could last be asked."""
        return sorted(fingerprint for fingerprint, is_here in self._online.items() if is_here)

    def enforce_anew(self) -> None:
        """Enforce the roster at the next call, whether or not it has changed."""
        self._tone = -1

    def enforce(self) -> None:
        """Register and unregister hospitals when roster.json has changed, and now and then."""
        tone, now = Bell(self._folder.roster).tone, self._clock()
        if tone == self._tone and now < self._again_at:
            return
        try:
            enforced = self._control.enforce(read_roster(self._folder.roster))
            done, failed = enforced.done, enforced.failed
        except httpx.HTTPError:  # the SuperLink is on its way back
            return
        except ConfigError as error:
            done, failed = [], [f"the roster is left as it was: {error.what}"]
        for line in [*done, *(line for line in failed if line not in self._said)]:
            self._say(line)
        self._said = set(failed)
        self._tone, self._again_at = tone, now + ENFORCE_S

    def look(self) -> bool:
        """Say who came and who went; whether the SuperLink could be asked."""
        try:
            nodes = self._control.nodes()
        except httpx.HTTPError:
            return False
        online, self.presence = online_of(nodes), presence_of(nodes)
        with contextlib.suppress(ConfigError):  # told where the roster is enforced
            self._names = {entry.fingerprint: entry.name for entry in read_roster(self._folder.roster)}
        for fingerprint in [*online, *(set(self._online) - set(online))]:
            is_here = online.get(fingerprint, False)
            if is_here != self._online.get(fingerprint, False):
                name = self._names.get(fingerprint, fingerprint)
                self._say(f"{name} is {'connected' if is_here else 'not connected'}")
        self._online = online
        return True
