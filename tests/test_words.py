"""Plain English: the limits on three habits that make texts hard to read.

``python tests/test_words.py`` lists the offenders with file and line.
"""

from __future__ import annotations

import ast
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_WORDS = 30
LIMITS = {
    "markdown": {"long sentence": 0, "what as a noun": 0, "machine that speaks": 0},
    "conf": {"long sentence": 0, "what as a noun": 0, "machine that speaks": 0},
    "code": {"long sentence": 9, "what as a noun": 0, "machine that speaks": 2},
}
"""Offenders that Markdown files, comments of conf, and texts of the package may have."""

WHAT = re.compile(r"(?<!\.)\bwhat\b", re.IGNORECASE)  # an option `merge.learn.what` is no noun
SPEAKS = re.compile(
    r"(?<!you )(?<!we )(?<!users )\b(say|says|said|saying|tell|tells|told|telling|want|wants"
    r"|wanted|know|knows|knew|vouch|vouches|vouched)\b",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?<=[.!?])[)\"'*]*\s+(?=[\W_]*[A-Z0-9])")
CODE = re.compile(r"``[^`]+``|`[^`]+`")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|<https?:[^>]*>|https?:\S+")


@dataclass(frozen=True)
class Text:
    """A paragraph, a list item, a table cell, a comment or a message."""

    path: Path
    line: int
    text: str


@dataclass(frozen=True)
class Offender:
    kind: str
    path: Path
    line: int
    sentence: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.kind}: {self.sentence}"


def offenders(texts: Iterator[Text]) -> list[Offender]:
    """Return the offenders in texts, in their order."""
    listed = []
    for text in texts:
        plain = LINK.sub(lambda match: match[1] or "Link", CODE.sub("Code", text.text))
        for sentence in SENTENCE_END.split(" ".join(plain.split())):
            kinds = []
            if len(re.findall(r"[A-Za-z][\w'-]*", sentence)) > MAX_WORDS:
                kinds.append("long sentence")
            if not sentence.rstrip(")\"'*").endswith("?"):
                kinds += ["what as a noun"] * len(WHAT.findall(sentence))
            kinds += ["machine that speaks"] * len(SPEAKS.findall(sentence))
            listed += [Offender(kind, text.path, text.line, sentence) for kind in kinds]
    return listed


def blocks(path: Path, lines: list[tuple[int, str]]) -> Iterator[Text]:
    """Yield the paragraphs, list items and table cells of lines, without code blocks."""
    start, current, is_fenced = 0, list[str](), False
    for number, line in [*lines, (0, "")]:
        stripped = line.strip()
        is_fence = stripped.startswith("```")
        starts_block = re.match(r"([-*#>]|\d+\.)\s|\w+: |\|", stripped) is not None
        if current and (not stripped or is_fence or starts_block):
            yield Text(path, start, " ".join(current))
            current = []
        if is_fence:
            is_fenced = not is_fenced
        elif is_fenced:
            continue
        elif stripped.startswith("|"):
            yield from (Text(path, number, cell) for cell in CODE.sub("Code", stripped).split("|"))
        elif stripped.startswith("#"):
            yield Text(path, number, stripped)
        elif stripped:
            start = start if current else number
            current.append(stripped)


def markdown_texts() -> Iterator[Text]:
    """Yield the texts of README, docs and the newest version of the changelog."""
    names = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"]
    names += ["experiments/README.md", "experiments/peers/README.md"]
    names.append("experiments/zoo/README.md")
    for path in [*(ROOT / name for name in names), *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        if path.name == "CHANGELOG.md":
            text = "\n## ".join(text.split("\n## ")[:2])
        yield from blocks(path, list(enumerate(text.splitlines(), 1)))


def yaml_texts() -> Iterator[Text]:
    """Yield the comments of conf."""
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        whole = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            before, mark, comment = line.partition("#")
            comment = comment.strip()
            if comment.startswith(("@package", "make ", "cki-rec ")):
                continue
            if mark and not before.strip():
                whole.append((number, comment))
                continue
            yield from blocks(path, whole)
            whole = []
            if mark and before.endswith(" "):
                yield Text(path, number, comment)
        yield from blocks(path, whole)


def code_texts() -> Iterator[Text]:
    """Yield the docstrings, comments and messages of the package."""
    for path in sorted((ROOT / "cki_rec").rglob("*.py")):
        yield from _comments(path)
        yield from _strings(path)


def _comments(path: Path) -> Iterator[Text]:
    whole: list[tuple[int, str]] = []
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type != tokenize.COMMENT or token.string.startswith("# type:"):
                continue
            if whole and (token.start[0] != whole[-1][0] + 1 or token.line.split("#")[0].strip()):
                yield from blocks(path, whole)
                whole = []
            whole.append((token.start[0], token.string.lstrip("# ")))
    yield from blocks(path, whole)


def _strings(path: Path) -> Iterator[Text]:
    tree = ast.parse(path.read_text())
    docstrings, parts = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add(node.value)
        if isinstance(node, ast.JoinedStr):
            parts |= set(ast.walk(node)) - {node}
            pieces = [v.value if isinstance(v, ast.Constant) else "X" for v in node.values]
            yield Text(path, node.lineno, "".join(map(str, pieces)))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if node in docstrings:
            yield from blocks(path, list(enumerate(node.value.splitlines(), node.lineno)))
        elif node not in parts and len(node.value.split()) > 2:
            yield Text(path, node.lineno, node.value)


TEXTS = {"markdown": markdown_texts, "conf": yaml_texts, "code": code_texts}


@pytest.mark.parametrize("place", TEXTS)
def test_texts_are_plain(place):
    listed, limits = offenders(TEXTS[place]()), LIMITS[place]
    counts = Counter(offender.kind for offender in listed)
    excess = {kind: counts[kind] for kind, limit in limits.items() if counts[kind] > limit}
    lines = [str(offender) for offender in listed if offender.kind in excess]
    assert not excess, "\n".join([f"{excess}, limits {limits}", *lines])


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("The loader reads rows.", []),
        ("What does it read?", []),
        ("It reads what it needs. It stops.", ["what as a noun"]),
        ("The report says so.", ["machine that speaks"]),
        ("If you know better, set `what=says`.", []),
        ("word " * 31 + ".", ["long sentence"]),
        ("word " * 20 + "end. " + "Word " * 20 + "end.", []),
    ],
)
def test_offenders(text, kinds):
    listed = offenders(iter([Text(ROOT / "x.md", 1, text)]))
    assert [offender.kind for offender in listed] == kinds


if __name__ == "__main__":
    for place, texts in TEXTS.items():
        listed = offenders(texts())
        print(*listed, sep="\n")  # noqa: T201
        print(place, dict(Counter(offender.kind for offender in listed)))  # noqa: T201
