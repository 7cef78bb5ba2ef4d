"""One quantization run: prepared, block by block, resumed, reported."""
