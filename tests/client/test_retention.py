"""What is kept for longer than the hospital says goes; what somebody may still need never does."""

import json
import os
import time

import pytest
from typer.testing import CliRunner

from client.approval.approvals import Approvals
from client.cli import app
from client.deployment.hospital_folder import HospitalFolder
from client.ledger.ledger import Ledger
from client.retention import purge_at_start
from client.site_lock import CLIENT_LOCK, site_lock
from common import messages
from common.messages import refusal_code
from tests.client.small_hospital import (
    ask,
    everything_in,
    make_hospital,
    make_plan,
    training_request,
)

pytestmark = pytest.mark.usefixtures("flower_identity")
DAY = 86_400


@pytest.fixture
def trained(tmp_path):
    toml = make_hospital(tmp_path / "north")
    for run in ("old", "going-on"):
        for number in (1, 2):
            ask(toml, training_request(run_id=run, round_number=number))
    models = toml.parent / "state" / "models"
    for run in ("old", "going-on"):
        (models / run).mkdir(parents=True)
        (models / run / "model.safetensors").write_bytes(b"weights")
    return toml


def purge(toml, *arguments):
    result = CliRunner().invoke(app, ["purge", str(toml.parent), "--format", "json", *arguments])
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads(result.stdout)["removed"]


def kinds(removed):
    return sorted(entry["kind"] for entry in removed)


def age(path, days):
    then = time.time() - days * DAY
    os.utime(path, (then, then))


def answers_of(toml, run):
    from client.outbox import run_prefix

    return sorted((toml.parent / "state" / "outbox").glob(f"{run_prefix(run)}-*"))


def test_nothing_goes_that_is_young(trained):
    assert purge(trained) == []
    assert purge(trained, "--dry-run") == []


def test_answers_go_with_their_whole_run_and_never_while_it_goes_on(trained):
    for path in [*answers_of(trained, "old"), answers_of(trained, "going-on")[0]]:
        age(path, 31)
    kept = answers_of(trained, "going-on")
    assert kinds(purge(trained, "--dry-run")) == ["answer", "answer"]
    assert len(answers_of(trained, "old")) == 2
    assert kinds(purge(trained)) == ["answer", "answer"]
    assert answers_of(trained, "old") == []
    assert answers_of(trained, "going-on") == kept
    before = Ledger.examine(trained.parent / "ledger").charges()
    assert refusal_code(ask(trained, training_request(run_id="going-on", round_number=2))) is None
    assert Ledger.examine(trained.parent / "ledger").charges() == before


def test_an_answer_of_the_last_two_days_stays_whatever_the_setting(trained):
    words = trained.read_text()
    assert "outbox-days = 30.0" in words
    trained.write_text(words.replace("outbox-days = 30.0", "outbox-days = 0.001"))
    for path in answers_of(trained, "going-on"):
        age(path, 1)
    assert "answer" not in kinds(purge(trained))


def test_decoded_images_go_when_no_run_has_used_them_and_are_decoded_again(tmp_path):
    from PIL import Image

    films = tmp_path / "films"
    for number, label in enumerate(("negative", "positive") * 3):
        (films / label).mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 12), 20 * number).save(films / label / f"{number}.png")
    toml = make_hospital(tmp_path / "north", data=str(films))
    request = training_request(make_plan(data={"unit": "image"}))
    ask(toml, request)
    entries = list((toml.parent / "cache" / "decoded-images").glob("*.json"))
    assert len(entries) == 1
    age(entries[0], 91)
    (gone,) = purge(toml)
    assert gone["kind"] == "decoded images"
    assert list((toml.parent / "cache" / "decoded-images").iterdir()) == []


def test_using_decoded_images_keeps_them(tmp_path):
    from client.images.cache import DecodeCache, Decoded
    from common.preprocessing import Preprocessing

    cache = DecodeCache(tmp_path, Preprocessing(image_size=8, channels=1), max_pixels=100)
    path, pixels = cache.allocate(1)
    cache.commit(path, ["content"], Decoded(pixels=pixels, digests=("x",), failures={}))
    (entry,) = cache.folder.glob("*.json")
    age(entry, 91)
    assert cache.load(["content"]) is not None
    assert time.time() - entry.stat().st_mtime < 60


