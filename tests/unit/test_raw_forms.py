"""Files as other programs write them: quotes, separators, labels, times, numbers, encodings."""

import csv
import gzip
import io
import zipfile
from pathlib import Path

import pytest
from samples import make_data, one_line_error, read_rows

from cki_rec.config import Data, Split
from cki_rec.data.encoding.store import prepare
from cki_rec.data.raw.reading import LABEL, LINE, TIME

SPLIT = Split(by="random", fractions=[0.6, 0.2, 0.2], seed=0)
HEADER = "label,user,item"
ROWS = [f"{n % 2},u{n % 5},i{n % 7}" for n in range(30)]


def text_of(rows: list[str], header: str = HEADER) -> str:
    return "".join(f"{row}\n" for row in [header, *rows])


@pytest.fixture
def file(tmp_path):
    """Function (content, name="a.csv", **options) -> options of a csv."""

    def make(content: str | bytes, name: str = "a.csv", **changes) -> Data:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return make_data("csv", **({"raw": str(path), "split": SPLIT} | changes))

    return make


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("block_bytes", [1, 20, 1 << 20])
def test_newline_inside_quotes_belongs_to_the_value(file, on_bad_row, block_bytes):
    content = text_of([*ROWS, '1,u1,"blue', '0,uGHOST,red"', "0,u2,i2"])
    frame, reading = read_rows(file(content, on_bad_row=on_bad_row), block_bytes)
    assert frame.select("user", "item", LINE).rows()[-2:] == [
        ("u1", "blue\n0,uGHOST,red", 32),
        ("u2", "i2", 34),
    ]
    assert [["1", "u1", "blue\n0,uGHOST,red"]] == list(csv.reader(io.StringIO(content)))[31:32]
    assert reading.counts == {}


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_bad_row_of_two_lines_is_skipped_whole(file, block_bytes):
    content = text_of([*ROWS, 'x,u1,"blue', '0,uGHOST,red"', "0,u2,i2"])
    assert "a.csv, lines 32 to 33: not a number: found" in one_line_error(read_rows, file(content))
    frame, reading = read_rows(file(content, on_bad_row="skip"), block_bytes)
    assert "uGHOST" not in frame["user"]
    assert frame.height == 31
    assert reading.counts == {"not a number": 1}


def test_newline_in_a_header_is_a_space(file):
    content = text_of(ROWS, 'label,user,"kind of\nitem"')
    frame, _ = read_rows(file(content))
    assert frame["kind of item"].to_list() == [row.split(",")[2] for row in ROWS]
    assert frame[LINE][0] == 3


def test_quote_that_never_closes_names_its_lines(file):
    content = text_of([*ROWS[:9], '1,"u,i', *ROWS[9:]])
    assert "a.csv, lines 11 to 32: quotes: found" in one_line_error(read_rows, file(content))
    frame, reading = read_rows(file(content, on_bad_row="skip"))
    assert (frame.height, reading.counts) == (9, {"quotes": 22})


def test_quoted_value_of_many_characters_is_read(file):
    value = "|".join(str(n) for n in range(70_000))
    frame, _ = read_rows(file(text_of([*ROWS, f'1,u1,"{value}"'])))
    assert frame["item"][-1] == value


@pytest.mark.parametrize("form", ["tab", "semicolon", "pipe"])
def test_separator_is_found_or_named(file, form):
    separator = {"tab": "\t", "semicolon": ";", "pipe": "|"}[form]
    content = text_of(ROWS).replace(",", separator)
    want = read_rows(file(text_of(ROWS)))[0]
    assert read_rows(file(content))[0].equals(want)
    assert read_rows(file(content, separator=form))[0].equals(want)
    message = one_line_error(read_rows, file(content, separator="comma"))
    assert f"data.separator={form}" in message


