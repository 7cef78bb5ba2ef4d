"""Low-bit weights for inference: a memory layout and matmuls on it. Knows torch and Triton, and nothing of llmq."""

from llmq_kernels.layout import PackedWeight, pack, stack
from llmq_kernels.op import new_counters, packed_linear
from llmq_kernels.reference import dequantize, matmul

__all__ = ["PackedWeight", "dequantize", "matmul", "new_counters", "pack", "packed_linear", "stack"]
