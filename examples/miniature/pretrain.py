"""
Pretrains the miniature's policy: `python examples/miniature/pretrain.py`.

There are seven stages. Each can be stopped at any time, and the same command resumes where it stopped:

1. `vae`: encoder and decoder learn the world's pictures together; 2. `decoder`: the decoder is trained further with a
frozen encoder, which does not change the latents; 3. `transformer`: the transformer learns the world's edits by flow
matching. A share of the targets is deliberately sloppy,
   which leaves reinforcement learning something to improve;
4. `polish`: a second course of the same with a lower learning rate and fewer sloppy targets;
5. `refine`: a third on four times as many cases, with Muon in the place of AdamW;
6. `careless`: a short one with more sloppy targets, so that reinforcement learning has more to improve;
7. `export`: the pipeline is saved.

The second and the third can run at the same time (`--stages decoder --threads 1` and `--stages transformer --threads
1`).
"""

import argparse
import functools
import hashlib
import itertools
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from diffusers.models.autoencoders import autoencoder_kl_qwenimage
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from hp_edit_trl.editors import PolicyEditor
from hp_edit_trl.miniature.scorers import RuleScorer
from hp_edit_trl.miniature.tiny import assemble, tiny_text_encoder, tiny_tokenizer
from hp_edit_trl.miniature.world import SIZE, Case, blur, draw_case, stream, to_image
from hp_edit_trl.policies import EditConditions
from hp_edit_trl.policies.qwen_image_edit import QwenImageEditPlusPolicy
from hp_edit_trl.tasks import TASKS
from hp_edit_trl.utils.files import append_jsonl, write_atomically, write_json
from hp_edit_trl.utils.seeding import seeded_generator


VAE_BATCH = 32
TRANSFORMER_BATCH = 64
NUM_INFERENCE_STEPS = 5
EVALUATION_CASES = 400
SHARD = 1_000  # cases that are encoded at a time
SAVE_EVERY = 500  # steps
VAE_CASES = 8_000  # cases whose pictures the VAE is trained on


@dataclass(frozen=True)
class Course:
    """A course of the transformer's training."""

    continued: str | None  # the course whose averaged weights it starts from
    learning_rate: float  # the highest
    sloppy_share: float  # of targets
    decay: float  # of the averaged weights
    muon: bool = False  # the optimizer of the matrices


COURSES = {
    "transformer": Course(None, 2e-3, sloppy_share=0.15, decay=0.999),
    "polish": Course("transformer", 7e-4, sloppy_share=0.10, decay=0.998),
    "refine": Course("polish", 1e-3, sloppy_share=0.20, decay=0.999, muon=True),
    "careless": Course("refine", 3e-4, sloppy_share=0.28, decay=0.99, muon=True),
}
STAGES = ["vae", "decoder", *COURSES, "export"]


@contextmanager
def fast_convolutions() -> Iterator[None]:
    """
    A context in which the VAE's causal convolutions take videos of one frame only, and leave out the frames of zeros
    before it: the same result in a third of the time.
    """
    convolution = autoencoder_kl_qwenimage.QwenImageCausalConv3d
    stock = convolution.forward

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        frame = F.pad(x[:, :, 0], self._padding[:4])
        return F.conv2d(frame, self.weight[:, :, -1], self.bias, self.stride[1:])[:, :, None]

    convolution.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        convolution.forward = stock  # type: ignore[method-assign]


