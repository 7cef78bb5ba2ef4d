"""Whether a run fits, before it begins: layout ──► load ──► memory, disk, seconds ──► plan ──► words or refusal."""

from llmq.plan.load import states_of
from llmq.plan.plan import plan_of
from llmq.plan.proof import prove
from llmq.plan.refuse import check_plan
from llmq.plan.words import lines

__all__ = ["check_plan", "lines", "plan_of", "prove", "states_of"]
