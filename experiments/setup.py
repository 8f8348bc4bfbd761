"""`hsa-bench setup vbench`: the scorer environment, from the locks in analysis/metrics/vbench.

    hsa-bench setup vbench           everything but detectron2; needs Python 3.11
    hsa-bench setup vbench small     CPU, without models: enough for temporal_flickering
    hsa-bench setup vbench grit      detectron2 too, compiled here: four of the dimensions
    hsa-bench setup vbench i2v       the prompts of VBench-I2V, nothing else
    hsa-bench setup vbench weights   the models' files, about 10 GB, as far as they are one download

`folder=.venv-vbench` and `python=python3.11` say where it is made and by which interpreter. Nothing
is installed into the environment that this runs in.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from analysis.metrics.vbench import environment, suite, weights
from analysis.metrics.vbench.dimensions import FULL, SMALL
from analysis.metrics.vbench.weights import DEFAULT_FOLDER
from experiments.errors import UserError
from experiments.files import replace_file

LOCKS = Path(environment.__file__).parent
FOLDER = ".venv-vbench"
WORDS = (SMALL, FULL, "grit", "i2v", "weights")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DETECTRON2 = (
    "git+https://github.com/facebookresearch/detectron2@02b5c4e295e990042a714712c21dc79b731e8833"
)
LAST_WORDS = ("ERROR", "fatal:")  # of pip and of git
FULL_PYTHON = "3.11"  # the newest with wheels of tokenizers 0.13.3, which transformers 4.33.2 needs


def main(arguments: Sequence[str]) -> int:
    """Raises UserError for what cannot be set up."""
    what, *rest = arguments or [""]
    if what != "vbench":
        raise UserError(f"setup {what}: choose vbench")
    options = dict(word.split("=", 1) for word in rest if "=" in word)
    words = [word for word in rest if "=" not in word]
    unknown = [*(set(words) - set(WORDS)), *(options.keys() - {"folder", "python"})]
    if unknown:
        raise UserError(f"setup vbench {unknown[0]}: choose {', '.join(WORDS)}, folder=, python=")
    if "i2v" in words:
        print(fetch_suite())
        return 0
    if "weights" in words:
        return _fetch_weights()
    mode = SMALL if SMALL in words else FULL
    folder = Path(options.get("folder", FOLDER))
    build(folder, mode, options.get("python"), grit="grit" in words)
    print(f"{folder} is ready ({mode}); `hsa-bench doctor` says what each dimension still needs")
    return 0


def build(folder: Path, mode: str, python: str | None = None, grit: bool = False) -> None:
    """Make the environment, unless it is there as its lock says; grit adds to a full one.

    One whose interpreter is gone, as after an upgrade of Python, is made anew.

    The stamp is written last: an interrupted set-up is not taken for an environment.

    Raises:
        UserError: the folder holds something else, no interpreter has the packages, or pip failed.
    """
    if grit and mode == SMALL:
        raise UserError("setup vbench small grit: the small environment has no models")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise UserError(f"setup vbench folder={folder}: not empty and no virtual environment")
    lock = LOCKS / ("requirements-small.lock" if mode == SMALL else "requirements.lock")
    stamp = folder / environment.STAMP
    state = {"mode": mode, "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest()}
    if _read(stamp) != state or not (folder / "bin" / "python").is_file():
        interpreter = _interpreter(python, mode)
        stamp.unlink(missing_ok=True)
        _run([interpreter, "-m", "venv", "--clear", str(folder)])
        if mode == SMALL:
            _install_cpu_torch(folder, lock)
        _pip(folder, "--no-deps", "-r", str(lock))
        stamp.write_text(json.dumps(state))
    if grit:
        _install_detectron2(folder)


def _install_detectron2(folder: Path) -> None:
    command = ("--no-deps", "--no-build-isolation")
    try:
        _pip(folder, *command, DETECTRON2)
    except UserError as error:
        by_hand = " ".join([str(folder / "bin" / "python"), "-m pip install", *command, "CHECKOUT"])
        raise UserError(
            f"{error}; it takes github.com, git and a C++ compiler, or with a checkout of that "
            f"commit: `{by_hand}`"
        ) from error


def fetch_suite() -> Path:
    """The I2V prompts, which the vbench package lacks, by commit and sha256.

    Raises:
        UserError: it could not be downloaded, or is another file.
    """
    about = suite.SUITES["i2v"]
    target = Path(DEFAULT_FOLDER).expanduser() / about.file
    if not target.is_file():
        try:
            with urllib.request.urlopen(about.url, timeout=60) as answer:
                data = answer.read()
        except OSError as error:
            raise UserError(f"{about.url}: {error}; save it as {target}") from error
        if hashlib.sha256(data).hexdigest() != about.sha256:
            raise UserError(f"{about.url}: not the file with sha256 {about.sha256}")
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, data)
    return target


def _fetch_weights() -> int:
    left = 0
    try:
        for line in weights.download(Path(DEFAULT_FOLDER).expanduser()):
            left += line.startswith("missing")
            print(line)
    except OSError as error:
        raise UserError(f"setup vbench weights: {error}") from error
    return 1 if left else 0


def _install_cpu_torch(folder: Path, lock: Path) -> None:
    """torch and torchvision built for each other, where that index can be reached; else what any
    index has, and the worker makes torchvision importable.
    """
    pinned = [line for line in lock.read_text().splitlines() if line.startswith("torch")]
    quick = ("--retries", "0", "--timeout", "15")
    subprocess.run(
        _pip_command(folder, "--no-deps", *quick, "--index-url", CPU_INDEX, *pinned),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _interpreter(python: str | None, mode: str) -> str:
    if python is None and (mode == SMALL or sys.version.startswith(f"{FULL_PYTHON}.")):
        return sys.executable
    found = shutil.which(python or f"python{FULL_PYTHON}")
    if found is None:
        raise UserError(
            f"setup vbench: needs Python {FULL_PYTHON}, say python=/path/to/python{FULL_PYTHON}"
        )
    return found


def _pip(folder: Path, *arguments: str) -> None:
    _run(_pip_command(folder, *arguments))


def _pip_command(folder: Path, *arguments: str) -> list[str]:
    quiet = ("--quiet", "--disable-pip-version-check")
    return [str(folder / "bin" / "python"), "-m", "pip", "install", *quiet, *arguments]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(LAST_WORDS)]
        last = (errors or lines or ["no output"])[-1]
        raise UserError(f"`{' '.join(command)}` failed: {last}")


def _read(stamp: Path) -> object:
    try:
        return json.loads(stamp.read_bytes())
    except (OSError, ValueError):
        return None
