"""The command `hp-edit` itself: help, errors, versions."""

import subprocess
import sys

import pytest

from hp_edit_trl.cli import env, main
from hp_edit_trl.version import __version__


HEAVY = {"torch", "transformers", "diffusers", "datasets", "trl", "accelerate", "gradio", "numpy", "PIL"}


def told(arguments, capsys):
    """Exit status and output of a command that ends by itself."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code, capsys.readouterr()


@pytest.mark.parametrize("arguments", [["--help"], ["score", "--help"], ["--version"], ["no-such-command"]])
def test_nothing_heavy_is_imported(arguments):
    code = (
        "import sys\nfrom hp_edit_trl.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stderr.split())


def test_help_lists_every_command_by_family(capsys):
    status, printed = told(["--help"], capsys)
    assert status == 0
    titles = [line for line in printed.out.splitlines() if line.endswith(":") and line[0].isupper()]
    assert titles == [
        "Train:", "Plan a training:", "Calibrate a judge:", "Build datasets:", "Run benchmarks:", "Convert LoRAs:",
        "Environment:",
    ]  # fmt: skip
    names = ("grpo", "nft", "dpo", "plan", "mine-pairs", "score", "build-dataset", "bench", "merge-lora", "env")
    for command in (*names, "measure-agreement", "measure-preferences"):
        assert f"\n  {command} " in printed.out
    status, printed = told(["export-lora", "--help"], capsys)
    assert status == 0 and "Write a LoRA in the format of another tool." in printed.out


def test_the_version(capsys):
    assert told(["--version"], capsys)[1].out == f"hp-edit-trl {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "hp-edit: the following arguments are required: command. See hp-edit --help."),
        (["scroe"], "hp-edit: argument command: invalid choice: 'scroe'"),
        (["env", "--all"], "hp-edit: unrecognized arguments: --all. See hp-edit --help."),
        (["score"], "hp-edit score: the following arguments are required: dataset. See hp-edit score --help."),
        (["merge-lora", "a", "b", "--output-dir", "c", "--dtype", "int8"], "hp-edit merge-lora: argument --dtype: "),
    ],
)
def test_an_error_is_one_line(arguments, message, capsys):
    status, printed = told(arguments, capsys)
    assert status == 2 and printed.out == ""
    assert printed.err.startswith(message) and printed.err.count("\n") == 1


def test_an_error_of_a_command_is_one_line(tmp_path, capsys):
    status, printed = told(["check-lora", str(tmp_path)], capsys)
    assert status == f"hp-edit: {tmp_path} has no safetensors file, so it holds no LoRA."


def test_packages_that_do_not_fit_are_told_in_one_line(monkeypatch):
    def broken(args):
        raise RuntimeError("Failed to import trl.trainer.utils because of the following error:\nno such operator")

    monkeypatch.setattr(env, "_env", broken)
    with pytest.raises(SystemExit, match=r"hp-edit: a package cannot be imported \(no such operator\). `hp-edit env`"):
        main(["env"])
    monkeypatch.setattr(env, "_env", lambda args: [][0])
    with pytest.raises(IndexError):  # what is not known keeps its traceback
        main(["env"])
