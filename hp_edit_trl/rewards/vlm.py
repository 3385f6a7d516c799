"""Rewards made of what a vision-language judge answers to scorer prompts."""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from ..judges import (
    CachedJudge,
    Judge,
    Judgement,
    JudgeTally,
    Parser,
    ServerJudge,
    describe_judge,
    load_judge,
    parse_score,
    with_parser,
)
from ..judges.base import fit_image, load_for
from ..judges.failures import check_not_refused
from ..utils.texts import without_control_tokens
from .base import Reward, Rewards, read_cases
from .prompts import ScorerPrompt, load_scorer_prompts


logger = logging.getLogger(__name__)


def equal_areas(edit: Image.Image, references: list[Image.Image]) -> tuple[Image.Image, list[Image.Image]]:
    """
    An edit and its references as the judge sees them, wherever it judges: in training, in the dataset builder and in
    benchmarks. What has more pixels than the edit, or than the largest reference, is scaled down to as many; nothing
    is enlarged and no aspect ratio changed. So the judge compares contents, not sharpness: an edit at 512 px that
    changes nothing looks like its source, however large that is.

    Args:
        edit (`PIL.Image.Image`):
            The edit.
        references (`list[PIL.Image.Image]`):
            The reference images.

    Returns:
        `tuple[PIL.Image.Image, list[PIL.Image.Image]]`: the edit and the references.
    """
    areas = [image.width * image.height for image in references]
    limit = min(edit.width * edit.height, max(areas))
    return fit_image(edit, limit), [fit_image(reference, limit) for reference in references]


def fill_conversation(
    prompt: ScorerPrompt,
    shown: Mapping[str, list[Image.Image]],
    instruction: str,
    requirement: str | None = None,
    quote: bool = True,
) -> list[dict[str, Any]]:
    """
    The conversation that a scorer prompt stands for.

    Args:
        prompt ([`ScorerPrompt`]):
            The prompt. `{user}` in it ends the system message. Names of images in braces, e.g. `{edit}`, stand for
            these images. If there is none, all images come first.
        shown (`Mapping[str, list[PIL.Image.Image]]`):
            The images by name.
        instruction (`str`):
            The prompt of the case.
        requirement (`str`, *optional*):
            Further requirements of the case.
        quote (`bool`, *optional*, defaults to `True`):
            Write both as JSON strings, see [`ScorerPrompt.fill`]. `False` is for prompts that a judge was trained
            with: also what looks like a control token in the prompt itself is kept.

    Returns:
        `list[dict]`: the messages.
    """
    if not quote:
        instruction = without_control_tokens(instruction)
        requirement = None if requirement is None else without_control_tokens(requirement)
    before, marker, user = prompt.text.partition("{user}")
    system, user = (before, user) if marker else ("", before)
    places = "|".join(re.escape(f"{{{name}}}") for name in shown)
    if not re.search(places, user):
        user = "".join(f"{{{name}}}" for name in shown) + user
    messages = []
    for role, text in (("system", system), ("user", user)):
        content: list[dict[str, Any]] = []
        for piece in re.split(f"({places})", text):  # what a case says is filled in afterwards, and names no image
            if re.fullmatch(places, piece):
                content += [{"type": "image", "image": image} for image in shown[piece[1:-1]]]
            elif piece:
                words = replace(prompt, text=piece).fill(instruction, requirement, quote)
                content.append({"type": "text", "text": words} | ({} if quote else {"trusted": True}))
        if content:
            messages.append({"role": role, "content": content})
    return messages


def read_by(
    parse: Parser | None, judge: str | Judge, judge_base_url: str | Sequence[str] | None = None, **options: Any
) -> Judge:
    """
    The judge that reads scores from its answers with a parser.

    Args:
        parse (`Callable[[str], float | None]`, *optional*):
            The parser. `None` leaves a judge that is given as it is.
        judge (`str` or [`Judge`]):
            Its name, or a judge. A [`ServerJudge`] or [`TransformersJudge`] is made to read its answers with `parse`;
            a judge of another kind reads them as it does.
        judge_base_url (`str` or `Sequence[str]`, *optional*):
            Its server, or several, if it is given by its name.
        **options:
            Options of [`load_judge`] for a judge that is given by its name.

    Raises:
        `ValueError`: If a judge that is given reads probabilities of digits, or its answers are too short.
        `TypeError`: If it is no judge.
    """
    if isinstance(judge, str):
        return load_judge(judge, judge_base_url, parse=parse or parse_score, **options)
    judge = load_judge(judge, judge_base_url)
    inner = judge.judge if isinstance(judge, CachedJudge) else judge
    if parse is None:
        return judge
    from ..judges import TransformersJudge

    if not isinstance(inner, ServerJudge | TransformersJudge):
        return judge
    if parse is not parse_score and judge.identity.get("score_mode") == "expected":
        raise ValueError(
            f"The judge has score_mode='expected', which reads digits, but {parse.__name__} has to read its words: "
            "use score_mode='integer'."
        )
    needed, given = options.get("max_new_tokens", 16), judge.identity.get("max_new_tokens", 16)
    if given < min(needed, 128):
        raise ValueError(
            f"The judge writes at most max_new_tokens={given}, too few for answers with reasons: allow {needed}."
        )
    return with_parser(judge, parse)


