"""Receipts: what a ledger held, readable by its own hospital only, and how a copy put back is noticed."""

import json
import shutil
import stat
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import RecordDict
from typer.testing import CliRunner

from client.deployment.hospital_folder import HospitalFolder
from client.hospital_log import FILE
from client.ledger import receipts
from client.ledger.ledger import Ledger
from client.ledger.receipt import (
    SIZE,
    Receipt,
    _packed,
    bound_of,
    events_of,
    issue,
    ledger_id,
    read,
    receipt_of_charges,
)
from client.ledger.receipts import KeptReceipts, check, issued, receipt_findings, require_current
from client.ledger.recovery import carry_out, plan_recovery
from client.ledger.starting_anew import start_anew
from client.ledger_commands import ledger_app
from client.site import _site
from common import messages
from common.errors import LedgerError, RefusalCode
from common.ledger_receipts import issuer_of
from common.messages import RoundKey
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from tests.client.small_hospital import ask, charges, make_hospital, training_request

DELTA = 1e-4
EVENT = PrivacyEvent(sampling_rate=1, noise_multiplier=12.0, steps=3)


def key(number, run_id="study"):
    return RoundKey(run_id=run_id, attempt=1, round_number=number, model_hash=f"m{number}")


def charge(ledger, number, *, event=EVENT, sealed=True, run_id="study"):
    cohort = ledger.cohort(["a", "b", "c"])
    ledger.charge(key(number, run_id), event=event, cohort=cohort, delta=DELTA)
    if sealed:
        ledger.mark_sealed(key(number, run_id), f"{number:064d}")


@pytest.fixture
def site(tmp_path):
    return site_in(tmp_path)


def site_in(folder):
    return SimpleNamespace(ledger=Ledger.open(folder / "ledger"), state_folder=folder / "state")


def asking(content: bytes = b"") -> SimpleNamespace:
    return SimpleNamespace(content=RecordDict(dict(messages.receipt_record(content))))


def put_back(copy, folder):
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)


def test_a_receipt_tells_what_the_ledger_holds(site):
    charge(site.ledger, 1)
    charge(site.ledger, 2)
    charge(site.ledger, 3, event=None, sealed=False)
    charges = site.ledger.charges()
    receipt = read(site.ledger.site_key, issue(site.ledger))
    assert receipt == receipt_of_charges(charges)
    assert (receipt.number, receipt.head, receipt.seals) == (3, charges[2].hash, 2)
    assert receipt.kinds == ((1.0, 12.0, 6),)
    assert (receipt.not_private, receipt.delta, receipt.purposes) == (1, DELTA, {"training": 3})


def test_size_and_bytes_of_a_receipt_tell_nothing(site):
    empty = issue(site.ledger)
    for number in range(1, 15):
        charge(site.ledger, number, event=PrivacyEvent(sampling_rate=1, noise_multiplier=9 + number, steps=1))
    full, again = issue(site.ledger), issue(site.ledger)
    assert len(empty) == len(full) == SIZE == messages.LARGEST_RECEIPT
    assert (
        sum(a == b for a, b in zip(full, again, strict=True)) < 200
    )  # of 16384; 64 by chance, and what is in clear
    assert site.ledger.charges()[-1].hash.encode() not in full
    assert messages.receipt_of(asking(full).content) == full


def test_too_many_kinds_are_bounded_from_above_and_the_size_stays():
    sigmas = sorted(np.random.default_rng(1).uniform(5, 8, 3000).tolist())
    receipt = Receipt(
        number=3000,
        head="f" * 64,
        seals=3000,
        heads={number: f"{number * 7919 % 2**61:016x}" for number in range(2489, 3001)},
        kinds=tuple((0.01, sigma, 1) for sigma in sigmas),
        not_private=0,
        delta=DELTA,
        purposes={"training": 3000},
    )
    body = _packed(receipt)
    packed = json.loads(zlib.decompress(body))
    assert len(body) <= SIZE
    assert len(packed["bounded"]) == 1
    assert len(packed["kinds"]) > 100
    stated = [*map(tuple, packed["kinds"]), *map(tuple, packed["bounded"])]
    assert sum(steps for _, _, steps in stated) == 3000
    some = tuple((0.01, sigma, 1) for sigma in sigmas[:4])
    least = epsilon(events_of(some), delta=DELTA)
    assert epsilon(events_of((bound_of(some),)), delta=DELTA) >= least


