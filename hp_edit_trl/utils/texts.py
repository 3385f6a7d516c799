"""Texts that others wrote: control tokens in them are broken up, and in a prompt they are quoted."""

import json
import re
import unicodedata
from typing import Any


LONGEST_EXCERPT = 200  # characters of a text in a log line or an error

# What chat templates and tokenizers of common models treat as control: `<|im_end|>`, `<end_of_turn>`, `</s>`, `[INST]`
CONTROL = re.compile(
    r"<[|｜][^<>\s]{1,64}>|<[^<>\s]{1,64}[|｜]>|\[[|｜][^\[\]\s]{1,64}[|｜]\]"
    r"|</?(?:start|end|begin|im|img|image|video|audio|vision|tool|fim|extra_id|fake_token|row|arg)_\w+>"
    r"|<(?:ctrl|loc|seg|custom|reserved)_?\d+>|<0x[0-9a-f]{2}>|<\w{1,40}_TOKEN>"
    r"|</?(?:[\w-]{1,40}:)?(?:tool_call|function|invoke|parameter|observation)(?:[\s=][^<>]{0,64})?>"
    r"|</?(?:s|pad|unk|bos|eos|sop|eop|cls|sep|mask|think|tools|image|img|global-img|video|audio|ref|quad|box|point|slice"
    r"|unused\d+)>"
    r"|<</?SYS>>"
    r"|\[/?(?:INST|B_INST|E_INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+|IMG|IMG_\w+|CLS|SEP|MASK|gMASK|sMASK|PAD|UNK|BOS|EOS)\]",
    re.IGNORECASE,
)


def shortened(text: str, length: int = LONGEST_EXCERPT) -> str:
    """A text that is cut off after `length` characters, which shows by an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def without_control_tokens(text: str, *tokenizers: Any) -> str:
    """
    Breaks up the control tokens in a text with a space after their first character, so that a model reads them as
    text: `<|im_end|>` becomes `< |im_end|>`. Any other text is returned as it is.

    Args:
        text (`str`):
            The text.
        *tokenizers ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizers that will read it: their own special tokens are broken up. Without any, the tokens of common
            models are, because the tokenizer of a server is unknown.
    """
    patterns = [pattern for one in tokenizers if (pattern := _special_tokens(one)) is not None]
    for pattern in patterns if tokenizers else [CONTROL]:
        if not pattern.search(text):
            # Some tokenizers normalize characters, so that a token may be spelled in other ones, or with invisible
            # characters in between.
            plain = "".join(letter for letter in unicodedata.normalize("NFKC", text) if not _is_invisible(letter))
            if plain == text or not pattern.search(plain):
                continue
            text = plain
        while pattern.search(text):  # breaking up one may leave another, as in <<|im_end|>|im_end|>
            text = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text


# Letters and marks that are shown as nothing: fillers of Hangul, variation selectors, joiners
_FILLERS = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def _is_invisible(letter: str) -> bool:
    hidden = unicodedata.category(letter) in ("Cc", "Cf") or _FILLERS.match(letter)
    return bool(hidden) and letter not in "\t\n\r"


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it is empty, or holds only spaces, control characters and other invisible ones."""
    return all(letter.isspace() or unicodedata.category(letter)[0] in "CZ" or _is_invisible(letter) for letter in text)


def _special_tokens(tokenizer: Any) -> re.Pattern | None:
    """The special tokens of a tokenizer as a pattern; `None` if it has none."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    # Tokens that are added without being special are control tokens (<think>), or words that a user has added.
    tokens = {token.content for token in added if token.special or CONTROL.fullmatch(token.content)}
    tokens |= set(tokenizer.all_special_tokens)
    tokens = {token for token in tokens if len(token) > 1 and not token.isalnum() and not token.isspace()}
    # The longest first. Some tokenizers ignore case.
    parts = [re.escape(token) for token in sorted(tokens, key=lambda token: (-len(token), token))]
    return re.compile("|".join(parts), re.IGNORECASE) if parts else None


def quoted(text: str) -> str:
    """
    The text as a JSON string on one line. Nothing in it can end the quotation: quotation marks are escaped, line
    breaks too.
    """
    line = json.dumps(text, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", line)
