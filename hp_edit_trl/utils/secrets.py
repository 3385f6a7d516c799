"""What a secret is, and how it is kept out of everything that is written, shown or uploaded."""

import contextlib
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, quote_plus, unquote


HIDDEN = "<redacted>"

# The last part of an option's name, a dictionary's key, a header or an environment variable, in lower case with "_"
_NAME = re.compile(
    r"(^|_)(api_?keys?|access_?keys?(_id)?|private_?keys?|secret|secrets|secret_?keys?|token|tokens_?file|pwd|"
    r"(api|access|auth|hf|hub|refresh|secret|session)_?tokens?|credentials?|auth|authorization|bearer|cookie|signature|"
    r"\w+_key|\w+_pass)$|(passwords?|passwd|passphrase)$"
)
# Tokens of text, and keys that sort or find something
_HARMLESS = re.compile(
    r"(^|_)(pad|eos|bos|unk|mask|sep|cls|image|video|audio|vision|special|prompt|stop|start|end|next|first|last|sort|"
    r"primary|foreign|public|cache|dataset|index|label|row|case|group|join|metric|score|image|text|num|n|max|min|hot|"
    r"answer|query|value|column|field|unique|partition|shard|item|dict|map)_(token|key|pass)$"
)
# In the query of an address, shorter names hold secrets as well.
_QUERY = re.compile(r"([?&;#])([\w.%-]+)(=)([^&\s'\"<>#;]+)")
# An address inside of another one
_ENCODED_QUERY = re.compile(r"(%3F|%26|%23|%3B)([\w.-]+)(%3D)((?:(?!%26|%23|%3B)[^&\s'\"<>#;])+)", re.I)
_ENCODED_USER = re.compile(r"(%3A%2F%2F)((?:(?!%2F|%3F|%23)[^&\s/?#'\"<>])+)%40", re.I)
_QUERY_NAMES = {"key", "sig", "pass", "code", "policy", "key_pair_id", "awsaccesskeyid", "googleaccessid"}
# A password may hold "/", "?", "#" and "@" as they are; a port does not.
_USER = re.compile(
    r"(\b[a-z][a-z0-9+.-]{0,20}:/{1,2})([^\s/?#@:'\"<>]*:(?!\d{1,5}[/?#])[^\s'\"<>]{0,500}|[^\s/?#'\"<>]+)@", re.I
)

_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\b(?:sk|pk|rk)-(?=[\w-]{0,40}\d)[\w-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\bnpm_[A-Za-z0-9]{20,}|\bpypi-[\w-]{16,}|\bSG\.[\w-]{16,}\.[\w-]{16,}|\bya29\.[\w-]{16,}"
    r"|\bdop_v1_\w{20,}|(?<=hooks\.slack\.com/services/)[\w/]+"
    r"|-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----[^-]{0,10000}"
    r"|\bglpat-[\w-]{16,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bxox[abprs]-[\w-]{10,}|\bnvapi-[\w-]{16,}"
    r"|\bgsk_[A-Za-z0-9]{16,}|\br8_[A-Za-z0-9]{16,}|(?<![\w-])eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}"
)
_SCHEME = re.compile(
    r"(?P<header>authorization\W{1,6}b?[\"']?)?\b(?P<scheme>Bearer|Basic)\s+(?P<value>[\w.~+/=-]{6,})", re.I
)
_AUTHORIZATION = re.compile(r"(authorization[\"']?\s{0,9}[:=,]\s{0,9}b?[\"']?[\w-]{1,40}[ ]+)([^\s\"',;}]+)", re.I)
_COOKIE = re.compile(r"(\bcookie[\"']?\s{0,9}[:=]\s{0,9}[\"']?)([\w!#$%&*.^|~+-]{1,200}=[^\r\n\"']*)", re.I)
# A header as a pair: `(b'x-api-key', b'...')`
_PAIR = re.compile(r"""([(\[]b?["'])([\w-]+)(["'],\s*b?["'])([^"']+)(?=["'][)\]])""")
# In a sentence: "the token is ...", "Incorrect API key provided: ..."
_SENTENCE = re.compile(
    r"\b(?P<name>(?:(?:api|access|secret|private|auth|your)[ -]key|token|password|passphrase|secret|credential)s?)"
    r"(?P<sign>(?:\s(?:is|was|provided|given|used|reads|of))*:?\s+|:)(?P<quote>[\"'`]?)(?P<value>[^\s\"'`,;<>(){}\[\]]{6,})",
    re.I,
)
# What may be said of a token or a password
_STATE = re.compile(
    r"\w+(ed|ing|id|able|ible|ive|ly|ent)|not|too|wrong|empty|unknown|longer|shorter|correct|incorrect|always|never|unset",
    re.I,
)
# `name=value`, `name: value`, `"name": "value"`, `--name value`. It begins where a word does, so that a word of
# megabytes, as an encoded image is one, takes no quadratic time; for the same reason lengths are bounded.
_ASSIGNED = re.compile(
    r"(?<![\w.-])(?P<name>(?:api|access|secret|private|auth)[ ]key|(?:--)?[\w.-]*(?:tokens?|tokens_file|keys?|key_id|"
    r"secrets?|passwords?|pass|passwd|passphrase|pwd|credentials?|auth|authorization|bearer|cookie|signature))"
    r"""(?P<sign>(?:\\{0,9}["'])?\s{0,99}[=:]\s{0,99}(?:\w{1,99}\()?|\s{1,99}(?!-))"""
    r"""(?P<value>b?(?P<quote>\\{0,9}["'])(?s:.{0,4000}?)(?P=quote)|["'][^\s"']+|[^\s,;&"'(){}\[\]<>\\]+)""",
    re.I,
)
_BEGINNINGS = (
    "hf_", "sk-", "pk-", "rk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "npm_", "pypi-", "sg.", "ya29.",
    "dop_v1_", "hooks.slack.com", "private key-", "glpat-", "akia", "aiza", "xox", "nvapi-", "gsk_", "r8_", "eyj",
)  # fmt: skip
_WORDS = ("token", "key", "secret", "pass", "pwd", "credential", "auth", "bearer", "cookie", "signature")
_NO_VALUES = {"none", "null", "true", "false", ""}

