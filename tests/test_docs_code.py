"""
Every code block of the documentation and of docstrings runs, in its page's order. What loads a full-size model or
reaches the network is a stand-in with the signature of the real thing; configurations, rewards, judges and data are
real. Every command has the options that it names. What the commands of docs/paper.md do is in test_paper.py.
"""

import ast
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import pkgutil
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import datasets
import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
import yaml
from accelerate.commands.launch import launch_command_parser

import hp_edit_trl
from docs.site.commands import parsers
from hp_edit_trl import bench, calibration, cases, data, editors, miniature, ratings, rewards, scripts
from hp_edit_trl.data import builder
from hp_edit_trl.rewards import hp_scorer
from tests.judges.test_judges import FakeServer, completion


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
URL = "http://localhost:8000/v1"
# A training that is really run is this small
SMALL = "max_steps=1, num_generations=2, per_device_train_batch_size=2, steps_per_generation=1, num_sample_edits=1"


def blocks(text: str, language: str) -> list[str]:
    found = [match for match in BLOCK.finditer(text) if match[2] == language]
    return ["\n".join(line.removeprefix(match[1]) for line in match[3].splitlines()) for match in found]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def docstring_blocks() -> dict[str, list[str]]:
    """The examples in docstrings, by what they document."""
    found = {}
    for file in sorted((ROOT / "hp_edit_trl").rglob("*.py")):
        for node in ast.walk(ast.parse(text_of(file))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                examples = blocks(ast.get_docstring(node) or "", "python")
                if examples:
                    found[node.name] = [re.sub(r"^(>>>|\.\.\.) ?", "", one, flags=re.MULTILINE) for one in examples]
    return found


CODE = {name_of(page): found for page in PAGES if (found := blocks(text_of(page), "python"))} | docstring_blocks()


STAND_INS = {
    hp_edit_trl: (
        "FlowGRPOEditTrainer", "FlowNFTEditTrainer", "DPOEditTrainer", "load_realpref", "run_benchmark",
        "mine_preference_pairs",
    ),
    data: ("load_realpref", "mine_preference_pairs"),
    bench: ("run_benchmark", "RealPrefBench"),
    editors: ("PipelineEditor",),
    builder: ("build_dataset", "ClipCategories"),
    calibration: ("compare_with_people", "agreement_tables", "read_scores", "write_agreement", "PromptRefiner"),
    cases: ("load_edits",),
    rewards: ("EditScoreReward", "IdentityReward", "Gate"),
    miniature: ("evaluate_before_after",),
    huggingface_hub: ("HfApi",),
}  # fmt: skip


def stand_in(real, result=None):
    """What takes the arguments of a class or function, and does nothing."""
    signature = inspect.signature(real)

    def call(*args, **kwargs):
        signature.bind(*args, **kwargs)
        return MagicMock(spec=real if inspect.isclass(real) else None) if result is None else result

    return call


@pytest.fixture(scope="module")
def server():
    server = FakeServer(lambda body, number: (200, completion("4")))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def scenes():
    return miniature.load_dataset("train", 8)


@pytest.fixture(scope="module")
def world(tmp_path_factory, server, scenes):
    """A folder with the files that pages speak of, the stand-ins, and the names that fragments take as given."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path := tmp_path_factory.mktemp("docs"))
        yield make_world(tmp_path, monkeypatch, server, scenes)


def make_world(tmp_path, monkeypatch, server, scenes):
    names = ("cup.jpg", "street.jpg", "dog.jpg", "hat.jpg", "better.png", "worse.png")
    (tmp_path / "photos").mkdir()
    for name, case in zip(names, scenes, strict=False):
        for folder in (tmp_path, tmp_path / "photos"):
            case["image"].save(folder / name)
    metadata = blocks(text_of(ROOT / "docs/quickstart.md"), "json")[0]
    (tmp_path / "photos" / "metadata.jsonl").write_text(metadata)
    for name in names[2:]:
        (tmp_path / "photos" / name).unlink()
    (tmp_path / "out" / "completions").mkdir(parents=True)
    datasets.Dataset.from_dict({"reference": ["cup.jpg"]}).to_parquet("out/completions/completions_1.parquet")
    shutil.copy("cup.jpg", "out/completions")
    shutil.copytree(ROOT / "prompts", "my-prompts")
    (tmp_path / "build.yaml").write_text(blocks(text_of(ROOT / "docs/building_a_dataset.md"), "yaml")[0])

    columns = {"source_img": scenes["image"], "instruction": scenes["prompt"]}
    anything = datasets.Dataset.from_dict(columns)
    for module in pkgutil.iter_modules(scripts.__path__, "hp_edit_trl.scripts."):
        importlib.import_module(module.name)  # what is imported first now would keep the stand-ins
    load, train = datasets.load_dataset, hp_edit_trl.FlowGRPOEditTrainer
    load_pipeline, load_judge = diffusers.DiffusionPipeline.from_pretrained, hp_edit_trl.load_judge
    for home, names in STAND_INS.items():
        for name in names:
            monkeypatch.setattr(home, name, stand_in(getattr(home, name)))
    monkeypatch.setattr(ratings, "read_ratings", stand_in(ratings.read_ratings, ([], [])))
    prompts = rewards.load_scorer_prompts()
    monkeypatch.setattr(hp_scorer, "load_scorer_prompts", stand_in(hp_scorer.load_scorer_prompts, prompts))

    # The real thing where it is small
    trainer, pipeline = hp_edit_trl.FlowGRPOEditTrainer, stand_in(load_pipeline)

    def load_dataset(path, **options):
        return load(path, **options) if path in ("imagefolder", "parquet") else anything

    def make_trainer(*arguments, args=None, **options):
        is_small = args is not None and args.max_steps == 1
        return (train if is_small else trainer)(*arguments, args=args, **options)

    def from_pretrained(path, **options):
        return (load_pipeline if Path(path).is_dir() else pipeline)(path, **options)

    def make_judge(judge, url=None, **options):
        return load_judge(judge, url or server.url, **options) if isinstance(judge, str) else judge

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hp_edit_trl, "FlowGRPOEditTrainer", make_trainer)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(hp_scorer, "load_judge", make_judge)

    judge = hp_edit_trl.ServerJudge("judge", server.url)
    picture = scenes[0]["image"]
    given = {
        "np": np, "torch": torch, "miniature": miniature, "edited": picture, "source": picture, "judge": judge,
        "model": "judge", "url": URL, "edits": MagicMock(), "ratings": MagicMock(), "images": MagicMock(),
        "my_model": MagicMock(),
        "human": [1, 2, 3, 4, 5, 4], "old_scores": [2, 1, 3, 3, 5, 5], "new_scores": [1, 2, 3, 4, 5, 5],
        "case_ids": list("abcdef"), "QwenImageEditPlusPipeline": diffusers.QwenImageEditPlusPipeline,
        "DiffusionPipeline": diffusers.DiffusionPipeline, "HfApi": huggingface_hub.HfApi, "math": math,
    }  # fmt: skip
    for home in (rewards, calibration, hp_edit_trl):
        given |= {name: getattr(home, name) for name in home.__all__}
    given |= {name: getattr(hp_edit_trl.judges, name) for name in hp_edit_trl.judges.__all__}
    return given


def missing_modules(code: str) -> list[str]:
    """The modules that some code imports and that are not installed, with the packages that they are in."""
    named = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named.add(node.module)
    whole = [name for name in named if importlib.util.find_spec(name.split(".")[0]) is None]
    return [package for name in whole for package in itertools.accumulate(name.split("."), "{}.{}".format)]


@pytest.mark.parametrize("page", CODE)
def test_every_python_block_runs(page, world, server, monkeypatch):
    from tests.policies.contract import PolicyContract
    from tests.policies.test_flux_kontext import tiny_kontext_pipeline

    given = {**world, "EditPolicy": hp_edit_trl.policies.EditPolicy, "PolicyContract": PolicyContract}
    given["tiny_kontext_pipeline"] = tiny_kontext_pipeline
    for block in CODE[page]:
        if page == "docs/other_editors.md":  # the code of other systems, in their own environments
            for name in missing_modules(block):
                monkeypatch.setitem(sys.modules, name, MagicMock())
            monkeypatch.setattr(sys, "argv", [])
            monkeypatch.setattr(sys, "path", [*sys.path])
            for kind in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
                monkeypatch.setattr(kind, "from_pretrained", MagicMock())
        code = block.replace("    ...,\n", "").replace(URL, server.url)
        code = re.sub(r'(miniature.load_dataset\("\w+"), \d+', r"\1, 4", code.replace("max_steps=40", SMALL))
        try:
            exec(compile(code, page, "exec"), given)
        except Exception as error:
            raise AssertionError(f"{page}: {error!r} in\n{block}") from error
    if page == "docs/quickstart.md":  # what its text promises
        saved = {file.name for file in Path("first-run").iterdir()}
        assert {"pytorch_lora_weights.safetensors", "README.md", "before_after.png"} <= saved


def test_folders_with_pictures_become_the_formats(world):
    pair = blocks(text_of(ROOT / "docs/dataset_formats.md"), "json")[1]
    cases.check_cases(cases.load_split("photos"), "photos")
    shutil.copytree(".", "pairs", ignore=lambda folder, names: {n for n in names if not n.endswith((".jpg", ".png"))})
    Path("pairs/metadata.jsonl").write_text(pair)
    cases.check_pairs(cases.load_split("pairs"), "pairs")
    Path("pairs/metadata.jsonl").write_text('{"images_file_names": ["cup.jpg", "better.png"], "prompt": "Mix"}')
    several = cases.load_split("pairs")
    cases.check_cases(several, "pairs")
    assert cases.max_references(several) == 2


@pytest.mark.parametrize("page", [page for page in PAGES if "```json" in text_of(page)], ids=name_of)
def test_json_blocks(page):
    for block in blocks(text_of(page), "json"):
        decoder, rest = json.JSONDecoder(), block.strip()
        while rest:
            rest = rest[decoder.raw_decode(rest)[1] :].strip()


def options_of(parser: Any) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


@pytest.fixture(scope="module")
def commands():
    return {name: parser for family in parsers().values() for name, parser in family.items()}


def test_yaml_blocks_have_known_options(commands):
    known = {option.removeprefix("--") for name in ("grpo", "nft", "dpo") for option in options_of(commands[name])}
    known |= set(builder.BuildConfig.__dataclass_fields__) | {"model_init_kwargs"}
    for page in PAGES:
        for block in blocks(text_of(page), "yaml"):
            assert set(yaml.safe_load(block)) <= known, name_of(page)


def command_lines() -> list[tuple[str, str]]:
    """Every `hp-edit ...` of the pages: in code blocks, in the heads of recipes, and in sentences."""
    found = []
    for page in [*PAGES, *sorted((ROOT / "examples" / "configs").rglob("*.yaml"))]:
        text = text_of(page)
        if page.suffix == ".yaml":
            text = re.sub(r"\\\n#", " ", text)
            parts = re.findall(r"^# *((?:hp-edit|accelerate) .*)", text, re.MULTILINE)
        else:
            parts = [block.replace("\\\n", " ") for block in blocks(text, "bash")]
            parts += [" ".join(code.split()) for code in re.findall(r"(?<!`)`(hp-edit [^`]+)`", text)]
        for line in itertools.chain.from_iterable(part.splitlines() for part in parts):
            if match := re.search(r"(?:\bhp-edit|-m hp_edit_trl\.cli|-m hp_edit_trl\.scripts\.\w+) .*", line):
                words = (
                    match[0].replace("-m hp_edit_trl.scripts.", "hp-edit ").replace("-m hp_edit_trl.cli", "hp-edit")
                )
                found.append((name_of(page), words.split(" #")[0].split("  ")[0].rstrip("' .,:;")))
    return found


def test_every_command_has_its_options(commands):
    """Names and options exist; a command of a code block that is complete is parsed as it stands."""
    launch = options_of(launch_command_parser()) | {"--accelerate_config"}
    seen = set()
    for page, line in command_lines():
        name, *words = shlex.split(line)[1:]
        if name in ("COMMAND", "...") or name.startswith("-"):
            continue
        assert name in commands, f"{page}: {line}"
        seen.add(name)
        known = options_of(commands[name]) | {"--help"}
        if name in ("grpo", "nft", "dpo", "mine-pairs", "plan"):
            known |= launch
        if name == "plan":
            known = known.union(*(options_of(commands[learner]) for learner in ("grpo", "nft", "dpo")))
        for word in words:
            if word.startswith("--"):
                option = "--" + word[2:].split("=")[0].replace("-", "_")
                assert option in known, f"{page}: {name} has no {option}: {line}"
    assert seen == set(commands)


def test_complete_commands_are_parsed(commands, capsys):
    parsed = 0
    for page in PAGES:
        for block in blocks(text_of(page), "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if line.startswith("hp-edit ") else []
                if not words or "..." in words or hasattr(commands[words[1]], "dataclass_types"):
                    continue
                try:
                    commands[words[1]].parse_args(words[2:])
                except SystemExit:
                    raise AssertionError(f"{name_of(page)}: {capsys.readouterr().err} {line}") from None
                parsed += 1
    assert parsed > 30


def test_the_reference_has_every_command_and_option(commands):
    from docs.site.commands import reference

    text = reference()
    for name, parser in commands.items():
        part = text.split(f"### `hp-edit {name}`")[1].split("\n### ")[0]
        options = {action.option_strings[0] for action in parser._actions if action.option_strings} - {"-h"}
        assert {o for o in options if f"`{o}`" not in part} <= {o for o in options if o.startswith("--no_")}, name
