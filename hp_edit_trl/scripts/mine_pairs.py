"""
Mines preference pairs for DPO: samples several edits of each case, scores them, and pairs the best with the worst.

    hp-edit mine-pairs --model_name_or_path Qwen/Qwen-Image-Edit-2509 --dataset_name someone/RealPref-50K \
        --judge_base_url http://localhost:8000/v1 --num_processes 8 --push_to_hub someone/edit-preferences

It can be stopped at any time; the same command resumes where it stopped.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi

from ..data import mine_preference_pairs
from ..lora_formats import load_lora
from ..policies import policy_class
from ..utils.distributed import in_step, patient_accelerator
from ..utils.dtypes import parse_dtype
from ..utils.hub import create_repository
from ..utils.loading import load_shared_pipeline
from ..utils.quantization import check_quantization, in_bits, quantization_config
from ..utils.secrets import guard_output
from .utils import EditScriptArguments, ScriptParser, load_cases, load_scorer, refuse_stream


@dataclass
class MiningArguments(EditScriptArguments):
    """
    Options of `hp-edit mine-pairs`, besides those of dataset and judge.

    Args:
        model_name_or_path (`str`):
            Hub id or folder of the image editor.
        model_revision (`str`, *optional*, defaults to `"main"`):
            Branch, tag or commit of its repository.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Type in which the weights are loaded.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether to quantize the editor to 4 bits (NF4) with bitsandbytes.
        load_in_8bit (`bool`, *optional*, defaults to `False`):
            Whether to quantize it to 8 bits with torchao.
        lora (`str`, *optional*):
            Hub id, folder or file of a LoRA to edit with.
        output_dir (`str`, *optional*, defaults to `"outputs/preference-pairs"`):
            Folder for the edits, their scores and the dataset of pairs.
        push_to_hub (`str`, *optional*):
            Hub repository that the dataset of pairs is pushed to.
        private (`bool`, *optional*, defaults to `True`):
            Whether that repository must be private, because the dataset holds the images of the cases.
        num_generations (`int`, *optional*, defaults to `5`):
            Number of edits per case.
        min_gap (`float`, *optional*, defaults to `1.0`):
            Smallest difference of the scores of a pair.
        min_chosen_score (`float`, *optional*, defaults to `3.0`):
            Lowest score of a chosen edit.
        resolution (`int`, *optional*, defaults to `512`):
            Side in pixels of the square whose area every edit has.
        num_inference_steps (`int`, *optional*):
            Number of denoising steps. Defaults to the pipeline's.
        true_cfg_scale (`float`, *optional*):
            Scale of classifier-free guidance. Defaults to the pipeline's.
        guidance_scale (`float`, *optional*):
            Guidance that the transformer takes as an input. Defaults to the pipeline's.
        rollout_batch_size (`int`, *optional*, defaults to `4`):
            Largest number of edits that are denoised together.
        cases_per_round (`int`, *optional*, defaults to `8`):
            Number of cases whose edits are scored together.
        on_bad_case (`str`, *optional*, defaults to `"skip"`):
            What to do with a case that cannot be used: `"skip"` leaves it out, `"error"` stops.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Whether to keep the text encoder and the VAE in CPU memory while they are not used.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the edits' noise.
    """

    # Pairs are made from scores, so there is no reward to shape.
    reward_alpha: float = field(default=2.0, init=False)
    reward_beta: float = field(default=5.0, init=False)

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of the image editor."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of its repository."})
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "Type in which the weights are loaded."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Whether to quantize the editor to 4 bits (NF4) with bitsandbytes."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Whether to quantize it to 8 bits with torchao."})
    lora: str | None = field(default=None, metadata={"help": "Hub id, folder or file of a LoRA to edit with."})
    output_dir: str = field(
        default="outputs/preference-pairs",
        metadata={"help": "Folder for the edits, their scores and the dataset of pairs."},
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Hub repository that the dataset of pairs is pushed to."}
    )
    private: bool = field(default=True, metadata={"help": "Whether that repository must be private."})
    num_generations: int = field(default=5, metadata={"help": "Number of edits per case."})
    min_gap: float = field(default=1.0, metadata={"help": "Smallest difference of the scores of a pair."})
    min_chosen_score: float = field(default=3.0, metadata={"help": "Lowest score of a chosen edit."})
    resolution: int = field(default=512, metadata={"help": "Side in pixels of the square whose area every edit has."})
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Number of denoising steps. Defaults to the pipeline's."}
    )
    true_cfg_scale: float | None = field(
        default=None, metadata={"help": "Scale of classifier-free guidance. Defaults to the pipeline's."}
    )
    guidance_scale: float | None = field(
        default=None,
        metadata={"help": "Guidance that the transformer takes as an input. Defaults to the pipeline's."},
    )
    rollout_batch_size: int = field(
        default=4, metadata={"help": "Largest number of edits that are denoised together."}
    )
    cases_per_round: int = field(default=8, metadata={"help": "Number of cases whose edits are scored together."})
    on_bad_case: Literal["error", "skip"] = field(
        default="skip", metadata={"help": "What to do with a case that cannot be used."}
    )
    offload_encoders: bool = field(
        default=False,
        metadata={"help": "Whether to keep the text encoder and the VAE in CPU memory while they are not used."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the edits' noise."})


ARGUMENTS = (MiningArguments,)


def main(args: MiningArguments) -> None:
    refuse_stream(args)
    config = in_bits(args.load_in_4bit, args.load_in_8bit)
    accelerator = patient_accelerator()
    check_quantization(config, accelerator.device)
    dataset = load_cases(args, args.dataset_train_split, args.image_root)
    scorer = load_scorer(args)
    with in_step(accelerator):
        scorer.load()  # fails before anything is sampled
        if args.push_to_hub is not None and accelerator.is_main_process:
            repo_id = create_repository(args.push_to_hub, private=args.private)
    kwargs: dict[str, Any] = {"revision": args.model_revision, "dtype": parse_dtype(args.dtype)}
    if config is not None:
        components = policy_class(args.model_name_or_path, revision=args.model_revision).quantized_components
        kwargs["quantization_config"] = quantization_config(config, components, kwargs["dtype"])
    pipeline = load_shared_pipeline(str(args.model_name_or_path), kwargs)
    if args.lora is not None:
        load_lora(pipeline, args.lora)
    pairs = mine_preference_pairs(
        pipeline,
        scorer,
        dataset,
        args.output_dir,
        num_generations=args.num_generations,
        min_gap=args.min_gap,
        min_chosen_score=args.min_chosen_score,
        resolution=args.resolution,
        num_inference_steps=args.num_inference_steps,
        true_cfg_scale=args.true_cfg_scale,
        guidance_scale=args.guidance_scale,
        batch_size=args.rollout_batch_size,
        cases_per_round=args.cases_per_round,
        on_bad_case=args.on_bad_case,
        offload_encoders=args.offload_encoders,
        seed=args.seed,
    )
    folder = Path(args.output_dir) / "dataset"
    accelerator.print(f"{len(pairs)} pairs of {len(dataset)} cases are in {folder}, with all edits and a card.")
    with in_step(accelerator):
        if args.push_to_hub is not None and accelerator.is_main_process:
            HfApi().upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                repo_type="dataset",
                allow_patterns=["README.md", "dropped.jsonl", "pairs/*.parquet", "samples/*.parquet"],
                delete_patterns=["pairs/*.parquet", "samples/*.parquet"],  # of an earlier upload
            )
    accelerator.end_training()


if __name__ == "__main__":
    parser = ScriptParser("mine-pairs", ARGUMENTS)
    options = parser.parse(sys.argv[1:])[0]
    guard_output()
    main(*parser.parse_dict(options))
