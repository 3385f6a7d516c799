"""A judge in this process: any chat vision-language model of transformers."""

import hashlib
import time
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from ..utils.hub import check_reachable
from ..utils.revisions import model_revision
from ..utils.secrets import is_secret_name, remember_secrets
from ..utils.texts import without_control_tokens
from .base import (
    DIGITS,
    NUM_ANSWER_TOKENS,
    Judgement,
    Parser,
    ScoreMode,
    check_judge_options,
    conversation_digest,
    count_pictures,
    digit_of_token,
    expected_score,
    fit_image,
    mean_score,
    parse_score,
    trial_conversation,
)


# Models that are known to read their pictures as one run of patches each, with rotary positions from `get_rope_index`
SHARES_PREFIX = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")

# What says nothing about a conversation: the device is out of memory or broken
FATAL = (torch.OutOfMemoryError, torch.AcceleratorError)


def _no_judgement(error: Exception) -> Judgement:
    return Judgement(None, f"{type(error).__name__}: {error}", answered=False, failure="image")


class TransformersJudge:
    """
    A chat vision-language model in this process: any model that `AutoModelForImageTextToText` loads. Needs the extra
    `judge` (`pip install "hp-edit-trl[judge]"`).

    Conversations that differ in their last picture alone, such as the edits of one case, are read up to that picture
    once (with the models in `SHARES_PREFIX`); all others are batched as they are.

    Args:
        model (`str`):
            Hub id or local folder, e.g. `"Qwen/Qwen3-VL-32B-Instruct"`.
        score_mode (`str`, *optional*, defaults to `"integer"`):
            `"integer"`: the digit that the model answers. `"expected"`: the expectation over the probabilities that
            the model gives to the digits 0 to 5 as its next token, which has no ties. Tokens of a digit with a space
            or a mark of the tokenizer around it count as the digit. The answer is generated up to its fourth token: if
            it begins with a number that is no score, such as a 10 that is written as a 1 and a 0, there is none.
        num_answers (`int`, *optional*, defaults to `1`):
            In the mode `"integer"`: number of answers that are drawn for each case, whose scores are averaged. A
            single answer is greedy.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature at which several answers are drawn.
        seed (`int`, *optional*, defaults to `0`):
            Seed of several answers. They depend on the case, not on what else is judged.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of cases judged together.
        max_new_tokens (`int`, *optional*, defaults to `16`):
            Longest answer in the mode `"integer"`; raise it for models that reason aloud.
        max_pixels (`int`, *optional*, defaults to `1048576`):
            Larger images are scaled down to this area before the judge sees them.
        min_digit_mass (`float`, *optional*, defaults to `0.5`):
            In the mode `"expected"`: where the digits together are less probable than this, the model is not about to
            answer with a score, and there is none.
        device (`torch.device` or `str`, *optional*):
            Where it runs. By default this process's accelerator.
        model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained`, e.g. `{"dtype": "bfloat16", "revision": "..."}`.
        parse (`Callable[[str], float | None]`, *optional*, defaults to [`parse_score`]):
            Reads the score from an answer; returns `None` if there is none. Scoring prompts of other kinds than
            HP-Scorer's need one.

    Raises:
        `ImportError`: If the extra is not installed.
        `ValueError`: If the model cannot be found, or its vocabulary lacks a token for a score.
    """

    def __init__(
        self,
        model: str,
        score_mode: ScoreMode = "integer",
        num_answers: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 8,
        max_new_tokens: int = 16,
        max_pixels: int = 1024 * 1024,
        min_digit_mass: float = 0.5,
        device: torch.device | str | None = None,
        model_init_kwargs: dict | None = None,
        parse: Parser = parse_score,
    ):
        counts = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "max_pixels": max_pixels}
        check_judge_options(score_mode, num_answers, temperature, parse, **counts)
        try:
            import qwen_vl_utils  # noqa: F401  # it brings PyAV, 100 MB, which a judge on a server does not need
        except ImportError as error:
            raise ImportError('A judge in this process needs the extra: pip install "hp-edit-trl[judge]"') from error
        self.name = model
        self.score_mode = score_mode
        self.num_answers = num_answers
        self.parse = parse
        self.temperature = temperature
        self.seed = seed
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.max_pixels = max_pixels
        self.min_digit_mass = min_digit_mass
        self.device = device
        self.model_init_kwargs = {"dtype": "auto", **(model_init_kwargs or {})}
        remember_secrets(self.model_init_kwargs)
        revision, token = self.model_init_kwargs.get("revision"), self.model_init_kwargs.get("token")
        check_reachable(model, revision=revision, token=token)
        try:
            self.processor = AutoProcessor.from_pretrained(model, revision=revision)
        except (OSError, ValueError) as error:
            raise ValueError(f"The judge {model!r} has no processor that transformers can load: {error}") from error
        if not hasattr(self.processor, "image_processor"):
            raise ValueError(f"The judge {model!r} does not take images: use a vision-language model.")
        if self.processor.chat_template is None:
            raise ValueError(f"The judge {model!r} has no chat template: use an instruction-tuned model.")
        for digit in DIGITS:
            ids = self.processor.tokenizer(digit, add_special_tokens=False)["input_ids"]
            if len(ids) != 1 or ids[0] == self.processor.tokenizer.unk_token_id:
                raise ValueError(
                    f"The judge {model!r} has no single token for the score {digit!r}, so it cannot be used here: "
                    "use a model whose tokenizer keeps digits apart."
                )
        digits = {i: digit_of_token(token) for token, i in self.processor.tokenizer.get_vocab().items()}
        # The tokens of each digit, e.g. of "4" and " 4"
        self.digit_ids = [[i for i, digit in digits.items() if digit == int(wanted)] for wanted in DIGITS]

    @cached_property
    def model(self):
        device = self.device or PartialState().device
        model = AutoModelForImageTextToText.from_pretrained(self.name, **self.model_init_kwargs)
        return model.requires_grad_(False).eval().to(device)

    @cached_property
    def revision(self) -> str | None:
        """Commit of the model on the Hub, or a hash of the files of a local folder."""
        return model_revision(self.name, self.model_init_kwargs.get("revision"))

    @property
    def identity(self) -> dict[str, Any]:
        names = ["name", "revision", "score_mode", "max_pixels"]
        names += ["min_digit_mass"] if self.score_mode == "expected" else ["num_answers", "max_new_tokens"]
        names += ["temperature", "seed"] if self.num_answers > 1 else []
        parser = {} if self.parse is parse_score else {"parse": self.parse.__name__}
        loaded = {
            name: str(value)
            for name, value in sorted(self.model_init_kwargs.items())
            if name != "revision" and not is_secret_name(name)  # a token does not decide an answer
        }
        return {"judge": "TransformersJudge", **{name: getattr(self, name) for name in names}, **loaded, **parser}

    def load(self, num_images: int = 2) -> None:
        """
        Loads the weights and asks for one judgement of gray squares.

        Args:
            num_images (`int`, *optional*, defaults to `2`):
                Number of squares: as many as the largest case has images, its edit included.

        Raises:
            `ValueError`: If the model does not answer, e.g. because its reasoning fills `max_new_tokens`.
        """
        (judgement,) = self([trial_conversation(num_images)])
        if not judgement.answered:
            raise ValueError(
                f"The judge {self.name!r} gives no judgements of {num_images} images: {judgement.excerpt}"
            )

    @torch.no_grad()
    def __call__(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        judgements: dict[int, Judgement] = {}
        fitted = {}
        for index, conversation in enumerate(conversations):
            try:
                fitted[index] = self._fit(conversation)
            except Exception as error:  # e.g. an image a hundred times as wide as high
                judgements[index] = _no_judgement(error)
        for members in self._batches(fitted):
            start = time.perf_counter()
            judged = self._judge_apart([fitted[index] for index in members])
            seconds = (time.perf_counter() - start) / len(members)
            judgements.update(zip(members, (replace(one, seconds=seconds) for one in judged), strict=True))
        return [judgements[index] for index in range(len(conversations))]

    def _batches(self, conversations: dict[int, list[dict[str, Any]]]) -> list[list[int]]:
        """
        Batches of numbers of conversations; those that share all but the pixels of their last picture are neighbors.
        """
        if self.num_answers > 1:
            return [[index] for index in conversations]
        groups: dict[bytes, list[int]] = {}
        for index, conversation in conversations.items():
            key = self._beginning(conversation) if count_pictures(conversation) > 1 else str(index).encode()
            groups.setdefault(key, []).append(index)
        batches, rest = [], []
        for members in groups.values():
            several = [members[i : i + self.batch_size] for i in range(0, len(members), self.batch_size)]
            batches += [batch for batch in several if len(batch) > 1 and self._shares_prefix]
            rest += [index for batch in several if len(batch) == 1 or not self._shares_prefix for index in batch]
        return batches + [rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size)]

    def _beginning(self, conversation: list[dict[str, Any]]) -> bytes:
        """A digest of all but the pixels of a conversation's last picture."""
        *before, last = conversation
        pictures = [i for i, part in enumerate(last["content"]) if part["type"] == "image"]
        blank = {"type": "image", "image": Image.new("RGB", last["content"][pictures[-1]]["image"].size)}
        content = [*last["content"][: pictures[-1]], blank, *last["content"][pictures[-1] + 1 :]]
        return conversation_digest([*before, {**last, "content": content}])

    @property
    def _shares_prefix(self) -> bool:
        return self.model.config.model_type in SHARES_PREFIX

    def _judge_apart(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        """Judges conversations together, and one by one if that fails, so that one cannot fail the others."""
        try:
            return self._judge(conversations)
        except FATAL:  # not the fault of a conversation
            raise
        except Exception as error:  # processors raise errors of many kinds about what they cannot take
            if len(conversations) == 1:
                return [_no_judgement(error)]
        return [judgement for one in conversations for judgement in self._judge_apart([one])]

    def _judge(self, conversations: list[list[dict[str, Any]]]) -> list[Judgement]:
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            # A reloaded tokenizer may pad on the right, where the next token would be predicted from padding.
            processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt"},
        ).to(self.model.device)
        read = inputs["attention_mask"].sum(-1).tolist()
        if (
            len(conversations) > 1
            and self._shares_prefix
            and count_pictures(conversations[0]) > 1 == len(set(map(self._beginning, conversations)))
        ):
            return self._judge_by_prefix(inputs, read)
        if self.score_mode == "expected":
            written = self.model.generate(
                **inputs,
                max_new_tokens=NUM_ANSWER_TOKENS,
                do_sample=False,
                repetition_penalty=1.0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            return self._expected(written.logits[0], written.sequences[:, inputs["input_ids"].shape[1] :], read)
        if self.num_answers > 1:
            return [self._draw(inputs, conversations[0], read[0])]
        tokens = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, repetition_penalty=1.0
        )
        return self._answers(tokens[:, inputs["input_ids"].shape[1] :], read)

    def _draw(self, inputs: dict[str, Any], conversation: list[dict[str, Any]], read: int) -> Judgement:
        """Mean score of several answers to one conversation, drawn from the model's own probabilities."""
        key = repr(self.seed).encode() + conversation_digest(conversation)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # `generate` takes no generator
            torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)
            tokens = self.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=True,
                temperature=self.temperature,
                top_p=1.0,
                top_k=0,
                repetition_penalty=1.0,
                num_return_sequences=self.num_answers,
            )
        texts, written = self._decoded(tokens[:, inputs["input_ids"].shape[1] :])
        mean = mean_score(texts, self.parse, self.max_new_tokens)
        return replace(mean, input_tokens=read, output_tokens=sum(written))

    def _expected(self, logits: torch.Tensor, tokens: torch.Tensor, read: list[int]) -> list[Judgement]:
        """
        Scores from the logits of the first token, of shape `(batch, vocabulary)`, and the first tokens of the answers,
        of shape `(batch, length)`.
        """
        probabilities = logits.float().softmax(-1)
        rows = torch.stack([probabilities[:, ids].sum(-1) for ids in self.digit_ids], dim=1).tolist()
        judgements = []
        for row, text, count in zip(rows, self._decoded(tokens)[0], read, strict=True):
            one = mean_score([text], self.parse, NUM_ANSWER_TOKENS)
            one = expected_score(row, self.min_digit_mass, text) if one.answered else one
            judgements.append(replace(one, input_tokens=count))
        return judgements

    def _answers(self, tokens: torch.Tensor, read: list[int]) -> list[Judgement]:
        """Scores from answers, as tokens of shape `(batch, length)`."""
        return [
            replace(mean_score([text], self.parse, self.max_new_tokens), input_tokens=count, output_tokens=new)
            for text, new, count in zip(*self._decoded(tokens), read, strict=True)
        ]

    def _decoded(self, tokens: torch.Tensor) -> tuple[list[str], list[int]]:
        """The texts of answers, and how many tokens each has."""
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return texts, (tokens != self.processor.tokenizer.pad_token_id).sum(-1).tolist()

    def _judge_by_prefix(self, inputs: dict[str, torch.Tensor], read: list[int]) -> list[Judgement]:
        """
        Judges conversations that differ in the pixels of their last picture alone. All rows have the same tokens, so
        nothing is padded: one pass reads the beginning, one all last pictures with what follows them, from the same
        cache.
        """
        model, ids, grids = self.model, inputs["input_ids"], inputs["image_grid_thw"]
        count, per_row = len(ids), len(grids) // len(ids)
        is_picture = inputs["mm_token_type_ids"][0] != 0
        # The last token before the last run of picture tokens
        cut = int((is_picture[1:] & ~is_picture[:-1]).nonzero()[-1]) + 1
        positions, _ = model.model.get_rope_index(
            ids, mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=grids
        )
        patches = inputs["pixel_values"].split(grids.prod(-1).tolist())
        last = [row * per_row + per_row - 1 for row in range(count)]

        cache = DynamicCache(config=model.config.get_text_config())
        model(
            input_ids=ids[:1, :cut],
            position_ids=positions[:, :1, :cut],
            pixel_values=torch.cat(patches[: per_row - 1]),
            image_grid_thw=grids[: per_row - 1],
            past_key_values=cache,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(count)
        logits = model(
            input_ids=ids[:, cut:],
            position_ids=positions[:, :, cut:],
            pixel_values=torch.cat([patches[i] for i in last]),
            image_grid_thw=grids[last],
            past_key_values=cache,
            logits_to_keep=1,
        ).logits
        # Tokens really read: the beginning once
        read = [read[0], *[length - cut for length in read[1:]]]
        first = logits[:, -1]
        longest = NUM_ANSWER_TOKENS if self.score_mode == "expected" else self.max_new_tokens

        ends = model.generation_config.eos_token_id
        ends = torch.as_tensor([] if ends is None else ends, device=ids.device).reshape(-1)
        padding = self.processor.tokenizer.pad_token_id
        done = torch.zeros(count, dtype=torch.bool, device=ids.device)
        position = positions.amax((0, 2)) + 1  # text after an image continues from its largest position
        tokens: list[torch.Tensor] = []
        while True:
            token = logits[:, -1].argmax(-1).masked_fill(done, padding)
            done |= torch.isin(token, ends)
            tokens.append(token)
            if done.all() or len(tokens) == longest:
                written = torch.stack(tokens, dim=1)
                if self.score_mode == "expected":
                    return self._expected(first, written, read)
                return self._answers(written, read)
            step = position + len(tokens) - 1
            logits = model(
                input_ids=token[:, None], position_ids=step.expand(3, -1)[..., None], past_key_values=cache
            ).logits

    def _fit(self, conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
        from qwen_vl_utils import fetch_image

        patch_size = getattr(self.processor.image_processor, "patch_size", 14)

        def fit(part: dict[str, Any]) -> dict[str, Any]:
            if part["type"] != "image":
                text = part["text"] if part.get("trusted") else without_control_tokens(part["text"])
                return {"type": part["type"], "text": without_control_tokens(text, self.processor.tokenizer)}
            image = fit_image(part["image"], self.max_pixels)
            return {"type": "image", "image": fetch_image({"image": image}, image_patch_size=patch_size)}

        return [{**message, "content": [fit(part) for part in message["content"]]} for message in conversation]
