"""A GPU made of CPU memory, for machines without one. Operations on tensors of both devices fail there as on CUDA.

Its name is "meta": a torch that is built for CPUs makes no slices of tensors that say they are on CUDA.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("meta")


class OnGpu(Tensor):
    """A tensor that says it is on the GPU. `inner` has its numbers."""

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, inner.shape, **layout, dtype=inner.dtype, device=GPU)
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})

    def tolist(self):
        return self.inner.tolist()


class FakeGpu(TorchDispatchMode):
    """Inside of it, tensors that are made on GPU or moved there are OnGpu. `on_cpu`: operations that gave others."""

    def __init__(self):
        super().__init__()
        self.on_cpu = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = _run(operation, args, kwargs or {})
        if any(isinstance(leaf, Tensor) and leaf.ndim and not isinstance(leaf, OnGpu) for leaf in tree_leaves(result)):
            self.on_cpu.append(str(operation))
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
    result = operation(*args, **kwargs)
    written = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, OnGpu)}  # in place

    def placed(leaf):
        if not isinstance(leaf, Tensor) or not to_gpu:
            return leaf
        return written[id(leaf)] if id(leaf) in written else OnGpu(leaf)

    return tree_map(placed, result)
