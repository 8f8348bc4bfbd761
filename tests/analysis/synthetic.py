"""Results with known properties, as the tidy frame that the store is read into."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from analysis.frame import COLUMNS, Runtimes
from analysis.metrics.background_stability import BackgroundStability
from analysis.metrics.latent_error import LatentError
from analysis.metrics.prompt_adherence import PromptAdherence
from analysis.metrics.psnr import PSNR

METRICS = (PSNR(), LatentError(), PromptAdherence(), BackgroundStability())
PROMPTS = 12

# label, method, implementation, steps, params, share of the runtime, PSNR above the FM curve
SETTINGS = [
    ("FM T=40", "flow_matching", "native", 40, {"steps": None}, 1.0, 0.0),
    *(
        (f"FM T={t}", "flow_matching", "native", t, {"steps": t}, t / 40, 0.0)
        for t in (30, 20, 15, 10, 8, 5)
    ),
    *(
        (f"HSA-{p}", "hsa", "from-paper", 40, {"thresholds": [tau]}, p / 100, gain)
        for p, tau, gain in ((25, 0.3, 2.0), (50, 0.2, 1.0), (75, 0.1, -1.0))
    ),
    *(
        (f"TeaCache {tau}", "teacache", "official-rule", 40, {"threshold": tau}, share, -1.5)
        for tau, share in ((0.1, 0.7), (0.2, 0.42), (0.3, 0.28))
    ),
    ("Mask 1/2", "static_mask", "from-paper", 40, {"interval": 2}, 0.52, -0.5),
    ("Mask 1/4", "static_mask", "from-paper", 40, {"interval": 4}, 0.27, -0.5),
]


def fm_psnr(share: float) -> float:
    """What flow matching reaches at a share of its full runtime, dB."""
    return 28 + 20 * share


def frame(tasks: tuple[str, ...] = ("t2v", "i2v"), seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(0, 3, PROMPTS)
    rows = []
    for task in tasks:
        for label, method, implementation, steps, params, share, gain in SETTINGS:
            for prompt in range(PROMPTS):
                psnr = fm_psnr(share) + gain + difficulty[prompt] + rng.normal(0, 0.2)
                reference = label == "FM T=40"
                values = {
                    "psnr": np.nan if reference else psnr,
                    "latent_error": np.nan if reference else 10 ** (-psnr / 20),
                    "prompt_adherence": float(rng.binomial(4, min(1, 0.7 + 0.3 * share)) / 4),
                    "prompt_adherence.colour": 1.0,
                    "background_stability": float(rng.gamma(4, 0.3 / share)),
                }
                about = (
                    f"{task}-{label}-{prompt}",
                    label,
                    method,
                    implementation,
                    task,
                    f"p{prompt}",
                    0,
                    steps,
                    json.dumps(params),
                    np.nan,
                    "",
                    reference,
                    share,
                    {"cond": 40 * share, "uncond": 20 * share},
                )
                rows += [(*about, metric, value) for metric, value in values.items()]
    return pd.DataFrame(rows, columns=COLUMNS)


def runtimes(tasks: tuple[str, ...] = ("t2v", "i2v"), full_s: float = 4.0) -> Runtimes:
    rows = [
        (
            task,
            label,
            full_s * share,
            full_s * share * 0.99,
            full_s * share * 1.02,
            9e6 - 8e6 * share,
        )
        for task in tasks
        for label, *_, share, _ in SETTINGS
    ]
    columns = ["task", "label", "runtime_s", "runtime_low", "runtime_high", "held_bytes"]
    return Runtimes("box", pd.DataFrame(rows, columns=columns).set_index(["task", "label"]))