def test_columns_of_several_files_are_matched_by_name(tmp_path, file):
    file(text_of(ROWS))
    other = [",".join(f'"{word}"' for word in reversed(row.split(","))) for row in ROWS]
    data = file(text_of(other, '"item","user",label'), "b.csv")
    frame, _ = read_rows(make_data("csv", raw=[str(tmp_path / "a.csv"), data.raw], split=SPLIT))
    names = ["label", "user", "item"]
    assert frame.columns[:3] == names
    assert frame[:30].select(names).equals(frame[30:].select(names))


def relabeled(words: dict[str, str]) -> str:
    return text_of([words[row[0]] + row[1:] for row in ROWS])


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        ({"1": "True", "0": "FALSE"}, {True: 1, False: 0}),
        ({"1": "yes", "0": "no"}, {True: 1, False: 0}),
        ({"1": "1", "0": "-1"}, {1: 1, -1: 0}),
        ({"1": " click", "0": "view "}, {"click": 1, "view": 0}),
        ({"1": "2.0", "0": "1"}, {2: 1, 1: 0}),
        ({"1": "1.0", "0": "0.0"}, None),
    ],
)
@pytest.mark.parametrize("is_quoted", [True, False])
def test_labels_of_other_forms_are_mapped(file, words, labels, is_quoted):
    content = relabeled(words) + ('1,u1,"x"\n' if is_quoted and labels is None else "")
    frame, _ = read_rows(file(content, labels=labels))
    assert frame[LABEL].to_list()[:30] == [n % 2 for n in range(30)]


@pytest.mark.parametrize(
    ("word", "advice"),
    [("-1", "{1: 1, -1: 0}"), ("False", "{true: 1, false: 0}"), ("no", "{yes: 1, no: 0}")],
)
def test_message_of_a_label_names_the_mapping_and_no_skipping(file, word, advice):
    message = one_line_error(read_rows, file(relabeled({"1": "1", "0": word})))
    assert message.endswith(f"map the labels to 1 and 0 with data.labels={advice}")
    assert "skip" not in message


def test_label_outside_the_mapping_is_named(file):
    data = file(text_of(["maybe,u,i", *ROWS]), labels={1: 1, 0: 0})
    message = one_line_error(read_rows, data)
    assert "not a label: found 'maybe,u,i', expected 1, 1.0, 0, 0.0 in label" in message


def test_one_class_left_by_skipping_gives_the_reasons(tmp_path, file):
    data = file(relabeled({"1": "1", "0": "-1"}), on_bad_row="skip")
    message = one_line_error(prepare, data, tmp_path / "encoded")
    assert "all training rows have label 1" in message
    assert "(skipped before: 15 rows: not a label, e.g. " in message


def test_every_row_bad_gives_counts_and_examples(tmp_path, file):
    rows = ["x,u,i", "y,u,i", "1,u"]
    message = one_line_error(prepare, file(text_of(rows), on_bad_row="skip"), tmp_path / "e")
    assert "no usable row" in message
    assert "2 rows: not a number, e.g. " in message
    assert "line 2: 'x,u,i'; 1 rows: missing field, e.g. " in message
    assert "fetch the file again" not in message


NUMBER = {"fields": ["user", {"name": "price", "kind": "numeric", "transform": "as_is"}]}


def with_numbers(values: list[str], at: str = "1600000000") -> str:
    return text_of([f'1 ,u,"{value}", {at}\t' for value in values], "label,user,price,at")


def test_blanks_around_labels_numbers_and_times_are_read(file):
    content = text_of(["1 ,u, 2.5\t, 1600000000 "] * 3, "label,user,price,at")
    frame, _ = read_rows(file(content, time="at", **NUMBER))
    assert frame.select(LABEL, "price", TIME).row(0) == (1, 2.5, 1600000000)


WORDS = ["-", "NULL", "\\N", "NaN", "n/a"]


@pytest.mark.parametrize("word", WORDS)
def test_words_for_missing_values_are_named_and_read(file, word):
    rows = [f"1,u{n},{word if n % 2 else n}" for n in range(4)]
    content = text_of(rows, "label,user,price")
    message = one_line_error(read_rows, file(content, **NUMBER))
    assert "data.missing=[" in message
    assert "data.number_form=" in message
    entry = {"NULL": None, "NaN": float("nan")}.get(word, word)
    for more in ("", f'1,"u",{word}\n'):
        frame, _ = read_rows(file(content + more, missing=[entry], **NUMBER))
        assert frame["price"].to_list()[:4] == [0.0, None, 2.0, None]


