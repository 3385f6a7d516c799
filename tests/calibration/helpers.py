"""Edits and their ratings."""

import numpy as np
from datasets import Dataset, Features, Image, List, Value

from hp_edit_trl.ratings import Rating
from tests.helpers import photo


def make_edits(count: int = 4, editors=("model-one", "model-two")) -> Dataset:
    rows = [
        {
            "id": f"case-{i}",
            "prompt": f"Make it red, number {i}",
            "task": ("color", "style")[i % 2],
            "image": photo(48, 32, seed=i),
            "edit": photo(48, 32, seed=100 * (j + 1) + i),
            "editor": editor,
        }
        for i in range(count)
        for j, editor in enumerate(editors)
    ]
    return Dataset.from_list(rows)


def with_references(dataset: Dataset, row: int, count: int) -> Dataset:
    """The dataset with several references in one of its rows."""
    encoded = [Image().encode_example(photo(32, 32, seed=i)) for i in range(count)]
    images = [encoded if i == row else None for i in range(len(dataset))]
    return dataset.add_column("images", images, feature=List(Image()))


def with_broken(dataset: Dataset, column: str, row: int) -> Dataset:
    """The dataset with one of its images cut off."""
    encoded = dataset.cast_column(column, Image(decode=False))
    values = [
        {**value, "bytes": value["bytes"][:60]} if i == row else value for i, value in enumerate(encoded[column])
    ]
    features = Features({**encoded.features, column: {"bytes": Value("binary"), "path": Value("string")}})
    return Dataset.from_dict({**encoded.to_dict(), column: values}, features=features).cast_column(column, Image())


def make_rating(annotator="anna", id="case-0", editor="model-one", score=3, minute=0, comment="", rubric="r:1"):
    return Rating(annotator, id, editor, score, rubric, f"2026-01-01T10:{minute:02d}:00+00:00", comment)


RATINGS = [
    make_rating("anna", "case-0", "model-one", 5),
    make_rating("bert", "case-0", "model-one", 2, minute=1, comment="hm"),
    make_rating("anna", "case-1", "model-two", None, minute=2),
    make_rating("anna", "case-2", "model-one", 0, minute=3),
    make_rating("bert", "case-2", "model-one", None, minute=4, comment="cannot say"),
]


def pixels(dataset, column):
    return [np.asarray(image).tobytes() for image in dataset[column]]
