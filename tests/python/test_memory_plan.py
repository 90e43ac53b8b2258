"""Where memory goes: what fits is given, what does not is refused, and the sum is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM

import spmoe
from families import FAMILIES
from spmoe.costs.memory_plan import MemoryPlan, longest_chunk, plan_memory, weight_bytes
from spmoe.models.loading import load_target
from spmoe.models.shapes import ModelShape
from spmoe.runtime import Runtime
from spmoe.system import expert_memory, pinned
from spmoe.system.expert_memory import expert_budget, free_bytes, reserve_bytes, slot_bytes
from spmoe.system.out_of_memory import out_of_memory
from spmoe.system.pinned import pinned_budget

GIB = 1 << 30
HOST = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set what is free, on the host and on a CUDA device that is not there."""

    def say(host: int, device: int | None = None) -> None:
        memory = expert_memory.read_memory()
        changed = type(memory)(**{**_fields(memory), "usable_bytes": host})
        monkeypatch.setattr(expert_memory, "read_memory", lambda: changed)
        monkeypatch.setattr(pinned, "read_memory", lambda: changed)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (device, 80 * GIB))

    return say


def _fields(memory: Any) -> dict[str, Any]:
    return {name: getattr(memory, name) for name in memory.__slots__}


class Experts:
    """Sizes of a store: of Mixtral-8x7B in bfloat16."""

    layer_count = 32
    expert_count = 8
    blob_bytes = 3 * 4096 * 14336 * 2
    total_bytes = 32 * 8 * blob_bytes


def shape(**changed: Any) -> ModelShape:
    """Return Mixtral-8x7B in bfloat16."""
    return ModelShape(
        **{
            "layers": 32,
            "hidden": 4096,
            "inner": 14336,
            "heads": 32,
            "key_size": 1024,
            "value_size": 1024,
            "query_size": 4096,
            "vocabulary": 32000,
            "experts_per_token": 2,
            "expert_inner": 14336,
            "native_experts": True,
            "context": 32768,
            "item_bytes": 2,
            "keeps_scores": False,
            **changed,
        }
    )


class TestShapes:
    @pytest.fixture(scope="class")
    @staticmethod
    def models() -> dict[str, Any]:
        names = ("mixtral", "olmoe", "deepseek_v2", "gpt_oss")
        torch.manual_seed(0)
        return {name: AutoModelForCausalLM.from_config(FAMILIES[name]()).eval() for name in names}

    @pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v2", "gpt_oss"])
    def test_a_cache_is_no_larger_than_its_shape_says(
        self, models: dict[str, Any], family: str
    ) -> None:
        model = models[family]
        with torch.inference_mode():
            output = model(torch.arange(40)[None], use_cache=True)
        cache = getattr(output, "cache", None) or output.past_key_values
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        said = ModelShape.of(model).cache_bytes(40)
        # Latent attention may be kept as it is; a sliding window keeps no more than the window.
        assert kept == said if family in ("mixtral", "olmoe") else kept <= said

    @pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v2", "gpt_oss"])
    @pytest.mark.parametrize("tokens", [128, 512])
    def test_a_pass_holds_no_more_than_its_shape_says(
        self, models: dict[str, Any], family: str, tokens: int
    ) -> None:
        model = models[family]
        with torch.inference_mode(), LiveBytes(model) as live:
            model(torch.arange(tokens)[None] % 200, use_cache=True, logits_to_keep=1)
        said = ModelShape.of(model)
        bound = said.pass_bytes(tokens, tokens) + said.cache_bytes(tokens)
        assert bound / 4 < live.peak_bytes <= bound

    def test_the_figures_of_large_models(self) -> None:
        qwen = shape(hidden=2048, inner=6144, query_size=4096, key_size=512, value_size=512)
        outputs = 4096 * 8 * 2048 * 4  # of the experts, for a prompt of 4096 tokens: 268 MB
        with_experts = ModelShape(**{**_fields(qwen), "experts_per_token": 8})
        assert with_experts.pass_bytes(4096, 4096) > outputs
        eager = shape(heads=64, keeps_scores=True, item_bytes=4)
        assert eager.pass_bytes(4096, 4096) > 64 * 4096**2 * 4  # 4.3 GB, one temporary
        assert shape().cache_bytes(4096) == 4096 * 32 * 2048 * 2

    def test_layers_without_attention_keep_no_keys(self) -> None:
        config = AutoModelForCausalLM.from_config(FAMILIES["qwen3_moe"]())
        config.config.layer_types = ["linear_attention", "full_attention", "mamba"]
        assert ModelShape.of(config).layers == 1