def test_old_lines_of_logs_go_with_what_belongs_to_them_and_the_others_stay(trained):
    state = trained.parent / "state"
    now = time.time()
    stamps = [time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now - days * DAY)) for days in (400, 1)]
    entries = [f"{stamp}.123 [policy] refused {n}\n  because\n" for n, stamp in enumerate(stamps)]
    (state / "hospital.log").write_text("".join(entries))
    audit = [json.dumps({"time": now - days * DAY, "what": "update"}) + "\n" for days in (500, 366, 364)]
    (state / "audit.jsonl").write_text("".join(audit))
    assert kinds(purge(trained)) == ["log lines", "log lines"]
    assert (state / "hospital.log").read_text() == entries[1]
    assert (state / "audit.jsonl").read_text() == audit[2]
    assert {(state / name).stat().st_mode & 0o777 for name in ("hospital.log", "audit.jsonl")} == {0o600}


def test_logs_are_left_alone_while_the_client_runs_and_trimmed_at_its_next_start(trained):
    state = trained.parent / "state"
    old = json.dumps({"time": time.time() - 400 * DAY}) + "\n"
    (state / "audit.jsonl").write_text(old)
    with site_lock(state, name=CLIENT_LOCK):
        assert purge(trained) == []
        hospital = HospitalFolder(trained.parent)
        (gone,) = purge_at_start(hospital.kept, hospital.config.retention)
    assert gone.kind == "log lines"
    assert (state / "audit.jsonl").read_text() == ""


def test_models_go_after_their_time_and_approved_plans_never_by_age(trained):
    state = trained.parent / "state"
    for path in (state / "models" / "old" / "model.safetensors", state / "models" / "old"):
        age(path, 3651)
    approvals = Approvals(state, hospital=state.parent)
    for run in ("approved", "waiting"):
        key = messages.Envelope.from_record(training_request(run_id=run).content).key
        approvals.ask(key, make_plan(), "nobody has approved this run")
    word = {"rounds": 4, "epsilon": 1.0, "evaluations": 1, "evaluation_epsilon": 1.0}
    approvals.approve(approvals.known("approved"), **word)
    for path in (state / "approvals").rglob("*"):
        age(path, 500)
    assert kinds(purge(trained)) == ["approval", "model"]
    assert sorted(path.name for path in (state / "models").iterdir()) == ["going-on"]
    assert approvals.approval("approved") is not None
    assert approvals.known("waiting") is None


def test_one_run_goes_as_a_whole_but_not_while_it_may_go_on_and_the_ledger_stays(trained):
    charges = Ledger.examine(trained.parent / "ledger").charges()
    result = CliRunner().invoke(app, ["purge", str(trained.parent), "--run", "old"])
    assert result.exit_code != 0
    for path in answers_of(trained, "old"):
        age(path, 3)
    assert kinds(purge(trained, "--run", "old")) == ["answer", "answer", "model"]
    assert answers_of(trained, "old") == []
    assert len(answers_of(trained, "going-on")) == 2
    assert (trained.parent / "state" / "models" / "going-on").is_dir()
    assert Ledger.examine(trained.parent / "ledger").charges() == charges


def test_leftovers_of_killed_processes_go_after_a_day(trained):
    outbox = trained.parent / "state" / "outbox"
    for name, days in ((".a.safetensors.1.tmp", 2), (".b.safetensors.2.tmp", 0)):
        (outbox / name).write_bytes(b"half")
        age(outbox / name, days)
    assert kinds(purge(trained)) == ["leftover"]
    assert [path.name for path in outbox.glob("*.tmp")] == [".b.safetensors.2.tmp"]


def test_everything_in_a_hospitals_folder_is_its_owners_only(tmp_path):
    """Whatever the umask: a run, an approval, a refusal, an update that waits."""
    before = os.umask(0)
    try:
        toml = make_hospital(tmp_path / "north", approval="update")
        toml.chmod(0o600)
        mine = set(toml.parent.rglob("*"))
        ask(toml, training_request())
        assert CliRunner().invoke(app, ["approve", str(toml.parent), "run"]).exit_code == 0
        ask(toml, training_request(ttl=3.0))
        assert CliRunner().invoke(app, ["approve", str(toml.parent), "run", "--round", "1"]).exit_code == 0
        assert everything_in(ask(toml, training_request()))["arrays"]
    finally:
        os.umask(before)
    made = set(toml.parent.rglob("*")) - mine
    assert any(path.suffix == ".safetensors" for path in made)
    wide = {
        str(path.relative_to(toml.parent)): oct(path.stat().st_mode & 0o777)
        for path in made
        if path.stat().st_mode & 0o777 != (0o700 if path.is_dir() else 0o600)
    }
    assert wide == {}
