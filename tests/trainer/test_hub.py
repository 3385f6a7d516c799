"""
One tiny run with a secret planted wherever one is taken: nothing that it writes, shows or uploads holds one, and it
uploads nothing but what is meant to be. The Hub is a local one.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image

from hp_edit_trl import DPOEditConfig
from hp_edit_trl.trainer.model_card import save_before_after
from tests.fake_hub import FakeHub, fake_hub
from tests.helpers import make_config, photo
from tests.judges.test_judges import FakeServer, completion
from tests.processes import Script


# One for each place, so that a leak names it
PLANTED = {
    place: f"Pl4nted{i:02d}xQzW7{place.replace('_', '')}"
    for i, place in enumerate((
        "hub_token", "model_kwargs", "api_key", "judge_password", "env", "model_url", "sources", "command", "editor",
        "cause", "picture_url",
    ))
}  # fmt: skip

SCRIPT = """
import json, logging, sys, warnings
from pathlib import Path
from datasets import Dataset
from hp_edit_trl import FlowGRPOEditTrainer, HPScorerReward, ServerJudge
from hp_edit_trl.bench import RealPrefBench, run_benchmark, write_bench_report
from hp_edit_trl.calibration import score_dataset
from hp_edit_trl.data import mine_preference_pairs
from hp_edit_trl.data.builder import BuildConfig, Sources
from hp_edit_trl.judges import CachedJudge, load_judge
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.utils.secrets import guard_output
from tests.helpers import RuleJudge, make_cases, make_config, make_edits, redness

planted, url = json.loads(sys.argv[1]), sys.argv[2]
sys.argv = ["hp-edit", "bench", "--api_key", planted["command"], f"--token={planted['command']}"]
logging.basicConfig(level=logging.INFO)
base_url = url.replace("://", f"://me:{planted['judge_password']}@") + f"?token={planted['judge_password']}"
judge = ServerJudge("m", base_url, api_key=planted["api_key"], max_retries=0)
scorer = HPScorerReward(judge)

