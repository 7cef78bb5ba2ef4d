"""Compiled kernels as text. One run of the disassembler takes many: it needs half a second to start."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile

from triton import knobs

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?) ?;")
_TARGET = re.compile(r"(\b(?:BRA|BSSY|CALL)\b.*\b0x)([0-9a-f]+)")


def disassembled(cubins: list[bytes], arch: int) -> list[str]:
    """Return the instructions of each kernel, a line each, as cuobjdump prints them; addresses begin with 0."""
    codes = [_code_of(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        name = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
        command = [knobs.nvidia.nvdisasm.path, "--binary", name, file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = iter(_INSTRUCTION.findall(text))
    texts, begin = [], 0
    for code in codes:
        mine = (next(lines) for _ in range(len(code) // 16))  # an instruction has 16 bytes
        texts.append("\n".join(_line(int(address, 16), instruction, begin) for address, instruction in mine))
        begin += len(code)
    return texts


def instructions(sass: str) -> dict[int, str]:
    """Return the program by address, without the padding after it."""
    return {int(address, 16): text for address, text in _INSTRUCTION.findall(sass) if text != "NOP"}


def _line(address: int, instruction: str, begin: int) -> str:
    """Return an instruction as it is in its own kernel, which begins at this address of the whole."""
    own = _TARGET.sub(lambda target: f"{target[1]}{int(target[2], 16) - begin:x}", instruction)
    return f"/*{address - begin:04x}*/  {own} ;"


def _code_of(cubin: bytes) -> bytes:
    """Return the code of the only kernel in an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    name_bytes = cubin[sections[names][4] :]
    (code,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if name_bytes[name:].startswith(b".text.")
    )
    return code
