"""Orders, shares of the work, files, and every way through a queue; no web page."""

import itertools
import json
from collections import Counter

import pytest

from hp_edit_trl.calibration import RatingSession, ReviewSession, assign_cases, load_guidelines, load_rubric
from hp_edit_trl.calibration.session import StaleError, annotator_name
from hp_edit_trl.ratings import append_answer, ratings_file, read_ratings
from hp_edit_trl.reviews import read_reviews
from hp_edit_trl.rewards import load_scorer_prompts
from tests.calibration.helpers import make_rating


KEYS = [(f"case-{i}", editor) for i in range(4) for editor in ("one", "two")]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ratings-anna.jsonl"


def open_session(file, annotator="anna", keys=KEYS, **options):
    return RatingSession(annotator, keys, file, "r:1", **options)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_rating_is_in_the_file_before_the_next_edit_is_known(file):
    session = open_session(file)
    key = session.next()
    for number in range(1, len(KEYS) + 1):
        following = session.rate(session.token(key), number % 6, f"comment {number}")
        assert len(lines(file)) == number
        last = lines(file)[-1]
        assert (last["id"], last["editor"]) == key
        assert (last["annotator"], last["score"], last["comment"], last["rubric"]) == (
            "anna",
            number % 6,
            f"comment {number}",
            "r:1",
        )
        key = following
    assert key is None
    assert {(line["id"], line["editor"]) for line in lines(file)} == set(KEYS)
    assert session.counts()["answered"] == len(KEYS) and session.counts()[1] == 2


def test_orders_depend_on_seed_and_annotator_and_on_nothing_else(file):
    queue = open_session(file).queue
    assert sorted(queue) == sorted(KEYS) and queue != KEYS
    assert open_session(file, keys=KEYS[::-1]).queue == queue
    assert open_session(file, annotator="bert").queue != queue
    assert open_session(file, seed=1).queue != queue
    # An edit that cannot be shown, or one that is new, leaves the others where they were.
    assert open_session(file, keys=KEYS[1:]).queue == [key for key in queue if key != KEYS[0]]


def test_no_editor_comes_first_more_often():
    first = Counter(
        next(key[1] for key in open_session("nowhere", annotator=f"a{i}").queue if key[0] == "case-0")
        for i in range(400)
    )
    assert 160 < first["one"] < 240  # four standard deviations


def test_a_session_goes_on_where_the_last_one_was(file):
    session = open_session(file)
    session.rate(session.token(session.next()), 4)
    session.rate(session.token(session.next()), None, "too dark")
    again = open_session(file)
    assert again.next() == session.next() == session.queue[2]
    assert again.answers == session.answers
    assert again.counts() == Counter({"answered": 1, "skipped": 1, 4: 1, None: 1})
    # What a page shows keeps its name, so that it can be answered after a restart.
    assert all(again.token(key) == session.token(key) for key in KEYS)


def test_a_second_click_changes_nothing(file):
    session = open_session(file)
    token = session.token(session.next())
    session.rate(token, 4)
    for again in (lambda: session.rate(token, 4), lambda: session.rate(token, None), lambda: session.back(token)):
        with pytest.raises(StaleError, match="already answered"):
            again()
    assert [line["score"] for line in lines(file)] == [4]


def test_back_forward_and_a_change(file):
    session = open_session(file)
    first, second, third = session.queue[:3]
    session.rate(session.token(first), 2, "first")
    session.rate(session.token(second), 3)
    assert session.back(session.token(third)) == second
    assert session.back(session.token(second)) == first
    assert session.back(session.token(first)) == first  # there is none before
    assert session.comment(first) == "first" and session.answers[first].score == 2
    assert session.forward(session.token(first)) == second
    assert session.forward(session.token(third)) == third  # what has no answer is not passed over
    assert session.rate(session.token(first), 5, "changed") == third  # back to where one was
    assert [(line["id"], line["editor"], line["score"]) for line in lines(file)] == [
        (*first, 2), (*second, 3), (*first, 5),
    ]  # fmt: skip
    ratings, _ = read_ratings(file)
    assert {(r.id, r.editor): (r.score, r.comment) for r in ratings} == {first: (5, "changed"), second: (3, "")}
    assert session.back(None) == session.queue[-1]  # from the end


