from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.torch import load_file, save_file

import conf
from analysis.metrics import alexnet
from analysis.metrics.background_stability import BackgroundStability
from analysis.metrics.base import Metric
from analysis.metrics.latent_error import LatentError
from analysis.metrics.lpips import LPIPS
from analysis.metrics.prompt_adherence import PromptAdherence
from analysis.metrics.psnr import PSNR
from analysis.metrics.ssim import SSIM
from experiments.config import build
from experiments.embedded.videos import render, split

YAMLS = sorted((Path(conf.__file__).parent / "metric").glob("*.yaml"))


@dataclass
class Video:
    pixels: np.ndarray | None = None
    last: np.ndarray | None = None
    allocation: np.ndarray | None = None
    record: dict = field(default_factory=lambda: {"request": {"task": "t2v", "meta": {}}})

    def frames(self) -> np.ndarray:
        return self.pixels

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        known = {"latents": self.last, "allocation": self.allocation}
        return {name: array for name, array in known.items() if array is not None}


def noisy_pair(seed: int = 0) -> tuple[Video, Video]:
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 256, (3, 24, 32, 3))
    noise = rng.integers(-25, 25, target.shape)
    return Video(np.clip(target + noise, 0, 255).astype(np.uint8)), Video(target.astype(np.uint8))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_is_a_metric_of_its_name(path: Path) -> None:
    metric = build(yaml.safe_load(path.read_text()), path.stem)
    assert isinstance(metric, Metric) and metric.name == path.stem
    assert path.read_text().startswith(f"# @package metric.{path.stem}\n")
    assert isinstance(metric.version, int) and metric.title
    if metric.unavailable() is None:
        assert json.loads(json.dumps(metric.parameters())) == metric.parameters()


@pytest.mark.parametrize("metric", [PSNR(), SSIM(), LatentError()], ids=lambda m: m.name)
def test_fidelity_needs_a_reference_of_the_same_shape(metric: Metric) -> None:
    video = Video(np.zeros((3, 16, 16, 3), np.uint8), np.zeros((4, 3, 2, 2), np.float32))
    other = Video(np.zeros((2, 16, 16, 3), np.uint8), np.zeros((4, 2, 2, 2), np.float32))
    assert metric.needs_reference
    with pytest.raises(ValueError, match="no reference"):
        metric(video)
    with pytest.raises(ValueError, match="differ"):
        metric(video, other)


def test_psnr_is_its_formula() -> None:
    video, target = noisy_pair()
    error = ((video.pixels.astype(float) - target.pixels) ** 2).mean()
    assert PSNR()(video, target)["psnr"] == pytest.approx(10 * np.log10(255**2 / error))


def test_psnr_of_one_wrong_level_lies_below_that_of_identical_videos() -> None:
    _, target = noisy_pair()
    assert PSNR()(target, target) == {"psnr": 100.0}
    almost = target.pixels.copy()
    almost[0, 0, 0, 0] ^= 1
    assert PSNR()(Video(almost), target)["psnr"] < 100.0


