"""What `flower-client check` says about a hospital's images: counts and findings as plain data."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client.doctor.examination import Watch, examine, unwatched
from client.doctor.findings import Finding, fine
from client.doctor.label_schema import label_findings
from client.doctor.naming import hidden, names_a_person, printable, without_names
from client.images.cache import FOLDER
from client.images.dataset import HospitalImages, split_images, with_known_labels
from client.images.decoded import decode_records
from client.images.entries import format_name
from client.images.layout import find_records
from client.images.records import ImageArray, Records, SkippedImage, count_reasons
from client.images.series_rows import series_examples, series_records
from client.images.splits import SPLITS
from common.checks import CheckState
from common.errors import DataError
from common.hospital_config import DataConfig
from common.preprocessing import Preprocessing
from common.series_form import SINGLE_IMAGES, SeriesForm
from common.task_kinds import CLASSIFICATION

Row = tuple[str, str, str]
"""(check, result, what to do); the last is empty where nothing needs to be done."""
_FEW_UNITS = 50


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """State of a hospital's images; local, since counts of patients are private."""

    path: str
    problem: DataError | None
    """Why the images cannot be used at all; then the counts are empty."""
    layout: str = ""
    formats: Mapping[str, int] = field(default_factory=dict)
    """Entries by what their content is, those that cannot be used too."""
    unit: str = ""
    images: Mapping[str, Mapping[str, int]]
    """Images by split and class."""
    units: Mapping[str, int]
    """Patients (or images without patients) by split."""
    skipped: tuple[SkippedImage, ...] = ()
    skipped_share: float = 0.0
    max_skipped_share: float = 0.0
    units_in_several_splits: int = 0
    labels: tuple[Finding, ...] = ()
    """About the words for the classes."""
    examined: tuple[Finding, ...] = ()
    """About pictures, headers and names."""
    series_lengths: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """How many series have how many steps, by split; empty for single images."""
    cache: str = ""
    """Folder of the decoded images; empty without one."""

    @property
    def is_usable(self) -> bool:
        """Whether a hospital would train on these images."""
        return self.problem is None and self.skipped_share <= self.max_skipped_share

    def rows(self) -> list[Row]:
        """A line for each check."""
        return [(finding.name, finding.result, finding.advice) for finding in self.findings()]

    def findings(self) -> list[Finding]:
        """Everything that was looked at, in the order of the table."""
        if self.problem is not None:
            what = without_names(self.problem.what)
            why = without_names(" ".join(filter(None, (self.problem.why, self.problem.fix))))
            failed = Finding(name="images", severity=CheckState.FAILED, result=what, advice=why)
            return [failed, *self.labels]
        return [
            fine("layout", self.layout),
            fine("formats", ", ".join(f"{name} {count}" for name, count in self.formats.items())),
            *self._counts(),
            *self.labels,
            *self._skips(),
            self._splits(),
            *self.examined,
            fine("cache", self.cache or "none: images are decoded at each start"),
        ]

    def _counts(self) -> list[Finding]:
        found: list[Finding] = []
        noun = "series" if self.series_lengths else "images"
        for split in SPLITS:
            name, total = f"{split} {noun}", sum(self.images[split].values())
            if not total:
                advice = "name a train split" if split == "train" else ""
                found.append(_warning_if(advice, name, "none"))
                continue
            by_class = ", ".join(f"{printable(label)} {count}" for label, count in self.images[split].items())
            units = "" if self.unit == "image" else f" of {self.units[split]} patients"
            empty = [printable(label) for label, count in self.images[split].items() if not count]
            advice = f"no image of {', '.join(empty)}: correct if the hospital has none" if empty else ""
            state = CheckState.NOTE if empty else CheckState.OK
            result = f"{total}{units} ({by_class})"
            found.append(Finding(name=name, severity=state, result=result, advice=advice))
            if steps := self.series_lengths.get(split):
                told = ", ".join(f"{count} of {length}" for length, count in sorted(steps.items()))
                found.append(fine(f"{split} series' steps", told))
        if self.unit == "patient":
            found.append(fine("unit of protection", "patient"))
        else:
            advice = "name a patient column, or accept that one image, not one patient, is protected"
            found.append(_warning_if(advice, "unit of protection", "image: no patient ids found"))
        if self.units["train"] < _FEW_UNITS:
            advice = "so few need much noise; the hospital's policy may refuse"
            found.append(_warning_if(advice, "size", f"{self.units['train']} {self.unit}s train"))
        return found

    def _skips(self) -> list[Finding]:
        found: list[Finding] = []
        for reason, count in count_reasons(self.skipped).items():
            names = [_shown(entry.path) for entry in self.skipped if entry.reason is reason]
            more = f" and {count - 3} more" if count > 3 else ""
            found.append(
                Finding(
                    name=f"skipped: {reason}",
                    severity=CheckState.WARNING if reason.counts else CheckState.NOTE,
                    result=f"{count}: {', '.join(names[:3])}{more}",
                    advice=reason.remedy,
                    files=tuple((name,) for name in names),
                )
            )
        share = f"{self.skipped_share:.1%} of the images (at most {self.max_skipped_share:.1%})"
        if self.skipped_share <= self.max_skipped_share:
            return [*found, fine("skipped in all", share)]
        advice = "the hospital would stop: repair them or raise data.max-skipped-share"
        failed = Finding(name="skipped in all", severity=CheckState.FAILED, result=share, advice=advice)
        return [*found, failed]

    def _splits(self) -> Finding:
        name = f"{self.unit}s in several splits"
        if not self.units_in_several_splits:
            return fine(name)
        return Finding(
            name=name,
            severity=CheckState.WARNING,
            result=f"{self.units_in_several_splits}: each moved to test, else to validation, with all its "
            "images",
            advice="nothing must be done; correct the splits if they were meant otherwise",
        )


