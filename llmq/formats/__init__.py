"""The checkpoint formats by name. Each is a file of pure functions: encode, decode, hf_config, scheme_of."""

from llmq.formats import compressed_tensors

FORMATS = {"compressed-tensors": compressed_tensors}
