"""Raw MovieLens files -> rows in the common form; damaged and inconsistent files."""

import shutil
import zipfile
from pathlib import Path

import polars as pl
import pytest
from samples import EMBEDDED, GOLDEN, make_data, read_rows, shared_data

from cki_rec.config import UserError
from cki_rec.data.raw.formats.movielens import RATING_FIELDS, USER_FIELDS
from cki_rec.data.raw.reading import LABEL, LINE, TIME, Reading


def read(path: Path, fields=("user", "item"), on_bad_row: str = "error") -> pl.DataFrame:
    return read_rows(make_data(raw=str(path), fields=list(fields), on_bad_row=on_bad_row))[0]


def skipped(path: Path) -> Reading:
    return read_rows(make_data(raw=str(path), fields=["user", "item"], on_bad_row="skip"))[1]


@pytest.fixture(params=["latest", "1m"])
def sample(request, tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN / f"movielens_{request.param}", tmp_path / "raw"))


@pytest.fixture
def latest(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN / "movielens_latest", tmp_path / "raw"))


@pytest.fixture
def one_million(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN / "movielens_1m", tmp_path / "raw"))


def zip_of(folder: Path, top: str) -> Path:
    path = folder.parent / "raw.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, top + file.name)
    return path


def ratings_of(folder: Path) -> Path:
    return next(folder.glob("ratings.*"))


def add_line(folder: Path, csv_line: str) -> None:
    path = ratings_of(folder)
    line = csv_line if path.suffix == ".csv" else csv_line.replace(",", "::")
    path.write_text(path.read_text() + line + "\n")


