"""
The cases of a dataset: which image gets which task, and the instruction that a vision-language model writes for it.

What such a model answers is only taken if it can be used as it is. Everything else is a rejected row with a reason.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from datasets import Features, Value
from PIL import Image

from ...judges import Judge, Judgement
from ...judges.base import without_reasoning
from ...rewards.prompts import find_prompts, prompt_files, read_header
from ...tasks import TASKS
from ...utils.images import UnreadableImageError, read_image
from ...utils.seeding import seeded_generator
from .engine import Batch
from .styles import STYLES, Style


LANGUAGES = {"en": "English", "zh": "Simplified Chinese"}

# Shortest and longest instruction: English in words, Chinese in characters
MIN_LENGTH = {"en": 3, "zh": 4}
MAX_LENGTH = {"en": 60, "zh": 100}

LONGEST_ANSWER = 20_000  # characters; a model that goes on for longer has lost its way
EMPTY_WORDS = {"none", "null", "unknown", "something", "object", "无", "没有", "未知", "物体", "某物"}


class Plan:
    """
    Stage `plan`: which tasks, in which language and style, each image gets an instruction for. One image becomes one case or
    more.

    The number of cases of a task follows its weight to the last case (largest remainder), as far as no image gets a task twice.
    Tasks are spread evenly over the categories, languages over the tasks, and styles over the cases of the task `style`.

    Args:
        num_cases (`int`, *optional*):
            Number of cases. By default `tasks_per_image` for each image.
        tasks_per_image (`int`, *optional*, defaults to `1`):
            Number of different tasks of an image. Where `num_cases` is smaller than that makes, images have fewer, and their
            numbers differ by at most one.
        task_weights (`Mapping[str, float]`, *optional*):
            How the cases are shared among the tasks. Defaults to the counts of RealPref-50K (HP-Edit, table S6).
        languages (`Mapping[str, float]`, *optional*, defaults to `{"en": 1.0}`):
            How they are shared among the languages `"en"` and `"zh"`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        styles (`Sequence[Style]`, *optional*):
            The styles to draw from. Defaults to `STYLES`.

    Raises:
        `ValueError`: If a task or language is unknown, a weight is not usable, or there are fewer tasks than an image shall get.
    """

    name = "plan"
    inputs = ("image_id", "category")
    features = Features({"task": Value("string"), "language": Value("string"), "style": Value("string")})
    batch_size = None

    def __init__(
        self,
        num_cases: int | None = None,
        tasks_per_image: int = 1,
        task_weights: Mapping[str, float] | None = None,
        languages: Mapping[str, float] | None = None,
        seed: int = 0,
        styles: Sequence[Style] = STYLES,
    ):
        self.num_cases = num_cases
        self.tasks_per_image = tasks_per_image
        self.task_weights = _checked_weights(
            "task_weights",
            {task.name: task.realpref_50k for task in TASKS.values()} if task_weights is None else task_weights,
            TASKS,
        )
        self.languages = _checked_weights("languages", {"en": 1.0} if languages is None else languages, LANGUAGES)
        self.seed = seed
        self.styles = _by_name(styles)
        if num_cases is not None and num_cases < 1:
            raise ValueError(f"num_cases={num_cases} must be at least 1.")
        if not 1 <= tasks_per_image <= len(self.task_weights):
            raise ValueError(
                f"tasks_per_image={tasks_per_image} must be at least 1, and at most {len(self.task_weights)}, the number of "
                f"tasks with a weight: {list(self.task_weights)}."
            )

    @property
    def settings(self) -> dict[str, Any]:
        names = ("num_cases", "tasks_per_image", "task_weights", "languages", "seed")
        return {**{name: getattr(self, name) for name in names}, "styles": list(self.styles)}

    def load(self) -> None:
        """There is nothing to get ready."""

    def __call__(self, batch: Batch) -> Batch:
        ids, categories = batch["image_id"], [str(category) for category in batch["category"]]
        if repeated := [image for image, count in Counter(ids).items() if count > 1]:
            raise ValueError(
                f"The image {repeated[0]!r} is there more than once: cases are told apart by their image, so run the stage "
                "'duplicates' first."
            )
        available = len(ids) * self.tasks_per_image
        count = available if self.num_cases is None else self.num_cases
        if count > available:
            raise ValueError(
                f"num_cases={count} are asked for, but {len(ids)} images with tasks_per_image={self.tasks_per_image} make "
                f"{available}: lower num_cases, raise tasks_per_image, or bring more images."
            )

        def draw(purpose: str, *key: str) -> int:
            return seeded_generator(self.seed, purpose, *key).initial_seed()

        # The images in a circle, each category spread evenly over it. Each task takes the next images of the circle, as many as
        # it has cases: never an image twice, as no task has more cases than there are images.
        by_category: dict[str, list[int]] = {}
        for image in sorted(range(len(ids)), key=lambda image: draw("plan image", ids[image])):
            by_category.setdefault(categories[image], []).append(image)
        circle = _interleaved(by_category, {name: draw("plan category", name) / 2**63 for name in by_category})
        counts = _shares(count, self.task_weights, len(ids))
        tasks = [task for task in counts for _ in range(counts[task])]
        cases = [(circle[i % len(circle)], task) for i, task in enumerate(tasks)]

        # Styles go round the images of one category after the other.
        names = sorted(self.styles, key=lambda name: draw("plan style", name))
        painted = [image for image, task in cases if task == "style"]
        painted.sort(key=lambda i: (draw("plan style category", categories[i]), draw("plan style image", ids[i])))
        style = {(image, "style"): names[i % len(names)] for i, image in enumerate(painted)}

        # So do languages, within each task and style.
        shares = _shares(count, self.languages, count)
        dealt = _interleaved({name: [name] * number for name, number in shares.items()}, dict.fromkeys(shares, 0.5))
        order = sorted(
            cases,
            key=lambda case: (case[1], style.get(case, ""), categories[case[0]], draw("plan language", ids[case[0]])),
        )
        language = dict(zip(order, dealt, strict=True))

        cases.sort(key=lambda case: draw("plan order", ids[case[0]], case[1]))
        return {
            "parent": [image for image, _ in cases],
            "task": [task for _, task in cases],
            "language": [language[case] for case in cases],
            "style": [style.get(case) for case in cases],
            "reason": [None] * len(cases),
        }


def _checked_weights(option: str, weights: Mapping[str, float], known: Mapping[str, Any]) -> dict:
    """The weights above zero, in the order of what is known."""
    if unknown := [name for name in weights if name not in known]:
        raise ValueError(f"{option} names {unknown}, which are not known; known are {list(known)}.")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"{option}: the weight of {name!r} is {weight!r}, but must be a number of at least 0.")
    if not any(weights.values()):
        raise ValueError(
            f"{option}={dict(weights)} leaves nothing: give at least one of {list(known)} a weight above 0."
        )
    return {name: weights[name] for name in known if weights.get(name)}


def _shares(total: int, weights: Mapping[str, float], most: int) -> dict[str, int]:
    """
    Shares a whole number by weights, at most `most` for each. Largest remainder (Hamilton's method); what is above `most` is
    shared among the others in the same way.
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}  # 0.1 is a tenth
    unit = total / sum(exact.values())
    shares = {name: math.floor(weight * unit) for name, weight in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name] * unit)
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    full = [name for name in shares if shares[name] > most]
    if not full:
        return shares
    rest = {name: weight for name, weight in weights.items() if name not in full}
    others = _shares(total - most * len(full), rest, most) if rest else {}
    return {name: others.get(name, most) for name in weights}


