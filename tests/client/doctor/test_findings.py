"""Every finding: a planted fault is found and named, and sound films raise nothing."""

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import generate_uid

from client.doctor.examination import _label
from client.doctor.mixtures import follows_class
from common.checks import CheckState
from tests.client.doctor.films import by_name, checkup, film, save, save_dicom, sound, write_table

WARNING, NOTE, OK = CheckState.WARNING, CheckState.NOTE, CheckState.OK


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "films").mkdir()
    return tmp_path / "films"


def found(folder, rows, **settings):
    return by_name(checkup(write_table(folder, rows), **settings))


def planted(folder, write, **settings):
    """Findings about sound films and what `write(folder)` adds, rows without the columns that all have."""
    rows = sound(folder)
    for number, extra in enumerate(write(folder)):
        rows.append({"label": "ill", "patient": f"x{number}", "split": "train", **extra})
    return found(folder, rows, **settings)


def test_sound_films_raise_nothing(folder):
    findings = checkup(write_table(folder, sound(folder, 120))).findings()
    assert {finding.severity for finding in findings} == {OK}
    assert [finding.name for finding in findings if finding.advice or finding.files] == []


def test_sound_dicom_raises_nothing(folder):
    rows = [{**row, "path": f"{number}.dcm"} for number, row in enumerate(sound(folder, 80))]
    for number in range(80):
        save_dicom(
            folder / f"{number}.dcm",
            film(number),
            Modality="DX",
            ViewPosition="PA",
            PatientOrientation=["L", "F"],
            PixelSpacing=[0.2, 0.2],
            BurnedInAnnotation="NO",
            PatientIdentityRemoved="YES",
            PatientName="Anonymous",
            SeriesInstanceUID=generate_uid(),
        )
    findings = checkup(write_table(folder, rows)).findings()
    assert [f.name for f in findings if f.severity is not OK] == []
    said = {finding.name: finding.result for finding in findings}
    assert said["pixel spacing"] == "0.2 mm"
    assert (said["view"], said["modality"], said["bit depth"]) == ("PA", "DX", "8 bits")
    assert said["patient orientation"] == "L\\F 80"


def test_copies_across_patients_and_splits_are_leaks(folder):
    def write(folder):
        save(folder / "same.png", film(3))  # patient p3 trains
        save(folder / "again.jpg", film(8), quality=60)
        save(folder / "tests.bmp", film(10))
        return [{"path": "same.png"}, {"path": "again.jpg"}, {"path": "tests.bmp", "split": "test"}]

    said = planted(folder, write)
    assert said["repeated pictures"].severity is NOTE
    assert said["repeated pictures"].result == "2"
    assert said["repeated across patients"].severity is WARNING
    twins = {frozenset(("3.png", "same.png")), frozenset(("tests.bmp", "10.png"))}
    assert {frozenset(group) for group in said["repeated across patients"].files} == twins
    [group] = said["repeated across splits"].files
    assert set(group) == {"tests.bmp", "10.png"}
    [near] = said["near-duplicates across patients"].files
    assert set(near) == {"again.jpg", "8.png"}
    assert "leak" in said["repeated across splits"].advice
    assert "near-duplicates across splits" not in said


def test_copies_of_one_patient_are_a_note_and_no_leak(folder):
    def write(folder):
        save(folder / "same.png", film(3))
        save(folder / "again.jpg", film(8), quality=60)
        return [{"path": "same.png", "patient": "p3"}, {"path": "again.jpg", "patient": "p8"}]

    said = planted(folder, write)
    assert said["repeated pictures"].severity is NOTE
    assert said["near-duplicates"].severity is NOTE
    assert [name for name in said if "across" in name] == []


def test_without_patients_a_near_duplicate_is_a_unit_of_its_own(folder):
    for number in range(60):
        save(folder / ("ill", "normal")[number % 2] / f"{number}.png", film(number))
    save(folder / "ill" / "again.jpg", film(8), quality=60)
    said = by_name(checkup(folder))
    assert said["near-duplicates"].severity is WARNING
    assert [set(group) for group in said["near-duplicates"].files] == [{"ill/again.jpg", "ill/8.png"}]


