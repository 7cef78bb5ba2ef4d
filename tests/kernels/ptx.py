"""The few PTX instructions that planes.py emits, in numpy: registers are arrays of 32-bit words."""

from __future__ import annotations

import re

import numpy as np

_STATEMENT = re.compile(r"([a-z0-9.]+) (.*)")
_LITERAL = re.compile(r"0x[0-9a-f]+|\d+")


def run(text: str, *operands: np.ndarray) -> np.ndarray:
    """What $0 holds after the text of an inline asm whose inputs are $1, $2, ..., each uint32."""
    match = re.fullmatch(r"\{ (.*) \}", text)
    assert match, text
    *statements, rest = match[1].split(";")
    assert rest == "", "every statement ends in a semicolon"
    registers = {f"${i}": operand.astype(np.uint32) for i, operand in enumerate(operands, 1)}
    declared = set()

    def read(name: str) -> np.ndarray:
        if _LITERAL.fullmatch(name):
            value = int(name, 0)
            assert value < 2**32
            return np.uint32(value)
        return registers[name]  # a register read before it was written is a KeyError

    for statement in statements:
        parsed = _STATEMENT.fullmatch(statement.strip())
        assert parsed, statement
        opcode, arguments = parsed[1], [argument.strip() for argument in parsed[2].split(",")]
        if opcode == ".reg":
            kind, first = arguments[0].split()
            assert kind == ".b32"
            declared |= {first, *arguments[1:]}
            continue
        target, *sources = arguments
        assert target in declared | {"$0"}, f"{target} is no register to write to"
        registers[target] = _execute(opcode, [read(source) for source in sources])
    return registers["$0"]


def _execute(opcode: str, sources: list[np.ndarray]) -> np.ndarray:
    if opcode in ("shr.b32", "shl.b32"):
        word, count = sources
        assert 0 <= count < 32
        return word >> count if opcode == "shr.b32" else word << count
    if opcode == "lop3.b32":
        a, b, c, table = sources
        assert table == 0xEA, "0xea is (a & b) | c; no other table is known here"
        return a & b | c
    if opcode == "mov.b32":
        (word,) = sources
        return word
    assert opcode in ("fma.rn.f16x2", "fma.rn.bf16x2"), f"{opcode} is not known here"
    bf16 = opcode == "fma.rn.bf16x2"
    halves = []
    for shift in (0, 16):
        a, b, c = (decode((source >> np.uint32(shift)).astype(np.uint16), bf16) for source in sources)
        halves.append(encode(a * b + c, bf16).astype(np.uint32) << np.uint32(shift))
    return halves[0] | halves[1]


def decode(half: np.ndarray, bf16: bool) -> np.ndarray:
    """16-bit floats as float64. Products of two and sums with a third are exact there, but for sizes far apart."""
    if bf16:
        return (half.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return half.view(np.float16).astype(np.float64)


def encode(value: np.ndarray, bf16: bool) -> np.ndarray:
    """float64 rounded once, to nearest and ties to even, to the bits of a 16-bit float of normal size."""
    assert np.isfinite(value).all()
    if not bf16:
        return value.astype(np.float16).view(np.uint16)
    mantissa, exponent = np.frexp(value)
    rounded = np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8).astype(np.float32)
    return (rounded.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
