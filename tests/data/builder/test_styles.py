"""Pictures of styles: which folders are taken, and what is said of those that are not."""

import pytest

from hp_edit_trl.data.builder.styles import STYLES, StyleImages
from hp_edit_trl.utils.images import read_image
from tests.helpers import photo


@pytest.fixture
def pictures(tmp_path):
    for number, file in enumerate(("LEGO bricks/1.png", "LEGO bricks/more/2.jpg", "anime/a.png", ".hidden/x.png")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        photo(64, 48, number).save(tmp_path / file)
    (tmp_path / "notes.txt").touch()
    return tmp_path


def test_a_folder_per_style(pictures):
    found = StyleImages(str(pictures), STYLES, resolution=32)
    assert found.files == {"LEGO bricks": ["LEGO bricks/1.png", "LEGO bricks/more/2.jpg"], "anime": ["anime/a.png"]}
    assert read_image({"bytes": found.read("anime/a.png"), "path": None}, "It").size == (36, 27)
    before = found.digest
    photo(64, 48, 9).save(pictures / "anime" / "b.png")
    assert StyleImages(str(pictures), STYLES).digest != before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("Anime movies/1.png", b"", "'Anime movies' is no style. Each folder must have the name of a style"),
        ("ANIME/1.png", b"", "is a second folder of the style 'anime'"),
        ("manga/notes.txt", b"", "'manga' has no images"),
        ("1.png", b"", "'1.png' is in no folder of a style"),
        ("manga/1.png", b"no picture", r"'manga/1.png' cannot be used \(unreadable"),
    ],
)
def test_folders_that_are_not_usable(pictures, file, content, message):
    (pictures / file).parent.mkdir(exist_ok=True)
    (pictures / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        StyleImages(str(pictures), STYLES)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="style_images=.*nowhere is not a folder"):
        StyleImages(str(tmp_path / "nowhere"), STYLES)
    with pytest.raises(ValueError, match="it has no folders of styles"):
        StyleImages(str(tmp_path), STYLES)
