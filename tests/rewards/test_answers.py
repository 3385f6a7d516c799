import pytest

from hp_edit_trl.rewards.answers import parse_aspects, parse_one_to_five, parse_pair_of_25, parse_preference
from tests.rewards.helpers import ASPECTS


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"reasoning": "ok", "score": [20, 23]}', 20),
        (
            '```json\n{\n"reasoning" : "He said "hi", twice",\n"score" : [20, 23]\n}\n```',
            20,
        ),  # as trained judges write
        ('{\n\n"reasoning" : "x",\n"score" : [25, 0],\n}', 0),  # as the prompt of UnifiedReward shows it
        ('{"edit_region": [{"id": 0, "bbox_2d": [1, 2, 3, 4]}], "reasoning": "x", "score": [12.5, 13]}', 12.5),
        ('<think>{"score": [1, 1]}</think>{"score": [2, 3]}', 2),
        ('<think>{"score": [1, 1]}', None),
        ('{"score": [26, 1]}', None),
        ('{"score": [-1, 1]}', None),
        ('{"score": [3]}', None),
        ('{"score": [3, 4, 5]}', None),
        ('{"score": ["3", 4]}', None),
        ('{"score": [true, 3]}', None),
        ('{"score": [NaN, 3]}', None),
        ('{"score": [1, 2]} {"score": [1, 2]}', None),
        ('{"reasoning": "so "x"", "score": [1, 2], "score": [3, 4]}', None),
        ("[3, 4]", None),
        ("", None),
        ("{" * 100_000, None),
        ('{"a":' * 4_000, None),
        ('{"' * 10_000, None),
    ],
)
def test_two_scores_of_25(answer, score):
    assert parse_pair_of_25(answer) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"reasoning": "x", "score": [4]}', 4),
        ('{"reasoning": "x", "score": 4}', 4),
        ('{\n"reasoning" : "say "x"",\n"score" : [3]\n}', 3),
        ('{\n"reasoning" : "say "x"",\n"score" : 5\n}', 5),
        ('{"score": 0}', None),
        ('{"score": [6]}', None),
        ('{"score": [1/2/3/4/5]}', None),
        ('{"score": [4, 4]}', None),
    ],
)
def test_one_score_to_5(answer, score):
    assert parse_one_to_five(answer) == score


@pytest.mark.parametrize(
    ("old", "new", "score"),
    [
        ("", "", 3.4),
        ("N/A", "2.2", 3.1),
        ("1. Text Faithfulness:\n", "**1. Text Faithfulness:**\n", 3.4),
        ("## Score: 3.8", "## **Score:** [3.8]", 3.4),
        ("## Score: 3.8", "## Score: 38", None),
        ("## Score: 3.8", "## Score: 0.8", None),
        ("## Score: 3.0", "## Score: N/A", None),  # only the last may not apply
        ("## Score: 3.0\n", "", None),
        ("## Score: N/A\n", "", None),
        ("4. Text Rendering:", "", None),
        ("# User Request Analysis", "<think>", None),
    ],
)
def test_four_aspects(old, new, score):
    assert parse_aspects(ASPECTS.replace(old, new, 1)) == (None if score is None else pytest.approx(score))


def test_an_answer_that_repeats_itself_is_read_in_no_time():
    block = ASPECTS.partition("# Summary")[0].replace("4. Text Rendering", "1. Text Faithfulness")
    assert parse_aspects(block * 40) is None


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("1", 1.0),
        (" 2.\n", 0.0),
        ("**tie**", 0.5),
        ("Answer: 1", 1.0),
        ("The better edit is 2", 0.0),
        ("Edit 1", 1.0),
        ("Edited image 1 is better.", 1.0),
        ("It has a seam. Edited image 2 is better", 0.0),
        ("Edited image 1 and edited image 2 are equally good", 0.5),
        ("Both images are equally bad.", 0.5),
        ("Image 1 is better at light.\n<answer>Edited image 2 is better</answer>", 0.0),
        ("<think>2</think>1", 1.0),
        ("<think>1", None),
        ("Edited image 1 is better. Edited image 2 is better.", None),
        ("Image 10 is better", None),
        ("Edited image 1 is not better", None),
        ("3", None),
        ("12", None),
        ("", None),
    ],
)
def test_which_of_two_is_better(answer, share):
    assert parse_preference(answer) == share
