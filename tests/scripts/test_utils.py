"""The options of the training commands, without any training."""

import os

import accelerate.commands.launch
import pytest
import yaml
from datasets import DatasetDict
from trl import ScriptArguments

from hp_edit_trl.cli import main
from hp_edit_trl.judges import ServerJudge
from hp_edit_trl.scripts import DatasetArguments, EditScriptArguments, dpo, grpo, load_cases, load_scorer, mine_pairs
from hp_edit_trl.scripts.utils import ScriptParser
from tests.helpers import make_cases


MODEL = ["--model_name_or_path", "someone/editor", "--dataset_name", "someone/cases"]
CPU = ["--use_cpu", "true", "--bf16", "false"]


@pytest.fixture
def runs(monkeypatch):
    """What was run in this process, and what was launched."""
    started = []
    monkeypatch.setattr(grpo, "main", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(mine_pairs, "main", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", started.append)
    return started


def written(tmp_path, **options):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(options))
    return str(file)


def test_options_of_file_and_command_line(tmp_path, runs, monkeypatch):
    monkeypatch.delenv("SOME_VARIABLE", raising=False)
    options = {"learning_rate": "1e-3", "lora_r": 8, "sde_window_range": [0, 7], "score_mode": "expected"}
    file = written(tmp_path, model_name_or_path="a/b", use_cpu=True, bf16=False, env={"SOME_VARIABLE": 3}, **options)
    main(["grpo", f"--config={file}", "--dataset-name", "c/d", "--lora_r", "16", "--output_dir", str(tmp_path)])
    ((script_args, training_args, model_args),) = runs
    assert (model_args.model_name_or_path, model_args.lora_r, model_args.dtype) == ("a/b", 16, None)
    assert (training_args.learning_rate, training_args.sde_window_range) == (1e-3, [0, 7])
    assert (script_args.dataset_name, script_args.score_mode) == ("c/d", "expected")
    assert os.environ.pop("SOME_VARIABLE") == "3"


def test_mining_loads_bfloat16_unless_told_otherwise(runs):
    main(["mine-pairs", *MODEL])
    main(["mine-pairs", *MODEL, "--dtype", "float32", "--num_generations", "3"])
    assert [(args.dtype, args.num_generations) for (args,) in runs] == [("bfloat16", 5), ("float32", 3)]


@pytest.mark.parametrize("where", ["words", "file"])
def test_several_processes_are_launched_by_accelerate(tmp_path, runs, where):
    words = [*MODEL, *CPU, "--max_steps", "2"]
    if where == "words":
        words += ["--num-processes", "2", "--multi_gpu", "--mixed_precision=bf16"]
    else:
        file = written(tmp_path, num_processes=2, multi_gpu=True, mixed_precision="no", epsilon=1e-3)
        words += ["--config", file, "--mixed_precision", "bf16"]
    main(["grpo", *words])
    (launch,) = runs
    assert (launch.num_processes, launch.multi_gpu, launch.mixed_precision) == (2, True, "bf16")
    assert launch.module and launch.training_script == "hp_edit_trl.scripts.grpo"
    # The script gets the whole command line, and leaves the options of accelerate alone.
    assert launch.training_script_args == [word.replace("--num-", "--num_") for word in words]
    # An accelerate config does not overwrite what the recipe or the command line says.
    assert {"num_processes", "multi_gpu"} <= launch.nondefault


def test_a_recipe_by_its_name():
    parser = ScriptParser("grpo", grpo.ARGUMENTS)
    options, launch = parser.parse(["--config", "qwen_image_edit_2509", "--dataset_name", "x"])
    assert options["model_name_or_path"] == "Qwen/Qwen-Image-Edit-2509" and options["same_latent"] and launch is None


def test_an_accelerate_config_by_name_and_by_file(tmp_path, runs):
    main(["grpo", *MODEL, "--accelerate_config", "zero2"])
    file = written(tmp_path, num_processes=4)
    main(["mine-pairs", *MODEL, "--accelerate_config", file])
    main(["grpo", *MODEL, "--config", written(tmp_path, accelerate_config="multi_gpu")])
    assert runs[0].config_file.endswith("accelerate_configs/zero2.yaml")
    assert runs[1].config_file == file and runs[1].training_script == "hp_edit_trl.scripts.mine_pairs"
    assert runs[2].config_file.endswith("accelerate_configs/multi_gpu.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "hp-edit grpo: --model_name_or_path is needed: the Hub id or folder of an image editor.\n"),
        (MODEL[:2], "hp-edit grpo: --dataset_name is needed: the Hub id or folder of a dataset.\n"),
        ([*MODEL, "--learning_rat", "1"], "hp-edit grpo: unrecognized arguments: --learning_rat\n"),
        ([*MODEL, "stray"], "hp-edit grpo: unrecognized arguments: stray\n"),
        ([*MODEL, "--lora_r", "many"], "hp-edit grpo: argument --lora_r/--lora-r: invalid int value: 'many'\n"),
        ([*MODEL, "--num_processes", "two"], "hp-edit grpo: argument --num_processes/--num-processes: invalid int"),
        ([*MODEL, "--config", "nowhere.yaml"], "hp-edit grpo: --config nowhere.yaml is neither a file nor one of "),
        ([*MODEL, "--accelerate_config", "zero9"], "hp-edit grpo: --accelerate_config zero9 is neither a file nor "),
        ([*MODEL, "--config"], "hp-edit grpo: argument --config: expected one argument\n"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_line(words, message, runs, capsys):
    with pytest.raises(SystemExit) as end:
        main(["grpo", *words])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(message) and error.count("\n") == 1 and not runs


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "--config: there is no option learning_rat."),
        ("- a\n- b", "must hold options, one per line"),
        ("a: [", "cannot be read: while parsing"),
        ("env: 3", "`env` must hold environment variables"),
    ],
)
def test_a_wrong_file_is_one_line(content, message, tmp_path, runs, capsys):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(SystemExit):
        main(["grpo", *MODEL, "--config", str(tmp_path / "recipe.yaml")])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not runs


