"""A new federation: folder, certificates, secret, empty roster and a `federation.toml` with comments."""

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.commented_toml import to_commented_toml
from common.errors import ConfigError
from common.files import write_bytes_atomically
from common.models.names import MODELS, steps_problem
from common.node_keys import write_secret
from common.settings import parse, with_overrides
from server.provisioning.certificates import issue_server_certificate, make_authority
from server.provisioning.folder_parts import make_parts, new_folder
from server.provisioning.operator_config import OperatorConfig, OperatorFolder
from server.provisioning.roster import new_roster

_SECRET_BYTES = 32
_HEAD = """federation.toml: the settings of this federation, read at each start.

The sections federation, data, preprocessing, model, augmentation, training, privacy and evaluation are the
public plan: every hospital gets it. Its own policy may only tighten it; how much noise protects its
patients is its own decision.
A run that has started cannot change its plan: after a change, begin a new one (flower-server start --new)."""
_SET_ELSEWHERE = frozenset({"runtime.hospitals", "runtime.roster", "runtime.receipts"})

# Chosen by validation (docs/defaults.md): many patients in few steps; momentum and average take noise out.
# Models with `settings` of their own in common.models.names start from those.
_STARTING_POINT: Mapping[str, Mapping[str, Any]] = {
    "federation": {"rounds": 90},
    "training": {"learning-rate": 0.3},
    "server": {"optimizer": "momentum", "ema-decay": 0.9, "final-model": "ema", "quorum": 2},
}


_ROUNDS_ON_FEATURES = 200
"""Of models with settings of their own: one noised sum over everybody in each."""


def plan_federation(values: Mapping[str, Mapping[str, Any]], overrides: Iterable[str] = ()) -> OperatorConfig:
    """The configuration of a new federation: a starting point, then `values`, then `section.key=value`.

    Raises ConfigError for impossible settings, an unknown model, or images too small for it.
    """
    overrides = tuple(overrides)
    merged = {name: dict(section) for name, section in _starting_point(values, overrides).items()}
    for name, section in values.items():
        merged.setdefault(name, {}).update(section)
    config = parse(OperatorConfig, with_overrides(merged, overrides), source="the new federation")
    if problem := model_problem(config):
        raise ConfigError(problem, fix="choose one with --model, or larger images with --image-size")
    return config


def _starting_point(
    values: Mapping[str, Mapping[str, Any]], overrides: Iterable[str]
) -> Mapping[str, Mapping[str, Any]]:
    """What the model asked for starts from."""
    name = with_overrides(values, overrides).get("model", {}).get("name", "")
    known = MODELS.get(str(name))
    if known is None or not known.settings:
        return _STARTING_POINT
    start = {"federation": {"rounds": _ROUNDS_ON_FEATURES}, "server": {"quorum": 2}}
    return with_overrides(start, known.settings)


def model_problem(config: OperatorConfig) -> str | None:
    """What is wrong with the model's name, image size or series; None when all fit."""
    known = MODELS.get(config.model.name)
    if known is None:
        return f"there is no model {config.model.name}; known: {', '.join(MODELS)}"
    if config.data.image_size < known.minimum_image_size:
        size = known.minimum_image_size
        return f"{config.model.name} needs images of {size} px, the plan has {config.data.image_size}"
    return steps_problem(config.model.name, config.model_spec.steps)


def make_federation(path: Path, config: OperatorConfig) -> OperatorFolder:
    """Make the folder of a new federation. Raises ConfigError when `path` holds anything already."""
    with new_folder(path) as folder:
        _fill(folder, config)
    return folder


def renew_server_certificate(folder: OperatorFolder) -> None:
    """A new key and certificate for the names that federation.toml has now, from the same authority.

    Hospitals need nothing new; the server reads it at its next start. Raises ConfigError.
    """
    issue_server_certificate(
        folder.server_key,
        folder.server_certificate,
        authority_key=folder.ca_key,
        authority=folder.ca_certificate,
        names=folder.config().network.certificate_names,
    )


def _fill(folder: OperatorFolder, config: OperatorConfig) -> None:
    make_parts(folder)
    make_authority(folder.ca_key, folder.ca_certificate, federation=config.federation.name)
    write_secret(folder.superexec_secret, secrets.token_bytes(_SECRET_BYTES))
    new_roster(folder.roster)
    text = to_commented_toml(config, head=_HEAD, without=_SET_ELSEWHERE)
    write_bytes_atomically(folder.federation_toml, text.encode())
    renew_server_certificate(folder)
