"""`flower-client ledger export`: a signed statement of costs that names and counts no patient."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from client.deployment.hospital_folder import HospitalFolder
from client.ledger.ledger import Ledger
from client.ledger.receipts import issued
from client.ledger_commands import ledger_app
from client.planning.hospital import behind_these_patients
from client.provisioning.checks import _ledger, guarded
from common.checks import CheckState
from common.config import PublicPlan
from common.errors import LedgerError
from common.node_keys import load_public_key, make_key
from common.privacy.accountant import epsilon
from common.statements import sign_statement
from tests.client.small_hospital import make_hospital
from tests.client.test_receipts import DELTA, EVENT, charge, key, put_back, site_in


def invoke(*arguments):
    return CliRunner().invoke(ledger_app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    folder = make_hospital(tmp_path / "north", delta=DELTA).parent
    make_key(folder / "keys" / "hospital.key", folder / "keys" / "hospital.key.pub", comment="north")
    ledger = Ledger.open(folder / "ledger")
    for number, members in enumerate((["anna", "bert"], ["carl"]), start=1):
        ledger.charge(key(number), event=EVENT, cohort=ledger.cohort(members), delta=DELTA)
    return folder


def exported(folder, *options):
    out = folder / "statement.json"
    result = invoke("export", folder, "--out", out, *options)
    assert result.exit_code == 0, result.output
    return out


def test_a_statement_says_what_was_spent_and_who_signed(folder):
    out = exported(folder)
    result = invoke("verify", out)
    assert result.exit_code == 0, result.output
    assert load_public_key(folder / "keys" / "hospital.key.pub").fingerprint in result.output
    assert "north states" in result.output
    content = json.loads(invoke("verify", out, "--format", "json").output)["content"]
    twice = epsilon([EVENT, EVENT], delta=DELTA)  # policy.composition is "site" by default
    assert content["epsilon"] == pytest.approx(twice)
    assert (content["hospital"], content["delta"], content["charges"]) == ("north", DELTA, 2)
    (run,) = content["runs"]
    assert run["epsilon"] == pytest.approx(twice)
    assert (run["run_id"], run["rounds"], run["steps"]) == ("study", 2, 6)
    assert (run["sampling_rates"], run["noise_multipliers"]) == ([1.0], [12.0])
    assert run["units"] == ["patient"]
    assert content["chain_head"] == Ledger.open(folder / "ledger").charges()[-1].hash
    assert "add or remove one unit" in content["neighbouring_relation"]


def test_no_patient_is_named_or_counted(folder):
    text = exported(folder).read_text()
    ledger = Ledger.open(folder / "ledger")
    cohorts = {charge.cohort_digest for charge in ledger.charges()}
    hashes = {unit.hex() for unit in ledger.cohort(["anna", "bert", "carl"]).hashes}
    for secret in (*cohorts, *hashes, "anna", ledger.site_key.hex(), 'patients":'):
        assert secret not in text


def test_two_ledgers_with_other_patients_state_the_same(folder, tmp_path):
    other = make_hospital(tmp_path / "south" / "north", delta=DELTA).parent
    ledger = Ledger.open(other / "ledger")
    for number in (1, 2):  # the same patients in both rounds, and more of them
        cohort = ledger.cohort([f"p{n}" for n in range(9)])
        ledger.charge(key(number), event=EVENT, cohort=cohort, delta=DELTA, composition="site")
    contents = [json.loads(exported(path, "--unsigned").read_text())["content"] for path in (folder, other)]
    for content in contents:
        content.pop("date")
        content.pop("chain_head")
    assert contents[0] == contents[1]


@pytest.mark.parametrize("change", ["epsilon", "rubbish", "kind", "unsigned"])
def test_a_changed_statement_is_refused(folder, change):
    out = exported(folder, *(["--unsigned"] if change == "unsigned" else []))
    document = json.loads(out.read_text())
    if change == "epsilon":
        document["content"]["epsilon"] = 0.1
    out.write_text("no json" if change == "rubbish" else json.dumps(document))
    if change == "kind":
        from common.node_keys import load_private_key

        signer = load_private_key(folder / "keys" / "hospital.key")
        out.write_text(sign_statement(signer, kind="release-certificate", content={}))
    result = invoke("verify", out)
    assert result.exit_code == 2
    assert "right" not in result.output.split("\n")[0]


def test_without_a_key_only_unsigned(folder):
    (folder / "keys" / "hospital.key").unlink()
    result = invoke("export", folder)
    assert result.exit_code == 2
    assert "--unsigned" in result.output
    result = invoke("export", folder, "--unsigned")
    assert json.loads(result.output)["unsigned"] is True
    assert invoke("export", folder / "ledger").exit_code == 2  # the ledger's own folder names no hospital


def test_verify_holds_the_ledger_against_the_receipts_here(folder, tmp_path):

    shutil.copytree(folder / "ledger", tmp_path / "backup")
    site = site_in(folder)
    charge(site.ledger, 3)
    issued(site)
    assert invoke("verify", folder).exit_code == 0
    put_back(tmp_path / "backup", folder / "ledger")
    assert invoke("verify", folder / "ledger").exit_code == 0  # from inside it is right
    for where in (folder, folder / "hospital.toml"):
        result = invoke("verify", where)
        assert result.exit_code == 1
        assert "receipt: an older copy" in result.output
    found = json.loads(invoke("verify", folder, "--format", "json").output)["findings"]
    assert [finding["kind"] for finding in found] == ["receipt"]


def test_training_and_validation_of_one_run_do_not_look_like_a_breach(folder):
    """The budget counts them apart; as if all had done both is the other number."""
    ledger = Ledger.open(folder / "ledger")
    ledger.charge(key(3), event=EVENT, cohort=ledger.cohort(["vera"]), delta=DELTA, purpose="evaluation")
    content = json.loads(exported(folder).read_text())["content"]
    assert content["epsilon"] == pytest.approx(epsilon([EVENT] * 2, delta=DELTA))
    assert content["epsilon_as_if_all_in_every_charge"] == pytest.approx(epsilon([EVENT] * 3, delta=DELTA))
    assert "training and validation of the last run apart" in content["composition"]
    # A new run has all of that behind it.
    ledger.charge(key(1, "second"), event=EVENT, cohort=ledger.cohort(["anna"]), delta=DELTA)
    content = json.loads(exported(folder).read_text())["content"]
    assert content["epsilon"] == pytest.approx(epsilon([EVENT] * 4, delta=DELTA))


def test_by_patient_only_the_worst_off_patients_cost_is_stated(tmp_path):
    folder = make_hospital(tmp_path / "north", delta=DELTA, composition="patient").parent
    ledger = Ledger.open(folder / "ledger")
    for number, members in enumerate((["anna"], ["bert"]), start=1):
        ledger.charge(key(number), event=EVENT, cohort=ledger.cohort(members), delta=DELTA)
    content = json.loads(exported(folder, "--unsigned").read_text())["content"]
    assert content["epsilon"] == pytest.approx(epsilon([EVENT], delta=DELTA))
    assert content["epsilon_as_if_all_in_every_charge"] is None


@pytest.fixture
def older_copy(folder, tmp_path):
    """A hospital whose ledger was put back to before its newest receipt."""
    shutil.copytree(folder / "ledger", tmp_path / "copy")
    site = site_in(folder)
    charge(site.ledger, 3)
    issued(site)
    put_back(tmp_path / "copy", folder / "ledger")
    return folder


def test_nothing_too_low_is_signed_shown_as_right_or_planned_with(older_copy):
    refused = invoke("export", older_copy)
    assert refused.exit_code == 2
    assert "signature" not in refused.stdout
    for part in ("older copy", "newest backup", "flower-client ledger recover"):
        assert part in refused.stderr
    shown = invoke("show", older_copy)
    assert shown.exit_code == 1
    assert "TOO LOW" in shown.stderr
    result = invoke("show", older_copy, "--format", "json")
    assert (result.exit_code, "older copy" in json.loads(result.stdout)["problem"]) == (1, True)
    (line,) = guarded("ledger", lambda: _ledger(HospitalFolder(older_copy)))
    assert (line.state, "charge(s) are missing" in line.result) == (CheckState.FAILED, True)
    assert "flower-client ledger recover" in line.fix
    with pytest.raises(LedgerError, match="older copy"):
        behind_these_patients(HospitalFolder(older_copy), PublicPlan())


@pytest.mark.parametrize("becomes", ["gone", "another"])
def test_a_ledger_that_is_gone_or_another_is_never_made_anew_in_silence(folder, becomes):
    issued(site_in(folder))
    shutil.rmtree(folder / "ledger")
    if becomes == "another":
        Ledger.open(folder / "ledger")
    (line,) = guarded("ledger", lambda: _ledger(HospitalFolder(folder)))
    assert line.state is CheckState.FAILED
    with pytest.raises(LedgerError, match="ledger") as planned:
        behind_these_patients(HospitalFolder(folder), PublicPlan())
    verified, exported, recovered = (
        invoke("verify", folder),
        invoke("export", folder),
        invoke("recover", folder),
    )
    assert verified.exit_code in (1, 2)
    assert (exported.exit_code, recovered.exit_code) == (2, 2)
    for words in (line.fix, planned.value.fix, exported.stderr, recovered.stderr):
        assert "--whole-budget" in words
        assert "--receipt" not in words  # without the old site.key nobody can read one
    assert (folder / "ledger").exists() == (becomes == "another")
