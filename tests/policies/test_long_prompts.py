import pytest
from datasets import Dataset

from hp_edit_trl.cases import BadCaseError
from hp_edit_trl.miniature.tiny import tiny_klein_pipeline, tiny_kontext_pipeline, tiny_pipeline
from hp_edit_trl.policies import check_prompt_lengths, policy_class
from tests.helpers import photo


def cases(*prompts: str) -> Dataset:
    return Dataset.from_dict({"id": [f"case-{i}" for i in range(len(prompts))], "prompt": list(prompts)})


@pytest.mark.parametrize("make", [tiny_klein_pipeline, tiny_kontext_pipeline])
def test_prompts_that_are_cut(make, caplog):
    pipeline = make()
    policy = policy_class(pipeline)(pipeline)
    # As long as can be: one token more is cut.
    words = "xq" * 400
    while len(policy.prompt_tokens([words])[0]) < policy.max_prompt_tokens + 1:
        words += "xq"
    short = words[: len(words) // 8]
    assert check_prompt_lengths(policy, cases(short, short + "a"), "dataset") == {}
    assert not caplog.text

    assert check_prompt_lengths(policy, cases(short, words, words), "dataset") == {}
    assert "2 prompts of dataset are longer than the" in caplog.text and "'case-1', 'case-2'." in caplog.text

    # Two different instructions that become one
    dataset = cases(short, words + " and make it red", words + " and make it blue", "y" + words)
    message = "2 of 4 cases of dataset.*Case 'case-1' has a prompt of .* reads .*those of another prompt"
    with pytest.raises(BadCaseError, match=message):
        check_prompt_lengths(policy, dataset, "dataset")
    assert list(check_prompt_lengths(policy, dataset, "dataset", "skip")) == [1, 2]
    # The pipeline does read the same of them, and something else of the other.
    encoded = [
        policy.encode([photo(64, 64)], prompt, None, 64).tensors["prompt_embeds"] for prompt in dataset["prompt"]
    ]
    assert encoded[1].equal(encoded[2]) and not encoded[1].equal(encoded[3])


def test_prompts_that_are_not_cut():
    pipeline = tiny_pipeline()
    policy = policy_class(pipeline)(pipeline)
    prompt = "xq" * 1500
    dataset = cases("Make it red", prompt)
    limit, count = policy.max_prompt_tokens, len(policy.prompt_tokens([prompt])[0])
    assert count > limit == 1024
    message = f"Case 'case-1' has a prompt of {count} tokens, but QwenImageEditPlusPipeline reads 1024: shorten it"
    with pytest.raises(BadCaseError, match=message):
        check_prompt_lengths(policy, dataset, "dataset")
    assert list(check_prompt_lengths(policy, dataset, "dataset", "skip")) == [1]
    # What is counted is what comes after the template, besides the images.
    short, long = (
        policy.encode([photo(64, 64)], text, None, 64).tensors["prompt_embeds"] for text in ("xq", "xq" * 90)
    )
    tokens = policy.prompt_tokens(["xq", "xq" * 90])
    assert len(long) - len(short) == len(tokens[1]) - len(tokens[0])
