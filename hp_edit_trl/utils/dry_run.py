"""Running code on tensors without bytes: what it would hold in memory, and how many operations it would compute."""

import contextlib
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.flop_counter import flop_registry


aten = torch.ops.aten

# The card is another CPU to torch: tensors of the two cannot meet in one operation, as with a GPU, and autograd needs
# no driver.
HOST, CARD = torch.device("cpu"), torch.device("cpu", 1)

# Largest number of elements of a tensor whose values are computed as well
KNOWN, KNOWN_FLOATS = 2**16, 2**8
NUMBERS = 8  # largest number of elements of a result that is taken to be ones if nothing is known of it
BLOCK = 512  # CUDA's allocator hands out multiples of it

EMPTY = (aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided)
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution}  # their tensors must be of one type
FILLS = (aten.normal_, aten.uniform_, aten.zero_)  # they take time where weights are initialized

FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}

# What autocast computes in float32 on CUDA but not on the CPU; for the second kind only the result is in float32.
IN_FLOAT32 = {
    "layer_norm", "group_norm", "rms_norm", "pow", "__pow__", "__rpow__", "rsqrt", "reciprocal", "exp", "expm1", "log",
    "log2", "log10", "log1p", "logsumexp", "norm", "vector_norm", "softplus", "cosine_similarity", "interpolate",
}  # fmt: skip
FLOAT32_RESULT = {"sum", "prod", "cumsum", "cumprod", "softmax", "log_softmax"}
HALF = (torch.bfloat16, torch.float16)


@dataclass
class Phase:
    """
    What a part of a program took.

    Args:
        peak (`int`):
            Largest number of bytes on the card at one time.
        parts (`dict[str, int]`):
            Bytes of each part at that time.
        counts (`dict[str, int]`):
            Floating-point operations: `"forward"`, `"recompute"` (what gradient checkpointing computes again) and
            `"backward"`; and what is counted by [`~Meter.count`].
    """

    peak: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class Meter(TorchDispatchMode):
    """
    Counts the bytes of live tensors, and floating-point operations. Tensors that exist before it is entered have to be
    named with [`~Meter.hold`].

    Args:
        device (`torch.device`, *optional*, defaults to the CPU):
            The device whose memory is counted.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and a guard against it takes time in every operation

    def __init__(self, device: torch.device = HOST):
        super().__init__()
        self.device = device
        self.total = 0
        self.parts: dict[str, int] = defaultdict(int)
        self.phase = Phase()
        self.phases: dict[str, Phase] = {}
        self._live: dict[int, list[Any]] = {}  # by the address of a storage: a weak reference to it, its part, bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._note(func, args, kwargs or {}, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        formula = FLOPS.get(func.overloadpacket)
        if formula is not None:
            in_backward = torch._C._current_graph_task_id() != -1
            kind = "forward" if not in_backward else "recompute" if torch.is_grad_enabled() else "backward"
            self.phase.counts[kind] += formula(*args, **kwargs, out_val=out)
        if not func.is_view:
            for tensor in _tensors(out):
                self._add(tensor, "activations")

    def _add(self, tensor: torch.Tensor, part: str) -> list[Any] | None:
        if tensor.device != self.device:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            size = math.ceil(storage.nbytes() / BLOCK) * BLOCK
            self._live[key] = [weakref.ref(storage, lambda _: self._drop(key)), part, size]
            self.total += size
            self.parts[part] += size
            if self.total > self.phase.peak:
                self.phase.peak, self.phase.parts = self.total, dict(self.parts)
        return self._live[key]

    def restart(self) -> None:
        """Forgets all that is live, and the phases."""
        self._live.clear()
        self.parts.clear()
        self.phases.clear()
        self.total, self.phase = 0, Phase()

    def _drop(self, key: int) -> None:
        _, part, size = self._live.pop(key)
        self.total -= size
        self.parts[part] -= size

    def hold(self, part: str, tensors: Any) -> int:
        """
        Names a part of the memory.

        Args:
            part (`str`):
                The name. What has none is counted as `"activations"`.
            tensors (`Any`):
                Its tensors, of any nesting. Those on other devices are not counted.

        Returns:
            `int`: the bytes of the part.
        """
        for tensor in _tensors(tensors):
            entry = self._add(tensor, part)
            if entry is not None and entry[1] != part:
                self.parts[entry[1]] -= entry[2]
                self.parts[part] += entry[2]
                entry[1] = part
        return self.parts[part]

    def rename(self, part: str, name: str) -> None:
        """Gives all that is live of one part to another one."""
        for entry in self._live.values():
            if entry[1] == part:
                entry[1] = name
        self.parts[name] += self.parts.pop(part, 0)

    def count(self, name: str, number: int) -> None:
        """Adds to a count of the present phase."""
        self.phase.counts[name] += number

    @contextlib.contextmanager
    def measured(self, name: str) -> Iterator[Phase]:
        """Within it, everything is counted as of this phase. It may be entered several times."""
        outer, self.phase = self.phase, self.phases.setdefault(name, Phase())
        if self.total > self.phase.peak:
            self.phase.peak, self.phase.parts = self.total, dict(self.parts)
        try:
            yield self.phase
        finally:
            self.phase = outer


@dataclass
class _Shape:
    """What is kept of a tensor: of masks and numbers of tokens the values, too."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    known: torch.Tensor | None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_Shape":
        known = None if tensor.is_floating_point() else _values(tensor)
        return cls(tensor.shape, tensor.dtype, tensor.device, known)

    def made(self) -> torch.Tensor:
        """A new tensor like it."""
        tensor: Any = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if self.known is not None:
            tensor.known = self.known
        return tensor


