"""One function builds every judge."""

import pytest

from hp_edit_trl.bench import parse_pair
from hp_edit_trl.judges import (
    CachedJudge,
    ServerJudge,
    TransformersJudge,
    describe_judge,
    load_judge,
    parse_score,
    with_parser,
)
from tests.helpers import RuleJudge


def test_a_server_takes_its_options():
    judge = load_judge(
        "m", "http://127.0.0.1:9/v1", "v2", "expected", max_concurrency=3, timeout=5.0, max_retries=0, batch_size=99
    )
    assert isinstance(judge, ServerJudge) and judge.max_concurrency == 3
    assert judge.identity["revision"] == "v2" and judge.identity["score_mode"] == "expected"
    assert describe_judge(judge).startswith("judge ServerJudge, name m, revision v2, score_mode expected")


def test_a_judge_is_returned_as_it_is_or_behind_a_cache(tmp_path):
    judge = RuleJudge()
    assert load_judge(judge) is judge
    cached = load_judge(judge, cache=tmp_path / "cache.sqlite")
    assert isinstance(cached, CachedJudge) and cached.judge is judge and cached.identity == judge.identity


def test_a_judge_that_reads_other_scores(tmp_path):
    options = dict(parse=parse_pair, max_new_tokens=1400, cache=tmp_path / "cache.sqlite")
    judge = load_judge("m", "http://127.0.0.1:9/v1", **options)
    other = with_parser(judge, parse_score)
    assert isinstance(other, CachedJudge) and other.path == judge.path
    assert judge.identity == {**other.identity, "parse": "parse_pair"} and "parse" not in other.identity
    here = TransformersJudge.__new__(TransformersJudge)
    here.parse, here.model = parse_pair, object()  # weights that are loaded
    assert with_parser(here, parse_score).model is here.model and here.parse is parse_pair
    with pytest.raises(TypeError, match="A RuleJudge cannot be made to read its answers with parse_pair"):
        with_parser(RuleJudge(), parse_pair)


def test_what_cannot_be_a_judge(tmp_path):
    with pytest.raises(TypeError, match="must be the name of a model or a Judge: an object with `identity`"):
        load_judge(parse_score)
    with pytest.raises(ValueError, match="judge_base_url and judge_revision are for a judge"):
        load_judge(RuleJudge(), judge_revision="main")
    with pytest.raises(ValueError, match="has no processor"):
        load_judge(str(tmp_path))
    with pytest.raises(ValueError, match="max_concurrency=0 must be at least 1"):
        load_judge("m", "http://127.0.0.1:9/v1", max_concurrency=0)
