"""Options from YAML files: valid ones, and errors that name what is wrong."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from hp_edit_trl.utils.config import check_positive, read_config


@dataclass
class Options:
    sources: list[dict[str, Any]]
    output_dir: str
    seed: int = 0
    weight: float = 1.0
    private: bool = True
    quota: int | None = 7
    mode: Literal["integer", "expected"] = "integer"
    shares: dict[str, float] = field(default_factory=lambda: {"en": 1.0})

    def __post_init__(self):
        check_positive(quota=self.quota)


def read(folder, text):
    (folder / "options.yaml").write_text(text)
    return read_config(Options, folder / "options.yaml")


def test_options_and_their_defaults(tmp_path):
    text = (
        "output_dir: x\nsources: [{folder: a}]\nweight: 2\nquota: 3\nmode: expected\nshares: {en: 1, zh: 0.5}\nseed:"
    )
    expected = Options([{"folder": "a"}], "x", weight=2, quota=3, mode="expected", shares={"en": 1, "zh": 0.5})
    assert read(tmp_path, text) == expected  # `seed:` without a value is the default


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "must be a mapping of options, but is a list"),
        ("", "must be a mapping of options, but is a NoneType"),
        ("sources: [", "is not valid YAML"),
        ("output_dir: x", r"lacks the options \['sources'\]"),
        ("sources: []\noutput_dir:", r"lacks the options \['output_dir'\]"),
        ("sources: []\noutput_dir: x\nwrite: y", r"unknown options \['write'\]. Known options: sources, output_dir, "),
        ("sources: []\noutput_dir: x\nseed: often", "seed must be of type int, but is 'often'"),
        ("sources: []\noutput_dir: x\nseed: true", "seed must be of type int, but is True"),
        ("sources: []\noutput_dir: x\nseed: 1.5", "seed must be of type int, but is 1.5"),
        ("sources: []\noutput_dir: x\nprivate: 1", "private must be of type bool, but is 1"),
        ("sources: []\noutput_dir: x\nweight: '1'", "weight must be of type float, but is '1'"),
        ("sources: []\noutput_dir: x\nquota: x", r"quota must be of type int \| None, but is 'x'"),
        ("sources: []\noutput_dir: x\nquota: 0", "quota=0 must be an integer of at least 1"),
        ("sources: []\noutput_dir: x\nmode: sum", "mode must be of type Literal.*, but is 'sum'"),
        ("sources: [a]\noutput_dir: x", r"sources must be of type list\[dict\[str, .*Any\]\], but is \['a'\]"),
        ("sources: []\noutput_dir: x\nshares: {en: many}", r"shares must be of type dict\[str, float\], but is"),
    ],
)
def test_options_that_are_not_valid(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        read_config(Options, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("number", [0, -3, 1.5, "2"])
def test_numbers_that_are_not_positive(number):
    check_positive(batch_size=1, quota=None)
    with pytest.raises(ValueError, match=r"quota=.* must be an integer of at least 1\."):
        check_positive(batch_size=1, quota=number)
