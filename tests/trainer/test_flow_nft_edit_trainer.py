import copy

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback

from hp_edit_trl import FlowNFTEditConfig, FlowNFTEditTrainer
from hp_edit_trl.flow.preference import draw_sigma
from hp_edit_trl.miniature.tiny import tiny_pipeline
from hp_edit_trl.policies import rollout
from hp_edit_trl.trainer.adapter_copy import average_decay
from hp_edit_trl.utils.seeding import seeded_generator
from tests.helpers import make_cases, make_config, redness
from tests.processes import Script


LORA = LoraConfig(r=4, lora_alpha=8)


def make_nft_config(folder, **options):
    defaults = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1, steps_per_generation=2,
                    old_decay_rate=0.1, old_decay_max=0.25)  # fmt: skip
    return make_config(folder, FlowNFTEditConfig, **{**defaults, **options})


def make_trainer(folder, reward=redness, cases=None, pipeline=None, **options):
    args = make_nft_config(folder, **options)
    lora = copy.deepcopy(LORA)
    return FlowNFTEditTrainer(pipeline or tiny_pipeline(), reward, args, cases or make_cases(), peft_config=lora)


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


class History(TrainerCallback):
    """Records weights and copies after each update."""

    def __init__(self, trainer):
        self.trainer, self.updates = trainer, []

    def on_step_end(self, *args, **kwargs):
        copies = {name: {n: w.clone() for n, w in one.weights.items()} for name, one in self.trainer._copies.items()}
        self.updates.append((weights_of(self.trainer), copies))


