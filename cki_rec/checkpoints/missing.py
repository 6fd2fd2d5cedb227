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
METADATA = ".metadata"
"""File of every torch.distributed.checkpoint folder."""


def no_checkpoint(path: Path, description: str) -> str:
    """Return the message for a path that holds no checkpoint.

    Args:
        path: The path that a user named.
        description: Name of the file that every checkpoint has.
    """
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    content = next((FORMATS[f.suffix] for f in files if f.suffix in FORMATS), "")
    if (path / METADATA).is_file():
        content = "a torch.distributed.checkpoint folder"
    if content:
        return (
            f"{path}: holds {content}; the commands read run folders of cki-rec alone. Merge other"
            " models in Python with cki_rec.merge (docs/python.md)"
        )
    hint = "" if files else ": an empty folder" if path.is_dir() else ": no such file or folder"
    return f"{path}: no checkpoint here ({description} is missing){hint}"
