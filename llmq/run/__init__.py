"""One quantization run: prepare it, quantize block by block, resume after a crash, report what was done."""
