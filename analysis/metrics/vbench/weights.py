"""The files that VBench's dimensions load: where from, how large, where they must lie.

Everything lies under one folder, which the worker gives to VBench, torch and transformers as their
cache. Nothing is downloaded while scoring. Sizes marked None were not published where we could
read them; a file with a known sha256 is checked against it once, others must not be empty.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_FOLDER = "~/.cache/hsa-bench/vbench"
OPENAI = "https://openaipublic.azureedge.net/clip/models"
CLIP_B32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
CLIP_L14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
HUB = "torch/hub/checkpoints"
BERT = "huggingface/hub/models--bert-base-uncased"
BERT_URL = "https://huggingface.co/bert-base-uncased"


@dataclass(frozen=True)
class WeightFile:
    """One file, or a folder that `path`, a file in it, stands for.

    Attributes:
        path: under the weights folder; may hold a `*`.
        mb: size in 10^6 bytes.
        sha256: of the whole file, or its first digits where no more is published.
        how: what to do with the URL where it is not the file itself.
    """

    path: str
    url: str
    mb: float | None = None
    sha256: str = ""
    how: str = ""

    def find(self, folder: Path) -> Path | None:
        """The file, if it is there and not empty."""
        found = (path for path in folder.glob(self.path) if path.is_file())
        return next((path for path in found if path.stat().st_size > 0), None)

    def lack(self, folder: Path) -> str | None:
        """What is wrong with it, None if nothing is."""
        found = self.find(folder)
        if found is None:
            size = f" ({self.mb:g} MB)" if self.mb else ""
            how = f", {self.how}" if self.how else ""
            return f"{folder / self.path}{size} from {self.url}{how}"
        if not digest(found).startswith(self.sha256):
            return f"{found}: not the published file, download {self.url} again"
        return None


FILES = {
    "dino": WeightFile(
        f"{HUB}/dino_vitbase16_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        343,
    ),
    "dino_code": WeightFile(
        "dino_model/facebookresearch_dino_main/hubconf.py",
        "https://github.com/facebookresearch/dino",
        how="git clone and check out 7c446df5b9f45747937fb0d72314eb9f7b66930a",
    ),
    "clip_b32": WeightFile(
        "clip_model/ViT-B-32.pt", f"{OPENAI}/{CLIP_B32}/ViT-B-32.pt", 354, CLIP_B32
    ),
    "clip_l14": WeightFile(
        "clip_model/ViT-L-14.pt", f"{OPENAI}/{CLIP_L14}/ViT-L-14.pt", 933, CLIP_L14
    ),
    "amt": WeightFile(
        "amt_model/amt-s.pth", "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth", 12
    ),
    "raft": WeightFile(
        "raft_model/models/raft-things.pth",
        "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
        21,
        how="unzip in raft_model/",
    ),
    "aesthetic": WeightFile(
        "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
        "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/"
        "sa_0_4_vit_l_14_linear.pth",
        0.004,
    ),
    "musiq": WeightFile(
        "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
        "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/"
        "musiq_spaq_ckpt-358bb6af.pth",
        109,
        "358bb6af",
    ),
    "grit": WeightFile(
        "grit_model/grit_b_densecap_objectdet.pth",
        "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main/"
        "grit_b_densecap_objectdet.pth",
    ),
    "bert_tokenizer": WeightFile(
        f"{BERT}/snapshots/*/vocab.txt",
        BERT_URL,
        0.2,
        how="HF_HOME=<folder>/huggingface hf download bert-base-uncased",
    ),
    "bert": WeightFile(
        f"{BERT}/snapshots/*/model.safetensors",
        BERT_URL,
        440,
        how="HF_HOME=<folder>/huggingface hf download bert-base-uncased",
    ),
    "umt": WeightFile(
        "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",
        "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main/"
        "l16_ptk710_ftk710_ftk400_f16_res224.pth",
        1200,
    ),
    "tag2text": WeightFile(
        "caption_model/tag2text_swin_14m.pth",
        "https://huggingface.co/spaces/xinyu1205/recognize-anything/resolve/main/"
        "tag2text_swin_14m.pth",
        4500,
    ),
    "viclip": WeightFile(
        "ViCLIP/ViClip-InternVid-10M-FLT.pth",
        "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main/"
        "ViClip-InternVid-10M-FLT.pth",
        1710,
    ),
    "dreamsim": WeightFile(
        "dreamsim/ensemble_lora/adapter_config.json",
        "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints/"
        "dreamsim_ensemble_checkpoint.zip",
        how="unzip in dreamsim/",
    ),
    "cotracker": WeightFile(
        f"{HUB}/cotracker2.pth",
        "https://huggingface.co/facebook/cotracker/resolve/main/cotracker2.pth",
    ),
    "cotracker_code": WeightFile(
        "torch/hub/facebookresearch_co-tracker_main/hubconf.py",
        "https://github.com/facebookresearch/co-tracker",
        how="git clone",
    ),
}


def lacks(names: tuple[str, ...], folder: Path) -> list[str]:
    """What is missing or wrong, one line a file."""
    return [lack for name in names if (lack := FILES[name].lack(folder))]


def missing(names: tuple[str, ...], folder: Path) -> list[str]:
    """Where in the folder files are missing or wrong."""
    return [FILES[name].path for name in names if FILES[name].lack(folder)]


def download(folder: Path) -> Iterator[str]:
    """Get every missing file whose URL is the file itself; yields what was done or is left to do.

    Raises:
        OSError: a download failed; what is complete stays.
    """
    for file in FILES.values():
        lack = file.lack(folder)
        if lack and not file.how:
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{target.name}.part")
            with urllib.request.urlopen(file.url, timeout=60) as source, open(part, "wb") as sink:
                shutil.copyfileobj(source, sink)
            os.replace(part, target)
            lack = file.lack(folder)
        yield f"missing: {lack}" if lack else f"ok: {file.find(folder)}"


def digests(names: tuple[str, ...], folder: Path) -> dict[str, str | None]:
    """sha256 of each file that is there."""
    found = ((name, FILES[name].find(folder)) for name in names)
    return {name: digest(path) if path else None for name, path in found}


def digest(path: Path) -> str:
    """sha256 of a file; remembered beside it, since the large ones take a while."""
    state = path.stat()
    identity = [state.st_size, state.st_mtime_ns]
    note = path.with_name(f".{path.name}.sha256.json")
    try:
        known = json.loads(note.read_bytes())
        if known["file"] == identity:
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        note.write_text(json.dumps({"file": identity, "sha256": sha256}))
    except OSError:
        pass  # a folder that others own: hash again next time
    return sha256
