"""What says who a patient is: found where it was planted, and never in a byte of what is printed."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian
from typer.testing import CliRunner

from client.cli import app
from client.doctor.naming import are_names, identifying_columns, names_a_person
from client.doctor.profile import filled_in
from common.checks import CheckState
from tests.client.doctor.films import by_name, checkup, film, save, save_dicom, sound, write_table
from tests.planted_films import NAME, names_it
from tests.planted_films import write_folders as planted_folders
from tests.planted_films import write_table as planted_table

COMMAND = Path(sys.executable).with_name("flower-client")
WARNING, NOTE, OK = CheckState.WARNING, CheckState.NOTE, CheckState.OK


def call(*arguments):
    """Exit code and everything that the command prints."""
    done = CliRunner().invoke(app, ["check", *map(str, arguments)])
    return done.exit_code, done.output.encode()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "films").mkdir()
    return tmp_path / "films"


def found(folder, **elements):
    """Findings about sound films and one DICOM file with these elements."""
    save_dicom(folder / "one.dcm", film(99), **elements)
    row = {"path": "one.dcm", "label": "ill", "patient": "x", "split": "train"}
    return by_name(checkup(write_table(folder, [*sound(folder, 60), row])))


def test_a_name_in_a_header_is_found_at_any_depth_and_said_by_its_attribute(folder):
    item = Dataset()
    item.OtherPatientNames = NAME
    said = found(
        folder,
        PatientName=NAME,
        PatientBirthDate="19700101",
        ReferringPhysicianName=f"{NAME}^Dr",
        StudyDate="20200102",
        RequestAttributesSequence=[item],
    )
    direct = said["identifiers in headers"]
    assert direct.severity is WARNING
    assert direct.files == (("one.dcm",),)
    for keyword in ("PatientName", "PatientBirthDate", "ReferringPhysicianName", "OtherPatientNames"):
        assert f"{keyword} 1" in direct.result
    assert "StudyDate 1" in said["dates, places and free text in headers"].result


@pytest.mark.parametrize("blank", ["", "Anonymous", "ANON^", "REMOVED", "0000"])
def test_what_deidentification_leaves_behind_is_no_identifier(folder, blank):
    said = found(folder, PatientName=blank, PatientID=blank)
    assert said["identifiers in headers"].severity is OK


def test_a_file_marked_as_deidentified_is_a_note(folder):
    said = found(folder, PatientName="CASE 17", PatientIdentityRemoved="YES")
    assert said["identifiers in headers"].severity is NOTE


def test_private_elements_are_counted_without_being_read(folder):
    block = Dataset()
    block.add_new(0x00090010, "LO", "ACME")
    block.add_new(0x00091001, "LO", NAME)
    assert filled_in(block) == (set(), {"private elements"})


@pytest.mark.parametrize(
    ("elements", "severity", "words"),
    [
        ({"BurnedInAnnotation": "YES"}, WARNING, "BurnedInAnnotation is YES 1"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, NOTE, "secondary capture 1"),
        ({"Modality": "US"}, NOTE, "ultrasound 1"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, NOTE, "screen capture 1"),
        ({"ConversionType": "SD"}, NOTE, "digitised or captured 1"),
        ({"Modality": "US", "BurnedInAnnotation": "NO"}, OK, "no header says so"),
    ],
)
def test_signs_of_writing_in_the_picture(folder, elements, severity, words):
    said = found(folder, **elements)["burned-in annotations"]
    assert (said.severity, said.result) == (severity, words)


def test_faces_that_the_header_warns_of(folder):
    assert found(folder, RecognizableVisualFeatures="YES")["recognizable faces"].severity is WARNING
    assert "recognizable faces" not in found(folder, RecognizableVisualFeatures="NO")


def test_columns_of_identifiers_and_names_as_patient_ids(folder):
    rows = [{**row, "Date of Birth": "1970-01-01", "remark": f"seen by Dr{NAME}"} for row in sound(folder)]
    said = by_name(checkup(write_table(folder, rows)))["identifiers in the table"]
    assert said.severity is WARNING
    assert said.result == "column Date of Birth, 1 more column(s) with names or addresses"
    rows = [{**row, "patient": f"Doe, {'ABCDEFGH'[n % 8]}ohn {n}"} for n, row in enumerate(sound(folder))]
    said = by_name(checkup(write_table(folder, rows)))["identifiers in the table"]
    assert said.result == "the patient ids themselves"


def test_usual_columns_and_pseudonyms_are_none():
    columns = {"site": ["north"], "age": ["54"], "view": ["PA"], "filename": ["a.png"], "mrn": [""]}
    assert identifying_columns(columns) == ([], 0)
    assert not are_names(["p1", "patient-17", "NIH 00013", "a3f9", "test-IM-0001"])
    assert are_names(["Doe^John", "Roe^Jane", "17"])


@pytest.mark.parametrize("name", ["DOE^JOHN.dcm", "mrn 12345.png", "x/dob_1970/1.png", "patient_name.png"])
def test_names_of_files_that_name_somebody(name):
    assert names_a_person(name)


@pytest.mark.parametrize(
    "name", ["person1_virus.jpeg", "normal/IM-0001-0001.jpeg", "adobe.png", "birthmark.png"]
)
def test_names_of_files_that_name_nobody(name):
    assert not names_a_person(name)


def test_a_file_named_after_its_own_patient_is_found_and_hidden(folder):
    save_dicom(folder / "smithson-2.dcm", 255 - film(3), PatientName="Smithson^Mary")
    rows = [{"path": "smithson-2.dcm", "label": "ill", "patient": "x", "split": "train"}, *sound(folder, 60)]
    said = by_name(checkup(write_table(folder, rows)))
    assert said["names of files"].severity is WARNING
    assert said["names of files"].files == (("[name hidden].dcm (file 1)",),)
    assert said["inverted"].files == (("[name hidden].dcm (file 1)",),)


def test_a_file_named_after_its_row_of_the_table_is_hidden(folder):
    rows = [{**row, "surname": "Smithson"} for row in sound(folder, 60)]
    save(folder / "smithson_9.png", 255 - film(70))
    odd = {"path": "smithson_9.png", "label": "ill", "patient": "x", "split": "train", "surname": "Smithson"}
    said = by_name(checkup(write_table(folder, [*rows, odd])))
    assert said["inverted"].files == (("[name hidden].png (file 61)",),)
    assert said["names of files"].severity is WARNING


def test_a_name_is_no_part_of_a_problem(folder):
    rows = [{**row, "label": NAME} for row in sound(folder, 4)]
    findings = checkup(write_table(folder, rows)).findings()
    assert findings[0].severity is CheckState.FAILED
    assert not names_it(repr(findings).encode())
    missing = [{**row, "path": f"{NAME}.png"} for row in rows]
    assert not names_it(repr(checkup(write_table(folder, missing)).findings()).encode())


def write_canaries(folder):
    """A name wherever a header may have one, in files of all formats, and reasons to list each of them."""
    rows = sound(folder, 20)
    elements = {
        keyword: NAME
        for keyword in (
            *("PatientName", "PatientID", "OtherPatientIDs", "AccessionNumber", "StudyDescription"),
            *("Modality", "ViewPosition", "BodyPartExamined", "PatientComments", "InstitutionName"),
            *("ConversionType", "BurnedInAnnotation", "RecognizableVisualFeatures", "SeriesDescription"),
        )
    }
    elements |= {"PatientOrientation": [NAME, "F"], "ImageType": ["DERIVED", "SECONDARY", NAME]}
    elements |= {"SeriesInstanceUID": NAME, "StudyDate": NAME, "InstanceNumber": "3"}
    save_dicom(folder / "a.dcm", 255 - film(50), PixelSpacing=[0.1, 0.4], **elements)
    save_dicom(folder / "torn.dcm", film(51), **elements)
    (folder / "torn.dcm").write_bytes((folder / "torn.dcm").read_bytes()[:-40])
    number = "123456789.12345"
    odd = save_dicom(folder / "odd.dcm", film(52), WindowCenter=number, WindowWidth="9", **elements)
    odd.write_bytes(odd.read_bytes().replace(number.encode(), NAME.encode()))
    dataset = pydicom.dcmread(folder / "a.dcm")
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    pydicom.dcmwrite(folder / "deflated.dcm", dataset)
    words = PngImagePlugin.PngInfo()
    words.add_text("Author", NAME)
    save(folder / "a.png", film(53), pnginfo=words)
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = NAME
    exif[0x0112] = 3
    save(folder / "a.jpg", film(54), exif=exif, comment=NAME.encode())
    volume = nibabel.Nifti1Image(film(55)[..., None], np.diag([1.0, 3.0, 1.0, 1.0]))
    volume.header["descrip"] = NAME.encode()
    nibabel.save(volume, folder / "a.nii")
    for name in ("a.dcm", "torn.dcm", "odd.dcm", "deflated.dcm", "a.png", "a.jpg", "a.nii"):
        rows.append({"path": name, "label": "ill", "patient": NAME, "split": "train"})
    save(folder / "b.png", film(56))
    rows += [{"path": "b.png", "label": NAME, "patient": "p", "split": "test"}]
    rows += [{"path": f"{NAME}.png", "label": "ill", "patient": "p", "split": NAME}]
    return write_table(folder, [{**row, f"note of {NAME}": NAME, "surname": NAME} for row in rows])


def test_no_byte_of_an_identifier_is_printed(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom, asked to write such values
        table = write_canaries(folder)
    findings = by_name(checkup(table, max_skipped_share=1.0))
    for name in (
        *("identifiers in headers", "dates, places and free text in headers", "identifiers in the table"),
        *("skipped: truncated", "pixel spacing", "EXIF orientation", "inverted"),
    ):
        assert findings[name].severity is not OK, name
    assert "EXIF Artist 1" in findings["dates, places and free text in headers"].result
    assert ("a.nii",) in findings["dates, places and free text in headers"].files
    options = ("--data", table, "--image-size", 64, "--path-column", "path", "--label-column", "label")
    asked = [[], ["--format", "json"], ["--list", "identifiers in headers"], ["--list", "nothing"]]
    for more in asked:
        code, said = call(*options, *more)
        assert code in (1, 2)
        assert not names_it(said), more
    whole = subprocess.run(
        [COMMAND, "--debug", "check", *map(str, options)], capture_output=True, timeout=120, check=False
    )
    assert whole.returncode == 1
    assert b"identifiers in headers" in whole.stdout
    assert not names_it(whole.stdout + whole.stderr)


def test_no_byte_of_a_name_in_paths_columns_and_broken_files_is_printed(tmp_path):
    (tmp_path / "table").mkdir()
    table = planted_table(tmp_path / "table", patients={"north": 30})
    classes = planted_folders(tmp_path / "classes", images=30)
    for data in (table, classes):
        code, text = call("--data", data, "--image-size", 28)
        assert code in (0, 1)
        assert not names_it(text)
        _, content = call("--data", data, "--image-size", 28, "--format", "json")
        assert not names_it(content)
        rows = json.loads(content[content.index(b"{") : content.rindex(b"}") + 1])["checks"]
        [hidden] = [row for row in rows if row["check"] == "names of files"]
        assert hidden["severity"] == "warning"
        assert len(hidden["files"]) >= 30


def test_the_list_of_the_standard_has_what_everybody_knows():
    names = ("PatientName", "PatientBirthDate", "PatientID", "InstitutionName", "StudyDate", "OperatorsName")
    dataset = Dataset()
    for name in names:
        setattr(dataset, name, "19990101" if "Date" in name else "Something")
    dataset.Rows = 5
    dataset.SOPInstanceUID = "1.2.3"
    direct, others = filled_in(dataset)
    assert direct == {"PatientName", "PatientBirthDate", "PatientID", "OperatorsName"}
    assert others == {"InstitutionName", "StudyDate"}
