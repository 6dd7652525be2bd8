"""Files of optimizers: saved, grown with their checkpoint, loaded, and refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import torch
import transformers
from checkpoints import DOUBLE, build, train
from checkpoints import quiet as quiet
from safetensors import safe_open

from pycodesign import growth


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD"])
def test_exact_mode_scales_groups_as_the_model_does(tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.1} | ({"momentum": 0.9} if kind == "SGD" else {})
    model, larger = build(), build(**DOUBLE)
    optimizer, other = (getattr(torch.optim, kind)(m.parameters(), **options) for m in (model, larger))
    train(model, optimizer)
    model.save_pretrained(tmp_path / "small")
    growth.save_optimizer(model, optimizer, tmp_path / "small")
    growth.grow(model, larger, mode="exact", optimizer=optimizer, target_optimizer=other)
    growth.grow_checkpoint(tmp_path / "small", tmp_path / "large", target_config=DOUBLE, mode="exact")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "large").eval()
    loaded_optimizer = getattr(torch.optim, kind)(loaded.parameters())
    growth.load_optimizer(loaded, loaded_optimizer, tmp_path / "large")
    train(larger, other)
    train(loaded, loaded_optimizer)
    for got, expected in zip(loaded.state_dict().values(), larger.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTForImageClassification"])
def test_optimizers_of_models_whose_files_have_other_names(tmp_path: Path, name: str) -> None:
    cls = getattr(transformers, name)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40}
    larger = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 8}
    models = [cls(cls.config_class(image_size=16, patch_size=8, **{**sizes, **change})) for change in ({}, larger)]
    adams = [torch.optim.AdamW(model.parameters()) for model in models]
    models[0](torch.randn(2, 3, 16, 16)).logits.square().sum().backward()
    adams[0].step()
    models[0].save_pretrained(tmp_path / "small")
    growth.save_optimizer(models[0], adams[0], tmp_path / "small")
    growth.grow(*models, optimizer=adams[0], target_optimizer=adams[1])
    growth.grow_checkpoint(tmp_path / "small", tmp_path / "large", target_config=larger, verify=True)
    loaded = cls.from_pretrained(tmp_path / "large")
    adam = torch.optim.AdamW(loaded.parameters())
    growth.load_optimizer(loaded, adam, tmp_path / "large")
    for got, expected in zip(loaded.parameters(), models[1].parameters(), strict=True):
        for key, state in adams[1].state[expected].items():
            assert torch.equal(adam.state[got][key], state)


def test_optimizers_of_wrapped_models(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    adam = torch.optim.AdamW(model.named_parameters(), lr=0.5)
    growth.save_optimizer(torch.nn.DataParallel(model), adam, tmp_path)
    with safe_open(tmp_path / "optimizer.safetensors", "np") as file:
        groups = json.loads(file.metadata()["optimizer"])["param_groups"]
    assert groups[0]["params"] == groups[0]["param_names"] == ["0.weight", "0.bias"]
    other = torch.optim.AdamW(model.parameters())
    growth.load_optimizer(torch.nn.DataParallel(model), other, tmp_path)
    assert other.param_groups[0]["lr"] == 0.5


def test_optimizer_files(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    growth.save_optimizer(model, optimizer, tmp_path)
    with pytest.raises(ValueError, match="optimizer: expected AdamW as was saved, got SGD"):
        growth.load_optimizer(model, torch.optim.SGD(model.parameters()), tmp_path)
    (tmp_path / "damaged").mkdir()
    safetensors.numpy.save_file({}, tmp_path / "damaged" / "optimizer.safetensors", {"optimizer": '{"class": "AdamW"}'})
    with pytest.raises(ValueError, match="directory: expected the settings that save_optimizer writes, got damaged"):
        growth.load_optimizer(model, optimizer, tmp_path / "damaged")
    other = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"model: expected the parameter transformer\.h\.0\.attn\.c_attn\.bias, got none"
    ):
        growth.load_optimizer(other, torch.optim.AdamW(other.parameters()), tmp_path)
    with pytest.raises(ValueError, match="optimizer: expected parameters of the model alone, got others"):
        growth.save_optimizer(other, optimizer, tmp_path)


def test_optimizer_files_that_do_not_fit(tmp_path: Path) -> None:
    model, wider = torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)
    adam, other = (torch.optim.AdamW(m.parameters(), lr=lr) for m, lr in ((model, 0.5), (wider, 0.25)))
    model(torch.ones(1, 2)).sum().backward()
    adam.step()
    growth.save_optimizer(model, adam, tmp_path)

    def check(text: str) -> None:
        groups = [*other.param_groups]
        with pytest.raises(ValueError, match=text):
            growth.load_optimizer(wider, other, tmp_path)
        assert other.param_groups[0] is groups[0] and other.param_groups[0]["lr"] == 0.25 and not other.state

    check(r"model: expected exp_avg\w* of weight of shape \(2, 3\), got \(2, 2\)")
    file = tmp_path / "optimizer.safetensors"
    tensors = safetensors.numpy.load_file(file)
    whole = file.read_bytes()
    group = {**{k: v for k, v in adam.param_groups[0].items() if k != "params"}, "params": ["bias"]}
    settings = json.dumps({"class": "AdamW", "param_groups": [group]})
    safetensors.numpy.save_file(tensors, file, {"optimizer": settings})
    check("directory: expected states of parameters in groups, got one of weight")
    file.write_bytes(whole[:-4])
    check("directory: expected a safetensors file, got a damaged one")
    file.unlink()
    (tmp_path / "optimizer.safetensors.index.json").write_text("{}")
    check("directory: expected an index with a weight_map, got a damaged one")


def test_a_refused_state_leaves_the_optimizer(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    adam, other = (torch.optim.AdamW(model.parameters(), lr=lr) for lr in (0.5, 0.25))
    for optimizer in (adam, other):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    growth.save_optimizer(model, adam, tmp_path)
    group, state = other.param_groups[0], dict(other.state)

    def check(kind: type[Exception], text: str) -> None:
        with pytest.raises(kind, match=text):
            growth.load_optimizer(model, other, tmp_path)
        assert other.param_groups[0] is group and group["lr"] == 0.25
        assert all(other.state[parameter] is own for parameter, own in state.items())

    def refuse(*_: Any) -> None:
        raise RuntimeError("no room")

    for register in (other.register_load_state_dict_pre_hook, other.register_load_state_dict_post_hook):
        hook = register(refuse)
        check(RuntimeError, "no room")
        hook.remove()
    file = tmp_path / "optimizer.safetensors"
    with safe_open(file, "np") as tensors:
        kept = {name: tensors.get_tensor(name) for name in tensors.keys() if not name.endswith(".step")}
        settings = tensors.metadata()
    safetensors.numpy.save_file(kept, file, settings)
    check(ValueError, "directory: expected a state of AdamW, got another: 'step'")