@pytest.mark.parametrize("change", ["flip", "cut", "longer", "unnamed", "rubbish"])
def test_what_is_not_ours_is_ignored_and_stops_nothing(site, tmp_path, change, caplog):
    charge(site.ledger, 1)
    content = bytearray(issue(site.ledger))
    other = site_in(tmp_path / "other")
    for number in range(1, 4):
        charge(other.ledger, number)
    if change == "flip":
        content[9000] ^= 1
    bad = {
        "flip": bytes(content),
        "cut": bytes(content[:-1]),
        "longer": bytes(content) + b"x",
        "unnamed": b"\0" + issue(other.ledger)[1:],
        "rubbish": b"\x00" * 100,
    }[change]
    assert read(site.ledger.site_key, bad) is None
    require_current(site, asking(bad))
    assert "ignored" in caplog.text
    assert KeptReceipts(site.state_folder, site.ledger.site_key).all() == []


def test_a_receipt_of_another_ledger_is_ignored_where_this_one_is_in_use(site, tmp_path, caplog):
    other = site_in(tmp_path / "other")
    charge(other.ledger, 1)
    foreign = issue(other.ledger)
    assert issuer_of(foreign) == ledger_id(other.ledger.site_key) != ledger_id(site.ledger.site_key)
    assert other.ledger.site_key[:8] not in foreign
    charge(site.ledger, 1)
    issued(site)
    before = sorted((site.state_folder / "receipts").iterdir())
    require_current(site, asking(foreign))
    assert "ignored" in caplog.text
    assert sorted((site.state_folder / "receipts").iterdir()) == before


def test_a_receipt_under_the_name_of_another_ledger_does_not_open(site):
    charge(site.ledger, 1)
    content = bytearray(issue(site.ledger))
    at = bytes(content).index(ledger_id(site.ledger.site_key))
    content[at] ^= 1
    assert read(site.ledger.site_key, bytes(content)) is None
    other = bytes(31) + b"k"
    content[at : at + 8] = ledger_id(other)
    assert read(other, bytes(content)) is None


@pytest.mark.parametrize("charged", [False, True])
def test_a_lost_ledger_is_noticed_by_the_servers_receipt_alone(site, tmp_path, charged):
    """Ledger and state folder are gone, or this ledger was never used here: nothing is forgotten."""
    charge(site.ledger, 1)
    old = issued(site)
    fresh = site_in(tmp_path / "anew")
    if charged:  # for another study, whose state folder is elsewhere
        charge(fresh.ledger, 1)
    with pytest.raises(LedgerError, match="receipt of another ledger") as caught:
        require_current(fresh, asking(old))
    assert caught.value.refusal is RefusalCode.LEDGER
    for words in ("restore", "--whole-budget", "--start-anew"):
        assert words in caught.value.fix
    assert not fresh.state_folder.exists()  # nothing is noted of what a server says
    require_current(fresh, asking())
    require_current(fresh, asking(bytes(SIZE)))


