"""`flower-simulate audit`: what it writes, how it ends; with audits of no length, and one real one."""

import json
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import simulations.audits.run
from common.errors import GuardError
from server.reporting.canvas import canvas
from simulations.audits.catalogue import AUDITS, Audit
from simulations.audits.finding import CLAIMED, CONFIDENCE, EMPIRICAL, Finding
from simulations.audits.run import JSON, PAGE, audit_names, run_audits
from simulations.cli import app


def one(folder, quick):
    with canvas() as (_, render):
        (folder / "one.png").write_bytes(render())
    numbers = {CLAIMED: 3.0, EMPIRICAL: 1.25, CONFIDENCE: 0.95, "endless": float("inf")}
    return Finding(
        audit="one", passed=True, said=f"tried <it> {quick}", numbers=numbers, pictures=("one.png",)
    )


def two(folder, quick):
    raise GuardError("nothing can be trained", why="a reason", fix="a way out")


ONE, TWO = (
    Audit(name=name, title=name.title(), tries=f"Is {name}?", run=run)
    for name, run in (("one", one), ("two", two))
)


def ran(folder, *audits, quick=False):
    return run_audits(audits, folder, quick=quick, began=lambda _: None, ended=lambda *_: None)


def test_findings_are_written_as_json_and_as_a_page_that_loads_nothing(tmp_path):
    content = ran(tmp_path / "out", ONE, quick=True)
    assert json.loads((tmp_path / "out" / JSON).read_text()) == content
    (finding,) = content["findings"]
    assert finding["numbers"] == {CLAIMED: 3.0, EMPIRICAL: 1.25, CONFIDENCE: 0.95, "endless": None}
    assert content["passed"]
    assert finding["wall_s"] > 0
    page = (tmp_path / "out" / PAGE).read_text()
    assert "tried &lt;it&gt; True" in page
    assert "All 1 audits passed" in page
    assert "95 %" in page
    assert page.count("data:image/png;base64,") == 2  # the audit's picture and the plot of the bounds
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)


def test_an_audit_that_cannot_be_carried_out_has_not_passed(tmp_path):
    content = ran(tmp_path, ONE, TWO)
    assert not content["passed"]
    assert content["findings"][0]["passed"]
    assert not content["findings"][1]["passed"]
    assert "nothing can be trained" in content["findings"][1]["said"]
    page = (tmp_path / PAGE).read_text()
    assert "1 of 2 audits failed" in page
    assert "FAILED" in page


def invoke(*arguments):
    return CliRunner().invoke(app, ["audit", *map(str, arguments)])


@pytest.mark.parametrize(("audits", "code"), [((ONE,), 0), ((ONE, TWO), 1)], ids=["all passed", "one failed"])
def test_the_exit_code_says_whether_all_passed(tmp_path, monkeypatch, audits, code):
    monkeypatch.setattr(simulations.audits.run, "AUDITS", audits)
    result = invoke("--out", tmp_path / "out")
    assert result.exit_code == code
    assert "3.00" in result.stdout
    assert "1.25" in result.stdout
    assert str(tmp_path / "out" / PAGE) in result.stdout


def test_the_output_for_programs_is_what_is_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(simulations.audits.run, "AUDITS", (replace(ONE, name="noise"), TWO))
    result = invoke("--out", tmp_path, "--only", "noise", "--format", "json")
    assert json.loads(result.stdout) == json.loads((tmp_path / JSON).read_text())
    assert [finding["title"] for finding in json.loads(result.stdout)["findings"]] == ["One"]


def test_an_unknown_audit_is_refused(tmp_path):
    result = invoke("--only", "everything", "--out", tmp_path / "out")
    assert "there is no audit 'everything'" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_audit():
    text = re.sub(r"[\s│]+", " ", invoke("--help").stdout)
    for name in audit_names():
        assert name in text


def test_the_issues_audits_are_all_there():
    assert set(audit_names()) >= {
        "neighbours", "noise", "sampling", "accounting", "canary", "one-run", "membership", "inversion"
    }  # fmt: skip
    assert len({audit.title for audit in AUDITS}) == len(AUDITS)


def test_real_audits_from_the_command_line(tmp_path):
    result = invoke("--quick", "--only", "one-run", "--out", tmp_path)
    assert result.exit_code == 0, result.stdout
    (finding,) = json.loads((tmp_path / JSON).read_text())["findings"]
    assert finding["name"] == "one-run"
    assert 0 < finding["numbers"][EMPIRICAL] <= finding["numbers"][CLAIMED]


@pytest.mark.audit
@pytest.mark.timeout(900)
def test_all_audits_pass_quickly(tmp_path):
    result = invoke("--quick", "--out", tmp_path)
    assert result.exit_code == 0, result.stdout