def _interleaved(groups: Mapping[str, list], offsets: Mapping[str, float]) -> list:
    """One list of several, each spread evenly over it: the i-th of n members has its place at (i + offset) / n."""
    places = sorted(
        ((i + offsets[name]) / len(members), name, i) for name, members in groups.items() for i in range(len(members))
    )
    return [groups[name][i] for _, name, i in places]


def _by_name(styles: Sequence[Style]) -> dict[str, Style]:
    by_name = {style.name: style for style in styles}
    if len(by_name) < max(len(styles), 1):
        raise ValueError(f"styles must be there, each under a name of its own, but are {[s.name for s in styles]}.")
    return by_name


@dataclass(frozen=True)
class InstructionTemplate:
    """
    What a writer is told about one task.

    Args:
        task (`str`):
            Task that instructions are written for, or `"feasibility"` for the question whether one can be carried out.
        revision (`str`):
            Where the text came from and which revision it is, e.g. `"hp-edit-trl:instructions/add:1"`.
        text (`str`):
            What the writer is told, with `{category}`, `{language}`, `{style}` and `{style_description}` standing for those of
            the case; for the question, `{task}` and `{prompt}`.
        fields (`tuple[str, ...]`, *optional*, defaults to `()`):
            What the writer returns beside the instruction. The instruction must contain each of them.
        requirement (`str`, *optional*):
            What becomes the requirement of a case, with the names of fields, `{style}` and `{style_description}` in braces.
    """

    task: str
    revision: str
    text: str
    fields: tuple[str, ...] = ()
    requirement: str | None = None

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of a hash of all that decides what is written."""
        return hashlib.sha256(repr((self.text, self.fields, self.requirement)).encode()).hexdigest()[:12]


def load_instruction_templates(
    source: str | None = None, revision: str | None = None
) -> dict[str, InstructionTemplate]:
    """
    Loads instruction templates. Each is a Markdown file with a header that names its `task` and `revision`, and optionally
    `fields` and `requirement`, followed by the text. They lie in the folder `instructions`, if there is one, of the source.

    Args:
        source (`str`, *optional*):
            A local folder, or a Hub repository (`"user/name"`, or `"datasets/user/name"` for a dataset repository).
            By default the templates of this package.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.

    Returns:
        `dict[str, InstructionTemplate]`: the templates by task.

    Raises:
        `ValueError`: If a template is not usable, or a task has two.
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
                f"The instruction template {path} names the field 'instruction', which is always there: leave it out."
            )
        if not isinstance(requirement, str | None):
            raise ValueError(f"The instruction template {path} has the requirement {requirement!r}: put it in quotes.")
        if unknown := set(re.findall(r"\{(\w+)\}", requirement or "")) - {*fields, "style", "style_description"}:
            raise ValueError(
                f"The requirement of the instruction template {path} speaks of {sorted(unknown)}; its fields are {fields}."
            )
        needed = "{prompt}" if task == "feasibility" else "{language}"
        if needed not in text:
            raise ValueError(f"The instruction template {path} has no {needed}, so the writer would not know of it.")
        if task in templates:
            raise ValueError(f"The instruction template {path} is a second one for the task {task!r}.")
        name = f"{origin}:instructions/{task}:{header['revision']}"
        templates[task] = InstructionTemplate(task, name, text, tuple(fields), requirement)
    if not templates:
        raise FileNotFoundError(f"There are no instruction templates (*.md) in {folder}.")
    return templates


