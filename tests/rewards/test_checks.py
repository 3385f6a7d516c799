import asyncio
import json
import math
import threading
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from hp_edit_trl.rewards import HPScorerReward, Rewards
from hp_edit_trl.rewards.base import check_reward_tasks, load_reward
from hp_edit_trl.rewards.checks import (
    as_reward_funcs,
    awaited,
    check_rewards,
    check_signature,
    own_copy,
    reward_names,
)
from tests.rewards.helpers import AnswersJudge


IDS = ["a", "b", "c"]


@pytest.mark.parametrize(
    "returned",
    [
        [0, 0.5, None],
        (0, 0.5, None),
        [np.float32(0), torch.tensor(0.5), None],
        [False, np.array(0.5), None],
        [np.False_, torch.tensor(0.5, dtype=torch.bfloat16), None],
        [0, 0.5, np.ma.masked],
        np.ma.array([0, 0.5, 7], mask=[False, False, True]),
        np.array([0, 0.5, None]),
    ],
)
def test_sequences_of_numbers_and_none(returned):
    first, second, third = check_rewards(returned, "f", IDS)
    assert (first, second) == (0.0, 0.5) and math.isnan(third)


def test_arrays_and_tensors():
    assert check_rewards(np.array([1.0, 2.0, 3.0]), "f", IDS) == [1, 2, 3]
    assert check_rewards(torch.tensor([1, 2, 3], dtype=torch.bfloat16, requires_grad=False), "f", IDS) == [1, 2, 3]


@pytest.mark.parametrize(
    "returned",
    [
        {"a": 1, "b": 2, "c": 3},
        0.5,
        None,
        (x for x in (1, 2, 3)),
        "123",
        {1, 2, 3},
        [[1], [2], [3]],
        ["1", "2", "3"],
        np.ones((3, 2)),
        torch.ones(3, 1),
        torch.tensor(1.0),
        [1, 2, {"score": 3}],
        [1, 2, 1j],
        [1, 2, np.complex64(1)],
        [1, 2, np.timedelta64(1, "s")],
        [1, 2, Decimal(3)],
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3).to_sparse(),
        torch.ones(3, device="meta"),
        [1, 2, np.zeros(100_000)],
        [1, 2, "3" * 100_000],
        b"123",
    ],
    ids=lambda returned: type(returned).__name__,
)
def test_what_is_not_a_list_of_rewards(returned):
    with pytest.raises(TypeError, match=r"'f' returned .*def reward\(prompts, completions, \*\*columns\)") as caught:
        check_rewards(returned, "f", IDS)
    assert len(str(caught.value)) < 300  # what was returned is not shown in full


def test_a_function_without_a_return_is_told_so():
    with pytest.raises(TypeError, match=r"'f' returned None \(has it a `return`\?\)"):
        check_rewards(None, "f", IDS)


def test_lengths():
    with pytest.raises(ValueError, match="'f' returned 2 rewards for 3 completions"):
        check_rewards([1, 2], "f", IDS)


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, np.float32("inf"), torch.tensor(math.nan), 1e39, 10**400]
)
def test_rewards_that_are_not_finite(value):
    with pytest.raises(ValueError, match="'f' returned .* for case 'b'.*on_bad_reward='missing'"):
        check_rewards([1, value, 3], "f", IDS)
    first, second, third = check_rewards([1, value, 3], "f", IDS, "missing")
    assert (first, third) == (1, 3) and math.isnan(second)


@pytest.mark.parametrize("error", [SystemExit("gone"), KeyboardInterrupt("gone"), asyncio.CancelledError("gone")])
def test_nothing_of_an_async_function_ends_the_event_loop(error):
    async def ends(prompts):
        raise error

    with pytest.raises(RuntimeError, match=f"{type(error).__name__}: gone"):
        asyncio.run(awaited(ends, {"prompts": []}))


def test_a_copy_shares_nothing_that_can_be_changed():
    picture, array, tensor = Image.new("RGB", (4, 4), "red"), np.zeros(3), torch.zeros(3)
    columns = {"image": [picture, picture], "tags": [["a"], {"deep": [picture]}], "x": (array, tensor), "n": [1, None]}
    copies = own_copy(columns)
    copies["image"][0].paste("blue", (0, 0, 4, 4))
    assert copies["image"][1].getpixel((0, 0)) == (255, 0, 0)  # not even for the next sample of the case
    copies["tags"][0].append("b")
    copies["tags"][1]["deep"][0].thumbnail((2, 2))
    copies["x"][0][0] = copies["x"][1][0] = 1
    assert picture.getpixel((0, 0)) == (255, 0, 0) and picture.size == (4, 4)
    assert columns["tags"][0] == ["a"] and not array.any() and not tensor.any() and copies["n"] == [1, None]
    assert own_copy(len) is len


