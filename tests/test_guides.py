"""The guides: every command and option in them exists, every error text that they explain is a real one."""

import re
from pathlib import Path

import pytest

from common.exit_codes import ExitCode
from common.hospital_config import HospitalConfig
from server.provisioning.operator_config import OperatorConfig
from tests.guide_commands import check_mention, commands, mentioned, parse_command, shell_blocks

ROOT = Path(__file__).resolve().parents[1]
GUIDES = [
    ROOT / "docs" / name
    for name in (
        *("operator-guide.md", "hospital-guide.md", "certificates-and-keys.md"),
        *("backup.md", "install-offline.md", "threat-model.md", "privacy.md", "audit.md"),
        *("formats.md", "preprocessing.md", "data-doctor.md", "tasks.md", "models.md"),
        *("series.md", "predict.md", "evaluation.md", "ensembles.md"),
    )
]
TEXTS = [*GUIDES, ROOT / "README.md", *(p for p in sorted((ROOT / "deploy").rglob("*")) if p.is_file())]
PACKAGES = ("common", "server", "client", "simulations")


def name_of(path):
    return str(path.relative_to(ROOT))


def in_blocks():
    for guide in [*GUIDES, ROOT / "README.md"]:
        for block in shell_blocks(guide.read_text()):
            for words in commands(block):
                yield pytest.param(words, id=f"{guide.name}: {' '.join(words)[:70]}")


@pytest.mark.parametrize("words", list(in_blocks()))
def test_a_command_of_a_guide_is_taken_by_the_real_program(words):
    parse_command(words)


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_what_a_text_mentions_exists(path):
    for words in mentioned(path.read_text()):
        check_mention(words)


def test_the_extraction_sees_the_commands():
    found = [
        words[:2]
        for guide in GUIDES
        for block in shell_blocks(guide.read_text())
        for words in commands(block)
    ]
    for wanted in (
        *(
            ["flower-server", word]
            for word in ("init", "enroll", "check", "start", "status", "renew", "backup")
        ),
        *(
            ["flower-client", word]
            for word in ("init", "plan", "check", "start", "status", "leave", "renew-key")
        ),
    ):
        assert wanted in found


def source_text():
    """Every source as one text, with the pieces of a broken string joined."""
    text = "\n".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return re.sub(r'"\s*\n\s*f?"', "", text)


@pytest.mark.parametrize("guide", GUIDES, ids=name_of)
def test_an_explained_error_is_one_that_the_programs_have(guide):
    """Rows that begin with a quoted text: its parts, between the dots, stand in the sources."""
    sources = source_text()
    for quoted in re.findall(r"^\| “(.+?)”", guide.read_text(), flags=re.MULTILINE):
        parts = [part.strip() for part in re.split(r"…", quoted)]
        assert any(len(part) >= 6 for part in parts), quoted
        for part in parts:
            assert part in sources, f"{guide.name}: {part!r} of {quoted!r}"


@pytest.mark.parametrize("guide", GUIDES, ids=name_of)
def test_settings_that_a_guide_names_exist(guide):
    known = set()
    for config in (HospitalConfig, OperatorConfig):
        for section, field in config.model_fields.items():
            keys = field.annotation.model_fields
            known |= {f"{section}.{key}".replace("_", "-") for key in keys}
    sections = {key.split(".")[0] for key in known}
    for section, key in re.findall(r"`([a-z]+)\.([a-z0-9-]+)(?: =[^`]*)?`", guide.read_text()):
        if section in sections and key not in {"toml", "key", "crt", "json", "safetensors"}:  # files
            assert f"{section}.{key}" in known, f"{section}.{key}"


@pytest.mark.parametrize("guide", GUIDES, ids=name_of)
def test_links_lead_somewhere(guide):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", guide.read_text()):
        assert "://" in target or (guide.parent / target).exists(), target


def test_the_exit_codes_are_all_explained():
    for guide in GUIDES[:2]:
        rows = re.findall(r"^\| `(\d)` \|", guide.read_text(), flags=re.MULTILINE)
        wanted = {str(int(code)) for code in ExitCode} if guide is GUIDES[0] else {"0", "1", "2", "3"}
        assert set(rows) == wanted
