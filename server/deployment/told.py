"""What a person who watches the server is told: a line per closed round, and who comes and goes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.reporting.round_lines import metric_line
from server.run_folder import METRICS


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
