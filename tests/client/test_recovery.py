"""`flower-client ledger recover`: from a backup, another branch, nothing but receipts, or nothing."""

import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from client.deployment.hospital_folder import HospitalFolder
from client.ledger.ledger import Ledger
from client.ledger.receipt import issue
from client.ledger.receipts import issued, require_current
from client.ledger.records import LOST
from client.ledger.recovery import carry_out, plan_recovery
from client.ledger_commands import ledger_app
from client.outbox import Outbox, SealedAnswer
from client.site_lock import CLIENT_LOCK, site_lock
from common.errors import BudgetError, ConfigError, LedgerError
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from tests.client.small_hospital import make_hospital
from tests.client.test_receipts import DELTA, EVENT, asking, charge, key, put_back, site_in

OTHER = PrivacyEvent(sampling_rate=1, noise_multiplier=15.0, steps=5)
BUDGET = 3.0


@pytest.fixture
def folder(tmp_path):
    return make_hospital(tmp_path / "north", delta=DELTA, epsilon=BUDGET).parent


@pytest.fixture
def site(folder):
    return site_in(folder)


def site_wide(ledger):
    """The one history that composition `site` goes by, and its cost."""
    (history,) = ledger.histories(ledger.cohort(["nobody"]), composition="site")
    return epsilon(history, delta=DELTA)


def cost(*events):
    return epsilon(events, delta=DELTA)


def recover(folder, **options):
    hospital = HospitalFolder(folder)
    ledger = carry_out(plan_recovery(hospital, **options), hospital)
    assert Ledger.examine(ledger.folder).verify() == []
    return ledger


def command(folder, *options):
    return CliRunner().invoke(ledger_app, ["recover", str(folder), *options])


@pytest.fixture
def after_a_loss(site, folder, tmp_path):
    """Charges 1 and 2 are in the backup; 3, 4, 5 and one without privacy are lost, with a receipt of each."""
    charge(site.ledger, 1)
    charge(site.ledger, 2)
    shutil.copytree(site.ledger.folder, tmp_path / "backup")
    lost = []
    for number, event in ((3, EVENT), (4, OTHER), (5, OTHER)):
        charge(site.ledger, number, event=event)
        lost.append(issued(site))
    put_back(tmp_path / "backup", site.ledger.folder)
    return lost


def test_a_backup_goes_on_with_exactly_what_the_receipts_prove(after_a_loss, folder):
    truth = cost(EVENT, EVENT, EVENT, OTHER, OTHER)
    ledger = recover(folder)
    assert site_wide(ledger) == pytest.approx(truth, abs=1e-9)
    assert ledger.spent(DELTA).epsilon == pytest.approx(truth, abs=1e-9)  # of those in the backup
    (stranger,) = ledger.histories(ledger.cohort(["never seen"]))
    assert epsilon(stranger, delta=DELTA) == pytest.approx(cost(EVENT, OTHER, OTHER), abs=1e-9)
    site = site_in(folder)
    for receipt in after_a_loss:  # another server may still echo an earlier one
        require_current(site, asking(receipt))
    charge(site.ledger, 6)
    issued(site)
    require_current(site, asking(after_a_loss[0]))
    assert site.ledger.verify() == []
    assert not plan_recovery(HospitalFolder(folder)).is_needed


def test_a_receipt_from_the_operator_does_where_none_is_here(after_a_loss, folder, tmp_path):
    shutil.rmtree(folder / "state" / "receipts")
    assert not plan_recovery(HospitalFolder(folder)).is_needed  # nothing here can tell
    (tmp_path / "north.receipt").write_bytes(after_a_loss[-1])
    result = command(folder, "--receipt", str(tmp_path / "north.receipt"), "--yes")
    assert result.exit_code == 0, result.output
    assert site_wide(site_in(folder).ledger) == pytest.approx(
        cost(EVENT, EVENT, EVENT, OTHER, OTHER), abs=1e-9
    )


@pytest.mark.parametrize("lost", ["a part", "everything"])
def test_a_newer_receipt_that_comes_later_is_charged_once(after_a_loss, folder, lost):
    shutil.rmtree(folder / "state" / "receipts")
    if lost == "everything":
        (folder / "ledger" / "ledger.sqlite").unlink()
    recover(folder, further=after_a_loss[:1])
    with pytest.raises(LedgerError):
        require_current(site_in(folder), asking(after_a_loss[-1]))
    ledger = recover(folder)  # what the server echoed was kept
    assert site_wide(ledger) == pytest.approx(cost(EVENT, EVENT, EVENT, OTHER, OTHER), abs=1e-9)
    require_current(site_in(folder), asking(after_a_loss[0]))


