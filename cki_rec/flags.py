"""Flags of Hydra: those that print the configuration, and those that this command has not."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cki_rec.config import UserError, nearest
from cki_rec.search_path import CONF

VALUES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "--package": None,
    "--resolve": (),
    "--hydra-help": (),
}
"""Flag that prints -> the words that may follow; None: any word."""
SHORT = {"-c": "--cfg", "-i": "--info", "-p": "--package"}
SWEEP = ("-m", "--multirun")
IGNORED = ("-r", "--run")
"""Flags that ask for the usual behavior."""
FIXED = "the primary configuration is conf/config.yaml; choose a file of its groups (GROUP=NAME)"
OF_TENSORS = (".safetensors", ".safetensors.index.json", ".pt", ".pth", ".ckpt", ".bin")
"""Endings of checkpoints."""
ABSENT = {
    **dict.fromkeys(("-cn", "--config-name", "-cp", "--config-path"), FIXED),
    **dict.fromkeys(("-sc", "--shell-completion"), "there is no completion"),
    "--experimental-rerun": "run the command again: finished runs are kept",
}
"""Flag of Hydra that this command has not -> the way that it has."""


def split_flags(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags that print the configuration, and the overrides with flags of a sweep.

    Raises:
        UserError: An unknown flag, or one that this command has not.
    """
    printing, rest = list[str](), list[str]()
    words = list(options)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        flag = SHORT.get(flag, flag)
        if flag in VALUES:
            printing.append(f"{flag}{equals}{value}")
            known = VALUES[flag]
            if not equals and words and (known is None or words[0] in known):
                printing.append(words.pop(0))
        elif flag in ABSENT:
            raise UserError(f"{flag}: no such flag of cki-rec; {ABSENT[flag]}")
        elif word in SWEEP or not word.startswith("-"):
            rest.append(word)
        elif word not in IGNORED:
            known_flags = [*VALUES, "--config-dir", "--multirun", "--help"]
            hint = nearest(flag, known_flags)
            raise UserError(f"no flag '{word}': {hint}one of {', '.join(known_flags)}")
    return printing, rest


def inspected(options: Sequence[str]) -> tuple[str, list[str]]:
    """Return the pipeline that ``inspect`` means, and its options with the named files.

    Folders and files of tensors are checkpoints. Another file holds data.

    Raises:
        UserError: No file is named, or several of data are.
    """
    files = [word for word in options if "=" not in word and not word.startswith("-")]
    rest = [word for word in options if word not in files]
    quoted = ["'" + file.replace("'", "\\'") + "'" for file in files]
    are_checkpoints = [Path(f).is_dir() or f.lower().endswith(OF_TENSORS) for f in files]
    if files and all(are_checkpoints):
        return "inspect_checkpoints", [*rest, f"merge.sources=[{','.join(quoted)}]"]
    if not files and any(word.startswith("merge.sources=") for word in rest):
        return "inspect_checkpoints", rest
    if any(are_checkpoints):
        raise UserError(f"inspect reads checkpoints or data, not both: {', '.join(files)}")
    if len(files) > 1:
        raise UserError(f"inspect reads one file, not {len(files)}: {', '.join(files)}")
    if not files and not any(word.startswith("data.raw=") for word in rest):
        raise UserError("inspect needs a file: cki-rec inspect my.csv")
    return "inspect", ["data=csv", *rest, *(f"data.raw={file}" for file in quoted)]


def print_configuration(printing: Sequence[str], overrides: Sequence[str]) -> None:
    """Let Hydra print the configuration, as ``--cfg job`` and ``--info`` do; run nothing."""
    import hydra

    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]  # --info sets others
    arguments, sys.argv = sys.argv, ["cki-rec", *printing, *overrides]
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(
            lambda _: None
        )()
    finally:
        sys.argv, root.handlers = arguments, handlers
        root.setLevel(level)
