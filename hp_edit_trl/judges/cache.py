"""Judgements kept on disk, so that no question is paid for twice."""

import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .base import Judge, Judgement, conversation_digest, load_for


logger = logging.getLogger(__name__)


class CachedJudge:
    """
    A judge that answers repeated questions from a file, across runs.

    A judgement is found by the judge's identity (model and revision, mode, settings), all texts of the conversation
    (the scorer prompt with the instruction) and the pixels of its images: a prompt that was changed without a new
    revision, or a file that was overwritten, is not taken for the old one. Answers without a score are kept as well,
    because they were paid for; failed requests and empty answers are not.

    Several processes may share the file, on a file system that has locks.

    Args:
        judge ([`Judge`]):
            The judge that answers new questions.
        path (`str` or `Path`):
            The file, an SQLite database. It is created if it does not exist.

    Raises:
        `ValueError`: If the file is not such a database.

    Example:

    ```python
    >>> judge = CachedJudge(ServerJudge("Qwen/Qwen3-VL-32B-Instruct", "http://localhost:8000/v1"), "judgements.sqlite")
    >>> reward = HPScorerReward(judge)
    ```
    """

    def __init__(self, judge: Judge, path: str | Path):
        self.judge = judge
        self.path = Path(path).expanduser()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection() as connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS judgements "
                "(key BLOB PRIMARY KEY, score REAL, answer TEXT, unparsed INTEGER) WITHOUT ROWID"
            )

    @property
    def identity(self) -> dict[str, Any]:
        return self.judge.identity

    def load(self, num_images: int = 2) -> None:
        """Gets the judge ready. Its trial is not taken from the file."""
        load_for(self.judge, num_images)

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        identity = json.dumps(self.identity, sort_keys=True).encode()
        keys = [hashlib.sha256(identity + conversation_digest(chat)).digest() for chat in conversations]
        known: dict[bytes, Judgement] = {}
        with self._connection() as connection:
            for key in keys:
                row = connection.execute(
                    "SELECT score, answer, unparsed FROM judgements WHERE key = ?", (key,)
                ).fetchone()
                if row is not None:
                    found = Judgement(score=row[0], answer=row[1], unparsed=row[2], cached=True)
                    if found.answered:  # an empty answer in a file of another version is none
                        known[key] = found
        missing = {key: i for i, key in reversed(list(enumerate(keys))) if key not in known}  # the first of equal ones
        asked = sorted(missing.values())
        judged = dict(zip(asked, self.judge([conversations[i] for i in asked]), strict=True)) if asked else {}
        try:
            with self._connection() as connection:
                connection.executemany(
                    "INSERT OR REPLACE INTO judgements VALUES (?, ?, ?, ?)",
                    [(keys[i], one.score, one.answer, one.unparsed) for i, one in judged.items() if one.answered],
                )
        except ValueError as error:  # judgements that were paid for are not thrown away
            logger.warning("%d judgements were not kept: %s", len(judged), error)
        by_key = known | {keys[i]: one for i, one in judged.items()}
        return [
            judged[i]
            if i in judged
            else replace(
                by_key[key],
                seconds=0.0,
                input_tokens=0,
                output_tokens=0,
                cached=True,
                requests=0,
                retries=0,
                seconds_lost=0.0,
                servers=(),
            )
            for i, key in enumerate(keys)
        ]

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction."""
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as connection, connection:
                yield connection
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"The cache {self.path} cannot be used: {error}. Mend that, or name another file."
            ) from error
