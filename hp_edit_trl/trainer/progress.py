"""What a training prints: one line per log, in plain words. Trackers and the trainer's state keep all metrics."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


FAULTS = {  # what is worth saying only if it happens
    "frac_reward_missing": "{:.0%} of the rewards missing",
    "bad_cases": "bad cases: {:.0f}",
    "skipped_updates": "skipped updates: {:.0f}",
}


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes, of a duration in seconds: `"8 min 05 s"`, `"2 h 10 min"`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds // 60 % 60:02d} min"


def in_words(metrics: Mapping[str, Any]) -> list[str]:
    """
    The metrics of a log that tell how well a training goes: the reward, or for pairs the loss; scores that reward
    functions have logged (names that end in `score`); the share of pairs that the policy gets right; and faults.

    Args:
        metrics (`Mapping[str, Any]`):
            The metrics by their name, without the prefix of an evaluation.
    """
    known = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not math.isnan(value)
    }
    main = "loss" if "rewards/accuracies" in known else "reward"  # the loss of the other trainers is always near 0
    words = [f"{main} {known[main]:.3f}"] if main in known else []
    words += [f"{name} {value:.2f}" for name, value in known.items() if name.split("_")[-1] == "score"]
    if "rewards/accuracies" in known:
        words.append(f"right on {known['rewards/accuracies']:.0%} of the pairs")
    return words + [text.format(known[name]) for name, text in FAULTS.items() if known.get(name)]


class ProgressLines(TrainerCallback):
    """
    Prints one line per log of a training, with what matters of it in plain words: the update, the reward where new
    edits were sampled or the loss of pairs, the score where there is one, and the time left, from the end of the first
    generation batch on. Every trainer has it, in the place of transformers' callback that prints all metrics.

    In a terminal there is also a progress bar, unless `disable_tqdm` is set. Only the main process prints.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._evaluation: tqdm | None = None
        self._start: tuple[float, int] | None = None  # time and update at which training began or was resumed
        self._end: float | None = None  # the time at which it will end

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._start = self._end = None
        if not state.is_world_process_zero:
            return
        done = f", resumed after {state.global_step}" if state.global_step else ""
        self._say(f"Training: {state.max_steps} updates{done}")
        self._bar = self._new_bar(args, "Training", state.max_steps, state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._start is None:  # not earlier: an evaluation at the start is not part of the updates
            self._start = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        # An update that samples edits takes longer than those that learn from them: whole generation batches count.
        microbatches = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)
        period = max(1, microbatches // args.gradient_accumulation_steps)
        if self._start is not None and state.global_step % period == 0:
            now, (began, first) = time.monotonic(), self._start
            self._end = now + (now - began) / (state.global_step - first) * (state.max_steps - state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if state.is_world_process_zero and logs and "loss" in logs:
            self._say(f"update {state.global_step} of {state.max_steps}", *in_words(logs), *self._left(state))

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ):
        if not state.is_world_process_zero:
            return
        if self._evaluation is None:
            self._evaluation = self._new_bar(args, "Evaluating", len(eval_dataloader))
        self._evaluation.update()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if not state.is_world_process_zero:
            return
        self._close_evaluation()
        # Metrics begin with "eval", or "eval_" and the name of a dataset. Trainer itself adds the time that it took.
        metrics = metrics or {}
        times = [name for name in metrics if name.endswith("_runtime")]
        prefix = min(times, key=len, default="").removesuffix("runtime")
        own = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
        of = f" of {prefix[5:-1]}" if prefix.startswith("eval_") and prefix != "eval_" else ""
        self._say(f"evaluation{of} after {state.global_step} updates", *in_words(own))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if not state.is_world_process_zero:
            return
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._start is not None:
            seconds, done = time.monotonic() - self._start[0], state.global_step - self._start[1]
            self._say(f"Trained {done} updates in {duration(seconds)}")

    def _left(self, state: TrainerState) -> list[str]:
        if self._end is None or state.global_step >= state.max_steps:
            return []
        return [f"{duration(max(0, self._end - time.monotonic()))} left"]

    def _new_bar(self, args: TrainingArguments, name: str, total: int, initial: int = 0) -> tqdm:
        # `None`: not where there is no terminal, e.g. in a log file
        return tqdm(
            total=total, initial=initial, desc=name, leave=False, dynamic_ncols=True, disable=args.disable_tqdm or None
        )

    def _close_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    @staticmethod
    def _say(*words: str) -> None:
        tqdm.write(" | ".join(words))  # above the bars
        sys.stdout.flush()  # a log file has the line at once
