"""What counts as a secret, and that nothing else changes."""

import logging
import sys

import pytest

from hp_edit_trl.utils import secrets
from hp_edit_trl.utils.files import append_jsonl, check_unchanged, write_json
from hp_edit_trl.utils.secrets import (
    guard_output,
    is_secret_name,
    redact_error,
    redacted,
    remember_secrets,
    without_known_secrets,
)


SECRET = "Planted/Secret+0123456789=="


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    monkeypatch.setattr(secrets, "_known", set())


def test_names():
    for name in (
        "token", "hub_token", "hf-token", "--hf_token", "api_key", "apiKey", "apikey", "X-Api-Key", "OPENAI_API_KEY",
        "password", "HP_EDIT_PASSWORD", "AWS_SECRET_ACCESS_KEY", "aws_access_key_id", "Authorization", "client_secret",
        "credentials", "ssh_key", "push_to_hub_token",
    ):  # fmt: skip
        assert is_secret_name(name), name
    for name in (
        "pad_token",
        "max_new_tokens",
        "input_tokens",
        "sort_key",
        "judge",
        "author",
        "keyboard",
        "tokenizer",
    ):
        assert not is_secret_name(name), name


@pytest.mark.parametrize(
    "value",
    [
        {"hub_token": SECRET}, {"a": [{"b": {"token": SECRET}}]}, {"auth": ("me", SECRET)},
        {"password": 12345678901234},
        {"headers": {"Authorization": f"Bearer {SECRET}", "X-Api-Key": SECRET}},
        ["hp-edit", "--api_key", SECRET, "--seed", "3"], ["--token=" + SECRET],
        ["--editor_options", f"token={SECRET}"],
        ["--model_init_kwargs", f'{{"token": "{SECRET}"}}'],
        "https://me:Planted0123456789@host:8000/v1", "http://me:Planted@0123456789@host",  # not a secret
        "https://Planted0123456789@host/x",
        "https://host/x?a=1&token=Planted0123456789#top", "http://host?key=Planted0123456789",
        "https://s3/x?X-Amz-Signature=Planted0123456789&X-Amz-Credential=Planted0123456789&Expires=3",
        f"Authorization: Bearer {SECRET}", f"Config(hub_token='{SECRET}', x=1)", f"run --hub_token {SECRET} --x 1",
        f"ValueError: api_key={SECRET} is wrong", "hf_Planted0123456789abcdefghijklmnop",  # not a secret
        "sk-proj-Planted0123456789abc",  # not a secret
        "ghp_Planted0123456789abcdef", "AKIAPLANTED012345678",  # not a secret
    ],
)  # fmt: skip
def test_secrets_are_hidden(value):
    clean = repr(redacted(value))
    assert "planted" not in clean.lower() and "0123456789" not in clean and "12345678901234" not in clean
    assert "<redacted>" in clean


@pytest.mark.parametrize(
    "value",
    [
        {"learning_rate": 1e-4, "token": None, "password": None, "use_token": True, "pad_token": "<pad>"},
        ["hp-edit", "bench", "--max_new_tokens", "16", "--seed", "3"],
        "http://localhost:8000/v1?x=1", "Mail me@example.org", "judge ServerJudge, name m, score_mode integer",
        "the token limit is 5", "KeyError: 'token'", "task-specific-0123456789-name", "max_new_tokens=16",
    ],
)  # fmt: skip
def test_everything_else_stays(value):
    assert redacted(value) == value


