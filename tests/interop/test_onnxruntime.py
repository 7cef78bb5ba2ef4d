"""ONNX Runtime multiplies by the codes of the demo model as they are (MatMulNBits; `make interop`)."""

import pytest
import torch
from engine_bytes import KINDS, activations, packed_bytes, relative
from packed import random_weight

pytestmark = pytest.mark.peers


def multiplied(weight, x, accuracy_level):
    """Return x @ W.T as ONNX Runtime computes it from the codes. `accuracy_level` 4: it rounds x to int8."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = weight.q.shape
    groups = weight.scale.shape[1]
    constants = {
        "B": packed_bytes(weight.q, weight.bits).reshape(rows, groups, -1),
        "scales": weight.scale.float().numpy(),
    }
    if not weight.symmetric:
        constants["zero_points"] = packed_bytes(weight.zero, weight.bits)
    node = helper.make_node(
        "MatMulNBits",
        ["x", *constants],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=weight.bits,
        block_size=columns // groups,
        accuracy_level=accuracy_level,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, rows])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def check(weight):
    """Compare with the dequantized weight; with int8 activations the error is that of rounding them."""
    W, x = weight.dequantize(torch.float32), activations(weight.q.shape[1])
    expected = x @ W.T
    assert relative(multiplied(weight, x, 0), expected) < 1e-5
    # Each group of x is rounded in steps of max/127. The error of a rounded number has the variance step²/12.
    groups = weight.scale.shape[1]
    steps = x.unflatten(1, (groups, -1)).abs().amax(-1) / 127
    variance = (steps**2 / 12) @ (W**2).unflatten(1, (groups, -1)).sum(-1).T
    error = multiplied(weight, x, 4) - expected
    assert error.square().mean() < 1.3 * variance.mean()


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), KINDS)
def test_it_multiplies_by_the_demo_models_codes(demo_layers, bits, group_size, symmetric):
    for weight in demo_layers(bits, group_size, symmetric):
        check(weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_it_multiplies_by_groups_of_128(bits, symmetric):
    check(random_weight(96, 512, 4, bits, symmetric))
