import json
import os
import stat

import numpy as np
import pytest

import client.images.decode
import client.images.entries
import client.images.formats
from client.images.cache import FOLDER
from common.errors import DataError
from common.preprocessing import Preprocessing


@pytest.fixture
def hospital(tmp_path, draw):
    root = tmp_path / "data"
    for number in range(8):
        draw(root / ("ill" if number % 2 else "normal") / f"planted-name-{number}.png", number)
    (root / "labels.csv").write_text(
        "path,patient\n"
        + "".join(
            f"{'ill' if n % 2 else 'normal'}/planted-name-{n}.png,planted-patient-{n // 2}\n"
            for n in range(8)
        )
    )
    return root


@pytest.fixture
def decoded(monkeypatch):
    """Contents that were decoded, in order of the calls."""
    calls = []

    def counting(content, *args, **kwargs):
        calls.append(content)
        return client.images.formats.open_picture(content, *args, **kwargs)

    monkeypatch.setattr(client.images.entries, "open_picture", counting)
    return calls


def same(first, second):
    return (
        np.array_equal(first.inputs["image"], second.inputs["image"])
        and np.array_equal(first.targets, second.targets)
        and np.array_equal(first.units, second.units)
        and first.unit_ids == second.unit_ids
    )


def entry_files(cache):
    return sorted(cache.joinpath(FOLDER).iterdir())


def test_a_second_run_decodes_nothing_and_maps_the_file(tmp_path, hospital, read, decoded):
    cache = tmp_path / "cache"
    first = read(hospital, cache=cache)
    assert len(decoded) == 8
    second = read(hospital, cache=cache)
    assert len(decoded) == 8
    assert same(first.train, second.train)
    assert same(read(hospital).train, second.train)
    mapped = second.train.inputs["image"]
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable


