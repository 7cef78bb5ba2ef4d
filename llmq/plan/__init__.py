"""Tells before a run starts whether it fits into memory and onto the disk, and how long it takes.

block_shapes ─► workload ─► memory_model, disk, time_model ─► plan ─► render (prints it, or raises RequestError)
                                           ▲
                    microbenchmarks times the work on this machine (dry run only)
"""

from llmq.plan.plan import plan_of
from llmq.plan.render import check_plan, lines

__all__ = ["check_plan", "lines", "plan_of"]
