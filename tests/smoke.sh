#!/bin/sh
# Tries an installed torchzoo from outside the source tree: sh smoke.sh DIR-WITH-EXECUTABLES
set -eu
bin=$1
"$bin/torchzoo" list
test "$("$bin/torchzoo" list --json | "$bin/python" -c 'import json, sys; print(len(json.load(sys.stdin)))')" = 171
"$bin/torchzoo" info GaussianAdaptiveAttention >/dev/null
"$bin/torchzoo" doctor
"$bin/python" - <<'P'
import torch
import torchzoo

layer = torchzoo.create("GaussianAdaptiveAttention", dim=64)
x = torch.randn(2, 16, 64)
assert layer(x).shape == x.shape
model = torchzoo.from_pretrained("digits-0-4")
assert sum(p.numel() for p in model.parameters()) > 0
print("the installed package works")
P
