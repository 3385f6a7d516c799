"""What the trainers have in common and no algorithm is part of: reading, sampling, saving, sharing."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from PIL import Image
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import use_adapter

from ..cases import case_images
from ..policies import EditConditions, EditPolicy, decode, rollout
from ..utils.images import UnreadableImageError
from ..utils.seeding import seeded_generator
from .lora import save_lora
from .model_card import save_pictures, write_model_card


logger = get_logger(__name__)


def load_policy(policy_type: type[EditPolicy], model: str | DiffusionPipeline, args: Any) -> tuple[EditPolicy, str]:
    """
    The policy of a pipeline, which is loaded if `model` is not one yet, and the name of its base model.

    Args:
        policy_type (`type[EditPolicy]`):
            The policy's class, see [`~hp_edit_trl.policies.policy_class`].
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The editor: a Hub id, a local folder, or a loaded pipeline.
        args ([`FlowGRPOEditConfig`] or [`DPOEditConfig`]):
            The trainer's configuration. Where it leaves guidance and negative prompt to the policy, they are filled in.

    Raises:
        `ValueError`: If a kind of guidance is asked for that the pipeline does not have.
    """
    if isinstance(model, str):
        init_kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})
        dtype = init_kwargs.pop("torch_dtype", None) or init_kwargs.get("dtype")
        if dtype is None:
            dtype = torch.bfloat16 if args.bf16 else torch.float32
        # From YAML or the command line it is a name.
        init_kwargs["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        pipeline = DiffusionPipeline.from_pretrained(model, **init_kwargs)
        base_model = model
    else:
        pipeline = model
        base_model = str(model.config.get("_name_or_path") or "base-model")  # it may have been loaded from a Path
    policy = policy_type(pipeline, args.offload_encoders)
    if args.guidance_scale is not None:
        if policy.guidance_scale is None:
            raise ValueError(
                f"guidance_scale={args.guidance_scale}, but the transformer of this {type(pipeline).__name__} takes no "
                "guidance as an input: leave it out. The scale of a second pass is true_cfg_scale."
            )
        policy.guidance_scale = args.guidance_scale
    if args.true_cfg_scale is None:
        args.true_cfg_scale = policy.default_true_cfg_scale
    if args.negative_prompt is None:
        args.negative_prompt = policy.default_negative_prompt
    if args.true_cfg_scale > 1 and not policy.has_true_cfg:
        raise ValueError(
            f"true_cfg_scale={args.true_cfg_scale}, but this pipeline was distilled and knows no second pass: leave it "
            "out, or set it to 1.0."
        )
    return policy, base_model


class _BaseEditTrainer(_BaseTrainer):
    # A trainer sets these before anything here is called.
    policy: EditPolicy
    base_model: str
    true_cfg_scale: float
    sample_num_inference_steps: int
    _bad_cases: set[tuple[int, str]]

    def _send_telemetry(self):
        # TRL's telemetry would count this trainer as one of its own.
        pass

    @property
    def num_train_cases(self) -> int:
        """Number of cases that are trained on."""
        return len(self.train_dataset)

    def _card_settings(self) -> dict[str, str]:
        """Settings that the model card lists."""
        raise NotImplementedError

    def _card_curves(self) -> list[tuple[str, str, str]]:
        """Name in the log, label and color of the curves that the model card shows."""
        raise NotImplementedError

    def _read_case(
        self, dataset: Dataset, index: int, replace: bool = True
    ) -> tuple[dict[str, Any], list[Image.Image]]:
        """Row and images of a case; of the next one that can be decoded, if bad images are to be skipped."""
        for offset in range(len(dataset)):
            row = dict(dataset[(index + offset) % len(dataset)])
            row.setdefault("id", (index + offset) % len(dataset))
            try:
                images = case_images(row, row["id"])
            except UnreadableImageError as error:
                if self.args.on_bad_image == "error":
                    raise UnreadableImageError(f"{error} Set on_bad_image='skip' to go on without it.") from error
                if not replace:
                    raise
                logger.warning(f"{error} The next case takes its place.")
                self._bad_cases.add((self.state.global_step, str(row["id"])))
                continue
            row |= {"images": images} if row.get("images") is not None else {"image": images[0]}
            return row, images
        raise UnreadableImageError("Not one case of the dataset has images that can be decoded.")

    def _encode(self, row: dict[str, Any], images: list[Image.Image]) -> EditConditions:
        negative_prompt = self.args.negative_prompt if self.true_cfg_scale > 1 else None
        return self.policy.encode(images, row["prompt"], negative_prompt, self.args.resolution)

    def sample_edits(
        self, cases: list[tuple[dict[str, Any], list[Image.Image]]], adapter: bool = True
    ) -> list[Image.Image]:
        """
        Samples an edit of each case: along the ODE, from a noise that belongs to the case.

        Args:
            cases (`list[tuple[dict, list[PIL.Image.Image]]]`):
                Row and images of each case; a row has `prompt` and `id`.
            adapter (`bool`, *optional*, defaults to `True`):
                Whether to sample from the trained policy or from the model without its adapter.
        """
        args = self.args
        self.model.eval()
        with self.policy.loaded(*self.policy.encoders):
            conditions = [self._encode(row, images) for row, images in cases]
        base = contextlib.nullcontext() if adapter else use_adapter(self.model, None)
        with self.accelerator.autocast(), base:
            trajectories = rollout(
                self.policy,
                self.model,
                conditions,
                [seeded_generator(args.seed, "eval", str(row["id"])) for row, _ in cases],
                num_inference_steps=self.sample_num_inference_steps,
                true_cfg_scale=self.true_cfg_scale,
                batch_size=args.rollout_batch_size,
            )
        return decode(self.policy, [t.final for t in trajectories], conditions, args.rollout_batch_size)

    # Every folder that is saved can be resumed from (PEFT's files) and loaded with `pipeline.load_lora_weights`.
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_lora(self.policy, self.accelerator.unwrap_model(self.model), folder)
            write_model_card(self, Path(folder))  # in place of PEFT's

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies PEFT's files to the output folder, which is what it uploads, unless an upload is still reading
        # there. So does this with the rest.
        if self.is_world_process_zero():
            uploading = self.push_in_progress is not None and not self.push_in_progress.is_done()
            if self.args.hub_always_push or not uploading:
                for name in (LORA_WEIGHT_NAME_SAFE, "README.md", "reward_curve.png"):
                    if os.path.isfile(os.path.join(checkpoint_folder, name)):
                        shutil.copy(os.path.join(checkpoint_folder, name), self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # The weights first. A push, which a save may end with, has made the pictures and the card itself.
        if not _internal_call and output_dir in (None, self.args.output_dir) and not self.args.push_to_hub:
            self.save_sample_edits()
            self.create_model_card()

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs):
        """
        Uploads the LoRA, its model card and the pictures to the Hub.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit.
            **kwargs:
                Passed to [`~transformers.Trainer.push_to_hub`].
        """
        self.save_model(_internal_call=True)
        self.save_sample_edits()
        return super().push_to_hub(commit_message, **kwargs)

    def save_sample_edits(self, num_cases: int = 4) -> None:
        """
        Saves edits before and after training, of the first cases of the evaluation set (or else of the training set),
        to `output_dir/images`. They illustrate the model card; where they cannot be made, a warning says why.

        Args:
            num_cases (`int`, *optional*, defaults to `4`):
                Number of cases.
        """
        if not self.is_world_process_zero():
            return
        dataset = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        was_training = self.model.training
        try:
            cases = [self._read_case(dataset, index) for index in range(min(num_cases, len(dataset)))]
            before, after = self.sample_edits(cases, adapter=False), self.sample_edits(cases)
            save_pictures(Path(self.args.output_dir), cases, before, after)
        except Exception as error:  # a picture must not be what a trained model is lost over
            logger.warning(f"No sample edits for the model card: {type(error).__name__}: {error}")
        self.model.train(was_training)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Writes `README.md` and the reward curve to `output_dir`.

        Args:
            model_name (`str`, *optional*):
                Name of the model. Defaults to the last part of the output folder.
            dataset_name (`str`, *optional*):
                Name of the training dataset. By default what the dataset knows of itself.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else tags or []
            write_model_card(self, Path(self.args.output_dir), model_name, dataset_name, tags)