def test_a_receipt_of_somebody_else_is_not_taken(after_a_loss, folder, tmp_path):
    other = site_in(tmp_path / "other")
    with pytest.raises(ConfigError, match="no receipt of this ledger"):
        plan_recovery(HospitalFolder(folder), further=[issue(other.ledger)])


def test_without_yes_nothing_changes(after_a_loss, folder):
    before = (folder / "ledger" / "ledger.sqlite").read_bytes()
    result = command(folder)
    assert result.exit_code == 1
    assert "2 charge(s)" in result.output
    assert "a receipt proves 5 charge(s)" in result.output
    assert "say --yes" in result.output
    assert (folder / "ledger" / "ledger.sqlite").read_bytes() == before


def test_beside_a_running_client_nothing_is_recovered(after_a_loss, folder):
    before = (folder / "ledger" / "ledger.sqlite").read_bytes()
    with site_lock(folder / "state", name=CLIENT_LOCK):
        result = command(folder, "--yes")
    assert result.exit_code == 2
    assert "the client is running" in result.output
    assert (folder / "ledger" / "ledger.sqlite").read_bytes() == before


def test_a_second_older_copy_needs_no_second_charge(after_a_loss, folder, tmp_path):
    recover(folder)
    receipts = folder / "state" / "receipts"
    assert len(list(receipts.iterdir())) == 1  # those that were made good are gone, the new ledger's stands
    put_back(tmp_path / "backup", folder / "ledger")
    with pytest.raises(LedgerError, match="older copy"):
        require_current(site_in(folder), asking())
    ledger = recover(folder)
    assert site_wide(ledger) == pytest.approx(cost(EVENT, EVENT, EVENT, OTHER, OTHER), abs=1e-9)


def test_a_branch_that_went_on_from_an_older_copy_pays_for_both(after_a_loss, folder):
    branch = site_in(folder).ledger
    for number in (13, 14, 15, 16):
        charge(branch, number, event=OTHER)
    ledger = recover(folder)
    lost, own = [EVENT, OTHER, OTHER], [EVENT] * 2 + [OTHER] * 4
    assert site_wide(ledger) == pytest.approx(cost(*lost, *own), abs=1e-9)


def test_lost_training_without_privacy_is_not_forgotten(site, folder, tmp_path):
    charge(site.ledger, 1)
    shutil.copytree(site.ledger.folder, tmp_path / "backup")
    charge(site.ledger, 2, event=None)
    issued(site)
    put_back(tmp_path / "backup", site.ledger.folder)
    spent = recover(folder).spent(DELTA)
    assert spent.private is False
    assert spent.epsilon == pytest.approx(cost(EVENT), abs=1e-9)


def test_a_charge_whose_answer_is_gone_is_closed(site, folder, tmp_path):
    charge(site.ledger, 1, sealed=False)
    shutil.copytree(site.ledger.folder, tmp_path / "backup")
    site.ledger.mark_sealed(key(1), "a" * 64)
    issued(site)
    put_back(tmp_path / "backup", site.ledger.folder)
    ledger = recover(folder)
    assert ledger.find(key(1)).sealed_sha256 == LOST
    assert site_wide(ledger) == cost(EVENT)
    with pytest.raises(LedgerError, match="another sealed answer"):
        ledger.mark_sealed(key(1), "b" * 64)


def test_answers_in_the_outbox_are_sent_again(site, folder, tmp_path):
    outbox = Outbox(folder / "state" / "outbox")
    answers = {n: SealedAnswer(delta={"w": np.full(3, n, np.float32)}, metrics={"steps": n}) for n in (1, 2)}
    charge(site.ledger, 1, sealed=False)
    shutil.copytree(site.ledger.folder, tmp_path / "backup")
    for number, answer in answers.items():
        charge(site.ledger, number, sealed=False)
        outbox.seal(key(number), answer)
        site.ledger.mark_sealed(key(number), answer.digest)
        issued(site)
    put_back(tmp_path / "backup", site.ledger.folder)
    with pytest.raises(LedgerError, match="without a charge"):
        Ledger.open(site.ledger.folder).mark_sealed(key(2), answers[2].digest)
    ledger = recover(folder)
    ledger.mark_sealed(key(1), answers[1].digest)  # its charge is in the backup
    ledger.mark_sealed(key(2), answers[2].digest)  # its charge is part of the recovery
    assert ledger.find(key(1)).sealed_sha256 == answers[1].digest
    assert site_wide(ledger) == pytest.approx(cost(EVENT, EVENT), abs=1e-9)


