"""Each row of the table "Untrusted input" in docs/reliability.md has a test here, or names the one elsewhere."""

import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from hp_edit_trl.cases import case_images
from hp_edit_trl.ratings import ratings_file
from hp_edit_trl.utils import hub
from tests.helpers import photo


ROOT = Path(__file__).parents[1]

# The beginning of each row, and the test of it
ROWS = {
    "a dataset that is loaded by name has an image outside":
        "utils.test_image_paths.test_only_files_of_the_dataset_are_named",
    "a dataset that is loaded by name has the address": "utils.test_image_paths.test_more_is_asked_for",
    "a `Dataset` of the user's own Python": "test_untrusted_input.test_paths_of_the_users_own_are_read",
    "the id of a case is a path": "test_editors.test_an_id_is_no_path_to_another_folder",
    "ids that are long": "utils.test_files.test_different_names_stay_different_and_plain_ones_as_they_are",
    "the task of a scorer prompt is a path": "calibration.test_refine.test_a_task_is_no_path_to_another_folder",
    "the task of a scorer prompt is no text": "rewards.test_prompts.test_bad_folders",
    "the folder of a benchmark's run": "bench.test_report.test_a_gallery_shows_no_file_of_another_folder",
    "the name of an annotator": "test_untrusted_input.test_the_name_of_an_annotator_stays_in_the_folder",
    "an instruction holds special tokens": "utils.test_texts.test_no_text_becomes_a_special_token",
    "an instruction, a requirement or a tag": "judges.test_judges.test_control_tokens_in_a_case_are_read_as_text",
    "an instruction closes its quotation": "calibration.test_probe.test_an_injection_stays_inside_its_quotation",
    "a text tells the judge": "calibration.test_probe.test_an_injection_moves_a_gullible_judge_and_not_a_fair_one",
    "wrong passwords for the rating page from one":
        "calibration.test_guard.test_guesses_of_an_address_become_slow_and_others_are_let_in",
    "wrong passwords from many":
        "calibration.test_guard.test_guesses_from_many_addresses_become_slow_but_the_right_password_works",
    "another website": "calibration.test_guard.test_a_website_of_others_cannot_rate_or_guess",
    "a dataset is pushed": "test_untrusted_input.test_a_dataset_is_not_pushed_to_a_public_repository",
    "a secret in a file": "test_untrusted_input.test_a_planted_secret_is_found",
    "no network while": "test_untrusted_input.test_an_audit_without_a_network_does_not_fail",
}  # fmt: skip


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_and_the_tests_agree():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    section = page.split("## Untrusted input\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", section.replace("\\|", "¦"), re.MULTILINE)
    faults = [fault for fault, _ in rows if fault != "Fault"]
    assert len(faults) == len(ROWS)
    for fault, (begins, test) in zip(faults, ROWS.items(), strict=True):
        assert fault.startswith(begins)
        module, name = test.rsplit(".", 1)
        assert inspect.isfunction(getattr(importlib.import_module(f"tests.{module}"), name))


def test_paths_of_the_users_own_are_read(tmp_path):
    photo(16, 16).save(tmp_path / "mine.png")
    dataset = Dataset.from_dict({"prompt": ["x"], "image": [str(tmp_path / "mine.png")]})
    assert case_images(dataset[0], "a")[0].size == (16, 16)


@pytest.mark.parametrize("name", ["../x", "..", "/etc/x", "a/b", "a\0b", ".", "Ünal"])
def test_the_name_of_an_annotator_stays_in_the_folder(tmp_path, name):
    file = ratings_file(tmp_path, name)
    assert file.parent == tmp_path and re.fullmatch(r"ratings-[a-z0-9_.-]+\.jsonl", file.name)


