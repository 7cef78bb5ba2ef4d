"""The statistics of the experts of a block, one group after the other, as `--expert-statistics` asks for them."""

from collections.abc import Iterator
from dataclasses import replace

from llmq.algorithms.shrinkage import Judge, chosen_strength, judges_among, shrunk
from llmq.calibration.block_runner import Block
from llmq.calibration.expert_statistics import ExpertStatistics
from llmq.calibration.input_statistics import InputStatistics
from llmq.core.config import QuantizeConfig
from llmq.core.timing import Clock
from llmq.models.block_structure import Group


def statistics_of_experts(
    block: Block, groups: list[Group], config: QuantizeConfig, clock: Clock, last: bool
) -> Iterator[tuple[Group, InputStatistics]]:
    """Yield each group of the experts of one module with its statistics. The block runs over the text once.

    A group must be rounded before the next one is asked for. `last`: see `collect_statistics`.
    """
    kind = config.expert_statistics
    statistics = ExpertStatistics(block, groups, clock, last, kind == "all-tokens")
    strengths = _strengths(statistics, groups, config, clock) if kind == "routed" else {}
    held_out = statistics.tokens(held_out=True)
    for group in groups:
        assert group.expert is not None
        own, layer = statistics.of(group), statistics.layer(group)
        if kind == "routed":
            with clock("statistics"):
                own = shrunk(own, layer, held_out[group.expert.number], strengths[_place(group)])
        elif kind == "layer":  # the target belongs to the expert's own tokens: under the layer's H it moves too far
            alone = {"target_moment": None, "target_moment_val": None}
            own = replace(own, H=layer.H, H_val=layer.H_val, borrowed=1.0, **alone)
        yield group, own


def _place(group: Group) -> str:
    return group.linears[-1].rpartition(".")[2]


def _strengths(
    statistics: ExpertStatistics, groups: list[Group], config: QuantizeConfig, clock: Clock
) -> dict[str, float]:
    """Return how strongly experts are helped by the others, by the last linear of a group."""
    tokens, held_out = statistics.tokens(held_out=False), statistics.tokens(held_out=True)
    chosen = judges_among(tokens, held_out)
    judges: dict[str, list[Judge]] = {_place(group): [] for group in groups}
    for group in groups:
        if group.expert is not None and group.expert.number in chosen:
            own, number = statistics.of(group, with_target=False), group.expert.number
            judges[_place(group)].append(Judge(tokens[number], held_out[number], own.H, own.H_val))
    with clock("statistics"):
        layers = {_place(group): statistics.layer(group) for group in groups}
        return {place: chosen_strength(judges[place], layers[place], config.gptq.damping) for place in judges}