def test_known_secrets_are_hidden_without_their_name(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("SHORT_TOKEN", "make")
    monkeypatch.setenv("TOKEN", "backgrounds")  # a plain word would be hidden in prompts
    remember_secrets({"api_key": "s3cret-of-a-server", "base_url": "http://me:pass-w0rd@host"})  # not a secret
    text = f"make backgrounds {SECRET} s3cret-of-a-server pass-w0rd, password: red"
    hidden = "make backgrounds <redacted> <redacted> <redacted>, password: red"
    assert without_known_secrets(text) == hidden


def test_files(tmp_path):
    remember_secrets({"token": SECRET})
    write_json(tmp_path / "a.json", {"answer": f"wrong key {SECRET}", "prompt": "write password: red"})
    append_jsonl(tmp_path / "b.jsonl", [{"answer": SECRET}])
    written = (tmp_path / "a.json").read_text() + (tmp_path / "b.jsonl").read_text()
    assert SECRET not in written and "write password: red" in written
    check_unchanged("x", redacted({"token": "a", "n": 1}), {"token": "b", "n": 1}, "y")
    with pytest.raises(ValueError) as error:
        check_unchanged("x", {"n": 1, "token": "a"}, {"n": 2, "token": SECRET}, "y")
    assert SECRET not in str(error.value)


def test_errors_and_their_causes():
    try:
        try:
            raise OSError(5, "failed", f"https://me:{'Planted0123456789'}@host")
        except OSError as error:
            raise ValueError(f"api_key={SECRET}") from error
    except ValueError as error:
        redact_error(error)
        assert "Planted" not in f"{error} {error.__cause__}"


def test_the_output_of_a_command(monkeypatch, caplog, capsys):
    factory, hook = logging.getLogRecordFactory(), sys.excepthook
    monkeypatch.setattr(sys, "argv", ["hp-edit", "--token", SECRET, "--seed", "3"])
    try:
        guard_output()
        assert sys.argv == ["hp-edit", "--token", "<redacted>", "--seed", "3"]
        try:
            raise RuntimeError(f"answer: {SECRET}")
        except RuntimeError as error:
            logging.getLogger("another.library").warning("%s with %s", "failed", SECRET, exc_info=True)
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        logging.setLogRecordFactory(factory)
        sys.excepthook = hook
    shown = caplog.text + capsys.readouterr().err
    assert SECRET not in shown and "failed with <redacted>" in shown and "RuntimeError: answer: <redacted>" in shown


@pytest.mark.parametrize(
    "value",
    [
        r"{\"token\": \"pl4nted-zz\"}",
        'cut: "token": "pl4nted-zz',
        "https://h/x?access%5Ftoken=pl4nted-zz",
        "next=https%3A%2F%2Fh%3Fsig%3Dpl4nted-zz%26a%3D1",
        "next=https%3A%2F%2Fu%3Apl4nted-zz%40h%2F",
        "(b'x-api-key', b'pl4nted-zz')",
        "DB_PASS=pl4nted-zz",
        "token=b'pl4nted-zz'",
        "api_key=SecretStr('pl4nted-zz')",
        "Cookie: a=pl4nted-zz; b=pl4nted-zz",
        "Authorization: Basic plantedzz pl",
        [("x-api-key", "pl4nted-zz")],
        {"headers": [["Authorization", "pl4nted-zz"]]},
        {b"token": "pl4nted-zz"},
        {"headers": [{"name": "Authorization", "value": "pl4nted-zz"}]},
        {"api_keys": ["pl4nted-zz"], "passwords": {"me": "pl4nted-zz"}},
        ["Authorization", "Token pl4nted-zz"],
        "https://me:pl4nted/pl4nted@zz@host/x",  # not a secret
        "postgres://me:pl4nted#zz?x@host/db",  # not a secret
        "-H 'Authorization: Token pl4nted-zz'",
        "PGPASSWORD=pl4nted-zz",
        "secret key = pl4nted-zz",
        "SharedAccessSignature=pl4nted-zz1",
        "the token is pl4nted-zz",
        "Incorrect API key provided: pl4nted-zz.",
        "your key 'pl4nted-zz' is wrong",
        "The password was plantedzz",
        f"-----BEGIN RSA PRIVATE KEY-----\n{'plantedzz' * 9}\n",  # not a secret
    ],
)
def test_redacts_encoded_cut_and_paired_secrets(value):
    text = repr(redacted(value))
    assert "pl4nted" not in text and "plantedzz" not in text and "<redacted>" in text


@pytest.mark.parametrize(
    "value",
    [
        "basic lighting", "A Basic Kitchen", "the bearer platform", "first_pass=2", "num_key=3", "n_key = 3",
        {"num_key": 3, "max_tokens": 5, "key_frames": 2, "tokenizer": "x", "num_key_value_heads": 8, "hot_key": "a"},
        "cookie: chocolate with nuts", "signature: def reward(prompts)", "The token is missing", "a token was denied",
        "password is not valid", "answer key: A", "tokens: 523", "http://h:8000/v1/path@2x.png", "the key is wrong",
        "turkey=3", "KeyError: 'positional'", "password_length=8", "A hockey: game2x", "compass: north",
    ],
)  # fmt: skip
def test_leaves_words_that_only_look_like_secrets(value):
    assert redacted(value) == value


@pytest.mark.parametrize(
    "part", ["iVBORw0K", "a-", "token", 'token="', "sk-", "eyJ-", "\\", "a://a", "password ", "."]
)
def test_long_texts_take_time_in_proportion_to_their_length(part):
    redacted(part * (100_000 // len(part)))  # was quadratic: minutes


def test_known_secrets_are_hidden_in_json_and_addresses():
    remember_secrets({"a_token": 'k9"x y/z+12345678'})
    for text in ['k9\\"x y/z+12345678', "k9%22x%20y%2Fz%2B12345678", "k9%22x+y%2Fz%2B12345678"]:
        assert without_known_secrets(text) == "<redacted>"


def test_redacts_notes_and_groups_of_errors():
    inner = ValueError("hub_token=pl4nted-zz")
    inner.add_note("hub_token=pl4nted-zz")
    redact_error(ExceptionGroup("several", [inner]))
    assert inner.args == ("hub_token=<redacted>",) and inner.__notes__ == ["hub_token=<redacted>"]
