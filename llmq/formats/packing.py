"""One packer for every format: codes of b bits as one little-endian bit stream, cut into 32-bit words.

    element i owns bits [i*b, (i+1)*b) of the stream; word 0 comes first; the tail is padded with zeros

    b = 3:   word 0  | 10 codes, then the low 2 bits of code 10 |   word 1  | its high bit, 10 codes, … |

The "10|1|10|1|10" scheme of 3-bit GPTQ files is just this stream.
"""

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

_WORD = 32


def pack_stream(codes: UInt8[Tensor, "rows columns"], bits: int, axis: int = 1) -> Int32[Tensor, "..."]:
    """Pack along `axis` (0 or 1): `ceil(n * bits / 32)` words as two's complement int32."""
    if axis == 0:
        return pack_stream(codes.T, bits).T.contiguous()
    rows, n = codes.shape
    # Codes straddle words only every lcm(bits, 32) bits; within such a period the shifts are the same for all.
    per_period, words_per_period = _period(bits)
    periods = -(-n // per_period)
    padded = torch.zeros(rows, periods * per_period, dtype=torch.int64, device=codes.device)
    padded[:, :n] = codes
    padded = padded.view(rows, periods, per_period)
    words = torch.zeros(rows, periods, words_per_period, dtype=torch.int64, device=codes.device)
    for i in range(per_period):
        word, shift = divmod(i * bits, _WORD)
        shifted = padded[..., i] << shift
        words[..., word] |= shifted & 0xFFFFFFFF
        if shift + bits > _WORD:
            words[..., word + 1] |= shifted >> _WORD
    return words.view(rows, -1)[:, : packed_length(n, bits)].to(torch.int32).contiguous()


def unpack_stream(words: Int32[Tensor, "rows words"], bits: int, n: int, axis: int = 1) -> UInt8[Tensor, "..."]:
    """The first `n` codes along `axis`; exact inverse of `pack_stream`."""
    if axis == 0:
        return unpack_stream(words.T, bits, n).T.contiguous()
    rows = words.shape[0]
    per_period, words_per_period = _period(bits)
    periods = -(-n // per_period)
    stream = torch.zeros(rows, periods * words_per_period, dtype=torch.int64, device=words.device)
    stream[:, : words.shape[1]] = words.to(torch.int64) & 0xFFFFFFFF
    stream = stream.view(rows, periods, words_per_period)
    codes = torch.empty(rows, periods, per_period, dtype=torch.uint8, device=words.device)
    for i in range(per_period):
        word, shift = divmod(i * bits, _WORD)
        value = stream[..., word] >> shift
        if shift + bits > _WORD:
            value = value | (stream[..., word + 1] << (_WORD - shift))
        codes[..., i] = (value & (2**bits - 1)).to(torch.uint8)
    return codes.view(rows, -1)[:, :n].contiguous()


def packed_length(n: int, bits: int) -> int:
    """32-bit words needed for n codes."""
    return -(-n * bits // _WORD)


def _period(bits: int) -> tuple[int, int]:
    """(codes, words) after which the pattern of shifts repeats."""
    return (_WORD, bits) if _WORD % bits else (_WORD // bits, 1)
