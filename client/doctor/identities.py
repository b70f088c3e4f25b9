"""What would say who a patient is: in headers, in the names of files and columns, and in the picture itself.

Nothing of it leaves this machine by training; it does when somebody copies the folder.
"""

from collections.abc import Mapping, Sequence

from client.doctor.findings import Finding, alone, counted, fine
from client.doctor.material import Material
from client.doctor.naming import are_names, identifying_columns
from common.checks import CheckState


def identity_findings(
    material: Material,
    *,
    hidden: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    patients: Sequence[str],
) -> list[Finding]:
    """`hidden` are the names, as shown, of files named after somebody."""
    found = _headers(material) if material.facts else []
    found.append(_file_names(hidden) if hidden else fine("names of files", "none looks like a person's"))
    found.append(_table(columns, patients))
    return found + (_annotations(material) if material.facts else [])


def _headers(material: Material) -> list[Finding]:
    direct = [row for row, facts in enumerate(material.facts) if facts.direct]
    others = [row for row, facts in enumerate(material.facts) if facts.others]
    unmarked = [row for row in direct if not material.facts[row].deidentified]
    findings = [fine("identifiers in headers")]
    if direct:
        words = counted(keyword for row in direct for keyword in sorted(material.facts[row].direct))
        marked = "" if unmarked else "; all are marked PatientIdentityRemoved"
        findings = [
            Finding(
                name="identifiers in headers",
                severity=CheckState.WARNING if unmarked else CheckState.NOTE,
                result=f"in {len(direct)} of {len(material)}: {words}{marked}",
                advice="training reads none of them; whoever gets a copy of the files does: de-identify them",
                files=alone(material.named(direct)),
            )
        ]
    if others:
        words = counted(keyword for row in others for keyword in sorted(material.facts[row].others))
        findings.append(
            Finding(
                name="dates, places and free text in headers",
                severity=CheckState.NOTE,
                result=f"in {len(others)} of {len(material)}: {words}",
                advice="DICOM's basic profile removes these too; training reads none of them",
                files=alone(material.named(others)),
            )
        )
    return findings


def _file_names(hidden: Sequence[str]) -> Finding:
    return Finding(
        name="names of files",
        severity=CheckState.WARNING,
        result=f"{len(hidden)} are named after a person, as it seems; they are hidden here",
        advice="name files by pseudonyms: names of files stand in tables, logs and backups",
        files=alone(hidden),
    )


def _table(columns: Mapping[str, Sequence[str]], patients: Sequence[str]) -> Finding:
    known, others = identifying_columns(columns)
    words = [f"column {name}" for name in known]
    words += [f"{others} more column(s) with names or addresses"] if others else []
    words += ["the patient ids themselves"] if are_names(patients) else []
    if not words:
        return fine("identifiers in the table")
    return Finding(
        name="identifiers in the table",
        severity=CheckState.WARNING,
        result=", ".join(words),
        advice="training needs a pseudonym for each patient and nothing else: remove them from the table",
    )


def _annotations(material: Material) -> list[Finding]:
    signs = [row for row, facts in enumerate(material.facts) if facts.annotated]
    stated = [row for row, facts in enumerate(material.facts) if facts.says_annotated]
    faces = [row for row, facts in enumerate(material.facts) if facts.recognizable]
    findings = [fine("burned-in annotations", "no header says so")]
    if signs:
        findings = [
            Finding(
                name="burned-in annotations",
                severity=CheckState.WARNING if stated else CheckState.NOTE,
                result=counted(material.facts[row].annotated for row in signs),
                advice="a name in the picture is trained on: look at them, and cover what is written",
                files=alone(material.named(signs)),
            )
        ]
    if faces:
        findings.append(
            Finding(
                name="recognizable faces",
                severity=CheckState.WARNING,
                result=f"{len(faces)} say RecognizableVisualFeatures",
                advice="a face can be known from the picture: deface them",
                files=alone(material.named(faces)),
            )
        )
    return findings
