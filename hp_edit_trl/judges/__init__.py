"""Judges: vision-language models that answer a prompt about images, one file per backend."""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import (
    Judge,
    Judgement,
    Parser,
    ScoreMode,
    describe_judge,
    load_for,
    parse_score,
    without_reasoning,
)
from .cache import CachedJudge
from .failures import FailureLimit, JudgeRefusedError, JudgeTally
from .server import ScoreServer, ServerJudge


if TYPE_CHECKING:
    from .transformers import TransformersJudge


def __getattr__(name: str) -> Any:
    if name != "TransformersJudge":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .transformers import TransformersJudge  # takes seconds to import, a server none

    return TransformersJudge


def load_judge(
    judge: str | Judge,
    judge_base_url: str | Sequence[str] | None = None,
    judge_revision: str | None = None,
    score_mode: ScoreMode = "integer",
    *,
    num_answers: int = 1,
    max_new_tokens: int = 16,
    parse: Parser = parse_score,
    batch_size: int = 8,
    max_concurrency: int = 16,
    timeout: float = 120.0,
    max_retries: int = 4,
    cache: str | Path | None = None,
) -> Judge:
    """
    Builds a judge from its name: a [`TransformersJudge`] in this process, or a [`ServerJudge`] if there is an address.

    Args:
        judge (`str` or [`Judge`]):
            Hub id, local folder, or the model's name on a server. A [`Judge`] is returned as it is, behind the cache
            if there is one; the other options are then its own.
        judge_base_url (`str` or `Sequence[str]`, *optional*):
            Address of an OpenAI-compatible server, e.g. `"http://localhost:8000/v1"`, or of several with that model,
            see [`ServerJudge`].
        judge_revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository. With a server, a label that tells models of one name apart.
        score_mode (`str`, *optional*, defaults to `"integer"`):
            `"integer"`: the score that the judge answers. `"expected"`: the expectation over the digits'
            probabilities.
        num_answers (`int`, *optional*, defaults to `1`):
            Number of answers whose scores are averaged.
        max_new_tokens (`int`, *optional*, defaults to `16`):
            Longest answer; raise it for judges that reason aloud.
        parse (`Callable[[str], float | None]`, *optional*, defaults to [`parse_score`]):
            Reads the score from an answer.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of cases judged together by a judge in this process.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Largest number of concurrent requests, to all servers together.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds after which an attempt to reach a server is given up, from the connection to the last byte.
        max_retries (`int`, *optional*, defaults to `4`):
            Number of further attempts with a server.
        cache (`str` or `Path`, *optional*):
            SQLite file that keeps the answers, see [`CachedJudge`].

    Raises:
        `TypeError`: If `judge` is neither a name nor a [`Judge`].
        `ValueError`: If an option is not valid, does not apply, or the model cannot be used.
        `ImportError`: If there is an address and the extra `server` is not installed.
    """
    loaded: Judge
    if not isinstance(judge, str):
        if not isinstance(judge, Judge):
            raise TypeError(
                f"judge={judge!r} must be the name of a model or a Judge: an object with `identity`, `load()` and a "
                "call that takes conversations and returns judgements."
            )
        if judge_base_url is not None or judge_revision is not None:
            raise ValueError(
                "judge_base_url and judge_revision are for a judge that is given by its name, but it is a "
                f"{type(judge).__name__}: set them there."
            )
        loaded = judge
    else:
        options: dict[str, Any] = {"num_answers": num_answers, "max_new_tokens": max_new_tokens, "parse": parse}
        if judge_base_url is not None:
            options |= {"max_concurrency": max_concurrency, "timeout": timeout, "max_retries": max_retries}
            loaded = ServerJudge(judge, judge_base_url, score_mode, revision=judge_revision, **options)
        else:
            from .transformers import TransformersJudge

            init_kwargs = {} if judge_revision is None else {"revision": judge_revision}
            options |= {"batch_size": batch_size, "model_init_kwargs": init_kwargs}
            loaded = TransformersJudge(judge, score_mode, **options)
    return loaded if cache is None else CachedJudge(loaded, cache)


def with_parser(judge: Judge, parse: Parser) -> Judge:
    """
    A judge like another one, with the same model, cache and settings, that reads other scores from its answers.

    Args:
        judge ([`Judge`]):
            A [`ServerJudge`] or [`TransformersJudge`], also behind a cache. Weights that it has loaded are shared.
        parse (`Callable[[str], float | None]`):
            Reads the score from an answer.

    Raises:
        `TypeError`: If it is a judge of another kind.
    """
    if isinstance(judge, CachedJudge):
        return CachedJudge(with_parser(judge.judge, parse), judge.path)
    from .transformers import TransformersJudge

    if not isinstance(judge, ServerJudge | TransformersJudge):
        raise TypeError(f"A {type(judge).__name__} cannot be made to read its answers with {parse.__name__}.")
    other = copy(judge)
    other.parse = parse
    return other


def load_early(judge: Judge, num_images: int = 2) -> None:
    """
    Asks a judge for its trial before other work starts that it is only needed after. Leaves out a model in this
    process, which is there when its turn comes and would take the memory that the other work needs.

    Args:
        judge ([`Judge`]):
            The judge.
        num_images (`int`, *optional*, defaults to `2`):
            Number of images of the largest case: its references and the edit.
    """
    from .transformers import TransformersJudge

    inner = judge.judge if isinstance(judge, CachedJudge) else judge
    if not isinstance(inner, TransformersJudge):
        load_for(judge, num_images)


__all__ = [
    "CachedJudge",
    "FailureLimit",
    "Judge",
    "JudgeRefusedError",
    "JudgeTally",
    "Judgement",
    "Parser",
    "ScoreServer",
    "ServerJudge",
    "TransformersJudge",
    "describe_judge",
    "load_early",
    "load_for",
    "load_judge",
    "parse_score",
    "with_parser",
    "without_reasoning",
]