_known: set[str] = set()


def is_secret_name(name: str) -> bool:
    """
    Whether an option, key, header or environment variable of this name holds a secret: `hub_token`, `api_key`,
    `HP_EDIT_PASSWORD`, `X-Api-Key`, but not `pad_token`.
    """
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|[-. ]", "_", name.strip().lstrip("-")).lower()
    return bool(_NAME.search(name)) and not _HARMLESS.search(name)


def redacted(value: Any) -> Any:
    """
    Returns a copy without secrets, for what is written, shown or uploaded: settings, command lines, addresses and
    messages of errors. Do not use it on users' data, where `password: red` may be a prompt.

    Hidden are the values of options with the names of secrets (nested ones and `--name value` in command lines too);
    user, password and secret parameters in addresses; texts that look like tokens (`hf_...`, `sk-...`, `Bearer ...`);
    and every secret that this process knows, see [`without_known_secrets`].

    Args:
        value (`Any`):
            A text, a dictionary, a list or tuple of such, or anything else, which is returned as it is.
    """
    return _redact(value, False, None)


def remember_secrets(value: Any) -> None:
    """
    Remembers the secrets among options, so that they are also hidden where their name is not beside them, as in the
    answer of a server that repeats the key.

    Args:
        value (`Any`):
            Options as a dictionary, a command line as a list, or an address.
    """
    _redact(value, False, _known)


