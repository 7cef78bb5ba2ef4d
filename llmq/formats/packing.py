"""One packer for every format: codes of b bits as one little-endian bit stream, cut into 32-bit words.

    element i owns bits [i*b, (i+1)*b) of the stream; word 0 comes first; the tail is padded with zeros

    b = 3:   word 0  | 10 codes, then the low 2 bits of code 10 |   word 1  | its high bit, 10 codes, … |

The "10|1|10|1|10" scheme of 3-bit GPTQ files is just this stream.
"""

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

_WORD = 32
_CODES = 1 << 20  # at a time


def pack_stream(codes: UInt8[Tensor, "rows columns"], bits: int, axis: int = 1) -> Int32[Tensor, "..."]:
    """Pack along `axis` (0 or 1): `ceil(n * bits / 32)` words as two's complement int32."""
    if axis == 0:
        return pack_stream(codes.T, bits).T.contiguous()
    words = torch.empty(len(codes), packed_length(codes.shape[1], bits), dtype=torch.int32, device=codes.device)
    for rows in _strips(codes.shape):
        words[rows] = _pack(codes[rows], bits)[:, : words.shape[1]]
    return words


def unpack_stream(words: Int32[Tensor, "rows words"], bits: int, n: int, axis: int = 1) -> UInt8[Tensor, "..."]:
    """The first `n` codes along `axis`; exact inverse of `pack_stream`."""
    if axis == 0:
        return unpack_stream(words.T, bits, n).T.contiguous()
    codes = torch.empty(len(words), n, dtype=torch.uint8, device=words.device)
    for rows in _strips(codes.shape):
        codes[rows] = _unpack(words[rows], bits)[:, :n]
    return codes


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Whole periods of words, zeros behind the last code."""
    # Codes straddle words only every lcm(bits, 32) bits; within such a period the shifts are the same for all.
    per_period, words_per_period = _period(bits)
    # Where none straddles, a shift may lose high bits of a signed word: they are 0.
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
    """All codes of whole periods, with what follows the last one."""
    per_period, words_per_period = _period(bits)
    stream = _padded(words, words_per_period)
    if words_per_period > 1:
        stream = stream.to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty(*stream.shape[:2], per_period, dtype=torch.uint8, device=words.device)
    for i in range(per_period):
        word, shift = divmod(i * bits, _WORD)
        value = stream[..., word] >> shift  # the sign that is shifted in is masked off
        if shift + bits > _WORD:
            value = value | (stream[..., word + 1] << (_WORD - shift))
        codes[..., i] = (value & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(1)


def _padded(rows: Tensor, period: int) -> Tensor:
    """[rows, periods, period], with zeros behind the last number."""
    periods = -(-rows.shape[1] // period)
    padded = torch.zeros(len(rows), periods * period, dtype=rows.dtype, device=rows.device)
    padded[:, : rows.shape[1]] = rows
    return padded.view(len(rows), periods, period)


def _strips(shape: torch.Size) -> list[slice]:
    """Rows whose codes stay in the caches while they are looked at."""
    size = max(1, _CODES // max(1, shape[1]))
    return [slice(start, start + size) for start in range(0, shape[0], size)]


def packed_length(n: int, bits: int) -> int:
    """32-bit words needed for n codes."""
    return -(-n * bits // _WORD)


def _period(bits: int) -> tuple[int, int]:
    """(codes, words) after which the pattern of shifts repeats."""
    return (_WORD, bits) if _WORD % bits else (_WORD // bits, 1)