class JudgedReward(Reward):
    """
    Base of rewards that are made of the scores in a judge's answers. A subclass says what the judge is asked.

    Args:
        judge ([`Judge`]):
            The judge.
        normalize (`Callable[..., float]`):
            Makes the reward of the scores, in the order of the questions.
    """

    # Largest number of references that there is a place for
    max_references: int | None = None

    def __init__(self, judge: Judge, normalize: Callable[..., float]):
        super().__init__()
        self.judge = judge
        self.normalize = normalize

    @property
    def description(self) -> str:
        """Judge and prompts in one line: scores of scorers with different descriptions should not be mixed."""
        prompts = f", prompts {', '.join(self.prompt_revisions)}" if self.prompt_revisions else ""
        return f"{self.judge_description}, images at equal areas{prompts}"

    @property
    def is_remote(self) -> bool:
        """Whether the judge is on a server, so that this machine can do other work while it judges."""
        judge = self.judge.judge if isinstance(self.judge, CachedJudge) else self.judge
        return isinstance(judge, ServerJudge)

    @property
    def judge_description(self) -> str:
        """The judge's identity in one line, e.g. `"judge ServerJudge, name m, score_mode integer, ..."`."""
        return describe_judge(self.judge)

    def load(self, num_images: int = 2) -> None:
        """
        Loads the judge and raises an error if it cannot judge. Trainers call this before the first rollout.

        Args:
            num_images (`int`, *optional*, defaults to `2`):
                Number of images of the largest case: its references and the edit.
        """
        self.check_references(num_images - 1)
        load_for(self.judge, num_images)

    def check_references(self, count: int, case: str = "The largest case") -> None:
        """Raises `ValueError` if so many references cannot be judged."""
        if self.max_references is not None and count > self.max_references:
            raise ValueError(
                f"{case} has {count} references, but {type(self).__name__} judges {self.max_references}: leave "
                "such cases out, or use another reward."
            )

    def questions(
        self,
        prompt: str,
        edit: Image.Image,
        references: list[Image.Image],
        task: str | None = None,
        requirement: str | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        """The conversations that the judge sees for one edit, by the name of the score."""
        raise NotImplementedError

    def ask(
        self,
        prompts: list[str],
        edits: list[Image.Image],
        references: list[list[Image.Image]],
        tasks: list[str | None],
        requirements: list[str | None],
    ) -> list[dict[str, Judgement]]:
        """
        Judges edits.

        Args:
            prompts (`list[str]`):
                The instructions.
            edits (`list[PIL.Image.Image]`):
                The edits.
            references (`list[list[PIL.Image.Image]]`):
                The reference images of each case.
            tasks (`list[str | None]`):
                The task of each case.
            requirements (`list[str | None]`):
                Further requirements of each case.

        Returns:
            `list[dict[str, Judgement]]`: the judgements of each edit, by the name of the score.
        """
        columns = zip(prompts, edits, references, tasks, requirements, strict=True)
        asked = [self.questions(*case) for case in columns]
        judged = iter(self.judge([conversation for questions in asked for conversation in questions.values()]))
        answers = [{name: next(judged) for name in questions} for questions in asked]
        self.tally.add(judgement for judgements in answers for judgement in judgements.values())
        return answers

    def __call__(
        self,
        prompts: list[str],
        completions: list[Image.Image],
        image: list[Image.Image] | None = None,
        images: list[list[Image.Image]] | None = None,
        task: list[str | None] | None = None,
        requirement: list[str | None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> Rewards:
        """
        Rewards of edits, in TRL's convention for reward functions.

        Args:
            prompts (`list[str]`):
                The instructions.
            completions (`list[PIL.Image.Image]`):
                The edited images.
            image (`list[PIL.Image.Image]`, *optional*):
                The source image of each case.
            images (`list[list[PIL.Image.Image]]`, *optional*):
                Instead of `image`, for cases with several reference images.
            task (`list[str]`, *optional*):
                The task of each case. Without it HP-Scorer's base prompt is used.
            requirement (`list[str]`, *optional*):
                Further requirements of each case.
            log_extra (`Callable`, *optional*):
                Given by the trainer; receives the scores for the table of samples, by their names.
            log_metric (`Callable`, *optional*):
                Given by the trainer; receives the mean of each score, e.g. `hp_score`, and the share of cases without
                it, `hp_score_failed`.

        Raises:
            [`UnreadableImageError`]: If an image cannot be read. All images are read by
                [`~hp_edit_trl.utils.images.read_image`], and may also be paths.
            [`~hp_edit_trl.judges.JudgeRefusedError`]: If a server refuses the judge's key. It holds the rewards of
                the samples that were judged before.

        Returns:
            [`Rewards`]: the rewards, `None` where there is no score.
        """
        count = len(prompts)
        ids, references, edits = read_cases(type(self).__name__, completions, image, images, columns.get("id"))
        for case, several in zip(ids, references, strict=True):
            self.check_references(len(several), f"Case {case!r}")
        answers = self.ask(prompts, edits, references, task or [None] * count, requirement or [None] * count)
        rewards: list[float | None] = []
        for case, prompt, judgements in zip(ids, prompts, answers, strict=True):
            for judgement in judgements.values():
                if judgement.score is None:
                    logger.warning(f"No score for case {case} ({prompt!r}): the judge answered {judgement.excerpt!r}.")
            scores = [judgement.score for judgement in judgements.values()]
            rewards.append(None if None in scores else float(self.normalize(*scores)))
        for name in answers[0] if answers else ():
            values = [judgements[name].score for judgements in answers]
            known = [score for score in values if score is not None]
            if log_extra is not None:
                log_extra(name, values)
            if log_metric is not None:
                log_metric(f"{name}_failed", 1 - len(known) / count)
                if known:
                    log_metric(name, sum(known) / len(known))
        everything = [judgement for judgements in answers for judgement in judgements.values()]
        check_not_refused(everything, rewards=rewards)
        return Rewards(rewards, tally=JudgeTally().add(everything))


class VLMReward(JudgedReward):
    """
    Reward of an edit by a vision-language judge with scorer prompts of your own: the general form of
    [`HPScorerReward`] and of the rewards by judges that others have trained.

    The judge is asked each of the prompts about each edit. Its answers are read by `parse`, and `normalize` makes one
    reward of their scores. Images are shown at equal areas, see [`equal_areas`]. A judgement that failed or cannot be
    read leaves the reward missing, `None`.

    Args:
        prompts (`dict[str, str | ScorerPrompt]` or `str`):
            The scorer prompts by name, or a folder or Hub repository of them, see [`load_scorer_prompts`]. Scores are
            logged under the names. `{prompt}` and `{requirement}` stand for the texts of the case, `{reference}` and
            `{edit}` for its images. Without these two, references and edit come before the text. `{user}` ends the
            system message, if there is one.
        parse (`Callable[[str], float | None]` or `None`):
            Reads the score from an answer, `None` if it holds none. Its name is part of the judge's identity. `None`
            is for a judge that is given, which then reads its answers as it does.
        normalize (`Callable[..., float]`):
            Makes the reward of the scores, which it is given in the order of the prompts. Rewards from 0 to 1 combine
            best with others.
        judge (`str` or [`Judge`]):
            Model id for a [`TransformersJudge`] in this process, or for a [`ServerJudge`] if `judge_base_url` is
            given; or a judge, for settings beyond these.
        judge_base_url (`str` or `Sequence[str]`, *optional*):
            Address of an OpenAI-compatible server that serves the judge, or of several.
        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Longest answer. A judge that is given has its own.
        num_answers (`int`, *optional*, defaults to `1`):
            Number of answers to each prompt whose scores are averaged.
        quote (`bool`, *optional*, defaults to `True`):
            Write instruction and requirement as JSON strings, which they cannot end. `False` keeps the words of
            prompts that a judge was trained with.

    Raises:
        `ValueError`: If an option or a prompt is not valid, or the judge cannot be used.
        `ImportError`: If `judge_base_url` is given and the extra `server` is not installed.

    Example:

    ```python
    >>> reward = VLMReward(
    ...     {"sharpness": "{edit}How sharp is this image, from 0 to 5? Answer with one digit."},
    ...     parse_score,
    ...     lambda sharpness: sharpness / 5,
    ...     "Qwen/Qwen3-VL-8B-Instruct",
    ...     "http://localhost:8000/v1",
    ... )
    ```
    """

    def __init__(
        self,
        prompts: Mapping[str, str | ScorerPrompt] | str,
        parse: Parser | None,
        normalize: Callable[..., float],
        judge: str | Judge,
        judge_base_url: str | Sequence[str] | None = None,
        max_new_tokens: int = 1024,
        num_answers: int = 1,
        quote: bool = True,
    ):
        if not prompts:
            raise ValueError("prompts is empty: at least one scorer prompt is needed.")
        given = load_scorer_prompts(prompts) if isinstance(prompts, str) else prompts
        self.scorer_prompts = {
            name: ScorerPrompt(name, f"{name}:sha-{hashlib.sha256(one.encode()).hexdigest()[:12]}", one)
            if isinstance(one, str)
            else one
            for name, one in given.items()
        }
        self.quote = quote
        options = {"max_new_tokens": max_new_tokens, "num_answers": num_answers}
        super().__init__(read_by(parse, judge, judge_base_url, **options), normalize)

    @property
    def prompt_revisions(self) -> list[str]:
        """The revisions of the scorer prompts."""
        return sorted({prompt.revision for prompt in self.scorer_prompts.values()})

    def questions(
        self,
        prompt: str,
        edit: Image.Image,
        references: list[Image.Image],
        task: str | None = None,
        requirement: str | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        """The conversations that the judge sees for one edit, by the name of the score."""
        edit, references = equal_areas(edit, references)
        shown = {"reference": references, "edit": [edit]}
        return {
            name: fill_conversation(one, shown, prompt, requirement, self.quote)
            for name, one in self.scorer_prompts.items()
        }
