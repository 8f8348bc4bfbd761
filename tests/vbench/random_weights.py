"""Writes weights of the right shapes and random content, in the scorer environment.

    python random_weights.py FOLDER WORKER_FOLDER NAME...

Names are those of `weights.FILES`. They prove that a dimension runs; what comes out is no score.
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
import worker  # noqa: E402

folder = Path(sys.argv[1])
worker.prepare("scene", folder, True)
worker.keep_torchvision_importable()

import torch  # noqa: E402
import vbench  # noqa: E402

THIRD_PARTY = Path(vbench.__file__).parent / "third_party"
HUB = folder / "torch" / "hub"
BERT = folder / "huggingface/hub/models--bert-base-uncased"
REVISION = "0" * 40


def third_party(name):
    return importlib.import_module(f"vbench.third_party.{name}")


def target(path):
    found = folder / path
    found.parent.mkdir(parents=True, exist_ok=True)
    return found


def save(path, content):
    torch.save(content, target(path))


def spread(module):
    """Upstream leaves some parameters as memory was."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return module


def dino():
    hub = str(folder / "dino_model" / "facebookresearch_dino_main")
    model = torch.hub.load(hub, "dino_vitb16", source="local", pretrained=False)
    save(HUB / "checkpoints/dino_vitbase16_pretrain.pth", model.state_dict())


def clip(path, *sizes):
    """Traced, as OpenAI's file is."""
    from clip.model import CLIP

    model = CLIP(*sizes).eval()
    given = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
    torch.jit.trace(model, given).save(target(path))


def clip_b32():
    clip("clip_model/ViT-B-32.pt", 512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)


def clip_l14():
    clip("clip_model/ViT-L-14.pt", 768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12)


def aesthetic():
    path = "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"
    head = torch.nn.Linear(768, 1)
    torch.nn.init.constant_(head.bias, 5.0)  # of ten: upstream divides by it
    save(path, head.state_dict())


def amt():
    from omegaconf import OmegaConf

    network = OmegaConf.load(THIRD_PARTY / "amt/cfgs/AMT-S.yaml").network
    model = third_party("amt.utils.build_utils").build_from_cfg(network)
    save("amt_model/amt-s.pth", {"state_dict": model.state_dict(), "config": network})


def raft():
    from easydict import EasyDict

    settings = EasyDict(small=False, mixed_precision=False, alternate_corr=False)
    model = torch.nn.DataParallel(third_party("RAFT.core.raft").RAFT(settings))
    save("raft_model/models/raft-things.pth", model.state_dict())


def musiq():
    from pyiqa.archs.musiq_arch import MUSIQ

    state = MUSIQ(pretrained=False).state_dict()
    save("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth", state)


def viclip():
    worker.seed_vocabulary()
    tokenizer = third_party("ViCLIP.simple_tokenizer").SimpleTokenizer()
    model = spread(third_party("ViCLIP.viclip").ViCLIP(tokenizer, pretrain=None))
    save("ViCLIP/ViClip-InternVid-10M-FLT.pth", {"model": model.state_dict()})


def umt():
    model = third_party("umt.models.modeling_finetune").vit_large_patch16_224(
        num_classes=400, all_frames=16, tubelet_size=1, use_mean_pooling=True, init_scale=0.001
    )
    save("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth", model.state_dict())


def bert_tokenizer():
    """Words without meaning."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of"]
    words += [f"word{i}" for i in range(30522 - len(words))]
    vocabulary = target(BERT / "snapshots" / REVISION / "vocab.txt")
    vocabulary.write_text("\n".join(words))
    target(BERT / "refs" / "main").write_text(REVISION)
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    vocabulary.with_name("tokenizer_config.json").write_text(json.dumps(settings))


def bert():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(num_hidden_layers=2))
    model.save_pretrained(BERT / "snapshots" / REVISION, safe_serialization=True)


def tag2text():
    tag2text = third_party("tag2Text.tag2text")
    model = tag2text.Tag2Text_Caption(image_size=384, vit="swin_b")
    save("caption_model/tag2text_swin_14m.pth", {"model": model.state_dict()})


def grit():
    from detectron2.modeling import build_model

    captions = third_party("grit_src.image_dense_captions")
    settings = captions.setup_cfg(captions.get_parser(torch.device("cpu")))
    model = build_model(settings)
    save("grit_model/grit_b_densecap_objectdet.pth", {"model": model.state_dict()})


def dreamsim():
    """The ensemble: three networks of DINO's kind, and what fine-tuning adds to them."""
    from dreamsim.feature_extraction.vision_transformer import DINOHead, vit_base

    for name in ("clip", "open_clip"):
        network = vit_base(patch_size=16)
        network.pos_drop = torch.nn.LayerNorm(network.embed_dim)
        state = network.state_dict() | {"proj": torch.randn(network.embed_dim, 512)}
        save(f"dreamsim/{name}_vitb16_pretrain.pth.tar", {"state_dict": state})
    head = {f"module.head.{k}": v for k, v in DINOHead(768, 2048).state_dict().items()}
    head["module.head.last_layer.weight"] = torch.randn(2048, 256)
    save("dreamsim/dino_vitb16_pretrain.pth", {"student": head})
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 1, "lora_dropout": 0.0, "bias": "none"}
    adapter["target_modules"] = ["qkv"]
    target("dreamsim/ensemble_lora/adapter_config.json").write_text(json.dumps(adapter))
    save("dreamsim/ensemble_lora/adapter_model.bin", {})


def cotracker():
    hub = str(HUB / "facebookresearch_co-tracker_main")
    predictor = torch.hub.load(hub, "cotracker2", source="local", pretrained=False)
    save(HUB / "checkpoints/cotracker2.pth", predictor.model.state_dict())


torch.manual_seed(0)
for name in reversed(sys.argv[3:]):  # what others are made with stands last
    globals()[name]()
