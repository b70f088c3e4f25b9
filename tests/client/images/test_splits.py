import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.images.splits import keyed_choice, keyed_share, splits_of_units

KEY = b"k" * 32
NAMES = ("train", "validation", "test")


@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(NAMES)), max_size=30))
def test_a_unit_goes_whole_to_the_strictest_of_its_splits(rows):
    seen = {}
    for unit, split in rows:
        seen.setdefault(unit, set()).add(split)
    strictest = [max(seen.get(unit, {"train"}), key=NAMES.index) for unit in range(7)]
    units = np.array([unit for unit, _ in rows], np.int64)
    found, torn = splits_of_units(units, [split for _, split in rows], num_units=7)
    assert [split or "train" for split in found] == strictest
    assert torn == sum(len(splits) > 1 for splits in seen.values())


def test_a_patient_in_two_splits_never_trains_and_tests(manifest, read):
    rows = [
        ("a.png", "ill", "p1", "train"),
        ("b.png", "ill", "p1", "test"),
        ("c.png", "normal", "p2", "train"),
        ("d.png", "normal", "p2", "val"),
        ("e.png", "ill", "p3", "train"),
        ("f.png", "normal", "p3", "train"),
    ]
    images = read(manifest(("path", "label", "patient", "split"), rows))
    assert (images.train.unit_ids, images.validation.unit_ids, images.test.unit_ids) == (
        ("p3",),
        ("p2",),
        ("p1",),
    )
    assert (images.train.num_rows, images.validation.num_rows, images.test.num_rows) == (2, 2, 2)
    assert images.units_in_several_splits == 2


def test_the_same_picture_in_train_and_test_only_tests(tmp_path, draw, read):
    for name, number in (("a", 1), ("b", 2), ("c", 3)):
        draw(tmp_path / "train" / "ill" / f"{name}.png", number)
        draw(tmp_path / "train" / "normal" / f"{name}.png", number + 10)
    draw(tmp_path / "test" / "ill" / "z.bmp", 2, format="BMP")
    images = read(tmp_path)
    assert (images.train.num_rows, images.test.num_rows) == (5, 2)
    assert not set(images.train.unit_ids) & set(images.test.unit_ids)


def test_nobody_changes_side_when_the_data_grow():
    few = [f"p{n}" for n in range(50)]
    many = [f"p{n}" for n in range(500)]
    chosen = dict(zip(many, keyed_choice(many, share=0.3, key=KEY), strict=True))
    assert keyed_choice(few, share=0.3, key=KEY).tolist() == [chosen[unit] for unit in few]
    assert 110 < sum(chosen.values()) < 190  # 150 expected, standard deviation 10
    other = keyed_choice(many, share=0.3, key=b"x" * 32)
    assert 150 < (other == np.array(list(chosen.values()))).sum() < 400


def test_a_larger_share_only_adds():
    units = [f"p{n}" for n in range(200)]
    small, large = (keyed_choice(units, share=share, key=KEY) for share in (0.1, 0.4))
    assert not (small & ~large).any()
    assert all(0 <= keyed_share(unit, KEY) < 1 for unit in units)


def scans(count):
    return [(f"{n}.png", ("ill", "normal")[n % 2], f"p{n // 2}") for n in range(count)]


def test_patients_are_kept_for_validation_whole_and_for_good(manifest, read):
    header = ("path", "label", "patient")
    before = read(manifest(header, scans(40)), validation_share=0.4, key=KEY)
    after = read(manifest(header, scans(60)), validation_share=0.4, key=KEY)
    assert before.validation.num_rows == 2 * before.validation.num_units > 0
    assert set(before.validation.unit_ids) <= set(after.validation.unit_ids)
    assert set(before.train.unit_ids) <= set(after.train.unit_ids)
    assert before.train.num_units + before.validation.num_units == 20


def test_a_named_validation_split_is_respected(manifest, read):
    rows = [(*row, "val" if row[2] == "p0" else "train") for row in scans(12)]
    images = read(manifest(("path", "label", "patient", "split"), rows), validation_share=0.9, key=KEY)
    assert images.validation.unit_ids == ("p0",)


def test_test_patients_never_become_validation(manifest, read):
    rows = [(*row, "test" if int(row[2][1:]) < 10 else "train") for row in scans(40)]
    images = read(manifest(("path", "label", "patient", "split"), rows), validation_share=0.5, key=KEY)
    assert images.test.unit_ids == tuple(f"p{n}" for n in range(10))
    assert images.validation.num_units > 0


def test_a_share_without_a_secret_is_a_mistake_of_the_caller(manifest, read):
    with pytest.raises(ValueError, match="split_key"):
        read(manifest(("path", "label", "patient"), scans(4)), validation_share=0.5)