def fit(
    name: str,
    loss_of_step: Callable[[int], torch.Tensor],
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    folder: Path,
    modules: dict[str, nn.Module],
    evaluate: Callable[[], dict],
    every: int,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """
    Trains with a one-cycle learning rate, the highest being that of each optimizer. Saves its state every SAVE_EVERY
    steps, and resumes from it.
    """
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    stateful: dict[str, Any] = dict(modules)
    for i, optimizer in enumerate(optimizers):
        schedule = OneCycleLR(
            optimizer, optimizer.defaults["lr"], total_steps=steps, pct_start=0.05, cycle_momentum=False
        )
        stateful |= {f"optimizer_{i}": optimizer, f"schedule_{i}": schedule}
    file = folder / f"{name}.pt"
    start, seconds = 0, 0.0
    if file.exists():
        state = torch.load(file)
        start, seconds = state["step"], state["seconds"]
        if state["schedule_0"]["total_steps"] != steps:
            raise ValueError(
                f"{file} belongs to a training of {state['schedule_0']['total_steps']} steps, but {steps} were "
                "requested, which changes the learning rate: request as many, or choose another output_dir."
            )
        for key, thing in stateful.items():
            thing.load_state_dict(state[key])
    losses = []
    began = time.process_time()
    for step in tqdm(range(start, steps), name, initial=start, total=steps, mininterval=5):
        loss = loss_of_step(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for i, optimizer in enumerate(optimizers):
            optimizer.step()
            stateful[f"schedule_{i}"].step()
        after_step(step)
        losses.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            now = seconds + time.process_time() - began
            row = {
                "stage": name,
                "step": step + 1,
                "cpu_seconds": round(now),
                "loss": round(float(np.mean(losses)), 5),
            }
            if (step + 1) % every == 0 or step + 1 == steps:
                row |= evaluate()
            append_jsonl(folder / "log.jsonl", [row])
            state = {key: thing.state_dict() for key, thing in stateful.items()} | {"step": step + 1, "seconds": now}
            write_atomically(file, functools.partial(torch.save, state))
            losses = []


def adamw(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)


def muon(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def new_vae() -> AutoencoderKLQwenImage:
    """The miniature's VAE: a picture of 32 by 32 pixels becomes 8 by 8 latents of 16 channels, as many as Qwen's."""
    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )


def new_transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        axes_dims_rope=(16, 8, 8),
    )


@functools.cache
def tokenizer_prompts() -> list[str]:
    return [case.prompt for case in itertools.islice(stream("train", seed=9), 2000)]


def new_pipeline(vae: AutoencoderKLQwenImage) -> QwenImageEditPlusPipeline:
    """An untrained pipeline with a given VAE. Its text encoder stays random, and still tells words apart."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(tokenizer_prompts())
    return assemble(new_transformer(), vae, tiny_text_encoder(tokenizer, hidden_size=64), tokenizer, pixels=28 * 28)


def pictures(arrays: list[np.ndarray]) -> torch.Tensor:
    """Converts float arrays in [0, 1] to a tensor of shape `(num_pictures, 3, 1, height, width)` in [-1, 1]."""
    return torch.from_numpy(np.stack(arrays).astype(np.float32)).permute(0, 3, 1, 2)[:, :, None] * 2 - 1


def sloppy(case: Case, rng: np.random.Generator) -> np.ndarray:
    """What a careless editor might make of a case: half done, with the rest spoiled, or not done at all."""
    kind = rng.integers(4)
    if kind == 0:  # a ghost, a half-way recolor, a pale style
        share = rng.uniform(0.3, 0.7)
        return share * case.reference + (1 - share) * case.target
    if kind == 1:  # a tint over the whole picture
        return np.clip(case.target * rng.uniform(0.7, 1.3, size=3), 0, 1)
    if kind == 2:  # details lost
        return blur(case.target, sigma=1.0)
    return case.reference


def mean_by_task(tasks: list[str], scores: list[float]) -> dict[str, float]:
    """Mean score over all cases (`score`) and per task, the median, and the share of scores that round to 5."""
    by_task = {task: [s for t, s in zip(tasks, scores, strict=True) if t == task] for task in TASKS}
    means = {"score": float(np.mean(scores))} | {task: float(np.mean(values)) for task, values in by_task.items()}
    means |= {"median": float(np.median(scores)), "share_of_5": float(np.mean(np.array(scores) >= 4.5))}
    return {name: round(value, 3) for name, value in means.items()}


@torch.no_grad()
def reconstruction_scores(vae: AutoencoderKLQwenImage) -> dict[str, float]:
    """Scores of the targets themselves after encoding and decoding: the best that a policy could reach."""
    cases = list(itertools.islice(stream("validation"), EVALUATION_CASES))
    wanted = pictures([case.target for case in cases])
    decoded = vae.decode(vae.encode(wanted).latent_dist.mode()).sample
    arrays = ((decoded[:, :, 0].clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    scorer = RuleScorer()
    scores = [
        scorer.score(to_image(array), to_image(case.reference), to_image(case.target))
        for case, array in zip(cases, arrays, strict=True)
    ]
    error = (decoded - wanted).abs().mean().item()
    return {"error": round(error, 5)} | mean_by_task([case.task for case in cases], scores)


def train_vae(folder: Path, steps: int, compiled: bool) -> None:
    torch.manual_seed(0)
    vae = new_vae()
    pool = pictures(
        [p for case in itertools.islice(stream("train", seed=1), VAE_CASES) for p in (case.reference, case.target)]
    )

    def reconstruct(batch: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        latents = vae.quant_conv(vae.encoder(batch))[:, : vae.config.z_dim]
        # A policy's latents differ slightly from the encoder's, so the decoder is trained with a little noise.
        noisy = latents + 0.03 * latents.detach().std() * noise
        decoded = vae.decoder(vae.post_quant_conv(noisy))
        return F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch) + 1e-4 * latents.square().mean()

    loss_of = torch.compile(reconstruct) if compiled else reconstruct

    def loss_of_step(step: int) -> torch.Tensor:
        generator = seeded_generator("vae", step)
        batch = pool[torch.randint(len(pool), (VAE_BATCH,), generator=generator)]
        return loss_of(batch, torch.randn((VAE_BATCH, 16, 1, 8, 8), generator=generator))

    fit(
        "vae", loss_of_step, [adamw(list(vae.parameters()), 2e-3)], steps, folder, {"vae": vae},
        lambda: reconstruction_scores(vae), 1000,
    )  # fmt: skip


def load_vae(folder: Path) -> AutoencoderKLQwenImage:
    """The VAE of the first stage with the statistics of its latents, and the decoder of the second if there is one."""
    vae = new_vae()
    vae.load_state_dict(torch.load(folder / "vae.pt")["vae"])
    with torch.no_grad():
        cases = itertools.islice(stream("train", seed=1), min(VAE_CASES, 1000))
        latents = vae.encode(pictures([case.target for case in cases])).latent_dist.mode()
    vae.register_to_config(
        latents_mean=[round(x, 4) for x in latents.mean((0, 2, 3, 4)).tolist()],
        latents_std=[round(x, 4) for x in latents.std((0, 2, 3, 4)).tolist()],
    )
    if (folder / "decoder.pt").exists():
        state = torch.load(folder / "decoder.pt")
        vae.decoder.load_state_dict(state["decoder"])
        vae.post_quant_conv.load_state_dict(state["post_quant_conv"])
    return vae


def train_decoder(folder: Path, steps: int, compiled: bool) -> None:
    vae = load_vae(folder)
    pool = pictures(
        [p for case in itertools.islice(stream("train", seed=1), VAE_CASES) for p in (case.reference, case.target)]
    )
    with torch.no_grad():
        latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in pool.split(500)])

    def reconstruct(batch: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        decoded = vae.decoder(vae.post_quant_conv(noisy))
        return F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch)

    loss_of = torch.compile(reconstruct) if compiled else reconstruct

    def loss_of_step(step: int) -> torch.Tensor:
        generator = seeded_generator("decoder", step)
        rows = torch.randint(len(pool), (VAE_BATCH,), generator=generator)
        noise = torch.randn((VAE_BATCH, *latents.shape[1:]), generator=generator)
        return loss_of(pool[rows], latents[rows] + 0.03 * latents.std() * noise)

    modules = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    parameters = [p for module in modules.values() for p in module.parameters()]
    fit(
        "decoder", loss_of_step, [adamw(parameters, 1.5e-3)], steps, folder, modules,
        lambda: reconstruction_scores(vae), 1000,
    )  # fmt: skip


@torch.no_grad()
@fast_convolutions()
def encode_shard(folder: Path, shard: int, size: int, encoder: str) -> Path:
    """Encodes one part of the training cases: prompts, and latents of references, targets and sloppy targets."""
    file = folder / "pool" / f"{encoder}-{size}-{shard:03d}.pt"
    if file.exists():
        return file
    policy = QwenImageEditPlusPolicy(new_pipeline(load_vae(folder)))
    indices = range(shard * size, (shard + 1) * size)
    cases = [draw_case(list(TASKS)[i % len(TASKS)], "train", 2, i) for i in indices]
    rng = np.random.default_rng(shard)
    references = [to_image(case.reference) for case in cases]
    targets = [to_image(case.target) for case in cases]
    careless = [to_image(sloppy(case, rng)) for case in cases]
    tensors = {
        "prompt_embeds": encode_texts(policy, [case.prompt for case in cases], references),
        "image_latents": encode_pictures(policy, references),
        "targets": encode_pictures(policy, targets),
        "sloppy": encode_pictures(policy, careless),
    }
    write_atomically(file, functools.partial(torch.save, tensors))
    return file


def encode_pictures(policy: QwenImageEditPlusPolicy, images: list[Image.Image]) -> torch.Tensor:
    """Packed latents of shape `(num_pictures, num_tokens, num_channels)`, as the pipeline encodes them."""
    pipeline = policy.pipeline
    pixels = torch.cat([pipeline.image_processor.preprocess(image, SIZE, SIZE) for image in images]).unsqueeze(2)
    latents = torch.cat([pipeline._encode_vae_image(batch, generator=None) for batch in pixels.split(250)])
    return pipeline._pack_latents(latents, len(images), *latents.shape[1:2], *latents.shape[3:])


def encode_texts(policy: QwenImageEditPlusPolicy, prompts: list[str], images: list[Image.Image]) -> list[torch.Tensor]:
    """Embeds prompts with one image each: the embeddings of `policy.encode`, ten times faster."""
    pipeline = policy.pipeline
    template, skipped = pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx
    embeddings = []
    for start in range(0, len(prompts), 100):
        texts = [
            template.format(f"Picture 1: <|vision_start|><|image_pad|><|vision_end|>{prompt}")
            for prompt in prompts[start : start + 100]
        ]
        shown = [pipeline.image_processor.resize(image, 384, 384) for image in images[start : start + 100]]
        inputs = pipeline.processor(text=texts, images=shown, padding=True, padding_side="right", return_tensors="pt")
        hidden = pipeline.text_encoder(**inputs, output_hidden_states=True).hidden_states[-1]
        embeddings += [h[m.bool()][skipped:] for h, m in zip(hidden, inputs["attention_mask"], strict=True)]
    expected = policy.encode([images[0]], prompts[0], None, SIZE).tensors["prompt_embeds"]
    torch.testing.assert_close(embeddings[0], expected, rtol=1e-3, atol=1e-4)
    return embeddings


@torch.no_grad()
def policy_scores(policy: QwenImageEditPlusPolicy, model: nn.Module) -> dict[str, float]:
    """Mean scores of the policy's edits of validation cases, sampled along the ODE from fixed noise."""
    cases = list(itertools.islice(stream("validation"), EVALUATION_CASES))
    references = [to_image(case.reference) for case in cases]
    editor = PolicyEditor(
        policy, "pretraining", SIZE, NUM_INFERENCE_STEPS, true_cfg_scale=1.0, batch_size=100, model=model
    )
    edits = editor(
        [[reference] for reference in references],
        [case.prompt for case in cases],
        [str(i) for i in range(len(cases))],
        [seeded_generator("evaluation", i).initial_seed() for i in range(len(cases))],
    )
    scorer = RuleScorer()
    scores = [
        scorer.score(edit, reference, to_image(case.target))
        for edit, reference, case in zip(edits, references, cases, strict=True)
    ]
    return mean_by_task([case.task for case in cases], scores)


def train_transformer(folder: Path, stage: str, steps: int, num_cases: int, compiled: bool, processes: int) -> None:
    """Trains the transformer in one of its `COURSES`, which continues the averaged weights of another, if any."""
    course = COURSES[stage]
    (folder / "pool").mkdir(exist_ok=True)
    size = min(num_cases, SHARD)
    if size < 1 or num_cases % size:
        raise ValueError(f"--cases {num_cases}: {num_cases} cases are not a multiple of {SHARD}, nor fewer.")
    numbers = range(num_cases // size)
    vae = torch.load(folder / "vae.pt")["vae"]
    encoder = hashlib.sha256(b"".join(vae[name].numpy().tobytes() for name in sorted(vae) if "decoder" not in name))
    key = encoder.hexdigest()[:8]  # latents of different encoders are not mixed
    # A plain fork would inherit torch's threads
    forkserver = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(processes, forkserver, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        shards = executor.map(
            encode_shard, itertools.repeat(folder), numbers, itertools.repeat(size), itertools.repeat(key)
        )
        parts = [torch.load(file) for file in tqdm(shards, "pool", total=len(numbers))]
    embeds = [embed for part in parts for embed in part["prompt_embeds"]]
    references, targets, careless = (
        torch.cat([p[name] for p in parts]) for name in ("image_latents", "targets", "sloppy")
    )
    policy = QwenImageEditPlusPolicy(new_pipeline(load_vae(folder)))
    transformer = policy.pipeline.transformer
    if course.continued is not None:
        transformer.load_state_dict(finished(folder, course.continued)["average"])
    average = new_transformer().eval()
    average.load_state_dict(transformer.state_dict())
    average.requires_grad_(False)
    model: nn.Module = torch.compile(transformer) if compiled else transformer  # type: ignore[assignment]
    num_tokens, num_channels = targets.shape[1:]

    def conditions(row: int) -> EditConditions:
        tensors = {"prompt_embeds": embeds[row], "image_latents": references[row]}
        return EditConditions(SIZE, SIZE, num_tokens, num_channels, ((SIZE, SIZE),), tensors)

    shift = policy.sigmas(1000, conditions(0))  # the noise levels of sampling, in fine steps

    def loss_of_step(step: int) -> torch.Tensor:
        generator = seeded_generator(stage, step)
        rows = torch.randint(len(targets), (TRANSFORMER_BATCH,), generator=generator)
        wanted = targets[rows]
        spoilt = torch.rand(TRANSFORMER_BATCH, generator=generator) < course.sloppy_share
        wanted = torch.where(spoilt[:, None, None], careless[rows], wanted)
        sigma = shift[torch.randint(1000, (TRANSFORMER_BATCH,), generator=generator)]
        noise = torch.randn(wanted.shape, generator=generator)
        level = sigma[:, None, None]
        noisy = (1 - level) * wanted + level * noise
        velocity = policy.velocity(model, noisy, sigma, policy.collate([conditions(r) for r in rows.tolist()]), 1.0)
        return F.mse_loss(velocity, noise - wanted)

    def average_weights(step: int) -> None:
        weight = max(1 - course.decay, 1 / (step + 1))
        for slow, fast in zip(average.parameters(), transformer.parameters(), strict=True):
            slow.lerp_(fast.detach(), weight)

    modules = {"transformer": transformer, "average": average}
    parameters = list(transformer.parameters())
    optimizers = [adamw(parameters, course.learning_rate)]
    if course.muon:  # it is for matrices
        matrices, others = [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]
        optimizers = [muon(matrices, course.learning_rate), adamw(others, course.learning_rate)]
    fit(
        stage, loss_of_step, optimizers, steps, folder, modules,
        lambda: policy_scores(policy, average), 1000, average_weights,
    )  # fmt: skip


def finished(folder: Path, stage: str) -> dict[str, Any]:
    """The saved state of a stage. Raises `ValueError` if the stage has not finished."""
    state = torch.load(folder / f"{stage}.pt")
    if state["step"] < state["schedule_0"]["total_steps"]:
        raise ValueError(
            f"The stage {stage!r} is at step {state['step']} of {state['schedule_0']['total_steps']}: finish it first."
        )
    return state


def export(folder: Path) -> None:
    """Saves the pipeline to `folder/pipeline`, transformer and VAE in half precision, with its log and its scores."""
    states = {stage: finished(folder, stage) for stage in STAGES if stage != "export"}
    vae = load_vae(folder)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, autoencoder_kl_qwenimage.QwenImageCausalConv3d):
                module.weight[:, :, :-1] = 0  # never trained, because pictures have one frame
    pipeline = new_pipeline(vae)
    pipeline.transformer.load_state_dict(states["careless"]["average"])
    for module in (vae, pipeline.transformer):
        module.half()
    pipeline.save_pretrained(folder / "pipeline")
    shutil.copy(folder / "log.jsonl", folder / "pipeline" / "pretraining.jsonl")
    # Scores of the saved weights, loaded as `load_pipeline` does
    loaded = QwenImageEditPlusPipeline.from_pretrained(str(folder / "pipeline"), dtype=torch.float32)
    policy = QwenImageEditPlusPolicy(loaded)
    scores = {"vae": reconstruction_scores(loaded.vae), "policy": policy_scores(policy, loaded.transformer)}
    write_json(folder / "pipeline" / "scores.json", scores)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/miniature"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--vae_steps", type=int, default=3_000)
    parser.add_argument("--decoder_steps", type=int, default=10_000)
    parser.add_argument("--transformer_steps", type=int, default=12_000)
    parser.add_argument("--polish_steps", type=int, default=5_000)
    parser.add_argument("--refine_steps", type=int, default=12_000)
    parser.add_argument("--careless_steps", type=int, default=1_500)
    parser.add_argument("--cases", type=int, default=32_000, help="cases that the transformer is trained on")
    parser.add_argument("--refine_cases", type=int, default=128_000, help="and those of its last two courses")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    with fast_convolutions():
        if "vae" in args.stages:
            train_vae(args.output_dir, args.vae_steps, args.compile)
        if "decoder" in args.stages:
            train_decoder(args.output_dir, args.decoder_steps, args.compile)
        for stage, steps, cases in (
            ("transformer", args.transformer_steps, args.cases),
            ("polish", args.polish_steps, args.cases),
            ("refine", args.refine_steps, args.refine_cases),
            ("careless", args.careless_steps, args.refine_cases),
        ):
            if stage in args.stages:
                train_transformer(args.output_dir, stage, steps, cases, args.compile, args.threads)
        if "export" in args.stages:
            export(args.output_dir)
