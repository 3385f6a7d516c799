"""
Rewards by judges that others have trained to score edits.

Such a judge scores well only what it was trained on, so that its prompts must be its authors'. They are read from the
authors' own files, which are not part of this package, and never executed. Paper, licence and file of each are in
`docs/rewards.md`.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..judges import Judge
from .answers import parse_aspects, parse_one_to_five, parse_pair_of_25, parse_preference
from .prompts import ScorerPrompt, read_texts
from .tournament import TournamentReward
from .vlm import VLMReward


def _authors_texts(scorer_prompts: str | Path, file: str, names: Sequence[str]) -> dict[str, str]:
    """Texts in a file of the authors of a judge, which is named itself or by its folder."""
    path = Path(scorer_prompts)
    path = path / file if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"scorer_prompts={str(scorer_prompts)!r} must be the authors' {file}, or a folder that holds it: see "
            "docs/rewards.md for where it is."
        )
    return read_texts(path, names)


def _scorer_prompt(name: str, text: str, shows_instruction: bool = True) -> ScorerPrompt:
    if shows_instruction and "{prompt}" not in text:
        raise ValueError(f"The authors' prompt for {name} has no place for the instruction: name another file.")
    return ScorerPrompt(name, f"{name}:sha-{hashlib.sha256(text.encode()).hexdigest()[:12]}", text)


def _formatted(name: str, text: str, **values: Any) -> str:
    """A template of `str.format` with its braces and values; those of the case stay in braces."""
    try:
        return text.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"The authors' prompt for {name} has another form ({type(error).__name__}: {error}): name another file."
        ) from error


def geometric_mean_of_25(consistency: float, quality: float) -> float:
    """The geometric mean of two scores from 0 to 25, brought to the range from 0 to 1."""
    return math.sqrt(consistency * quality) / 25


def thirds_above_one(mean: float) -> float:
    """A score from 1 to 4, brought to the range from 0 to 1."""
    return (mean - 1) / 3


class EditScoreReward(VLMReward):
    r"""
    Reward by EditScore: \\( \sqrt{SC \cdot PQ} / 10 \\). SC is the smaller of two scores for the success of the edit
    and for what it left alone, PQ the smaller of two for the naturalness and cleanness of the edit alone; the judge
    gives them from 0 to 25, which its authors divide by 2.5.

    The format is that of the models on Qwen2.5-VL (`EditScore/EditScore-7B`, `-32B`, `-72B`), which name each image:
    `<img1>: `. Several answers (`num_answers`, the authors' passes) are averaged before the mean is taken.

    Paper: [EditScore](https://huggingface.co/papers/2509.23909).

    Args:
        scorer_prompts (`str` or `Path`):
            The authors' `editscore/vie_prompts.py`, or its folder.
        judge (`str` or [`Judge`]):
            The judge, see [`VLMReward`]. The authors publish LoRAs: merge one into its base model, and name that.
        judge_base_url (`str` or `Sequence[str]`, *optional*):
            Its server, or several.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Longest answer.
        num_answers (`int`, *optional*, defaults to `1`):
            Number of answers to each prompt whose scores are averaged.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If a prompt is missing in it, or the judge cannot be used.
    """

    max_references = 1

    def __init__(
        self,
        scorer_prompts: str | Path,
        judge: str | Judge,
        judge_base_url: str | Sequence[str] | None = None,
        max_new_tokens: int = 512,
        num_answers: int = 1,
    ):
        names = (
            "_context_no_delimit_reasoning_first",
            "_prompts_0shot_two_image_edit_rule",
            "_prompts_0shot_tie_rule_SC",
            "_prompts_0shot_rule_PQ",
        )
        texts = _authors_texts(scorer_prompts, "vie_prompts.py", names)
        context, rule, consistency, quality = (texts[name] for name in names)
        consistency = "\n".join((context, rule, consistency.replace("10", "25"))).replace("<instruction>", "{prompt}")
        quality = "\n".join((context, quality.replace("10", "25")))
        prompts = {
            "editscore_sc": _scorer_prompt("editscore_sc", f"<img1>: {{reference}}<img2>: {{edit}}{consistency}"),
            "editscore_pq": _scorer_prompt("editscore_pq", f"<img1>: {{edit}}{quality}", shows_instruction=False),
        }
        super().__init__(
            prompts,
            parse_pair_of_25,
            geometric_mean_of_25,
            judge,
            judge_base_url,
            max_new_tokens=max_new_tokens,
            num_answers=num_answers,
            quote=False,
        )


class UnifiedReward(VLMReward):
    r"""
    Reward by UnifiedReward-Edit, scored edit by edit: \\( \sqrt{SC \cdot PQ} / 25 \\). SC is the smaller of its scores
    for the success of the edit and for what it left alone, PQ the smaller of those for naturalness and cleanness, each
    from 0 to 25. Its authors publish the prompts and leave open how to combine the scores; this is EditScore's way.

    Paper: [UnifiedReward](https://huggingface.co/papers/2503.05236).

    Args:
        scorer_prompts (`str` or `Path`):
            The authors' folder `UnifiedReward-Edit`, with `edit_pointwise_instruction_following.py` and
            `edit_pointwise_quality.py`.
        judge (`str` or [`Judge`], *optional*, defaults to `"CodeGoat24/UnifiedReward-Edit-qwen3vl-8b"`):
            The judge, see [`VLMReward`].
        judge_base_url (`str` or `Sequence[str]`, *optional*):
            Its server, or several.
        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Longest answer.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If the prompt is missing in it, or the judge cannot be used.
    """

    max_references = 1

    def __init__(
        self,
        scorer_prompts: str | Path,
        judge: str | Judge = "CodeGoat24/UnifiedReward-Edit-qwen3vl-8b",
        judge_base_url: str | Sequence[str] | None = None,
        max_new_tokens: int = 1024,
    ):
        consistency = _authors_texts(scorer_prompts, "edit_pointwise_instruction_following.py", ["problem"])["problem"]
        quality = _authors_texts(scorer_prompts, "edit_pointwise_quality.py", ["problem"])["problem"]
        consistency = consistency.replace("{instruction}", "{prompt}")
        prompts = {
            "unified_sc": _scorer_prompt("unified_sc", consistency),
            "unified_pq": _scorer_prompt("unified_pq", f"{{edit}}{quality}", shows_instruction=False),
        }
        super().__init__(
            prompts,
            parse_pair_of_25,
            geometric_mean_of_25,
            judge,
            judge_base_url,
            max_new_tokens=max_new_tokens,
            quote=False,
        )


class UnifiedPairReward(TournamentReward):
    """
    Reward by UnifiedReward-Edit, which compares the edits of a case two by two, see [`TournamentReward`].

    Args:
        scorer_prompts (`str` or `Path`):
            The authors' `UnifiedReward-Edit/edit_pairwise_rank.py`, or its folder.
        judge (`str` or [`Judge`], *optional*, defaults to `"CodeGoat24/UnifiedReward-Edit-qwen3vl-8b"`):
            The judge, see [`VLMReward`].
        judge_base_url (`str` or `Sequence[str]`, *optional*):
            Its server, or several.
        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Longest answer.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If the prompt is missing in it, or the judge cannot be used.
    """

    max_references = 1

    def __init__(
        self,
        scorer_prompts: str | Path,
        judge: str | Judge = "CodeGoat24/UnifiedReward-Edit-qwen3vl-8b",
        judge_base_url: str | Sequence[str] | None = None,
        max_new_tokens: int = 1024,
    ):
        text = _authors_texts(scorer_prompts, "edit_pairwise_rank.py", ["problem"])["problem"]
        prompt = _scorer_prompt("unified_pair", text.replace("{instruction}", "{prompt}"))
        super().__init__(judge, judge_base_url, prompt, parse_preference, max_new_tokens, quote=False)


class RationalReward(VLMReward):
    r"""
    Reward by RationalRewards-Edit: \\( (m - 1) / 3 \\), where m is the mean of its scores from 1 to 4 for text
    faithfulness, image faithfulness, physical and visual quality, and, if the edit has to show a text, text rendering.
    The authors' training script leaves image faithfulness out.

    Code: [RationalRewards](https://github.com/TIGER-AI-Lab/RationalRewards).

    Args:
        scorer_prompts (`str` or `Path`):
            The authors' `diffusion_rl_training/train_qwen_edit_rationalrewards.py`, or its folder.
        judge (`str` or [`Judge`], *optional*, defaults to `"TIGER-Lab/RationalRewards-8B-Edit"`):
            The judge, see [`VLMReward`].
        judge_base_url (`str` or `Sequence[str]`, *optional*):
            Its server, or several.
        max_new_tokens (`int`, *optional*, defaults to `2048`):
            Longest answer.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If a prompt is missing in it, or the judge cannot be used.
    """

    max_references = 1

    def __init__(
        self,
        scorer_prompts: str | Path,
        judge: str | Judge = "TIGER-Lab/RationalRewards-8B-Edit",
        judge_base_url: str | Sequence[str] | None = None,
        max_new_tokens: int = 2048,
    ):
        names = ("SYSTEM_PROMPT", "TASK_RELATED_TEMPLATE", "COMMON_TASK_GUIDELINE")
        texts = _authors_texts(scorer_prompts, "train_qwen_edit_rationalrewards.py", names)
        system, task, guideline = (texts[name] for name in names)
        task = task.replace("{request}", "{prompt}")
        for place in ("{reference}", "{edit}"):
            task = task.replace("<image>", place, 1)
        prompt = _scorer_prompt("rational_score", f"{system}{{user}}{task}\n\n{guideline}")
        super().__init__(
            {"rational_score": prompt},
            parse_aspects,
            thirds_above_one,
            judge,
            judge_base_url,
            max_new_tokens=max_new_tokens,
            quote=False,
        )


class FIRMReward(VLMReward):
    r"""
    Reward by FIRM-Edit: \\( E (w_1 + w_2 C) \\), with execution E and consistency C from 1 to 5 brought to the range
    from 0 to 1, and the weights 0.6 and 0.4 of the authors' recipe for Qwen-Image-Edit. What was left alone only
    counts as far as the edit was carried out.

    Paper: [Trust Your Critic](https://huggingface.co/papers/2603.12247).

    Args:
        scorer_prompts (`str` or `Path`):
            The authors' `editing/reward_server/prompt_template.py`, or its folder.
        judge (`str` or [`Judge`]):
            The judge, see [`VLMReward`].
        judge_base_url (`str` or `Sequence[str]`, *optional*):
            Its server, or several.
        execution_weight (`float`, *optional*, defaults to `0.6`):
            The first weight. The second is what is left to 1.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest answer.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If a prompt is missing in it, an option is not valid, or the judge cannot be used.
    """

    max_references = 1

    def __init__(
        self,
        scorer_prompts: str | Path,
        judge: str | Judge,
        judge_base_url: str | Sequence[str] | None = None,
        execution_weight: float = 0.6,
        max_new_tokens: int = 256,
    ):
        if not 0 <= execution_weight <= 1:
            raise ValueError(f"execution_weight={execution_weight} must be from 0 to 1.")
        names = {"firm_execution": "SCORE_EXECUTION", "firm_consistency": "SCORE_CONSISTENCY"}
        texts = _authors_texts(scorer_prompts, "prompt_template.py", list(names.values()))
        super().__init__(
            {
                name: _scorer_prompt(
                    name, _formatted(name, texts[theirs], prompt="{prompt}", requirement="{requirement}")
                )
                for name, theirs in names.items()
            },
            parse_one_to_five,
            self._combined,
            judge,
            judge_base_url,
            max_new_tokens=max_new_tokens,
            quote=False,
        )
        self.execution_weight = execution_weight

    def _combined(self, execution: float, consistency: float) -> float:
        return (execution - 1) / 4 * (self.execution_weight + (1 - self.execution_weight) * (consistency - 1) / 4)


class SpatialReward(VLMReward):
    r"""
    Reward by SpatialReward: \\( \sqrt{SC \cdot PQ} / 25 \\). The judge first says where the image was edited. SC is
    the smaller of its scores for the success of the edit and for what it left alone, PQ the smaller of those for
    naturalness and cleanness, each from 0 to 25. The authors' server offers this mean and a weighted one.

    Paper: [SpatialReward](https://huggingface.co/papers/2602.07458).

    Args:
        scorer_prompts (`str` or `Path`):
            The authors' `example/reward/server/spatial_reward_scorer.py`, or its folder.
        judge (`str` or [`Judge`], *optional*, defaults to `"SpatialReward/SpatialReward-8B"`):
            The judge, see [`VLMReward`].
        judge_base_url (`str` or `Sequence[str]`, *optional*):
            Its server, or several.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Longest answer.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If a prompt is missing in it, or the judge cannot be used.
    """

    max_references = 1

    def __init__(
        self,
        scorer_prompts: str | Path,
        judge: str | Judge = "SpatialReward/SpatialReward-8B",
        judge_base_url: str | Sequence[str] | None = None,
        max_new_tokens: int = 512,
    ):
        names = ("SC_PROMPT_TEMPLATE", "PQ_PROMPT_TEMPLATE")
        texts = _authors_texts(scorer_prompts, "spatial_reward_scorer.py", names)
        consistency, quality = (
            _formatted("SpatialReward", texts[name], score_range=25, instruction="{prompt}") for name in names
        )
        prompts = {
            "spatial_sc": _scorer_prompt("spatial_sc", consistency),
            "spatial_pq": _scorer_prompt("spatial_pq", f"{{edit}}{quality}", shows_instruction=False),
        }
        super().__init__(
            prompts,
            parse_pair_of_25,
            geometric_mean_of_25,
            judge,
            judge_base_url,
            max_new_tokens=max_new_tokens,
            quote=False,
        )
