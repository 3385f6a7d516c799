import math

import pytest
from PIL import Image, ImageOps

from hp_edit_trl import HPScorerReward
from hp_edit_trl.judges import Judgement
from hp_edit_trl.utils.images import UnreadableImageError
from tests.helpers import photo


class ScriptedJudge:
    """Answers from a list and keeps what it was shown."""

    def __init__(self, scores):
        self.scores = scores
        self.seen = []

    @property
    def identity(self):
        return {"judge": "ScriptedJudge"}

    def load(self, num_images=2):
        pass

    def __call__(self, conversations):
        self.seen += conversations
        return [Judgement(self.scores[i], "scripted") for i in range(len(conversations))]


def test_reward_of_each_score():
    reward = HPScorerReward(ScriptedJudge([0, 1, 2, 3, 4, 5, 4.5, None]))
    images = [photo(32, 32)] * 8
    values = reward(prompts=["x"] * 8, completions=images, image=images)
    assert values[:6] == pytest.approx([0.0067, 0.0474, 0.2689, 0.7311, 0.9526, 0.9933], abs=1e-4)
    assert values[6] == pytest.approx(1 / (1 + math.exp(-2 * 4.5 + 5)))
    assert values[7] is None
    other = HPScorerReward(ScriptedJudge([3]), alpha=1.0, beta=0.0)
    assert other(prompts=["x"], completions=images[:1], image=images[:1])[0] == pytest.approx(1 / (1 + math.exp(-3)))


def test_what_the_judge_is_shown():
    judge = ScriptedJudge([5, 5, 5])
    source, second, edit = photo(32, 32, 1), photo(32, 32, 2), photo(32, 32, 3)
    reward = HPScorerReward(judge)
    reward(
        prompts=["Add a cat", "Blur it", "Do it"],
        completions=[edit] * 3,
        images=[[source], [source], [source, second]],
        task=["add", "bokeh", None],
        requirement=["black", None, None],
    )
    add, bokeh, plain = judge.seen
    assert add[0]["role"] == "system" and "adding an object" in add[0]["content"][0]["text"]
    assert 'Instruction: "Add a cat"\nRequirements: "black"' in add[0]["content"][0]["text"]
    assert "Requirements: none" in bokeh[0]["content"][0]["text"]
    assert [part.get("text") or part["image"] for part in add[1]["content"]] == ["Image A:", source, "Image B:", edit]
    assert [part.get("text") or part["image"] for part in plain[1]["content"]] == [
        "Image A, picture 1:", source, "Image A, picture 2:", second, "Image B:", edit,
    ]  # fmt: skip
    assert plain[0]["content"][0]["text"].startswith("You grade one example of an edited picture")


@pytest.mark.parametrize(
    ("edit", "references", "shown"),
    [
        ((64, 64), [(256, 256)], [(64, 64), (64, 64)]),  # sampled below the photograph's size
        ((256, 128), [(64, 32)], [(64, 32), (64, 32)]),
        ((64, 64), [(64, 64)], [(64, 64), (64, 64)]),
        ((100, 50), [(50, 100)], [(100, 50), (50, 100)]),  # the same area: nothing is done
        ((64, 64), [(16, 16), (128, 32)], [(64, 64), (16, 16), (128, 32)]),  # a small reference stays small
        ((128, 128), [(16, 16), (32, 128)], [(64, 64), (16, 16), (32, 128)]),  # the largest counts
        ((3, 1), [(3000, 1000)], [(3, 1), (3, 1)]),
    ],
)
def test_images_are_shown_at_equal_areas(edit, references, shown):
    scorer = HPScorerReward(ScriptedJudge([]))
    edit, references = photo(*edit), [photo(*size, seed=1) for size in references]
    content = scorer.conversation("x", edit, references)[1]["content"]
    pictures = [part["image"] for part in content if part["type"] == "image"]
    assert [picture.size for picture in (pictures[-1], *pictures[:-1])] == shown
    for picture, given in zip((pictures[-1], *pictures[:-1]), (edit, *references), strict=True):
        assert picture.size != given.size or picture.tobytes() == given.tobytes()


