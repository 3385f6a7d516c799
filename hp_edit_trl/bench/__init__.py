"""Benchmarks of editors, one file each, and how they are run and reported."""

from .benchmark import Benchmark, CaseScore, Metric, check_has_columns, check_parser, conversation, why_no_score
from .dreambench import DreamBenchPlus, parse_grade
from .gedit import GEditBench, parse_pair
from .imgedit import ImgEditBench, parse_three
from .realpref import RealPrefBench
from .report import describe_run, push_results, read_rewards, write_bench_report
from .results import Run, compare, read_run, summarize
from .run import run_benchmark
from .study import edits_of_runs, scores_of_runs


__all__ = [
    "Benchmark",
    "CaseScore",
    "DreamBenchPlus",
    "GEditBench",
    "ImgEditBench",
    "Metric",
    "RealPrefBench",
    "Run",
    "check_has_columns",
    "check_parser",
    "compare",
    "conversation",
    "describe_run",
    "edits_of_runs",
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