def attempt(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as error:
        while error is not None:
            print("caught", type(error).__name__, error)
            error = error.__cause__ or error.__context__

# Training
pipeline = tiny_pipeline()
pipeline.register_to_config(_name_or_path=f"https://me:{planted['model_url']}@host/editor?token={planted['model_url']}")
args = make_config(
    "out", save_strategy="steps", save_steps=1, report_to="tensorboard", push_to_hub=True, hub_model_id="someone/run",
    hub_strategy="every_save", hub_token=planted["hub_token"], model_init_kwargs={"token": planted["model_kwargs"]},
    log_completions=True, num_completions_to_log=4, num_completions_to_print=1, log_unique_prompts=True,
    log_completions_hub_repo="someone/edits",
)
print(args, repr(args), args.to_json_string(), args.to_sanitized_dict())
cases = make_cases(3, sizes=((160, 80),))
trainer = FlowGRPOEditTrainer(pipeline, [scorer, redness], args, cases, eval_dataset=cases.select([0, 1]))
trainer.train()
for name in ("private_before.png", "1/2_after.png", "1_before.png.bak", ".env", "model.bin"):  # the user's own
    Path("out/images", name).parent.mkdir(exist_ok=True, parents=True)
    Path("out/images", name).write_bytes(b"private")
Path("secret.png").write_bytes(b"private")
Path("out/images/7_before.png").symlink_to(Path("secret.png").absolute())
trainer.push_to_hub()
trainer._completions_upload.trigger().result()

# Mining, scoring, benchmarks, sources of a build
attempt(judge.load)
judge.load = lambda: None
attempt(mine_preference_pairs, pipeline, redness, cases, "mined", num_generations=2, min_gap=0.0,
        min_chosen_score=-9.0, resolution=64, num_inference_steps=2, score_name=None)
attempt(score_dataset, HPScorerReward(CachedJudge(judge, "cache.sqlite")), make_edits(2), "scores")

def editor(images, prompts, seeds):
    if planted["editor"] and len(images) == 1 and prompts[0].endswith("0"):
        raise RuntimeError(f"401 for https://me:{planted['editor']}@host with api_key={planted['editor']}")
    return images

run = attempt(run_benchmark, RealPrefBench(judge, cases), editor, "bench/broken")
run = attempt(run_benchmark, RealPrefBench(RuleJudge(), cases), editor, "bench/run")
write_bench_report([run], "bench/report")
source = {"webdataset": f"https://me:{planted['sources']}@127.0.0.1:9/x.tar?token={planted['sources']}"}
attempt(Sources, [source])
attempt(Sources, [{"dataset": source["webdataset"]}])
rows = Dataset.from_list([{"id": "a", "prompt": "x", "edit": f"https://127.0.0.1:9/x.png?token={planted['picture_url']}",
    "image": f"https://127.0.0.1:9/x.png?token={planted['picture_url']}", "task": "add"}])
attempt(score_dataset, HPScorerReward(RuleJudge()), rows, "scores/of-addresses")

# An error that nothing catches
guard_output()
try:
    raise KeyError(f"token={planted['cause']}")
except KeyError as error:
    raise ConnectionError(f"no judge at http://me:{planted['cause']}@host") from error
"""


@dataclass
class Outcome:
    folder: Path
    hub: FakeHub
    output: str

    def files(self) -> dict[str, bytes]:
        return {str(f.relative_to(self.folder)): f.read_bytes() for f in self.folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")

    def reply(body, count):
        if count <= 17:  # the trial, and two generation batches
            return 200, completion(str(count % 6))
        if count % 2:
            return 400, {"error": {"message": f"Incorrect API key provided: {PLANTED['api_key']}"}}
        return 200, {"no": "completion", "headers": {"Authorization": f"Bearer {PLANTED['api_key']}"}}

    server = FakeServer(reply)
    with fake_hub() as hub:
        hub.env["HF_TOKEN"] = PLANTED["hub_token"]
        planted = dict.fromkeys(("WANDB_API_KEY", "HP_EDIT_PASSWORD", "OPENAI_API_KEY"), PLANTED["env"])
        environment = {**hub.env, **planted}
        done = Script("-c", SCRIPT, json.dumps(PLANTED), server.url, cwd=folder, environment=environment).wait()
    server.shutdown()
    server.server_close()
    output = done.stdout + done.stderr
    assert "ConnectionError: no judge at http://<redacted>@host" in output, output[-5000:]
    return Outcome(folder, hub, output)


def test_nothing_that_is_written_shown_or_uploaded_holds_a_secret(outcome):
    files = outcome.files()
    expected = {"bench/run/run.json", "mined/mining.json", "scores/scores.jsonl", "cache.sqlite", "out/README.md"}
    assert expected <= files.keys() and any("tfevents" in name for name in files)
    uploaded = {
        f"{repo} {path}": file.content
        for repo, commits in outcome.hub.repos.items()
        for commit in commits
        for path, file in commit.files.items()
    }
    shown = {"output": outcome.output.encode()}
    leaks = {
        (place, name)
        for name, content in (files | uploaded | shown).items()
        for place, secret in PLANTED.items()
        if secret.encode() in content
    }
    shown_lines = [line for line in outcome.output.splitlines() if any(one in line for one in PLANTED.values())]
    assert leaks == set(), shown_lines
    run = json.loads(files["bench/run/run.json"])
    assert run["command"] == ["hp-edit", "bench", "--api_key", "<redacted>", "--token=<redacted>"]
    assert "Incorrect API key provided: <redacted>" in files["scores/scores.jsonl"].decode()


def test_only_the_allow_list_is_uploaded(outcome):
    commits = outcome.hub.commits("someone/run")
    lora = {"pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"}
    card = {"README.md", "reward_curve.png", "trainer_state.json"}
    pictures = {f"images/{i}_{name}" for i in range(2) for name in ("before.png", "after.png", "prompt.txt")}
    for commit in commits[1:-1]:
        assert lora <= commit.files.keys() <= lora | card, commit.message
    assert commits[-1].files.keys() == lora | card | pictures | {"before_after.png"}
    assert outcome.hub.private == {"models/someone/run", "datasets/someone/edits"}
    # They are all there, for this machine alone.
    local = {Path(name).name for name in outcome.files() if name.startswith("out/checkpoint-2/")}
    assert "optimizer.pt" in local and "training_args.bin" not in local


def test_completions_are_small_and_their_references_stored_once(outcome):
    files = {name: content for name, content in outcome.files().items() if name.startswith("out/completions/")}
    references = {name: content for name, content in files.items() if "/references/" in name}
    tables = [name for name in files if name.endswith(".parquet")]
    assert len(tables) == 2 and 1 <= len(references) <= 3
    rows = load_dataset("parquet", data_files=[str(outcome.folder / name) for name in tables], split="train")
    assert {f"out/completions/{name}" for name in rows["reference"]} == references.keys()
    for content in references.values():
        width, height = Image.open(io.BytesIO(content)).size
        assert width * height <= 64 * 64 and width == pytest.approx(2 * height, abs=2)
    by_step = [rows.filter(lambda row, step=step: row["step"] == step) for step in set(rows["step"])]
    assert all(len(set(some["prompt"])) == len(some) for some in by_step)
    assert outcome.output.count("Edits, step") == 2
    uploaded = outcome.hub.files("someone/edits", "dataset")
    assert {name for name in uploaded if name != "README.md"} == {
        name.removeprefix("out/completions/") for name in files
    }


@pytest.mark.parametrize("config", [make_config, DPOEditConfig])
def test_checkpoints_are_not_uploaded(config, tmp_path):
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match=f"hub_strategy='{strategy}' would upload whole checkpoints: pickled"):
            config(tmp_path, hub_strategy=strategy, bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="num_sample_edits=-1 must not be negative"):
        config(tmp_path, num_sample_edits=-1, bf16=False, use_cpu=True)
    assert config(tmp_path, bf16=False, use_cpu=True).hub_private_repo is True


def test_completions_repository_needs_completions(tmp_path):
    with pytest.raises(ValueError, match="log_completions_hub_repo='me/edits' needs log_completions=True"):
        make_config(tmp_path, log_completions_hub_repo="me/edits")


def test_pictures_of_an_earlier_run_are_removed(tmp_path):
    cases = [({"prompt": str(i)}, [photo(64, 64, i)]) for i in range(3)]
    edits = [photo(32, 32, i) for i in range(3)]
    save_before_after(tmp_path, cases, edits, edits)
    (tmp_path / "images" / "mine.png").write_bytes(b"")
    save_before_after(tmp_path, cases[:1], edits[:1], edits[:1])
    left = {file.name for file in (tmp_path / "images").iterdir()}
    assert left == {"mine.png", "0_before.png", "0_after.png", "0_prompt.txt"}