class LiveBytes(TorchDispatchMode):
    """Follows the memory that tensors hold which are made inside."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._own = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._live = {at: kept for at, kept in self._live.items() if not kept[0].expired()}
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._own:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._live.values()))
        return made


class TestChunks:
    def test_a_prompt_is_one_chunk_where_that_fits(self) -> None:
        assert longest_chunk([shape()], 4096, 100 * GIB) == 32768

    @pytest.mark.parametrize("room", [GIB, GIB // 4, GIB // 16])
    @pytest.mark.parametrize("keeps_scores", [False, True])
    def test_else_it_is_the_longest_that_does(self, room: int, keeps_scores: bool) -> None:
        shapes = [shape(keeps_scores=keeps_scores), shape(experts_per_token=0)]
        chunk = longest_chunk(shapes, 4096, room)

        def scratch(tokens: int) -> int:
            return max(each.pass_bytes(tokens, max(tokens, 4096)) for each in shapes)

        assert 32 <= chunk < 32768
        assert scratch(chunk) <= room or chunk == 32
        assert scratch(chunk + 1) > room

    def test_none_is_shorter_than_a_verification(self) -> None:
        assert longest_chunk([shape()], 4096, -1) == 32


class TestBudget:
    def test_auto_is_what_is_free_less_a_reserve(self, free: Any) -> None:
        free(host=64 * GIB, device=20 * GIB)
        assert expert_budget("auto", Experts(), HOST) == 63 * GIB
        assert expert_budget("auto", Experts(), GPU) == 19 * GIB
        free(host=400 * GIB)
        assert expert_budget("auto", Experts(), HOST) == Experts.total_bytes
        free(host=2 * GIB)
        assert expert_budget("auto", Experts(), HOST, experts_per_token=2) == 2 * GIB * 7 // 8

    def test_a_size_is_never_more_than_all_experts_need(self, free: Any) -> None:
        free(host=400 * GIB, device=400 * GIB)
        for size in ("900GiB", "100%", 2**60):
            assert expert_budget(size, Experts(), GPU) == Experts.total_bytes

    @pytest.mark.parametrize(("device", "where"), [(HOST, "here"), (GPU, "on cuda:0")])
    def test_more_than_is_available_is_refused_with_both(
        self, free: Any, device: torch.device, where: str
    ) -> None:
        free(host=16 * GIB, device=16 * GIB)
        with pytest.raises(
            spmoe.OutOfMemory, match=rf"of 21.0 GiB asked, but 16.0 GiB are available {where}"
        ):
            expert_budget("25%", Experts(), device)
        assert expert_budget("12GiB", Experts(), device) == 12 * GIB

    def test_odd_blobs_have_slots_for_all(self) -> None:
        class Odd(Experts):
            blob_bytes = 257
            total_bytes = 32 * 8 * 257

        assert expert_budget("100%", Odd(), HOST) == slot_bytes(Odd(), 256) == 32 * 8 * 512

    def test_the_host_says_what_is_free(self) -> None:
        found = free_bytes(HOST)
        assert found is not None
        assert found > 0


class TestPinned:
    def test_a_size_is_never_more_than_all_experts(self, free: Any) -> None:
        free(host=10**9)
        assert pinned_budget("900GiB", 10**6, HOST) == 10**6
        assert pinned_budget("50%", 10**6, GPU) == 10**6 // 2
        assert pinned_budget("auto", 10**6, GPU) == 10**6
        assert pinned_budget("auto", 10**6, HOST) == 0

    def test_more_than_is_available_is_refused_with_both(self, free: Any) -> None:
        free(host=GIB)
        assert pinned_budget("auto", 3 * GIB, GPU) < GIB
        with pytest.raises(
            spmoe.OutOfMemory, match=r"pinned_memory of 3.0 GiB asked, but 1.0 GiB of RAM"
        ):
            pinned_budget("100%", 3 * GIB, GPU)


class TestPlan:
    @pytest.fixture(scope="class")
    @staticmethod
    def target(target_path: Path) -> Any:
        return load_target(target_path)

    def plan(self, target: Any, **changed: Any) -> MemoryPlan:
        settings = {
            "expert_memory": "auto",
            "experts_per_token": target.experts_per_token,
            "device": HOST,
            "free_before": None,
            "draft": None,
            **changed,
        }
        draft = settings.pop("draft")
        return plan_memory(target.model, draft, settings.pop("store", Experts()), **settings)

    @pytest.mark.parametrize("device", [HOST, GPU])
    def test_experts_get_what_the_rest_leaves(
        self, target: Any, free: Any, device: torch.device
    ) -> None:
        free(host=14 * GIB, device=14 * GIB)
        plan = self.plan(target, draft=target.model, device=device, max_context=100)
        dense = weight_bytes(target.model)
        assert dense == sum(p.nbytes for p in target.model.parameters()) + sum(
            b.nbytes for b in target.model.buffers()
        )
        assert (plan.dense_bytes, plan.draft_bytes) == (dense, dense)
        assert plan.free_bytes == 14 * GIB + 2 * dense  # before both were loaded
        assert plan.cache_bytes == 2 * ModelShape.of(target.model).cache_bytes(100)
        assert plan.reserve_bytes == reserve_bytes(plan.free_bytes) == GIB
        assert plan.scratch_bytes == ModelShape.of(target.model).pass_bytes(100, 100)
        assert plan.prompt_chunk is None
        assert plan.expert_bytes + plan.cache_bytes + plan.scratch_bytes == 13 * GIB

    def test_weights_that_are_mapped_from_a_file_do_not_count_as_free(
        self, target: Any, free: Any
    ) -> None:
        free(host=14 * GIB)
        assert self.plan(target, free_before=10 * GIB).free_bytes == 10 * GIB
        assert self.plan(target, free_before=20 * GIB).free_bytes == 14 * GIB + weight_bytes(
            target.model
        )

    def test_a_context_is_the_models_own_at_most(self, target: Any) -> None:
        assert self.plan(target, max_context=10**6).max_context == 512
        assert self.plan(target, max_context=64).max_context == 64
        assert self.plan(target).max_context == 512

    def test_prompts_get_chunks_where_their_scratch_exceeds_what_is_left(
        self, target: Any, free: Any
    ) -> None:
        shape_ = ModelShape.of(target.model)
        needed = shape_.cache_bytes(512) + slot_bytes(Experts(), 4)
        free(host=needed + shape_.pass_bytes(100, 512))
        plan = self.plan(target, expert_memory=slot_bytes(Experts(), 4))
        assert plan.prompt_chunk == 100
        assert "prompts in chunks of 100 tokens" in plan.describe()

    def test_a_plan_is_one_line_whose_sum_is_right(self) -> None:
        plan = MemoryPlan(
            expert_bytes=6 * GIB,
            total_bytes=26 * GIB,
            free_bytes=14 * GIB,
            dense_bytes=3 * GIB,
            draft_bytes=GIB // 2,
            cache_bytes=3 * GIB // 2,
            scratch_bytes=2 * GIB,
            reserve_bytes=GIB,
            max_context=4096,
            prompt_chunk=None,
        )
        assert plan.describe() == (
            "expert memory 6.0 GiB of 26.0 GiB: 14.0 GiB free, less dense 3.0 GiB, draft "
            "512.0 MiB, caches 1.5 GiB at 4096 tokens, scratch 2.0 GiB, reserve 1.0 GiB"
        )

    def test_a_machine_without_room_for_a_token_is_given_what_to_lower(
        self, target: Any, free: Any
    ) -> None:
        free(host=GIB // 2)
        with pytest.raises(
            spmoe.OutOfMemory, match=r"one token, 1008.0 MiB \(expert memory .*lower max_context"
        ):
            self.plan(target)


class TestLoad:
    def test_auto_is_the_default_and_is_shown(
        self, target_path: Path, free: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        free(host=20 * GIB)
        reported: list[str] = []
        with (
            caplog.at_level("INFO"),
            spmoe.load(
                target_path,
                policy="on-demand",
                progress=lambda description, *_: reported.append(description),
            ) as engine,
        ):
            assert engine.memory is not None
            line = engine.memory.describe()
            stats = engine.runtime.stats(by_layer=False)
            store = engine.runtime.store
            assert stats["slots"] == store.layer_count * store.expert_count  # all of them fit
            assert engine.runtime.expert_memory_bytes == store.total_bytes
            assert engine.prompt_chunk is engine.memory.prompt_chunk is None
        assert line in caplog.text
        assert f"allocating {line}" in reported

    def test_what_fits_is_given_and_prompts_are_read_in_chunks_that_fit(
        self, target_path: Path, free: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = load_target(target_path)
        said = ModelShape.of(target.model)
        blob = target.store.blob_bytes
        rest = weight_bytes(target.model) + said.cache_bytes(32) + said.pass_bytes(32, 32)
        free(host=(rest + 10 * blob) * 8 // 7 + 8)  # an eighth is the reserve
        with spmoe.load(target_path, policy="on-demand", max_context=32) as engine:
            slots = engine.runtime.stats(by_layer=False)["slots"]
            assert slots < target.store.layer_count * target.store.expert_count
            assert slots in (9, 10)
            assert engine.prompt_chunk == 32
            read: list[int] = []
            forward = Runtime.forward

            def count(runtime: Runtime, layer: int, x: Any, *choices: Any) -> Any:
                read.append(len(x))
                return forward(runtime, layer, x, *choices)

            monkeypatch.setattr(Runtime, "forward", count)
            prompt = list(range(100))
            chunked = engine.generate(prompt, max_new_tokens=8).token_ids
            layers = target.store.layer_count
            assert read[: 4 * layers] == [*[32] * 3 * layers, *[4] * layers]
        free(host=20 * GIB)
        with spmoe.load(target_path, policy="on-demand") as engine:
            assert engine.prompt_chunk is None
            assert engine.generate(prompt, max_new_tokens=8).token_ids == chunked

    def test_a_size_past_the_model_is_cut_and_shown_so(self, target_path: Path) -> None:
        with spmoe.load(target_path, expert_memory="900GiB", policy="on-demand") as engine:
            store = engine.runtime.store
            stats = engine.generate("Hello", max_new_tokens=1).stats
            assert stats.expert_memory_bytes == stats.expert_total_bytes == store.total_bytes

    def test_a_size_past_what_is_free_is_refused_with_both(
        self, target_path: Path, free: Any
    ) -> None:
        free(host=1 << 19)
        with pytest.raises(
            spmoe.OutOfMemory,
            match=r"576.0 KiB asked, but 512.0 KiB are available here; lower expert_memory",
        ):
            spmoe.load(target_path, expert_memory="100%", policy="on-demand")


class TestOutOfMemory:
    def test_torchs_own_is_translated_with_the_cure(self) -> None:
        with (
            pytest.raises(spmoe.OutOfMemory, match=r"the draft does not fit.*; use a smaller one"),
            out_of_memory("the draft", "use a smaller one"),
        ):
            torch.empty(1 << 60)
        for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
            with pytest.raises(spmoe.OutOfMemory), out_of_memory("it", "buy some"):
                raise error

    def test_other_errors_pass(self) -> None:
        for error in (RuntimeError("a shape is wrong"), spmoe.OutOfMemory("8 slots")):
            with pytest.raises(type(error), match=str(error)), out_of_memory("it", "buy some"):
                raise error