@pytest.mark.usefixtures("flower_identity")
def test_a_hospital_that_lost_everything_trains_once_a_person_has_decided(tmp_path):
    toml = make_hospital(tmp_path / "north")
    folder = toml.parent
    old = messages.receipt_record(messages.receipt_of(ask(toml, training_request())))
    for name in ("ledger", "state"):
        shutil.rmtree(folder / name)
    _site.cache_clear()  # a client that starts again
    request = training_request(round_number=2)
    request.content[messages.LEDGER_RECEIPT] = old[messages.LEDGER_RECEIPT]
    answer = ask(toml, request)
    assert messages.refusal_code(answer) is RefusalCode.LEDGER
    assert messages.ARRAYS not in answer
    assert charges(toml) == ()

    def command(*options):
        return CliRunner().invoke(ledger_app, ["recover", str(folder), "--start-anew", *options])

    assert command("--whole-budget").exit_code == 2
    shown = command()
    assert shown.exit_code == 1
    assert "no patient of this hospital's data was ever in another ledger" in shown.output
    assert messages.refusal_code(ask(toml, request)) is RefusalCode.LEDGER
    assert command("--yes").exit_code == 0
    assert messages.ARRAYS in ask(toml, request)
    again = command("--yes")
    assert (again.exit_code, len(charges(toml))) == (0, 1)
    assert "nothing to do" in again.output


def test_starting_anew_is_no_way_around_an_older_copy(tmp_path):
    make_hospital(tmp_path / "north")
    site = site_in(tmp_path / "north")
    charge(site.ledger, 1)
    shutil.copytree(site.ledger.folder, tmp_path / "monday")
    charge(site.ledger, 2)
    issued(site)
    put_back(tmp_path / "monday", site.ledger.folder)
    with pytest.raises(LedgerError, match="older copy"):
        start_anew(HospitalFolder(tmp_path / "north"))


def test_starting_anew_sets_another_ledgers_receipts_aside(tmp_path):
    make_hospital(tmp_path / "north")
    folder = tmp_path / "north"
    site = site_in(folder)
    charge(site.ledger, 1)
    issued(site)
    shutil.rmtree(site.ledger.folder)
    with pytest.raises(LedgerError, match="there is no ledger"):
        start_anew(HospitalFolder(folder))
    fresh = site_in(folder)
    with pytest.raises(LedgerError, match="not the ledger"):
        require_current(fresh, asking())
    start_anew(HospitalFolder(folder))
    require_current(fresh, asking())
    assert len(list((folder / "state" / "receipts").glob("lost-*/*.receipt"))) == 1
    assert fresh.ledger.charges() == ()


def test_the_newest_is_kept_for_the_owner_alone(site):
    for number in (1, 2, 3):
        charge(site.ledger, number)
        content = issued(site)
    (path,) = (site.state_folder / "receipts").iterdir()
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    require_current(site, asking(content))
    charge(site.ledger, 4)  # the ledger may be ahead of its receipts
    require_current(site, asking(content))


@pytest.mark.parametrize("where", ["kept here", "echoed by a server"])
def test_an_older_copy_put_back_is_refused_with_the_reason(site, tmp_path, where):
    charge(site.ledger, 1)
    issued(site)
    shutil.copytree(site.ledger.folder, tmp_path / "monday")
    charge(site.ledger, 2)
    newest = issued(site)
    put_back(tmp_path / "monday", site.ledger.folder)
    older = site_in(tmp_path)
    assert older.ledger.verify() == []  # in itself the copy is right
    if where != "kept here":
        shutil.rmtree(site.state_folder)
        require_current(older, asking())  # nothing tells it yet
    with pytest.raises(LedgerError) as caught:
        require_current(older, asking(newest if where != "kept here" else b""))
    assert caught.value.refusal is RefusalCode.LEDGER
    assert "older copy" in str(caught.value)
    assert "1 charge(s) are missing" in caught.value.why
    assert "ledger recover" in caught.value.fix
    # What a server echoed once is kept: the next message need not bring it.
    with pytest.raises(LedgerError):
        require_current(older, asking())
    (finding,) = receipt_findings(older.state_folder, older.ledger)
    assert finding.kind == "receipt"


