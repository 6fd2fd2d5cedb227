"""MovieLens 100K (tabs, flags of genres) and 10M (``::``, no users) -> rows in the common form."""

import shutil
import zipfile
from datetime import datetime, timezone
from pathlib import Path

import polars as pl
import pytest
from samples import make_data, read_rows

from cki_rec.config import Data, Split, UserError
from cki_rec.data.encoding.store import prepare
from cki_rec.data.raw.formats import movielens
from cki_rec.data.raw.formats.movielens import RATING_FIELDS, USER_FIELDS
from cki_rec.data.raw.reading import LABEL, LINE, TIME
from cki_rec.data.schema import FIRST_ID

GENRES = ["unknown", "Action", "Children's", "Film-Noir"]
MOVIES_100K = [
    ("1", "Toy Story (1995)", "01-Jan-1995", "0|1|1|0"),
    ("2", "Misérables, Les (1995)", "20-Oct-1996", "0|0|0|1"),
    ("3", "unknown", "", "1|0|0|0"),
    ("4", "Nothing at all (1990)", "", "0|0|0|0"),
]
USERS_100K = ["1|24|M|technician|85711", "2|53|F|other|94043", "3|7|M|student|T8H1N"]
RATINGS_100K = [
    f"{1 + n % 3}\t{1 + n % 4}\t{1 + n % 5}\t{881250949 + 5000 * n}" for n in range(24)
]
MOVIES_10M = [
    "1::Toy Story (1995)::Adventure|Animation|Children",
    "2::Amélie: Le Fabuleux destin::Comedy",
    "3::Odd::Title (2001)::Drama",
    "4::Pull My Daisy (1958)::(no genres listed)",
]
RATINGS_10M = [
    f"{1 + n % 3}::{1 + n % 4}::{(1 + n % 10) / 2:g}::{838985046 + 5000 * n}" for n in range(24)
]


def write(folder: Path, files: dict[str, list[str]], encoding: str = "latin-1") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / name).write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return folder


@pytest.fixture
def k100(tmp_path) -> Path:
    """Folder of the 100K form; u.item in latin-1, u.genre with the blank line it really has."""
    movies = [
        f"{i}|{title}|{date}||http://x/?{i}|{flags}" for i, title, date, flags in MOVIES_100K
    ]
    genres = [*(f"{name}|{number}" for number, name in enumerate(GENRES)), ""]
    files = {"u.data": RATINGS_100K, "u.item": movies, "u.user": USERS_100K, "u.genre": genres}
    return write(tmp_path / "ml-100k", files)


@pytest.fixture
def m10(tmp_path) -> Path:
    """Folder of the 10M form; its movies are in UTF-8."""
    files = {"ratings.dat": RATINGS_10M, "movies.dat": MOVIES_10M, "tags.dat": ["1::1::fun::1"]}
    return write(tmp_path / "ml-10M100K", files, "utf-8")


def options(raw: Path, choice: str = "movielens_100k", **changes) -> Data:
    split = Split(by="random", fractions=[0.8, 0.1, 0.1], seed=0)
    return make_data(choice, **({"raw": str(raw), "split": split} | changes))


def read(raw: Path, **changes) -> pl.DataFrame:
    return read_rows(options(raw, **({"fields": ["user", "item"]} | changes)))[0]