class DryRun(Meter):
    """
    A [`Meter`] within which tensors have no bytes, and operations are not computed. Devices and dtypes are checked as
    ever: those that do not go together raise an error. There are two devices, `HOST` and `CARD`, and the memory of the
    card is counted.

    Small tensors are computed as well, so that code which reads lengths, masks or noise levels takes the branches that
    it would take. A number that depends on more than these is 1. Autocast on the card follows CUDA's list of
    operations.
    """

    def __init__(self):
        super().__init__(CARD)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._functions = _Functions()
        self._once: dict[Any, tuple[Any, int, dict[str, int], dict[str, int]]] = {}

    def __enter__(self):
        self._functions.__enter__()
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._fake.__exit__(*error)
        self._functions.__exit__(*error)

    def forget(self) -> None:
        """Forgets what was run once, because the models are others now."""
        self._once.clear()

    def once(self, key: Any, call: Callable[[], Any]) -> Any:
        """
        Runs a function the first time that a key is seen. Afterwards what it took then is counted again, on top of
        what is live, without running it.

        Args:
            key (`Any`):
                Everything that its work depends on, e.g. the shapes of its arguments.
            call (`Callable`):
                The function. Tensors in its result, of any nesting, are new ones of the same shapes each time.
        """
        outer = self.phase
        if key not in self._once:
            total, parts = self.total, dict(self.parts)
            self.phase = inner = Phase(total, parts)
            try:
                result = call()
            finally:
                self.phase = outer
            extra = {part: size - parts.get(part, 0) for part, size in inner.parts.items()}
            shapes = tree_map_only(torch.Tensor, _Shape.of, result)
            self._once[key] = shapes, inner.peak - total, extra, dict(inner.counts)
            peak, parts = inner.peak, inner.parts
        else:
            shapes, more, extra, _ = self._once[key]
            peak = self.total + more
            parts = {part: self.parts.get(part, 0) + extra.get(part, 0) for part in {*self.parts, *extra}}
            result = tree_map_only(_Shape, _Shape.made, shapes)
        if peak > outer.peak:
            outer.peak, outer.parts = peak, parts
        for name, number in self._once[key][3].items():
            outer.counts[name] += number
        return result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func in (aten.lift_fresh.default, aten.lift_fresh_copy.default):
            return self._faked(args[0], HOST)
        if func.overloadpacket in FILLS and isinstance(args[0], FakeTensor) and _values(args[0]) is None:
            return args[0]
        flat: list[Any]
        flat, spec = tree_flatten((args, kwargs))
        known = True
        for i, value in enumerate(flat):
            if isinstance(value, torch.Tensor):
                if not isinstance(value, FakeTensor):
                    flat[i] = value = self._faked(value, HOST)
                known = known and _values(value) is not None
        args, kwargs = tree_unflatten(flat, spec)
        if func.overloadpacket in PRODUCTS:
            dtypes = {value.dtype for value in flat if isinstance(value, torch.Tensor)}
            if len(dtypes) > 1:  # tensors without bytes are not asked
                raise RuntimeError(f"{func} needs tensors of the same dtype, but got {sorted(map(str, dtypes))}.")
        if func is aten._local_scalar_dense.default:
            with unset_fake_temporarily():
                return (args[0].known if known else torch.ones((), dtype=args[0].dtype)).item()
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            args = (args[0], [place for index in args[1] for place in self._places(index)], *args[2:])
        if known and torch.Tag.dynamic_output_shape in func.tags:
            device = next(value.device for value in flat if isinstance(value, torch.Tensor))
            return tree_map_only(torch.Tensor, lambda t: self._faked(t, device), _computed(func, args, kwargs))
        out = func(*args, **kwargs)
        # It keeps weak references to its tensors, with which torch cannot swap them in `Module.to`.
        self._fake.fake_tensor_converter.meta_converter.tensor_memo.clear()
        self._note(func, args, kwargs, out)
        outs = list(_tensors(out))
        if func.overloadpacket in EMPTY:
            known = not outs[0].is_floating_point()
        if known and (func.is_view or all(_is_small(o) for o in outs)):
            for o, values in zip(outs, _tensors(_computed(func, args, kwargs)), strict=True):
                o.known = values  # in-place operations change the values themselves
        else:
            for o in outs:
                if func._schema.is_mutable:
                    o.known = None
                if o.numel() <= NUMBERS and not func.is_view:
                    with unset_fake_temporarily():
                        o.known = torch.ones(o.shape, dtype=o.dtype)
        return out

    def _faked(self, tensor: torch.Tensor, device: torch.device) -> Any:
        """A tensor without bytes in place of one that has some."""
        fake: Any = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if _is_small(tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            with unset_fake_temporarily():
                fake.known = tensor.detach()
        self._add(fake, "activations")
        return fake

    def _places(self, index: Any) -> list[Any]:
        """The index, or what stands for it if it is a mask: the places where it is true, one tensor per dimension."""
        if getattr(index, "dtype", None) not in (torch.bool, torch.uint8):
            return [index]
        with unset_fake_temporarily():
            places = index.known.nonzero(as_tuple=True)
        return [self._faked(place, index.fake_device) for place in places]


class _Functions(TorchFunctionMode):
    """Within it, tensors without bytes can be made arrays and lists, and autocast on the CPU is that of CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "numpy" and isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                return np.zeros(tuple(args[0].shape), torch.empty(0, dtype=args[0].dtype).numpy().dtype)
        if name == "tolist" and isinstance(args[0], FakeTensor):
            values = _values(args[0])
            with unset_fake_temporarily():
                return (torch.ones(args[0].shape, dtype=args[0].dtype) if values is None else values).tolist()
        if name in ("tensor", "as_tensor", "new_tensor"):
            # A list may hold numbers that are tensors.
            args = tuple(
                tree_map_only(FakeTensor, lambda t: t.item(), arg) if isinstance(arg, list) else arg for arg in args
            )
            device = kwargs.get("device") or (args[0].device if name == "new_tensor" else HOST)
            if torch.device(device) == CARD:  # they take both devices for the same
                return func(*args, **{**kwargs, "device": HOST}).to(CARD)
        if name == "backward":
            # It would leave this mode, but gradient checkpointing repeats forward passes in it.
            tensors: list[Any] = [args[0]]
            gradients: list[Any] = [kwargs.get("gradient")]
            if not isinstance(args[0], torch.Tensor):  # `torch.autograd.backward`
                tensors, gradients = list(args[0]), list(kwargs["grad_tensors"])
            for place, tensor in enumerate(tensors):
                if gradients[place] is None:
                    gradients[place] = torch.ones_like(tensor)
            engine, keep = torch.autograd.Variable._execution_engine, bool(kwargs.get("retain_graph"))
            with self:
                return engine.run_backward(tuple(tensors), tuple(gradients), keep, False, (), True, True)
        if not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        if name in IN_FLOAT32:
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.float() if t.dtype in HALF else t, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        if name in FLOAT32_RESULT and kwargs.get("dtype") is None and args[0].dtype in HALF:
            kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= (KNOWN_FLOATS if tensor.is_floating_point() or tensor.is_complex() else KNOWN)


def _tensors(values: Any) -> Iterator[Any]:
    if isinstance(values, torch.Tensor):
        yield values
    else:
        yield from (value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor))


def _values(tensor: torch.Tensor) -> torch.Tensor | None:
    return getattr(tensor, "known", None)


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation returns for the values of its arguments."""
    args, kwargs = tree_map_only(torch.Tensor, _values, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs["device"] = HOST
    with unset_fake_temporarily():
        return func(*args, **kwargs)
