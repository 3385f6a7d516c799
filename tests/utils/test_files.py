import errno
import math

import pytest

from hp_edit_trl.utils.files import (
    append_jsonl,
    check_unchanged,
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
