"""Write a mixture of experts made of a Llama: a real mixture to measure on, which nobody has to download.

The result is a Mixtral. It has the attention of the Llama, and in place of each MLP some experts and a router:

    expert e    the MLP of the model, dithered with a seed of its own (see dither.py)
    router      logits = s * C (x / r)        x: what enters the MLP; r: the root mean square of each of its channels

All experts compute nearly the same function, and the weights of the chosen ones sum to 1. So the mixture writes text as
well as the dense model does. The rows of C [experts, width] are centroids of many x / r. Spherical k-means finds them:
each token belongs to the centroid with the smallest angle. Clusters of real text differ in size, so some experts get
many tokens and some get few. The scale s of a layer is set such that the second of two experts has a weight of 0.3 for
the median token: routing is decisive, but both experts count.

The script prints the KL divergence from the dense model, which is what `dither.py` writes for the same seed. It is not
zero, because two ditherings differ. Then it prints for each layer the shares of tokens that its experts get. For the
demo model the script takes 204 s on one core of a 2-core AVX2 machine, and 1.4 GB on disk (2026-11-28).

    python scripts/upcycle.py --output demo-upcycled
    python scripts/compare_methods.py --model demo-upcycled --bits 4
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dither import dither, dithered
from torch import Tensor
from torch.nn.functional import normalize, one_hot
from transformers import MixtralConfig, MixtralForCausalLM

from llmq.calibration.texts import evaluation_chunks, read_text, windows
from llmq.checkpoint.model_files import companions_of
from llmq.checkpoint.writer import Writer
from llmq.cli import run
from llmq.core.errors import RequestError
from llmq.core.settings import Calibration
from llmq.models.model_source import ModelSource
from llmq.runtime.evaluation import evaluate, logits_of, remembered, score

_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # of Mixtral's experts on disk
_SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SHARED += ("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range")
_SHARED += ("rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters")
_SECOND = 0.3  # weight of the second of two experts, for the median token
_ROUNDS = 50  # of k-means, at most


@dataclass(frozen=True)
class UpcycleConfig:
    """Turn the MLPs of a Llama into mixtures of experts, write the result, and compare it with the dense model."""

    output: Path
    """Directory to write to; it must be new or empty."""
    model: str = "demo"
    """A Llama: directory, hub id, .gguf file, or demo for the demo model."""
    experts: int = 8
    """Experts in each layer."""
    top_k: int = 2
    """Experts that each token goes to."""
    seed: int = 20261122
    """Seed of the dense weights, the same as in dither.py. Expert e gets this seed + 1 + e."""
    calibration: str = "pydoc"
    """Text whose hidden states are clustered."""
    samples: int = 16
    """Sequences of that text."""
    sequence_length: int = 512
    """Tokens in a sequence."""
    text: str = "pytopics"
    """Text for the KL divergence. Shares of tokens are printed for both texts."""
    limit: int = 8
    """Sequences of a text that the mixture is run on."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts or self.experts < 2:
            raise RequestError(
                "there must be at least 2 experts, and top-k must be between 1 and their number; "
                f"got {self.experts} experts, top-k {self.top_k}"
            )


def upcycle(config: UpcycleConfig) -> None:
    """Write the mixture, then print what it is."""
    source = ModelSource(config.model)
    mixture = _mixtral(source.config, config)
    tokens = windows(source.tokenizer, Calibration(config.calibration, config.samples, config.sequence_length))
    text = read_text(config.text, evaluation=True)
    chunks = evaluation_chunks(source.tokenizer, text, config.sequence_length, config.limit)
    with Writer(config.output) as writer:
        for tensors in _experts(source, config):
            writer.put(tensors)
        # All weights that the dense model runs with are in the skeleton now.
        source.skeleton.tie_weights()
        for name, states in _mlp_inputs(source, tokens).items():
            router = _router(states, config).to(source.dtype)
            writer.put({f"{name}.block_sparse_moe.gate.weight": router})
        dense = remembered(logits_of(source.skeleton), chunks)
        writer.finish(replace(companions_of(source), config=mixture.to_dict()), source.dtype)
    model = MixtralForCausalLM.from_pretrained(config.output, dtype=torch.float32)
    routed: list[Tensor] = []
    model.config.output_router_logits = True
    model.register_forward_hook(lambda *call: routed.append(torch.stack(call[-1].router_logits)))
    result = evaluate(model, chunks, dense)
    print(
        f"perplexity of the dense model {score(dense, chunks).perplexity:.3f}, of the mixture {result.perplexity:.3f}"
    )
    print(f"KL of the mixture from the dense model {result.kl:.4f} nats per token")
    shares = {config.text: _shares(routed, config.top_k)}
    routed.clear()
    evaluate(model, tokens[: config.limit])
    print(*_table(shares | {config.calibration: _shares(routed, config.top_k)}), sep="\n")


