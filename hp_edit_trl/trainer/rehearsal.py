"""Dry runs of a trainer: its own code, phase by phase, on a model without bytes."""

import contextlib
import copy
import importlib
import io
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import clear_environment
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, TrainingArguments
from trl.trainer.utils import use_adapter

from ..policies import EditConditions, EditPolicy, policy_class
from ..utils.dry_run import CARD, HOST, DryRun
from ..utils.hub import check_reachable, hub_options
from ..utils.quantization import check_options
from .dpo_edit_config import DPOEditConfig
from .flow_grpo_edit_config import FlowGRPOEditConfig
from .lora import lora_layers
from .online_edit_config import OnlineEditConfig


# The options of a transformer that say how many blocks of each kind it has. Blocks of a kind take the same.
LAYERS = ("num_layers", "num_single_layers")
FEW = 2  # blocks of each kind in a run that is extrapolated from: the first and the last one differ from others


@contextlib.contextmanager
def alone(num_processes: int) -> Iterator[None]:
    """
    Within it configurations and trainers are those of one of so many processes, on the CPU and without a connection
    to the others, whatever this process is otherwise.
    """
    kinds = (PartialState, AcceleratorState, GradientState)
    saved = [dict(kind._shared_state) for kind in kinds]
    for kind in kinds:
        kind._shared_state.clear()
    try:
        with clear_environment():
            PartialState(cpu=True)
        with mock.patch.object(TrainingArguments, "world_size", num_processes):
            yield
    finally:
        for kind, state in zip(kinds, saved, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)


def _is(kind: Any, parent: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, parent)


def _component(model: str, name: str, library: str, class_name: str, options: dict[str, Any]) -> nn.Module | None:
    """A component of a pipeline that has weights, without reading them; `None` if it has none."""
    kind: Any = getattr(importlib.import_module(library), class_name)
    hub = hub_options(options)
    if _is(kind, ModelMixin):
        return kind.from_config(kind.load_config(model, subfolder=name, **hub)).to(options["dtype"]).eval()
    if _is(kind, PreTrainedModel):
        config = AutoConfig.from_pretrained(model, subfolder=name, **hub)
        return kind._from_config(config, dtype=options["dtype"]).eval()
    return None


def empty_pipeline(model: str | DiffusionPipeline, options: dict[str, Any]) -> DiffusionPipeline:
    """
    A pipeline whose weights have no bytes. Only configurations, tokenizers and processors are read. To be called
    within a [`~hp_edit_trl.utils.dry_run.DryRun`].

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            Hub id, local folder, or a loaded pipeline, which is left as it is.
        options (`dict`):
            What the pipeline is loaded with, see `loading_options`.

    Raises:
        `ValueError`: If something is missing, or the weights of a loaded pipeline are quantized.
    """
    if not isinstance(model, str):
        components: dict[str, Any] = dict(model.components)
        for name, module in components.items():
            if not isinstance(module, nn.Module):
                continue
            if getattr(module, "hf_quantizer", None) is not None:
                raise ValueError(
                    f"The pipeline's {name} is quantized already, which cannot be planned: plan with the model's name "
                    "and load_in_4bit or load_in_8bit instead."
                )
            if isinstance(module, PreTrainedModel):
                empty = type(module)._from_config(copy.deepcopy(module.config), dtype=module.dtype)
            else:
                kind: Any = type(module)
                empty = kind.from_config(dict(model.components[name].config)).to(module.dtype)
            components[name] = empty.eval()
        settings = {k: v for k, v in model.config.items() if k not in components and not k.startswith("_")}
        pipeline = type(model)(**components, **settings)
        pipeline.register_to_config(_name_or_path=model.config.get("_name_or_path"))
        return pipeline
    options = {name: value for name, value in options.items() if name != "quantization_config"}
    check_reachable(model, **hub_options(options))
    try:
        index = DiffusionPipeline.load_config(model, **{k: v for k, v in options.items() if k != "dtype"})
        modules = {
            name: module
            for name, value in index.items()
            if isinstance(value, list | tuple) and value[0] is not None
            if (module := _component(model, name, value[0], value[1], options)) is not None
        }
        return DiffusionPipeline.from_pretrained(model, **{**options, **modules})
    except (OSError, ValueError, AttributeError, ImportError, TypeError, KeyError) as error:
        raise ValueError(
            f"model={model!r} cannot be planned: its model_index.json and each component's configuration, tokenizer "
            f"or processor are needed, but no weights ({type(error).__name__}: {error})."
        ) from error