def test_only_the_owner_may_look_and_no_name_is_inside(tmp_path, hospital, read):
    cache = tmp_path / "cache"
    previous = os.umask(0)
    try:
        read(hospital, cache=cache)
    finally:
        os.umask(previous)
    folders = [cache, cache / FOLDER]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700] * 2
    files = entry_files(cache)
    assert sorted(path.suffix for path in files) == [".json", ".npy"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    for path in files:
        assert len(path.stem) == 64
        assert b"planted" not in path.read_bytes()


def test_a_wide_open_cache_folder_is_closed(tmp_path, hospital, read):
    (tmp_path / "cache" / FOLDER).mkdir(parents=True, mode=0o777)
    read(hospital, cache=tmp_path / "cache")
    assert stat.S_IMODE((tmp_path / "cache" / FOLDER).stat().st_mode) == 0o700


def test_a_cache_folder_that_is_a_link_or_a_file_is_refused(tmp_path, hospital, read):
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache" / FOLDER).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(DataError, match="cache folder"):
        read(hospital, cache=tmp_path / "cache")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cache folder"):
        read(hospital, cache=tmp_path / "file")


def test_the_key_is_content_not_name_time_or_place(tmp_path, hospital, read, decoded):
    cache = tmp_path / "cache"
    first = read(hospital, cache=cache)
    hospital.rename(tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*.png"):
        os.utime(path, (1, 1))
    assert same(read(tmp_path / "moved", cache=cache).train, first.train)
    assert len(decoded) == 8


def test_changed_content_under_the_same_name_and_time_is_decoded_again(
    tmp_path, hospital, read, draw, pixels
):
    cache = tmp_path / "cache"
    read(hospital, cache=cache)
    path = hospital / "normal" / "planted-name-0.png"
    before = path.stat()
    draw(path, 70)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    shown = read(hospital, cache=cache).train.inputs["image"]
    assert any(np.array_equal(image[0], pixels(70)) for image in shown)
    assert not any(np.array_equal(image[0], pixels(0)) for image in shown)


def test_another_preprocessing_is_another_entry(tmp_path, hospital, read, decoded):
    cache = tmp_path / "cache"
    assert read(hospital, cache=cache).train.inputs["image"].shape[1:] == (1, 12, 12)
    assert read(hospital, cache=cache, size=9).train.inputs["image"].shape[1:] == (1, 9, 9)
    assert read(hospital, cache=cache, channels=3).train.inputs["image"].shape[1:] == (3, 12, 12)
    assert len(decoded) == 24
    assert len(entry_files(cache)) == 6


def test_only_what_is_new_is_decoded_and_the_old_entry_goes(tmp_path, hospital, read, draw, decoded):
    cache = tmp_path / "cache"
    read(hospital, cache=cache)
    draw(hospital / "ill" / "a-new.png", 40)
    with (hospital / "labels.csv").open("a") as table:
        table.write("ill/a-new.png,somebody\n")
    grown = read(hospital, cache=cache)
    assert len(decoded) == 9
    assert len(entry_files(cache)) == 2
    assert same(grown.train, read(hospital).train)


def test_equal_files_are_decoded_once(tmp_path, hospital, read, decoded):
    original = (hospital / "ill" / "planted-name-1.png").read_bytes()
    for number in range(3):
        (hospital / "ill" / f"copy-{number}.png").write_bytes(original)
    (hospital / "labels.csv").unlink()
    images = read(hospital)
    assert len(decoded) == 8
    assert (images.train.num_rows, images.train.num_units, images.repeated_images) == (11, 8, 3)


def test_a_failure_is_remembered_too(tmp_path, hospital, read, decoded):
    (hospital / "labels.csv").unlink()
    (hospital / "ill" / "broken.png").write_text("no picture")
    cache = tmp_path / "cache"
    for _ in range(2):
        assert len(read(hospital, cache=cache, max_skipped_share=0.5).skipped) == 1
    assert len(decoded) == 9


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def swap_count(path):
    index = json.loads(path.read_text())
    index["pictures"] = index["pictures"][:-1]
    path.write_text(json.dumps(index))


DAMAGE = {
    "flipped bit": (".npy", flip),
    "cut array": (".npy", cut),
    "empty array": (".npy", lambda path: path.write_bytes(b"")),
    "no array": (".npy", lambda path: path.unlink()),
    "cut index": (".json", cut),
    "foreign index": (".json", lambda path: path.write_text("[1, 2]")),
    "short index": (".json", swap_count),
    "no index": (".json", lambda path: path.unlink()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_noticed_and_made_again(tmp_path, hospital, read, decoded, damage):
    suffix, spoil = DAMAGE[damage]
    cache = tmp_path / "cache"
    intact = read(hospital, cache=cache)
    intact_pixels = intact.train.inputs["image"].copy()
    spoil(next(path for path in entry_files(cache) if path.suffix == suffix))
    again = read(hospital, cache=cache)
    assert len(decoded) == 16
    assert np.array_equal(again.train.inputs["image"], intact_pixels)
    read(hospital, cache=cache)
    assert len(decoded) == 16
    assert len(entry_files(cache)) == 2


def test_a_crash_while_decoding_leaves_no_entry(tmp_path, hospital, read, monkeypatch):
    cache = tmp_path / "cache"

    def crash(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(client.images.entries, "open_picture", crash)
        with pytest.raises(MemoryError):
            read(hospital, cache=cache)
    assert entry_files(cache) == []
    assert read(hospital, cache=cache).train.num_rows == 8


def test_a_file_that_changes_while_it_is_read_stops_the_run(tmp_path, hospital, read, draw, monkeypatch):
    honest = client.images.decode.read_content

    def changing(path, **limits):
        draw(hospital / "ill" / "planted-name-1.png", 80)
        return honest(path, **limits)

    monkeypatch.setattr(client.images.entries, "read_content", changing)
    with pytest.raises(DataError, match="changed while"):
        read(hospital, cache=tmp_path / "cache")
    assert entry_files(tmp_path / "cache") == []


def test_large_arrays_go_through_the_cache_as_well(tmp_path, read, monkeypatch):
    big = np.random.default_rng(0).integers(0, 256, (6, 40, 40), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train_images=big, train_labels=np.arange(6) % 2)
    cache = tmp_path / "cache"
    first = read(tmp_path / "a.npz", cache=cache)
    assert len(entry_files(cache)) == 2
    fitted = read(tmp_path / "a.npz").train
    with monkeypatch.context() as patch:
        patch.delattr(Preprocessing, "fit_array")
        second = read(tmp_path / "a.npz", cache=cache)
    assert isinstance(second.train.inputs["image"], np.memmap)
    assert same(first.train, second.train)
    assert same(fitted, second.train)
