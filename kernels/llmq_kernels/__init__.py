"""Low-bit weights for inference: a memory layout and matmuls on it. Knows torch, and nothing of llmq."""

from llmq_kernels.layout import PackedWeight, pack
from llmq_kernels.reference import dequantize, matmul

__all__ = ["PackedWeight", "dequantize", "matmul", "pack"]
