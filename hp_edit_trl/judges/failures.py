"""What a judge's failures cost, and when they are too many to go on."""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .base import Judgement


# Failures of single cases: the judge cannot be shown their images, or answered without a score.
OF_THE_CASE = ("image", "no score")

REFUSED = "refused"  # the kind of failure of a server that does not accept the key


class JudgeRefusedError(ConnectionError):
    """
    A server refused the key of a judge. No other case would fare better, so a run stops at once.

    Args:
        message (`str`):
            The message.
        rewards (`list[float | None]`, *optional*):
            Of a reward function: the rewards of the samples that were judged before, `None` for the others.
    """

    def __init__(self, message: str, rewards: list[float | None] | None = None):
        super().__init__(message)
        self.rewards = rewards


def is_judge_failure(judgement: Judgement) -> bool:
    """Whether there is no answer, and the case itself is not known to be the cause: another attempt may succeed."""
    return not judgement.answered and judgement.failure not in OF_THE_CASE


def check_not_refused(judgements: Iterable[Judgement], remedy: str = "", rewards: Any = None) -> None:
    """
    Raises [`JudgeRefusedError`] if a server refused its key for one of the judgements. Call it when the others are
    written down.
    """
    for one in judgements:
        if one.failure == REFUSED:
            raise JudgeRefusedError(f"{one.answer.removeprefix(f'{REFUSED}: ')} {remedy}".strip(), rewards)


@dataclass
class JudgeTally:
    """
    Counts what judgements cost.

    Args:
        judgements (`int`, *optional*, defaults to `0`):
            Number of judgements.
        requests (`int`, *optional*, defaults to `0`):
            Number of requests to a server, retries included.
        retries (`int`, *optional*, defaults to `0`):
            Number of requests that repeated a failed one.
        seconds_lost (`float`, *optional*, defaults to `0.0`):
            Seconds that failed requests and the pauses after them took, over all concurrent requests.
        failures (`Counter`, *optional*):
            Number of failures by kind, see [`Judgement`]; an answer without a score is of the kind `"no score"`.
        reasons (`dict[str, str]`, *optional*):
            The last reason of each kind.
        servers (`Counter`, *optional*):
            Number of requests by server.
    """

    judgements: int = 0
    requests: int = 0
    retries: int = 0
    seconds_lost: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    servers: Counter[str] = field(default_factory=Counter)

    def add(self, judgements: Iterable[Judgement], scores: bool = True) -> "JudgeTally":
        """Adds judgements, and returns itself. `scores=False` is for answers that are meant to have no score."""
        for one in judgements:
            self.judgements += 1
            self.requests += one.requests
            self.retries += one.retries
            self.seconds_lost += one.seconds_lost
            self.servers.update(one.servers)
            if one.score is None and (scores or not one.answered):
                self.fail(one.failure or "no score", one.excerpt)
        return self

    def fail(self, kind: str, reason: str, count: int = 1) -> None:
        """Adds failures of one kind."""
        self.failures[kind] += count
        self.reasons[kind] = reason

    def merge(self, other: "JudgeTally") -> "JudgeTally":
        """Adds another tally, and returns itself."""
        self.judgements += other.judgements
        self.requests += other.requests
        self.retries += other.retries
        self.seconds_lost += other.seconds_lost
        self.failures.update(other.failures)
        self.reasons |= other.reasons
        self.servers.update(other.servers)
        return self

    @property
    def by_server(self) -> dict[str, int]:
        """Number of requests by server, if there are several."""
        return dict(sorted(self.servers.items())) if len(self.servers) > 1 else {}

    @property
    def metrics(self) -> dict[str, float]:
        """The counts as metrics of a log: `judge/requests`, `judge/failures/timeout` and others."""
        return {
            "judge/requests": self.requests,
            "judge/retries": self.retries,
            "judge/seconds_lost": self.seconds_lost,
            "judge/failures": self.failures.total(),
            **{f"judge/failures/{kind.replace(' ', '_')}": count for kind, count in sorted(self.failures.items())},
            **{f"judge/requests/{server}": count for server, count in self.by_server.items()},
        }

    def by_kind(self, reasons: bool = False) -> str:
        """The failures by kind, e.g. `"3 timeout, 1 http 500"`, on request with the last reason of each."""
        return ", ".join(
            f"{count} {kind}{f' ({self.reasons[kind]})' if reasons else ''}"
            for kind, count in self.failures.most_common()
        )

    def __str__(self) -> str:
        shares = ", ".join(f"{count} to {server}" for server, count in self.by_server.items())
        shares = f" ({shares})" if shares else ""
        return (
            f"{self.requests} requests{shares}, {self.retries} retries, {self.failures.total()} failures"
            f"{f' ({self.by_kind()})' if self.failures else ''}, {self.seconds_lost:.1f} s lost"
        )


