"""Write text with a Mixture-of-Experts model whose experts do not fit in memory.

python examples/generate.py TARGET [DRAFT]
"""

import sys

import spmoe

target, *draft = sys.argv[1:]
with spmoe.load(target, *draft, expert_memory="25%") as engine:
    for chunk in engine.stream("Write a haiku about disks.", max_new_tokens=64):
        print(chunk, end="", flush=True)
    figures = engine.stats()["request"]
print(
    f"\n{figures['tokens_per_s']:.1f} tokens/s, {figures['bytes_per_token'] / 1e6:.1f} MB a token"
)
