"""What a person who watches the server is told: a line per closed round, and the days of its certificate."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from server.provisioning.certificate_checks import WARN_DAYS_SERVER
from server.provisioning.certificates import load_certificate
from server.provisioning.operator_config import OperatorFolder
from server.reporting.round_lines import metric_line
from server.run_folder import METRICS

_DAY_S = 86_400.0


class CertificateLines:
    """How long the certificate of this start lasts: once a day, from 30 days before its end on."""

    def __init__(self, folder: OperatorFolder, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock, self._next = folder, clock, 0.0
        self._ends = load_certificate(folder.server_certificate).not_valid_after_utc.timestamp()

    def tell(self, say: Callable[[str], None]) -> None:
        """Say it when it is time."""
        now = self._clock()
        left = (self._ends - now) / _DAY_S
        if now < self._next or left >= WARN_DAYS_SERVER:
            return
        self._next = now + _DAY_S
        when = f"ends in {left:.0f} days" if left > 0 else "has expired: hospitals refuse this server"
        say(f"the server certificate {when}; flower-server renew {self._folder.path}, then start again")


class RoundLines:
    """Follows metrics.jsonl of one run; each closed round is told once."""

    def __init__(self, run: Path, *, rounds: int) -> None:
        self._path, self._rounds = run / METRICS, rounds
        self._seen = -1
        self.closed = max((line["round"] for line in self._lines() if "closed" in line), default=0)
        """Last closed round."""

    def fresh(self) -> list[str]:
        """Lines for rounds that closed since the last call."""
        try:
            seen = os.stat(self._path).st_mtime_ns
        except FileNotFoundError:
            return []
        if seen == self._seen:
            return []
        self._seen = seen
        lines = self._lines()
        told = []
        for closing in sorted((x for x in lines if "closed" in x), key=lambda x: int(x["round"])):
            if closing["round"] > self.closed:
                self.closed = closing["round"]
                told.append(self._tell(closing, [x for x in lines if x["round"] == self.closed]))
        return told

    def _tell(self, closing: Mapping[str, Any], lines: list[Mapping[str, Any]]) -> str:
        asked = [line for line in lines if "hospital" in line]
        took_s = closing["closed"] - min((line["sent"] for line in asked), default=closing["closed"])
        others = [
            f"{line['hospital']} {line['outcome']}" + (f" ({line['code']})" if line.get("code") else "")
            for line in asked
            if line["outcome"] != "aggregated"
        ]
        rest = f"; {', '.join(others)}" if others else ""
        number = f"round {closing['round']} of {self._rounds}"
        return f"{number}: {closing['aggregated']} of {len(asked)} hospitals, {took_s:.1f} s{rest}"

    def _lines(self) -> list[Mapping[str, Any]]:
        try:
            text = self._path.read_text(errors="replace")
        except FileNotFoundError:
            return []
        return [line for row in text.splitlines() if (line := metric_line(row)) is not None]
