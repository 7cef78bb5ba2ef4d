"""One plane of packed words to exact (code - zero) values: the inner step of every kernel.

The trick, on a pair of words in one 32-bit register (FasterTransformer's, published with arXiv 2211.10017; used by
Marlin, arXiv 2408.11743): put a code into the mantissa of a 16-bit float of exponent 2**m, m its mantissa bits,

    (word & mask << b) | bits(2**m)   is   2**m + code * 2**b            one lop3
    fma(that, 2**-b, -(2**(m-b) + zero))   is   code - zero, exactly     one fma for two codes

No integer-to-float conversion, which runs at an eighth of the rate. fp16 has m = 10, so a byte of a word needs no
shift; bf16 has m = 7. The twin for Triton's interpreter and other GPUs computes the same numbers through float32.
"""

# Triton compiles the kernels: their parameters have no Python types, their branches are chosen while compiling.
# pyright: reportMissingParameterType=false, reportPossiblyUnboundVariable=false, reportUnusedVariable=false
# Triton's dialect, whose constants are of no type that a checker knows:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportRedeclaration=false

from __future__ import annotations

import triton
import triton.language as tl

from llmq_kernels import layout
from llmq_kernels.layout import WIDTHS

top_bits = triton.constexpr_function(layout.top_bits)


@triton.constexpr_function
def low_width(bits):
    """Return the bits of a code in a low word."""
    return WIDTHS[bits][0]


@triton.constexpr_function
def in_two(bits):
    """Return whether codes have high words too."""
    return len(WIDTHS[bits]) == 2


@triton.constexpr_function
def planes_of(bits):
    """Return the planes in a block."""
    return 16 // WIDTHS[bits][-1]