@pytest.mark.parametrize(
    ("form", "value", "number"),
    [
        ("thousands", "1,234.50", 1234.5),
        ("thousands", "$5", 5.0),
        ("thousands", "-1,234,567", -1234567.0),
        ("decimal_comma", "1.234,50", 1234.5),
        ("decimal_comma", "5 €", 5.0),
        ("decimal_comma", "0,5", 0.5),
        ("thousands", "1,5", None),
        ("thousands", "1,2345", None),
        ("decimal_comma", "1.5", None),
    ],
)
def test_numbers_with_separators_are_read_in_the_configured_form(file, form, value, number):
    data = file(with_numbers([value]), number_form=form, **NUMBER)
    if number is None:  # ambiguous: no number is guessed
        assert "not a number" in one_line_error(read_rows, data)
    else:
        assert read_rows(data)[0]["price"].to_list() == [number]
    assert "data.number_form=" in one_line_error(
        read_rows, file(with_numbers(["1,234.5"]), **NUMBER)
    )


TIMES = {
    "1709251250": 1709251250,
    "1709251250.0": 1709251250,
    "1709251250999": 1709251250,
    "2024-03-01 00:00:50": 1709251250,
    "2024-03-01T00:00:50.9Z": 1709251250,
    "2024-03-01T01:30:50+01:30": 1709251250,
    "2024-02-29T19:00:50-0500": 1709251250,
    "2024-03-01": 1709251200,
    "20240301T0000": 1709251200,
}


@pytest.mark.parametrize("is_quoted", [True, False])
@pytest.mark.parametrize("word", TIMES)
def test_form_of_times_is_found(file, word, is_quoted):
    shown = f'"{word}"' if is_quoted else word
    frame, _ = read_rows(file(text_of([f"1,u,{shown}"], "label,user,at"), time="at"))
    assert frame[TIME].to_list() == [TIMES[word]]


@pytest.mark.parametrize(
    ("word", "forms"),
    [("14102100", "seconds or yymmddhh"), ("20240301", "seconds or iso")],
)
def test_ambiguous_times_name_the_option(file, word, forms):
    content = text_of([f"{n % 2},u,{word}" for n in range(4)], "label,user,at")
    message = one_line_error(read_rows, file(content, time="at"))
    assert f"'{word}' may be {forms}" in message
    assert "set data.time_form to one of seconds, milliseconds, iso, yymmddhh" in message
    for form in forms.split(" or "):
        assert read_rows(file(content, time="at", time_form=form))[0].height == 4


def test_date_that_does_not_exist_is_a_bad_row(file):
    rows = ["1,u,2024-03-01", "0,u,2024-02-30", "0,u,2024-03-02"]
    content = text_of(rows, "label,user,at")
    message = one_line_error(read_rows, file(content, time="at"))
    assert "line 3: not a time: found '0,u,2024-02-30'" in message
    assert "data.time_form (now iso)" in message
    assert read_rows(file(content, time="at", on_bad_row="skip"))[0].height == 2


@pytest.mark.parametrize("name", ["latin-1", "cp1252", "utf-16", "gbk"])
@pytest.mark.parametrize("block_bytes", [7, 1 << 20])
def test_other_encodings_are_read(file, name, block_bytes):
    word = "漢字" if name == "gbk" else "café"
    content = text_of([*ROWS, f'1,"{word}",i'])
    want = read_rows(file(content))[0]
    data = file(content.encode(name), encoding=name)
    assert read_rows(data, block_bytes)[0].equals(want)