def error_of(path: Path, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_latest_row_has_every_field(latest):
    row = read(latest).row(1, named=True)
    assert row == {
        LINE: 3,
        LABEL: 1,
        TIME: 964982703,
        "rating": 4.5,
        "timestamp": 964982703,
        "user": "1",
        "item": "2",
        "genres": "Drama",
        "year": "2002",
    }


def test_1m_row_has_every_field(one_million):
    row = read(one_million, [*RATING_FIELDS, *USER_FIELDS]).row(17, named=True)
    assert row == {
        LINE: 18,
        LABEL: 1,
        TIME: 1306463005,
        "rating": 5.0,
        "timestamp": 1306463005,
        "user": "4",
        "item": "7",
        "genres": "Sci-Fi",
        "year": None,
        "gender": "M",
        "age": "45",
        "occupation": "7",
        "zip": "02",
    }


def test_no_genres_listed_is_empty_and_missing_year_is_null(latest):
    frame = read(latest)
    hyena = frame.filter(frame["item"] == "30").row(0, named=True)
    assert hyena["genres"] is None
    assert hyena["year"] is None
    assert frame.filter(frame["item"] == "10")["year"].to_list() == ["1999"] * 4


def test_repeated_user_item_rows_remain(sample):
    frame = read(sample)
    assert len(frame) == 20
    assert len(frame.filter((frame["user"] == "2") & (frame["item"] == "10"))) == 2


@pytest.mark.parametrize("top", ["", "any-folder/"])
def test_zip_equals_folder(sample, top):
    assert read(zip_of(sample, top)).equals(read(sample))


def test_blank_lines_are_not_rows(sample):
    add_line(sample, "")
    assert len(read(sample)) == 20


def test_missing_raw_names_path_and_option(tmp_path):
    message = error_of(tmp_path / "absent.zip")
    assert "absent.zip: no such file or folder" in message
    assert "data.raw" in message


@pytest.mark.parametrize("is_folder", [True, False])
def test_missing_ratings_are_reported_with_the_existing_files(latest, is_folder):
    ratings_of(latest).unlink()
    message = error_of(latest if is_folder else zip_of(latest, "top/"))
    assert "contains no ratings.csv, ratings.dat or u.data (found" in message
    assert "movies.csv" in message


def test_ratings_without_movies_are_refused(latest):
    (latest / "movies.csv").unlink()
    assert "contains ratings.csv but no movies.csv" in error_of(latest)


def test_without_users_the_form_is_that_of_10m(one_million):
    (one_million / "users.dat").unlink()
    assert len(read(one_million)) == 20
    assert "has no gender; did you mean" in error_of(one_million, fields=["gender"])


def test_two_data_sets_in_one_zip_are_refused(latest):
    for name in ("a", "b"):
        shutil.copytree(latest, latest.parent / "both" / name)
    assert "contains ratings.csv twice (a/ratings.csv, b/ratings.csv)" in error_of(
        latest.parent / "both"
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_zip_is_refused(latest, share):
    path = zip_of(latest, "top/")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "raw.zip: damaged or not a zip" in error_of(path)


def test_a_csv_as_raw_data_of_another_set_names_the_option(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text("label,user\n1,a\n")
    assert "my.csv: damaged or not a zip" in (error := error_of(path))
    assert "A csv file of your own is read with data=csv" in error


def test_zip_with_flipped_bytes_is_refused(latest):
    path = zip_of(latest, "top/")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("top/ratings.csv")
    middle = info.header_offset + 60 + info.compress_size // 2
    content[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(content)
    assert "raw.zip (member top/ratings.csv): damaged or truncated after line 0" in error_of(path)


BAD_LINES = {
    "missing field": ["1,1,4.0", "1,1,,964982703"],
    "extra field": ["1,1,4.0,964982703,9"],
    "not a number": ["1,1,good,964982703", "1,1,4.0,yesterday", "bob,1,4.0,964982703"],
    "not finite": ["1,1,NaN,964982703", "1,1,inf,964982703"],
    "unknown movie": ["1,555,4.0,964982703"],
}
ONE_BAD_LINE = [(reason, line) for reason, lines in BAD_LINES.items() for line in lines]


@pytest.mark.parametrize(("reason", "line"), ONE_BAD_LINE)
def test_bad_row_names_file_line_and_remedy(sample, reason, line):
    add_line(sample, line)
    number = 22 if ratings_of(sample).suffix == ".csv" else 21
    message = error_of(sample)
    assert message.startswith(f"{ratings_of(sample)}, line {number}: {reason}: found ")
    assert "expected" in message
    assert "data.on_bad_row=skip" in message


def test_bad_row_inside_a_zip_names_the_member(latest):
    add_line(latest, "1,1,4.0")
    message = error_of(zip_of(latest, "top/"))
    assert "raw.zip (member top/ratings.csv), line 22: missing field: found '1,1,4.0'" in message


def test_first_bad_row_is_reported(latest):
    add_line(latest, "1,555,4.0,964982703")
    add_line(latest, "1,1,4.0")
    assert "line 22: unknown movie" in error_of(latest)


def test_unknown_user_of_1m_is_bad(one_million):
    add_line(one_million, "77,1,4,964982703")
    assert "line 21: unknown user: found '77::1::4::964982703'" in error_of(one_million)


def test_skip_drops_and_counts_by_reason(sample):
    for lines in BAD_LINES.values():
        for line in lines:
            add_line(sample, line)
    assert len(read(sample, on_bad_row="skip")) == 20
    reading = skipped(sample)
    assert reading.counts == {reason: len(lines) for reason, lines in BAD_LINES.items()}
    separator = "," if ratings_of(sample).suffix == ".csv" else "::"
    example = reading.examples["unknown movie"]
    assert len(example) == 1
    assert separator.join(["'1", "555", "4.0", "964982703'"]) in example[0]


def test_skip_keeps_three_examples_and_counts_all(latest):
    for number in range(5):
        add_line(latest, f"1,1,4.{number}")
    bad_rows = skipped(latest)
    assert bad_rows.counts == {"missing field": 5}
    assert [text[-9:] for text in bad_rows.examples["missing field"]] == [
        "'1,1,4.0'",
        "'1,1,4.1'",
        "'1,1,4.2'",
    ]


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize(
    "name",
    ["latest/ratings.csv", "latest/movies.csv", "1m/ratings.dat", "1m/movies.dat", "1m/users.dat"],
)
def test_empty_file_is_refused(tmp_path, name, on_bad_row):
    form, _, file = name.partition("/")
    folder = Path(shutil.copytree(GOLDEN / f"movielens_{form}", tmp_path / "raw"))
    (folder / file).write_bytes(b"")
    assert f"{folder / file}: empty, expected" in error_of(folder, on_bad_row=on_bad_row)


def test_quote_that_never_closes_is_refused(latest):
    path = latest / "movies.csv"
    path.write_text(path.read_text() + '5,"Open (1995),Drama\n' + "x" * 200_000)
    assert "expected quotes that close" in error_of(latest)


def test_header_alone_is_refused(latest):
    ratings_of(latest).write_text("userId,movieId,rating,timestamp\r\n")
    assert "no usable row, expected rows of 4 fields" in error_of(latest)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("name", ["ratings.csv", "movies.csv"])
def test_missing_header_is_refused(latest, name, on_bad_row):
    path = latest / name
    path.write_text(path.read_text().split("\n", 1)[1])
    message = error_of(latest, on_bad_row=on_bad_row)
    assert message.startswith(f"{path}, line 1: found ")
    assert "expected the header" in message


def test_different_header_is_refused(latest):
    path = ratings_of(latest)
    path.write_text(path.read_text().replace("userId", "user"))
    assert "found 'user,movieId,rating,timestamp', expected the header" in error_of(latest)


@pytest.mark.parametrize("line", ["5,No Genres Column", "1,Twice (1995),Drama"])
def test_bad_movies_line_is_refused_or_counted(latest, line):
    path = latest / "movies.csv"
    path.write_text(path.read_text() + line + "\n")
    assert f"{path}, line 8: bad movies line" in error_of(latest)
    assert skipped(latest).counts == {"bad movies line": 1}
    assert len(read(latest, on_bad_row="skip")) == 20


def test_bad_users_line_is_refused(one_million):
    path = one_million / "users.dat"
    path.write_text(path.read_text() + "11::F::25\n")
    assert f"{path}, line 6: bad users line" in error_of(one_million)


def test_unknown_field_is_reported_with_the_existing_ones(latest):
    message = error_of(latest, fields=["user", "gender", "zip"])
    assert "has no gender, zip; " in message


def test_embedded_data_set_has_its_published_size():
    frame = read(EMBEDDED)
    assert len(frame) == 100_836
    assert frame["user"].n_unique() == 610
    assert frame["item"].n_unique() == 9_724
    assert (frame["rating"] >= 4).mean() == pytest.approx(0.482, abs=5e-4)


def test_1m_has_its_published_size():
    path = shared_data("ml-1m.zip")
    frame = read(path, [*RATING_FIELDS, *USER_FIELDS])
    assert len(frame) == 1_000_209
    assert frame["user"].n_unique() == 6_040
    assert frame["item"].n_unique() == 3_706
    assert (frame["rating"] >= 4).mean() == pytest.approx(0.575, abs=5e-4)
