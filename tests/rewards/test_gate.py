import math

import pytest

from hp_edit_trl.judges import JudgeRefusedError
from hp_edit_trl.rewards import Gate, HPScorerReward, IdentityReward, Rewards, TournamentReward
from tests.rewards.helpers import AnswersJudge, call


def values(*numbers):
    return lambda prompts, completions, **columns: list(numbers)


def test_there_is_no_reward_where_the_test_fails():
    gate = Gate(values(0.9, 0.9, None, 0.9, None), values(0.8, 0.79, 0.1, None, 0.9), threshold=0.8)
    rewards, metrics, _ = call(gate, 5)
    # passed; not passed; not passed, so that the missing reward does not matter; no test applies; no reward applies
    assert rewards == [0.9, 0.0, 0.0, 0.9, None] and rewards.failed == [False] * 5
    assert metrics == {"gate_closed": 0.4}
    low = Gate(values(-3.0, 5.0), values(0, 1), threshold=0.5, closed=-10)
    assert call(low, 2)[0] == [-10, 5.0]


def test_a_failure_is_never_made_a_reward():
    def broken(prompts, completions, **columns):
        return Rewards([None, None, 0.7], failed=[True, False, False])

    good = values(0.5, 0.5, 0.5)
    assert call(Gate(good, broken, 0.6), 3)[0] == [None, 0.5, 0.5]  # the test failed; does not apply; is passed
    assert call(Gate(good, broken, 0.6), 3)[0].failed == [True, False, False]
    gated = call(Gate(broken, values(1, 1, 0), 0.5), 3)[0]
    assert gated == [None, None, 0.0] and gated.failed == [True, False, False]


def test_both_are_loaded_checked_and_counted():
    judge = AnswersJudge(lambda chat: None)
    gate = Gate(HPScorerReward(judge), IdentityReward(None), 0.5)
    gate.load(3)
    assert judge.loaded == 3 and not gate.is_remote and not gate.needs_groups
    assert gate.__name__ == "gated_HPScorerReward" and "0 unless IdentityReward" in gate.description
    assert len(gate.prompt_revisions) == 9
    with pytest.raises(ValueError, match="No scorer prompt for the task 'x'"):
        gate.check_tasks(["x"])
    rewards, metrics, extra = call(gate, 2)
    assert rewards == [None, None] and rewards.tally.failures == {"connection": 2}
    assert "identity" in metrics and "hp_score_failed" in metrics and "hp_score" in extra
    assert Gate(values(1), TournamentReward(judge), 0.5).needs_groups


def test_a_refused_key_leaves_no_rewards_that_did_not_pass_the_gate():
    def refused(prompts, completions, **columns):
        raise JudgeRefusedError("no access", rewards=[1.0])

    with pytest.raises(JudgeRefusedError, match="no access") as error:
        call(Gate(refused, values(0.0), 0.5))
    assert error.value.rewards is None


def test_bad_options():
    async def slow(prompts, completions, **columns):
        return [1.0]

    with pytest.raises(TypeError, match="test=.* must be a reward function that is not async"):
        Gate(values(1), slow, 0.5)
    with pytest.raises(TypeError, match="reward=3 must be a reward function"):
        Gate(3, values(1), 0.5)
    with pytest.raises(ValueError, match="threshold=nan and closed=0.0 must be finite"):
        Gate(values(1), values(1), math.nan)
    with pytest.raises(ValueError, match="returned 2 rewards for 1 completions"):
        call(Gate(values(1), values(1, 1), 0.5))
