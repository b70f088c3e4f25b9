"""deploy/: units, images, compose file and wheelhouse, by parsing and by running what can be run here."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common.flower_programs import free_port, program
from common.health import HealthServer
from common.hospital_config import ConnectionConfig
from server.provisioning.operator_config import NetworkSection
from tests.guide_commands import parse_command

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
SIDES = ("server", "client")
NEEDS_PERSON = {"server": "2 4 5", "client": "2"}
HARDENING = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "ProtectProc": "invisible",
    "PrivateTmp": "yes",
    "UMask": "0077",
    "KillMode": "mixed",
    "StateDirectoryMode": "0700",
    "CapabilityBoundingSet": "",
}
FILES = sorted(path for path in [*DEPLOY.rglob("*"), *(ROOT / "docs").rglob("*.md")] if path.is_file())


def unit(side):
    text = (DEPLOY / "systemd" / f"flower-{side}.service").read_text()
    lines = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("side", SIDES)
def test_a_unit_starts_a_real_command_as_a_user_of_its_own_in_a_closed_room(side):
    settings = unit(side)
    words = shlex.split(settings["ExecStart"])
    assert Path(words[0]).name == f"flower-{side}"
    parse_command([Path(words[0]).name, *words[1:]])
    assert settings["User"] == settings["Group"] == settings["StateDirectory"] == f"flower-{side}"
    assert settings["ReadWritePaths"] == f"/var/lib/flower-{side}"
    assert settings["WorkingDirectory"] == words[2]
    assert Path(words[2]).is_relative_to(settings["ReadWritePaths"])
    assert {key: settings[key] for key in HARDENING} == HARDENING
    assert int(settings["LimitNOFILE"]) >= 4096


@pytest.mark.parametrize("side", SIDES)
def test_a_unit_starts_again_unless_a_person_is_needed(side):
    settings = unit(side)
    assert settings["Restart"] == "on-failure"
    assert settings["RestartPreventExitStatus"] == NEEDS_PERSON[side]


def test_the_hospitals_unit_leaves_the_gpu_in_reach():
    assert not {"PrivateDevices", "ProtectClock", "DeviceAllow", "MemoryDenyWriteExecute"} & set(
        unit("client")
    )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")
@pytest.mark.parametrize("side", SIDES)
def test_systemd_understands_the_unit(side, tmp_path):
    text = (DEPLOY / "systemd" / f"flower-{side}.service").read_text()
    copy = tmp_path / f"flower-{side}.service"
    copy.write_text(text.replace("/opt/hospital-federation/bin", str(Path(program(f"flower-{side}")).parent)))
    command = ["systemd-analyze", "verify", "--man=no", str(copy)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    said = [line for line in checked.stderr.splitlines() if copy.name in line]
    assert (checked.returncode, said) == (0, [])


def dockerfile(side):
    text = (DEPLOY / "docker" / f"Dockerfile.{side}").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [line.split(None, 1) for line in lines]


def last(side, instruction):
    return [rest for word, rest in dockerfile(side) if word == instruction][-1]


@pytest.mark.parametrize("side", SIDES)
def test_an_image_runs_a_real_command_and_not_as_root(side):
    assert last(side, "USER").split(":")[0] not in {"root", "0"}
    words = [*yaml.safe_load(last(side, "ENTRYPOINT")), *yaml.safe_load(last(side, "CMD"))]
    parse_command(words)
    copied = {
        source for rest in (r for w, r in dockerfile(side) if w == "COPY") for source in rest.split()[:-1]
    }
    ours = {source for source in copied if not source.startswith(("--from", "/"))}
    assert ours == {"pyproject.toml", "README.md", "LICENSE", "common", "server", "client", "simulations"}
    assert all((ROOT / source).exists() for source in ours)
    assert ("ARG", 'TORCH_INDEX_URL=""') in [tuple(line) for line in dockerfile(side)]


@pytest.mark.parametrize("side", SIDES)
def test_the_python_lines_of_an_image_work(side):
    [line] = [rest for word, rest in dockerfile(side) if word == "RUN" and "tomllib" in rest]
    code = re.search(r"python -c '(.+?)'", line)[1]
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert [re.split(r"[<>=]", entry)[0] for entry in shown.stdout.split()] == ["torch", "torchvision"]


def health_lines():
    compose = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())["services"]
    for side, service in zip(SIDES, ("server", "hospital"), strict=True):
        yield side, compose[service]["healthcheck"]["test"][1:]
        yield side, yaml.safe_load(last(side, "HEALTHCHECK").split("CMD", 1)[1])


@pytest.mark.parametrize(("side", "words"), list(health_lines()))
def test_a_probe_of_a_container_asks_grpc_health(side, words):
    ports = {
        "server": NetworkSection.model_fields["health_port"].default,
        "client": ConnectionConfig().health_port,
    }
    assert words[:2] == ["python", "-c"]
    # A server that has gone is no illness of the hospital's container: its probe asks the worker.
    asked = {"server": "ask_health(8001)", "client": "ask_health(9095, 'worker')"}[side]
    assert asked.startswith(f"ask_health({ports[side]}")
    assert asked in words[2]
    port = free_port()
    probe = [sys.executable, "-c", words[2].replace(str(ports[side]), str(port))]

    def answer():
        return subprocess.run(probe, cwd=ROOT, timeout=30, check=False).returncode

    assert answer() == 1
    health = HealthServer(port)
    health.start()
    try:
        assert answer() == 1
        health.set("worker" if side == "client" else "", serving=True)
        assert answer() == 0
    finally:
        health.stop()


def test_containers_are_closed_and_a_hospital_has_no_port():
    compose = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert (DEPLOY / "docker" / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        assert service["build"]["args"] == {"TORCH_INDEX_URL": "${TORCH_INDEX_URL:-}"}
    server, hospital = compose["services"]["server"], compose["services"]["hospital"]
    assert server["ports"] == ["8443:8443"]
    assert not {"ports", "expose", "network_mode"} & set(hospital)
    [images] = [volume for volume in hospital["volumes"] if "IMAGES" in volume]
    assert images.endswith(":/images:ro")
    named = {volume.split(":")[0] for s in (server, hospital) for volume in s["volumes"] if volume != images}
    assert named == set(compose["volumes"])


def test_the_wheelhouse_script_says_how_it_is_used_and_mixes_nothing(tmp_path):
    script = DEPLOY / "wheelhouse.sh"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True, timeout=20)

    def answer(*arguments):
        return subprocess.run([script, *arguments], capture_output=True, text=True, timeout=20, check=False)

    for words in ((), ("--help",), ("a", "b")):
        shown = answer(*words)
        assert shown.returncode == 2
        assert "TORCH_INDEX_URL" in shown.stdout
    (tmp_path / "old.whl").touch()
    refused = answer(str(tmp_path))
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_names_a_registry_or_this_machine(path):
    text = path.read_text()
    hosts = re.findall(r"https?://([^/:\s\"']+)", text)
    assert [h for h in hosts if not h.endswith("example.org") and h != "federation_front"] == []
    assert not re.search(r"(^|[\s\"'=(])/(work|root|tmp/bash)\b", text)