def without_known_secrets(text: str) -> str:
    """
    Returns the text without the secrets that this process knows: those of environment variables with the names of
    secrets, and those of [`remember_secrets`]. Values that are short or a plain word are left, because they occur
    elsewhere. Unlike [`redacted`], this is safe for users' data: nothing else is changed.

    Args:
        text (`str`):
            The text.
    """
    environment = {value for name, value in os.environ.items() if is_secret_name(name) and not os.path.exists(value)}
    secrets = set(filter(_is_distinctive, _known | environment))
    # As they stand in JSON and in addresses
    for write in (lambda secret: json.dumps(secret)[1:-1], lambda secret: quote(secret, safe=""), quote, quote_plus):
        secrets |= {write(secret) for secret in secrets if secret.isprintable() and not secret.isalnum()}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def redact_error(error: BaseException) -> None:
    """
    Removes the secrets from the messages of an error and of those that it was raised from, which a stack trace shows
    too.

    Args:
        error (`BaseException`):
            The error. It is changed in place.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        if notes := getattr(one, "__notes__", None):
            notes[:] = redacted(list(notes))
        one.args = tuple(redacted(part) for part in one.args)
        for name in ("message", "strerror", "filename"):
            if isinstance(text := getattr(one, name, None), str):
                with contextlib.suppress(AttributeError):  # read-only
                    setattr(one, name, redacted(text))


def guard_output(words: Sequence[str] = ()) -> None:
    """
    Keeps the secrets of this process out of its output, for commands and scripts: the command line that trackers
    record (`sys.argv`), every record of `logging`, and the stack trace of an error that nothing catches. Call it after
    the command line was parsed.

    Args:
        words (`Sequence[str]`, *optional*):
            The command line, if it is not that of the process.
    """
    remember_secrets([sys.argv, list(words)])
    sys.argv[:] = redacted(sys.argv)
    sys.excepthook = _show_error
    make_record = logging.getLogRecordFactory()  # another library's may have been put around ours: ours goes outside

    def guarded_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        _redact_record(record)
        return record

    if make_record.__qualname__ != guarded_record.__qualname__:
        logging.setLogRecordFactory(guarded_record)


def _redact_record(record: logging.LogRecord) -> None:
    """Removes the secrets from a record of `logging`."""
    try:
        message = record.getMessage()
    except Exception:  # the handler reports it
        return
    if (clean := redacted(message)) != message:
        record.msg, record.args = clean, ()
    if record.exc_info and record.exc_info[1] is not None:
        record.exc_text = redacted("".join(traceback.format_exception(record.exc_info[1])).rstrip())


def _show_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))


def _is_distinctive(secret: str) -> bool:
    return len(secret) >= 16 or (len(secret) >= 8 and not secret.isalpha() and not secret.isdecimal())


def _redact(value: Any, secret: bool, found: set[str] | None) -> Any:
    """The value without secrets; `secret` if its name says that it is one. What is hidden is added to `found`."""
    if isinstance(value, dict):
        if "value" in value and any(_is_secret_key(value.get(name)) for name in ("name", "key", "header")):
            value = value | {"value": _redact(value["value"], True, found)}
        return {name: _redact(one, secret or _is_secret_key(name), found) for name, one in value.items()}
    if type(value) in (list, tuple, set):
        if type(value) is not set and len(value) == 2 and _is_secret_key(value[0]) and value[0][:1] not in ("-", b"-"):
            return type(value)([value[0], _redact(value[1], True, found)])  # a header as a pair
        parts, after = [], False  # `after` an option of a command line whose value comes next
        for one in value:
            is_option = isinstance(one, str) and one.startswith("-")
            parts.append(_redact(one, secret or (after and not is_option), found))
            after = is_option and "=" not in one and is_secret_name(one)
        return type(value)(parts)
    if isinstance(value, bool) or not isinstance(value, str | bytes | int | float):
        return value
    if secret:
        if not isinstance(value, str):
            return HIDDEN
        return value if value.lower() in _NO_VALUES else _hide(value, found)
    return _redact_text(value, found) if isinstance(value, str) else value


def _is_secret_key(name: Any) -> bool:
    name = name.decode("latin-1") if isinstance(name, bytes) else name
    return isinstance(name, str) and is_secret_name(name)


def _hide(secret: str, found: set[str] | None) -> str:
    if found is not None and secret != HIDDEN:
        found.add(secret)
    return HIDDEN


def _redact_text(text: str, found: set[str] | None) -> str:
    def user(match: re.Match) -> str:
        password = match[2].partition(":")[2] or match[2]
        _hide(password, found)
        return f"{match[1]}{HIDDEN}@"

    def query(match: re.Match) -> str:
        name = unquote(match[2])
        if name.lower().replace("-", "_") not in _QUERY_NAMES and not is_secret_name(name):
            return match[0]
        return f"{match[1]}{match[2]}{match[3]}{_hide(match[4], found)}"

    def scheme(match: re.Match) -> str:
        value = match["value"]
        if not match["header"] and value.isalpha() and (value.islower() or value.istitle()):
            return match[0]  # words, as in "basic lighting"
        return f"{match['header'] or ''}{match['scheme']} {HIDDEN}"

    def sentence(match: re.Match) -> str:
        value = match["value"].rstrip(".:!?")
        is_word = value.isalpha() and (value.islower() or value.istitle())
        said = re.search(r"\s(is|was)\b", match["sign"]) and not _STATE.fullmatch(value)
        is_mixed = re.search("[A-Za-z]", value) and re.search(r"\d|[a-z][A-Z]", value) and "=" not in value.rstrip("=")
        if HIDDEN.strip("<>") in value or not (said if is_word else is_mixed):
            return match[0]
        start = match.start("value") - match.start()
        return f"{match[0][:start]}{_hide(value, found)}{match[0][start + len(value) :]}"

    def pair(match: re.Match) -> str:
        if not is_secret_name(match[2]):
            return match[0]
        return f"{match[1]}{match[2]}{match[3]}{_hide(match[4], found)}"

    def assigned(match: re.Match) -> str:
        value, mark = match["value"], match["quote"] or ""
        if mark:
            value = value.removeprefix("b").removeprefix(mark).removesuffix(mark)
        if not match["sign"].strip() and not match["name"].startswith("--"):
            return match[0]
        if value.lower() in _NO_VALUES or value.startswith(HIDDEN) or not is_secret_name(match["name"]):
            return match[0]
        name = match["name"].lower()
        if name.endswith("signature") and not re.fullmatch(r"(?=.*\d)[\w+/=%.-]{8,}", value):  # of a function
            return match[0]
        if name == "cookie" and "=" not in match["sign"] and not mark:  # a cake
            return match[0]
        return f"{match['name']}{match['sign']}{mark}{_hide(value, found)}{mark}"

    text = without_known_secrets(text)
    # Most texts hold none of the words that a pattern needs, and are not searched for it.
    for pattern, replacement, needed in (
        (_USER, user, ("@",)),
        (_ENCODED_USER, rf"\1{HIDDEN}%40", ("%40",)),
        (_QUERY, query, ("=",)),
        (_ENCODED_QUERY, query, ("%3d",)),
        (_SCHEME, scheme, ("bearer", "basic")),
        (_AUTHORIZATION, rf"\1{HIDDEN}", ("authorization",)),
        (_COOKIE, rf"\1{HIDDEN}", ("cookie",)),
        (_PAIR, pair, ("(", "[")),
        (_SHAPES, lambda match: _hide(match[0], found), _BEGINNINGS),
        (_ASSIGNED, assigned, _WORDS),
        (_SENTENCE, sentence, _WORDS),
    ):
        lower = text.lower()
        if any(word in lower for word in needed):
            text = pattern.sub(replacement, text)
    return text
