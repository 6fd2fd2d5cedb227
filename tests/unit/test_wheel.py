"""The wheel holds the package, the configuration and the embedded data, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest
from samples import ROOT

BUNDLED = {"conf": "cki_rec/_project/conf", "data": "cki_rec/_project/data"}
"""Folder of the checkout -> its place in the wheel."""
DATA = ("README.md", "ml-latest-small.zip")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, unpacked."""
    pytest.importorskip("hatchling", reason="the dev dependency hatchling is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def files_of(folder):
    inside = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in inside if "__pycache__" not in name}


def test_files(wheel):
    expected = {f"cki_rec/{name}" for name in files_of(ROOT / "cki_rec")}
    expected |= {f"{BUNDLED['conf']}/{name}" for name in files_of(ROOT / "conf")}
    expected |= {f"{BUNDLED['data']}/{name}" for name in DATA}
    found = {name for name in files_of(wheel) if ".dist-info/" not in name}
    assert "cki_rec/py.typed" in found
    assert found == expected


def test_metadata_asks_for_the_library_only(wheel):
    (file,) = wheel.glob("*.dist-info/METADATA")
    needed = [line for line in file.read_text().splitlines() if line.startswith("Requires-Dist:")]
    always = {line.split()[1].split(">")[0] for line in needed if "extra ==" not in line}
    assert always == {"torch", "numpy", "scipy"}


def test_the_unpacked_wheel_finds_its_configuration(wheel, tmp_path):
    code = "import cki_rec; print(cki_rec.__file__); print(cki_rec.project_root())"
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(wheel)}, capture_output=True, text=True
    )
    package, root = run.stdout.split()
    assert package == str(wheel / "cki_rec" / "__init__.py"), run.stderr
    assert root == str(wheel / "cki_rec" / "_project")
    assert (wheel / "cki_rec" / "_project" / "conf" / "config.yaml").is_file()
