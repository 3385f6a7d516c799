import multiprocessing

import pytest

from hp_edit_trl import TransformersJudge
from hp_edit_trl.judges import CachedJudge, Judgement
from hp_edit_trl.miniature.tiny import tiny_judge
from tests.helpers import RuleJudge, photo


def chat(text="Score it", seed=0, size=(32, 32)):
    pictures = [{"type": "image", "image": photo(*size, seed=seed + i)} for i in range(2)]
    return [
        {"role": "system", "content": [{"type": "text", "text": text}]},
        {"role": "user", "content": [{"type": "text", "text": "Image A:"}, *pictures]},
    ]


def test_nothing_is_asked_twice(tmp_path):
    judge = RuleJudge()
    cached = CachedJudge(judge, tmp_path / "sub" / "cache.sqlite")
    first = cached([chat(), chat(seed=3), chat()])
    assert judge.asked == 2 and [one.cached for one in first] == [False, False, True]
    assert first[0].score == first[2].score == judge([chat()])[0].score
    # In another run
    judge = RuleJudge()
    again = CachedJudge(judge, tmp_path / "sub" / "cache.sqlite")([chat(seed=3), chat(), chat(seed=9)])
    assert judge.asked == 1 and [one.cached for one in again] == [True, True, False]
    assert [one.score for one in again[:2]] == [first[1].score, first[0].score]
    assert again[0].input_tokens == 0 and again[0].answer == first[1].answer
    assert CachedJudge(judge, tmp_path / "sub" / "cache.sqlite")([]) == []


@pytest.mark.parametrize(
    "other",
    [
        lambda: (RuleJudge(), chat("Score it.")),  # another prompt or instruction
        lambda: (RuleJudge(), chat(seed=1)),  # other pixels
        lambda: (RuleJudge(), chat(size=(16, 64))),  # as many pixels in another shape
        lambda: (RuleJudge("other"), chat()),  # another judge
    ],
)
def test_whatever_decides_the_answer_is_part_of_the_key(tmp_path, other):
    CachedJudge(RuleJudge(), tmp_path / "cache")([chat()])
    judge, conversation = other()
    CachedJudge(judge, tmp_path / "cache")([conversation])
    assert judge.asked == 1
    same = RuleJudge()
    CachedJudge(same, tmp_path / "cache")([chat()])
    assert same.asked == 0


def test_one_pixel_by_one_grey_level_is_another_picture(tmp_path):
    judge = RuleJudge()
    changed = chat()
    picture = changed[1]["content"][2]["image"].copy()
    red, green, blue = picture.getpixel((31, 31))
    picture.putpixel((31, 31), (red ^ 1, green, blue))
    changed[1]["content"][2] = {"type": "image", "image": picture}
    CachedJudge(judge, tmp_path / "cache")([chat(), changed])
    assert judge.asked == 2


def test_prose_is_remembered_and_a_failure_is_not(tmp_path):
    prose = RuleJudge(rule=lambda text, pictures: "I like it")
    assert CachedJudge(prose, tmp_path / "cache")([chat()])[0].score is None
    (again,) = CachedJudge(prose, tmp_path / "cache")([chat()])
    assert prose.asked == 1 and again.score is None and again.answer == "I like it" and again.answered

    class Dead(RuleJudge):
        def __call__(self, conversations):
            self.asked += 1
            return [Judgement(None, "APITimeoutError", answered=False) for _ in conversations]

    dead = Dead("dead")
    for _ in range(2):
        assert not CachedJudge(dead, tmp_path / "cache")([chat()])[0].answered
    assert dead.asked == 2


def test_judgements_that_cannot_be_kept_are_not_lost(tmp_path, caplog):
    cached = CachedJudge(
        RuleJudge(rule=lambda text, pictures: (tmp_path / "cache").write_bytes(b"gone" * 999) and 4),
        tmp_path / "cache",
    )
    assert cached([chat()])[0].score == 4
    assert "1 judgements were not kept" in caplog.text


def test_a_file_that_is_no_cache(tmp_path):
    (tmp_path / "cache").write_text("something else, long enough to be taken for a database " * 20)
    with pytest.raises(ValueError, match="cannot be used: file is not a database"):
        CachedJudge(RuleJudge(), tmp_path / "cache")
    assert (tmp_path / "cache").read_text().startswith("something else")


def _fill(path, start):
    cached = CachedJudge(RuleJudge(), path)
    for i in range(start, start + 20):
        cached([chat(f"number {i}")])


def test_processes_share_a_file(tmp_path):
    context = multiprocessing.get_context("forkserver")
    workers = [context.Process(target=_fill, args=(tmp_path / "cache", start)) for start in (0, 10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    judge = RuleJudge()
    assert all(one.cached for one in CachedJudge(judge, tmp_path / "cache")([chat(f"number {i}") for i in range(30)]))


def test_the_identity_of_a_local_model_changes_with_its_files(tmp_path):
    folder = tiny_judge(str(tmp_path / "judge"))
    before = TransformersJudge(folder).identity
    assert before == TransformersJudge(folder).identity
    assert before != TransformersJudge(folder, "expected").identity
    assert before != TransformersJudge(folder, max_new_tokens=5).identity
    assert before == TransformersJudge(folder, batch_size=3).identity  # the same scores
    assert before != TransformersJudge(folder, model_init_kwargs={"attn_implementation": "eager"}).identity
    tiny_judge(folder, seed=1)
    assert before != TransformersJudge(folder).identity
