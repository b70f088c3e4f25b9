"""What stays the same for all rounds of a session: grid, settings, folder, roster."""

import time
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from common.config import FederationConfig
from common.messages import Envelope, RoundKey
from server.exposure import Unheard
from server.hospitals import Roster
from server.run_folder import RunFolder
from server.run_state import RunState


@dataclass(frozen=True, kw_only=True)
class Federation:
    """One session of a run, from start or resume to its end."""

    grid: Grid
    config: FederationConfig
    folder: RunFolder
    roster: Roster
    attempt: int
    """See `RunFolder.attempt`."""
    earlier_s: float
    """Server time of earlier sessions."""
    unheard: dict[str, Unheard] = field(default_factory=dict)
    """Questions of this session without a reply yet, by message: late answers count as released."""
    opened: float = field(default_factory=time.monotonic)

    @property
    def wall_s(self) -> float:
        """Seconds of server time up to now, over all sessions."""
        return self.earlier_s + time.monotonic() - self.opened

    def envelope(
        self, state: RunState, *, round_number: int | None = None, model_sha256: str = ""
    ) -> Envelope:
        """The head of a message about `state`: by default of hello, with the rounds done so far."""
        key = RoundKey(
            run_id=state.run_id,
            attempt=self.attempt,
            round_number=state.round_number if round_number is None else round_number,
            model_hash=model_sha256 or state.model_sha256,
        )
        return Envelope(key=key, task=self.config.data.task)
