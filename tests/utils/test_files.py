import errno
import math
import re

import pytest

from hp_edit_trl.utils.files import (
    append_jsonl,
    check_unchanged,
    file_name,
    is_below,
    read_json,
    read_jsonl,
    write_atomically,
    write_json,
    write_text,
)


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"ü": [1, None]})
    assert read_json(file) == {"ü": [1, None]} and "ü" in file.read_text(encoding="utf-8")

    def disk_full(part):
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        OSError, match="a.json cannot be written .No space left on device.*free space, run again"
    ) as caught:
        write_atomically(file, disk_full)
    assert caught.value.errno == errno.ENOSPC
    assert read_json(file) == {"ü": [1, None]} and list(tmp_path.iterdir()) == [file]
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(file, {"loss": math.nan})
    assert read_json(file) == {"ü": [1, None]} and list(tmp_path.iterdir()) == [file]
    write_text(file, "not JSON")
    assert read_json(file) is None and read_json(tmp_path / "nothing.json") is None
    write_text(file, "[1]")
    assert read_json(file) is None  # not an object


def test_lines_survive_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "a.jsonl"
    append_jsonl(file, [{"id": 1}])
    with file.open("ab") as lines:
        lines.write(b'{"id": 2, "te')
    append_jsonl(file, [{"id": 3}])
    assert [(number, value) for number, value, _ in read_jsonl(file)] == [(1, {"id": 1}), (2, None), (3, {"id": 3})]


def test_changed_settings_are_listed():
    before = {"seed": 0, "size": [64, 64], "gone": 1}
    check_unchanged("out holds edits", before, {"seed": 0, "size": (64, 64), "gone": 1}, "choose another output_dir")
    with pytest.raises(ValueError, match="out holds edits made with other settings") as caught:
        check_unchanged(
            "out holds edits", before, {"seed": 1, "size": [64, 64], "new": "x"}, "choose another output_dir"
        )
    message = str(caught.value)
    assert "(seed: 0 -> 1; gone: 1 -> None; new: None -> 'x'): choose another output_dir." in message


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "/etc/x", "a/../../b", ".hidden", "a\\..\\b", "a\0b", "~", "", "%2E", "é/ü"]
)
def test_a_name_stays_in_its_folder(tmp_path, name):
    file = tmp_path / f"{file_name(name)}.png"
    assert file.parent == tmp_path and file.resolve().parent == tmp_path.resolve() and "\0" not in str(file)
    assert not file.name.startswith("..") and file_name(name) not in (".", "..")


def test_different_names_stay_different_and_plain_ones_as_they_are(tmp_path):
    names = ["a", "a.b", "A", "%2E", "%2e", ".", "..", "%2E.", "a/b", "a%2Fb", "0f3a-b_c~d", "", " ", "  ", "=", "\0"]
    names += ["con", "CON", "Con", "nul.txt", "com1", "x" * 399, "x" * 400, "x" * 399 + "y", "第" * 60, "第" * 61]
    names += ["Straße", "STRASSE", "strasse", "é", "e\u0301", "\ud800", "a\\b", "a:b", "a*", "a" * 150, "a.", "a "]
    names += [file_name("A"), file_name(""), file_name("x" * 400)]
    files = {file_name(name).lower() for name in names}  # as on a file system that ignores case
    assert len(files) == len(names)
    for name in names:
        (tmp_path / f"{file_name(name)}+12.png.1234567.part").touch()
        assert file_name(name).isascii() and not re.match(r"(con|nul|com1)?(\.|$)", file_name(name), re.IGNORECASE)
    assert len(list(tmp_path.iterdir())) == len(names)
    assert [file_name(name) for name in ("a.b", "0f3a-b_c~d", "a/b")] == ["a.b", "0f3a-b_c~d", "a%2Fb"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "out").symlink_to(tmp_path)
    assert is_below(tmp_path / "in" / "x", tmp_path / "in") and is_below(tmp_path / "in", tmp_path / "in")
    for path in ("in/../x", "in/out/x", "inside", "/etc/passwd", "in/\0"):
        assert not is_below(tmp_path / path, tmp_path / "in")
