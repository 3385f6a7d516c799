import numpy as np
import pytest
from PIL import Image

from hp_edit_trl.rewards import HPScorerReward, TournamentReward
from hp_edit_trl.rewards.checks import check_whole_groups
from hp_edit_trl.rewards.tournament import cyclic_share, win_shares
from tests.rewards.helpers import AnswersJudge, call, images_of


def reds(*values):
    return [Image.new("RGB", (16, 16), (value, 0, 0)) for value in values]


def red(image):
    return int(np.asarray(image)[0, 0, 0])


def redder(conversation):
    first, second = map(red, images_of(conversation)[-2:])
    return 0.5 if first == second else float(first > second)


def test_wins_ties_and_missing_comparisons():
    assert win_shares({(0, 1): 1.0, (0, 2): 1.0, (1, 2): 0.5}, 3) == [1.0, 0.25, 0.25]
    assert win_shares({(0, 1): 1.0, (1, 2): 1.0, (0, 2): 0.0}, 3) == [0.5, 0.5, 0.5]  # a cycle
    assert win_shares({(0, 1): 1.0, (0, 2): None, (1, 2): None}, 3) == [1.0, 0.0, None]
    assert win_shares({(0, 1): None}, 2) == [None, None]
    # A participant who lacks more than half of three comparisons
    results = {(0, 1): 1.0, (0, 2): None, (0, 3): None, (1, 2): 1.0, (1, 3): 1.0, (2, 3): 0.0}
    assert win_shares(results, 4) == [None, pytest.approx(2 / 3), 0.0, 0.5]
    assert win_shares({}, 1) == [None]


def test_shares_rank_as_a_bradley_terry_model_does():
    rng = np.random.default_rng(0)
    results = {(i, j): float(rng.integers(0, 5)) / 4 for i in range(6) for j in range(i + 1, 6)}
    strength = np.ones(6)  # Zermelo's iteration, which has the shares as its only statistic
    for _ in range(2000):
        wins, weights = np.full(6, 0.1), np.zeros(6)
        for (i, j), share in results.items():
            wins[i], wins[j] = wins[i] + share, wins[j] + 1 - share
            weights[[i, j]] += 1 / (strength[i] + strength[j])
        strength = wins / weights
        strength /= strength.sum()
    shares = np.array(win_shares(results, 6))
    order = np.argsort(shares)
    assert (np.diff(strength[order])[np.diff(shares[order]) > 0] > 0).all()


def test_cycles_are_counted():
    assert cyclic_share({(0, 1): 1.0, (1, 2): 1.0, (0, 2): 0.0}, 3) == 1.0
    assert cyclic_share({(0, 1): 1.0, (1, 2): 1.0, (0, 2): 1.0}, 3) == 0.0
    assert cyclic_share({(0, 1): 1.0, (1, 2): 0.5, (0, 2): 0.0}, 3) is None  # not all have beaten each other
    assert cyclic_share({(0, 1): None, (1, 2): 1.0, (0, 2): 0.0}, 3) is None


def test_each_edit_meets_each_other_one_of_its_case_in_both_orders():
    judge = AnswersJudge(redder)
    edits = reds(10, 200, 30, 40, 40)
    rewards, metrics, _ = call(TournamentReward(judge), 5, completions=edits, id=["a", "b", "a", "a", "b"])
    assert rewards == [0.0, 1.0, 0.5, 1.0, 0.0] and rewards.failed == [False] * 5
    shown = sorted(tuple(map(red, images_of(chat)[-2:])) for chat in judge.seen)
    assert shown == [(10, 30), (10, 40), (30, 10), (30, 40), (40, 10), (40, 30), (40, 200), (200, 40)]
    assert len(images_of(judge.seen[0])) == 3
    assert metrics == {"pair_failed": 0.0, "pair_agreement": 1.0, "pair_cycles": 0.0}
    assert rewards.tally.judgements == 8


def test_without_ids_edits_of_one_prompt_that_follow_each_other_are_of_one_case():
    reward = TournamentReward(AnswersJudge(redder))
    assert call(reward, 4, completions=reds(1, 90, 1, 90), prompts=["x", "x", "y", "y"])[0] == [0.0, 1.0, 0.0, 1.0]


def test_a_judge_that_favors_a_place_finds_no_difference():
    rewards, metrics, _ = call(TournamentReward(AnswersJudge(lambda chat: 1.0)), 3, id=["a"] * 3)
    assert rewards == [0.5] * 3 and metrics["pair_agreement"] == 0.0


def test_a_missing_half_is_a_missing_comparison():
    def rule(conversation):
        first, second = map(red, images_of(conversation)[-2:])
        return None if (first, second) == (90, 10) else float(first > second)

    rewards, metrics, _ = call(TournamentReward(AnswersJudge(rule)), 2, completions=reds(10, 90), id=["a"] * 2)
    assert rewards == [None, None] and rewards.failed == [True, True] and metrics == {"pair_failed": 1.0}
    rewards, metrics, _ = call(TournamentReward(AnswersJudge(rule)), 3, completions=reds(10, 90, 50), id=["a"] * 3)
    assert rewards == [0.0, 1.0, 0.5] and metrics["pair_failed"] == pytest.approx(1 / 3)


def test_a_single_edit_has_nothing_to_be_compared_with():
    judge = AnswersJudge(redder)
    rewards, metrics, _ = call(TournamentReward(judge), 2, id=["a", "b"])
    assert rewards == [None, None] and rewards.failed == [False, False] and not judge.seen and not metrics


def test_the_trial_shows_one_image_more_than_a_case_has():
    judge = AnswersJudge(redder)
    TournamentReward(judge).load(2)
    assert judge.loaded == 3


def test_edits_of_a_case_on_several_processes_cannot_be_compared():
    reward = TournamentReward(AnswersJudge(redder))
    check_whole_groups([reward], 8, 4)
    check_whole_groups([HPScorerReward(AnswersJudge(redder)), print], 6, 4)
    with pytest.raises(ValueError, match="a process samples 6 edits .* no multiple of num_generations=4"):
        check_whole_groups([reward], 6, 4)
