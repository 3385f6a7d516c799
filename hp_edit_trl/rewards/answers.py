"""Readers of the answers of judges that reason and then score."""

import json
import re
from typing import Any

from ..judges import without_reasoning
from ..judges.base import LONGEST_ANSWER


def final_answer(answer: str) -> str:
    """
    What follows the reasoning that `</think>` closes; nothing if the reasoning was cut off, or if the answer is so
    long that its writer is stuck in a loop.
    """
    text = without_reasoning(answer).strip()
    return "" if "<think>" in text or len(text) > LONGEST_ANSWER else text


def json_values(text: str, key: str) -> list[Any]:
    """The values of a key in all JSON objects in a text."""
    found, decoder = [], json.JSONDecoder()
    for start in (match.start() for match in re.finditer(r'\{\s*"', text)):
        try:
            value, _ = decoder.raw_decode(text, start)
        except RecursionError:  # a judge that repeats one bracket until its answer ends
            return []
        except ValueError:
            continue
        if isinstance(value, dict) and key in value:
            found.append(value[key])
    return found


def listed_scores(answer: str, count: int, lowest: float, highest: float) -> list[float] | None:
    """
    Reads the scores in an answer such as `{"reasoning": "...", "score": [7, 8]}`; a single one may stand without a
    list. Judges that were trained to answer so leave quotation marks in their reasons as they are, or a comma at the
    end: then the one `"score"` with its list counts.

    Args:
        answer (`str`):
            The answer.
        count (`int`):
            Number of scores.
        lowest (`float`):
            Lowest score.
        highest (`float`):
            Highest score.

    Returns:
        `list[float]` or `None`: the scores; `None` if there is not exactly one list of so many within the range.
    """
    text = final_answer(answer)
    found = json_values(text, "score")
    if not found:
        lists = re.findall(r'"score"\s*:\s*(\[[^\[\]{}"]*\]|-?\d+(?:\.\d+)?)\s*(?=[,}\s]|$)', text)
        try:
            found = [json.loads(one) for one in lists]
        except ValueError:
            return None
    if len(found) != 1:
        return None
    scores = found[0] if isinstance(found[0], list) else [found[0]]
    if len(scores) != count or any(isinstance(one, bool) or not isinstance(one, int | float) for one in scores):
        return None
    return [float(one) for one in scores] if all(lowest <= one <= highest for one in scores) else None


def parse_pair_of_25(answer: str) -> float | None:
    """
    Reads the smaller of two scores from 0 to 25: the format of EditScore, UnifiedReward-Edit and SpatialReward. `None`
    if the answer does not hold exactly two, see [`listed_scores`].
    """
    scores = listed_scores(answer, 2, 0, 25)
    return None if scores is None else min(scores)


def parse_one_to_five(answer: str) -> float | None:
    """Reads one score from 1 to 5: the format of FIRM-Edit. `None` if the answer does not hold exactly one."""
    scores = listed_scores(answer, 1, 1, 5)
    return None if scores is None else scores[0]


def parse_aspects(answer: str) -> float | None:
    """
    Reads the mean of the scores from 1 to 4 in the format of RationalRewards: a line `## Score:` for text
    faithfulness, image faithfulness, physical and visual quality, and text rendering, which may be `N/A`. `None` if
    one is missing, or outside the range.
    """
    text = final_answer(answer).partition("# Summary")[0]
    starts: list[int] = []
    for heading in ("Text Faithfulness", "Image Faithfulness", "Physical and Visual Quality", "Text Rendering"):
        found = re.compile(rf"\d\.\W{{0,8}}{heading}", re.IGNORECASE).search(text, starts[-1] if starts else 0)
        if found is None:
            return None
        starts.append(found.end())
    given = []
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        score = re.search(r"##\W{0,8}Score[:*\s\[]+(\d+(?:\.\d+)?|N/?A\b)", text[start:end], re.IGNORECASE)
        if score is None:
            return None
        given.append(score[1].upper())
    if given[-1] in ("N/A", "NA"):  # only a text that has to be shown can be rendered
        given.pop()
    if any(one in ("N/A", "NA") for one in given):
        return None
    scores = [float(one) for one in given]
    return sum(scores) / len(scores) if all(1 <= one <= 4 for one in scores) else None


_IMAGE = r"(?:edited image|image|edit)"
_PREFERENCES = {
    1.0: rf"{_IMAGE} 1 is (?:the )?better",
    0.0: rf"{_IMAGE} 2 is (?:the )?better",
    0.5: rf"(?:both {_IMAGE}s|{_IMAGE}s? 1 and (?:{_IMAGE} )?2) are equally (?:good|bad)",
}


def parse_preference(answer: str) -> float | None:
    """
    Reads which of two edits is better: 1 for the first, 0 for the second, 0.5 for a tie; `None` if the answer says
    none of it, or more than one.

    Accepts `1`, `2` and `tie`, alone or as in `"Answer: 1"` and `"**2**"`, and the sentences of UnifiedReward-Edit,
    `"Edited image 1 is better"`, anywhere in the answer, or in `<answer>...</answer>` if there is that.
    """
    text = final_answer(answer)
    marked = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE)
    text = re.sub(r"[*_`\s]+", " ", marked[-1] if marked else text).strip().lower()
    label = rf"(?:(?:the )?(?:better|winner|answer|verdict)(?: {_IMAGE})?(?: is|:)? )?(?:{_IMAGE} )?"
    short = re.fullmatch(rf"{label}(1|2|tie)\.?", text)
    if short:
        return {"1": 1.0, "2": 0.0, "tie": 0.5}[short[1]]
    said = {value for value, pattern in _PREFERENCES.items() if re.search(rf"\b{pattern}\b", text)}
    return said.pop() if len(said) == 1 else None
