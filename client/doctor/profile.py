"""What in a DICOM header may say who a patient is: PS3.15 Annex E, Basic Application Confidentiality Profile.

The list of attributes comes from `dicom-anonymizer` (Kitware, BSD), which generates it from the standard
(edition 2026c). Identifiers of instances (UIDs) are left out: every file has them and nobody reads them.
"""

from functools import lru_cache
from typing import Any, Final

from pydicom.dataset import Dataset

_DIRECT: Final = frozenset(
    [
        *("PatientID", "OtherPatientIDs", "PatientBirthDate", "PatientAddress", "PatientTelephoneNumbers"),
        *("PatientTelecomInformation", "MedicalRecordLocator", "AccessionNumber", "AdmissionID"),
        *("InsurancePlanIdentification", "PersonAddress", "PersonTelephoneNumbers"),
        *("PersonTelecomInformation", "ReferringPhysicianAddress", "ReferringPhysicianTelephoneNumbers"),
    ]
)
"""Beside all names of persons: what leads to one patient without further knowledge."""
_BLANKS: Final = frozenset(
    ["", "anonymous", "anonymized", "anonymised", "anon", "removed", "deidentified", "none", "unknown", "na"]
    + ["noname", "withheld", "redacted", "00000000", "0000", "000", "0", "x", "xx", "xxx", "xxxx"]
)
"""What de-identification leaves in place of a value, letters and digits only."""
_DEEPEST: Final = 8


@lru_cache(maxsize=1)
def _tags() -> frozenset[int]:
    """Attributes that the profile removes, empties or replaces, but UIDs."""
    from dicomanonymizer.dicom_anonymization_databases import dicomfields_2026c as fields

    named = {tag for tag in fields.ALL_TAGS if len(tag) == 2} - set(fields.U_TAGS)
    return frozenset(group << 16 | element for group, element in named)


def filled_in(dataset: Dataset, *, depth: int = 0) -> tuple[set[str], set[str]]:
    """(direct, other): keywords of the profile's attributes that hold a value, sequences looked into.

    Direct ones are names of persons, record numbers, birth dates and addresses. `private` stands for private
    elements. Never a value.
    """
    direct: set[str] = set()
    others: set[str] = set()
    for tag in dataset.keys():  # noqa: SIM118 - iterating a Dataset converts every value
        if tag.is_private:
            if not tag.is_private_creator:
                others.add("private elements")
            continue
        element = _element(dataset, tag)
        if element is None:
            continue
        is_sequence = element.VR == "SQ"
        if int(tag) in _tags() and element.keyword and not is_sequence and not is_blank(element.value):
            (direct if element.VR == "PN" or element.keyword in _DIRECT else others).add(element.keyword)
        if is_sequence and depth < _DEEPEST:
            for item in element.value or ():
                inner = filled_in(item, depth=depth + 1)
                direct |= inner[0]
                others |= inner[1]
    return direct, others


def direct_words(dataset: Dataset) -> list[str]:
    """Parts of patient's name, number and birth date by which a file may be named; they go no further."""
    words: list[str] = []
    for keyword in ("PatientName", "PatientID", "PatientBirthDate"):
        value = str(dataset.get(keyword) or "")
        if not is_blank(value):
            words += [part for part in value.replace("^", " ").replace("=", " ").split() if len(part) > 3]
    return words


def is_blank(value: Any) -> bool:
    """Whether an element's value is empty or what de-identification leaves behind."""
    if value is None:
        return True
    plain = "".join(c for c in str(value).casefold() if c.isalnum())
    return plain in _BLANKS


def _element(dataset: Dataset, tag: Any) -> Any:
    try:
        return dataset[tag]
    except Exception:  # an element that pydicom cannot turn into a value
        return None
