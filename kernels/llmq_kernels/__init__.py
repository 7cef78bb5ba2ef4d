"""Low-bit weights for inference: a memory layout and matmuls on it. Knows torch and Triton, and nothing of llmq."""

from llmq_kernels.experts import ExpertWeights, stack_experts
from llmq_kernels.experts_op import routed_linear
from llmq_kernels.layout import PackedWeight, pack, stack
from llmq_kernels.op import new_counters, packed_linear
from llmq_kernels.reference import dequantize, matmul

__all__ = [
    "ExpertWeights",
    "PackedWeight",
    "dequantize",
    "matmul",
    "new_counters",
    "pack",
    "packed_linear",
    "routed_linear",
    "stack",
    "stack_experts",
]
