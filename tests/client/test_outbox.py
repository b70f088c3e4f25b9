"""A round key has one sealed answer, sent again byte for byte."""

import numpy as np
import pytest

from client.outbox import Outbox, SealedAnswer
from common.errors import LedgerError
from common.messages import RoundKey
from common.parameters import to_record


def key(round_number=1, model_hash="a" * 64, run_id="run"):
    return RoundKey(run_id=run_id, attempt=1, round_number=round_number, model_hash=model_hash)


def answer(seed=0):
    rng = np.random.default_rng(seed)
    delta = {
        "weight": rng.normal(size=(3, 2)).astype(np.float32),
        "bias": rng.normal(size=2).astype(np.float32),
    }
    return SealedAnswer(delta=delta, metrics={"num-examples": 40, "training-started": 1.5})


def test_a_sealed_answer_comes_back_byte_for_byte(tmp_path):
    sealed = answer()
    Outbox(tmp_path / "outbox").seal(key(), sealed)
    found = Outbox(tmp_path / "outbox").find(key())
    assert found.metrics == sealed.metrics
    assert list(found.delta) == list(sealed.delta)
    sent, sent_again = to_record(sealed.delta), to_record(found.delta)
    assert sent["parameters"].data == sent_again["parameters"].data


@pytest.mark.parametrize("other", [key(2), key(model_hash="b" * 64), key(run_id="other")])
def test_another_key_has_no_answer(tmp_path, other):
    outbox = Outbox(tmp_path)
    outbox.seal(key(), answer())
    assert outbox.find(other) is None


def test_an_altered_answer_is_not_sent(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.seal(key(), answer())
    (file,) = tmp_path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(LedgerError, match="altered"):
        outbox.find(key())


def altered(file, old, new):
    """The same file with other words of the same length in its header."""
    content = file.read_bytes()
    assert content.count(old) == 1
    assert len(old) == len(new)
    file.write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'\\"num-examples\\": 40', b'\\"num-examples\\": 41'),
        (b'\\"training-started\\": 1.5', b'\\"training-started\\": 2.5'),
        (b"[3.25, 0.0]", b"[3.75, 0.0]"),
    ],
)
def test_an_altered_scalar_or_count_is_not_sent(tmp_path, old, new):
    outbox = Outbox(tmp_path)
    sealed = SealedAnswer(delta=answer().delta, metrics=answer().metrics, counts={"scores": [3.25, 0.0]})
    outbox.seal(key(), sealed)
    assert outbox.find(key()).digest == sealed.digest
    (file,) = tmp_path.glob("*.safetensors")
    altered(file, old, new)
    with pytest.raises(LedgerError, match="altered"):
        outbox.find(key())


def test_the_digest_covers_update_scalars_and_counts():
    plain = answer()
    others = [
        SealedAnswer(delta=answer(1).delta, metrics=plain.metrics),
        SealedAnswer(delta=plain.delta, metrics={**plain.metrics, "num-examples": 41}),
        SealedAnswer(delta=plain.delta, metrics=plain.metrics, counts={"confusion": [1.0]}),
    ]
    assert len({plain.digest, *(other.digest for other in others)}) == 4
    assert plain.sha256 == others[1].sha256 == others[2].sha256 != others[0].sha256


def test_counts_have_a_seal_of_their_own_beside_the_update_of_the_same_key(tmp_path):
    outbox = Outbox(tmp_path)
    counts = SealedAnswer(delta={}, metrics={"epsilon": 0.1}, counts={"scores": [0.1 + 0.2, -1e-9, 3e8]})
    outbox.seal(key(), answer())
    outbox.seal(key(), counts, purpose="evaluation")
    assert outbox.find(key(), purpose="evaluation") == counts
    assert outbox.find(key()).sha256 == answer().sha256
    assert outbox.find(key(2), purpose="evaluation") is None


def test_only_the_owner_reads_answers(tmp_path):
    outbox = Outbox(tmp_path / "outbox")
    outbox.seal(key(), answer())
    assert (tmp_path / "outbox").stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in (tmp_path / "outbox").iterdir())


def test_answers_of_rounds_long_past_are_forgotten(tmp_path):
    outbox = Outbox(tmp_path)
    for number in range(1, 9):
        outbox.seal(key(number), answer(number))
    assert [number for number in range(1, 9) if outbox.find(key(number))] == [5, 6, 7, 8]
