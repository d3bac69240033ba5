"""Tiny models of timm and transformers, from configurations, without a network."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

TOKENS = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


class Host(NamedTuple):
    """A model in evaluation mode, its input, and the names of its layers."""

    model: nn.Module
    x: torch.Tensor
    mlps: tuple[str, ...]
    attentions: tuple[str, ...]

    def output(self):
        with torch.no_grad():
            return self.call()

    def call(self):
        y = self.model(self.x)
        return y if isinstance(y, torch.Tensor) else y.logits


def names(pattern):
    return tuple(pattern.format(i) for i in range(2))


def llama(ids, image):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES, **TOKENS))
    return model, ids, names("model.layers.{}.mlp"), names("model.layers.{}.self_attn")


def gpt2(ids, image):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, **TOKENS))
    return model, ids, names("transformer.h.{}.mlp"), names("transformer.h.{}.attn")


def vit(ids, image):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 5}
    model = ViTForImageClassification(ViTConfig(num_hidden_layers=2, **sizes, **SIZES))
    mlps = [name for name, module in model.named_modules() if name.endswith("mlp")]
    attentions = [name for name, m in model.named_modules() if hasattr(m, "q_proj")]
    return model, image, tuple(mlps), tuple(attentions)


def timm_vit(ids, image):
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = VisionTransformer(num_classes=5, **sizes)
    return model, image, names("blocks.{}.mlp"), names("blocks.{}.attn")


HOSTS = {"llama": llama, "gpt2": gpt2, "vit": vit, "timm": timm_vit}


@pytest.fixture(params=HOSTS)
def host(request):
    """Each host in turn, with weights large enough that layers matter."""
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (2, 9))
    model, x, mlps, attentions = HOSTS[request.param](ids, torch.randn(3, 3, 8, 8))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                weight.normal_(std=0.4)
    return Host(model.eval(), x, mlps, attentions)