SAVING = dict(max_steps=4, save_strategy="steps", save_steps=1, ema_decay=0.4, num_sample_edits=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two generation batches, two updates from each, with a checkpoint after each update."""
    folder = tmp_path_factory.mktemp("nft")
    tiny_pipeline().save_pretrained(folder / "base")
    trainer = make_trainer(folder / "out", pipeline=str(folder / "base"), **SAVING)
    trainer.before, history = weights_of(trainer), History(trainer)
    trainer.add_callback(history)
    trainer.train()
    trainer.save_model()
    return trainer, history.updates, folder


def test_train(trained):
    trainer, updates, folder = trained
    assert [name for name, weight in updates[-1][0].items() if torch.equal(weight, trainer.before[name])] == []
    first, second = trainer.state.log_history[:2]
    log = first | second  # of the first generation batch
    for name in ("reward", "rewards/redness/std", "frac_reward_zero_std", "kl", "old_deviation", "old_decay",
                 "images_per_second", "time/rollout", "time/train"):  # fmt: skip
        assert isinstance(log[name], float), name
    assert first["old_deviation"] == 0 < second["old_deviation"]  # in the first update both are the same
    card = (folder / "out" / "README.md").read_text()
    for text in ("DiffusionNFT", "2509.16117", "`num_train_sigmas`", "`ema_decay`", "diffusion-nft", "load_lora_weig"):
        assert text in card, text
    assert "`true_cfg_scale` | 1.0" in card  # although the pipeline's default is 4


def test_the_copies_follow_as_they_should(trained):
    trainer, updates, _ = trained
    average, old = ({name: w.double() for name, w in trainer.before.items()} for _ in range(2))
    for update, (weights, copies) in enumerate(updates, 1):
        decay = min(0.4, (1 + update) / (10 + update))
        average = {name: decay * w + (1 - decay) * weights[name].double() for name, w in average.items()}
        if update % 2 == 0:  # the generation batch is done
            decay = min(0.1 * update, 0.25)
            old = {name: decay * w + (1 - decay) * weights[name].double() for name, w in old.items()}
        for name in weights:
            torch.testing.assert_close(copies["ema"][name].double(), average[name], rtol=0, atol=1e-7)
            torch.testing.assert_close(copies["old"][name].double(), old[name], rtol=0, atol=1e-7)
    assert average_decay(0.99, 10) == 11 / 20 and average_decay(0.99, 10**6) == 0.99


@pytest.mark.parametrize("step", [2, 3], ids=["between two generation batches", "inside of one"])
def test_it_resumes_exactly(trained, tmp_path, step):
    _, updates, folder = trained
    resumed = make_trainer(tmp_path, pipeline=str(folder / "base"), **{**SAVING, "save_strategy": "no"})
    history = History(resumed)
    resumed.add_callback(history)
    resumed.train(resume_from_checkpoint=str(folder / "out" / f"checkpoint-{step}"))
    assert len(history.updates) == 4 - step
    for (weights, copies), (again, copies_again) in zip(updates[step:], history.updates, strict=True):
        assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
        for kind in ("ema", "old"):
            assert all(torch.equal(weight, copies_again[kind][name]) for name, weight in copies[kind].items())


def test_a_checkpoint_needs_the_copies_of_its_run(trained, tmp_path):
    _, _, folder = trained
    other = make_trainer(tmp_path, **{**SAVING, "ema_decay": None})
    with pytest.raises(ValueError, match=r"other copies of the adapter: \['old', 'trained'\] and not \['old'\]"):
        other.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))


def test_the_average_is_evaluated_and_saved(trained, monkeypatch):
    trainer, updates, folder = trained
    average = trainer._copies["ema"].weights
    assert all(torch.equal(weight, average[name]) for name, weight in updates[-1][1]["ema"].items())
    for place in (folder / "out", folder / "out" / "checkpoint-4"):
        pipeline = QwenImageEditPlusPipeline.from_pretrained(folder / "base")
        peft = PeftModel.from_pretrained(copy.deepcopy(pipeline.transformer), str(place))
        found = {name: p for name, p in peft.named_parameters() if "lora_" in name}
        assert all(torch.equal(found[name], weight) for name, weight in average.items())
        pipeline.load_lora_weights(str(place))
        found = {f"base_model.model.{n}".replace("default_0", "default"): p
                 for n, p in pipeline.transformer.named_parameters()}  # fmt: skip
        assert all(torch.equal(found[name], weight) for name, weight in average.items())
    # An evaluation, too: as if the average were trained
    expected = trainer.evaluate(make_cases(2))["eval_reward"]
    monkeypatch.setitem(trainer.__dict__, "_copies", {"old": trainer._copies["old"]})
    raw = trainer.evaluate(make_cases(2))["eval_reward"]
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            monkeypatch.setattr(parameter, "data", average[name])
    assert trainer.evaluate(make_cases(2))["eval_reward"] == expected != raw


def test_edits_are_sampled_by_the_old_policy_along_the_ode(trained):
    trainer, _, _ = trained
    trainer._passes, trained_weights = None, weights_of(trainer)  # sampling makes none with gradients
    samples = trainer._generate_and_score([0] * 4 + [1] * 4, 5)
    assert all(torch.equal(weight, trained_weights[name]) for name, weight in weights_of(trainer).items())
    sample = samples[6]
    assert (sample.case_id, sample.group, sample.number) == ("case-1", 1, 2)
    assert not sample.trajectory.latents.numel() and not sample.trajectory.log_probs.numel()
    finals = {}
    for kind in ("old", "ema"):
        with trainer._copies[kind].applied():
            generator = seeded_generator(trainer.args.seed, "rollout", 5, "case-1", 1, 2)
            (path,) = rollout(trainer.policy, trainer.model, [sample.conditions], [generator], batch_size=1,
                              num_inference_steps=4, true_cfg_scale=1.0)  # fmt: skip
            finals[kind] = path.final
    torch.testing.assert_close(sample.trajectory.final, finals["old"], rtol=0, atol=1e-5)
    assert (finals["old"] - finals["ema"]).abs().max() > 1e-3


@pytest.mark.parametrize("loss_type", ["nft", "awm"])
def test_the_gradient_is_that_of_the_papers_loss(tmp_path, loss_type):
    # Against a loss written in one piece, sample by sample, for a batch of mixed sizes. The last group is flat.
    def reward(completions, id, **kwargs):
        return [1.0 if case == "case-2" else r for case, r in zip(id, redness(completions), strict=True)]

    options = {"beta": 0.3, "loss_type": loss_type, f"{loss_type}_beta": 0.5, "adv_clip_max": 1.2, "max_steps": 1,
               "num_train_sigmas": 3, "steps_per_generation": 3, "shuffle_dataset": False}  # fmt: skip
    trainer = make_trainer(tmp_path, reward, cases=make_cases(3), **options)
    trainer.train()
    samples, parameters = trainer._buffered_samples, [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(samples) == 12 and len({sample.conditions.bucket for sample in samples}) == 2
    trainer.model.zero_grad()
    trainer._step, trainer.current_gradient_accumulation_steps = 3, 2  # the second generation batch
    loss = trainer._accumulate_gradients(trainer.model, samples)
    gradients = [p.grad.clone() for p in parameters]

    terms = []
    for sample in samples:
        if sample.advantage == 0:
            assert sample.case_id == "case-2"
            continue
        generator = seeded_generator(42, "forward", 1, 0, sample.case_id, sample.group, sample.number)
        x0, batch = sample.trajectory.final, trainer.policy.collate([sample.conditions])
        r = 0.5 + 0.5 * max(-1.0, min(1.0, sample.advantage / 1.2))
        for _ in range(3):
            sigma = draw_sigma(sample.trajectory.sigmas, "uniform", generator)
            noise = torch.randn(x0.shape, generator=generator)
            noisy = (1 - sigma) * x0 + sigma * noise

            def velocity(noisy=noisy, sigma=sigma, batch=batch):
                return trainer.policy.velocity(trainer.model, noisy[None], sigma, batch, 1.0)[0]

            with torch.no_grad(), trainer._copies["old"].applied():
                old = velocity()
            with torch.no_grad(), trainer.model.disable_adapter():
                reference = velocity()
            new = velocity()
            term = 0.3 * (new - reference).square().mean()
            if loss_type == "awm":
                errors = [(one - noise + x0).square().mean() for one in (old, new)]
                ratio = torch.exp(4 * sigma * (errors[0] ** 0.25 - errors[1] ** 0.25))
                term = term - 1.2 * (2 * r - 1) * ratio + 1.2 * 0.5 * (new - old).square().mean()
            else:
                for share, implicit in ((r, 0.5 * old + 0.5 * new), (1 - r, 1.5 * old - 0.5 * new)):
                    error = noisy - sigma * implicit - x0
                    term = term + 1.2 / 0.5 * share * error.square().mean() / error.abs().mean().detach()
            terms.append(term)
    assert any(abs(sample.advantage) > 1.2 for sample in samples)  # the clip is at work
    expected = torch.stack(terms).sum() / (12 * 3 * 2)
    trainer.model.zero_grad()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for gradient, parameter in zip(gradients, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)


def run_with_a_flat_group(folder, per_device):
    """Two updates, and what they come to. There is nothing to learn from the group of the second process."""

    def reward(completions, **kwargs):
        accelerator = trainer.accelerator
        flat = [place > 3 if accelerator.num_processes == 1 else accelerator.process_index == 1 for place in range(8)]
        return [1.0 if is_flat else r for is_flat, r in zip(flat, redness(completions), strict=False)]

    # Adam turns rounding into whole steps where a gradient is nearly zero; SGD does not.
    trainer = make_trainer(
        folder, reward, cases=make_cases(4), max_steps=2, optim="sgd", learning_rate=20.0, max_grad_norm=0.0,
        per_device_train_batch_size=per_device, gradient_accumulation_steps=2, ema_decay=0.5, ddp_timeout=60,
    )  # fmt: skip
    passes = []
    trainer.policy.pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["hidden_states"]) * module.training), with_kwargs=True
    )
    trainer.train()
    copies = {name: dict(one.weights) for name, one in trainer._copies.items()}
    return {"trained": weights_of(trainer), **copies}, sum(passes), trainer.accelerator.process_index


PROCESSES = """
import sys, torch
torch.set_num_threads(1)
from tests.trainer.test_flow_nft_edit_trainer import run_with_a_flat_group
weights, passes, rank = run_with_a_flat_group(sys.argv[1], 2)
torch.save((weights, passes), f"{sys.argv[1]}/result_{rank}.pt")
"""


def test_two_processes_give_the_update_of_one_though_one_has_nothing_to_learn(tmp_path):
    (tmp_path / "script.py").write_text(PROCESSES)
    script = Script(tmp_path / "script.py", tmp_path, processes=2)
    start = weights_of(make_trainer(tmp_path))
    one, _, _ = run_with_a_flat_group(tmp_path / "one", 4)
    done = script.wait()
    assert done.returncode == 0, done.stderr[-4000:]
    (first, passes), (second, idle_passes) = (torch.load(tmp_path / f"result_{rank}.pt") for rank in range(2))
    assert max((weight - start[name]).abs().max() for name, weight in one["trained"].items()) > 1e-3
    for kind, weights in one.items():
        for name, weight in weights.items():
            torch.testing.assert_close(first[kind][name], weight, rtol=1e-3, atol=1e-6, msg=f"{kind} {name}")
            assert torch.equal(first[kind][name], second[kind][name])
    # 2 updates of 4 edits at 2 levels: of the trained, the old and the reference policy. One idle pass for an update.
    assert (passes, idle_passes) == (2 * 4 * 2 * 3, 2 * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss_type="amw"), r"loss_type='amw' is not known: use one of \['nft', 'awm'\]"),
        (dict(loss_type="awm", nft_beta=1.0), "nft_beta=1.0 belongs to loss_type='nft' and means nothing with loss_t"),
        (dict(awm_beta=1.0), "awm_beta=1.0 belongs to loss_type='awm'"),
        (dict(loss_type="awm", awm_beta=0.0), "awm_beta=0.0 must be above 0"),
        (dict(nft_beta=0.0), "nft_beta=0.0 must be above 0"),
        (dict(nft_beta=float("nan")), "nft_beta=nan must be above 0"),
        (dict(adv_clip_max=-1.0), "adv_clip_max=-1.0 must be above 0"),
        (dict(num_train_sigmas=0), "num_train_sigmas=0 must be at least 1"),
        (dict(old_decay_rate=-0.1), "old_decay_rate=-0.1 must not be negative"),
        (dict(old_decay_max=1.0), "old_decay_max=1.0 must be at least 0 and below 1"),
        (dict(beta=-1.0), "beta=-1.0 must not be negative"),
        (dict(gradient_accumulation_steps=4), "steps_per_generation=2 .* must be divisible by gradient_accumulation"),
        (dict(num_generations=1), "num_generations=1 must be at least 2"),
        (dict(num_inference_steps=0), "num_inference_steps=0 must be at least 1"),
        (dict(ema_decay=1.0), "ema_decay=1.0 must be above 0 and below 1"),
        (dict(ema_decay=float("nan")), "ema_decay=nan must be above 0"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_nft_config(tmp_path, **options)


def test_awm_is_named_in_the_card(tmp_path):
    trainer = make_trainer(tmp_path, loss_type="awm", num_sample_edits=0)
    assert (trainer.args.nft_beta, trainer.args.awm_beta) == (None, 1.0)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    for text in ("Advantage Weighted Matching", "2509.25050", "`awm_beta`", "advantage-weighted-matching"):
        assert text in card, text
    assert "DiffusionNFT" not in card


@pytest.mark.parametrize("option", ["true_cfg_scale", "sde_window_size", "epsilon"])
def test_options_that_mean_nothing_here_are_refused(tmp_path, option):
    with pytest.raises(TypeError, match=option):
        FlowNFTEditConfig(str(tmp_path), **{option: 1})


def test_weights_that_are_not_finite_are_neither_saved_nor_trained_on(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, ema_decay=0.5)
    next(iter(trainer._copies["ema"].weights.values())).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite at step 0: the LoRA is not saved"):
        trainer.save_model()
    assert not list(tmp_path.glob("*.safetensors"))
    start = weights_of(trainer)
    samples = trainer._generate_and_score([0] * 4 + [1] * 4, 0)
    trainer._generate_and_score = lambda *_: samples
    trainer._copies["old"].weights = {n: torch.full_like(w, float("nan")) for n, w in start.items()}
    trainer.train()
    assert trainer._skipped_updates == 1
    assert all(torch.equal(weight, start[name]) for name, weight in weights_of(trainer).items())
