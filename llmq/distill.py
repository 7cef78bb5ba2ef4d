"""End to end: codes, scales, norms and biases of a packed model, trained until it predicts what the original predicts.

Objective:    KL(original || quantized) of the next token, mean over calibration tokens

Block by block, every layer can only be told to be like itself; here the layers learn together what matters in the end.
EfficientQAT (Chen et al., arXiv 2407.11062) ends with such a phase for the scales alone, on the text's next tokens;
LLM-QAT (Liu et al., arXiv 2305.17888) distils, as here: the original's predictions say more per token than the text.

The state with the least error on held-out text is kept, the start among them. The file format stays what it is; norms
and biases, which it stores as they are, may change with the rest.

Memory: the original in its compute dtype; the packed model's weights once as latent codes, with their gradients and
the two moments of Adam (16 bytes a weight; 4 where the codes stay).
"""

# torch annotates only part of itself: what it leaves unknown is not reported here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear
from tqdm import tqdm

from llmq.block import Compute
from llmq.config import Tuned
from llmq.data import Tokens
from llmq.latent import Latent, batches
from llmq.load import Checkpoint, load

_CHECKS = 5  # looks at the held-out text, or a few more


class _Learning(nn.Module):
    """Stands where a packed linear stood."""

    def __init__(self, latent: Latent, bias: Tensor | None) -> None:
        super().__init__()
        self.latent = latent
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.latent().to(x.dtype), self.bias)


class Student:
    """A packed checkpoint that can learn."""

    def __init__(self, checkpoint: Checkpoint, compute: Compute) -> None:
        self.checkpoint = checkpoint
        self.model = load(checkpoint.directory, str(compute.device), torch.float32).requires_grad_(False)
        self.latents: dict[str, Latent] = {}
        for name in checkpoint.linears:
            self.latents[name] = Latent(checkpoint.weight(name)).to(compute.device)
            self.model.set_submodule(name, _Learning(self.latents[name], self.model.get_submodule(name).bias))
        latent = {id(p) for each in self.latents.values() for p in each.parameters()}
        self.plain = {n: p for n, p in self.model.named_parameters() if p.ndim == 1 and id(p) not in latent}

    def groups(self, settings: Tuned) -> list[dict[str, Any]]:
        """What Adam is to change, and how fast."""
        codes = [latent.V for latent in self.latents.values()]
        others = [*(latent.factor for latent in self.latents.values()), *self.plain.values()]
        groups = [(codes, settings.end_rate), (others, settings.end_scale_rate)]
        for parameters, rate in groups:
            for parameter in parameters:
                parameter.requires_grad_(rate > 0)
        return [{"params": parameters, "lr": rate} for parameters, rate in groups if rate > 0]

    def tensors(self) -> dict[str, Tensor]:
        """The changed tensors of the checkpoint, as they would be stored now."""
        changed: dict[str, Tensor] = {}
        for name, latent in self.latents.items():
            symmetric = self.checkpoint.scheme["symmetric"]
            changed |= self.checkpoint.format.encode(name, latent.rounded(), symmetric)
        for name, parameter in self.plain.items():
            changed[name] = parameter.detach().to(self.checkpoint.files.read(name).dtype)
        return {name: tensor.cpu() for name, tensor in changed.items()}


def distill(
    directory: Path, original: Any, tokens: Tokens, settings: Tuned, compute: Compute, progress: bool = False
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Train the packed checkpoint in `directory`.

    Args:
        original: the model it was made of, ready to run on the same device.

    Returns:
        all tensors of the checkpoint that changed, by name; and the mean KL on held-out text before and after.
    """
    student = Student(Checkpoint(directory), compute)
    optimizer = torch.optim.Adam(student.groups(settings), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.end_steps)

    def divergence(ids: Int64[Tensor, "batch length"]) -> Float[Tensor, ""]:
        with torch.autocast(compute.device.type, compute.precision, enabled=compute.precision != torch.float32):
            with torch.no_grad():
                wanted = original(input_ids=ids.to(compute.device), use_cache=False).logits
            given = student.model(input_ids=ids.to(compute.device), use_cache=False).logits
        wanted, given = (each.float().log_softmax(-1).flatten(0, 1) for each in (wanted, given))
        return kl_div(given, wanted, log_target=True, reduction="batchmean")

    def held_out() -> float:
        with torch.no_grad():
            return sum(float(divergence(ids[None])) for ids in tokens.held_out) / len(tokens.held_out)

    before = held_out()
    best, least = {}, before
    steps = batches(len(tokens.train), settings.end_batch, settings.end_steps)
    bar = tqdm(steps, "training", total=settings.end_steps, disable=not progress, unit="step")
    for step, batch in enumerate(bar):
        with torch.enable_grad():
            loss = divergence(tokens.train[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"KL {loss.detach():.4f}", refresh=False)
        if (step + 1) % max(1, settings.end_steps // _CHECKS) == 0 or step + 1 == settings.end_steps:
            now = held_out()
            if now < least:
                best, least = student.tensors(), now
    return best, (before, least)
