"""Models that grow, their inputs, steps of training, and what tests of growth ask of them."""

import copy
import importlib

import pytest
import timm.models as timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from pycodesign import growth

TOKENS, CLASSES = 50, 5


# Fixtures are imported as ``fixed_seed as fixed_seed``, which linters take for used


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()


@pytest.fixture
def precise_llama(monkeypatch):
    """Llama's norm rounds to float32, whatever the model's dtype."""
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    monkeypatch.setattr(
        llama.LlamaRMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    )


# Models: D features, L blocks, H heads, F features in MLPs


def build_gpt2(D=24, L=2, H=6, F=40, **options):
    config = {"vocab_size": TOKENS, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0, "layer_norm_epsilon": 1e-2}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_embd": D, "n_layer": L, "n_head": H, "n_inner": F}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, **drop, **sizes, **options))


def build_llama(D=24, L=2, H=6, F=40, K=None, **options):
    config = {"vocab_size": TOKENS, "rms_norm_eps": 1e-2, "head_dim": 4, "num_key_value_heads": K or H}
    sizes = {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H, "intermediate_size": F}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **sizes, **options}))


def build_encoder(kind, D=24, L=2, H=6, F=40, **options):
    sizes = {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H, "intermediate_size": F}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    name, _, head = kind.partition("For")
    images = {"image_size": 16, "patch_size": 8}
    texts = {"vocab_size": TOKENS, "max_position_embeddings": 16}
    config = {**sizes, **drop, **(texts if name == "Bert" else images), "num_labels": CLASSES, "layer_norm_eps": 1e-2}
    model = getattr(transformers, kind if head else f"{name}Model")
    return model(getattr(transformers, f"{name}Config")(**config, **options))


def build_timm_vit(D=24, L=2, H=6, F=40, name="VisionTransformer", **options):
    sizes = {"embed_dim": D, "depth": L, "num_heads": H, "mlp_ratio": F / D}
    module = timm.deit if "Distilled" in name else timm.vision_transformer
    return getattr(module, name)(img_size=16, patch_size=8, num_classes=CLASSES, **sizes, **options)


def build_resnet(D=24, L=2, H=None, F=None, block="BasicBlock", **options):
    width = D // 4
    options |= {"base_width": 64 * width // 6} if block == "Bottleneck" else {}
    channels = (width, 2 * width, 2 * width, 3 * width)
    return timm.resnet.ResNet(
        getattr(timm.resnet, block), (L,) * 4, CLASSES, channels=channels, stem_width=width, **options
    )


def build_sequential(D=24, L=None, H=None, F=40):
    return nn.Sequential(
        nn.Conv2d(3, D, 3, stride=2, padding=1),
        nn.BatchNorm2d(D),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(D, D, 3, groups=D), nn.SiLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(9 * D, F),
        nn.LayerNorm(F, eps=1e-2),
        nn.GELU(),
        nn.Linear(F, D),
        nn.RMSNorm(D),
        nn.Tanh(),
        nn.Linear(D, CLASSES),
    )


def build_small(width=16):
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, CLASSES)).double()


def build_mlp(width, dtype=torch.float64):
    return nn.Sequential(nn.Linear(8, width), nn.Dropout(0.1), nn.ReLU(), nn.Linear(width, 4)).to(dtype)


BUILDS = {
    "gpt2": build_gpt2,
    "gpt2 untied": lambda **sizes: build_gpt2(**sizes, tie_word_embeddings=False),
    "llama": build_llama,
    "llama tied": lambda **sizes: build_llama(**sizes, tie_word_embeddings=True),
    "vit": lambda **sizes: build_encoder("ViTForImageClassification", **sizes),
    "vit features": lambda **sizes: build_encoder("ViT", **sizes),
    "deit": lambda **sizes: build_encoder("DeiTForImageClassificationWithTeacher", **sizes),
    "timm vit": build_timm_vit,
    "timm vit with scales": lambda **sizes: build_timm_vit(**sizes, init_values=0.5, qk_norm=True, global_pool="avg"),
    "timm deit": lambda **sizes: build_timm_vit(**sizes, name="VisionTransformerDistilled"),
    "timm resnet": build_resnet,
    "timm resnet with bottlenecks": lambda **sizes: build_resnet(**sizes, block="Bottleneck"),
    "sequential": build_sequential,
    "bert": lambda **sizes: build_encoder("BertForMaskedLM", **sizes),
    "bert features": lambda **sizes: build_encoder("Bert", **sizes),
    "bert classes": lambda **sizes: build_encoder("BertForSequenceClassification", **sizes),
}
POST_NORM = [name for name in BUILDS if name.startswith("bert")]
PRE_NORM = [name for name in BUILDS if name not in POST_NORM]
CHANGES = {
    "1.33x": {"D": 32, "H": 8, "F": 53},
    "1.5x": {"D": 36, "H": 9, "F": 60},
    "2x": {"D": 48, "H": 12, "F": 80},
    "3x": {"D": 72, "H": 18, "F": 120},
    "deeper": {"L": 3},
    "1.33x and deeper": {"D": 32, "H": 8, "F": 53, "L": 3},
    "3x and deeper": {"D": 72, "H": 18, "F": 120, "L": 3},
    "MLP": {"F": 47},
}
WIDER = {"D": 32, "H": 8}
X = {"input_ids": torch.arange(12).reshape(2, 6)}  # for models of texts


def build(name, dtype=torch.float64, **sizes):
    """Build a model; every parameter is random, norms and biases, too."""
    return randomize(BUILDS[name](**sizes).to(dtype))


def randomize(model):
    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.add_(0.3 * (spread or 1.0) * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_()
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def make_inputs(name, dtype=torch.float64, count=3):
    if name.startswith(("gpt2", "llama", "bert")):
        return {"input_ids": torch.randint(TOKENS, (count, 9))}
    size = 32 if "resnet" in name else 16
    return torch.randn(count, 3, size, size, dtype=dtype)


def compute_loss(model, name, inputs):
    outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    return logits[..., :CLASSES].square().mean() + logits[..., 0].mean()


def train_steps(model, optimizer, name, steps, average=None):
    count = 16 if "resnet" in name else 3  # statistics of BatchNorm over few values are ill-conditioned
    generator = torch.Generator().manual_seed(steps)
    model.train()
    for _ in range(steps):
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(1000, (), generator=generator)))
            inputs = make_inputs(name, count=count)
        optimizer.zero_grad()
        compute_loss(model, name, inputs).backward()
        optimizer.step()
        if average is not None:
            average.update_parameters(model)


def check_refused(source, target, text, error=ValueError, **options):
    """Refused, and nothing written."""
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(error, match=text):
        growth.grow(source, target, **options)
    for key, value in target.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, before[key])
