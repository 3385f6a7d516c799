"""Floor 3: agreement between people and the scorer, and benchmarks of editors."""

from pathlib import Path

from .agreement import agreement, krippendorff_alpha, krippendorff_interval, mean_with_interval, paired_difference
from .bench import Benchmark, run_benchmark
from .compare import compare_with_people
from .dreambench import DreamBenchPlus, parse_grade
from .gedit import GEditBench, parse_pair
from .leaderboard import push_results, read_rewards, write_bench_report
from .realpref import RealPrefBench
from .refine import PromptRefiner, add_questions, is_held_out, parse_questions
from .report import report_text, worst_disagreements, write_report
from .results import CaseScore, Run, compare, read_run, summarise


# A folder of modules for `evaluate.load(str(METRICS / "score_agreement"))`.
METRICS = Path(__file__).parent / "metrics"

__all__ = [
    "METRICS",
    "Benchmark",
    "CaseScore",
    "DreamBenchPlus",
    "GEditBench",
    "PromptRefiner",
    "RealPrefBench",
    "Run",
    "add_questions",
    "agreement",
    "compare",
    "compare_with_people",
    "is_held_out",
    "krippendorff_alpha",
    "krippendorff_interval",
    "mean_with_interval",
    "paired_difference",
    "parse_grade",
    "parse_pair",
    "parse_questions",
    "push_results",
    "read_rewards",
    "read_run",
    "report_text",
    "run_benchmark",
    "summarise",
    "worst_disagreements",
    "write_bench_report",
    "write_report",
]