class _QuantizedProduct(torch.autograd.Function):
    """Both passes dequantize the weight, as those of bitsandbytes do, so that none is kept between them."""

    @staticmethod
    def forward(ctx, inputs, layer):
        ctx.layer = layer
        return inputs @ layer.dequantized(inputs.device).t()

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0] @ ctx.layer.dequantized(gradients[0].device), None


class QuantizedLinear(nn.Linear):
    """
    A linear layer of a dry run that takes the memory of a quantized one.

    Args:
        layer ([`~torch.nn.Linear`]):
            The layer in its place.
        config (`dict`):
            The option `quantization_config`: `quant_backend` and `quant_kwargs`.
    """

    def __init__(self, layer: nn.Linear, config: dict[str, Any]):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, layer.weight.dtype
        number, kwargs = layer.weight.numel(), config.get("quant_kwargs") or {}
        if config["quant_backend"] == "torchao":  # 8 bits, and a scale for each output
            size, scales = number, 4 * layer.out_features
        else:  # 4 bits, and a scale for 64 weights, itself in 8 bits if it is quantized, too
            size, scales = number // 2, number // 64 * (1 if kwargs.get("bnb_4bit_use_double_quant") else 4)
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
        self.bias = layer.bias

    def dequantized(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=device)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.device != self.weight.device:
            raise RuntimeError(
                f"Expected all tensors on one device, but got {inputs.device} and {self.weight.device}."
            )
        product: Any = _QuantizedProduct.apply(inputs.to(self.dtype), self)
        return (product if self.bias is None else product + self.bias.to(self.dtype)).to(inputs.dtype)


def _quantized(config: Any, policy_type: type[EditPolicy]) -> list[str]:
    """The components that the option `quantization_config` stands for."""
    if config is None:
        return []
    if not isinstance(config, dict):
        raise ValueError(
            "A PipelineQuantizationConfig cannot be planned: give quantization_config as a mapping, or load_in_4bit "
            "or load_in_8bit."
        )
    check_options(config)
    names = config.get("components_to_quantize") or policy_type.quantized_components
    return [names] if isinstance(names, str) else list(names)


def _quantize(module: nn.Module, config: dict[str, Any]) -> None:
    """Puts quantized layers in the place of all linear ones, except for those that stay as they are."""
    kwargs = config.get("quant_kwargs") or {}
    kept = {"lm_head", *(kwargs.get("llm_int8_skip_modules") or kwargs.get("modules_to_not_convert") or [])}
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear and not any(part == name or part in name.split(".") for part in kept):
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, QuantizedLinear(layer, config))