def test_ssim_is_its_formula() -> None:
    video, target = noisy_pair()
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def smooth(image: np.ndarray) -> np.ndarray:  # (F, H, W, 3)
        return (sliding_window_view(image, (11, 11), axis=(1, 2)) * window).sum((-2, -1))

    x, y = video.pixels.astype(float), target.pixels.astype(float)
    mx, my = smooth(x), smooth(y)
    vx, vy, vxy = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = ((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert SSIM()(video, target)["ssim"] == pytest.approx(expected.mean(), abs=1e-9)
    assert SSIM()(target, target)["ssim"] == pytest.approx(1.0)


def test_latent_error_is_relative() -> None:
    target = Video(last=np.full((4, 3, 2, 2), 2.0, np.float32))
    video = Video(last=np.full((4, 3, 2, 2), 2.5, np.float32))
    assert LatentError()(video, target)["latent_error"] == pytest.approx(0.25)
    assert LatentError()(target, target)["latent_error"] == 0


def test_latent_error_tells_the_groups_of_tokens_apart() -> None:
    target = np.full((4, 3, 4, 4), 2.0, np.float32)
    latents = target.copy()
    latents[:, :, :2, :2] += 0.5
    allocation = np.ones((3, 2, 2), np.int8)
    allocation[:, 0, 0] = 0
    values = LatentError()(Video(last=latents, allocation=allocation), Video(last=target))
    assert values["group_0"] == pytest.approx(0.25)
    assert values["group_1"] == 0
    assert values["latent_error"] == pytest.approx(0.125)


def test_latent_error_of_image_to_video_leaves_the_given_frame_out() -> None:
    target = np.full((4, 3, 2, 2), 2.0, np.float32)
    latents = target + 0.5
    latents[:, 0] = 100
    video = Video(last=latents, record={"request": {"task": "i2v"}})
    assert LatentError()(video, Video(last=target))["latent_error"] == pytest.approx(0.25)


def test_prompt_adherence_reads_the_caption_off_the_pixels() -> None:
    caption = split("heldout")[0]
    frames, _ = render(caption, np.random.default_rng(0))
    meta = dict(vars(caption))
    right = PromptAdherence()(Video(frames, record={"request": {"meta": meta}}))
    assert set(right.values()) == {1.0}
    meta["colour"] = next(c for c in ("red", "blue") if c != caption.colour)
    wrong = PromptAdherence()(Video(frames, record={"request": {"meta": meta}}))
    assert (wrong["prompt_adherence"], wrong["colour"], wrong["all"]) == (0.75, 0.0, 0.0)


def test_prompt_adherence_refuses_prompts_without_attributes() -> None:
    with pytest.raises(ValueError, match="no caption attributes"):
        PromptAdherence()(Video(np.zeros((9, 64, 64, 3), np.uint8)))


def moving_square(background: np.ndarray) -> Video:
    """A white square crosses the background (F, H, W, 3) from left to right."""
    frames = background.copy()
    for t in range(len(frames)):
        frames[t, 12:20, 3 * t : 3 * t + 8] = 255
    return Video(frames)


def test_a_static_background_is_stable_whatever_moves_before_it() -> None:
    background = np.random.default_rng(0).integers(0, 100, (1, 32, 32, 3)).repeat(8, axis=0)
    video = moving_square(background.astype(np.uint8))
    assert BackgroundStability()(video) == {"background_stability": 0.0}


def test_background_flicker_is_measured_in_levels() -> None:
    swing = np.array([0, 0, 6, 0, 0, 0, 6, 0])  # median 0, mean absolute deviation 1.5
    background = np.broadcast_to(100 + swing[:, None, None, None], (8, 32, 32, 3)).astype(np.uint8)
    video = moving_square(background)
    assert BackgroundStability()(video)["background_stability"] == pytest.approx(1.5)


def test_slow_drift_counts_and_violent_flicker_does_not_escape() -> None:
    drift = np.arange(8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3)
    slow = BackgroundStability()(Video((100 + drift).astype(np.uint8)))
    wild = BackgroundStability()(Video((100 + 20 * drift).astype(np.uint8)))
    assert slow["background_stability"] == pytest.approx(2.0)  # |-3.5 ... 3.5| on average
    assert wild["background_stability"] == pytest.approx(40.0)


@pytest.mark.parametrize("share", [0, 1.5])
def test_background_share_is_checked(share: float) -> None:
    with pytest.raises(ValueError, match=f"background={share}"):
        BackgroundStability(background=share)


def test_lpips_without_weights_says_what_to_fetch(tmp_path: Path) -> None:
    reason = LPIPS(weights=str(tmp_path / "none.safetensors")).unavailable()
    assert "none.safetensors" in reason and "alexnet-owt-7be5be79.pth" in reason
    assert "python -m analysis.metrics.alexnet" in reason and "\n" not in reason


def test_lpips_is_the_published_network(tmp_path: Path, alexnet_trunk: torch.nn.Sequential) -> None:
    """Against torchvision's layer list with torchmetrics' heads, applied step by step."""
    torch.save(
        {f"features.{name}": value for name, value in alexnet_trunk.state_dict().items()},
        tmp_path / "alexnet.pth",
    )
    weights = tmp_path / "lpips.safetensors"
    alexnet.main(str(tmp_path / "alexnet.pth"), str(weights))
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 2, 64, 64, 3)).astype(np.uint8)
    video, target = map(Video, frames)
    metric = LPIPS(weights=str(weights))
    assert metric.unavailable() is None and len(metric.parameters()["weights_sha256"]) == 64
    assert metric(target, target)["lpips"] == 0

    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    x, y = (torch.from_numpy(f).permute(0, 3, 1, 2) / 127.5 - 1 for f in frames)
    x, y = (x - shift) / scale, (y - shift) / scale
    heads = iter([load_file(weights)[f"head.{k}"] for k in range(5)])
    expected = 0.0
    for layer in alexnet_trunk:
        x, y = layer(x), layer(y)
        if isinstance(layer, torch.nn.ReLU):
            apart = torch.nn.functional.normalize(x, dim=1) - torch.nn.functional.normalize(
                y, dim=1
            )
            expected += (apart.square() * next(heads).view(1, -1, 1, 1)).sum(1).mean((1, 2)).mean()
    assert metric(video, target)["lpips"] == pytest.approx(float(expected), rel=1e-4)


def test_lpips_scores_belong_to_their_weights(tmp_path: Path) -> None:
    digests = set()
    for value in (0.0, 1.0):
        path = tmp_path / f"{value}.safetensors"
        save_file({"head.0": torch.tensor([value])}, path)
        digests.add(LPIPS(weights=str(path)).parameters()["weights_sha256"])
    assert len(digests) == 2


@pytest.fixture
def alexnet_trunk() -> torch.nn.Sequential:
    """The convolutional part of AlexNet, numbered as torchvision does, with random weights."""
    nn = torch.nn
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    ).requires_grad_(False)