def check_images(
    data: DataConfig,
    *,
    preprocessing: Preprocessing,
    classes: Sequence[str] | None,
    cache_folder: Path | None,
    split_key: bytes = b"",
    watch: Watch = unwatched,
    task: str = CLASSIFICATION,
    form: SeriesForm = SINGLE_IMAGES,
) -> Checkup:
    """Read all images as training would and say how they are; data that cannot be used are a result too.

    Files are read and decoded once (never, where the cache has them); of each the header is read once more.
    `watch` hears what is done, how much of it, and of how much.
    """
    labels: tuple[Finding, ...] = ()
    try:
        found = find_records(data)
        labels = tuple(label_findings(found, classes=classes, task=task))
        records = series_records(with_known_labels(found, classes=classes, task=task), form, data)
        decoded = decode_records(
            records,
            preprocessing=preprocessing,
            cache_folder=cache_folder,
            max_pixels=data.max_pixels,
            max_skipped_share=1.0,
            watch=_counting(watch, "decoding", len(records)),
        )
        examples = series_examples(decoded, form)
    except DataError as problem:
        return Checkup(path=data.path, problem=problem, images={}, units={}, labels=labels)
    images = split_images(decoded, data=data, split_key=split_key)
    examined = examine(decoded, images, found, data=data, watch=watch)
    if form.is_series:
        images = split_images(examples, data=data, split_key=split_key)
    return _describe(
        images, data, cache_folder, formats=_formats(records), labels=labels, examined=tuple(examined)
    )


def _counting(watch: Watch, what: str, total: int) -> Callable[[], None]:
    done = iter(range(1, total + 2))  # the next of a range is drawn whole, also by several threads

    def count() -> None:
        watch(what, next(done, total), total)

    return count


def _formats(records: Records) -> dict[str, int]:
    """How many entries are of which format, the most frequent first."""
    source = records.source
    if isinstance(source, ImageArray):
        return {"array": len(source)}
    return dict(Counter(format_name(path) for path in source.paths).most_common())


def _describe(
    images: HospitalImages,
    data: DataConfig,
    cache_folder: Path | None,
    *,
    formats: Mapping[str, int],
    labels: tuple[Finding, ...],
    examined: tuple[Finding, ...],
) -> Checkup:
    parts = {split: getattr(images, split) for split in SPLITS}
    counted = sum(entry.reason.counts for entry in images.skipped)
    usable = sum(part.num_rows for part in parts.values())
    if of_series := images.series_lengths.values():  # skipped are images, not series
        usable = sum(steps * count for table in of_series for steps, count in table.items())
    return Checkup(
        path=data.path,
        problem=None,
        layout=images.layout,
        formats=formats,
        unit=images.unit,
        images=images.counts,
        units={split: part.num_units for split, part in parts.items()},
        skipped=images.skipped,
        series_lengths=images.series_lengths,
        skipped_share=counted / (usable + counted),
        max_skipped_share=data.max_skipped_share,
        units_in_several_splits=images.units_in_several_splits,
        labels=labels,
        examined=examined,
        cache="" if cache_folder is None else str(cache_folder / FOLDER),
    )


def _warning_if(advice: str, name: str, result: str) -> Finding:
    state = CheckState.WARNING if advice else CheckState.OK
    return Finding(name=name, severity=state, result=result, advice=advice)


def _shown(name: str) -> str:
    return hidden(name) if names_a_person(name) else name
