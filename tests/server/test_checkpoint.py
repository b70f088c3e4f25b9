import json
import resource
import shutil
from dataclasses import replace

import numpy as np
import pytest

from common.errors import CheckpointError
from server.checkpoint import restore_newest, write_checkpoint
from server.run_state import RunState
from server.server_optimizer import OptimizerState
from server.totals import HospitalTotals, OpenQuestion
from tests.server.fake_federation import some_parameters


def state_after(round_number: int) -> RunState:
    return RunState(
        run_id="study-1",
        round_number=round_number,
        weights=some_parameters(round_number, 1),
        plan={"federation.rounds": 9, "data.classes": '["no", "yes"]'},
        optimizer=OptimizerState(
            first_moment=some_parameters(round_number, 2), second_moment=some_parameters(round_number, 3)
        ),
        average=some_parameters(round_number, 4),
        hospitals={"a": some_totals(round_number)},
        wall_s=1.5 * round_number,
    )


def some_totals(round_number: int) -> HospitalTotals:
    question = OpenQuestion(key=f"1/{round_number}/ab", asked=1.0, until=2.0)
    totals = HospitalTotals(enrolled_patients=100, rounds=round_number, epsilon=0.5, open=(question,))
    return totals.released(question, None, planned_steps=2)


def assert_equal_states(first: RunState, second: RunState) -> None:
    arrays = ("weights", "average")
    for name in arrays:
        assert_equal_arrays(getattr(first, name), getattr(second, name))
    assert_equal_arrays(first.optimizer.first_moment, second.optimizer.first_moment)
    assert_equal_arrays(first.optimizer.second_moment, second.optimizer.second_moment)
    rest = {"weights": {}, "average": {}, "optimizer": OptimizerState()}
    assert replace(first, **rest) == replace(second, **rest)


def assert_equal_arrays(first, second):
    assert {k: (v.shape, v.tobytes()) for k, v in first.items()} == {
        k: (v.shape, v.tobytes()) for k, v in second.items()
    }


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        write_checkpoint(tmp_path / "checkpoints", state_after(number), keep=3)
    return tmp_path / "checkpoints"


def test_the_newest_comes_back_as_it_was_and_only_the_newest_are_kept(folder):
    assert_equal_states(restore_newest(folder), state_after(3))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]
    files = sorted(path.name for path in (folder / "3").iterdir())
    assert files == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def test_a_plain_run_has_an_empty_optimizer_file(tmp_path):
    state = replace(state_after(1), optimizer=OptimizerState(), average={})
    write_checkpoint(tmp_path, state, keep=2)
    assert_equal_states(restore_newest(tmp_path), state)


def test_without_checkpoints_there_is_nothing_to_restore(tmp_path):
    assert restore_newest(tmp_path / "checkpoints") is None


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty_manifest(file):
    file.with_name("manifest.json").write_text('{"files": {}}')


def other_model(file):
    """A whole checkpoint folder by its manifest, but put together from two rounds."""
    from common.files import write_manifest

    shutil.copy(file.parents[1] / "2" / "model.safetensors", file.with_name("model.safetensors"))
    write_manifest(file.parent, ["model.safetensors", "optimizer.safetensors", "state.json"])


DAMAGES = {
    "flipped bit": flip,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-5]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
    "no manifest": lambda file: file.with_name("manifest.json").unlink(),
    "manifest of nothing": empty_manifest,
    "manifest is a list": lambda file: file.with_name("manifest.json").write_text("[]"),
    "files is a list": lambda file: file.with_name("manifest.json").write_text('{"files": []}'),
    "model of another round": other_model,
}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_gives_the_one_before_and_says_so(folder, caplog, name, damage):
    DAMAGES[damage](folder / "3" / name)
    assert_equal_states(restore_newest(folder), state_after(2))
    assert "checkpoint 3 is passed over" in caplog.text


def test_two_damaged_ones_give_the_third(folder):
    flip(folder / "3" / "model.safetensors")
    flip(folder / "2" / "state.json")
    assert restore_newest(folder).round_number == 1


def test_only_damaged_ones_are_an_error_not_a_new_start(folder):
    for number in (1, 2, 3):
        flip(folder / str(number) / "state.json")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        restore_newest(folder)


def test_a_pickle_named_like_a_model_is_not_loaded(folder, tmp_path):
    import pickle

    from common.files import write_manifest

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (folder / "3" / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    write_manifest(folder / "3", ["model.safetensors", "optimizer.safetensors", "state.json"])
    assert restore_newest(folder).round_number == 2
    assert not (tmp_path / "exploded").exists()


def test_a_round_done_again_replaces_its_damaged_checkpoint(folder):
    flip(folder / "3" / "model.safetensors")
    write_checkpoint(folder, state_after(3), keep=3)
    assert_equal_states(restore_newest(folder), state_after(3))


def test_leftovers_of_a_killed_server_are_removed(folder):
    leftover = folder / ".4.123.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert restore_newest(folder).round_number == 3
    assert not leftover.exists()


def test_a_full_disk_leaves_the_older_checkpoints_as_they_were(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    large = replace(state_after(4), weights={"w": np.zeros(10_000, np.float32)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the kernel refuses the write half-way
    try:
        with pytest.raises(CheckpointError, match="round 4"):
            write_checkpoint(folder, large, keep=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]
    assert restore_newest(folder).round_number == 3


def test_another_schema_is_not_read(folder):
    from common.files import write_manifest

    file = folder / "3" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 2}))
    write_manifest(folder / "3", ["model.safetensors", "optimizer.safetensors", "state.json"])
    assert restore_newest(folder).round_number == 2