@pytest.mark.parametrize(
    ("name", "picture", "severity"),
    [
        ("blank pictures", np.zeros((64, 64), np.uint8), WARNING),
        ("blank pictures", np.full((64, 64), 130, np.uint8), WARNING),
        ("low contrast", (film(5) // 20 + 100).astype(np.uint8), NOTE),
        ("inverted", 255 - film(5), WARNING),
    ],
)
def test_pictures_that_show_nothing_or_the_opposite(folder, name, picture, severity):
    def write(folder):
        save(folder / "odd.png", picture)
        return [{"path": "odd.png"}]

    said = planted(folder, write)
    assert said[name].severity is severity
    assert said[name].files == (("odd.png",),)


def test_the_rule_for_negatives_leaves_ct_and_colour_models_alone(folder):
    def write(folder):
        save_dicom(folder / "ct.dcm", 255 - film(5), Modality="CT")
        return [{"path": "ct.dcm"}]

    assert planted(folder, write)["inverted"].severity is OK
    save(folder / "odd.png", 255 - film(5))
    rows = [*sound(folder), {"path": "odd.png", "label": "ill", "patient": "x", "split": "train"}]
    assert found(folder, rows, channels=3)["inverted"].result.startswith("not looked for")


def test_orientation_is_compared(folder):
    def write(folder):
        save(folder / "wide.png", np.asarray(Image.fromarray(film(0)).resize((90, 64))))
        turned = Image.Exif()
        turned[0x0112] = 6
        save(folder / "turned.jpg", film(1)[:, ::-1], exif=turned)
        save_dicom(folder / "side.dcm", film(2)[::-1], ViewPosition="LL", PatientOrientation=["A", "F"])
        mirrored = {"ViewPosition": "PA", "PatientOrientation": ["R", "F"]}
        save_dicom(folder / "mirrored.dcm", film(3)[:, ::-1], **mirrored)
        extra = []
        for number in range(200, 203):
            upright = {"ViewPosition": "PA", "PatientOrientation": ["L", "F"]}
            save_dicom(folder / f"{number}.dcm", film(number), **upright)
            extra.append({"path": f"{number}.dcm"})
        for number in range(300, 320):
            tall = np.asarray(Image.fromarray(film(number)).resize((64, 80)))
            save(folder / f"{number}.png", tall)
            extra.append({"path": f"{number}.png"})
        names = ("wide.png", "turned.jpg", "side.dcm", "mirrored.dcm")
        return [*({"path": name} for name in names), *extra]

    said = planted(folder, write)
    assert said["landscape and portrait"].severity is WARNING
    assert said["landscape and portrait"].files == (("wide.png",),)
    assert said["EXIF orientation"].files == (("turned.jpg",),)
    assert said["view"].severity is WARNING
    assert said["view"].files == (("side.dcm",),)
    assert said["patient orientation"].severity is WARNING
    assert said["patient orientation"].files == (("mirrored.dcm",),)


def test_depth_colours_and_spacing_are_compared(folder):
    def write(folder):
        deep = (film(70).astype(np.uint16) << 4) + 5
        save_dicom(folder / "deep.dcm", deep, BitsStored=12, HighBit=11, PixelSpacing=[0.6, 0.6])
        common = {"ImagerPixelSpacing": [0.2, 0.2], "PhotometricInterpretation": "MONOCHROME1"}
        save_dicom(folder / "inverse.dcm", 255 - film(71), **common)
        save_dicom(folder / "oblong.dcm", film(72), PixelSpacing=[0.2, 0.3])
        return [{"path": "deep.dcm"}, {"path": "inverse.dcm"}, {"path": "oblong.dcm"}]

    said = planted(folder, write)
    assert said["bit depth"].severity is NOTE
    assert said["bit depth"].result == "8 bits 62, 12 bits 1"
    assert said["bit depth"].files == (("deep.dcm",),)
    assert "MONOCHROME1 1" in said["colours"].result
    assert said["inverted"].severity is OK  # a reader turns MONOCHROME1 round
    assert said["pixel spacing"].severity is WARNING
    assert said["pixel spacing"].result.startswith("0.2 to 0.6 mm; 60 do not say; pixels of 1 are not square")
    assert {name for (name,) in said["pixel spacing"].files} == {"deep.dcm", "oblong.dcm"}


def test_a_mixture_that_tells_the_class_is_a_warning(folder):
    rows = sound(folder)
    for row in rows:
        if row["label"] == "ill":
            number = int(row["path"].split(".")[0])
            row["path"] = f"{number}.jpg"
            save(folder / row["path"], np.stack([film(number)] * 3, axis=-1))
    said = found(folder, rows)
    assert said["colours"].severity is WARNING
    assert "tells the class" in said["colours"].result
    assert said["bit depth"].severity is OK


def test_how_far_a_column_tells_the_class():
    labels = ["ill"] * 30 + ["well"] * 30
    assert follows_class(["a"] * 30 + ["b"] * 30, labels) == pytest.approx(1.0)
    assert follows_class(["a", "b"] * 30, labels) == pytest.approx(0.0)
    # 27 of 30 against 3 of 30: phi = (27 * 27 - 3 * 3) / (30 * 30)
    assert follows_class(["a"] * 27 + ["b"] * 30 + ["a"] * 3, labels) == pytest.approx(0.8)
    assert follows_class(["a"] * 5 + ["b"] * 5, labels[25:35]) == 0.0  # too few to say


@pytest.mark.parametrize(
    ("numbers", "promised", "words"),
    [
        (range(1, 6), None, ""),
        (range(1, 6), 5, ""),
        (range(1, 6), 8, "1 have fewer"),
        (range(4, 9), None, "in 1 the first"),
        ([1, 2, 3, 5, 6], None, "in 1 numbers are missing"),
    ],
)
@pytest.mark.parametrize("as_folder", [True, False])
def test_slices_lost_at_the_ends(folder, numbers, promised, words, as_folder):
    series = generate_uid()
    rows = sound(folder, 4)
    for place, number in enumerate(numbers):
        more = {} if promised is None else {"ImagesInAcquisition": promised}
        save_dicom(
            folder / "ct" / f"{place}.dcm",
            film(90 + place),
            SeriesInstanceUID=series,
            InstanceNumber=number,
            ImagePositionPatient=[0, 0, 5.0 * place],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            **more,
        )
        if not as_folder:
            rows.append({"path": f"ct/{place}.dcm", "label": "ill", "patient": "x", "split": "train"})
    if as_folder:
        rows.append({"path": "ct", "label": "ill", "patient": "x", "split": "train"})
    said = found(folder, rows)["ends of series"]
    assert said.severity is (NOTE if words else OK)
    assert words in said.result
    assert bool(said.files) == bool(words)


def test_labels_are_held_against_the_federations_classes(folder):
    rows = sound(folder, 60)
    rows[0]["label"], rows[1]["label"], rows[2]["label"] = "NORMAL", "pneumonai", "metal"
    said = found(folder, rows, classes=("normal", "ill", "pneumonia"), max_skipped_share=0.5)["labels"]
    assert said.severity is WARNING
    assert "unknown: pneumonai 1, metal 1" in said.result or "unknown: metal 1, pneumonai 1" in said.result
    assert "NORMAL -> normal" in said.result
    assert "no image of: pneumonia" in said.result
    assert "pneumonai -> pneumonia" in said.advice
    assert "metal ->" not in said.advice


def test_labels_that_no_class_knows_at_all_are_still_explained(folder):
    rows = [{**row, "label": "il"} for row in sound(folder, 6)]
    said = found(folder, rows)
    assert said["images"].severity is CheckState.FAILED
    assert "il -> ill" in said["labels"].advice


def test_spellings_of_one_label_are_noticed_without_a_federation(folder):
    rows = sound(folder, 60)
    rows[0]["label"] = "Normal"
    said = found(folder, rows, classes=None)["labels"]
    assert said.severity is WARNING
    assert "Normal and normal" in said.result
    assert found(folder, sound(folder, 60), classes=None)["labels"].severity is OK


def test_an_array_is_examined_too(tmp_path):
    images = np.stack([film(number) for number in range(60)])
    images[7] = 255 - images[7]
    images[9] = 0
    again = np.clip(images[20] * 0.9, 0, 255).astype(np.uint8)
    labels = np.arange(60) % 2
    np.savez(
        tmp_path / "chest.npz",
        train_images=images,
        train_labels=labels,
        test_images=again[None],
        test_labels=labels[:1],
    )
    said = by_name(checkup(tmp_path / "chest.npz", size=64, classes=None))
    assert said["inverted"].files == (("train_images[7]",),)
    assert said["blank pictures"].files == (("train_images[9]",),)
    assert set(said["near-duplicates across splits"].files[0]) == {"train_images[20]", "test_images[0]"}
    assert "bit depth" not in said


def test_the_labels_of_a_row_may_be_several():
    assert _label(np.int64(1), ("normal", "ill")) == "ill"
    assert _label(np.array([1, 0, 1]), ("a", "b", "c")) == "a + c"
