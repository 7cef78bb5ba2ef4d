"""The bytes of one group of linears while its inputs are summed and while it is solved; of what a block keeps, too.

See `memory_model.py` for the terms.
"""

from collections.abc import Sequence

from llmq.calibration.ordered_sums import shares_ahead
from llmq.models.block_structure import Group
from llmq.plan.block_shapes import Layout
from llmq.plan.workload import Workload
from llmq.run.block_quantizer import Run

# Buffers that libraries (OpenMP, oneDNN, the allocator) take for themselves: an allowance, not derived.
_SCRATCH = 50_000_000
# Float32 tensors alive at once in a forward, each as wide as the widest linear. A Llama layer of 1024 x 2752 took 6.0
# at 2048 tokens (2026-11-28). "Widest" counts gate and up as one, so there is room for a factor of two.
_ACTIVATIONS = 6
# Rows that are rounded or moved together where that is done strip by strip (_ROWS in algorithms/).
_STRIP = 1024


def kept_bytes(load: Workload, layout: Layout, solved: list[Group], stage: list[Group], last: bool) -> int:
    """Return what a block keeps for its next run, where it computes.

    Attention and MLP end with a linear: what enters it is kept while the linear is being solved, what leaves it after.
    """
    if not (load.sequential and load.statistics):
        return 0
    leaving = sum(layout.shape(group)[0] for group in solved if group.ends)
    entering = sum(layout.shape(group)[1] for group in stage if group.ends)
    width = (leaving + entering) * (1 if last else load.streams)
    return min(load.most_kept, (load.tokens + load.held_out) * width * load.factor_bytes)


def forward_bytes(load: Workload, layout: Layout, groups: Sequence[Group]) -> int:
    """Return what a micro-batch needs up to these groups, with copies of weights in the dtype that matmuls want."""
    widest = max((max(layout.shape(group)) for group in groups), default=0)
    copies = layout.weight_count * load.factor_bytes if load.linear_bytes != load.factor_bytes else 0
    return _SCRATCH + load.batch * widest * 4 * _ACTIVATIONS + copies


def sum_bytes(load: Workload, layout: Layout, group: Group) -> int:
    """Return the bytes of a group's statistics while they are summed, or when they are finished if that is more."""
    (rows, columns), (target_moment, multiplied) = layout.shape(group), load.target_moment(layout, group)
    late = shares_ahead({"H": (columns, columns), "target_moment": (target_moment,)}, load.ranks)
    growing = 4 * (load.sums + late) * (columns**2 + target_moment)
    # H and the sum for T, twice each; W in float32, and its product with the sum of either text.
    finished = 4 * (2 * columns**2 + 2 * target_moment + 3 * rows * columns) if multiplied and target_moment else 0
    return rows * columns * load.linear_bytes + max(growing, finished)


def problem_bytes(load: Workload, layout: Layout, group: Group) -> int:
    """Return the bytes of a problem that waits: W, H twice and T twice.

    W of a single linear in the right dtype is the block's own weight and takes nothing more.
    """
    size, dtype = layout.weights_of(group), 4 if load.statistics else load.linear_bytes
    W = dtype * size * (len(group.linears) > 1 or dtype != load.linear_bytes)
    return W + 4 * (2 * layout.moment_size(group) + 2 * size * (load.streams == 2)) if load.statistics else W


def solving_bytes(load: Workload, layout: Layout, group: Group, run: Run) -> int:
    """Return the bytes of a problem when its weights are moved, rounded or put back, whichever is most."""
    (rows, columns), problem = layout.shape(group), problem_bytes(load, layout, group)
    size, square, strip = rows * columns, columns**2, 4 * _STRIP * columns
    if not load.statistics:
        return problem + size + strip
    # The moved W and a factor of H. On a GPU: three factors, and the next one while it replaces H.
    moving = problem + 4 * (size + square * (4 if load.on_gpu else 1)) + strip if load.streams == 2 else 0
    # W, H twice and its factor (on a GPU also its inverse, and the identity that it is made of); the rows being solved,
    # transposed, and their errors; codes, transposed and not.
    squares = 5 if load.on_gpu else 3
    rounding = 4 * (size + squares * square + 2 * min(rows, load.rows_per_solve) * columns) + 2 * size
    if run.config.effort == "best" or run.config.gptq.passes:
        rounding += 3 * 4 * size  # coordinate descent: the rounded W, its error, and the error times H
    # W and its codes; one linear dequantized, then in the dtype of the block; H twice.
    back = 4 * size + size + size // len(group.linears) * (4 + load.linear_bytes) + 8 * square
    return max(moving, rounding, back)
