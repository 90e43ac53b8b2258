"""`spmoe.Runtime` under any PyTorch code: one MoE layer of a checkpoint, without transformers.

python examples/plain_torch.py SHARD.safetensors...
"""

import sys

import torch

import spmoe

store = spmoe.open_store(sys.argv[1:])
router = torch.randn(store.hidden, store.expert_count)  # yours; here a random one
tokens = torch.randn(5, store.hidden)

with spmoe.Runtime(store, expert_memory="50%", experts_per_token=2) as runtime:
    for layer in range(store.layer_count):
        weights, index = (tokens @ router).softmax(-1).topk(2)  # [5, 2] each
        tokens = tokens + runtime.forward(layer, tokens, index, weights)
    runtime.end_iteration()
    stats = runtime.stats()
print(f"{stats['hits']} hits, {stats['misses']} misses, {stats['link_bytes'] / 1e6:.1f} MB moved")