def test_options_of_language_models(runs):
    with pytest.raises(SystemExit, match="hp-edit: attn_implementation is not supported for image editors"):
        main(["grpo", *MODEL, *CPU, "--attn_implementation", "eager"])


@pytest.mark.parametrize("command", ["grpo", "dpo"])
def test_a_quantization_that_the_machine_lacks_is_one_line(command):
    # Before the dataset is looked for
    with pytest.raises(SystemExit, match=r"hp-edit: quant_backend='bitsandbytes_4bit' \(load_in_4bit\) needs a GPU"):
        main([command, *MODEL, *CPU, "--load_in_4bit", "true"])


def test_help_shows_all_options(capsys):
    for command, options in (
        ("grpo", ("--judge_base_url", "--sde_window_size", "--lora_r", "--num_processes", "--config")),
        ("dpo", ("--sigma_sampling", "--dataset_train_split", "--dtype")),
        ("mine-pairs", ("--min_chosen_score", "--push_to_hub", "--judge")),
    ):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        printed = capsys.readouterr().out
        assert end.value.code == 0 and all(option in printed for option in options), command
    assert "--reward_alpha" not in printed  # pairs have no reward


def test_the_judge_of_the_options():
    options = {"score_mode": "expected", "judge_timeout": 5.0, "judge_max_concurrency": 2, "judge_revision": "v1"}
    args = EditScriptArguments(
        judge="m", judge_base_url="http://127.0.0.1:9/v1", scorer_task="base", reward_alpha=1.0, **options
    )
    with pytest.raises(ValueError, match="max_concurrency=0 must be at least 1"):
        load_scorer(EditScriptArguments(judge_base_url="http://127.0.0.1:9/v1", judge_max_concurrency=0))
    scorer = load_scorer(args)
    assert isinstance(scorer.judge, ServerJudge) and scorer.judge.identity["score_mode"] == "expected"
    assert scorer.judge.identity["revision"] == "v1" and scorer.judge.max_concurrency == 2
    assert (scorer.task, scorer.alpha, scorer.beta) == ("base", 1.0, 5.0)


def test_several_servers_of_the_judge_in_a_file_or_on_the_command_line(tmp_path, runs):
    listed = ["http://a:8000/v1", "http://b:8000/v1"]
    main(["grpo", *MODEL, *CPU, "--config", written(tmp_path, judge_base_url=listed)])
    main(["grpo", *MODEL, *CPU, "--judge_base_url", ",".join(listed)])
    main(["mine-pairs", *MODEL, "--judge_base_url", ", ".join(listed)])
    for arguments in runs:
        servers = load_scorer(arguments[0]).judge._servers
        assert [server.name for server in servers] == ["a:8000/v1", "b:8000/v1"]


def test_only_online_training_reads_streams(monkeypatch):
    streams = lambda kind: kind(dataset_name="a/b", dataset_streaming=True)  # noqa: E731
    for command in (
        lambda: dpo.main(streams(DatasetArguments), None, None),
        lambda: mine_pairs.main(streams(mine_pairs.MiningArguments)),
    ):
        with pytest.raises(ValueError, match="dataset_streaming is for grpo and nft"):
            command()


def test_datasets_of_a_folder(tmp_path):
    cases = make_cases(4)
    DatasetDict(train=cases, test=cases.select([0])).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    args = ScriptArguments(dataset_name=str(tmp_path / "saved"))
    assert len(load_cases(args, "train")) == 4 and len(load_cases(args, "test")) == 1
    with pytest.raises(ValueError, match="has no split 'validation'"):
        load_cases(args, "validation")
    cases.to_parquet(tmp_path / "files" / "train-0.parquet")
    for streaming in (False, True):
        args = ScriptArguments(dataset_name=str(tmp_path / "files"), dataset_streaming=streaming)
        with pytest.raises(ValueError, match=r"has no split 'test'; its splits are \['train'\].*--dataset_test_split"):
            load_cases(args, "test")
    # One of RealPref's schema is checked row by row, and gets the columns that it lacks.
    for version, folder in ((1, "realpref"), (99, "newer")):
        cases.add_column("schema_version", [version] * 4).save_to_disk(tmp_path / folder)
    realpref = load_cases(ScriptArguments(dataset_name=str(tmp_path / "realpref")), "train")
    assert "requirement" in realpref.column_names and realpref["id"][:] == cases["id"][:]
    with pytest.raises(ValueError, match="99 was written by a newer hp-edit-trl"):
        load_cases(ScriptArguments(dataset_name=str(tmp_path / "newer")), "train")
