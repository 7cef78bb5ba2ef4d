"""Reads what the report of a checkpoint says of its packed share."""

from pathlib import Path

from llmq.checkpoint.output_dir import REPORT
from llmq.models.untrusted_files import read_json

SHARE = "packed"  # key of the report


def stated_share(directory: Path) -> str | None:
    """Return the sentence, or None if no report holds one: another tool, another version or a conversion wrote it."""
    said = read_json(directory, REPORT).get(SHARE) if (directory / REPORT).exists() else None
    return said if isinstance(said, str) and said.isprintable() else None