def test_names_of_several_functions():
    class Other(HPScorerReward):
        pass

    judge = AnswersJudge(lambda chat: 1)
    funcs = [HPScorerReward(judge), print, Other(judge), HPScorerReward(judge), print, HPScorerReward(judge)]
    assert reward_names(funcs) == [
        "HPScorerReward",
        "print",
        "Other",
        "HPScorerReward_2",
        "print_2",
        "HPScorerReward_3",
    ]


def test_what_failed_has_an_entry_for_each_reward():
    with pytest.raises(ValueError, match="failed has 1 entries for 2 rewards"):
        Rewards([1.0, None], failed=[True])


def good(prompts, completions, **columns):
    return [0.0] * len(prompts)


class Own:
    """A reward of the user's own with the methods of a `Reward`."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, **columns):
        return [0.0] * len(prompts)

    def check_tasks(self, tasks):
        self.calls.append(list(tasks))

    def load(self):
        self.calls.append("load")


class OwnWithImages(Own):
    def load(self, num_images=2):
        self.calls.append(num_images)


class OtherMeaning(Own):
    check_tasks = None

    def load(self, path):
        raise AssertionError


def test_own_rewards_are_asked_if_they_have_the_methods():
    own, with_images = Own(), OwnWithImages()
    for func in (own, with_images, OtherMeaning(), good, HPScorerReward):
        check_reward_tasks(func, ["add", None])
        load_reward(func, 3)
    assert own.calls == [["add", None], "load"] and with_images.calls == [["add", None], 3]
    own.task = "add"  # for all cases
    check_reward_tasks(own, ["swap"])
    assert len(own.calls) == 2


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "reward_funcs is empty"),
        ("accuracy", ValueError, "'accuracy' is a string: it must be a judge's Hub id"),
        ("a/b/c", ValueError, "must be a judge's Hub id"),
        ("http://127.0.0.1:9/v1", ConnectionError, "does not say what it serves.*HPScorerReward"),
        (HPScorerReward, TypeError, "got the class HPScorerReward: make an object of it"),
        (torch.nn.Linear(1, 1), TypeError, "plain callable, but got an object of Linear"),
        ([good, 3], TypeError, "plain callable, but got an object of int"),
    ],
)
def test_what_is_no_reward_function_is_told_what_to_write(given, error, message):
    with pytest.raises(error, match=message):
        as_reward_funcs(given)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"data": [{"id": "judge-7b"}]}, None),
        ({"data": [{"id": "a"}, {"id": "b"}]}, "serves 2 models.*HPScorerReward"),
        ({"data": []}, "serves 0 models"),
        ({"object": "list"}, "does not say what it serves"),
        ([], "does not say what it serves"),
    ],
)
def test_an_address_stands_for_the_one_model_of_its_server(reply, message):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/v1/models"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/v1"
        if message is None:
            (func,) = as_reward_funcs(address)
            assert isinstance(func, HPScorerReward) and func.judge.name == "judge-7b"
        else:
            with pytest.raises(ConnectionError, match=message):
                as_reward_funcs(address)


def test_signatures():
    for func in (good, Own(), lambda prompts, completions, id, task, **kwargs: 0, max):
        check_signature(func, ["id", "prompt", "image", "task"])
    assert as_reward_funcs((good,)) == as_reward_funcs(good) == [good]
    for func, message in (
        (lambda images, prompts, metadata: 0, "Those of flow_grpo have other arguments"),
        (lambda completions: 0, "unexpected keyword argument 'prompts'"),
        (lambda prompts, completions, answer, **kwargs: 0, "missing a required argument: 'answer'"),
        (lambda prompts, completions, picture, **kwargs: 0, "columns of the dataset, id, image, task \\(missing"),
        (lambda prompts, completions: 0, "unexpected keyword argument"),
    ):
        with pytest.raises(TypeError, match=f"cannot be called.*{message}"):
            check_signature(func, ["id", "prompt", "image", "task"])


@pytest.mark.parametrize("scores", [[1, 2, 3], {"avg": [1, 2, 3]}, np.ones(3)], ids=["list", "dict", "array"])
def test_scores_with_details_are_told_from_two_rewards(scores):
    with pytest.raises(TypeError, match="scores and details, as flow_grpo's do: return the scores alone"):
        check_rewards((scores, {}), "f", IDS)
    assert check_rewards((1, 2), "f", IDS[:2]) == check_rewards((np.array(1), np.array(2)), "f", IDS[:2]) == [1, 2]
