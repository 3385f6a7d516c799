import io
import itertools
import sys
from unittest import mock

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hp_edit_trl import FlowGRPOEditConfig
from hp_edit_trl.trainer import progress
from hp_edit_trl.trainer.progress import ProgressLines, duration, in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (605, "10 min 05 s"),
        (3599.9, "1 h 00 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (
            {
                "loss": 0.1,
                "reward": 0.81249,
                "hp_score": 4.126,
                "hp_score_failed": 0.1,
                "time/train": 3.0,
                "epoch": 1.0,
            },
            ["reward 0.812", "hp_score 4.13"],
        ),
        ({"loss": 0.25, "rewards/accuracies": 0.625}, ["loss 0.250", "right on 62% of the pairs"]),
        (
            {"loss": 0.25, "reward": float("nan"), "frac_reward_missing": 1.0},
            ["100% of the rewards missing"],
        ),
        (
            {"reward": 1, "bad_cases": 2, "skipped_updates": 0, "frac_reward_missing": 0.0},
            ["reward 1.000", "bad cases: 2"],
        ),
        ({"loss": -0.0001, "clip_ratio/region_mean": 0.1}, []),  # an update without new edits
        ({"reward": "high", "score": None}, []),
    ],
)
def test_a_log_in_words(metrics, words):
    assert in_words(metrics) == words


class Run:
    """A run of 10 updates, of which 2 are made already, seen by the callback. A look at the clock takes a minute."""

    def __init__(self, tmp_path, is_main=True, disable_tqdm=True):
        self.callback = ProgressLines()
        self.args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=disable_tqdm)
        self.state = TrainerState(max_steps=10, global_step=2, is_world_process_zero=is_main)

    def __call__(self, event, **values):
        getattr(self.callback, f"on_{event}")(self.args, self.state, TrainerControl(), **values)

    def play(self):
        with mock.patch.object(progress.time, "monotonic", itertools.count(0, 60).__next__):
            self("train_begin")
            for batch in ("one", "two"):
                self("prediction_step", eval_dataloader=[batch] * 2)
            self("evaluate", metrics={"eval_faces_reward": 0.5, "eval_faces_runtime": 3.0, "epoch": 1.0})
            self("step_begin")
            self.state.global_step = 4
            self("step_end")
            self("log", logs={"loss": 0.1, "reward": 0.75, "grad_norm": 0.3})
            self("log", logs={"eval_reward": 0.5})  # is told with the evaluation
            self(
                "evaluate",
                metrics={"eval_reward": 0.5, "eval_score": 4.0, "eval_my_runtime": 1.0, "eval_runtime": 3.0},
            )
            self.state.global_step = 10
            self("log", logs={"loss": 0.1, "reward": 0.75})
            self("log", logs={"train_loss": 0.1, "train_runtime": 9.0})
            self("train_end")


LINES = """\
Training: 10 updates, resumed after 2
evaluation of faces after 2 updates | reward 0.500
update 4 of 10 | reward 0.750 | 2 min 00 s left
evaluation after 4 updates | reward 0.500 | score 4.00
update 10 of 10 | reward 0.750
Trained 8 updates in 3 min 00 s
"""


def test_one_line_per_log(tmp_path, capsys):
    Run(tmp_path).play()
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (LINES, "")


def test_the_time_left_does_not_jump_with_the_updates_that_sample(tmp_path, capsys, monkeypatch):
    run = Run(tmp_path)
    batches = {"num_generations": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    run.args = FlowGRPOEditConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **batches)
    run.state.global_step, run.state.max_steps = 0, 6
    now = [0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    run("train_begin")
    for update, seconds in enumerate([50, 10] * 3, 1):  # the first of two updates samples their edits
        run("step_begin")
        now[0] += seconds
        run.state.global_step = update
        run("step_end")
        run("log", logs={"loss": 0.1})
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:] == [
        "update 1 of 6",
        "update 2 of 6 | 2 min 00 s left",
        "update 3 of 6 | 1 min 10 s left",
        "update 4 of 6 | 1 min 00 s left",
        "update 5 of 6 | 10 s left",
        "update 6 of 6",
    ]


def test_only_the_main_process_prints(tmp_path, capsys):
    Run(tmp_path, is_main=False, disable_tqdm=False).play()
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


@pytest.mark.parametrize(
    ("is_terminal", "disable_tqdm", "bar"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_bar_in_terminals_alone(tmp_path, monkeypatch, capsys, is_terminal, disable_tqdm, bar):
    file = io.StringIO()
    file.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", file)
    Run(tmp_path, disable_tqdm=disable_tqdm).play()
    assert ("Training" in file.getvalue(), "Evaluating" in file.getvalue()) == (bar, bar)
    assert capsys.readouterr().out == LINES
