"""A GPU made of CPU memory, for machines without one. Operations on tensors of both devices fail there as on CUDA.

Its name is "meta": a torch that is built for CPUs makes no slices of tensors that say they are on CUDA.
"""

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("meta")
# To read a number, or to learn the size of a result, is to wait until the GPU has done all that is queued.
_WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}


class OnGpu(Tensor):
    """A tensor that says it is on the GPU. `inner` has its numbers."""

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, inner.shape, **layout, dtype=inner.dtype, device=GPU)
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self):
        return OnGpu(self.inner)

    @data.setter
    def data(self, other):
        Tensor.data.__set__(self, other)
        self.inner = other.inner

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        if isinstance(mode := _get_current_dispatch_mode(), FakeGpu):
            mode.waits.append("tolist")
        return self.inner.tolist()


class FakeGpu(TorchDispatchMode):
    """Inside of it, tensors that are made on GPU or moved there are OnGpu.

    Attributes:
        on_cpu: operations that gave others.
        copies: number of copies by shape and direction, "to" or "from" the GPU. Numbers do not count.
        waits: operations for which the program waits until the GPU has done all that is queued.
    """

    def __init__(self):
        super().__init__()
        self.on_cpu, self.copies, self.waits = [], Counter(), []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = _run(operation, args, kwargs or {})
        name, was_there = operation.overloadpacket.__name__, any(isinstance(tensor, OnGpu) for tensor in tensors)
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(leaf.ndim and not isinstance(leaf, OnGpu) for leaf in leaves):
            self.on_cpu.append(str(operation))
        if name in ("_to_copy", "copy_"):
            source, target = tensors[-1], leaves[0]
            if isinstance(source, OnGpu) != isinstance(target, OnGpu):
                self.copies[tuple(target.shape), "to" if isinstance(target, OnGpu) else "from"] += target.ndim > 0
                if isinstance(source, OnGpu):
                    self.waits.append(name)
        by_mask = name in ("index", "index_put_") and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        if was_there and (name in _WAITS or by_mask):
            self.waits.append(name)
        return result


def _run(operation, args, kwargs):
    """Run an operation on the inner tensors. Its results are OnGpu if its tensors are, or if it is asked for that."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = [isinstance(tensor, OnGpu) for tensor in tensors]
    # As on CUDA, a copy may cross over, and numbers without dimensions are on both.
    crosses = operation.overloadpacket.__name__ in ("_to_copy", "copy_")
    if any(on_gpu) and not crosses and not all(t.ndim == 0 or isinstance(t, OnGpu) for t in tensors):
        raise RuntimeError(f"{operation}: some tensors are on the CPU, others on the GPU")
    device = kwargs.get("device")
    to_gpu = any(on_gpu[:1] if crosses else on_gpu) if device is None else torch.device(device) == GPU
    kwargs = kwargs if device is None else kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map(lambda leaf: leaf.inner if isinstance(leaf, OnGpu) else leaf, (args, kwargs))
    run = _with_float32_result if operation == torch.ops.aten.mm.dtype else operation
    result = run(*args, **kwargs)
    written = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, OnGpu)}  # in place

    def placed(leaf):
        if not isinstance(leaf, Tensor) or not to_gpu:
            return leaf
        return written[id(leaf)] if id(leaf) in written else OnGpu(leaf)

    return tree_map(placed, result)


def _with_float32_result(A, B, dtype):
    """Multiply factors of 16 bits with a float32 result: torch has this operation for CUDA alone."""
    assert A.dtype == B.dtype in (torch.float16, torch.bfloat16)
    assert dtype == torch.float32
    return A.float() @ B.float()
