"""Where a hospital keeps what `client.retention` is about."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class KeptFolders:
    """Folders of one hospital."""

    state: Path
    cache: Path
    logs: Path