class Rehearsal:
    """
    Dry runs of a trainer: its own code, on a model without bytes.

    Args:
        trainer_type (`type`):
            [`FlowGRPOEditTrainer`], [`FlowNFTEditTrainer`] or [`DPOEditTrainer`].
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The editor. See [`empty_pipeline`].
        options (`dict`):
            What the pipeline is loaded with.
        peft_config ([`~peft.LoraConfig`], *optional*):
            The LoRA to train.
        judge (`str`, *optional*):
            Hub id or folder of a judge that is loaded in each process.
        judge_revision (`str`, *optional*):
            Its revision.
        num_references (`int`, *optional*, defaults to `1`):
            Number of reference images of a case.
        prompt_tokens (`int`, *optional*, defaults to `64`):
            Number of tokens of a prompt.
        is_sharded (`bool`, *optional*, defaults to `False`):
            Whether the transformer is sharded over the processes (FSDP2). An attribute that may be changed between
            runs.

    Raises:
        `ValueError`: If a configuration cannot be read, or the model does not take so many references.
    """

    def __init__(
        self,
        trainer_type: type,
        model: str | DiffusionPipeline,
        options: dict[str, Any],
        peft_config: LoraConfig | None = None,
        judge: str | None = None,
        judge_revision: str | None = None,
        num_references: int = 1,
        prompt_tokens: int = 64,
        is_sharded: bool = False,
    ):
        self.trainer_type = trainer_type
        self.peft_config = peft_config
        self.num_references = num_references
        self.dry = DryRun()
        with torch.random.fork_rng(devices=[]), self.dry:
            self.pipeline = empty_pipeline(model, options)
            self.judge = None if judge is None else _empty_judge(judge, judge_revision)
            policy_type = policy_class(self.pipeline)
            self.transformer = self.pipeline.transformer
            modules = [
                part for part in (*self.pipeline.components.values(), self.judge) if isinstance(part, nn.Module)
            ]
            self.file_bytes = sum(_bytes(_weights(module)) for module in modules)
        self.policy_type, self.is_sharded = policy_type, is_sharded
        self.quantize(options.get("quantization_config") if isinstance(model, str) else None)
        limit = policy_type.max_references
        if num_references < 1 or (limit is not None and num_references > limit):
            raise ValueError(
                f"num_references={num_references}, but {type(self.pipeline).__name__} takes at least one reference"
                + (f", and at most {limit}." if limit is not None else ".")
            )
        self.prompt = _prompt(policy_type(self.pipeline), prompt_tokens)
        self.blocks = {name: self.transformer.config[name] for name in LAYERS if name in self.transformer.config}

    def quantize(self, config: Any) -> None:
        """
        Quantizes the models of all further runs.

        Args:
            config (`dict`, *optional*):
                The option `quantization_config`, as a mapping.
        """
        self.dry.forget()
        self.quantization = dict.fromkeys(_quantized(config, self.policy_type), config)
        with torch.random.fork_rng(devices=[]), self.dry:
            for name in self.quantization.keys() - {"transformer"}:  # which is quantized in each run
                _quantize(getattr(self.pipeline, name), config)

    def measure(self, args: OnlineEditConfig | DPOEditConfig, light: bool = False, few: int = FEW) -> dict[str, Any]:
        """
        What a run with these arguments takes, as numbers in nested dictionaries. Blocks of a kind take the same, so
        that runs with few of them tell what many take.

        Args:
            args ([`FlowGRPOEditConfig`], [`FlowNFTEditConfig`] or [`DPOEditConfig`]):
                The trainer's configuration.
            light (`bool`, *optional*, defaults to `False`):
                Whether only memory is needed: then few samples are rolled out, and others are only held.
            few (`int`, *optional*, defaults to 2):
                Number of blocks of each kind in the runs. With the model's own number or more, it is run as it is.
        """
        config = self.peft_config
        chosen = config is not None and (config.layers_to_transform or config.rank_pattern or config.exclude_modules)
        if chosen or args.num_checkpointed_blocks is not None:
            few = max(self.blocks.values(), default=few)  # blocks of a kind differ
        blocks = {name: min(number, few) for name, number in self.blocks.items()}
        result = first = self._run(args, blocks, light)
        for name, number in self.blocks.items():
            if number > blocks[name]:
                more = self._run(args, {**blocks, name: blocks[name] + 1}, light)
                result = _combined(result, first, more, number - blocks[name])
        return result

    def _run(self, args: Any, blocks: dict[str, int], light: bool) -> dict[str, Any]:
        args = copy.copy(args)
        args.use_cpu, args._n_gpu, args.report_to, args.push_to_hub = True, 0, [], False
        args.log_completions, args.on_bad_case = False, "error"
        args.offload_transformer |= self.is_sharded  # blocks come and go in both cases
        args.distributed_state, args.__dict__["_setup_devices"] = PartialState(), HOST
        with contextlib.ExitStack() as stack:
            args.output_dir = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            self.dry.restart()
            stack.enter_context(self.dry)
            transformer = type(self.transformer).from_config({**self.transformer.config, **blocks})
            pipeline = copy.copy(self.pipeline)
            pipeline.transformer = transformer.to(self.transformer.dtype).eval()
            if "transformer" in self.quantization:
                _quantize(pipeline.transformer, self.quantization["transformer"])
            trainer = self._trainer(args, pipeline)
            # Both states have a device, and whoever makes an AcceleratorState, as `prepare_model` does, copies that of
            # the PartialState.
            stack.enter_context(mock.patch.object(PartialState(), "device", CARD))
            trainer.accelerator.state.device = CARD
            trainer.policy.has_prefix &= not self.is_sharded
            return self._follow(trainer, light)

    def _follow(self, trainer: Any, light: bool) -> dict[str, Any]:
        """Goes through the phases of a run."""
        dry, args, policy, model = self.dry, trainer.args, trainer.policy, trainer.model
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = [t for t in _weights(model.get_base_model()) if not t.requires_grad]
        parts = {"transformer": frozen, "adapter": trained}
        parts |= {name: _weights(module) for name, module in policy.encoders.items()}
        parts |= {} if self.judge is None else {"judge": _weights(self.judge)}
        weights = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in parts.items()}

        self._hold_streamed(trainer)
        shard = None
        with dry.measured("placing") as phase:
            trainer._move_model_to_device(model, CARD)
            if self.is_sharded:
                # This process's share, and FSDP's buffer, which holds the next block beside its weights
                sizes = trainer._stream.block_bytes
                shard = torch.empty(sum(sizes) // args.world_size + max(sizes), dtype=torch.uint8, device=CARD)
                dry.hold("transformer", shard)
            for module in model.modules():  # tables that modules move in their first pass
                for name, table in vars(module).items():
                    if isinstance(table, torch.Tensor | list) and _tensors(table):
                        setattr(module, name, tree_map_only(torch.Tensor, lambda part: part.to(CARD), table))
                        dry.hold("transformer", getattr(module, name))
            policy.place(CARD)
            dry.hold("transformer", [t for t in _weights(model.get_base_model()) if not t.requires_grad])
            dry.hold("adapter", trained)
            dry.hold("adapter copies", [adapter.weights for adapter in trainer._copies.values()])
            self._hold_encoders(policy)
            if self.judge is not None:
                dry.hold("judge", _weights(self.judge.to(CARD)))
        phase.peak, phase.parts = dry.total, dict(dry.parts)
        trainer.accelerator.prepare_model(model, device_placement=False)  # autocast in its forward pass
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        buckets = []
        if args.world_size > 1:  # DistributedDataParallel copies gradients into buckets
            buckets = [torch.empty_like(p) for p in trained]
            dry.hold("gradient buckets", buckets)

        # The optimizer makes its state in its first step. Everything else is measured with it.
        optimizer = trainer.create_optimizer()
        for group in optimizer.param_groups:
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True  # as torch chooses on a GPU
        for _ in range(2):
            self._make_gradients(trained)
            with dry.measured("optimizer"):
                if args.max_grad_norm:
                    trainer.accelerator.clip_grad_norm_(trained, args.max_grad_norm)
                optimizer.step()
            dry.hold("optimizer", list(optimizer.state.values()))
        optimizer.zero_grad()

        self._replay(trainer)
        follow = self._follow_online if isinstance(args, OnlineEditConfig) else self._follow_dpo
        files = follow(trainer, trained, light)
        with dry.measured("saving"):
            for parameter in trained:
                parameter.isfinite().all()
        adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
        files |= {
            "adapter": 2 * _bytes(adapter),  # PEFT's file and that of diffusers
            "optimizer": _bytes(optimizer.state_dict()),
        }
        if trainer._copies:
            files["adapter copies"] = _bytes(trainer._unpublished())
        phases = {
            name: {"peak": phase.peak, "parts": dict(phase.parts), "counts": dict(phase.counts)}
            for name, phase in dry.phases.items()
        }
        return {"weights": weights, "phases": phases, "files": files}

    def _hold_streamed(self, trainer: Any) -> None:
        """Names the blocks that come to the card when they do."""
        stream = trainer._stream
        if stream is None:
            return
        load = stream.load

        def load_and_hold(index: int) -> None:
            load(index)
            self.dry.hold("transformer", stream.weights(index))

        stream.load = load_and_hold

    def _hold_encoders(self, policy: EditPolicy) -> None:
        for name, module in policy.encoders.items():
            self.dry.hold(name, _weights(module))

    def _make_gradients(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.dry.hold("gradients", [p.grad for p in parameters])

    def _trainer(self, args: Any, pipeline: DiffusionPipeline) -> Any:
        """The trainer, on cases that stand for all others."""
        stream = io.BytesIO()
        Image.new("RGB", (args.resolution, args.resolution)).save(stream, "png")
        picture = {"bytes": stream.getvalue(), "path": None}
        is_online = isinstance(args, OnlineEditConfig)
        rows = args.generation_batch_size if is_online else 1
        columns: dict[str, list[Any]] = {
            "id": [str(row) for row in range(rows)],
            "prompt": [self.prompt] * rows,
            "images": [[picture] * self.num_references] * rows,
        }
        features = {"id": Value("string"), "prompt": Value("string"), "images": List(ImageFeature())}
        if not is_online:
            columns |= {"chosen": [picture] * rows, "rejected": [picture] * rows}
            features |= {"chosen": ImageFeature(), "rejected": ImageFeature()}
        dataset = Dataset.from_dict(columns, Features(features))
        rewards = {"reward_funcs": _reward} if is_online else {}
        datasets = {"train_dataset": dataset, "eval_dataset": dataset if args.eval_strategy != "no" else None}
        return self.trainer_type(pipeline, args=args, peft_config=self.peft_config, **datasets, **rewards)

    def _replay(self, trainer: Any) -> None:
        """What runs without gradients takes the same each time that its shapes are the same: it is run once."""
        dry, policy, model = self.dry, trainer.policy, trainer.model
        encode, encode_image, decode, velocity = policy.encode, policy.encode_image, policy.decode, policy.velocity
        prefix = policy.prefix
        adapted = next(iter(lora_layers(model).values()))
        run = tuple(model.get_base_model().config.get(name) for name in LAYERS)

        def shapes(values: Any) -> tuple:
            return tuple((tuple(tensor.shape), tensor.dtype) for tensor in _tensors(values))

        def encode_once(images: Any, prompt: str, negative_prompt: str | None, resolution: int) -> EditConditions:
            if policy.offload_encoders:
                self._hold_encoders(policy)  # they have come to the card just now
            key = ("encode", tuple(image.size for image in images), prompt, negative_prompt, resolution)
            values = dry.once(key, lambda: vars(encode(images, prompt, negative_prompt, resolution)))
            dry.hold("samples", values["tensors"])
            return EditConditions(**values)

        def encode_image_once(image: Image.Image, height: int, width: int) -> torch.Tensor:
            return dry.once(("image", image.size, height, width), lambda: encode_image(image, height, width))

        def decode_once(latents: torch.Tensor, conditions: EditConditions) -> list[Image.Image]:
            if policy.offload_encoders:
                self._hold_encoders(policy)
            dry.rename("activations", "samples")
            return dry.once(("decode", shapes(latents)), lambda: decode(latents, conditions))

        def prefix_once(module: nn.Module, conditions: EditConditions, scale: float) -> list[torch.Tensor]:
            dry.count("prefixes", 1)
            if torch.is_grad_enabled():
                return prefix(module, conditions, scale)
            key = ("prefix", args_key, run, *weights_state(scale), shapes(conditions.tensors))
            tensors = dry.once(key, lambda: prefix(module, conditions, scale))
            dry.hold("prefixes", tensors)
            return tensors

        def weights_state(scale: float) -> tuple:
            return (scale > 1, adapted.disable_adapters, torch.is_autocast_enabled("cpu"))

        def velocity_once(module: nn.Module, latents: Any, sigma: Any, batch: dict, scale: float) -> torch.Tensor:
            dry.count("passes", len(latents) * (2 if scale > 1 else 1))
            if torch.is_grad_enabled():
                return velocity(module, latents, sigma, batch, scale)
            if not adapted.disable_adapters:  # else in the middle of a step
                dry.rename("activations", "samples")
            key = ("velocity", args_key, run, *weights_state(scale), shapes([latents, sigma, batch]))
            return dry.once(key, lambda: velocity(module, latents, sigma, batch, scale))

        args_key = (trainer.args.bf16, trainer.args.fp16, trainer.args.offload_transformer)
        policy.encode, policy.encode_image = encode_once, encode_image_once
        policy.decode, policy.velocity, policy.prefix = decode_once, velocity_once, prefix_once

    def _follow_online(self, trainer: Any, trained: list[nn.Parameter], light: bool) -> dict[str, int]:
        args, dry, group = trainer.args, self.dry, trainer.num_generations
        names = {"encode": "encoding", "decode": "decoding", "train": "training"}
        trainer._timed = lambda phase: dry.measured(str(names.get(phase, phase)))
        count, kept = args.generation_batch_size // args.world_size, trainer.num_trained / group
        few = math.ceil(max(args.rollout_batch_size, args.per_device_train_batch_size / kept) / group) * group
        few = few if few < count and count % group == 0 else count
        between_updates = trainer.generate_every % args.gradient_accumulation_steps == 0

        def generate(number: int) -> list[Any]:
            samples = trainer._prepare_inputs([place // group for place in range(number)])
            trainer._step += trainer.generate_every
            return samples

        def stored() -> list[Any]:
            return [[vars(sample.conditions), vars(sample.trajectory)] for sample in trainer._buffered_samples]

        # A batch is sampled while the one before is still in memory, and gradients if an update is not finished.
        generate(few)
        each = kept * _bytes(stored()) / len(trainer._buffered_samples)  # for each sample of a generation batch
        trainer._buffered_samples = None
        number = few if light else count
        other = [torch.empty(round(each * (2 * count - number)), dtype=torch.uint8, device=CARD)]
        dry.hold("samples", other)
        if not between_updates:
            self._make_gradients(trained)
        for name in ("encoding", "rollout", "decoding", "reward"):
            dry.phases.pop(name, None)
        # The number of passes may depend on the window: then the mean over all that may be drawn
        is_grpo, begins = isinstance(args, FlowGRPOEditConfig), range(1)
        if is_grpo:
            window, (first, end) = args.sde_window_size, trainer.sde_window_range
            begins = range(first, end - window + 1)
            if light or args.sde_window_mode == "fixed" or not (args.same_latent or args.num_finish_steps):
                begins = begins[:1]
        for begin in begins:
            if is_grpo:
                trainer.sde_window_range = (begin, begin + window)
            trainer._buffered_samples = None
            generate(number)
        for name in ("encoding", "rollout", "decoding"):
            _divide(dry.phases[name].counts, len(begins))
        dry.hold("samples", stored())
        other = [torch.empty(round(each * (count - number)), dtype=torch.uint8, device=CARD)]
        dry.hold("samples", other)

        # One trained step or noise level of each microbatch, as if others of its update had come before; those that
        # make passes of the same sizes take the same. Where samples share the first step or a prefix, the mean over
        # all.
        samples, shares = trainer._buffered_samples, trainer.policy.has_prefix
        if not is_grpo:
            args.num_train_sigmas = args.num_train_sigmas if shares else 1
        elif light or not (args.same_latent or shares):
            steps = samples[0].trajectory.steps[: 2 if args.same_latent or shares else 1]
            samples = [replace(sample, trajectory=replace(sample.trajectory, steps=steps)) for sample in samples]
        size, accumulate, this = args.per_device_train_batch_size, trainer._accumulate_gradients, object()

        def accumulate_once(module: nn.Module, samples: list[Any], update: list[Any]) -> torch.Tensor:
            cases = [sample.conditions for sample in samples]
            if is_grpo:
                passes = [tuple(map(len, one)) for one in trainer._passes(samples, update)]
            else:
                passes = [(len(one),) for one in trainer._passes(samples)]
            if shares:
                prefixes.begin(cases)
            return dry.once((this, len(set(map(id, cases))), *passes), lambda: accumulate(module, samples, update))

        prefixes = _Prefixes(dry, trainer)
        if shares:
            trainer._prefixes = prefixes
            trainer._other_prefixes = dict.fromkeys(trainer._other_prefixes, prefixes)
        trainer._buffered_samples, trainer._accumulate_gradients = samples, accumulate_once
        self._make_gradients(trained)
        starts = range(0, size if light else len(samples), size)
        for microbatch, start in enumerate(starts):
            trainer._step, trainer._accumulated = microbatch, microbatch % args.gradient_accumulation_steps
            trainer._prepare_inputs = lambda _, start=start: samples[start : start + size]
            trainer.training_step(trainer.model, [])
        trainer.optimizer.zero_grad()
        each = len(samples[0].trajectory.steps) if is_grpo else args.num_train_sigmas
        _divide(dry.phases["training"].counts, each * len(starts))

        trainer._current_eval_dataset = trainer.train_dataset
        with dry.measured("evaluation"):
            if args.eval_strategy != "no":
                rows = min(args.per_device_eval_batch_size, len(trainer.train_dataset))
                trainer.evaluation_loop([list(range(rows))], "Evaluation")
            self._sample(trainer)
        # Between updates that share a generation batch, a checkpoint holds its samples.
        shared = not between_updates or trainer.generate_every > args.gradient_accumulation_steps
        return {"rollouts": round(each * count) if shared else 0}

    def _follow_dpo(self, trainer: Any, trained: list[nn.Parameter], light: bool) -> dict[str, int]:
        args, dry, policy = trainer.args, self.dry, trainer.policy
        with dry.measured("encoding"), policy.loaded(*policy.encoders):
            state = trainer._encode_pair(dict(trainer.train_dataset[0]))
        trainer._load_pair = lambda file: trainer._pair(state)
        self._make_gradients(trained)
        with dry.measured("training"):
            trainer.training_step(trainer.model, ["pair"] * args.per_device_train_batch_size)
        trainer.optimizer.zero_grad()
        trainer._current_eval_dataset = trainer.train_dataset
        with dry.measured("evaluation"):
            if args.eval_strategy != "no":
                trainer.evaluation_loop([["pair"] * args.per_device_eval_batch_size], "Evaluation")
            self._sample(trainer)
        return {"pair": _bytes(state)}

    def _sample(self, trainer: Any) -> None:
        """The edits of the model card. Those of the model without its adapter take no more."""
        rows = range(min(trainer.args.num_sample_edits, len(trainer.train_dataset)))
        if rows:
            trainer.sample_edits([trainer._read_case(trainer.train_dataset, row) for row in rows])


class _Prefixes:
    """
    Stands in for a trainer's prefixes of cases in the training of a dry run, where a microbatch like one before is not
    run. What computing a prefix and its backward pass take is counted when a case begins; what is kept of it is held
    until the case ends.

    Args:
        dry ([`DryRun`]):
            The dry run.
        trainer ([`FlowGRPOEditTrainer`] or [`FlowNFTEditTrainer`]):
            The trainer.
    """

    def __init__(self, dry: DryRun, trainer: Any):
        self.dry, self.trainer = dry, trainer
        self._kept: dict[int, list[Any]] = {}

    def begin(self, cases: list[EditConditions]) -> None:
        """Counts and holds the prefixes of those cases that have none yet."""
        trainer, policy = self.trainer, self.trainer.policy
        for case in cases:
            if id(case) in self._kept:
                continue
            with trainer.compute_loss_context_manager():
                leaves, graph = self.dry.once((self, "prefix"), partial(self._trained, case))
                others = []
                with torch.no_grad():
                    if "old" in trainer._copies:
                        others.append(policy.prefix(trainer.model, case, trainer.true_cfg_scale))
                    if trainer.args.beta != 0.0:
                        with use_adapter(trainer.model, None):
                            others.append(policy.prefix(trainer.model, case, trainer.true_cfg_scale))
            trained = [leaf.requires_grad_() for leaf, is_trained in leaves if is_trained]
            for leaf in trained:
                leaf.register_post_accumulate_grad_hook(lambda leaf: setattr(leaf, "grad", None))
            sums = [torch.empty_like(leaf, dtype=torch.float32) for leaf in trained]
            self._kept[id(case)] = [[leaf for leaf, _ in leaves], graph, sums, others]
            self.dry.hold("prefixes", self._kept[id(case)])

    def _trained(self, case: EditConditions) -> Any:
        """A prefix, and what takes the place of its graph."""
        before = self.dry.total
        tensors = self.trainer.policy.prefix(self.trainer.model, case, self.trainer.true_cfg_scale)
        size = self.dry.total - before - _bytes(tensors)
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        torch.autograd.backward(trained, [torch.empty_like(tensor) for tensor in trained])
        return [(tensor.detach(), tensor.requires_grad) for tensor in tensors], torch.empty(
            size, dtype=torch.uint8, device=CARD
        )

    def added(self, batch: dict, *_: Any) -> dict:
        return {**batch, "prefixes": [self._kept[id(case)][0] for case in batch["conditions"]]}

    def keep(self, conditions: list[EditConditions]) -> None:
        wanted = set(map(id, conditions))
        self._kept = {key: kept for key, kept in self._kept.items() if key in wanted}


def _empty_judge(judge: str, revision: str | None) -> nn.Module:
    check_reachable(judge, revision=revision)
    try:
        config = AutoConfig.from_pretrained(judge, revision=revision)
        return AutoModelForImageTextToText.from_config(config, dtype=config.dtype).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"The judge {judge!r} has no configuration that can be planned: {error}") from error


def _prompt(policy: EditPolicy, tokens: int) -> str:
    """A prompt of about so many tokens."""
    prompt = "Edit"
    while len(policy.prompt_tokens([prompt])[0]) < tokens:
        prompt += " it"
    return prompt


def _reward(completions: list[Image.Image], **kwargs: Any) -> list[float]:
    return [float(place**2) for place in range(len(completions))]  # none of a group is the mean


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _weights(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(values: Any) -> int:
    """Bytes of tensors of any nesting, as a file has them: shared memory once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in _tensors(values)}
    return sum(storage.nbytes() for storage in storages.values())


def _divide(counts: dict[str, Any], number: int) -> None:
    for name in counts:
        counts[name] /= number


def _combined(result: Any, first: Any, more: Any, times: int) -> Any:
    """`result + times * (more - first)`, for numbers in nested dictionaries."""
    if isinstance(result, dict) or isinstance(more, dict):
        result, first, more = (value or {} for value in (result, first, more))
        return {
            key: _combined(result.get(key, 0), first.get(key, 0), more.get(key, 0), times)
            for key in {**result, **more}
        }
    return result + times * (more - first)