def test_rows_with_one_image_beside_rows_with_several():
    judge = ScriptedJudge([5, 5])
    one, two = photo(32, 32, 1), photo(32, 32, 2)
    reward = HPScorerReward(judge)
    reward(prompts=["x"] * 2, completions=[one] * 2, image=[one, None], images=[None, [one, two]])
    assert [sum("image" in part for part in chat[1]["content"]) for chat in judge.seen] == [2, 3]
    with pytest.raises(ValueError, match="of every case"):
        reward(prompts=["x"], completions=[one], image=[None], images=[None])


def test_one_prompt_for_all_tasks():
    judge = ScriptedJudge([5])
    HPScorerReward(judge, task="base")(prompts=["x"], completions=[photo(8, 8)], image=[photo(8, 8)], task=["add"])
    assert "adding an object" not in judge.seen[0][0]["content"][0]["text"]


def test_missing_scores_are_counted_and_logged_with_their_case(caplog):
    reward = HPScorerReward(ScriptedJudge([4, None]))
    metrics, extra = {}, {}
    images = [photo(32, 32)] * 2
    values = reward(
        prompts=["x", "y"], completions=images, image=images, id=["first", "second"],
        log_metric=metrics.__setitem__, log_extra=extra.__setitem__,
    )  # fmt: skip
    assert values[1] is None
    assert metrics == {"hp_score": 4.0, "hp_score_failed": 0.5} and extra == {"hp_score": [4, None]}
    assert "No score for case second ('y'): the judge answered 'scripted'" in caplog.text
    metrics.clear()
    HPScorerReward(ScriptedJudge([None]))(["x"], images[:1], image=images[:1], log_metric=metrics.__setitem__)
    assert metrics == {"hp_score_failed": 1.0}  # no mean of nothing


def test_bad_input(tmp_path):
    reward = HPScorerReward(ScriptedJudge([5]))
    with pytest.raises(ValueError, match="No scorer prompt for the task 'removal'. There are prompts for: add,"):
        reward(prompts=["x"], completions=[photo(8, 8)], image=[photo(8, 8)], task=["removal"])
    with pytest.raises(ValueError, match="column `image` or `images`"):
        reward(prompts=["x"], completions=[photo(8, 8)])
    with pytest.raises(ValueError, match="No scorer prompt for the task 'x'"):
        HPScorerReward(ScriptedJudge([]), task="x")
    with pytest.raises(ValueError, match="score_mode='mean' is not known"):
        HPScorerReward("m", judge_base_url="http://127.0.0.1:9/v1", score_mode="mean")
    with pytest.raises(FileNotFoundError, match="There is no file or folder /no/such/folder"):
        HPScorerReward("/no/such/folder")
    with pytest.raises(ValueError, match="The judge .* has no processor"):
        HPScorerReward(str(tmp_path))


def test_what_is_not_a_judge_is_refused():
    with pytest.raises(TypeError, match="must be the name of a model or a Judge"):
        HPScorerReward(lambda conversations: [])
    with pytest.raises(ValueError, match="judge_base_url and judge_revision are for a judge"):
        HPScorerReward(ScriptedJudge([1]), judge_base_url="http://127.0.0.1:9/v1")


def test_images_are_read_as_everywhere():
    judge, source = ScriptedJudge([5]), photo(48, 32)
    turned = ImageOps.exif_transpose(source).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    seen_through = source.copy()
    seen_through.putalpha(0)
    HPScorerReward(judge)(prompts=["x"], completions=[turned], image=[seen_through])
    shown = [part["image"] for part in judge.seen[0][1]["content"] if part["type"] == "image"]
    assert shown[0].getcolors() == [(48 * 32, (255, 255, 255))] and shown[1].tobytes() == source.tobytes()
    with pytest.raises(UnreadableImageError, match="The edit of case 'a' cannot be decoded: floating-point"):
        HPScorerReward(judge)(prompts=["x"], completions=[source.convert("F")], image=[source], id=["a"])