@triton.constexpr_function
def shift_of(bits, plane, mantissa):
    """Return the right shift of the word, and the bit of the code after it.

    The shift is by whole bytes if the code then fits the mantissa.
    """
    low = WIDTHS[bits][0] * (plane % (16 // WIDTHS[bits][0]))
    return (low - low % 8, low % 8) if low % 8 + bits <= mantissa else (low, 0)


@triton.constexpr_function
def plane_asm(bits, plane, bf16, zero):
    """Return PTX that turns $1 (word pair), $2 (pair of high words, if there are any) and the last operand (-zero, or
    -(2**(m-b) + zero), unless `zero` is known now) into the pair $0."""
    if bf16 and bits == 8:
        return _byte_asm(plane, zero)
    mantissa = 7 if bf16 else 10
    shift, position = shift_of(bits, plane, mantissa)
    mask = (2 ** WIDTHS[bits][0] - 1) << position
    lines = [f"shr.b32 a, $1, {shift};", f"lop3.b32 a, a, {_pair(mask)}, {_power(mantissa, bf16)}, 0xea;"]
    if in_two(bits):
        low, high = WIDTHS[bits]
        top = top_bits(bits, plane) - position - low
        lines += [
            f"{'shr' if top >= 0 else 'shl'}.b32 h, $2, {abs(top)};",
            f"lop3.b32 a, h, {_pair((2**high - 1) << low + position)}, a, 0xea;",
        ]
    if zero is None:
        offset = "$3" if in_two(bits) else "$2"
    else:
        offset = _half(-(2.0 ** (mantissa - position) + zero), bf16)
    kind = "bf16x2" if bf16 else "f16x2"
    lines += [f"mov.b32 c, {offset};", f"mov.b32 s, {_power(-position, bf16)};", f"fma.rn.{kind} $0, a, s, c;"]
    return "{ .reg .b32 a, h, c, s; " + " ".join(lines) + " }"


@triton.constexpr_function
def _byte_asm(plane, zero):
    """Return PTX for a byte in bf16. It does not fit the mantissa: two nibbles, 16 * high - zero + low."""
    offset = "$2" if zero is None else _half(-float(zero), True)
    nibble = f"{_pair(15)}, {_power(7, True)}, 0xea;"
    lines = [
        f"shr.b32 a, $1, {8 * plane};",
        f"lop3.b32 a, a, {nibble}",
        f"shr.b32 h, $1, {8 * plane + 4};",
        f"lop3.b32 h, h, {nibble}",
        f"mov.b32 o, {_half(1.0, True)};",
        f"mov.b32 s, {_half(16.0, True)};",
        f"mov.b32 c, {_half(-2048.0, True)};",
        "fma.rn.bf16x2 h, h, s, c;",
        f"mov.b32 c, {offset};",
        "fma.rn.bf16x2 h, h, o, c;",
        f"mov.b32 c, {_half(-128.0, True)};",
        "fma.rn.bf16x2 a, a, o, c;",
        "fma.rn.bf16x2 $0, a, o, h;",
    ]
    return "{ .reg .b32 a, h, c, s, o; " + " ".join(lines) + " }"


@triton.constexpr_function
def offset_of(bits, plane, bf16):
    """Return what the asm's last operand subtracts besides the zero point."""
    if bf16 and bits == 8:
        return 0.0
    mantissa = 7 if bf16 else 10
    return 2.0 ** (mantissa - shift_of(bits, plane, mantissa)[1])


@triton.constexpr_function
def field_of(bits, plane):
    """Return (shift, mask) of a plane in the low words, then in the high words, for the twin."""
    width, *high = WIDTHS[bits]
    return width * (plane % (16 // width)), 2**width - 1, *((top_bits(bits, plane), 2 ** high[0] - 1) if high else ())


@triton.constexpr_function
def _half(value, bf16):
    """Return two equal 16-bit floats in one register, as a literal. `value`, not 0, must be such a float exactly."""
    mantissa, exponent = (7, 127) if bf16 else (10, 15)
    sign, size = (0x8000, -value) if value < 0 else (0, value)
    while size >= 2:
        size, exponent = size / 2, exponent + 1
    while size < 1:
        size, exponent = size * 2, exponent - 1
    return _pair(sign | exponent << mantissa | int((size - 1) * 2**mantissa))


@triton.constexpr_function
def _power(exponent, bf16):
    return _half(2.0**exponent, bf16)


@triton.constexpr_function
def _pair(code):
    return f"0x{code << 16 | code:08x}"


@triton.jit
def plane_values(
    words, tops, zero,
    P: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return code - zero of plane P, exactly, in DTYPE.

    Args:
        words, tops: int16 [rows, plane]; tops are the high words, read if there are any.
        zero: float32 [rows], read if not SYMMETRIC.
    """
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    if ASM:
        BF16: tl.constexpr = DTYPE == tl.bfloat16
        if SYMMETRIC:
            code: tl.constexpr = plane_asm(BITS, P, BF16, MIDDLE)
            inputs = [words, tops] if in_two(BITS) else [words]
        else:
            code: tl.constexpr = plane_asm(BITS, P, BF16, None)
            offset = (-offset_of(BITS, P, BF16) - zero).to(DTYPE)
            offset = tl.broadcast_to(offset[:, None], words.shape)
            inputs = [words, tops, offset] if in_two(BITS) else [words, offset]
        constraints: tl.constexpr = "=r" + ",r" * len(inputs)
        if BF16:  # Triton 3.6 and 3.7 do not unwrap a constexpr dtype here
            values = tl.inline_asm_elementwise(code, constraints, inputs, dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            values = tl.inline_asm_elementwise(code, constraints, inputs, dtype=tl.float16, is_pure=True, pack=2)
    else:
        FIELD: tl.constexpr = field_of(BITS, P)
        codes = words >> FIELD[0] & FIELD[1]
        if in_two(BITS):
            codes = codes | (tops >> FIELD[2] & FIELD[3]) << low_width(BITS)
        if SYMMETRIC:
            values = (codes.to(tl.float32) - MIDDLE).to(DTYPE)
        else:
            values = (codes.to(tl.float32) - zero[:, None]).to(DTYPE)
    return values
