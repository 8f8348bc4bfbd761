"""Writes weights of the right shapes and random content into a folder, in the scorer environment.

They prove that a dimension runs. What comes out is not a score.
"""

import sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
import worker  # noqa: E402

folder = Path(sys.argv[1])
worker.prepare("scene", folder, True)
worker.keep_torchvision_importable()

import torch  # noqa: E402
import vbench  # noqa: E402
from clip.model import CLIP  # noqa: E402
from easydict import EasyDict  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from pyiqa.archs.musiq_arch import MUSIQ  # noqa: E402
from vbench.third_party.amt.utils.build_utils import build_from_cfg  # noqa: E402
from vbench.third_party.RAFT.core.raft import RAFT  # noqa: E402

torch.manual_seed(0)


def save(path, content):
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, target)


amt = OmegaConf.load(Path(vbench.__file__).parent / "third_party/amt/cfgs/AMT-S.yaml").network
raft = RAFT(EasyDict(small=False, mixed_precision=False, alternate_corr=False))
clip = CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12).eval()
texts, images = torch.zeros(1, 77, dtype=torch.long), torch.zeros(1, 3, 224, 224)
save("amt_model/amt-s.pth", {"state_dict": build_from_cfg(amt).state_dict()})
save("raft_model/models/raft-things.pth", raft.state_dict())
save("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth", MUSIQ(pretrained=False).state_dict())
(folder / "clip_model").mkdir(parents=True, exist_ok=True)
torch.jit.trace(clip, (images, texts)).save(folder / "clip_model/ViT-B-32.pt")  # as OpenAI's is
