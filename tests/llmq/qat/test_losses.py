import pytest
import torch
from tiny import tiny_model
from torch.nn.functional import cross_entropy, kl_div

from llmq.calibration.answers import IGNORED
from llmq.qat.losses import Learner

MODEL, ORIGINAL = tiny_model("llama-gqa"), tiny_model("llama-gqa", seed=1)
IDS = torch.randint(2, 384, (2, 12), generator=torch.Generator().manual_seed(0))


def labels():
    """The last labels of the first sequence and the middle of the second one count."""
    given = torch.full_like(IDS, IGNORED)
    given[0, 8:], given[1, 3:6] = IDS[0, 8:], IDS[1, 3:6]
    return given


def wanted(kind):
    """The losses of the seven tokens that count, each computed alone."""
    losses = []
    for row, at in [*((0, i) for i in range(8, 12)), *((1, i) for i in range(3, 6))]:
        q, p = (m(input_ids=IDS[row : row + 1, :at]).logits[0, -1].double().log_softmax(-1) for m in (MODEL, ORIGINAL))
        text = cross_entropy(q[None], IDS[row, at][None])
        kl = kl_div(q, p, reduction="sum", log_target=True)
        losses.append({"text": text, "kl": kl, "both": text + kl}[kind])
    return torch.stack(losses)


@pytest.mark.parametrize("kind", ["text", "kl", "both"])
def test_only_tokens_with_a_label_count_and_each_counts_the_same(kind):
    learner = Learner(MODEL, {}, ORIGINAL, kind)
    with torch.no_grad():
        expected = wanted(kind)
        torch.testing.assert_close(learner(IDS, labels())["loss"].double(), expected.mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            learner(IDS, labels(), 100)["loss"].double(), expected.sum() / 100, rtol=1e-4, atol=0
        )


def test_gradients_flow_into_the_student_alone():
    learning = {"w": MODEL.lm_head.weight}
    Learner(MODEL, learning, ORIGINAL, "both")(IDS, labels())["loss"].backward()
    assert float(MODEL.lm_head.weight.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in ORIGINAL.parameters())
    MODEL.zero_grad()


def test_its_state_is_what_learns_and_nothing_else():
    weight = torch.nn.Parameter(torch.zeros(3))
    learner = Learner(MODEL, {"w": weight}, ORIGINAL, "kl")
    assert list(learner.state_dict()) == ["w"]
    learner.load_state_dict({"w": torch.arange(3.0)}, False)
    assert weight.tolist() == [0, 1, 2]
    assert not any("_original" in name for name, _ in learner.named_modules())
