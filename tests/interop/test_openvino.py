"""OpenVINO multiplies by the codes of the demo model, which stay packed in its compiled graph (`make interop`)."""

import pytest
import torch
from engine_bytes import KINDS, activations, packed_bytes, relative
from packed import random_weight

pytestmark = pytest.mark.peers


def compiled(weight):
    """Return the linear x @ W.T as OpenVINO compiles it, and what must live as long as it does."""
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    rows, columns = weight.q.shape
    groups = weight.scale.shape[1]
    kind = {2: openvino.Type.u2, 4: openvino.Type.u4, 8: openvino.Type.u8}[weight.bits]
    # A constant uses the memory of the array. The zero points of all rows are one stream.
    arrays = [packed_bytes(weight.q, weight.bits), packed_bytes(weight.zero.reshape(1, -1), weight.bits)]
    shapes = [[rows, groups, columns // groups], [rows, groups, 1]]
    codes, zeros = (
        ops.convert(ops.constant(openvino.Tensor(array, openvino.Shape(shape), kind)), np.float32)
        for array, shape in zip(arrays, shapes, strict=True)
    )
    scales = ops.constant(weight.scale.float().numpy()[:, :, None])
    W = ops.reshape(ops.multiply(ops.subtract(codes, zeros), scales), ops.constant(np.array([rows, columns])), False)
    x = ops.parameter([-1, columns], np.float32)
    # Otherwise some CPUs round the activations.
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    model = openvino.Model([ops.matmul(x, W, False, True)], [x])
    return openvino.Core().compile_model(model, "CPU", exact), arrays


def check(weight):
    """Compare with the dequantized weight, and see that the codes stay packed."""
    model, arrays = compiled(weight)
    x = activations(weight.q.shape[1])
    found = torch.from_numpy(model(x.numpy())[0])
    assert relative(found, x @ weight.dequantize(torch.float32).T) < 1e-5
    operations = model.get_runtime_model().get_ops()
    (linear,) = [node for node in operations if node.get_rt_info()["layerType"].astype(str) == "FullyConnected"]
    constants = [value.get_element_type().get_type_name() for value in linear.input_values()]
    assert constants.count(f"u{weight.bits}") == len(arrays)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), KINDS)
def test_it_multiplies_by_the_demo_models_codes(demo_layers, bits, group_size, symmetric):
    for weight in demo_layers(bits, group_size, symmetric):
        check(weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_it_multiplies_by_groups_of_128(bits, symmetric):
    check(random_weight(96, 512, 4, bits, symmetric))
