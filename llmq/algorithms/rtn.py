"""Round to nearest: the baseline every other method must beat. Looks at the weights only.

Objective: |w - ŵ| for each weight on the grid that spans its own group (see llmq/grid.py).
"""

from llmq.algorithms.problem import Problem, Solution, round_to_nearest


def solve(problem: Problem) -> Solution:
    """Codes for the stacked rows of one group of linears."""
    return round_to_nearest(problem)
