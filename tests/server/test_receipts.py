"""Ledger receipts at the server: kept per hospital as they came, echoed to it alone, never read."""

import stat

import pytest

from client.ledger.ledger import Ledger
from client.ledger.receipt import issue, ledger_id
from common import messages
from common.errors import RefusalCode
from common.ledger_receipts import ID_BYTES, MAGIC, issuer_of
from common.messages import Envelope
from tests.server.fake_federation import (
    FakeGrid,
    assert_same_bits,
    error_reply,
    fedavg_by_hand,
    in_round,
    make_config,
    model_of,
    outcomes,
    refuse,
    run,
    three_hospitals,
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def with_receipt(receipt=None, *, on_refusal=False):
    """Put a receipt beside the answer: by default one that names hospital and round."""

    def change(reply, request):
        if request.metadata.message_type != messages.TRAIN:
            return reply
        if on_refusal:
            reply = refuse(RefusalCode.POLICY)(reply, request)
        key = Envelope.from_record(request.content).key
        text = receipt or f"{request.metadata.dst_node_id}-{key.round_number}".encode()
        for name, record in messages.receipt_record(text).items():
            reply.content[name] = record
        return reply

    return change


def echoed(grid):
    """By hospital's node: what the questions of rounds 1, 2, 3 brought back."""
    asked = [message for message in grid.sent if message.metadata.message_type == messages.TRAIN]
    seen = {}
    for message in asked:
        seen.setdefault(message.metadata.dst_node_id, []).append(messages.receipt_of(message.content))
    return seen


def test_each_hospital_gets_back_its_own_last_one(folder):
    hospitals = three_hospitals(**{name: with_receipt() for name in "abc"})
    grid = FakeGrid(hospitals)
    run(make_config(folder), grid)
    assert echoed(grid) == {node: [b"", f"{node}-1".encode(), f"{node}-2".encode()] for node in hospitals}
    assert_same_bits(model_of(folder), fedavg_by_hand(hospitals.values(), 3))
    for path in (folder / "receipts").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {path.name for path in (folder / "receipts").iterdir()} == {f"{n}.receipt" for n in "abc"}


def test_refusals_bring_theirs_too_and_an_answer_without_one_keeps_the_last(folder):
    hospitals = three_hospitals(
        a=in_round(1, with_receipt()), b=with_receipt(on_refusal=True), c=with_receipt()
    )
    grid = FakeGrid(hospitals)
    run(make_config(folder), grid)
    assert outcomes(folder, 1)["b"] == ("refused", "policy")
    assert echoed(grid)[9] == [b"", b"9-1", b"9-2"]
    assert echoed(grid)[8] == [b"", b"8-1", b"8-1"]


def test_they_outlive_a_run_where_a_folder_is_named(folder, tmp_path):
    kept = {"receipts": str(tmp_path / "receipts")}
    run(
        make_config(folder, runtime={"expected-hospitals": 3, **kept}),
        FakeGrid(three_hospitals(**{name: with_receipt() for name in "abc"})),
    )
    grid = FakeGrid(three_hospitals())
    run(make_config(tmp_path / "next", runtime={"expected-hospitals": 3, **kept}), grid)
    assert echoed(grid) == {node: [f"{node}-3".encode()] * 3 for node in (7, 8, 9)}
    assert not (folder / "receipts").exists()


@pytest.mark.parametrize("size", [messages.LARGEST_RECEIPT, messages.LARGEST_RECEIPT + 1])
def test_a_receipt_is_bounded_and_one_that_is_none_costs_no_update(folder, size):
    grid = FakeGrid(three_hospitals(a=with_receipt(b"x" * size)))
    run(make_config(folder), grid)
    fits = size <= messages.LARGEST_RECEIPT
    assert (folder / "receipts" / "a.receipt").exists() is fits
    assert outcomes(folder, 1)["a"] == ("aggregated", None)


def test_nothing_is_kept_of_a_reply_that_is_not_the_hospitals_own(folder):
    def from_another(reply, request):
        reply.metadata.__dict__["_src_node_id"] = 999
        return with_receipt()(reply, request)

    def to_another_round(reply, request):
        record = reply.content[messages.ENVELOPE]
        record["round"] = 77
        return with_receipt()(reply, request)

    hospitals = three_hospitals(
        a=in_round(1, from_another), b=in_round(1, to_another_round), c=in_round(1, error_reply)
    )
    grid = FakeGrid(hospitals)
    run(make_config(folder), grid)
    assert list((folder / "receipts").iterdir()) == []


def test_a_full_disk_costs_no_round(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.receipts.write_bytes_atomically", full)
    grid = FakeGrid(three_hospitals(**{name: with_receipt() for name in "abc"}))
    run(make_config(folder), grid)
    assert outcomes(folder, 3)["a"] == ("aggregated", None)
    assert set(echoed(grid)[7]) == {b""}


def sealed(ledger, number):
    """A receipt as the ledger of this number would issue it, as far as anybody else can see."""
    head = MAGIC + bytes([ledger]) * ID_BYTES
    return head + bytes([number]) * (messages.LARGEST_RECEIPT - len(head))


def receipts_by_round(*receipts):
    def change(reply, request):
        number = Envelope.from_record(request.content).key.round_number
        return with_receipt(receipts[number - 1])(reply, request) if number else reply

    return change


def test_the_last_receipt_of_an_earlier_ledger_stays_beside(folder, caplog):
    lost_after_two = receipts_by_round(sealed(1, 1), sealed(1, 2), sealed(2, 3))
    there_and_back = receipts_by_round(sealed(3, 1), sealed(4, 2), sealed(3, 3))
    steady = receipts_by_round(sealed(5, 1), sealed(5, 2), sealed(5, 3))
    hospitals = three_hospitals(a=lost_after_two, b=there_and_back, c=steady)
    run(make_config(folder), FakeGrid(hospitals))
    kept = {path.name: path.read_bytes() for path in (folder / "receipts").iterdir()}
    assert kept == {
        "a.receipt": sealed(2, 3),
        f"a.{'01' * 8}.receipt": sealed(1, 2),
        "b.receipt": sealed(3, 3),
        f"b.{'03' * 8}.receipt": sealed(3, 1),
        f"b.{'04' * 8}.receipt": sealed(4, 2),
        "c.receipt": sealed(5, 3),
    }
    told = [r.getMessage().split(" goes on with another ledger")[0] for r in caplog.records]
    assert [name for name in told if name in "abc"] == ["b", "a", "b"]


def test_a_hospital_cannot_fill_the_disk_with_ever_new_ledgers(folder):
    new_each_time = receipts_by_round(*(sealed(number, number) for number in range(1, 41)))
    config = make_config(folder, federation={"rounds": 40})
    run(config, FakeGrid(three_hospitals(a=new_each_time)))
    assert len(list((folder / "receipts").glob("a.*.receipt"))) == 16
    assert (folder / "receipts" / "a.receipt").read_bytes() == sealed(40, 40)


def test_the_head_is_the_one_that_hospitals_write(tmp_path):
    issued = issue(Ledger.open(tmp_path / "ledger"))
    assert issuer_of(issued) == ledger_id(Ledger.open(tmp_path / "ledger").site_key)
    assert issuer_of(issued[:-1]) is issuer_of(b"x" * len(issued)) is None
