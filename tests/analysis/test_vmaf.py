from __future__ import annotations

import numpy as np
import pytest

from analysis.metrics.vmaf import VMAF
from tests.analysis.test_metrics import Video


@pytest.fixture(scope="module")
def vmaf() -> VMAF:
    metric = VMAF()
    if metric.unavailable():
        pytest.skip(metric.unavailable())
    return metric


def videos(*noises: float) -> list[Video]:
    """Smooth pictures of 96 x 128 that move, with noise."""
    y, x = np.mgrid[:96, :128]
    waves = [128 + 60 * np.sin(x / 9 + i / 3) + 50 * np.cos(y / 7) for i in range(6)]
    clean = np.repeat(np.stack(waves)[..., None], 3, axis=-1)
    rng = np.random.default_rng(0)
    noisy = (clean + rng.normal(0, noise, clean.shape) for noise in noises)
    return [Video(np.clip(each, 0, 255).astype(np.uint8)) for each in noisy]


def test_more_noise_is_less_vmaf(vmaf):
    target, little, much = videos(0, 6, 30)
    same, near, far = (vmaf(video, target)["vmaf"] for video in (target, little, much))
    assert 100 >= same > 95 and same > near > far >= 0


def test_it_is_not_symmetric_so_the_reference_is_the_second(vmaf):
    target, noisy = videos(0, 20)
    assert vmaf(noisy, target) != vmaf(target, noisy)


def test_without_libvmaf_it_says_where_to_get_it(tmp_path):
    assert "/none/ffmpeg" in VMAF(ffmpeg="/none/ffmpeg").unavailable()