def _mixtral(llama: Any, config: UpcycleConfig) -> MixtralConfig:
    """Return the config of the mixture. Raises RequestError if no Mixtral computes what the model does."""
    if llama.model_type != "llama" or llama.attention_bias or llama.mlp_bias:
        raise RequestError(f"{config.model} is no Llama without biases, so its blocks cannot be those of a Mixtral")
    experts = {"num_local_experts": config.experts, "num_experts_per_tok": config.top_k, "sliding_window": None}
    shared = {name: getattr(llama, name) for name in _SHARED}
    return MixtralConfig(**shared, **experts, architectures=["MixtralForCausalLM"])


def _experts(source: ModelSource, config: UpcycleConfig) -> Iterator[dict[str, Tensor]]:
    """Yield all tensors of the mixture but its routers. On the way, load the dense model into the skeleton."""
    generators = [torch.Generator().manual_seed(config.seed + 1 + e) for e in range(config.experts)]
    for name, tensor, original in dithered(source, config.seed):
        source.skeleton.load_state_dict({name: tensor}, strict=False, assign=True)
        block, is_mlp, linear = name.removesuffix(".weight").partition(".mlp.")
        if is_mlp:
            place = f"{block}.block_sparse_moe.experts"
            experts = {f"{place}.{e}.{_NAMES[linear]}.weight": dither(original, g) for e, g in enumerate(generators)}
        else:
            experts = {name: tensor}
        yield {name: expert.to(source.dtype) for name, expert in experts.items()}


@torch.no_grad()
def _mlp_inputs(source: ModelSource, tokens: Tensor) -> dict[str, Tensor]:
    """Return what enters the MLP of each block, [tokens, width], by the name of the block."""
    seen: dict[str, list[Tensor]] = {name: [] for name in source.block_names}
    for name, states in seen.items():
        mlp = source.skeleton.get_submodule(f"{name}.mlp")
        mlp.register_forward_pre_hook(lambda _, inputs, states=states: states.append(inputs[0][0]))
    for sequence in tokens:
        source.skeleton.model(input_ids=sequence[None], use_cache=False)
    return {name: torch.cat(states) for name, states in seen.items()}


def _router(states: Tensor, config: UpcycleConfig) -> Tensor:
    """Return the weight [experts, width] of a router, for inputs like `states` [tokens, width]."""
    inverse = states.square().mean(0).clamp_min(1e-12).rsqrt()
    centers = inverse * centroids(states * inverse, config.experts, torch.Generator().manual_seed(config.seed))
    # Only differences of logits count. Without what the centroids share, these are precise in 16 bit, too.
    centers = centers - centers.mean(0)
    best = (states @ centers.T).topk(2).values
    return centers * (math.log(1 / _SECOND - 1) / (best[:, 0] - best[:, 1]).median())


def centroids(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` unit vectors, the centroids of spherical k-means of `points` [n, width].

    Raises RequestError if there are fewer different points than centroids.
    """
    points = normalize(points)
    different = points.unique(dim=0)
    if len(different) < count:
        raise RequestError(f"{len(different)} different tokens are too few for {count} experts; raise --samples")
    centers = different[torch.randperm(len(different), generator=generator)[:count]]
    for _ in range(_ROUNDS):
        nearest = one_hot((points @ centers.T).argmax(1), count).to(points.dtype)
        # A centroid that no point is near to stays where it is.
        moved = torch.where(nearest.any(0)[:, None], normalize(nearest.T @ points), centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers


def _shares(routed: list[Tensor], top_k: int) -> Tensor:
    """Return the share of tokens of each expert, [layers, experts]. `routed`: logits [layers, tokens, experts]."""
    logits = torch.cat(routed, 1)
    chosen = one_hot(logits.topk(top_k).indices, logits.shape[-1])
    return chosen.float().mean((1, 2))


def _table(shares: dict[str, Tensor]) -> Iterator[str]:
    """Yield the lines of a table in Markdown: what the experts of each layer get of each text."""
    experts = next(iter(shares.values())).shape[1]
    yield f"\nshares of tokens: of the expert with least, the median, the most; {1 / experts:.3f} would be even\n"
    yield "| layer | " + " | ".join(shares) + " |"
    yield "|---|" + "---|" * len(shares)
    for layer, rows in enumerate(zip(*shares.values(), strict=True)):
        cells = (f"{row.min():.3f}, {row.median():.3f}, {row.max():.3f}" for row in rows)
        yield f"| {layer} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    run(UpcycleConfig, upcycle)
