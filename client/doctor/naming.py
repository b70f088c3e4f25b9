"""Names of files, columns and patients that may say who somebody is; such a name is not shown."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Final

from client.images.folders import SUFFIXES

_IN_FILE_NAME: Final = re.compile(
    r"\^|(?<![a-z])"
    r"(mrn|dob|ssn|nhs|surname|(?:last|first|full|patient|pat)[ _.-]?name|birth(?:date|day)?)(?![a-z])",
    re.IGNORECASE,
)
_COLUMNS: Final = frozenset(
    [
        *("name", "patientname", "patname", "fullname", "lastname", "firstname", "surname", "givenname"),
        *("familyname", "initials", "dob", "birthdate", "dateofbirth", "birthday", "patientbirthdate"),
        *("patientsbirthdate", "patientsname", "mrn", "medicalrecordnumber", "hospitalnumber", "ssn"),
        *("socialsecuritynumber", "nhsnumber", "insurancenumber", "phone", "telephone", "phonenumber"),
        *("mobile", "email", "emailaddress", "address", "street", "zip", "zipcode", "postcode"),
        *("postalcode", "accession", "accessionnumber", "physician", "referringphysician", "radiologist"),
        *("doctor", "operator"),
    ]
)
"""Without regard to case, spaces and punctuation."""
_PERSON: Final = re.compile(r"[^\W\d_]{2,}(\^|,\s|\s)[^\W\d_]{2,}([\s^,]|$)|\^")
_TYPED: Final = re.compile(r"[^\W\d_]\^|[^\s@]+@[^\s@]+\.[^\s@]+")
_WORD: Final = re.compile(r"[^\W\d_]{4,}")
_SHARE: Final = 0.2
_LONGEST: Final = 40


def names_a_person(path: str) -> bool:
    """Whether a path by itself looks as if it named somebody: a DICOM name, or a word such as MRN or DOB."""
    return bool(_IN_FILE_NAME.search(path))


def hidden(path: str, number: int | None = None) -> str:
    """How a file is shown that is named after a patient: by its place in the data, from 1, if known."""
    suffix = os.path.splitext(path)[1].lower()
    place = "" if number is None else f" (file {number})"
    return f"[name hidden]{suffix if suffix in SUFFIXES else ''}{place}"


def printable(text: str) -> str:
    """A label as it is shown: no name of a person, nothing long."""
    shown = without_names(text)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def without_names(text: str) -> str:
    """A sentence without DICOM's names of persons, which have a caret."""
    return re.sub(r"[^\s,;()]*\^[^\s,;()]*", "[hidden]", text)


def named_after_columns(names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> set[str]:
    """Those of `names` (rows,) that hold a word of an identifying column of their own row."""
    known, _ = identifying_columns(columns)
    found: set[str] = set()
    for row, name in enumerate(names):
        words = [word for column in known for word in _WORD.findall(columns[column][row])]
        if any(word.casefold() in name.casefold() for word in words):
            found.add(name)
    return found


def identifying_columns(columns: Mapping[str, Sequence[str]]) -> tuple[list[str], int]:
    """Columns with a name such as `dob` that hold something, and how many others hold names or addresses."""
    known: list[str] = []
    others = 0
    for name, values in columns.items():
        filled = [value for value in values if value]
        if not filled:
            continue
        if "".join(c for c in name.casefold() if c.isalnum()) in _COLUMNS:
            known.append(name)
        elif sum(bool(_TYPED.search(value)) for value in filled) > _SHARE * len(filled):
            others += 1
    return known, others


def are_names(patients: Sequence[str]) -> bool:
    """Whether patient ids look like names of persons: at least half are two words, or have a caret."""
    ids = set(patients)
    return bool(ids) and sum(bool(_PERSON.match(patient)) for patient in ids) >= len(ids) / 2
