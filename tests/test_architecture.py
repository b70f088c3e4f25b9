"""The structure of the project, checked: import directions, package files, dangerous calls, names taken."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "server", "client", "simulations")
MAY_IMPORT = {
    "common": {"common"},
    "server": {"common", "server"},
    "client": {"common", "client"},
    "simulations": {"common", "server", "client", "simulations"},
}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_house(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imported_names(path)} & {*PACKAGES, "tests"}
    assert ours <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_deprecated_flower_and_no_pickle(path):
    names = imported_names(path)
    old = {"flwr.common", "flwr.server", "flwr.client", "flwr.compat"}
    found = {name for name in names if any(name == o or name.startswith(o + ".") for o in old)}
    # Flower offers its wire encoding of a message nowhere else.
    allowed = {"flwr.common.serde"} if path == ROOT / "common" / "serialisation.py" else set()
    assert found <= allowed
    assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            assert (owner, node.func.attr) != ("torch", "load")
            if (owner, node.func.attr) == ("np", "load"):
                keywords = {k.arg: k.value for k in node.keywords}
                allow = keywords.get("allow_pickle")
                assert isinstance(allow, ast.Constant), "np.load names allow_pickle=False"
                assert allow.value is False


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py"], ids=str)
def test_package_files_hold_a_docstring_only(path):
    body = ast.parse(path.read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path):
    tree = ast.parse(path.read_text())
    assert len(path.read_text().splitlines()) <= 300
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 75, f"{node.name} is long"


def test_no_other_distribution_owns_our_names():
    owners = importlib.metadata.packages_distributions()
    for name in PACKAGES:
        assert set(owners.get(name, ["hospital-federation"])) == {"hospital-federation"}


@pytest.mark.parametrize("module", ["server.app", "server.cli", "client.cli", "simulations.cli"])
def test_commands_and_the_server_start_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'opacus' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_every_command_of_the_project_answers_help():
    scripts = importlib.metadata.entry_points(group="console_scripts")
    ours = {script.name for script in scripts if script.dist and script.dist.name == "hospital-federation"}
    assert ours == {"flower-server", "flower-client", "flower-simulate"}
    for name in ours:
        command = [str(Path(sys.executable).with_name(name)), "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert "Usage" in shown
