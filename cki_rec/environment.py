"""The packages that move together: check them at start, install them for ``make setup``.

Standard library only: it runs before anything is installed, as
``python cki_rec/environment.py .venv [auto|cpu|cuda]``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

TORCH, TORCHREC, FBGEMM = "2.13.0", "1.8.0", "1.8.0"
FBGEMM_PACKAGES = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}
"""Same import name, so never both."""


class EnvironmentMismatchError(Exception):
    """Installed packages do not fit together; the message holds the line that mends it."""


def installed_version(package: str) -> str | None:
    """Return the release of an installed package without its local part, or None."""
    try:
        return metadata.version(package).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def check_versions() -> None:
    """Check that torch, torchrec and exactly one fbgemm of the pinned releases are installed.

    Raises:
        EnvironmentMismatchError: They are not; lists the installed releases and the fix.
    """
    installed = {name: installed_version(name) for name in ("torch", "torchrec")}
    fbgemm = {name: v for name in FBGEMM_PACKAGES.values() if (v := installed_version(name))}
    fits = installed == {"torch": TORCH, "torchrec": TORCHREC} and list(fbgemm.values()) == [
        FBGEMM
    ]
    if not fits:
        listed = ", ".join(f"{n} {v or 'missing'}" for n, v in {**installed, **fbgemm}.items())
        if not fbgemm:
            listed += ", fbgemm missing"
        accelerator = detect_accelerator()
        raise EnvironmentMismatchError(
            f"needs torch {TORCH}, torchrec {TORCHREC} and exactly one of "
            f"{' or '.join(FBGEMM_PACKAGES.values())} {FBGEMM}; found {listed}. "
            f"Install with: make setup, or: pip uninstall -y {' '.join(FBGEMM_PACKAGES.values())}"
            f" ; pip install torch=={TORCH} {FBGEMM_PACKAGES[accelerator]}=={FBGEMM}"
            f" && pip install --no-deps torchrec=={TORCHREC}"
        )


def detect_accelerator() -> str:
    """Return ``cuda`` where the NVIDIA driver answers and lists a device, else ``cpu``."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return "cuda" if listing.returncode == 0 and "GPU" in listing.stdout else "cpu"


def install(environment: Path, accelerator: str) -> None:
    """Install the project and its dependencies into ``environment``, a virtual environment.

    Does nothing when it already does: a stamp in it names the accelerator, the Python and the
    content of pyproject.toml that were installed.
    """
    project = Path(__file__).resolve().parent.parent
    if accelerator == "auto":
        accelerator = detect_accelerator()
        reason = "NVIDIA driver found" if accelerator == "cuda" else "no NVIDIA driver found"
    else:
        reason = "as asked"
    if accelerator not in FBGEMM_PACKAGES:
        raise EnvironmentMismatchError(f"accelerator '{accelerator}': auto, cpu or cuda")
    pins = (project / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    digest = hashlib.sha256(pins).hexdigest()[:16]
    wanted = f"{accelerator} {sys.version_info.major}.{sys.version_info.minor} {project} {digest}"
    stamp = environment / "cki-rec-setup"
    if stamp.exists() and stamp.read_text() == wanted:
        print(f"setup: {environment} is up to date ({accelerator}, {reason})")
        return
    print(f"setup: {accelerator} packages ({reason}), Python {sys.version.split()[0]}", flush=True)
    stamp.unlink(missing_ok=True)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists() or _minor(python) != sys.version_info[:2]:
        venv.create(environment, clear=True, with_pip=True, symlinks=os.name != "nt")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if index := os.environ.get("TORCH_INDEX"):
        pip += ["--extra-index-url", index]
    other = FBGEMM_PACKAGES["cuda" if accelerator == "cpu" else "cpu"]
    uninstall = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", other]
    subprocess.run(uninstall, check=True, stderr=subprocess.DEVNULL)
    print("setup: 1 of 2, the project and its dependencies (minutes the first time)", flush=True)
    subprocess.run([*pip, "--editable", f"{project}[train,report,{accelerator},dev]"], check=True)
    print("setup: 2 of 2, torchrec", flush=True)
    subprocess.run([*pip, "--no-deps", f"torchrec=={TORCHREC}"], check=True)
    stamp.write_text(wanted)
    print(f"setup: done, {environment}")


def _minor(python: Path) -> tuple[int, ...]:
    """Return (3, minor) of an interpreter, or () when it does not run."""
    ask = [str(python), "-c", "import sys; print(*sys.version_info[:2])"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, check=False)
    except OSError:
        return ()
    return tuple(int(part) for part in answer.stdout.split())


def main() -> int:
    """Run ``install`` from the command line."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        print(
            f"setup: Python {sys.version.split()[0]} found, 3.10 to 3.13 needed", file=sys.stderr
        )
        return 2
    accelerator = sys.argv[2] if len(sys.argv) > 2 else "auto"
    try:
        install(Path(sys.argv[1]), accelerator)
    except EnvironmentMismatchError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"setup: failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