class WriteInstructions:
    """
    Stage `instructions`: a vision-language model writes an instruction for each case, and is asked in a second question
    whether it can be carried out.

    An instruction is rejected if it is not the JSON object that was asked for, is too short, too long, in another language or
    repetitive, has placeholders or several lines, or does not name what its fields say that it names.

    Args:
        writer ([`Judge`]):
            The model: [`ServerJudge`], [`TransformersJudge`], or anything that is called like them. It must be allowed long
            answers, e.g. `max_new_tokens=256`, and more if it reasons aloud.
        templates (`dict[str, InstructionTemplate]`, *optional*):
            What it is told for each task, and in `"feasibility"`. Defaults to the package's, see
            [`load_instruction_templates`].
        styles (`Sequence[Style]`, *optional*):
            The styles that the column `style` names. Defaults to `STYLES`.
        min_length (`Mapping[str, int]`, *optional*, defaults to `{"en": 3, "zh": 4}`):
            Shortest instruction of each language: English in words, Chinese in characters.
        max_length (`Mapping[str, int]`, *optional*, defaults to `{"en": 60, "zh": 100}`):
            Longest instruction of each language.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of cases that the writer is asked about together.
        check_feasibility (`bool`, *optional*, defaults to `True`):
            Ask the second question.

    Raises:
        `ValueError`: If an option is not usable, or the writer is not set to answer in words.
    """

    name = "instructions"
    inputs = ("image", "image_id", "task", "category", "language", "style")
    features = Features({name: Value("string") for name in ("id", "prompt", "requirement", "writer", "writer_prompt")})

    def __init__(
        self,
        writer: Judge,
        templates: dict[str, InstructionTemplate] | None = None,
        styles: Sequence[Style] = STYLES,
        min_length: Mapping[str, int] = MIN_LENGTH,
        max_length: Mapping[str, int] = MAX_LENGTH,
        batch_size: int = 16,
        check_feasibility: bool = True,
    ):
        self.writer = writer
        self.templates = load_instruction_templates() if templates is None else templates
        self.styles = _by_name(styles)
        self.min_length = dict(min_length)
        self.max_length = dict(max_length)
        self.batch_size = batch_size
        self.check_feasibility = check_feasibility
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        for language in LANGUAGES:
            least, most = self.min_length.get(language), self.max_length.get(language)
            if least is None or most is None or not 1 <= least <= most:
                raise ValueError(
                    f"min_length={self.min_length} and max_length={self.max_length} must each have a number of at least 1 for "
                    f"{list(LANGUAGES)}, the smaller one in min_length."
                )
        if check_feasibility and "feasibility" not in self.templates:
            raise ValueError(
                "There is no instruction template for the task 'feasibility': add one, or set check_feasibility=False."
            )
        identity = _identity(writer)
        if identity.get("score_mode") == "expected" or identity.get("num_answers", 1) != 1:
            raise ValueError(
                f"The writer ({_described(writer)}) must give one answer in words: use score_mode='integer' and num_answers=1."
            )
        if identity.get("max_new_tokens", 64) < 64:
            raise ValueError(
                f"The writer ({_described(writer)}) would be cut off in its sentence: use max_new_tokens=256."
            )

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "writer": _identity(self.writer),
            "templates": {task: [one.revision, one.digest] for task, one in sorted(self.templates.items())},
            "styles": hashlib.sha256(repr(list(self.styles.values())).encode()).hexdigest()[:12],
            "min_length": self.min_length,
            "max_length": self.max_length,
            "check_feasibility": self.check_feasibility,
        }

    def load(self) -> None:
        """
        Gets the writer ready.

        Raises:
            `ConnectionError`: If a server does not answer.
        """
        self.writer.load()

    def __call__(self, batch: Batch) -> Batch:
        count = len(batch["image_id"])
        writer = _described(self.writer)
        columns: Batch = {name: [None] * count for name in (*self.features, "reason")}
        images, questions = {}, {}
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

        answers = self._ask({row: _question(_filled(t.text, v), images[row]) for row, (t, v) in questions.items()})
        written = {}
        for row, answer in answers.items():
            template, values = questions[row]
            try:
                prompt, requirement = self._read(answer, template, values, batch["language"][row])
            except _Rejected as rejected:
                columns["reason"][row] = str(rejected)
                continue
            written[row] = prompt
            key = repr((batch["image_id"][row], template.task, prompt))
            columns["id"][row] = hashlib.sha256(key.encode()).hexdigest()[:16]
            columns["prompt"][row], columns["requirement"][row] = prompt, requirement

        if self.check_feasibility:
            text = self.templates["feasibility"].text
            second = {
                row: _question(_filled(text, {"prompt": prompt, "task": batch["task"][row]}), images[row])
                for row, prompt in written.items()
            }
            for row, answer in self._ask(second).items():
                columns["reason"][row] = _infeasible(answer)
        return columns

    def _values(self, task: str, category: str | None, language: str, style: str | None) -> dict[str, str]:
        """What stands in a template for the case's own."""
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
                    f"The style {style!r} is not among the styles: give the same to Plan and WriteInstructions."
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
        if not any(answer.answered for answer in answers.values()):
            if len(answers) == 1:
                # It may be this one picture that the writer cannot take. If it takes no other either, this raises.
                self.writer.load()
            else:
                raise ConnectionError(
                    f"The writer ({_described(self.writer)}) gave no answer to {len(answers)} questions in a row; the last time: "
                    f"{list(answers.values())[-1].answer[:300]} Run it again when the writer is back: what is written is kept."
                )
        return answers

    def _read(
        self, judgement: Judgement, template: InstructionTemplate, values: dict[str, str], language: str
    ) -> tuple[str, str | None]:
        """The instruction and the requirement in an answer. Raises `_Rejected` if it cannot be used."""
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
        self._check_text(prompt, language)
        if _compact(prompt) in _compact(template.text):
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
        # A number or a Latin word amid Chinese characters counts as one of them.
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
        # Three times in a row, or pairs of neighbors that keep coming back
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
    The one JSON object of an answer, in a code fence or amid prose or after reasoning that is closed. Raises `_Rejected` if there
    is none, or more than one, of which one could only be guessed.
    """
    if not judgement.answered or not judgement.answer.strip():
        raise _Rejected(f"no answer: {_excerpt(judgement.answer, 200) or 'it is empty'}")
    text = without_reasoning(judgement.answer).strip()
    if "<think>" in text:
        raise _Rejected(f"not an object: the reasoning is not closed, {_excerpt(text)}")
    if len(text) > LONGEST_ANSWER:
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
    """Why an instruction cannot be carried out, as the writer answered; `None` if it can."""
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


def _question(text: str, image: Image.Image) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": [{"type": "text", "text": text}]},
        {"role": "user", "content": [{"type": "text", "text": "The picture:"}, {"type": "image", "image": image}]},
    ]


def _filled(text: str, values: dict[str, str]) -> str:
    """The text with values for names in braces. Braces inside the values, and around other names, mean nothing."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)


