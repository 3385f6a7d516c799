"""Benchmarks of editors: the cases of each, runs, results and their report."""

from .dreambench import DreamBenchPlus, parse_grade
from .gedit import GEditBench, parse_pair
from .realpref import RealPrefBench
from .report import push_results, read_rewards, write_bench_report
from .results import CaseScore, Run, compare, read_run, summarize
from .run import Benchmark, run_benchmark


__all__ = [
    "Benchmark",
    "CaseScore",
    "DreamBenchPlus",
    "GEditBench",
    "RealPrefBench",
    "Run",
    "compare",
    "parse_grade",
    "parse_pair",
    "push_results",
    "read_rewards",
    "read_run",
    "run_benchmark",
    "summarize",
    "write_bench_report",
]
