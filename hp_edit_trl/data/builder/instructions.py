"""
Stage `instructions`: a vision-language model writes the prompt of each case.

An answer is used only as it is. A row whose answer cannot be used is rejected with a reason.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from ...cases import prompt_problem
from ...judges import FailureLimit, Judge, Judgement, JudgeTally, describe_judge, without_reasoning
from ...judges.base import LONGEST_ANSWER
from ...judges.failures import REFUSED, is_judge_failure
from ...rewards.prompts import find_prompts, prompt_files, read_header
from ...utils.config import check_positive
from ...utils.images import UnreadableImageError, read_image
from ...utils.texts import quoted
from .engine import Batch, Stage
from .styles import LANGUAGES, STYLES, Style, StyleImages, styles_by_name


# Shortest and longest prompt: English in words, Chinese in characters
MIN_LENGTH = {"en": 3, "zh": 4}
MAX_LENGTH = {"en": 60, "zh": 100}

EMPTY_WORDS = {"none", "null", "unknown", "something", "object", "无", "没有", "未知", "物体", "某物"}


@dataclass(frozen=True)
class InstructionTemplate:
    """
    The text that asks the writer for the prompts of one task.

    Args:
        task (`str`):
            The task, or `"feasibility"` for the question whether a prompt can be carried out.
        revision (`str`):
            Origin and revision of the text, e.g. `"hp-edit-trl:instructions/add:1"`.
        text (`str`):
            The text, with the placeholders `{category}`, `{language}`, `{style}` and `{style_description}`; for
            `"feasibility"`, `{task}` and `{prompt}`.
        fields (`tuple[str, ...]`, *optional*, defaults to `()`):
            Names of the values that the writer returns besides the prompt. The prompt must contain each of these
            values.
        requirement (`str`, *optional*):
            Template of the requirement of a case, with the placeholders `{style}`, `{style_description}` and the
            fields.
        target (`str`, *optional*):
            What is said before the target of an image. Without it, the writer is not shown any.
        style_image (`str`, *optional*):
            What is said before a picture of the style, likewise.
    """

    task: str
    revision: str
    text: str
    fields: tuple[str, ...] = ()
    requirement: str | None = None
    target: str | None = None
    style_image: str | None = None

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of a hash of everything that the answers depend on."""
        texts = (self.text, self.fields, self.requirement, self.target, self.style_image)
        return hashlib.sha256(repr(texts).encode()).hexdigest()[:12]


def case_id(image_id: str, task: str, prompt: str) -> str:
    """The id of a case: a hash of its image, task and prompt."""
    return hashlib.sha256(repr((image_id, task, prompt)).encode()).hexdigest()[:16]


def load_instruction_templates(
    source: str | None = None, revision: str | None = None
) -> dict[str, InstructionTemplate]:
    """
    Loads instruction templates. Each is a Markdown file with a header that has `task`, `revision` and optionally
    `fields`, `requirement`, `target` and `style_image`, followed by the text. They are in the subfolder `instructions`
    of `source`, or in `source` itself.

    Args:
        source (`str`, *optional*):
            A local folder, or a Hub repository (`"user/name"`, or `"datasets/user/name"` for a dataset repository).
            By default the templates of this package.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.

    Returns:
        `dict[str, InstructionTemplate]`: the templates by task.

    Raises:
        `ValueError`: If a template is not valid, or a task has two.
        `FileNotFoundError`: If there are no templates.
    """
    folder, origin = find_prompts(source, revision)
    folder = folder / "instructions" if (folder / "instructions").is_dir() else folder
    templates: dict[str, InstructionTemplate] = {}
    for path in prompt_files(folder):
        header, text = read_header(path)
        task, fields, requirement = str(header["task"]), header.get("fields") or [], header.get("requirement")
        if not isinstance(fields, list) or not all(isinstance(name, str) and name.isidentifier() for name in fields):
            raise ValueError(f"The instruction template {path} has the fields {fields!r}: give a list of plain names.")
        if "instruction" in fields:
            raise ValueError(
                f"The instruction template {path} names the field 'instruction', which always exists: leave it out."
            )
        shown = {name: header.get(name) for name in ("target", "style_image")}
        for name, value in (("requirement", requirement), *shown.items()):
            if not isinstance(value, str | None):
                raise ValueError(f"The instruction template {path} has the {name} {value!r}: put it in quotes.")
        if unknown := set(re.findall(r"\{(\w+)\}", requirement or "")) - {*fields, "style", "style_description"}:
            raise ValueError(
                f"The requirement of the instruction template {path} uses {sorted(unknown)}; its fields are {fields}."
            )
        needed = "{prompt}" if task == "feasibility" else "{language}"
        if needed not in text:
            raise ValueError(f"The instruction template {path} has no {needed}, so the writer would not see it.")
        if task in templates:
            raise ValueError(f"The instruction template {path} is a second one for the task {task!r}.")
        name = f"{origin}:instructions/{task}:{header['revision']}"
        templates[task] = InstructionTemplate(task, name, text, tuple(fields), requirement, **shown)
    if not templates:
        raise FileNotFoundError(f"There are no instruction templates (*.md) in {folder}.")
    return templates


