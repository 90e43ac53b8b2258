"""A prefetch policy in Python: the likeliest experts of each layer, the next layer first.

python examples/custom_policy.py TARGET [DRAFT]
"""

import sys

import spmoe


class Likeliest(spmoe.Policy):
    """Prefetches the experts of the highest scores in each layer that has not run yet."""

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self.wanted: dict[int, list[int]] = {}  # MoE layer -> experts

    def plan(self, event):
        """Return (layer, expert) of what to prefetch, the next layer first."""
        if event.kind == "prediction":
            likeliest = event.scores.argsort()[::-1][: self.count]
            self.wanted.setdefault(event.layer, []).extend(likeliest.tolist())
        elif event.kind == "access":
            self.wanted.pop(event.layer, None)
        else:
            self.wanted.clear()
        return [(layer, expert) for layer in sorted(self.wanted) for expert in self.wanted[layer]]


target, *draft = sys.argv[1:]
with spmoe.load(target, *draft, expert_memory="50%", policy=Likeliest()) as engine:
    print(engine.generate("Write a haiku about disks.", max_new_tokens=64).text)
    stats = engine.stats()["total"]
used, moved = stats["prefetch_used_bytes"] / 1e6, stats["link_bytes"] / 1e6
print(f"{used:.1f} MB prefetched and used, of {moved:.1f} MB moved")
