"""The PTX that turns words into values, run by an emulator on every code there is, and its twin's arithmetic."""

import itertools

import numpy as np
import ptx
import pytest
import torch
from llmq_kernels import pack
from llmq_kernels.layout import WIDTHS, block_of, top_bits, unpack
from llmq_kernels.planes import field_of, offset_of, plane_asm, shift_of
from weights import BITS, some_codes

REPEATS = 64
"""Times that every code is tried in both halves of a register, each time beside other random bits."""

PLANES = [(bits, plane) for bits in BITS for plane in range(16 // WIDTHS[bits][-1])]


def words_with(codes, bits, plane, generator):
    """(registers of two words that hold `codes` at a plane and noise elsewhere, the same for high words)."""
    width = WIDTHS[bits][0]
    low = generator.integers(0, 2**16, codes.shape, dtype=np.uint32)
    top = generator.integers(0, 2**16, codes.shape, dtype=np.uint32)
    shift = np.uint32(width * (plane % (16 // width)))
    low = low & ~np.uint32((2**width - 1) << shift) | (codes & np.uint32(2**width - 1)) << shift
    if len(WIDTHS[bits]) == 2:
        at, mask = np.uint32(top_bits(bits, plane)), np.uint32(2 ** WIDTHS[bits][1] - 1)
        top = top & ~(mask << at) | codes >> np.uint32(width) << at
    return pair(low), pair(top)


def pair(words):
    """[..., 2] words as registers, the first one in the low half."""
    return words[..., 0] | words[..., 1] << np.uint32(16)


def unpair(register, bf16):
    halves = (register, register >> np.uint32(16))
    return np.stack([ptx.decode(half.astype(np.uint16), bf16) for half in halves], axis=-1)


def every_code(bits, generator):
    """[n, 2]: every code in the low half beside some other in the high half, and the other way round."""
    codes = np.tile(np.arange(2**bits, dtype=np.uint32), REPEATS)
    return np.stack([codes, generator.permutation(codes)], axis=-1)


def zeros_of(bits):
    return range(2**bits) if bits < 8 else (0, 1, 2, 3, 15, 16, 17, 63, 64, 100, 127, 128, 129, 191, 200, 254, 255)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("bits", "plane"), PLANES)
def test_the_asm_gives_code_minus_a_zero_point_known_beforehand(bits, plane, bf16):
    generator = np.random.default_rng(plane)
    codes = every_code(bits, generator)
    words, tops = words_with(codes, bits, plane, generator)
    for zero in zeros_of(bits):
        if bits == 8 and bf16 and zero == 0:
            continue  # a zero point known beforehand is the middle code; 0 is no literal of the asm's
        value = ptx.run(plane_asm(bits, plane, bf16, zero), *([words, tops] if len(WIDTHS[bits]) == 2 else [words]))
        assert np.array_equal(unpair(value, bf16), codes.astype(np.float64) - zero)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("bits", "plane"), PLANES)
def test_the_asm_gives_code_minus_a_zero_point_handed_over(bits, plane, bf16):
    generator = np.random.default_rng(100 + plane)
    codes = every_code(bits, generator)
    words, tops = words_with(codes, bits, plane, generator)
    for zero in zeros_of(bits):
        zeros = np.broadcast_to([zero, 2.0**bits - 1 - zero], codes.shape)  # nothing mixes the two halves
        offset = pair(exactly(-offset_of(bits, plane, bf16) - zeros, bf16).astype(np.uint32))
        operands = [words, tops, offset] if len(WIDTHS[bits]) == 2 else [words, offset]
        value = ptx.run(plane_asm(bits, plane, bf16, None), *operands)
        assert np.array_equal(unpair(value, bf16), codes - zeros)


def exactly(value, bf16):
    """The bits of 16-bit floats that `value` must be equal to."""
    bits = ptx.encode(value, bf16)
    assert np.array_equal(ptx.decode(bits, bf16), value)
    return bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "plane"), PLANES)
def test_the_operand_of_the_asm_is_exact_for_every_zero_point(bits, plane, dtype):
    operand = -offset_of(bits, plane, dtype == torch.bfloat16) - torch.arange(256.0)[: 2**bits]
    assert torch.equal(operand.to(dtype).float(), operand)


@pytest.mark.parametrize("mantissa", [7, 10])
@pytest.mark.parametrize(("bits", "plane"), PLANES)
def test_a_shifted_code_lies_in_the_mantissa_and_within_its_own_word(bits, plane, mantissa):
    if (bits, mantissa) == (8, 7):
        with pytest.raises(AssertionError):  # hence two nibbles
            fits(bits, plane, mantissa)
    else:
        fits(bits, plane, mantissa)


def fits(bits, plane, mantissa):
    shift, position = shift_of(bits, plane, mantissa)
    width = WIDTHS[bits][0]
    assert shift + position == width * (plane % (16 // width))
    assert position + bits <= mantissa
    assert position + width <= 16 - shift


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_the_fields_are_where_the_layout_puts_them(bits, size):
    columns = 3 * block_of(bits, min(size, 64))
    codes = some_codes(7, columns, bits)
    grid = (7, columns // size)
    weight = pack(codes, torch.ones(grid), torch.zeros(grid, dtype=torch.uint8), bits)
    words, tops = (array.numpy().view(np.uint16).astype(np.int64) for array in (weight.words[0], weight.words[-1]))
    per_word, planes, plane = 16 // WIDTHS[bits][0], 16 // WIDTHS[bits][-1], weight.plane
    for block, p in itertools.product(range(3), range(planes)):
        at = (block * (planes // per_word) + p // per_word) * plane  # as the kernels step through the words
        shift, mask, *high = field_of(bits, p)
        values = words[:, at : at + plane] >> shift & mask
        if high:
            values |= (tops[:, block * plane : (block + 1) * plane] >> high[0] & high[1]) << WIDTHS[bits][0]
        first = (block * planes + p) * plane
        assert np.array_equal(values, unpack(weight)[:, first : first + plane].numpy())
        assert np.array_equal(values, codes[:, first : first + plane].numpy())


@pytest.mark.parametrize(
    "text",
    [
        "{ .reg .b32 a; add.s32 $0, $1, $1; }",
        "{ .reg .b32 a; lop3.b32 $0, $1, $1, $1, 0xe8; }",
        "{ .reg .b32 a; mov.b32 b, $1; }",
        "{ .reg .b32 a; shl.b32 $0, $1, 32; }",
        "{ .reg .b32 a; mov.b32 $0, $1 }",
        "mov.b32 $0, $1;",
    ],
)
def test_the_emulator_knows_what_it_does_not_know(text):
    with pytest.raises(AssertionError):
        ptx.run(text, np.zeros(1, dtype=np.uint32))


def test_the_emulator_reads_no_register_before_it_is_written():
    with pytest.raises(KeyError):
        ptx.run("{ .reg .b32 a; mov.b32 $0, a; }", np.zeros(1, dtype=np.uint32))


def test_the_emulators_rounding_is_torchs():
    values = np.random.default_rng(0).normal(size=4096) * 2.0 ** np.arange(-10, 10).repeat(205)[:4096]
    ties = np.ldexp(np.arange(257.0, 512), -3)
    for value in (values.astype(np.float32).astype(np.float64), ties):
        for bf16, dtype in ((False, torch.float16), (True, torch.bfloat16)):
            expected = torch.from_numpy(value).float().to(dtype).double().numpy()
            assert np.array_equal(ptx.decode(ptx.encode(value, bf16), bf16), expected)
