"""The release certificate: what it says, that it cannot be altered, and the command that checks it."""

import json
import os
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from client.certificate import certificate_content
from client.cli import app
from client.ledger.ledger import Ledger
from common import messages
from common.errors import RefusalCode
from common.files import manifest_problem
from common.messages import RoundKey, refusal_code
from common.node_keys import load_private_key, load_public_key, make_key
from common.parameters import parameters_sha256, write_safetensors
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from common.settings import to_nested
from common.statements import sign_statement, verify_statement
from tests.client.small_hospital import ask, charges, make_hospital, make_plan, training_request, weights_of
from tests.client.test_closing import RUN, closing

ROUNDS = 3


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """A hospital that has answered three rounds of RUN, and one of another run, and has got the model."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    toml = make_hospital(tmp_path_factory.mktemp("hospital") / "north")
    for number in range(1, ROUNDS + 1):
        assert messages.ARRAYS in ask(toml, training_request(run_id=RUN, round_number=number))
    assert messages.ARRAYS in ask(toml, training_request(run_id="another-run"))
    ask(toml, closing_with_privacy())
    return toml


def closing_with_privacy(outsider=0.25, **more):
    description = {
        "spec": to_nested(make_plan().model_spec),
        "privacy": {"hospitals": {"north": {"epsilon_outsider": outsider}}},
    }
    return closing(description=json.dumps(description), **more)


def file_of(toml, run=RUN):
    return toml.parent / "state" / "models" / run / "certificate.json"


def verify(*arguments):
    done = CliRunner().invoke(app, ["certificate", "verify", *map(str, arguments), "--format", "json"])
    return done.exit_code, json.loads(done.stdout) if done.stdout.startswith("{") else done


def wrong(answer):
    return [check["part"] for check in answer["checks"] if not check["ok"]]


def refuted(answer):
    return [check["part"] for check in answer["checks"] if check["ok"] is False]


def test_it_says_what_was_done_in_this_run_and_what_it_cost(hospital):
    statement = verify_statement(file_of(hospital).read_text())
    content = statement.content
    assert statement.kind == "release-certificate"
    key = load_public_key(hospital.parent / "keys" / "hospital.key.pub")
    assert statement.fingerprint == key.fingerprint
    assert (content["hospital"], content["run_id"]) == ("north", RUN)
    assert content["model"] == {"name": "softmax", "sha256": parameters_sha256(weights_of(make_plan()))}
    assert (content["claims_privacy"], content["is_complete"]) == (True, True)
    assert (content["rounds_answered"], content["unit"]) == (ROUNDS, "patient")
    training = content["training"]
    assert training["events"] == [
        {"sampling_rate": 0.5, "noise_multiplier": 2.0, "l2_clip_norm": 1.0, "steps": 2 * ROUNDS}
    ]
    exact = epsilon(
        [PrivacyEvent(sampling_rate=0.5, noise_multiplier=2.0, steps=2 * ROUNDS)], delta=training["delta"]
    )
    assert exact <= training["epsilon"] <= exact * 1.005
    assert training["epsilon"] == max(c.epsilon for c in charges(hospital) if c.key.run_id == RUN)
    assert content["outsider"] == {"stated_by": "server", "epsilon": 0.25}
    assert content["evaluation"] is None
    assert content["neighbouring_relation"] == "add or remove one unit"


def test_it_tells_nothing_of_other_runs_or_of_the_true_number_of_patients(hospital):
    text = file_of(hospital).read_text()
    assert "another-run" not in text
    ledger = Ledger.open(hospital.parent / "ledger", create=False)
    total = ledger.spent(1 / 300)
    assert total.epsilon > max(run.epsilon for run in total.runs)
    numbers = json.dumps(verify_statement(text).content)
    assert f"{total.epsilon:.4f}"[:5] not in numbers
    assert total.patients == 24
    assert ": 24" not in numbers


def test_asked_again_it_is_the_same_bytes_and_the_model_has_its_hash(hospital):
    before = file_of(hospital).read_bytes()
    receipt = ask(hospital, closing_with_privacy())["receipt"]
    assert receipt["certificate"].encode() == before == file_of(hospital).read_bytes()
    folder = file_of(hospital).parent
    assert manifest_problem(folder, required=["certificate.json", "model.safetensors"]) is None
    assert file_of(hospital).stat().st_mode & 0o077 == 0
    assert (hospital.parent / "keys" / "hospital.key").stat().st_mode & 0o077 == 0


def test_another_word_of_the_server_gives_another_certificate(tmp_path, flower_identity):
    toml = make_hospital(tmp_path / "north")
    ask(toml, training_request(run_id=RUN))
    for stated, kept in ((0.25, 0.25), (0.5, 0.5), ("low", None), (-1, None), (True, None)):
        text = ask(toml, closing_with_privacy(stated))["receipt"]["certificate"]
        assert verify_statement(text).content["outsider"]["epsilon"] == kept
        assert file_of(toml).read_text() == text


def test_a_model_is_kept_also_where_the_key_cannot_be_used(tmp_path, flower_identity):
    toml = make_hospital(tmp_path / "north")
    ask(toml, training_request(run_id=RUN))
    key = toml.parent / "keys" / "hospital.key"
    make_key(key, key.with_name("hospital.key.pub"), comment="north")
    os.chmod(key, 0o644)
    answer = ask(toml, closing_with_privacy())
    assert refusal_code(answer) is None
    assert answer["receipt"]["certificate"] == ""
    assert not file_of(toml).exists()
    assert manifest_problem(file_of(toml).parent, required=["model.safetensors"]) is None
    assert "can be read by others" in (toml.parent / "state" / "hospital.log").read_text()


def test_the_key_in_use_signs_whatever_lies_in_the_folder(tmp_path, flower_identity):
    toml = make_hospital(tmp_path / "north")
    ask(toml, training_request(run_id=RUN))
    for place in ("keys", "state/secrets"):
        private = toml.parent / place / "hospital.key"
        make_key(private, private.with_name("hospital.key.pub"), comment="north")
    text = ask(toml, closing_with_privacy())["receipt"]["certificate"]
    in_use = load_public_key(toml.parent / "state" / "secrets" / "hospital.key.pub")
    assert verify_statement(text).fingerprint == in_use.fingerprint


def test_without_privacy_it_claims_none(tmp_path, flower_identity):
    toml = make_hospital(tmp_path / "north", allow_non_private=True)
    for federation in ({"private": False}, {"reproducible": True}):
        run_id = f"{RUN}-{next(iter(federation))}"
        ask(toml, training_request(make_plan(federation=federation), run_id=run_id))
        content = verify_statement(
            ask(toml, closing_with_privacy(run_id=run_id))["receipt"]["certificate"]
        ).content
        assert content["claims_privacy"] is False
        assert "no privacy is claimed" in content["claim"]
        assert content["training"] is content["evaluation"] is content["outsider"] is None
        code, answer = verify(file_of(toml, run_id))
        assert (code, answer["ok"]) == (3, None)


def test_patients_that_came_later_do_not_show(tmp_path):
    """With other patients in each round the worst one has spent less; the certificate states the whole."""
    ledger = Ledger.open(tmp_path / "ledger")
    event = PrivacyEvent(sampling_rate=0.5, noise_multiplier=2.0, steps=2)
    for number, ids in enumerate((["a", "b"], ["b", "c"], ["c"]), start=1):
        key = RoundKey(run_id=RUN, attempt=1, round_number=number, model_hash=f"{number:064x}")
        ledger.charge(key, event=event, cohort=ledger.cohort(ids), delta=1e-3, l2_clip_norm=1.0)
    content = certificate_content("north", run_id=RUN, model={}, charges=ledger.charges(), outsider=None)
    whole = epsilon([PrivacyEvent(sampling_rate=0.5, noise_multiplier=2.0, steps=6)], delta=1e-3)
    assert whole <= content["training"]["epsilon"] <= whole * 1.005
    assert content["rounds_answered"] == 0


def test_evaluations_are_certified_beside_training_since_other_patients_pay_for_them(tmp_path):
    ledger = Ledger.open(tmp_path / "ledger")
    steps = PrivacyEvent(sampling_rate=0.5, noise_multiplier=2.0, steps=2)
    counts = PrivacyEvent(sampling_rate=1.0, noise_multiplier=4.0, steps=1)
    for event, ids, purpose in ((steps, ["a"], "training"), (counts, ["v"], "evaluation")):
        key = RoundKey(run_id=RUN, attempt=1, round_number=1, model_hash="f" * 64)
        ledger.charge(key, event=event, cohort=ledger.cohort(ids), delta=1e-3, purpose=purpose)
    content = certificate_content("north", run_id=RUN, model={}, charges=ledger.charges(), outsider=None)
    for part, event in (("training", steps), ("evaluation", counts)):
        exact = epsilon([event], delta=1e-3)
        assert exact <= content[part]["epsilon"] <= exact * 1.005
        (listed,) = content[part]["events"]
        assert (listed["noise_multiplier"], listed["steps"]) == (event.noise_multiplier, event.steps)
    assert "counts" in content["evaluation"]["mechanism"]


def test_a_forgery_with_a_key_of_its_own_is_never_said_to_hold(hospital, tmp_path):
    key = tmp_path / "own.key"
    make_key(key, tmp_path / "own.key.pub", comment="x")
    content = verify_statement(file_of(hospital).read_text()).content
    forged = tmp_path / "certificate.json"
    forged.write_text(sign_statement(load_private_key(key), kind="release-certificate", content=content))
    assert verify(forged)[0] == 3
    assert verify(forged, "--key", hospital.parent / "keys" / "hospital.key.pub")[0] == 1


def test_after_a_recovery_no_epsilon_is_stated_that_may_be_too_low(hospital, tmp_path):
    ledger = Ledger.open(hospital.parent / "ledger", create=False)
    own = [charge for charge in ledger.charges() if charge.key.run_id == RUN]
    content = certificate_content(
        "north", run_id=RUN, model={}, charges=own, outsider=None, is_complete=False
    )
    assert content["training"]["epsilon"] is None
    assert "recovered" in content["training"]["no_epsilon_because"]
    assert "recovered" in content["claim"]
    assert content["training"]["events"][0]["steps"] == 2 * ROUNDS
    file, key = tmp_path / "certificate.json", hospital.parent / "keys" / "hospital.key"
    for stated in (None, 99.0):  # an older release stated one
        content["training"]["epsilon"] = stated
        file.write_text(sign_statement(load_private_key(key), kind="release-certificate", content=content))
        done = CliRunner().invoke(app, ["certificate", "verify", str(file), "--key", f"{key}.pub"])
        assert done.exit_code == 0
        assert "holds for what it lists" in done.stdout
        assert "The certificate holds" not in done.stdout
    content |= {"is_complete": True}
    content["training"]["epsilon"] = None
    file.write_text(sign_statement(load_private_key(key), kind="release-certificate", content=content))
    assert verify(file, "--key", f"{key}.pub")[0] == 1


def test_verify_needs_the_file_alone_and_compares_key_and_model(hospital, tmp_path):
    file, public = file_of(hospital), hospital.parent / "keys" / "hospital.key.pub"
    fingerprint = load_public_key(public).fingerprint
    model = file.with_name("model.safetensors")
    code, answer = verify(file)
    assert (code, answer["ok"], wrong(answer)) == (3, None, ["signer"])
    code, answer = verify(file, "--key", public, "--model", model)
    assert (code, answer["ok"], wrong(answer)) == (0, True, [])
    assert answer["certificate"]["fingerprint"] == fingerprint
    assert verify(file, "--fingerprint", fingerprint)[0] == 0
    words = CliRunner().invoke(app, ["certificate", "verify", str(file)])
    assert words.exit_code == 3
    for part in ("WHO signed was not checked", "training: epsilon", "not checked", "recomputed epsilon"):
        assert part in words.stdout
    assert "The certificate holds" not in words.stdout
    words = CliRunner().invoke(app, ["certificate", "verify", str(file), "--key", str(public)])
    assert (words.exit_code, words.stdout.splitlines()[-1]) == (0, "The certificate holds.")

    other = tmp_path / "other.key"
    make_key(other, tmp_path / "other.key.pub", comment="x")
    code, answer = verify(file, "--key", tmp_path / "other.key.pub")
    assert (code, wrong(answer)) == (1, ["signer"])
    write_safetensors(tmp_path / "model.safetensors", {"w": np.zeros(3, np.float32)})
    code, answer = verify(file, "--model", tmp_path / "model.safetensors")
    assert (code, refuted(answer)) == (1, ["model"])


@pytest.mark.parametrize(
    ("old", "new"),
    [(RUN, "another-run"), ('"steps": 6', '"steps": 5'), ("north", "south"), ("patient", "image")],
)
def test_one_changed_word_is_found(hospital, tmp_path, old, new):
    text = file_of(hospital).read_text()
    assert old in text
    altered = tmp_path / "certificate.json"
    altered.write_text(text.replace(old, new, 1))
    code, answer = verify(altered)
    assert (code, refuted(answer)) == (1, ["signature"])
    assert answer["certificate"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.5},
        {"events": []},
        {"events": [{"sampling_rate": 0.5, "noise_multiplier": 1e-9, "steps": 10**9}]},
        {"events": "none"},
        {"delta": 0},
        {"epsilon": "small"},
    ],
    ids=["epsilon", "no event", "wild", "shape", "delta", "text"],
)
def test_a_signed_lie_about_the_cost_is_found(hospital, tmp_path, change):
    """Signed with the right key: only recomputing shows that the epsilon is not that of the events."""
    key = load_private_key(hospital.parent / "keys" / "hospital.key")
    content = verify_statement(file_of(hospital).read_text()).content
    content["training"] |= change
    lie = tmp_path / "certificate.json"
    lie.write_text(sign_statement(key, kind="release-certificate", content=content))
    code, answer = verify(lie)
    assert (code, refuted(answer)) == (1, ["training"])


def test_another_kind_of_statement_is_no_certificate(hospital, tmp_path):
    key = load_private_key(hospital.parent / "keys" / "hospital.key")
    file = tmp_path / "certificate.json"
    file.write_text(sign_statement(key, kind="ledger", content={}))
    assert verify(file)[0] == 1


def test_a_file_that_is_not_there_ends_with_2(tmp_path, monkeypatch):
    from common.command_line import run_app

    for arguments in ([tmp_path / "none.json"], [tmp_path / "none.json", "--key", tmp_path / "none.pub"]):
        monkeypatch.setattr("sys.argv", ["flower-client", "certificate", "verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_app(app)
        assert ended.value.code == 2


def test_show_lists_what_this_hospital_signed(hospital):
    done = CliRunner().invoke(app, ["certificate", "show", str(hospital.parent)])
    assert done.exit_code == 0, done
    assert RUN in done.stdout
    assert "[{" not in done.stdout
    (shown,) = re.findall(r"training: epsilon (\S+) at", done.stdout)
    stated = verify_statement(file_of(hospital).read_text()).content["training"]["epsilon"]
    assert stated <= float(shown) <= stated * 1.001
    assert len(shown.replace(".", "").lstrip("0")) <= 4
    done = CliRunner().invoke(app, ["certificate", "show", str(hospital.parent), RUN, "--format", "json"])
    (shown,) = json.loads(done.stdout)
    assert shown["content"]["run_id"] == RUN
    nothing = CliRunner().invoke(app, ["certificate", "show", str(hospital.parent), "no-such-run"])
    assert nothing.exit_code != 0


def test_a_model_of_a_run_without_this_hospital_gets_no_certificate(hospital):
    answer = ask(hospital, closing_with_privacy(run_id="somebody-elses-run"))
    assert refusal_code(answer) is RefusalCode.POLICY
    assert not file_of(hospital, "somebody-elses-run").exists()