def error_of(raw: Path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        read(raw, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def add_line(path: Path, line: str) -> None:
    path.write_bytes(path.read_bytes() + f"{line}\n".encode("latin-1"))


def test_100k_row_has_every_field(k100):
    row = read(k100, fields=[*RATING_FIELDS, *USER_FIELDS]).row(13, named=True)
    assert row == {
        LINE: 14,
        LABEL: 1,
        TIME: 881250949 + 13 * 5000,
        "rating": 4.0,
        "timestamp": 881250949 + 13 * 5000,
        "user": "2",
        "item": "2",
        "genres": "Film-Noir",
        "year": "1996",
        "age": "53",
        "gender": "F",
        "occupation": "other",
        "zip": "94",
    }


def test_100k_genres_are_flags_and_years_the_release(k100):
    frame = read(k100)
    of_item = dict(frame.select("item", "genres").unique().rows())
    assert of_item == {"1": "Action|Children's", "2": "Film-Noir", "3": "unknown", "4": None}
    years = dict(frame.select("item", "year").unique().rows())
    assert (years["1"], years["2"], years["3"]) == ("1995", "1996", None)


def test_100k_year_of_the_title_stands_in_for_a_missing_release(k100):
    years = dict(read(k100).select("item", "year").unique().rows())
    assert years["4"] == "1990"


def test_100k_letters_of_zip_codes_remain(k100):
    frame = read(k100, fields=["zip"])
    assert set(frame["zip"]) == {"85", "94", "T8"}


def test_10m_row_has_every_field_but_those_of_users(m10):
    row = read(m10, fields=list(RATING_FIELDS)).row(18, named=True)
    assert row == {
        LINE: 19,
        LABEL: 1,
        TIME: 838985046 + 18 * 5000,
        "rating": 4.5,
        "timestamp": 838985046 + 18 * 5000,
        "user": "1",
        "item": "3",
        "genres": "Drama",
        "year": "2001",
    }


def test_10m_genres_and_years(m10):
    rows = read(m10).select("item", "genres", "year").unique().rows()
    assert {item: rest for item, *rest in rows} == {
        "1": ["Adventure|Animation|Children", "1995"],
        "2": ["Comedy", None],
        "3": ["Drama", "2001"],
        "4": [None, "1958"],
    }


def test_10m_has_no_fields_of_users(m10):
    for name in USER_FIELDS:
        assert f"has no {name}; " in error_of(m10, fields=["user", name])


@pytest.mark.parametrize("variant", ["k100", "m10"])
@pytest.mark.parametrize("top", ["", "any/"])
def test_zip_equals_folder(request, variant, top, tmp_path):
    folder = request.getfixturevalue(variant)
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, top + file.name)
    assert read(tmp_path / "raw.zip").equals(read(folder))


@pytest.mark.parametrize("variant", ["k100", "m10"])
@pytest.mark.parametrize("block_bytes", [1, 30, 200])
def test_no_row_depends_on_the_block_size(request, variant, block_bytes):
    data = options(request.getfixturevalue(variant), fields=["user", "item"])
    assert read_rows(data, block_bytes)[0].equals(read_rows(data)[0])


@pytest.mark.parametrize("variant", ["k100", "m10"])
def test_times_equal_the_calendar(request, variant, tmp_path):
    fields = ["hour", "weekday", "weekend"]
    dataset = prepare(
        options(request.getfixturevalue(variant), fields=fields), tmp_path / "encoded"
    )
    times = [datetime.fromtimestamp(t, timezone.utc) for t in dataset.timestamp.tolist()]
    want = {
        "hour": [str(t.hour) for t in times],
        "weekday": [str(t.isoweekday() % 7) for t in times],
        "weekend": [str(int(t.isoweekday() >= 6)) for t in times],
    }
    for name, tokens in want.items():
        known, column = dataset.vocabulary(name), dataset.column(name)
        result = [known[i - FIRST_ID] if i >= FIRST_ID else None for i in column]
        assert result == [token if token in known else None for token in tokens]


@pytest.mark.parametrize(
    ("variant", "choice"), [("k100", "movielens_100k"), ("m10", "movielens_10m")]
)
def test_published_choice_prepares(request, variant, choice, tmp_path):
    raw = request.getfixturevalue(variant)
    dataset = prepare(options(raw, choice), tmp_path / "encoded")
    assert [f.name for f in dataset.schema.features] == make_data(choice).fields
    assert len(dataset) == 24


@pytest.mark.parametrize("flags", ["0|1|1", "0|1|1|0|0", "0|1|x|0", "0|1|2|0", ""])
def test_wrong_genre_flags_are_a_bad_movies_line(k100, flags):
    add_line(k100 / "u.item", f"9|Late (1999)|01-Jan-1999||http://x|{flags}")
    message = error_of(k100)
    assert message.startswith(f"{k100}/u.item, line 5: bad movies line: found ")
    assert "expected movie id (each once), title, genres" in message
    _, reading = read_rows(options(k100, fields=["user"], on_bad_row="skip"))
    assert reading.counts == {"bad movies line": 1}


def test_bad_movies_line_shows_the_line_as_it_stands(k100):
    add_line(k100 / "u.item", "9|Late (1999)|01-Jan-1999||http://x|0|1")
    assert "Late (1999)" in error_of(k100)


def test_missing_genre_names_are_asked_for(k100):
    (k100 / "u.genre").unlink()
    message = error_of(k100)
    assert f"{k100}: contains u.item but no u.genre, expected both; " in message
    assert "fetch the whole MovieLens data set again" in message


@pytest.mark.parametrize("name", ["u.item", "u.user", "u.genre"])
@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_side_file_is_refused(k100, name, content):
    (k100 / name).write_bytes(content)
    assert f"{k100}/{name}: empty, expected one entry per line" in error_of(k100)


def test_changed_genre_names_are_another_data_set(k100, tmp_path):
    first = prepare(options(k100, fields=["genres"]), tmp_path / "encoded")
    text = (k100 / "u.genre").read_text()
    (k100 / "u.genre").write_text(text.replace("Action", "Western"))
    other = prepare(options(k100, fields=["genres"]), tmp_path / "encoded")
    assert "Western" in other.vocabulary("genres")
    assert other.folder != first.folder


def test_sources_are_ratings_movies_and_users(k100, m10):
    names = [path.name for path in movielens.files(options(k100))]
    assert names[:3] == ["u.data", "u.item", "u.user"]
    assert [path.name for path in movielens.files(options(m10))] == ["ratings.dat", "movies.dat"]


BAD_USERS = ["4|24|M|technician", "1|24|M|again|12345", "x|24|M|a|12345", "4||M|a|12345"]


@pytest.mark.parametrize("line", [*BAD_USERS, "4|24|M|a|12345|9"])
def test_bad_users_line_is_named(k100, line):
    add_line(k100 / "u.user", line)
    message = error_of(k100)
    assert message.startswith(f"{k100}/u.user, line 4: bad users line: found ")
    assert "expected user id (each once), age, gender, occupation, zip; " in message
    _, reading = read_rows(options(k100, fields=["user"], on_bad_row="skip"))
    assert reading.counts == {"bad users line": 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1\t9\t4\t881250949", "unknown movie"),
        ("9\t1\t4\t881250949", "unknown user"),
        ("1\t1\t4", "missing field"),
        ("1::1::4::881250949", "missing field"),
        ("1\t1\tfour\t881250949", "not a number"),
    ],
)
def test_bad_100k_rating_is_named(k100, line, reason):
    add_line(k100 / "u.data", line)
    message = error_of(k100)
    assert message.startswith(f"{k100}/u.data, line 25: {reason}: found {line!r}, expected ")
    assert message.endswith("data.on_bad_row=skip")


@pytest.mark.parametrize("is_alone", [True, False])
def test_user_with_leading_zero_is_known_next_to_bad_lines(m10, k100, is_alone):
    add_line(k100 / "u.data", "01\t1\t4\t881250949")
    if not is_alone:
        add_line(k100 / "u.data", "1\t1")
    frame = read(k100, on_bad_row="skip")
    assert len(frame) == 25
    assert frame["user"][-1] == "1"


def test_two_variants_in_one_folder_read_the_csv_form(k100, tmp_path):
    latest = Path(__file__).parents[1] / "golden" / "movielens_latest"
    shutil.copytree(latest, k100, dirs_exist_ok=True)
    assert len(read(k100)) == 20