class WriteInstructions(Stage):
    """
    A vision-language model, the writer, writes the prompt of each case. It is also shown the target, or the picture of
    the style, if there is one. A second question asks it whether the prompt can be carried out.

    A row is rejected if the answer is not the requested JSON object, or if the prompt is too short, too long, in
    another language or repetitive, has placeholders or several lines, or does not contain the values of the fields. A
    row is also rejected if there is no answer; until edits are made, the next run asks again.

    Args:
        writer ([`Judge`]):
            The model. It must be able to give long answers, e.g. `max_new_tokens=256`, and longer ones if it reasons.
        templates (`dict[str, InstructionTemplate]`, *optional*):
            The template of each task, and of `"feasibility"`. Defaults to those of this package, see
            [`load_instruction_templates`].
        styles (`Sequence[Style]`, *optional*):
            The styles that the column `style` names. Defaults to `STYLES`.
        style_images ([`StyleImages`], *optional*):
            The pictures that the column `style_file` names. They are added as the column `style_image`.
        with_targets (`bool`, *optional*, defaults to `False`):
            Whether there is a column `target`.
        min_length (`Mapping[str, int]`, *optional*, defaults to `{"en": 3, "zh": 4}`):
            Shortest prompt in each language: English in words, Chinese in characters.
        max_length (`Mapping[str, int]`, *optional*, defaults to `{"en": 60, "zh": 100}`):
            Longest prompt in each language.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of cases that the writer is asked about together.
        check_feasibility (`bool`, *optional*, defaults to `True`):
            Ask the second question.

    Raises:
        `ValueError`: If an option is not valid, or the writer is set to answer with scores.
    """

    name = "instructions"
    inputs: tuple[str, ...] = ("image", "image_id", "task", "category", "language", "style")
    features = Features({name: Value("string") for name in ("id", "prompt", "requirement", "writer", "writer_prompt")})

    def __init__(
        self,
        writer: Judge,
        templates: dict[str, InstructionTemplate] | None = None,
        styles: Sequence[Style] = STYLES,
        style_images: StyleImages | None = None,
        with_targets: bool = False,
        min_length: Mapping[str, int] = MIN_LENGTH,
        max_length: Mapping[str, int] = MAX_LENGTH,
        batch_size: int = 16,
        check_feasibility: bool = True,
    ):
        self.writer = writer
        self.templates = load_instruction_templates() if templates is None else templates
        self.styles = styles_by_name(styles)
        self.style_images = style_images
        self.with_targets = with_targets
        if with_targets:
            self.inputs += ("target",)
        if style_images is not None:
            self.inputs += ("style_file",)
            self.features = Features({**self.features, "style_image": ImageFeature()})
        self.min_length = dict(min_length)
        self.max_length = dict(max_length)
        self.batch_size = batch_size
        self.check_feasibility = check_feasibility
        self.limit = FailureLimit()
        self.asked = JudgeTally()
        self.answers: list[Judgement] = []  # of the last batch
        check_positive(batch_size=batch_size)
        for language in LANGUAGES:
            least, most = self.min_length.get(language), self.max_length.get(language)
            if least is None or most is None or not 1 <= least <= most:
                raise ValueError(
                    f"min_length={self.min_length} and max_length={self.max_length} must each have a number of at "
                    f"least 1 for {list(LANGUAGES)}, the smaller one in min_length."
                )
        if check_feasibility and "feasibility" not in self.templates:
            raise ValueError(
                "There is no instruction template for the task 'feasibility': add one, or set check_feasibility=False."
            )
        identity, described = writer.identity, describe_judge(writer)
        if identity.get("score_mode") == "expected" or identity.get("num_answers", 1) != 1:
            raise ValueError(
                f"The writer ({described}) must give one answer in words: use score_mode='integer' and num_answers=1."
            )
        if identity.get("max_new_tokens", 64) < 64:
            raise ValueError(f"The answers of the writer ({described}) would be cut off: use max_new_tokens=256.")

    @property
    def tally(self) -> JudgeTally:
        return self.asked

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "writer": self.writer.identity,
            "templates": {task: [one.revision, one.digest] for task, one in sorted(self.templates.items())},
            "styles": hashlib.sha256(repr(list(self.styles.values())).encode()).hexdigest()[:12],
            "min_length": self.min_length,
            "max_length": self.max_length,
            "check_feasibility": self.check_feasibility,
        }

    def load(self) -> None:
        self.writer.load()

    def __call__(self, batch: Batch) -> Batch:
        count = len(batch["image_id"])
        self.answers = []
        unanswered = [False] * count
        writer = describe_judge(self.writer)
        columns: Batch = {name: [None] * count for name in (*self.features, "reason")}
        images, questions, shown = {}, {}, {}
        for row, task in enumerate(batch["task"]):
            values = self._values(task, batch["category"][row], batch["language"][row], batch["style"][row])
            template = self.templates[task]
            columns["writer"][row], columns["writer_prompt"][row] = writer, template.revision
            try:
                images[row] = read_image(batch["image"][row], f"The image {batch['image_id'][row]!r}")
            except UnreadableImageError as error:
                columns["reason"][row] = f"unreadable image: {_excerpt(str(error))}"
                continue
            questions[row] = (template, values)
            if self.style_images is not None and batch["style_file"][row] is not None:
                content = self.style_images.read(batch["style_file"][row])
                columns["style_image"][row] = picture = {"bytes": content, "path": None}
                if template.style_image is not None:
                    shown[row] = template.style_image, read_image(picture, batch["style_file"][row])
            if self.with_targets and batch["target"][row] is not None and template.target is not None:
                name = f"The target of the image {batch['image_id'][row]!r}"
                shown[row] = template.target, read_image(batch["target"][row], name)

        answers = self._ask(
            {row: _question(_filled(t.text, v), images[row], shown.get(row)) for row, (t, v) in questions.items()}
        )
        written = {}
        for row, answer in answers.items():
            template, values = questions[row]
            unanswered[row] = is_judge_failure(answer)
            try:
                prompt, requirement = self._read(answer, template, values, batch["language"][row])
            except _Rejected as rejected:
                columns["reason"][row] = str(rejected)
                continue
            written[row] = prompt
            columns["id"][row] = case_id(batch["image_id"][row], template.task, prompt)
            columns["prompt"][row], columns["requirement"][row] = prompt, requirement

        if self.check_feasibility:
            text = self.templates["feasibility"].text
            second = {
                row: _question(_filled(text, {"prompt": quoted(prompt), "task": batch["task"][row]}), images[row])
                for row, prompt in written.items()
            }
            for row, answer in self._ask(second).items():
                columns["reason"][row] = _infeasible(answer)
                unanswered[row] = is_judge_failure(answer)
        return {**columns, "unanswered": unanswered}

    def check(self, again: bool) -> None:
        new, tried = ([], self.answers) if again else (self.answers, [])
        self.limit.check(new, "questions", "Finished rows are kept: run again to resume.", tried)

    def _values(self, task: str, category: str | None, language: str, style: str | None) -> dict[str, str]:
        """The values of the placeholders of a template."""
        if task not in self.templates:
            raise ValueError(
                f"There is no instruction template for the task {task!r}; there are {list(self.templates)}."
            )
        if language not in LANGUAGES:
            raise ValueError(f"The language {language!r} is not known: use one of {list(LANGUAGES)}.")
        values = {"category": category or "unknown", "language": LANGUAGES[language]}
        if task == "style":
            if style not in self.styles:
                raise ValueError(
                    f"The style {style!r} is not among the styles: pass the same ones to Plan and WriteInstructions."
                )
            known = self.styles[style]
            name = known.chinese if language == "zh" else known.name
            values |= {"style": name, "style_description": known.description}
        return values

    def _ask(self, questions: dict[int, list[dict[str, Any]]]) -> dict[int, Judgement]:
        """The writer's answers, by row."""
        if not questions:
            return {}
        answers = dict(zip(questions, self.writer(list(questions.values())), strict=True))
        self.asked.add(answers.values(), scores=False)
        self.answers += answers.values()
        refused = any(answer.failure == REFUSED for answer in answers.values())
        if not refused and not any(answer.answered for answer in answers.values()):
            if len(answers) == 1:
                # The writer may fail on this image alone. If it fails on others too, this raises an error.
                self.writer.load()
            else:
                raise ConnectionError(
                    f"The writer ({describe_judge(self.writer)}) gave no answer to {len(answers)} questions in a row; "
                    f"the last error: {list(answers.values())[-1].excerpt} Finished batches are kept: run again "
                    "when the writer is back."
                )
        return answers

    def _read(
        self, judgement: Judgement, template: InstructionTemplate, values: dict[str, str], language: str
    ) -> tuple[str, str | None]:
        """The prompt and the requirement in an answer. Raises `_Rejected` if it cannot be used."""
        answer = _json_object(judgement)
        texts: dict[str, str] = {}
        for name in ("instruction", *template.fields):
            value = answer.get(name)
            if not isinstance(value, str):
                raise _Rejected(f"field missing: {name!r} is {'not there' if value is None else type(value).__name__}")
            if name == "instruction" and len(value.strip().splitlines()) > 1:
                raise _Rejected(f"several lines: {_excerpt(value)}")
            texts[name] = text = " ".join(value.split())
            if bad := [letter for letter in text if not letter.isprintable() or letter == "\ufffd"]:
                raise _Rejected(f"unreadable characters: U+{ord(bad[0]):04X} in {name!r}")
            if re.search(r"[<>{}\[\]|*`\\]|\.\.|…|_{2}", text):
                raise _Rejected(f"placeholder or markup: {name!r} is {_excerpt(text)}")
            if " ".join(_bare(text)) in {"", name, *EMPTY_WORDS}:
                raise _Rejected(f"field missing: {name!r} is {_excerpt(text)!r}")
        prompt = texts.pop("instruction")
        if problem := prompt_problem(prompt):
            raise _Rejected(f"bad prompt: {problem}")
        self._check_text(prompt, language)
        if compact_text(prompt) in compact_text(template.text):
            raise _Rejected(f"echo: the template says {_excerpt(prompt)}")
        for name, text in texts.items():
            if not _names(prompt, text, language):
                raise _Rejected(f"not named: {name} {_excerpt(text)!r} is not in {_excerpt(prompt)!r}")
        if len({tuple(_bare(text)) for text in texts.values()}) < len(texts):
            raise _Rejected(f"fields alike: {' and '.join(texts)} are {_excerpt(text)!r}")
        if "style" in values and not _names(prompt, values["style"], language):
            raise _Rejected(f"style not named: {values['style']!r} is not in {_excerpt(prompt)!r}")
        return prompt, template.requirement and _filled(template.requirement, values | texts)

    def _check_text(self, prompt: str, language: str) -> None:
        # A number or a Latin word among Chinese characters counts as one character.
        tokens = [
            token
            for word in _words(prompt)
            for token in ([word] if language == "en" else re.findall(r"[a-z0-9]+|.", word))
        ]
        unit = "words" if language == "en" else "characters"
        least, most = self.min_length[language], self.max_length[language]
        if not least <= len(tokens) <= most:
            raise _Rejected(f"length: {len(tokens)} {unit}, at least {least} and at most {most}; {_excerpt(prompt)}")
        letters = [letter for letter in unicodedata.normalize("NFKC", prompt) if letter.isalpha()]
        known = [letter for letter in letters if (letter.isascii() if language == "en" else _is_chinese(letter))]
        if len(known) < (0.9 if language == "en" else 0.5) * max(len(letters), 1):
            raise _Rejected(f"language: it should be {LANGUAGES[language]}; {_excerpt(prompt)}")
        # The same words three times in a row, or many repeated pairs of neighboring words
        threefold = any(
            tokens[i : i + size] == tokens[i + size : i + 2 * size] == tokens[i + 2 * size : i + 3 * size]
            for size in range(1, len(tokens) // 3 + 1)
            for i in range(len(tokens) - 3 * size + 1)
        )
        pairs = list(zip(tokens, tokens[1:], strict=False))
        if threefold or len(set(pairs)) < 0.6 * len(pairs):
            raise _Rejected(f"repetition: {_excerpt(prompt)}")


class _Rejected(Exception):
    """Why an answer cannot be used."""


def _json_object(judgement: Judgement) -> dict[str, Any]:
    """
    The JSON object in an answer, possibly in a code fence, within prose, or after closed reasoning. Raises `_Rejected`
    if there is not exactly one.
    """
    if not judgement.answered or not judgement.answer.strip():
        raise _Rejected(f"no answer: {_excerpt(judgement.answer, 200) or 'it is empty'}")
    text = without_reasoning(judgement.answer).strip()
    if "<think>" in text:
        raise _Rejected(f"not an object: the reasoning is not closed, {_excerpt(text)}")
    if len(text) >= LONGEST_ANSWER:  # a judgement is cut off there
        raise _Rejected(f"not an object: {len(text)} characters, {_excerpt(text)}")
    text = re.sub(r"^```\w*\s*|\s*```$", "", text)
    decoder = json.JSONDecoder(strict=False)
    found: list[dict[str, Any]] = []
    place = 0
    try:
        found.append(decoder.decode(text))
    except (ValueError, RecursionError):
        while (place := text.find("{", place)) >= 0:
            try:
                value, place = decoder.raw_decode(text, place)
                found.append(value)
            except ValueError:
                place += 1
            except RecursionError:
                break
    if len(found) != 1 or not isinstance(found[0], dict):
        raise _Rejected(f"not an object: {'several, ' if len(found) > 1 else ''}{_excerpt(text)}")
    return found[0]


def _infeasible(judgement: Judgement) -> str | None:
    """The reason of the writer why a prompt cannot be carried out; `None` if it can."""
    try:
        answer = _json_object(judgement)
    except _Rejected as rejected:
        known = judgement.answered and judgement.answer.strip()
        return f"feasibility unknown: {rejected}" if known else str(rejected)
    feasible, reason = answer.get("feasible"), answer.get("reason")
    if not isinstance(feasible, bool):
        return f"feasibility unknown: {_excerpt(judgement.answer)}"
    return (
        None if feasible else f"infeasible: {_excerpt(reason, 200) if isinstance(reason, str) else 'no reason given'}"
    )


def _question(text: str, image: Image.Image, second: tuple[str, Image.Image] | None = None) -> list[dict[str, Any]]:
    """The conversation about an image, and a second one that is introduced by a text."""
    parts = [("The picture:", image), *([second] if second is not None else [])]
    content = [part for says, shown in parts for part in _shown(says, shown)]
    return [{"role": "system", "content": [{"type": "text", "text": text}]}, {"role": "user", "content": content}]


def _shown(text: str, image: Image.Image) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}, {"type": "image", "image": image}]


def _filled(text: str, values: dict[str, str]) -> str:
    """The text with its placeholders replaced. Braces in the values and around other names are left as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)


def _excerpt(text: str, length: int = 100) -> str:
    """The beginning of a text as one printable line."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter if letter.isalnum() else " " for letter in text).split()


def _bare(text: str) -> list[str]:
    """The words of a text without a leading article."""
    words = _words(text)
    return words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words


def compact_text(text: str) -> str:
    """The text in lower case, without punctuation and spaces."""
    return "".join(_words(text))


def _is_chinese(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith("CJK UNIFIED IDEOGRAPH")


def _names(prompt: str, what: str, language: str) -> bool:
    """Whether a prompt contains certain words in a row, apart from a leading article."""
    if language == "zh":
        return compact_text(what) in compact_text(prompt)
    return f" {' '.join(_bare(what))} " in f" {' '.join(_words(prompt))} "
