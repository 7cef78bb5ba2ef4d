"""Whether a run fits, before it begins: layout ──► workload ──► memory, disk, seconds ──► plan ──► words or refusal."""

from llmq.plan.plan import plan_of
from llmq.plan.proof import prove
from llmq.plan.refuse import check_plan
from llmq.plan.words import lines
from llmq.plan.workload import States

__all__ = ["States", "check_plan", "lines", "plan_of", "prove"]
