"""What is written of each block: packed weights, and all other tensors; how they were packed, and their digests."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from llmq.calibration.block_runner import Block
from llmq.checkpoint.digests import digest
from llmq.core.errors import WorkError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import Grid
from llmq.formats import Format
from llmq.formats.scheme import Scheme
from llmq.models.model_source import ModelSource
from llmq.models.packable import config_names


class BlockTensors:
    """Names and encodes tensors in one format, and keeps what is said of them at the end."""

    def __init__(self, source: ModelSource, form: Format, grid: Grid) -> None:
        self._source, self._format, self._grid = source, form, grid
        self.schemes: dict[str, Scheme] = {}  # how each linear was packed, by its name in the model
        self.digests: dict[str, str] = {}
        """A hash of each packed linear and each other tensor, by its name in the files, to check them with."""

    def packed(self, block: str, weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
        """Return the tensors of these linears of a block, by their names in the files."""
        tensors: dict[str, Tensor] = {}
        for inner, weight in weights.items():
            name = f"{block}.{inner}"
            stored = self._source.files.stored_linear(name)
            self.digests[stored] = digest(weight)
            self.schemes[name] = scheme = Scheme(weight.bits, self._grid.group_size, self._grid.symmetric)
            tensors |= self._format.encode(stored, weight, scheme)
        return tensors

    def others(self, block: Block, packed: Collection[str], changed: set[str]) -> dict[str, Tensor]:
        """Return all tensors of a block but the weights of packed linears: as stored, unless they are `changed`."""
        without = {f"{block.name}.{name}.weight" for name in packed}
        names = [name for name in self._source.block_tensor_names(block.name) if name not in without]
        current = block.module.state_dict()
        return self.stored(names, {f"{block.name}.{inner}": current[inner] for inner in changed & current.keys()})

    def stored(self, names: Iterable[str], changed: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return tensors that are stored without packing, under their names in the files."""
        tensors = self._source.as_stored(names, changed)
        self.digests.update({name: digest(tensor) for name, tensor in tensors.items()})
        return tensors

    def hf_config(self, reason: str) -> dict[str, Any]:
        """Return the quantization_config. It lists every linear that stays in float.

        Raises WorkError with the reason if nothing was packed.
        """
        if not self.schemes:
            raise WorkError(f"no linear of this model could be packed: {reason}")
        source = self._source
        return self._format.hf_config(*config_names(source.skeleton, source.files, self.schemes, source.carried_names))
