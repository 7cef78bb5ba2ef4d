"""What a student is trained for, summed over the tokens that count.

    text    -log p(next token)        kl    KL(original || student)        both    the sum of the two

Only tokens with a label count: of a conversation, those of the answers.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llmq.calibration.answers import IGNORED
from llmq.training.kl_loss import divergence


class Learner(nn.Module):
    """A model with its loss, as transformers' Trainer wants it. Its state is what learns, nothing else.

    Args:
        learning: what learns, by name.
        original: the model whose predictions are wanted; None if the loss needs none.
        loss: text, kl or both.
    """

    accepts_loss_kwargs = True  # Trainer then says how many labels a whole step has

    def __init__(self, model: nn.Module, learning: dict[str, nn.Parameter], original: Any, loss: str) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self._learning, self._original = learning, [original]  # in a list: it is no part of this module

    def forward(
        self,
        input_ids: Int64[Tensor, "batch length"],
        labels: Int64[Tensor, "batch length"],
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the loss: the sum over all labels, divided by `num_items_in_batch`, or else by their number."""
        counts = labels[:, 1:] != IGNORED
        given = self.model(input_ids=input_ids, use_cache=False).logits[:, :-1][counts]
        total = torch.zeros((), device=given.device)
        if self.loss != "kl":
            total = cross_entropy(given.float(), labels[:, 1:][counts], reduction="sum")
        if self.loss != "text":
            with torch.no_grad():
                wanted = self._original[0](input_ids=input_ids, use_cache=False).logits[:, :-1][counts]
            total = total + divergence(given, wanted) * len(given)
        return {"loss": total / (len(given) if num_items_in_batch is None else num_items_in_batch)}

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return what learns."""
        return {name: tensor.detach() for name, tensor in self._learning.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Any, *_: Any, **__: Any) -> Any:
        """Set what learns."""
        for name, tensor in self._learning.items():
            tensor.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])  # pyright: ignore[reportPrivateUsage]