def test_without_receipts_only_the_whole_budget_is_enough(site, folder):
    charge(site.ledger, 1)
    (folder / "ledger" / "ledger.sqlite").write_bytes(b"gone")
    shutil.rmtree(folder / "state", ignore_errors=True)
    result = command(folder, "--yes")
    assert result.exit_code == 2
    assert "--whole-budget" in result.output
    assert (folder / "ledger" / "ledger.sqlite").read_bytes() == b"gone"
    result = command(folder, "--whole-budget", "--yes")
    assert result.exit_code == 0, result.output
    ledger = Ledger.open(folder / "ledger", create=False)
    assert ledger.verify() == []
    assert BUDGET < ledger.spent(DELTA).epsilon < 1.02 * BUDGET
    faint = PrivacyEvent(sampling_rate=1, noise_multiplier=500.0, steps=1)
    for composition in ("site", "patient"):
        with pytest.raises(BudgetError):
            ledger.charge(
                key(2),
                event=faint,
                cohort=ledger.cohort(["new"]),
                delta=DELTA,
                limit=BUDGET,
                composition=composition,
            )
    (aside,) = (folder / "ledger").glob("lost-*")
    assert (aside / "ledger.sqlite").read_bytes() == b"gone"


def test_a_destroyed_database_is_rebuilt_from_the_newest_receipt(site, folder):
    charge(site.ledger, 1)
    charge(site.ledger, 2, event=OTHER)
    issued(site)
    content = bytearray((folder / "ledger" / "ledger.sqlite").read_bytes())
    content[len(content) // 2] ^= 4
    (folder / "ledger" / "ledger.sqlite").write_bytes(content)
    ledger = recover(folder)
    assert ledger.site_key == site.ledger.site_key  # patients are recognised, the validation split stays
    assert site_wide(ledger) == pytest.approx(cost(EVENT, OTHER), abs=1e-9)
    require_current(site_in(folder), asking())


@pytest.mark.parametrize("gone", ["site.key", "everything"])
def test_a_lost_site_key_is_a_fresh_ledger_with_the_whole_budget_spent(site, folder, gone):
    charge(site.ledger, 1)
    old = issued(site)
    if gone == "site.key":
        (folder / "ledger" / "site.key").unlink()
    else:
        shutil.rmtree(folder / "ledger")
    result = command(folder, "--yes")
    assert result.exit_code == 2
    assert "without site.key no receipt can be read" in result.output
    ledger = recover(folder, whole_budget=True)
    assert ledger.site_key != site.ledger.site_key
    assert ledger.spent(DELTA).epsilon > BUDGET
    require_current(site_in(folder), asking(old))  # of the lost key: not ours any more, and ignored
    assert list((folder / "state" / "receipts").glob("lost-*/*"))


def test_a_ledger_made_anew_by_mistake_is_noticed_and_recovered(site, folder):
    charge(site.ledger, 1)
    issued(site)
    shutil.rmtree(folder / "ledger")
    fresh = site_in(folder)
    with pytest.raises(LedgerError, match="not the ledger"):
        require_current(fresh, asking())
    with pytest.raises(LedgerError, match="nothing tells"):
        plan_recovery(HospitalFolder(folder))
    recover(folder, whole_budget=True)
    require_current(site_in(folder), asking())


def test_killed_while_files_are_exchanged_the_folder_is_refused(site, folder, monkeypatch):
    import client.ledger.recovery

    charge(site.ledger, 1)
    (folder / "ledger" / "site.key").unlink()
    real, done = client.ledger.recovery.os.replace, []

    for most in range(3):
        done.clear()

        def replace(source, target, most=most):
            if str(target).startswith(str(folder / "ledger")):
                if len(done) == most:
                    raise KeyboardInterrupt
                done.append(target)
            real(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(client.ledger.recovery.os, "replace", replace)
            hospital = HospitalFolder(folder)
            with pytest.raises(KeyboardInterrupt):
                carry_out(plan_recovery(hospital, whole_budget=True), hospital)
        with pytest.raises(LedgerError):
            Ledger.open(folder / "ledger")
    assert recover(folder, whole_budget=True).spent(DELTA).epsilon > BUDGET


def test_a_ledger_in_use_or_of_another_release_is_no_case_for_a_recovery(site, folder, monkeypatch):
    charge(site.ledger, 1)
    monkeypatch.setattr("client.ledger.store.SCHEMA_VERSION", 2)
    with pytest.raises(LedgerError, match="schema"):
        plan_recovery(HospitalFolder(folder), whole_budget=True)
