"""Greedy generation by a Llama of transformers, its feed-forward layers as they are or sparse.

Two layers of width 1024 with 8192 neurons, most of the model's weights, in relu; a bias of the gate
keeps nine neurons in ten silent. One text at a time, so that every token reads all that it needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.experiments.ops.sparse_ffn import TENTH
from torchzoo.sparsity import prosparse_convert

DIM, HIDDEN, LAYERS, VOCAB, TOKENS = 1024, 8192, 2, 512, 16


def models(
    dim: int = DIM, hidden: int = HIDDEN, layers: int = LAYERS, vocab: int = VOCAB
) -> tuple[nn.Module, nn.Module]:
    """A model with random weights, and the same with `SparseFFN` layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        hidden_act="relu",
        mlp_bias=True,
    )
    dense = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in dense.named_parameters():
        if name.endswith("gate_proj.bias"):  # what comes in has a norm behind it
            nn.init.constant_(parameter, -TENTH)
        elif parameter.ndim == 2:
            std = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=std, generator=generator)
    sparse = copy.deepcopy(dense)
    prosparse_convert(sparse)
    return dense, sparse


def generate(model: Any, ids: Tensor, tokens: int) -> Tensor:
    """The prompt and the tokens that follow, each the likeliest."""
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=0,
    )
    assert isinstance(made, Tensor)
    return made


def make(device: torch.device) -> Mapping[str, Callable[[], Any]]:
    """Both models on the same prompt; they must say the same."""
    dense, sparse = (model.to(device) for model in models())
    ids = torch.tensor([[1, 2, 3, 4]], device=device)
    calls = {
        OURS: partial(generate, sparse, ids, TOKENS),
        "dense": partial(generate, dense, ids, TOKENS),
    }
    if not torch.equal(calls[OURS](), calls["dense"]()):
        raise RuntimeError("the sparse model generated other tokens than the dense one")
    return calls


_READ = LAYERS * (1.2 * DIM * HIDDEN + 2.5 * DIM**2) + VOCAB * DIM
BENCH = Bench(
    "generation",
    [
        Case(
            "Llama, relu, 10% active, 16 tokens",
            make,
            2.0 * TOKENS * _READ,
            4.0 * TOKENS * _READ,
            2.0 * TOKENS * _READ,
            1.5,
        )
    ],
)
