"""The packer of every format: codes of b bits become one little-endian bit stream, cut into 32-bit words.

Code i owns bits [i*b, (i+1)*b) of the stream. Word 0 comes first, and zeros fill the last word. Eight 4-bit codes fill
one word, the first code in the lowest bits:

    >>> codes = torch.arange(8, dtype=torch.uint8)[None]             # [rows, columns] = [1, 8]
    >>> words = pack_stream(codes, bits=4)                           # [rows, words]   = [1, 1]
    >>> words.shape, hex(int(words[0, 0]))
    (torch.Size([1, 1]), '0x76543210')
    >>> unpack_stream(words, bits=4, n=8)                            # [1, 8]: the codes again
    tensor([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.uint8)

A word has room for ten 3-bit codes and 2 bits more. Code 10 is 5 = 0b101: its low bits 01 go into word 0, its high bit
into word 1. The "10|1|10|1|10" scheme of 3-bit GPTQ files is this same stream:

    >>> codes = torch.tensor([[7] + [0] * 9 + [5]], dtype=torch.uint8)   # [1, 11]
    >>> words = pack_stream(codes, bits=3)                               # [1, 2]: 33 bits need two words
    >>> [f"{int(word):032b}" for word in words[0]]
    ['01000000000000000000000000000111', '00000000000000000000000000000001']
    >>> unpack_stream(words, bits=3, n=11)                               # [1, 11]
    tensor([[7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]], dtype=torch.uint8)
"""

import math

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

_WORD = 32
# Codes packed or unpacked at a time on a CPU: few enough for its cache, enough for several threads. On a GPU 16 times
# as many: there every strip costs the launches of some twenty kernels.
_CODES = 1 << 21
_FIELDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def pack_stream(codes: UInt8[Tensor, "rows columns"], bits: int, axis: int = 1) -> Int32[Tensor, "..."]:
    """Pack n codes along `axis` (0 or 1). Return `ceil(n * bits / 32)` int32 words."""
    if axis == 0:
        return pack_stream(codes.T, bits).T.contiguous()
    words = torch.empty(len(codes), packed_length(codes.shape[1], bits), dtype=torch.int32, device=codes.device)
    for rows in strips(codes):
        words[rows] = _pack(codes[rows], bits)[:, : words.shape[1]]
    return words


def unpack_stream(words: Int32[Tensor, "rows words"], bits: int, n: int, axis: int = 1) -> UInt8[Tensor, "..."]:
    """Return the first `n` codes along `axis`: the exact inverse of `pack_stream`."""
    if axis == 0:
        return unpack_stream(words.T, bits, n).T.contiguous()
    codes = torch.empty(len(words), n, dtype=torch.uint8, device=words.device)
    for rows in strips(codes):
        codes[rows] = _unpack(words[rows], bits)[:, :n]
    return codes


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Return whole periods of words, with zeros after the last code."""
    # The pattern of shifts repeats every lcm(bits, 32) bits.
    per_period, words_per_period = _period(bits)
    # Without a code over a word boundary, int32 is enough: the high bits that a shift loses are 0.
    dtype = torch.int32 if words_per_period == 1 else torch.int64
    codes = _padded(codes, per_period)
    words = torch.zeros(*codes.shape[:2], words_per_period, dtype=dtype, device=codes.device)
    for i in range(per_period):
        word, shift = divmod(i * bits, _WORD)
        shifted = codes[..., i].to(dtype) << shift
        if words_per_period == 1:
            words[..., 0] |= shifted
            continue
        words[..., word] |= shifted & 0xFFFFFFFF
        if shift + bits > _WORD:
            words[..., word + 1] |= shifted >> _WORD
    return words.flatten(1).to(torch.int32)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Return all codes of whole periods, those of the padding included."""
    octets = _padded(words, _period(bits)[1]).flatten(1).view(torch.uint8)
    # So many codes fill whole octets: two of 4 bits, four of 2, eight of 3. Each field will have a byte for each code.
    codes = 8 // math.gcd(8, bits)
    step, dtype, length = codes * bits // 8, _FIELDS[codes], 8 * codes
    fields = octets[:, ::step].to(dtype)
    for i in range(1, step):
        fields |= octets[:, i::step].to(dtype) << 8 * i
    # All codes are in the low bits. The upper half moves to the upper half of the field, then the same in each half.
    while codes > 1:
        codes //= 2
        upper = fields & sum((1 << codes * bits) - 1 << at for at in range(codes * bits, length, 16 * codes))
        fields ^= upper
        fields |= upper << codes * (8 - bits)
    return fields.view(torch.uint8)


def _padded(rows: Tensor, period: int) -> Tensor:
    """Return the rows as [rows, periods, period], with zeros after the last number."""
    if rows.shape[1] % period == 0:
        return rows.contiguous().view(len(rows), -1, period)
    periods = -(-rows.shape[1] // period)
    padded = torch.zeros(len(rows), periods * period, dtype=rows.dtype, device=rows.device)
    padded[:, : rows.shape[1]] = rows
    return padded.view(len(rows), periods, period)


def strips(codes: UInt8[Tensor, "rows *columns"]) -> list[slice]:
    """Return slices of the rows that are packed or unpacked at a time."""
    most = _CODES if codes.device.type == "cpu" else _CODES << 4
    size = max(1, most // max(1, codes[:1].numel()))
    return [slice(start, start + size) for start in range(0, len(codes), size)]


def packed_length(n: int, bits: int) -> int:
    """Count the 32-bit words that n codes need."""
    return -(-n * bits // _WORD)


def _period(bits: int) -> tuple[int, int]:
    """Return the numbers of codes and of words after which the pattern of shifts repeats."""
    return (_WORD, bits) if _WORD % bits else (_WORD // bits, 1)
