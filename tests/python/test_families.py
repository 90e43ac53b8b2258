"""FamilyContract: what every model family must do behind the experts interface.

A new family is one entry in `families.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from families import ALL_FAMILIES, RECURRENT_FAMILIES, VOCABULARY, greedy, make_checkpoint
from spmoe.models.experts import attach
from spmoe.models.loading import TargetModel, load_plain, load_target
from spmoe.runtime import Runtime

NEW_TOKENS = 20
SLOT_ALIGNMENT = 256  # bytes; a slot is a blob rounded up to it
CASES = [(family, torch.float32) for family in ALL_FAMILIES] + [
    (family, torch.bfloat16) for family in ("mixtral", "deepseek_v3", "gpt_oss")
]


@dataclass(frozen=True)
class Case:
    target: TargetModel
    plain: PreTrainedModel  # the same checkpoint, all in memory, its own eager experts
    prompt: torch.Tensor  # [1, tokens]
    tolerance: float  # of logits

    def budgets(self) -> list[int]:
        """The least that one token needs, half of the experts, and all of them, in bytes."""
        store = self.target.store
        slot = -(-store.blob_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        count = store.layer_count * store.expert_count
        return [slots * slot for slots in (self.target.experts_per_token, count // 2, count)]

    def runtime(self, expert_memory: int) -> Runtime:
        target = self.target
        return Runtime(
            target.store,
            expert_memory=expert_memory,
            experts_per_token=target.experts_per_token,
            activation=target.activation.name,
            alpha=target.activation.alpha,
            limit=target.activation.limit,
        )


def logits_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens).logits


@pytest.fixture(
    scope="module", params=CASES, ids=[f"{family}-{str(dtype)[6:]}" for family, dtype in CASES]
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, dtype = request.param
    path = make_checkpoint(family, tmp_path_factory.mktemp(family), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(VOCABULARY, (1, 24), generator=generator)
    # A recurrence amplifies rounding: eager float32 logits are up to 1e-4 from those in float64.
    tolerance = 2e-4 if family in RECURRENT_FAMILIES else 2e-5
    return Case(load_target(path), load_plain(path), prompt, tolerance)


class TestFamilyContract:
    def test_logits_of_a_prompt_are_those_of_the_plain_model(self, case: Case) -> None:
        expected = logits_of(case.plain, case.prompt)
        for budget in case.budgets():
            with case.runtime(budget) as runtime:
                attach(case.target, runtime)
                found = logits_of(case.target.model, case.prompt)
            torch.testing.assert_close(found, expected, rtol=0, atol=case.tolerance)

    def test_greedy_tokens_are_those_of_the_plain_model(self, case: Case) -> None:
        expected = greedy(case.plain, case.prompt, NEW_TOKENS)
        for budget in case.budgets():
            with case.runtime(budget) as runtime:
                attach(case.target, runtime)
                assert greedy(case.target.model, case.prompt, NEW_TOKENS) == expected

    def test_experts_never_exceed_the_budget(self, case: Case) -> None:
        for budget in case.budgets():
            with case.runtime(budget) as runtime:
                attach(case.target, runtime)
                greedy(case.target.model, case.prompt, NEW_TOKENS)
                stats = runtime.stats()
            assert stats["slots"] * case.target.store.blob_bytes <= budget
            assert 0 < stats["resident"] <= stats["slots"]

    def test_no_expert_is_in_the_model(self, case: Case) -> None:
        held = sum(parameter.numel() for parameter in case.target.model.parameters())
        whole = sum(parameter.numel() for parameter in case.plain.parameters())
        store = case.target.store
        element_bytes = getattr(torch, store.dtype).itemsize
        assert held == whole - store.total_bytes // element_bytes
        for tensor in case.target.model.state_dict().values():
            assert tensor.device.type == "cpu"
        for layer in case.target.moe_layers:
            assert not layer.experts.state_dict()
            assert layer.experts.gate_up_proj.device.type == "meta"

    def test_layers_of_the_store_are_those_of_the_model(self, case: Case) -> None:
        target = case.target
        assert target.store.layer_count == len(target.moe_layers)
        for layer in target.moe_layers:
            assert f"layers.{layer.number}." in layer.path
            assert isinstance(layer.gate, torch.nn.Module)
        names = target.store.tensor_names
        assert names == sorted(names)
        assert {int(name.split("layers.")[1].split(".")[0]) for name in names} == {
            layer.number for layer in target.moe_layers
        }
