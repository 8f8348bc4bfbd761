"""VBench's prompt suites as prompts of this harness.

The suites are VBench's own data and not part of this repository: the text-to-video one is read
from the installed vbench package, the image-to-video one, which the package lacks, from a file
that `hsa-bench setup vbench i2v` downloads. Both are believed by their sha256 only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.metrics.vbench.environment import DEFAULT_PYTHON, SETUP
from analysis.metrics.vbench.presets import choose, select
from analysis.metrics.vbench.weights import DEFAULT_FOLDER
from experiments.prompts import Prompt, readable

COMMIT = "45e79ec14e69a2187202c675d2dbce1a71843d53"


@dataclass(frozen=True)
class Suite:
    file: str
    sha256: str
    url: str


SUITES = {
    "t2v": Suite(
        "VBench_full_info.json",
        "5dd2de80ee43cda750b2b72ea7023657c0b90d3702041c7e4608c65dbe50dccd",
        "the vbench 0.1.5 wheel",
    ),
    "i2v": Suite(
        "vbench2_i2v_full_info.json",
        "8cf4d34dc11779a336c216a1a71d482927cfa24a1bf736ab5c92425609f129f8",
        f"https://raw.githubusercontent.com/Vchitect/VBench/{COMMIT}/vbench2_beta_i2v/"
        "vbench2_i2v_full_info.json",
    ),
}


def t2v_prompts(
    preset: str = "t2v",
    info: str | None = None,
    rewritten: str | None = None,
    python: str = DEFAULT_PYTHON,
) -> list[Prompt]:
    """Text-to-video prompts, each once: two texts stand in the suite twice.

    Args:
        preset: of `presets.PRESETS`.
        info: the suite's file; None: that of the scorer environment of `python`.
        rewritten: a file of longer prompts, one a line, aligned with the suite. Videos are made
            from these and scored with the suite's own. Of a text that stands in the suite twice
            the last line counts, as it does upstream, where one file overwrites the other.

    Raises:
        ValueError: a file is missing or not the published one, or the lines don't align.
    """
    _require_suite(preset, "t2v")
    entries, digest = read("t2v", Path(info) if info else _installed(python))
    texts, rewriting = _rewritten(rewritten, entries)
    return _prompts(entries, select(entries, preset), texts, digest, rewriting)


def i2v_prompts(
    images: str | None,
    ratio: str,
    preset: str = "i2v",
    info: str | None = None,
    rewritten: str | None = None,
) -> list[Prompt]:
    """Image-to-video prompts with their first frames.

    Args:
        images: VBench-I2V's `crop` folder, with a folder of pictures for every ratio.
        ratio: of width to height as VBench writes it: 1-1, 8-5, 7-4, 16-9.
        info: the suite's file; None: where `hsa-bench setup vbench i2v` puts it.
        preset, rewritten: as for `t2v_prompts`.

    Raises:
        ValueError: as for `t2v_prompts`, or a picture is missing.
    """
    _require_suite(preset, "i2v")
    if images is None:
        raise ValueError("images: missing, the crop folder of VBench-I2V's data (docs/vbench.md)")
    downloaded = Path(DEFAULT_FOLDER).expanduser() / SUITES["i2v"].file
    entries, digest = read("i2v", Path(info) if info else downloaded)
    texts, rewriting = _rewritten(rewritten, entries)
    folder = Path(images).expanduser()
    if not (folder / ratio).is_dir():
        known = ", ".join(sorted(path.name for path in folder.glob("*-*"))) or "none"
        raise ValueError(f"ratio={ratio!r}: no such folder in images={images}; there: {known}")
    return _prompts(
        entries, select(entries, preset), texts, digest, rewriting, folder / ratio, ratio
    )


def read(suite: str, path: Path) -> tuple[list[dict[str, Any]], str]:
    """(entries, sha256) of a suite's file.

    Raises:
        ValueError: it is missing or not the published one.
    """
    about = SUITES[suite]
    if not path.is_file():
        hint = SETUP if suite == "t2v" else f"{SETUP[:-1]} i2v`"
        raise ValueError(f"no VBench suite at {path}: {hint}, or get {about.url}")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != about.sha256:
        raise ValueError(f"{path}: not {about.file} of {about.url} (sha256 {digest[:12]}...)")
    return json.loads(data), digest


def _require_suite(preset: str, suite: str) -> None:
    if choose(preset).suite != suite:
        raise ValueError(f"preset={preset!r} is none of the {suite} suite")


def _installed(python: str) -> Path:
    folder = Path(python).parent.parent
    name = SUITES["t2v"].file
    found = sorted(folder.glob(f"lib/python*/site-packages/vbench/{name}"))
    return found[0] if found else folder / name


def _rewritten(
    path: str | None, entries: Sequence[Mapping[str, Any]]
) -> tuple[list[str], str | None]:
    """Texts to generate from and the hash of the file that they are from."""
    if path is None:
        return [entry["prompt_en"] for entry in entries], None
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"rewritten={path}: no such file")
    data = file.read_bytes()
    lines = [line.strip() for line in data.decode("utf-8").splitlines()]
    if len(lines) != len(entries):
        raise ValueError(f"rewritten={path}: {len(lines)} lines for {len(entries)} entries")
    return lines, hashlib.sha256(data).hexdigest()


def _prompts(
    entries: Sequence[Mapping[str, Any]],
    chosen: Sequence[int],
    texts: Sequence[str],
    digest: str,
    rewriting: str | None,
    pictures: Path | None = None,
    ratio: str | None = None,
) -> list[Prompt]:
    """A prompt carries what every dimension of the suite needs of it, whatever the preset."""
    same: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        same.setdefault(entry["prompt_en"], []).append(i)
    prompts = []
    for short in dict.fromkeys(entries[i]["prompt_en"] for i in chosen):
        group = same[short]
        first, last = group[0], group[-1]
        about = {
            "suite": "i2v" if pictures else "t2v",
            "suite_sha256": digest,
            "rewritten_sha256": rewriting,
            "prompt": short,
            "dimensions": sorted({name for i in group for name in entries[i]["dimension"]}),
            "auxiliary_info": {
                name: value
                for i in group
                for name, value in entries[i].get("auxiliary_info", {}).items()
            },
        }
        image = None
        if pictures:
            name = entries[first]["image_name"]
            about |= {"image": name, "ratio": ratio}
            image = readable(pictures / name, "prompts.images")
        prompts.append(Prompt(f"vbench-{first:04d}", texts[last], image, {"vbench": about}))
    return prompts
