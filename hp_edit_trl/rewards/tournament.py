"""A reward by comparisons: each edit of a case against each other one."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from ..judges import Judge, JudgeTally, Parser, load_for
from ..judges.failures import check_not_refused
from .answers import parse_preference
from .base import Rewards, read_cases
from .prompts import ScorerPrompt, load_benchmark_prompts
from .vlm import JudgedReward, equal_areas, fill_conversation, read_by


logger = logging.getLogger(__name__)


def win_shares(results: Mapping[tuple[int, int], float | None], count: int) -> list[float | None]:
    """
    The share of won comparisons of each participant of a tournament. A tie is half a win. If all have met, this ranks
    them as a Bradley-Terry model does, and cycles (A beats B, B beats C, C beats A) are no special case: their members
    have equal shares.

    Args:
        results (`Mapping[tuple[int, int], float | None]`):
            For each pair of participants, the share of the first: 1 if it won, 0 if the other did. `None` if the
            comparison is missing.
        count (`int`):
            Number of participants.

    Returns:
        `list[float | None]`: the shares, over the comparisons that there are. `None` for a participant who lacks more
        than half of the comparisons.
    """
    shares: list[float | None] = []
    for one in range(count):
        won = [
            share if first == one else 1 - share
            for (first, second), share in results.items()
            if one in (first, second) and share is not None
        ]
        shares.append(sum(won) / len(won) if won and 2 * len(won) >= count - 1 else None)
    return shares


def cyclic_share(results: Mapping[tuple[int, int], float | None], count: int) -> float | None:
    """The share of cycles among the threes of a tournament that have all beaten each other; `None` without any."""
    won = {pair: share for pair, share in results.items() if share not in (None, 0.5)}
    beats = {(a, b) if share > 0.5 else (b, a) for (a, b), share in won.items() if share is not None}
    threes = [
        three
        for three in itertools.combinations(range(count), 3)
        if sum(pair in beats for pair in itertools.permutations(three, 2)) == 3
    ]
    cycles = sum({(a, b), (b, c), (c, a)} <= beats or {(b, a), (c, b), (a, c)} <= beats for a, b, c in threes)
    return cycles / len(threes) if threes else None


class TournamentReward(JudgedReward):
    """
    Reward of an edit by a judge that compares it with each other edit of its case: the share of comparisons that it
    wins. Where the scores of a group would all be equal, comparisons may still leave a spread.

    Each pair is shown in both orders, because a judge may favor a place. If one answer is missing, the comparison is.
    An edit that lacks more than half of its comparisons has no reward. See [`win_shares`] for ties and cycles.

    A group of G edits takes G (G - 1) judgements. The mean reward of a group is always 0.5: progress shows in other
    rewards, e.g. one with a weight of 0. A case with a single edit, as in an evaluation, has nothing to be compared
    with, and the reward does not apply.

    Paper on win shares as rewards: [Pref-GRPO](https://huggingface.co/papers/2508.20751).

    Args:
        judge (`str` or [`Judge`]):
            Model id for a [`TransformersJudge`] in this process, or for a [`ServerJudge`] if `judge_base_url` is
            given; or a judge, for settings beyond these.
        judge_base_url (`str` or `Sequence[str]`, *optional*):
            Address of an OpenAI-compatible server that serves the judge, or of several.
        scorer_prompt ([`ScorerPrompt`], *optional*):
            What the judge is asked. `{prompt}` and `{requirement}` stand for the texts of the case, `{reference}`,
            `{edit_1}` and `{edit_2}` for its images, which come first if none of these is there. By default this
            package's prompt.
        parse (`Callable[[str], float | None]`, *optional*, defaults to [`parse_preference`]):
            Reads from an answer which edit is better: 1 for the first, 0 for the second, 0.5 for a tie.
        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Longest answer. A judge that is given has its own.
        quote (`bool`, *optional*, defaults to `True`):
            Write instruction and requirement as JSON strings, see [`VLMReward`].

    Raises:
        `ValueError`: If an option is not valid, or the judge cannot be used.
        `ImportError`: If `judge_base_url` is given and the extra `server` is not installed.
    """

    needs_groups = True

    def __init__(
        self,
        judge: str | Judge,
        judge_base_url: str | Sequence[str] | None = None,
        scorer_prompt: ScorerPrompt | None = None,
        parse: Parser = parse_preference,
        max_new_tokens: int = 1024,
        quote: bool = True,
    ):
        super().__init__(read_by(parse, judge, judge_base_url, max_new_tokens=max_new_tokens), float)
        self.scorer_prompt = scorer_prompt or load_benchmark_prompts("pairwise", ["better"], filled="better")["better"]
        self.quote = quote

    @property
    def prompt_revisions(self) -> list[str]:
        """The revision of the scorer prompt."""
        return [self.scorer_prompt.revision]

    def load(self, num_images: int = 2) -> None:
        """Gets ready, see [`Reward.load`]: a comparison shows one edit more than a case has."""
        self.check_references(num_images - 1)
        load_for(self.judge, num_images + 1)

    def compare(
        self,
        prompt: str,
        edits: Sequence[Image.Image],
        references: list[Image.Image],
        requirement: str | None = None,
    ) -> dict[tuple[int, int], list[dict[str, Any]]]:
        """The conversations that the judge sees for the edits of a case, by the numbers of the two edits."""
        asked = {}
        for pair in itertools.permutations(range(len(edits)), 2):
            first, second = (equal_areas(edits[i], references) for i in pair)
            shown = {"reference": first[1], "edit_1": [first[0]], "edit_2": [second[0]]}
            asked[pair] = fill_conversation(self.scorer_prompt, shown, prompt, requirement, self.quote)
        return asked

    def __call__(  # type: ignore[override]
        self,
        prompts: list[str],
        completions: list[Image.Image],
        image: list[Image.Image] | None = None,
        images: list[list[Image.Image]] | None = None,
        requirement: list[str | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> Rewards:
        """
        Rewards of edits, in TRL's convention for reward functions. Edits of one `id` are of one case; without ids,
        edits of one prompt that follow each other are. `log_metric` receives `pair_failed` (share of comparisons
        without a result), `pair_agreement` (share of comparisons with the same winner in both orders) and
        `pair_cycles` (share of cycles among threes).

        Raises:
            [`~hp_edit_trl.judges.JudgeRefusedError`]: If a server refuses the judge's key.

        Returns:
            [`Rewards`]: the shares, `None` where they are missing or there is no other edit of the case.
        """
        ids, references, edits = read_cases(type(self).__name__, completions, image, images, columns.get("id"))
        requirements = requirement or [None] * len(edits)
        groups = _groups(columns.get("id"), prompts)
        asked = []
        for first, *others in groups:
            self.check_references(len(references[first]), f"Case {ids[first]!r}")
            shown = [edits[place] for place in (first, *others)]
            asked.append(self.compare(prompts[first], shown, references[first], requirements[first]))
        judged = self.judge([conversation for pairs in asked for conversation in pairs.values()])
        self.tally.add(judged)
        answers = iter(judged)
        rewards: list[float | None] = [None] * len(edits)
        failed = [False] * len(edits)
        results: list[float | None] = []
        agree: list[bool] = []
        cycles: list[float] = []
        for group, pairs in zip(groups, asked, strict=True):
            scores = {pair: next(answers).score for pair in pairs}
            both = {pair: (scores[pair], scores[pair[::-1]]) for pair in itertools.combinations(range(len(group)), 2)}
            met = {
                pair: None if one is None or other is None else (one + 1 - other) / 2
                for pair, (one, other) in both.items()
            }
            results += met.values()
            agree += [one == 1 - other for one, other in both.values() if one is not None and other is not None]
            cyclic = cyclic_share(met, len(group))
            cycles += [] if cyclic is None else [cyclic]
            for place, share in zip(group, win_shares(met, len(group)), strict=True):
                rewards[place], failed[place] = share, share is None and len(group) > 1
                if failed[place]:
                    logger.warning(f"Too few comparisons of an edit of case {ids[place]} have a result.")
        missing = [share is None for share in results]
        means: dict[str, Sequence[float]] = {"pair_failed": missing, "pair_agreement": agree, "pair_cycles": cycles}
        for name, values in means.items():
            if log_metric is not None and values:
                log_metric(name, sum(values) / len(values))
        check_not_refused(judged, rewards=rewards)
        return Rewards(rewards, failed, JudgeTally().add(judged))


def _groups(ids: Sequence[Any] | None, prompts: Sequence[str]) -> list[list[int]]:
    """The places of the edits of each case: those of one id, or of one prompt that follow each other."""
    if ids is None:
        runs = itertools.groupby(range(len(prompts)), key=prompts.__getitem__)
        return [list(places) for _, places in runs]
    groups: dict[Any, list[int]] = {}
    for place, one in enumerate(ids):
        groups.setdefault(one, []).append(place)
    return list(groups.values())