def test_a_comment_is_kept_when_its_edit_is_left(file):
    session = open_session(file)
    first, second = session.queue[:2]
    session.rate(session.token(first), 2)
    session.back(session.token(second), "a thought")
    assert session.comment(second) == "a thought" and len(lines(file)) == 1
    session.forward(session.token(first), "and here")
    assert [(line["score"], line["comment"]) for line in lines(file)] == [(2, ""), (2, "and here")]
    session.forward(session.token(first), "and here")  # nothing new
    session.rate(session.token(second), 1, session.comment(second))
    assert [line["comment"] for line in lines(file)] == ["", "and here", "a thought"]


def test_what_was_skipped_can_be_shown_again(file):
    session = open_session(file)
    while (key := session.next()) is not None:
        skipped = key in session.queue[1:3]
        session.rate(session.token(key), None if skipped else 3)
    assert session.next_skipped() == session.queue[1]
    assert session.rate(session.token(session.queue[1]), 4) == session.queue[2]
    assert session.rate(session.token(session.queue[2]), 4) is None
    assert session.next_skipped() is None and session.counts()["answered"] == len(KEYS)


def test_nobody_has_to_have_something(file):
    session = open_session(file, keys=[])
    assert session.next() is None and session.back(None) is None and session.next_skipped() is None


def test_an_edit_that_has_gone_is_dropped(file):
    session = open_session(file)
    gone, *others = session.queue
    session.drop(gone)
    assert session.queue == others and session.next() == others[0]
    assert session.rate(session.token(others[0]), 1) == others[1]


@pytest.mark.parametrize("score", [6, -1, 2.5, "3", True])
def test_a_score_outside_the_scale_is_refused(file, score):
    session = open_session(file)
    with pytest.raises(ValueError, match="not an integer from 0 to 5"):
        session.rate(session.token(session.next()), score)
    assert not file.exists()


def test_all_aspects_are_scored_or_none(file):
    session = open_session(file, aspects=("adherence", "quality"))
    token = session.token(session.next())
    for given in (None, {}, {"adherence": 3, "quality": None}, {"adherence": 3, "quality": 6}, {"quality": True}):
        with pytest.raises(ValueError, match="Please score .*quality first"):
            session.rate(token, 4, aspects=given)
    assert not file.exists()
    session.rate(token, 4, aspects={"adherence": 3, "quality": 5, "taste": 1})
    session.rate(session.token(session.next()), None, aspects={"adherence": 3})
    assert [line["aspects"] for line in lines(file)] == [{"adherence": 3, "quality": 5}, {}]
    again = open_session(file, aspects=("adherence", "quality"))
    assert again.answers == session.answers and again.token(again.queue[0]) == session.token(session.queue[0])
    session.forward(session.token(session.queue[0]), "later")  # a comment keeps them
    assert lines(file)[-1]["aspects"] == {"adherence": 3, "quality": 5}
    append_answer(file, make_rating(id="case-3", rubric="r:1"))
    file.write_text(file.read_text().replace('"quality": 5', '"quality": 7'))
    _, problems = read_ratings(file)
    assert len(problems) == 2 and "the score 7 of the aspect 'quality'" in problems[0]


def test_a_line_that_was_cut_off_is_reported_and_rated_again(file, caplog):
    session = open_session(file)
    first, second = session.queue[:2]
    session.rate(session.token(first), 1)
    session.rate(session.token(second), 2)
    content = file.read_bytes()
    file.write_bytes(content[:-30])
    caplog.clear()
    again = open_session(file)
    assert "ratings-anna.jsonl, line 2: not a complete rating" in caplog.text
    assert again.next() == second
    again.rate(again.token(second), 3)
    ratings, problems = read_ratings(file)
    assert [(r.id, r.editor, r.score) for r in ratings] == [(*first, 1), (*second, 3)] and len(problems) == 1


def test_ratings_made_with_another_rubric_are_refused(file):
    append_answer(file, make_rating(rubric="r:0"))
    with pytest.raises(ValueError, match=r"rubric r:0, but this is r:1.*--rubric.*--output_dir"):
        open_session(file)
    append_answer(file, make_rating(id="case-1", rubric="r:1"))
    with pytest.raises(ValueError, match="several revisions"):
        open_session(file)


