"""One VBench dimension on a chunk of videos: a JSON request on stdin, a JSON reply on stdout.

Runs under the interpreter of the scorer environment, so it imports nothing of this project. The
request:

    {"dimension", "device", "cache_dir", "offline", "items":
     [{"id", "video", "frames", "prompt", "auxiliary_info"?, "image"?}]}

The reply is `{"ok": true, "rows": [{"id", "value", "weight"}], "failed": {id: why}, "aggregate"}`
or `{"ok": false, "code", "message"}`. Upstream's aggregate of the dimension is
sum(value * weight) / sum(weight) over the rows; a row without a value (colour of an object that
was not found) has weight 0.

`compute_<dimension>` of vbench is called with a list of explicit paths: nothing is looked up by
listing a folder or by guessing a suffix. Offline, an audit hook refuses network connections and
downloaders, whatever upstream tries.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

I2V = ("i2v_subject", "i2v_background", "camera_motion")
DOWNLOADERS = ("wget", "curl", "git", "unzip")
TOLERANCE = 1e-6  # of upstream's aggregate to that of its rows


class Failure(Exception):
    """The whole chunk cannot be scored; `code` says why in one word."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def main():
    threading.Thread(target=die_with, args=(os.getppid(),), daemon=True).start()
    request = json.load(sys.stdin)
    reply_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # upstream prints
    try:
        reply = {"ok": True, **score(request)}
    except Failure as failure:
        reply = {"ok": False, "code": failure.code, "message": str(failure)}
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        reply = {"ok": False, "code": "dimension_failed", "message": message}
    with reply_to:
        json.dump(reply, reply_to, allow_nan=False)


def die_with(parent):
    """A harness that was killed is started again, and wants the device for itself."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def score(request):
    dimension, items = request["dimension"], request["items"]
    cache = Path(request["cache_dir"])
    prepare(dimension, cache, request["offline"])
    module, utils = load(dimension)
    failed = {item["id"]: why for item in items if (why := unreadable(item))}
    readable = [item for item in items if item["id"] not in failed]
    reply = {"rows": [], "failed": failed, "aggregate": None}
    if not readable:
        return reply
    errors = watch_captioner(module)
    with tempfile.TemporaryDirectory() as folder:
        if dimension == "i2v_background":
            dreamsim_in(Path(folder), cache, module, request["device"])
        info = Path(folder, "full_info.json")
        info.write_text(json.dumps([entry(item, dimension) for item in readable]))
        submodules = utils.init_submodules([dimension], local=True)[dimension]
        result = compute(module, dimension, str(info), submodules, request["device"])
    if errors:
        raise Failure("dimension_failed", f"the captioner failed, upstream hid it: {errors[0]}")
    rows, lost = read(dimension, readable, result[-1])
    failed.update(lost)
    aggregate = float(result[0])
    if not lost:
        check_sum(rows, aggregate)
    return {**reply, "rows": rows, "aggregate": aggregate if math.isfinite(aggregate) else None}


def prepare(dimension, cache, offline):
    """Where everything is looked for, before anything is imported."""
    os.environ["VBENCH_CACHE_DIR"] = str(cache)
    os.environ["TORCH_HOME"] = str(cache / "torch")
    os.environ["HF_HOME"] = str(cache / "huggingface")
    if dimension in ("subject_consistency", "i2v_subject"):  # looked for in two places
        name = "dino_vitbase16_pretrain.pth"
        with contextlib.suppress(FileExistsError):
            (cache / "dino_model" / name).symlink_to(cache / "torch" / "hub" / "checkpoints" / name)
    if dimension == "motion_smoothness":  # amt-s.pth holds more than tensors
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
        sys.addaudithook(refuse_network)


def refuse_network(event, arguments):
    if event == "socket.getaddrinfo":
        raise ConnectionError(f"offline: no look-up of {arguments[0]}")
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        raise ConnectionError(f"offline: no connection to {arguments[1]}")
    if event == "subprocess.Popen":
        command = (
            arguments[1] if isinstance(arguments[1], str) else " ".join(map(str, arguments[1]))
        )
        if any(os.path.basename(word) in DOWNLOADERS for word in command.split()):
            raise ConnectionError(f"offline: {command}")


def load(dimension):
    """vbench's modules of a dimension: the one that computes it and the one with its weights."""
    package = "vbench2_beta_i2v" if dimension in I2V else "vbench"
    try:
        keep_torchvision_importable()
        seed_vocabulary()
        return (
            importlib.import_module(f"{package}.{dimension}"),
            importlib.import_module(f"{package}.utils"),
        )
    except ImportError as error:
        raise Failure("not_installed", f"{dimension}: {error}") from error


