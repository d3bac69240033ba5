"""Models of other libraries, made from tiny configurations without a network."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

TOKENS = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


class Host(NamedTuple):
    """A model, what to call it with, and where its layers are."""

    model: nn.Module
    inputs: tuple
    ffns: tuple[str, ...]
    hidden: int
    blocks: tuple[str, ...]
    relu: bool


def names(pattern, count=2):
    return tuple(pattern.format(i) for i in range(count))


def gpt2(ids, image):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, **TOKENS))
    ffns, blocks = names("transformer.h.{}.mlp"), names("transformer.h.{}")
    return Host(model, (ids,), ffns, 64, blocks, False)


def llama(ids, image):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES, **TOKENS))
    return Host(model, (ids,), names("model.layers.{}.mlp"), 24, names("model.layers.{}"), False)


def t5(ids, image):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, **TOKENS)
    ffns = (
        *names("encoder.block.{}.layer.1.DenseReluDense"),
        *names("decoder.block.{}.layer.2.DenseReluDense"),
    )
    blocks = (*names("encoder.block.{}"), *names("decoder.block.{}"))
    return Host(T5ForConditionalGeneration(config), (ids, None, ids), ffns, 24, blocks, True)


def opt(ids, image):
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    model = OPTForCausalLM(OPTConfig(num_hidden_layers=2, **sizes, **TOKENS))
    layers = names("model.decoder.layers.{}")
    return Host(model, (ids,), layers, 24, layers, True)


def bert(ids, image):
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(num_hidden_layers=2, **SIZES, **TOKENS))
    return Host(model, (ids,), names("encoder.layer.{}"), 24, names("encoder.layer.{}"), False)


def vit(ids, image):
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(num_hidden_layers=2, image_size=8, patch_size=4, **SIZES))
    return Host(model, (image,), names("layers.{}.mlp"), 24, names("layers.{}"), False)


def timm_vit(ids, image):
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    return Host(model, (image,), names("blocks.{}.mlp"), 64, names("blocks.{}"), False)


def torch_encoder(ids, image):
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    layers = names("layers.{}")
    return Host(model, (torch.rand(2, 5, 16),), layers, 24, layers, True)


HOSTS: tuple[Callable[..., Host], ...] = (
    gpt2,
    llama,
    t5,
    opt,
    bert,
    vit,
    timm_vit,
    torch_encoder,
)


@pytest.fixture(params=HOSTS, ids=lambda host: host.__name__)
def host(request):
    if request.param is timm_vit:
        pytest.importorskip("timm")
    elif request.param is not torch_encoder:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = request.param(torch.arange(3, 13).view(2, 5), torch.rand(2, 3, 8, 8))
    made.model.eval()
    return made
