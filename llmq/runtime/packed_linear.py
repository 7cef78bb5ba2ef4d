"""A linear layer that keeps its weight packed. It and four other files import the kernels: see pyproject.toml."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from llmq_kernels import (
    PackedWeight,
    cpu_int4,
    cpu_native,
    dequantize,
    new_counters,
    pack,
    packed_linear,
    reference,
    stack,
)
from llmq_kernels.cpu_native import NativeMatmul
from llmq_kernels.layout import unpack
from llmq_kernels.op import autocast, packed_linear_now
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from llmq.core import affine_grid
from llmq.core.errors import RequestError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.training.fake_quantization import per_tensor, per_token

# Without a C compiler. With more tokens, dequantizing once and multiplying in float32 is faster than torch's int4 path,
# and exact (2-core AVX-512 machine, torch 2.13, 2026-11-22, 1536x576: 0.69 against 1.08 ms at 64 tokens, 5.6 against
# 5.3 at 512). It takes float32 inputs, too, in a scalar loop: 1.05 ms a token, dequantizing 0.60 (2-core AVX2
# machine, 2026-11-28).
_INT4_TOKENS = 64


@dataclass(frozen=True)
class _Origin:
    """What `codes` needs to know about the original weight besides its layout for the kernels."""

    dtype: torch.dtype = torch.float32  # dtype of the scales
    pieces: tuple[int, ...] | None = None
    """Number of equal pieces that each group was cut into; None if no group was cut."""
    lossless: bool = True


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with W = scale * (codes - zero), never stored dense.

    The kernels know only zero points that are codes. Real ones are taken apart: with the middle m of the codes, the
    kernels compute scale * (codes - m), and what is left, scale * (m - zero), is the same for all inputs of a group. So
    it is multiplied with the sum of these inputs.

    Args:
        packed: the weight in the layout of the kernels.
        bias: [out] or None.
    """

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bits, self.group_size, self.symmetric = packed.bits, packed.group_size, packed.symmetric
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self._arrays = len(packed.words)
        for i, words in enumerate(packed.words):
            self.register_buffer(f"words{i}", words)
        self.register_buffer("grid", packed.grid)
        self.register_buffer("permutation", packed.permutation)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", None)
        self.register_buffer("biases", None)
        self.register_buffer("counters", new_counters(packed.device), persistent=False)
        self.grid: Tensor
        self.permutation: Tensor | None
        self.bias: Tensor | None
        self.input_scale: Tensor | None
        """[1]: the scale of inputs that are rounded, the same for all tokens. None: each token has its own."""
        self.biases: Tensor | None
        """-scale * zero of real zero points [out, groups]: float32 in the bits of int32, as in `grid`."""
        self.counters: Tensor
        self._packed: PackedWeight | None = None
        self._taken: list[tuple[str, Tensor | None]] = []
        """The buffers that `_packed`, `_native`, `_int4` and `_offsets` were made of."""
        self._offsets: Tensor | None = None
        self._native: NativeMatmul | None = None
        self._int4: cpu_int4.CpuInt4Weight | None = None
        self.rounds_inputs = False
        """Whether x is rounded to 8 bits first."""
        self.exact = False
        """Whether float32 inputs are multiplied in float32 on a CPU without a C compiler too, though that is slower."""
        self._origin = _Origin()
        self.on_change: Callable[[], None] | None = None
        """Is called after buffers were moved or loaded."""

    @classmethod
    def from_codes(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> PackedLinear:
        """Return a layer with the codes and grids of a weight. Unequal groups are cut into pieces of one size."""
        even = weight.even()
        middle = torch.full_like(even.zero, 2 ** (even.bits - 1), dtype=torch.uint8)
        packed = pack(even.q, even.scale, middle if even.has_real_zeros else even.zero, even.bits, even.group_of)
        linear = cls(packed, bias)
        if even.has_real_zeros:
            assert even.group_of is None, "no format stores real zero points of groups that are spread over the row"
            linear.biases = affine_grid.bias_of(even.scale, even.zero).float().contiguous().view(torch.int32)
        pieces = None
        if even.scale.shape != weight.scale.shape and weight.group_of is not None:
            sizes = torch.bincount(weight.group_of, minlength=weight.scale.shape[1])
            pieces = tuple((sizes // even.group_size).tolist())
        lossless = torch.equal(packed.scale(), even.scale.float()) and 0 not in (pieces or ())
        linear._origin = _Origin(weight.scale.dtype, pieces, lossless)
        linear.input_scale, linear.rounds_inputs = weight.input_scale, weight.input_scale is not None
        return linear

    @classmethod
    def stack(cls, linears: Sequence[PackedLinear]) -> PackedLinear | None:
        """Return one layer with the rows of several, or None if their bits, groups, biases or inputs differ."""
        packed = stack([linear.packed for linear in linears])
        scales = [None if linear.input_scale is None else float(linear.input_scale) for linear in linears]
        if len(set(scales)) > 1 or len({linear.rounds_inputs for linear in linears}) > 1:
            return None
        shifts = [linear.biases for linear in linears if linear.biases is not None]
        if len(shifts) not in (0, len(linears)):
            return None
        biases = [linear.bias for linear in linears if linear.bias is not None]
        if packed is None or len(biases) not in (0, len(linears)):
            return None
        stacked = cls(packed, torch.cat(biases) if biases else None)
        stacked.rounds_inputs, stacked.input_scale = linears[0].rounds_inputs, linears[0].input_scale
        stacked.biases = torch.cat(shifts) if shifts else None
        return stacked

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """Make the buffers that belong to a device anew after a move."""
        exact = self.input_scale
        super()._apply(fn, recurse)
        if exact is not None:  # it is part of the checkpoint, so it keeps its dtype
            self.input_scale = exact.to(self.grid.device)
        self.counters = new_counters(self.grid.device)
        self.changed()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.changed()

    def changed(self) -> None:
        """Forget what was made of the buffers, and tell whoever made something of them."""
        self._forget()
        if self.on_change is not None:
            self.on_change()

    def _forget(self) -> None:
        self._packed = self._native = self._int4 = self._offsets = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out pointers, and the int4 copy, whose layout depends on this CPU."""
        made = ("_packed", "_native", "_int4", "_offsets", "on_change")
        return self.__dict__ | dict.fromkeys(made) | {"_taken": []}

    @property
    def packed(self) -> PackedWeight:
        """Return the buffers as the kernels take them."""
        packed, buffers = self._packed, self._buffers
        # accelerate puts other tensors into _buffers, one by one
        if packed is None or any(tensor is not buffers.get(name) for name, tensor in self._taken):
            words = tuple(self.get_buffer(f"words{i}") for i in range(self._arrays))
            kind = (self.bits, self.group_size, self.in_features, self.symmetric)
            packed = PackedWeight(words, self.grid, *kind, self.permutation)
            names = [*(f"words{i}" for i in range(self._arrays)), "grid", "permutation", "bias", "biases"]
            self._taken = [(name, buffers.get(name)) for name in names]
            self._forget()
            self._packed = packed
        return packed

    @property
    def qweight(self) -> Tensor:
        """Return some packed codes: peft looks at them to learn where the layer is."""
        return self.get_buffer("words0")

    def codes(self) -> QuantizedWeight:
        """Return exactly the weight that `from_codes` was given.

        Raises RequestError if the layout could not keep it: float32 scales beside zero points are rounded, and the grid
        of a group without inputs is dropped.
        """
        packed, origin = self.packed, self._origin
        if not origin.lossless:
            raise RequestError("packed layers keep neither float32 scales beside zero points nor groups without inputs")
        q, scale, zero = unpack(packed), packed.scale().to(origin.dtype), packed.zero()
        if self.biases is not None:
            zero = affine_grid.zero_of(scale, self.biases.view(torch.float32).to(origin.dtype))
        if packed.permutation is None and origin.pieces is None:
            return QuantizedWeight(q, scale, zero, self.bits, input_scale=self.input_scale)
        group_of = torch.arange(self.in_features, device=q.device) // self.group_size
        if packed.permutation is not None:
            back = torch.argsort(packed.permutation)
            q, group_of = q[:, back], group_of[back]
        if origin.pieces is not None:
            pieces = torch.tensor(origin.pieces, device=q.device)
            first = pieces.cumsum(0) - pieces
            scale, zero = scale[:, first], zero[:, first]
            group_of = torch.arange(len(pieces), device=q.device).repeat_interleave(pieces)[group_of]
        return QuantizedWeight(q, scale, zero, self.bits, group_of.to(torch.int32), self.input_scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """Return the dense weight, for checks and for export."""
        if self.biases is None:
            return dequantize(self.packed, dtype)
        W = dequantize(self.packed, torch.float32).unflatten(-1, (-1, self.group_size))
        return (W + self._group_offsets()[..., None]).flatten(-2).to(dtype)

    def _group_offsets(self) -> Float[Tensor, "out groups"]:
        """Return scale * (middle - zero) of real zero points, float32."""
        packed = self.packed  # forgets old offsets
        offsets = self._offsets
        if offsets is None:
            assert self.biases is not None
            offsets = self.biases.view(torch.float32) + packed.scale() * 2 ** (self.bits - 1)
            self._offsets = offsets
        return offsets

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.rounds_inputs:
            x = per_token(x) if self.input_scale is None else per_tensor(x, self.input_scale.float())
        x = autocast(x)
        y = self._times_codes(x)
        if self.biases is None:
            return y
        sums = x.float().unflatten(-1, (-1, self.group_size)).sum(-1)
        with torch.autocast(x.device.type, enabled=False):
            return y + (sums @ self._group_offsets().T).to(y.dtype)

    def _times_codes(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return x Wᵀ + b, with zero points in the middle if they are real."""
        weight, compiling = self.packed, torch.compiler.is_compiling()
        learning = x.requires_grad and torch.is_grad_enabled()
        # As one operator it has a gradient, and nothing that traces looks into it.
        whole = compiling or learning or is_in_torch_dispatch_mode() or torch.jit.is_tracing()  # pyright: ignore
        native = not compiling and cpu_native.supports(x, weight)
        if native and not whole:
            if self._native is None:
                self._native = NativeMatmul(weight, self.bias)
            return self._native(x)
        if self.counters.device != x.device:  # accelerate moves buffers one by one and leaves these behind
            self.counters = new_counters(x.device)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        few = not (compiling or learning or native)  # torch's int4 operator has no gradient
        few = few and x.is_cpu and x.numel() <= _INT4_TOKENS * self.in_features and cpu_int4.supports(weight)
        if few and not (self.exact and x.dtype == torch.float32):
            if self._int4 is None:  # made when first needed: evaluation runs without it
                self._int4 = cpu_int4.prepare(weight)
            return cpu_int4.matmul(reference.permuted(x, weight), self._int4, bias)
        return (packed_linear if whole else packed_linear_now)(x, weight, bias, self.counters)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bits={self.bits}, group={self.group_size}"