def test_two_names_never_share_a_file(tmp_path):
    names = [
        "anna", "Anna", "ANNA", "änna", "anna ", "an/na", "an\\na", "../anna", "..", "a" * 60, "a" * 61, "a" * 100,
        "anna.0123456789ab", "con", "安娜", "🙂", "anna-müller", "anna müller",
    ]  # fmt: skip
    names = {annotator_name(name) for name in names}
    files = [ratings_file(tmp_path, name) for name in names]
    assert len({file.name.lower() for file in files}) == len(names)  # also where case does not matter
    assert all(file.parent == tmp_path and file.name.isascii() and len(file.name) < 100 for file in files)
    for name, file in zip(names, files, strict=True):
        append_answer(file, make_rating(annotator=name))
    assert {rating.annotator for rating in read_ratings(tmp_path)[0]} == names


def test_names_have_one_spelling():
    assert annotator_name("  Anna \t Müller ") == annotator_name("Anna Mu\u0308ller") == "Anna Müller"
    for name in ("", "  ", "a" * 101, "a\x00b"):
        with pytest.raises(ValueError, match="name"):
            annotator_name(name)


@pytest.mark.parametrize("overlap", [1, 2, 3, 4])
def test_work_is_shared_evenly(overlap):
    keys = [(f"case-{i}", editor) for i in range(41) for editor in ("one", "two", None)]
    given = assign_cases(keys, "dcba", overlap)
    assert assign_cases(keys[::-1], "abcd", overlap).keys() == given.keys()
    assert {name: sorted(map(str, g)) for name, g in assign_cases(keys[::-1], "abcd", overlap).items()} == {
        name: sorted(map(str, g)) for name, g in given.items()
    }
    times = Counter(key for queue in given.values() for key in queue)
    assert set(times) == set(keys) and set(times.values()) == {overlap}  # nobody has an edit twice
    assert all(len(queue) == len(set(queue)) for queue in given.values())
    sizes = [len(queue) for queue in given.values()]
    assert max(sizes) - min(sizes) <= 3  # one case with its three edits
    for queue in given.values():  # all edits of a case go to the same people
        assert set(Counter(key[0] for key in queue).values()) == {3}
    if overlap == 2:  # agreement needs every pair
        for a, b in itertools.combinations(given.values(), 2):
            assert set(a) & set(b)
        assert assign_cases(keys, "abcd", 2, seed=1) != given


@pytest.mark.parametrize("overlap", [0, 3])
def test_an_overlap_that_cannot_be_is_refused(overlap):
    with pytest.raises(ValueError, match=f"overlap={overlap} with 2 annotators"):
        assign_cases(KEYS, ["anna", "bert"], overlap)


def test_the_rubric_is_the_scale_of_the_scorer_prompts():
    rubric = load_rubric()
    assert rubric.revision == "hp-edit-trl:rubric:2" and len(rubric.labels) == 6 and all(rubric.labels)
    assert "identical to the\n  source is a 0" in rubric.text  # section 5.4
    base = load_scorer_prompts()["base"].text
    for score, label in enumerate(rubric.labels):
        assert f"**{score} {label}**" in rubric.text and f"\n- {score}:" in base


def test_a_rubric_of_ones_own(tmp_path):
    file = tmp_path / "ours.md"
    file.write_text("---\nrevision: 7\n---\nOnly colors count.\n")
    rubric = load_rubric(file)
    assert (rubric.revision, rubric.text, rubric.labels) == ("ours.md:7", "Only colors count.", ("",) * 6)
    for content in ("no header", "---\nname: x\n---\ntext", "---\nrevision: 1\n---\n", "---\n: [\n---\ntext",
                    "---\nrevision: 1\nlabels: [a, b]\n---\ntext"):  # fmt: skip
        file.write_text(content)
        with pytest.raises(ValueError, match="ours.md"):
            load_rubric(file)
    with pytest.raises(FileNotFoundError):
        load_rubric(tmp_path / "none.md")


def test_tokens_tell_nothing(file):
    session = open_session(file)
    assert len({session.token(key) for key in KEYS}) == len(KEYS)
    for key in KEYS:
        assert key[0] not in session.token(key) and key[1] not in session.token(key)


TEXTS = {f"case-{i}": (f"Make it red, number {i}", "keep sharp: the cup" if i == 0 else None) for i in range(4)}


def open_reviews(folder, annotator="anna", texts=TEXTS, rubric="g:1"):
    return ReviewSession(annotator, texts, folder / f"reviews-{annotator}.jsonl", rubric, ("unclear",))