def _identity(writer: Judge) -> dict[str, Any]:
    # A writer of the user's own may have none.
    return getattr(writer, "identity", None) or {"judge": type(writer).__name__}


def _described(writer: Judge) -> str:
    """The writer in one line, e.g. `"ServerJudge m, revision r, max_pixels 1048576, ..."`."""
    identity = {name: value for name, value in _identity(writer).items() if value is not None and name != "score_mode"}
    kind = " ".join(str(identity.pop(name)) for name in ("judge", "name") if name in identity)
    return ", ".join([kind, *(f"{name} {value}" for name, value in identity.items())])


def _excerpt(text: str, length: int = 100) -> str:
    """The beginning of a text, in a line that any file can hold."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter if letter.isalnum() else " " for letter in text).split()


def _bare(text: str) -> list[str]:
    """The words of a text without an article before them."""
    words = _words(text)
    return words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words


def _compact(text: str) -> str:
    """A text without case, punctuation and spaces."""
    return "".join(_words(text))


def _is_chinese(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith("CJK UNIFIED IDEOGRAPH")


def _names(prompt: str, what: str, language: str) -> bool:
    """Whether an instruction has certain words in it, one after the other; an article before them does not matter."""
    if language == "zh":
        return _compact(what) in _compact(prompt)
    return f" {' '.join(_bare(what))} " in f" {' '.join(_words(prompt))} "


def repeated_prompts(tasks: Sequence[str], prompts: Sequence[str], max_repeats: int) -> list[str | None]:
    """
    Finds prompts that were written too often for one task. Case, punctuation and spaces do not tell prompts apart.

    Args:
        tasks (`Sequence[str]`):
            The task of each row.
        prompts (`Sequence[str]`):
            Its prompt.
        max_repeats (`int`):
            How often a prompt may occur in a task. The first ones are kept.

    Returns:
        `list[str | None]`: for each row why it is rejected, or `None`.
    """
    seen: Counter[tuple[str, str]] = Counter()
    reasons: list[str | None] = []
    for task, prompt in zip(tasks, prompts, strict=True):
        seen[task, _compact(prompt)] += 1
        often = seen[task, _compact(prompt)] > max_repeats
        reasons.append(f"repeated prompt: {task} has it {max_repeats} times before this" if often else None)
    return reasons
