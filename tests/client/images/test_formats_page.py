"""docs/formats.md names what the code has."""

from pathlib import Path

from client.images.content import Format
from client.images.dicom_file import WANTED
from client.images.records import SkipReason

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "formats.md").read_text()


def test_every_format_and_every_reason_is_explained():
    table = PAGE.split("## Which picture")[0]
    assert all(str(format) in table for format in Format if format is not Format.UNKNOWN)
    assert all(f"`{reason}`" in PAGE for reason in SkipReason)


def test_no_identifier_of_a_person_is_read():
    """DICOM's groups 8 (study), 10 (patient) and 20 (ids), but for what tells series and kinds apart."""
    from pydicom.datadict import tag_for_keyword

    groups = {keyword: tag_for_keyword(keyword) >> 16 for keyword in WANTED}
    assert {keyword for keyword, group in groups.items() if group not in (0x28, 0x5200, 0x7FE0)} == {
        *("SOPClassUID", "SeriesInstanceUID", "SliceThickness", "PixelPresentation"),
        *("ImagePositionPatient", "ImageOrientationPatient"),
    }
