"""Any bytes of a csv: the rows equal those of Python's csv module, or one line names the fault."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from samples import make_data, read_rows

from cki_rec.config import Split, UserError
from cki_rec.data.raw.reading import LINE

SPLIT = Split(by="random", fractions=[0.6, 0.2, 0.2], seed=0)
PIECES = [
    *(
        "a",
        "b",
        "1",
        "0",
        "é",
        "漢",
        "\u2028",
        "\x0b",
        "\x85",
        " ",
        "\t",
        "'",
        "-",
        "\\",
        "#",
        "*",
    ),
    *(",", ";", "|", '"', '""', '","', "\n", "\r\n", "\r", "\0", "\x1f", "\ufeff", "x" * 300),
]
VALUES = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
PLAIN = st.text("ab1é漢 .-_'", max_size=5)
ENCODINGS = ["utf-8", "utf-8", "utf-8", "utf-8-sig", "latin-1", "utf-16"]
SEPARATORS = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|"}
PROFILE = dict(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def files(draw) -> tuple[bytes, str, str, int, str]:
    """Draw bytes, encoding, separator, block size and ``on_bad_row``."""
    separator = draw(st.sampled_from(list(SEPARATORS)))
    mark = SEPARATORS[separator]
    end = draw(st.sampled_from(["\n", "\r\n"]))
    odd = st.sampled_from(
        ["user", "label", "", "*", "^a$", "@label", "@line", "two words", "a\nb"]
    )
    names = ["label", *draw(st.lists(odd | PLAIN, min_size=1, max_size=3))]
    kind = draw(st.sampled_from(["written", "written", "raw"]))
    labels = st.sampled_from(["0", "1", "1", "0", "1.0", " 1", "", "yes", "-1"])
    value = VALUES if draw(st.booleans()) else PLAIN
    width = len(names) - 1
    rows = draw(
        st.lists(
            st.tuples(labels, st.lists(value, min_size=max(0, width - 1), max_size=width)),
            max_size=8,
        )
    )
    table = [names, *([label, *values] for label, values in rows)]
    if kind == "written":
        quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
        out = io.StringIO()
        csv.writer(out, delimiter=mark, lineterminator=end, quoting=quoting).writerows(table)
        text = out.getvalue()
    else:
        text = end.join(mark.join(row) for row in table) + draw(st.sampled_from([end, ""]))
    encoding = draw(st.sampled_from(ENCODINGS))
    content = text.encode(encoding, errors="replace")
    size = draw(st.sampled_from([1, 5, 40, 1 << 20]))
    return content, encoding, separator, size, draw(st.sampled_from(["error", "skip"]))


def reference(text: str, mark: str) -> list[list[str]]:
    """Return the rows of Python's csv module without blank lines."""
    csv.field_size_limit(1 << 24)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
    return [row for row in rows if row and (len(row) > 1 or row[0].strip())]


def check(folder: Path, drawn: tuple[bytes, str, str, int, str]) -> None:
    content, encoding, separator, size, on_bad_row = drawn
    path = folder / "rows.csv"
    path.write_bytes(content)
    data = make_data("csv", raw=str(path), split=SPLIT, separator=separator, encoding=encoding,
                     on_bad_row=on_bad_row)  # fmt: skip
    try:
        frame, reading = read_rows(data, size)
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert str(path) in message or message.startswith("data.fields")
        assert "; " in message or message.startswith("data.fields")
        if ", line" in message:
            place = message.split(", line", 1)[1].removeprefix("s").split(":")[0]
            assert place.strip()[0].isdigit()
        return
    text = content.decode(encoding).removeprefix("\ufeff")
    names, *rows = reference(text, SEPARATORS[separator])
    names = [name.replace("\r\n", " ").replace("\n", " ").replace("\r", " ") for name in names]
    order = [names.index("label"), *(n for n in range(len(names)) if names[n] != "label")]
    columns = ["label", *(name for name in names if name != "label")]
    want = [
        tuple([float(row[0]), *(row[n] or None for n in order[1:])])
        for row in rows
        if len(row) == len(names) and is_label(row[order[0]])
    ]
    result = frame.select(columns).rows()
    num_skipped = sum(reading.counts.values())
    if num_skipped == 0:
        assert len(rows) == len(want)
        assert result == want
    else:  # every row is there, or counted with its reason
        assert on_bad_row == "skip"
        assert all(row in want for row in result)
        has_lone_return = re.search(r"\r(?!\n)", text)  # the csv module ends a row there
        assert has_lone_return or len(result) + num_skipped >= len(rows)
    assert frame[LINE].is_sorted()


def is_label(word: str) -> bool:
    return word.strip(" \t") in ("0", "1", "1.0")


@settings(max_examples=60, **PROFILE)
@given(drawn=files())
@example(drawn=(b'label,user\n1,"a\n0,GHOST"\n', "utf-8", "comma", 1, "skip"))
@example(drawn=(b"label,*\n1,a\n", "utf-8", "comma", 40, "error"))
@example(drawn=(b'label,user\n1,"a\r\nb"\r\n', "utf-8", "comma", 5, "error"))
@example(drawn=(b'label,user\n1,"a\n0,b\n1,c\n', "utf-8", "comma", 40, "skip"))
def test_rows_equal_those_of_the_csv_module_or_one_line_names_the_fault(tmp_path, drawn):
    check(tmp_path, drawn)


@pytest.mark.slow
@settings(max_examples=3000, **PROFILE)
@given(drawn=files())
def test_many_files_equal_those_of_the_csv_module(tmp_path, drawn):
    check(tmp_path, drawn)
