"""Prompts that are longer than a policy's text encoder reads."""

import logging

from datasets import Dataset

from ..cases import NAMED_CASES, report_bad_cases
from .edit_policy import EditPolicy


logger = logging.getLogger(__name__)


def check_prompt_lengths(
    policy: EditPolicy, dataset: Dataset, name: str, on_bad_case: str = "error"
) -> dict[int, str]:
    """
    Finds the cases whose prompts are longer than a policy reads. Only its tokenizers are used.

    Where the pipeline cuts prompts, a warning names the cases. A case is bad if its prompt is cut to the tokens of a
    different one, because the two could not be told apart. Where the pipeline does not cut, all cases with longer
    prompts are bad.

    Args:
        policy ([`EditPolicy`]):
            The policy.
        dataset ([`~datasets.Dataset`]):
            The cases.
        name (`str`):
            Its name in errors.
        on_bad_case (`str`, *optional*, defaults to `"error"`):
            As in [`~hp_edit_trl.cases.check_cases`].

    Returns:
        `dict[int, str]`: the bad cases, as [`~hp_edit_trl.cases.check_cases`] returns them.

    Raises:
        [`~hp_edit_trl.cases.BadCaseError`]: If there are bad cases and they are not to be skipped.
    """
    limit, pipeline = policy.max_prompt_tokens, type(policy.pipeline).__name__
    prompts = dataset["prompt"][:]
    ids = dataset["id"][:] if "id" in dataset.features else range(len(dataset))
    distinct = [prompt for prompt in dict.fromkeys(prompts) if isinstance(prompt, str)]
    tokens = dict(zip(distinct, policy.prompt_tokens(distinct), strict=True))
    same: dict[tuple[int, ...], set[str]] = {}  # prompts by what is read of them, if it is all that can be read
    for prompt, its_tokens in tokens.items():
        if len(its_tokens) >= limit:
            same.setdefault(tuple(its_tokens[:limit]), set()).add(prompt)

    bad: dict[int, str] = {}
    cut: list[str] = []
    for row, (case_id, prompt) in enumerate(zip(ids, prompts, strict=True)):
        count = len(tokens.get(prompt, ()))
        if count <= limit:
            continue
        case = f"Case {case_id!r}" if "id" in dataset.features else f"Row {row}"
        told = f"{case} has a prompt of {count} tokens, but {pipeline} reads {limit}"
        alike = same[tuple(tokens[prompt][:limit])]
        if not policy.cuts_prompts:
            bad[row] = f"{told}: shorten it."
        elif len(alike) > 1:
            bad[row] = f"{told}, and these are also those of another prompt: shorten them."
        else:
            cut.append(repr(case_id))
    report_bad_cases(bad, len(dataset), name, on_bad_case)
    if cut:
        more = f" and {len(cut) - NAMED_CASES} more" if len(cut) > NAMED_CASES else ""
        logger.warning(
            "%d prompts of %s are longer than the %d tokens that %s reads, and are cut: those of the cases %s%s.",
            len(cut), name, limit, pipeline, ", ".join(cut[:NAMED_CASES]), more,
        )  # fmt: skip
    return bad
