"""Whether a run fits, before it begins: layout ──► workload ──► memory, disk, seconds ──► plan ──► words or refusal."""

from llmq.plan.plan import plan_of
from llmq.plan.render import check_plan, lines
from llmq.plan.workload import States

__all__ = ["States", "check_plan", "lines", "plan_of"]