def test_other_encodings_are_named(file):
    for content, option in (
        (text_of([*ROWS, "1,café,i"]).encode("latin-1"), "latin-1"),
        (text_of(ROWS, "label,user,item,café").encode("latin-1"), "latin-1"),
        (text_of(ROWS).encode("utf-16"), "utf-16"),
    ):
        assert f"data.encoding={option}" in one_line_error(read_rows, file(content))
    message = one_line_error(read_rows, file(text_of(ROWS), encoding="latin1x"))
    assert message.startswith("data.encoding=latin1x: unknown")


@pytest.mark.parametrize("content", [b"PAR1\0\0", b"\xfd7zXZ\0\0", b"\x28\xb5\x2f\xfd\0"])
def test_file_that_is_no_text_is_named(file, content):
    assert "a.csv: a file of kind " in one_line_error(read_rows, file(content))


def test_hidden_files_are_skipped(tmp_path, file):
    want = read_rows(file(text_of(ROWS)))[0]
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("._a.csv", ".DS_Store", "__MACOSX/._a.csv", "a.csv"):
            archive.writestr(name, text_of(ROWS) if name == "a.csv" else "junk")
    assert read_rows(make_data("csv", raw=str(path), split=SPLIT))[0].equals(want)
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in ("train", "valid", "test"):
        (folder / f"{name}.csv").write_text(text_of(ROWS))
        (folder / f"._{name}.csv").write_text("junk")
    (folder / ".DS_Store").write_text("junk")
    by_files = Split(by="files", fractions=[0.8, 0.1, 0.1], seed=0)
    assert read_rows(make_data("csv", raw=str(folder), split=by_files))[0].height == 90


def test_any_csv_needs_a_path_and_a_label_only(tmp_path, file, caplog):
    rows = [f"{n % 2},u{n % 5},i{n % 7},{1_600_000_000 + n}" for n in range(60)]
    data = file(text_of(rows, "clicked,user,item,at"), label="clicked", time="at")
    dataset = prepare(data, tmp_path / "encoded")
    assert [f.name for f in dataset.schema.features] == ["user", "item"]
    assert "published" not in caplog.text


def test_options_of_the_form_keep_the_name_of_the_encoded_set(tmp_path, file):
    """Values found by ``auto`` are recorded, so that they equal explicit ones."""
    content = text_of([f"{row},{1_600_000_000 + n}" for n, row in enumerate(ROWS)], f"{HEADER},at")
    first = prepare(file(content, time="at"), tmp_path / "encoded")
    explicit = file(content, time="at", time_form="seconds", separator="comma")
    assert prepare(explicit, tmp_path / "encoded").folder == first.folder
    other = prepare(file(content, time="at", missing=["u1"]), tmp_path / "encoded")
    assert other.manifest["options"]["missing"] == ["u1"]
    assert "" in other.vocabulary("user")


def test_ids_of_several_forms_are_one_id_if_normalized(tmp_path, file):
    forms = ["100003", "100003.0", "1.00003E+05", "100003 ", "1.00003e5"]
    tags = ["caf\u00e9", "cafe\u0301"]
    rows = [f"{n % 2},{forms[n % 5]},x|{tags[n % 2]}" for n in range(40)]
    fields = ["user", {"name": "tags", "kind": "multi"}]
    data = file(text_of(rows, "label,user,tags"), fields=fields, user="user")
    assert len(prepare(data, tmp_path / "plain").vocabulary("user")) == 5
    normal = make_data("csv", raw=data.raw, split=SPLIT, fields=fields, user="user",
                       normalize_ids=True)  # fmt: skip
    dataset = prepare(normal, tmp_path / "normal")
    assert dataset.vocabulary("user") == ["100003"]
    assert set(dataset.vocabulary("tags")) == {"x", "caf\u00e9"}
    assert dataset.group is not None
    assert set(dataset.group) == {0}


def test_gzip_in_a_csv_and_text_in_a_gz_are_read_by_content(file):
    want = read_rows(file(text_of(ROWS)))[0]
    assert read_rows(file(gzip.compress(text_of(ROWS).encode())))[0].equals(want)
    assert read_rows(file(text_of(ROWS), "b.csv.gz"))[0].equals(want)
    assert Path(file(text_of(ROWS), "b.csv.gz").raw).suffix == ".gz"