def test_a_dataset_is_not_pushed_to_a_public_repository(monkeypatch):
    class Api:
        def __init__(self, private):
            self.private, self.repo_id, self.created = private, "me/set", []

        def create_repo(self, repo_id, repo_type, private, exist_ok):
            self.created.append(private)
            return self

        def repo_info(self, repo_id, repo_type):
            return self

    monkeypatch.setattr(hub, "HfApi", lambda token: api)
    api = Api(private=True)
    assert hub.create_repository("set") == "me/set" and api.created == [True]
    api = Api(private=False)
    with pytest.raises(ValueError, match="is a public repository already.*--no-private"):
        hub.create_repository("set")
    assert hub.create_repository("set", private=False) == "me/set" and api.created == [True, False]


RANDOM = "Xq7Zr4Lw9Tb2Nc8Vf3Kd6Ms1Hp5Jg0Yt" + "Ra8Qe3Uo"  # 40 characters
SECRETS = [
    "hf_" + RANDOM, "sk-proj-" + RANDOM, "ghp_" + RANDOM, "github_pat_" + RANDOM * 2, "AKIA" + "Q3EGRT5YHBN7UJMK",
    "AIza" + RANDOM[:35], "xoxb-" + RANDOM, "npm_" + RANDOM[:36], "eyJ" + RANDOM + ".eyJ" + RANDOM + "." + RANDOM,
    "-----BEGIN RSA " + "PRIVATE KEY-----", "https://user:" + "hunter2000@example.org/x", "api_key = '" + RANDOM + "'",
    "WANDB_API_KEY=" + RANDOM, '"hub_token": "' + RANDOM + '"', "password: " + RANDOM,
]  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_each_kind_of_secret_is_seen(secret):
    find = script("find_secrets").secrets_in
    assert [line for line, _ in find(f"one\ntwo {secret} three\n")] == [2]
    assert not find(f"two {secret} three  # not a secret\n")


def test_what_is_no_secret():
    text = "hf_token sk-specific task-" + RANDOM + " hub_token=os.environ['HF_TOKEN'] password = 'open sesame'\n"
    text += "hf_" + "x" * 34 + " api_key: your_api_key_goes_right_here https://user@example.org/a:b\n"
    assert script("find_secrets").secrets_in(text) == []


def test_a_planted_secret_is_found(tmp_path):
    def scan(folder):
        command = [sys.executable, str(ROOT / ".ci" / "find_secrets.py"), str(folder)]
        return subprocess.run(command, capture_output=True, text=True)

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text("ignored\n")
    (tmp_path / "ignored").write_text(SECRETS[0])
    assert scan(tmp_path).returncode == 0
    (tmp_path / "weights.bin").write_bytes(b"\0\1\xff" + SECRETS[0].encode() + b"\0")
    done = scan(tmp_path)
    assert done.returncode == 1 and "weights.bin, line 1: token of Hugging Face" in done.stdout
    assert RANDOM not in done.stdout + done.stderr
    if (ROOT / ".git").exists():
        assert scan(ROOT).stdout == ""


def test_an_audit_without_a_network_does_not_fail(monkeypatch, capsys):
    audit = script("audit")
    answers: list[str] = []

    def run(*args, **kwargs):
        return subprocess.CompletedProcess(args, 1, answers[-1], "")

    monkeypatch.setattr(audit.subprocess, "run", run)
    answers.append("Traceback ...")
    audit.main()
    assert "No package was audited" in capsys.readouterr().out
    packages = [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}]
    answers.append(json.dumps({"dependencies": packages}))
    audit.main()
    assert "1 of 2 packages were audited" in capsys.readouterr().out
    packages[0]["vulns"] = [{"id": "CVE-1", "fix_versions": []}]
    answers.append(json.dumps({"dependencies": packages}))
    audit.main()
    assert "a 1: CVE-1; there is no mended version yet" in capsys.readouterr().out
    packages[0]["vulns"][0]["fix_versions"] = ["1.1"]
    answers.append(json.dumps({"dependencies": packages}))
    with pytest.raises(SystemExit):
        audit.main()
    assert "a 1: CVE-1; install 1.1" in capsys.readouterr().out
