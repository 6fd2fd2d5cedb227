"""Why a path is no checkpoint of this project."""

from __future__ import annotations

from pathlib import Path

FORMATS = {
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin"), "a file of torch.save"),
    ".safetensors": "a file of safetensors",
    ".onnx": "an ONNX file",
    ".pt2": "a file of torch.export",
}
"""Suffix of a file -> its usual content."""
READ_BY = (
    "this command reads run folders of cki-rec alone. cki-rec merge and cki-rec inspect read such"
    " files too (docs/how_to/checkpoints.md)"
)
UNREAD = (".onnx", ".pt2")
"""Suffixes of files that no command reads."""
METADATA = ".metadata"
"""File of every torch.distributed.checkpoint folder."""


def no_checkpoint(path: Path, description: str) -> str:
    """Return the message for a path that holds no checkpoint.

    Args:
        path: The path that a user named.
        description: Name of the file that every checkpoint has.
    """
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    suffix = next((f.suffix for f in files if f.suffix in FORMATS), "")
    content = FORMATS.get(suffix, "")
    if (path / METADATA).is_file():
        content = "a torch.distributed.checkpoint folder"
    if suffix in UNREAD:
        return f"{path}: holds {content}, which has no state dict; name its checkpoint"
    if content:
        return f"{path}: holds {content}; {READ_BY}"
    hint = "" if files else ": an empty folder" if path.is_dir() else ": no such file or folder"
    return f"{path}: no checkpoint here ({description} is missing){hint}"