class FailureLimit:
    """
    Says when failures are no longer those of single cases: so many in a row, or more than a share of the last ones.

    Args:
        in_a_row (`int`, *optional*, defaults to `8`):
            Number of failures in a row.
        max_share (`float`, *optional*, defaults to `0.5`):
            Largest share of failures in the window.
        window (`int`, *optional*, defaults to `64`):
            Number of attempts that the share is taken of. Before there are so many, there is no share.
    """

    def __init__(self, in_a_row: int = 8, max_share: float = 0.5, window: int = 64):
        self.in_a_row = in_a_row
        self.max_share = max_share
        self.streak = 0
        self.recent: deque[tuple[float, JudgeTally]] = deque(maxlen=window)

    def add(self, failed: float, tally: JudgeTally | None = None) -> str | None:
        """
        Adds an attempt.

        Args:
            failed (`float`):
                How much of it failed, from 0 to 1. It adds to the failures in a row if all of it did.
            tally ([`JudgeTally`], *optional*):
                Its failures by kind.

        Returns:
            `str` or `None`: which limit is exceeded, e.g. `"8 in a row"`; `None` if none is.
        """
        self.streak = self.streak + 1 if failed >= 1 else 0
        self.recent.append((failed, tally or JudgeTally()))
        if self.streak >= self.in_a_row:
            return f"{self.streak} in a row"
        share = sum(part for part, _ in self.recent) / len(self.recent)
        if len(self.recent) == self.recent.maxlen and share > self.max_share:
            return f"{share:.0%} of the last {len(self.recent)}"
        return None

    def tally(self) -> JudgeTally:
        """The recent failures."""
        tally = JudgeTally()
        for _, one in self.recent:
            tally.merge(one)
        return tally

    def reasons(self) -> str:
        """The recent failures by kind, with the last reason of each."""
        return self.tally().by_kind(reasons=True)

    def check(self, judgements: Sequence[Judgement], what: str, remedy: str, tried: Sequence[Judgement] = ()) -> None:
        """
        Adds judgements. Those that failed because of their case count as successes: the judge is there.

        Args:
            judgements (`Sequence[Judgement]`):
                The judgements.
            what (`str`):
                What they are of, for the error, e.g. `"edits"`.
            remedy (`str`):
                End of the error: what is kept, and how to resume.
            tried (`Sequence[Judgement]`, *optional*, defaults to `()`):
                Further judgements, of cases that got no answer in an earlier run either. They may be of a kind that
                never gets one, and do not count.

        Raises:
            [`JudgeRefusedError`]: If a server refused its key.
            `ConnectionError`: If a limit is exceeded.
        """
        check_not_refused([*judgements, *tried], remedy)
        exceeded = None
        for one in judgements:
            failed = is_judge_failure(one)
            exceeded = self.add(float(failed), JudgeTally().add([one]) if failed else None) or exceeded
        if exceeded:
            raise ConnectionError(
                f"The judge gave no answer to too many {what}: {exceeded}. The failures by kind: {self.reasons()}. "
                f"{remedy}"
            )
