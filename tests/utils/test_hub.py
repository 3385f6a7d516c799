"""What is said when there is no network, or a folder is mistyped."""

import pytest

from hp_edit_trl.cases import load_split
from hp_edit_trl.editors import PipelineEditor
from hp_edit_trl.judges import load_judge
from hp_edit_trl.lora_formats import lora_file
from hp_edit_trl.policies import policy_class
from hp_edit_trl.rewards import AestheticReward, IdentityReward, load_scorer_prompts
from hp_edit_trl.utils.hub import check_reachable
from tests.processes import Script


LOADERS = {
    "model": policy_class,
    "editor": lambda name: PipelineEditor(name).check(),
    "judge": load_judge,
    "prompts": load_scorer_prompts,
    "lora": lora_file,
    "identity": lambda name: IdentityReward(name).load(),
    "aesthetic": lambda name: AestheticReward(name).load(),
    "dataset": load_split,
}


@pytest.mark.parametrize("what", LOADERS)
def test_without_the_hub_one_sentence_names_what_is_missing(what):
    kind = "dataset" if what == "dataset" else "model"
    with pytest.raises(ConnectionError) as raised:
        LOADERS[what]("someone/nothing")
    message = str(raised.value)
    assert message.startswith(f"The {kind} 'someone/nothing' is neither a local file or folder nor in the cache")
    assert "HF_HUB_OFFLINE is set" in message
    option = " --repo-type dataset" if what == "dataset" else ""
    assert message.endswith(f"fill the cache before: `hf download someone/nothing{option}`.")


@pytest.mark.parametrize("what", LOADERS)
@pytest.mark.parametrize("name", ["./my-modle", "../my-modle", "/nowhere/my-modle", "~/my-modle", "runs/my/modle"])
def test_a_mistyped_folder_is_no_question_for_the_hub(what, name):
    with pytest.raises(FileNotFoundError, match=f"There is no file or folder /.*my.modle: correct '{name}'"):
        LOADERS[what](name)


def test_a_hub_that_does_not_answer_is_asked_once():
    code = "from hp_edit_trl.policies import policy_class; policy_class('someone/nothing')"
    done = Script("-c", code, environment={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}).wait()
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0 and last.startswith("ConnectionError: The model 'someone/nothing' is neither")
    assert "Connection refused" in last and "Retrying" not in done.stderr


def test_what_is_here_is_not_asked_for(tmp_path, monkeypatch):
    check_reachable(str(tmp_path))
    (tmp_path / "models--someone--editor" / "snapshots").mkdir(parents=True)
    check_reachable("someone/editor", cache_dir=tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "someone___real_pref").mkdir()
    check_reachable("someone/RealPref", "dataset")