@pytest.mark.parametrize("where", ["kept here", "echoed by a server"])
@pytest.mark.usefixtures("flower_identity")
def test_a_hospital_trains_nothing_on_an_older_copy(tmp_path, where):
    toml = make_hospital(tmp_path / "north")
    ask(toml, training_request())
    shutil.copytree(toml.parent / "ledger", tmp_path / "monday")
    answer = ask(toml, training_request(round_number=2))
    newest = messages.receipt_of(answer)
    assert len(newest) == SIZE
    put_back(tmp_path / "monday", toml.parent / "ledger")
    request = training_request(round_number=3)
    if where != "kept here":
        shutil.rmtree(toml.parent / "state" / "receipts")
        request.content[messages.LEDGER_RECEIPT] = messages.receipt_record(newest)[messages.LEDGER_RECEIPT]
    answer = ask(toml, request)
    assert messages.refusal_code(answer) is RefusalCode.LEDGER
    assert messages.ARRAYS not in answer
    assert [charge.key.round_number for charge in charges(toml)] == [1]
    assert "older copy" in (toml.parent / "state" / FILE).read_text()
    # What the hospital then does, and the round is trained.
    hospital = HospitalFolder(toml.parent)
    carry_out(plan_recovery(hospital), hospital)
    assert messages.ARRAYS in ask(toml, training_request(round_number=3))
    assert {charge.purpose for charge in charges(toml)} == {"training", "recovery"}
    assert Ledger.open(toml.parent / "ledger").verify() == []


@pytest.mark.usefixtures("flower_identity")
def test_a_forged_receipt_stops_no_round(tmp_path):
    toml = make_hospital(tmp_path / "north")
    request = training_request()
    request.content[messages.LEDGER_RECEIPT] = messages.receipt_record(bytes(SIZE))[messages.LEDGER_RECEIPT]
    assert messages.ARRAYS in ask(toml, request)


def test_a_copy_from_between_charge_and_seal_is_refused(site, tmp_path):
    charge(site.ledger, 1, sealed=False)
    shutil.copytree(site.ledger.folder, tmp_path / "monday")
    site.ledger.mark_sealed(key(1), "a" * 64)
    issued(site)
    put_back(tmp_path / "monday", site.ledger.folder)
    with pytest.raises(LedgerError, match="older copy") as caught:
        require_current(site_in(tmp_path), asking())
    assert "sealed" in caught.value.why


def test_a_copy_that_was_trained_on_has_forked(site, tmp_path):
    charge(site.ledger, 1)
    shutil.copytree(site.ledger.folder, tmp_path / "monday")
    charge(site.ledger, 2)
    receipt = read(site.ledger.site_key, issue(site.ledger))
    put_back(tmp_path / "monday", site.ledger.folder)
    forked = Ledger.open(site.ledger.folder)
    for number in (12, 13, 14):
        charge(forked, number)
    with pytest.raises(LedgerError) as caught:
        check(forked, receipt)
    assert "forked" in caught.value.why


def test_another_ledger_in_place_of_the_one_in_use_is_refused(site, tmp_path):
    charge(site.ledger, 1)
    issued(site)
    shutil.rmtree(site.ledger.folder)
    fresh = site_in(tmp_path)  # nothing inside the folder can tell that there was another
    with pytest.raises(LedgerError, match="not the ledger") as caught:
        require_current(fresh, asking())
    assert "recover" in caught.value.fix
    assert [finding.kind for finding in receipt_findings(fresh.state_folder, fresh.ledger)] == ["receipt"]


def test_a_damaged_receipt_here_says_nothing(site, caplog):
    charge(site.ledger, 1)
    issued(site)
    (path,) = (site.state_folder / "receipts").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    require_current(site, asking())
    assert "damaged" in caplog.text
    issued(site)
    assert len(KeptReceipts(site.state_folder, site.ledger.site_key).all()) == 1


def test_receipts_of_other_studies_on_the_same_ledger_agree(tmp_path):
    first = site_in(tmp_path)
    second = SimpleNamespace(ledger=Ledger.open(tmp_path / "ledger"), state_folder=tmp_path / "state-2")
    charge(first.ledger, 1)
    early = issued(first)
    charge(second.ledger, 1, run_id="other")
    late = issued(second)
    for site in (first, second):
        for echoed in (early, late):
            require_current(site, asking(echoed))
    assert receipts.read(first.ledger.site_key, late).purposes == {"training": 2}
