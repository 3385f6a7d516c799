import json

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from hp_edit_trl.calibration import load_preferences, measure_preferences, preferences_table
from hp_edit_trl.calibration.preferences import read_preferences
from hp_edit_trl.cli import main
from hp_edit_trl.rewards import HPScorerReward, Rewards, TournamentReward
from tests.helpers import RuleJudge, photo
from tests.rewards.helpers import AnswersJudge, images_of


def plain(red):
    return PILImage.new("RGB", (16, 16), (red, 40, 40))


def redness(prompts, completions, **columns):
    return [np.asarray(image)[0, 0, 0] / 255 for image in completions]


@pytest.fixture(scope="module")
def editscore(tmp_path_factory):
    """Two cases in one task with one and two pairs, and one in another, for two dimensions."""
    rows = [
        ("a", 0, "add", "overall", (200, 10)),
        ("a", 0, "add", "overall", (10, 200)),
        ("b", 1, "add", "overall", (90, 90)),
        ("c", 2, "remove", "overall", (90, 10)),
        ("a", 0, "add", "consistency", (200, 10)),
    ]
    features = Features(
        {
            "key": List(Value("string")),
            "instruction": Value("string"),
            "task_type": Value("string"),
            "dimension": Value("string"),
            "input_image": Image(),
            "output_images": List(Image()),
        }
    )
    dataset = Dataset.from_list(
        [
            {
                "key": [f"{i}-0", f"{i}-1"],
                "instruction": prompt,
                "task_type": task,
                "dimension": dimension,
                "input_image": photo(16, 16, seed),
                "output_images": [plain(red) for red in reds],
            }
            for i, (prompt, seed, task, dimension, reds) in enumerate(rows)
        ],
        features=features,
    )
    folder = tmp_path_factory.mktemp("editscore") / "bench"
    dataset.save_to_disk(folder)
    return str(folder)


def test_how_often_a_reward_agrees(editscore):
    rows = measure_preferences(redness, load_preferences(editscore), chunk_size=2)
    found = [
        (row["dimension"], row["task"], row["n"], row["missing"], row["accuracy"]["value"], row["all_pairs"])
        for row in rows
    ]
    assert found == [
        ("overall", None, 4, 0, 0.5, 0.0),  # equal rewards are wrong, and one case has two pairs
        ("overall", "add", 3, 0, pytest.approx(1 / 3), 0.0),
        ("overall", "remove", 1, 0, 1.0, None),
        ("consistency", "add", 1, 0, 1.0, None),
    ]
    assert rows[0]["accuracy"]["low"] < 0.5 < rows[0]["accuracy"]["high"]
    table = preferences_table(rows)
    assert "| overall     | all    | 4     | 0       | 0.50 [" in table and table.count("\n") == 6


def test_pairs_with_a_missing_reward_are_left_out_and_a_dead_judge_stops(editscore):
    def some(prompts, completions, id, **columns):
        return Rewards(
            [None if name == "1" else value for name, value in zip(id, redness(0, completions), strict=True)]
        )

    row = measure_preferences(some, load_preferences(editscore))[0]
    assert (row["n"], row["missing"], row["accuracy"]["value"]) == (3, 1, pytest.approx(2 / 3))
    with pytest.raises(ConnectionError, match=r"3 in a row of the calls failed. .*6 connection"):
        measure_preferences(HPScorerReward(AnswersJudge(lambda chat: None)), load_preferences(editscore), chunk_size=1)


def test_rewards_by_comparison(editscore):
    def rule(conversation):
        first, second = (np.asarray(image)[0, 0, 0] for image in images_of(conversation)[-2:])
        return float(first > second)

    judge = AnswersJudge(rule)
    rows = measure_preferences(TournamentReward(judge), load_preferences(editscore), chunk_size=5)
    assert rows[0]["accuracy"]["value"] == 0.5 and len(judge.seen) == 10


@pytest.mark.parametrize(
    ("ranking", "comparison", "preferred"),
    [
        ("A>B", "AvsB", 1.0),
        ("B>A", "AvsB", 0.0),
        ("A<B", None, 0.0),
        ("C>A", "AvsC", 0.0),
        ("B > D", "BvsD", 1.0),
        ("A=B=Good", "AvsB", 0.5),
        ("A=B=Bad", "AvsB", 0.5),
    ],
)
def test_editreward_bench_of_several_edits(ranking, comparison, preferred):
    row = {
        "id": "x_1", "instruction": "do it", "source_image": photo(8, 8), "candidate_1": plain(1),
        "candidate_2": plain(2), "ranking": ranking, "comparison_type": comparison, "dataset": "3pair",
    }  # fmt: skip
    (one,) = read_preferences(Dataset.from_list([row]))
    assert (one.preferred, one.task, one.id, one.prompt) == (preferred, "3pair", "x_1", "do it")
    assert one.first != one.second
    with pytest.raises(ValueError, match=r"Row 0 \(x_1\) must have two edits and say which is preferred: .*'A>C'"):
        list(read_preferences(Dataset.from_list([row | {"ranking": "A>C", "comparison_type": "AvsB"}])))


def test_vcreward_bench(tmp_path, capsys):
    lines = []
    for i, winner in enumerate(("Image A", "Image B")):
        names = [f"./images/{i}-{part}.png" for part in ("source", "A", "B")]
        (tmp_path / "images").mkdir(exist_ok=True)
        for name, image in zip(names, (photo(16, 16, i), plain(250), plain(5)), strict=True):
            image.save(tmp_path / name)
        line = {"key": f"k{i}", "instruction": "do it", "source_image": names[0], "edited_images": names[1:]}
        lines.append(line | {"winner": winner, "task": "color"})
    file = tmp_path / "metadata.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (row,) = measure_preferences(HPScorerReward(RuleJudge()), load_preferences(str(tmp_path)))
    assert (row["dimension"], row["task"], row["accuracy"]["value"]) == ("visual_consistency", "color", 0.5)
    (tmp_path / "my_reward.py").write_text("def reward(prompts, completions, **columns):\n    return [1.0, 0.0] * 2\n")
    main(["measure-preferences", str(tmp_path), "--reward", f"{tmp_path}/my_reward.py:reward", "--confidence", "0.5"])
    assert "| visual_consistency | color | 2     | 0       | 0.50" in capsys.readouterr().out
    file.write_text(f"{json.dumps(lines[0])}\n{json.dumps({'key': 1})}\n")
    with pytest.raises(ValueError, match="Line 2 of .* has not the keys edited_images, instruction"):
        load_preferences(str(tmp_path))
    file.write_text(json.dumps(lines[0] | {"source_image": "../secret.png"}))
    with pytest.raises(ValueError, match="names the image .*secret.png, which is not below"):
        load_preferences(str(tmp_path))


def test_another_dataset(tmp_path):
    Dataset.from_list([{"prompt": "x"}]).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is no benchmark of preferences: it has the columns \['prompt'\]"):
        load_preferences(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        measure_preferences(redness, Dataset.from_list([{"a": 1}]), chunk_size=0)