def test_reviews_are_saved_at_once_and_a_new_session_resumes(tmp_path):
    session = open_reviews(tmp_path)
    first, second, third, fourth = session.queue
    token = session.token(first)
    assert session.review(token, "accept") == second
    with pytest.raises(StaleError, match="already answered"):
        session.review(token, "reject", reason="unclear")
    assert session.review(session.token(second), "reject", "why not", "unclear") == third
    assert session.review(session.token(third), None) == fourth
    again = open_reviews(tmp_path)
    assert again.next() == fourth and again.counts() == {
        "answered": 2,
        "skipped": 1,
        "accept": 1,
        "reject": 1,
        None: 1,
    }
    assert all(again.token(key) == session.token(key) for key in session.queue)
    # What was said about another instruction is not about this one.
    other = open_reviews(tmp_path, texts=TEXTS | {first[0]: ("Make it blue", None)})
    assert other.next() == first and other.counts()["answered"] == 1
    reviews, problems = read_reviews(tmp_path)
    assert problems == [] and [(r.id, r.verdict, r.reason, r.comment, r.prompt) for r in reviews] == [
        (first[0], "accept", "", "", TEXTS[first[0]][0]),
        (second[0], "reject", "unclear", "why not", TEXTS[second[0]][0]),
        (third[0], None, "", "", TEXTS[third[0]][0]),
    ]
    with pytest.raises(ValueError, match="guidelines g:1, but these are g:2.*--output_dir"):
        open_reviews(tmp_path, rubric="g:2")


def test_a_correction_is_kept_until_it_is_saved_and_never_lost(tmp_path):
    session, key = open_reviews(tmp_path), ("case-0", None)
    assert session.texts(key) == ("Make it red, number 0", "keep sharp: the cup")
    session.keep_texts(session.token(key), "Make the cup red", "keep sharp: the red cup")
    session.back(session.token(key))
    assert session.texts(key) == ("Make the cup red", "keep sharp: the red cup")
    for verdict, prompt, reason in (
        ("accept", "Make the cup red", "The text was changed: save the correction"),
        ("correct", " Make it red, number 0", "The text is as it was"),
        ("correct", " ", "This case has a blank prompt|This case has an empty prompt"),
        ("correct", "x" * 5000, "This case has a prompt of 5000 characters"),
        ("reject", "x", "rejected for one of the reasons unclear, other"),
        ("maybe", "x", "verdict 'maybe' is not one of"),
    ):
        with pytest.raises(ValueError, match=reason):
            session.review(session.token(key), verdict, prompt=prompt, requirement="keep sharp: the cup")
    with pytest.raises(ValueError, match="write the reason"):
        session.review(session.token(key), "reject", " ", "other")
    assert not session.file.exists()
    session.review(session.token(key), "correct", prompt="Make the cup red ", requirement="")
    assert session.texts(key) == ("Make the cup red", "") == open_reviews(tmp_path).texts(key)
    # A comment that is added later keeps the correction
    session.forward(session.token(key), "nicer")
    (review,) = read_reviews(tmp_path)[0]
    assert (review.corrected_prompt, review.corrected_requirement, review.comment) == ("Make the cup red", "", "nicer")
    # Accepted after all
    session.review(session.token(key), "accept", prompt="Make it red, number 0", requirement="keep sharp: the cup")
    (review,) = read_reviews(tmp_path)[0]
    assert (review.verdict, review.corrected_prompt) == ("accept", None)


def test_guidelines_of_ones_own(tmp_path):
    assert load_guidelines().revision == "hp-edit-trl:guidelines:1" and len(load_guidelines().labels) == 5
    assert all(f"**{reason}**" in load_guidelines().text for reason in load_guidelines().labels)
    file = tmp_path / "ours.md"
    file.write_text("---\nrevision: 2\nreasons: [ugly]\n---\nOnly pretty ones.\n")
    assert load_guidelines(file).labels == ("ugly",) and load_guidelines(file).revision == "ours.md:2"
    for reasons in ("[]", "ugly", "[a, a]", "[other]", "[1]", "[a, b, c, d, e, f, g, h, i, j]"):
        file.write_text(f"---\nrevision: 2\nreasons: {reasons}\n---\nOnly pretty ones.\n")
        with pytest.raises(ValueError, match="ours.md have reasons"):
            load_guidelines(file)
