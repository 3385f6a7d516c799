"""Benchmarks of editors, one file each, and how they are run and reported."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .benchmark import Benchmark, CaseScore, Metric, check_has_columns, check_parser, conversation, why_no_score
from .gedit import GEditBench, parse_pair
from .imgedit import ImgEditBench, parse_three
from .realpref import RealPrefBench
from .report import describe_run, push_results, read_rewards, write_bench_report
from .results import Run, compare, read_run, summarize
from .rise import RISEBench, parse_final_score
from .study import edits_of_runs, scores_of_runs


# What needs models, imported when it is first asked for: who reads runs should not wait for diffusers
_MODULES = {"DreamBenchPlus": "dreambench", "parse_grade": "dreambench", "run_benchmark": "run"}

if TYPE_CHECKING:
    from .dreambench import DreamBenchPlus, parse_grade
    from .run import run_benchmark


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


__all__ = [
    "Benchmark",
    "CaseScore",
    "DreamBenchPlus",
    "GEditBench",
    "ImgEditBench",
    "Metric",
    "RISEBench",
    "RealPrefBench",
    "Run",
    "check_has_columns",
    "check_parser",
    "compare",
    "conversation",
    "describe_run",
    "edits_of_runs",
    "parse_final_score",
    "parse_grade",
    "parse_pair",
    "parse_three",
    "push_results",
    "read_rewards",
    "read_run",
    "run_benchmark",
    "scores_of_runs",
    "summarize",
    "why_no_score",
    "write_bench_report",
]
