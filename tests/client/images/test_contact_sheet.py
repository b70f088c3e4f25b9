"""The contact sheet: what is on it, that it stays away from the images, and that it says whose it is."""

import base64
import io
import re
import stat

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from client.cli import app
from client.images.contact_sheet import SHOWN, SIDE, WARNING, write_contact_sheet
from common.errors import ConfigError
from common.hospital_config import DataConfig
from common.preparation.settings import PreprocessingSection
from common.preprocessing import Preprocessing
from tests.client.images.medical_files import dicom

LEFT_WHITE = np.zeros((40, 40), np.uint8)
LEFT_WHITE[:, :20] = 255


@pytest.fixture
def films(tmp_path):
    """Forty films of one class and three of another, one of them on its side, one torn, one with a name."""
    for number in range(43):
        folder = tmp_path / "films" / "train" / ("rare" if number >= 40 else "usual")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = LEFT_WHITE.T if number == 41 else LEFT_WHITE
        Image.fromarray(pixels).save(folder / f"film-{number:02d}.png")
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "<b>.dcm").write_bytes(dicom(LEFT_WHITE, PatientName="Planted^Name"))
    return tmp_path / "films"


def sheet(path, films, **steps):
    preprocessing = Preprocessing(image_size=16, channels=1, steps=PreprocessingSection(**steps))
    count = write_contact_sheet(
        path, DataConfig(path=str(films)), preprocessing=preprocessing, classes=("usual", "rare")
    )
    return count, path.read_text()


def pictures(page):
    found = re.findall(r'src="data:image/png;base64,([^"]+)" alt="Before and after: ([^"]+)"', page)
    return {alt: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, alt in found}


def test_it_shows_images_of_every_class_before_and_after(tmp_path, films):
    count, page = sheet(tmp_path / "sheet.html", films, crop="centre", crop_share=0.5)
    assert count == SHOWN
    assert stat.S_IMODE((tmp_path / "sheet.html").stat().st_mode) == 0o600
    assert WARNING in page
    assert "crop-share" in page
    shown = pictures(page)
    assert len(shown) == SHOWN - 1  # the torn one has no picture
    assert sum("rare" in name for name in shown) == 4
    for name, picture in shown.items():
        before, after = picture[:, :SIDE, 0], picture[:, -SIDE:, 0]
        assert picture.shape == (SIDE, 2 * SIDE + 8, 3)
        axis = 0 if "film-41" in name else 1  # a person sees which lies on its side
        for side in (before, after):
            bright = side.mean(axis=1 - axis)
            assert bright[: SIDE // 4].min() > 200, name
            assert bright[-SIDE // 4 :].max() < 50, name


def test_what_is_not_used_stands_there_with_the_reason(tmp_path, films):
    _, page = sheet(tmp_path / "sheet.html", films, window=(40, 400))
    assert "other-units" in page
    assert "torn.png" in page
    assert "Planted" not in page
    assert "<b>.dcm" not in page
    assert "&lt;b&gt;.dcm" in page
    assert "<script" not in page
    assert re.search(r'(src|href)="(?!data:)', page) is None


def test_two_sheets_of_the_same_images_are_the_same(tmp_path, films):
    first, second = (sheet(tmp_path / name, films)[1] for name in ("a.html", "b.html"))
    assert first == second
    assert "as installed" in first


@pytest.mark.parametrize(
    "target", ["films/sheet.html", "films/train/usual/sheet.html", "films", "link/a.html"]
)
def test_it_is_never_written_among_the_images(tmp_path, films, target):
    (tmp_path / "link").symlink_to(films / "train")
    before = sorted(films.rglob("*"))
    with pytest.raises(ConfigError, match="among the images|is a folder"):
        sheet(tmp_path / target, films)
    assert sorted(films.rglob("*")) == before


def test_a_table_of_images_counts_with_its_folder_and_root(tmp_path, films):
    table = tmp_path / "lists" / "films.csv"
    table.parent.mkdir()
    table.write_text("path,label\ntrain/usual/film-00.png,usual\ntrain/rare/film-40.png,rare\n")
    data = DataConfig(path=str(table), path_root=str(films))
    more = {"preprocessing": Preprocessing(image_size=16, channels=1), "classes": None}
    for target in (table.parent / "sheet.html", films / "sheet.html"):
        with pytest.raises(ConfigError, match="among the images"):
            write_contact_sheet(target, data, **more)
    assert write_contact_sheet(tmp_path / "sheet.html", data, **more) == 2


def test_an_array_may_lie_beside_its_sheet_but_is_not_overwritten(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.arange(6) % 2)
    data = DataConfig(path=str(tmp_path / "a.npz"))
    more = {"preprocessing": Preprocessing(image_size=16, channels=1), "classes": None}
    assert write_contact_sheet(tmp_path / "sheet.html", data, **more) == 6
    with pytest.raises(ConfigError, match="among the images"):
        write_contact_sheet(tmp_path / "a.npz", data, **more)


def test_the_command_writes_it_and_says_that_it_is_patient_data(tmp_path, films):
    (films / "train" / "rare" / "torn.png").unlink()
    target = tmp_path / "sheet.html"
    words = [
        "check",
        "--data",
        films,
        "--image-size",
        32,
        "--show",
        target,
        "--set",
        "preprocessing.resize=pad",
    ]
    answer = CliRunner().invoke(app, [str(word) for word in words])
    assert answer.exit_code == 0, answer.output
    assert WARNING in answer.output
    assert "resize" in target.read_text()
    refused = CliRunner().invoke(app, [str(word) for word in [*words[:-1], "preprocessing.crop=centre"]])
    assert "crop-share = 0.9" in str(refused.exception)
