"""Which of the layouts a path is: the content decides, and what was recognised is said."""

import os
from pathlib import Path

from client.images.folders import find_class_folders, read_folders, tables_in
from client.images.manifest import label_columns, read_manifest
from client.images.npz import read_npz
from client.images.records import Records
from client.images.tables import Table, read_table
from common.errors import DataError
from common.hospital_config import DataConfig

_LAYOUTS = "a MedMNIST .npz, a folder split/class/* or class/*, or a CSV manifest"
# Folders of these names hold the images of a manifest rather than one class.
_CONTAINERS = frozenset(
    ["image", "images", "img", "imgs", "picture", "pictures", "data", "files", "png", "jpg", "jpeg"]
    + ["dicom", "dicoms", "dcm", "nifti", "nii", "series", "studies", "scans"]
)


def find_records(data: DataConfig) -> Records:
    """Records as the data have them, labels as written. Raises DataError for none of the layouts."""
    path = Path(data.path)
    try:
        return _of_folder(path, data) if path.is_dir() else _of_file(path, data)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read", why=str(error), fix="check the path and its rights"
        ) from None


def _of_file(path: Path, data: DataConfig) -> Records:
    if not path.is_file():
        raise DataError(f"there are no images at {path}", why="nothing is there", fix=f"name {_LAYOUTS}")
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        return read_npz(path, max_pixels=data.max_pixels)
    return read_manifest(read_table(path), data)


def _of_folder(path: Path, data: DataConfig) -> Records:
    folders = find_class_folders(path)
    manifest = _manifest_in(path, data)
    containers = all(folder.label.casefold() in _CONTAINERS for folder in folders)
    is_single = len(folders) == 1 and not folders[0].split
    if manifest is not None and (containers or is_single):
        return read_manifest(manifest, data)
    if folders:
        return read_folders(path.resolve(), data)
    archives = sorted(path.glob("*.npz"))
    if len(archives) == 1:
        return read_npz(archives[0], max_pixels=data.max_pixels)
    found = ", ".join(sorted(os.listdir(path))[:6]) or "nothing"
    raise DataError(f"{path} is none of the layouts", why=f"it holds {found}", fix=f"name {_LAYOUTS}")


def _manifest_in(path: Path, data: DataConfig) -> Table | None:
    """The first table of a folder that has columns for the path and the label."""
    for candidate in tables_in(path):
        try:
            table = read_table(candidate)
            table.need("path", data.path_column)
            label_columns(table, data)
        except DataError:
            continue
        return table
    return None