_SCHEMAS = []


def keep_torchvision_importable():
    """torchvision from PyPI beside torch for CPU cannot load its C++ ops, and importing it needs
    two of their names. Transforms and models work without; calling the ops fails, as it should.
    """
    import torch

    if torch.version.cuda is None and metadata.version("torchvision").find("+") < 0:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SCHEMAS.append(library)  # the names live as long as it does


def seed_vocabulary():
    """ViCLIP downloads its vocabulary at import; openai-clip ships the same file."""
    target = Path(os.environ["VBENCH_CACHE_DIR"], "ViCLIP", "bpe_simple_vocab_16e6.txt.gz")
    clip = importlib.util.find_spec("clip")
    if clip and not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(clip.origin).with_name(target.name), target)


def dreamsim_in(folder, cache, module, device):
    """Upstream's DreamSim looks for everything in `./models`, DINO's code and weights too, and
    wants a GPU unless it is told of another device.
    """
    module.dreamsim = functools.partial(module.dreamsim, device=device)
    models = folder / "models"
    models.mkdir()
    for path in (cache / "dreamsim").glob("*"):
        (models / path.name).symlink_to(path)
    code = "facebookresearch_dino_main"
    (models / code).symlink_to(cache / "dino_model" / code)
    (models / "checkpoints").symlink_to(cache / "torch" / "hub" / "checkpoints")
    os.chdir(folder)


def compute(module, dimension, info, submodules, device):
    """Upstream's (aggregate, ..., rows); without the graphs for gradients that it keeps, tens of
    gigabytes in scene.
    """
    import torch

    device = torch.device(device)  # upstream takes a text "cuda" for something else
    try:
        with torch.no_grad():
            return getattr(module, f"compute_{dimension}")(info, device, submodules)
    except ZeroDivisionError:
        if dimension != "color":
            raise
        return math.nan, []  # it divides by the number of videos in which the object was found


def unreadable(item):
    """Why VBench's decoder does not see the video as it is; upstream would leave it out."""
    import cv2

    if not os.path.isfile(item["video"]):
        return "no such file"
    video = cv2.VideoCapture(item["video"])
    count = 0
    while video.isOpened() and video.read()[0]:
        count += 1
    video.release()
    if count != item["frames"]:
        return f"{count} of {item['frames']} frames are readable"
    return None


def entry(item, dimension):
    """An element of VBench's full_info.json."""
    found = {
        "prompt_en": item["prompt"],
        "dimension": [dimension],
        "video_list": [item["video"]],
        "image_name": item.get("image"),  # absolute: upstream joins it to a relative folder
    }
    if item.get("auxiliary_info"):
        found["auxiliary_info"] = item["auxiliary_info"]
    return found


def watch_captioner(module):
    """Errors of GRiT, which object_class turns into "nothing found": they are collected here."""
    errors = []
    captioner = getattr(module, "DenseCaptioning", None)
    if captioner is None:
        return errors

    class Watched(captioner):
        def run_caption_tensor(self, image):
            try:
                return super().run_caption_tensor(image)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
                raise

    module.DenseCaptioning = Watched
    return errors


def read(dimension, items, results):
    """(rows, why others are missing) from what upstream says of each video."""
    by_path = {result["video_path"]: result for result in results}
    rows, lost = [], {}
    for item in items:
        result = by_path.get(item["video"])
        if result is None and dimension == "color":
            rows.append({"id": item["id"], "value": None, "weight": 0})
        elif result is None:
            lost[item["id"]] = "vbench returned no result"
        else:
            value = float(result["video_results"])
            value = value / 100 if dimension == "imaging_quality" else value
            if math.isfinite(value):
                share = weight(dimension, item, result)
                rows.append({"id": item["id"], "value": value, "weight": share})
            else:
                lost[item["id"]] = f"vbench returned {value}"
    return rows, lost


def weight(dimension, item, result):
    """How much of upstream's aggregate a video is: frames, pairs of frames, or 1."""
    if dimension in ("subject_consistency", "background_consistency"):
        return item["frames"] - 1
    if "frame_results" in result:
        return len(result["frame_results"])
    return result.get("frame_count", 1)


def check_sum(rows, aggregate):
    total = sum(row["weight"] for row in rows)
    if total:
        mean = sum(row["weight"] * (row["value"] or 0) for row in rows) / total
        if not abs(mean - aggregate) <= TOLERANCE:
            raise Failure("dimension_failed", f"rows average {mean}, vbench says {aggregate}")


if __name__ == "__main__":
    main()
