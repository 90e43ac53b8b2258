"""On a CUDA device: layers compute what the host's do, and texts are the target's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fake_cuda
import spmoe
from families import FAMILIES, greedy, make_checkpoint
from spmoe.models.loading import TargetModel, load_plain, load_target
from spmoe.models.text import encode
from spmoe.runtime import POLICIES

pytestmark = pytest.mark.needs_cuda

DEVICE = "cuda:0"
PROMPT = "Once upon a time there was a disk"
# Emulated kernels take milliseconds a layer: over the fake runtime the families share the budgets.
NEW_TOKENS = 8 if fake_cuda.IS_ON else 24
DRAFT_LENGTHS = (0, 4) if fake_cuda.IS_ON else (0, 1, 4, 9)
ROWS = (1, 2, 7, 8, 9, 32)
# Activations -> how far a value may be from the host's: sums run in another order, and what is
# narrowed may then round the other way.
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
    torch.float16: {"rtol": 2**-10, "atol": 2**-10},
}
# Experts of two layers together do not fit the least of these: what is needed has to be fetched.
BUDGETS = ("34%", "60%", "100%")


def run_layers(
    target: TargetModel, device: str, dtype: torch.dtype, *, expert_memory: str, policy: str
) -> list[torch.Tensor]:
    """Every layer over a few rows, one pass after another, with predictions that half come true."""
    store, k = target.store, target.experts_per_token
    generator = torch.Generator().manual_seed(0)
    outputs = []
    with target.open_runtime(expert_memory=expert_memory, device=device, policy=policy) as runtime:
        for rows in ROWS:
            for layer in range(store.layer_count):
                scores = torch.rand(rows, store.expert_count, generator=generator)
                weights, index = scores.topk(k)
                joined = scores.sum(0) + torch.rand(store.expert_count, generator=generator)
                runtime.predict(layer, joined.to(runtime.device))
                x = torch.randn(rows, store.hidden, generator=generator)
                out = runtime.forward(
                    layer,
                    x.to(runtime.device, dtype),
                    index.to(runtime.device),
                    weights.to(runtime.device, dtype),
                )
                outputs.append(out.cpu())
            runtime.end_iteration()
    return outputs


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_layer_computes_what_the_hosts_does(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = torch.bfloat16 if dtype == torch.float32 else dtype
    target = load_target(make_checkpoint(family, tmp_path, dtype=weights))
    settings = {"expert_memory": "60%", "policy": "horizon"}
    expected = run_layers(target, "host", dtype, **settings)
    found = run_layers(target, DEVICE, dtype, **settings)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCES[dtype])


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "oracle"])
def test_residency_changes_no_bit(policy: str, tmp_path: Path) -> None:
    target = load_target(make_checkpoint("mixtral", tmp_path, dtype=torch.bfloat16))
    first, *others = (
        run_layers(target, DEVICE, torch.bfloat16, expert_memory=budget, policy=policy)
        for budget in BUDGETS
    )
    for other in others:
        assert all(a.equal(b) for a, b in zip(first, other, strict=True))


class TestLossless:
    """Family, policy, budget and draft length: tokens are the target's own on the CPU, fp32."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_tokens_are_the_targets_own(
        self, family: str, tmp_path: Path, draft_path: Path
    ) -> None:
        path = make_checkpoint(family, tmp_path)
        plain = load_plain(path)
        place = list(FAMILIES).index(family)
        for i, draft in enumerate((path, draft_path)):
            for budget in (BUDGETS[(place + i) % 3],) if fake_cuda.IS_ON else BUDGETS:
                with spmoe.load(path, draft, expert_memory=budget, device=DEVICE) as engine:
                    prompt = torch.tensor([encode(engine.tokenizer, PROMPT)])
                    expected = greedy(plain, prompt, NEW_TOKENS)
                    for length in DRAFT_LENGTHS:
                        found = [
                            token
                            for iteration in engine.iterate(
                                prompt[0].tolist(), max_new_tokens=NEW_TOKENS, draft_length=length
                            )
                            for token in iteration.tokens
                        ]
                        assert found == expected, (draft, budget, length)

    @pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "oracle"])
    @pytest.mark.parametrize("pinned_memory", [0, "50%", "auto"])
    def test_policies_and_tiers_change_no_token(
        self, policy: str, pinned_memory: int | str, target_path: Path
    ) -> None:
        with spmoe.load(
            target_path,
            target_path,
            expert_memory="34%",
            device=DEVICE,
            policy=policy,
            pinned_memory=pinned_memory,
        ) as engine:
            prompt = torch.tensor([encode(engine.tokenizer, PROMPT)])
            found = engine.iterate(prompt[0].tolist(), max_new_tokens=NEW_TOKENS, draft_length=4)
            tokens = [token for iteration in found for token in iteration.tokens]
        assert tokens == greedy(load_plain(target_path), prompt, NEW_TOKENS)
