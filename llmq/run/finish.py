"""The end of a run: reads the checkpoint back, checks it, and publishes it with its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmq.checkpoint.model_files import companions_of
from llmq.checkpoint.writer import Writer
from llmq.run.block_quantizer import Run
from llmq.run.prepare import FINGERPRINT, Request
from llmq.verification.check import DIGESTS, check


def finish(request: Request, run: Run, writer: Writer | None) -> None:
    """Finish the checkpoint in the process that writes. Raises CheckpointError if the files are not what was computed.

    The checkpoint is checked before anything is moved to the output directory.
    """
    if writer is None:
        return

    def read_back(directory: Path) -> None:
        with run.clock("check"):
            check(directory, run.digests, run.config.trust_remote_code)

    def report() -> dict[str, Any]:
        return run.report.to_json() | {DIGESTS: run.digests, FINGERPRINT: request.fingerprint}

    writer.finish(companions_of(run.source), run.source.dtype, run.hf_config(), report, read_back)
