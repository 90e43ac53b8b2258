"""The whole engine on a CUDA device, over the fake CUDA runtime: order, counts and failures.

Run by `make test-fake-cuda`. The runtime sees every access to device memory and every wait; after
each test it must have nothing to complain of (`fake_cuda.cuda`).
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch

import fake_cuda
import fake_device
import spmoe
from fake_device import FakeDevice
from families import ALL_FAMILIES, make_checkpoint, make_dense_draft
from spmoe.models.loading import load_plain
from spmoe.models.reference import generate_alone
from spmoe.runtime import POLICIES

pytestmark = pytest.mark.needs_fake_cuda

PROMPT = list(b"Once upon a time")
NEW_TOKENS = 6

TIERS = (0, "50%", "100%")  # of the experts, in page-locked memory
DRAFTS = ("none", "dense", "self", "unequal")
OWN_VOCABULARY = ("qwen3_5_moe", "qwen3_5_moe_text")  # transformers adds a token to it


class Case(NamedTuple):
    family: str
    policy: str
    tier: int | str
    draft: str


def cases() -> list[Any]:
    """Every case; slow are all but one of each family, which meet every policy, tier and draft."""
    settings = list(product([p for p in POLICIES if p != "oracle"], TIERS, DRAFTS))
    found = []
    for i, family in enumerate(sorted(ALL_FAMILIES)):
        soon = settings[7 * i % len(settings)]
        for setting in settings:
            marks = [] if setting == soon else [pytest.mark.slow]
            case = Case(family, *setting)
            found.append(pytest.param(case, marks=marks, id="-".join(map(str, case))))
    return found


@pytest.fixture(scope="session")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dense models of the target's depth, whose layers stand for the target's, and of another."""
    return {
        name: make_dense_draft(tmp_path_factory.mktemp(name), num_hidden_layers=layers)
        for name, layers in (("dense", 3), ("unequal", 2))
    }


@pytest.fixture(scope="session")
def alone(target_path: Path) -> list[int]:
    return generate_alone(load_plain(target_path), PROMPT, NEW_TOKENS)[0]


def load(target: Path, draft: Path | None = None, **settings: Any) -> spmoe.Engine:
    """An engine on the fake GPU that predicts experts whatever its costs are."""
    settings = {"expert_memory": "34%", "device": "cuda:0", "pinned_memory": "100%"} | settings
    engine = spmoe.load(target, draft, **settings)
    engine.planner = None
    return engine


def written(engine: spmoe.Engine, draft_length: int = 0, count: int = NEW_TOKENS) -> list[int]:
    return engine.generate(PROMPT, max_new_tokens=count, draft_length=draft_length).token_ids


@pytest.mark.parametrize("case", cases())
def test_tokens_are_those_of_generate(case: Case, drafts: dict[str, Path], tmp_path: Path) -> None:
    path = make_checkpoint(case.family, tmp_path)
    expected = generate_alone(load_plain(path), PROMPT, NEW_TOKENS)[0]
    others = {"none": None, "self": path} | drafts
    if case.family in OWN_VOCABULARY:
        others |= dict.fromkeys(drafts, path)
    with load(path, others[case.draft], policy=case.policy, pinned_memory=case.tier) as engine:
        for draft_length in (0,) if case.draft == "none" else (0, 3):
            assert written(engine, draft_length) == expected, draft_length
        stats = engine.runtime.stats(by_layer=False)
        assert (stats["device"], stats["isa"]) == ("cuda:0", "cuda")
        share = 0 if case.tier == 0 else int(str(case.tier).rstrip("%")) / 100
        pinned = stats["pinned_bytes"] / engine.runtime.store.total_bytes
        assert share - 0.1 < pinned <= share


class TestCalls:
    """CUDA calls of steady decode; each costs the host some microseconds on a GPU."""

    # Of a layer whose experts are resident: two products and the sum of the experts, the router's
    # choice, and events behind each of these.
    RESIDENT: ClassVar = {
        "cudaLaunchKernel": 3,
        "cudaMemcpyAsync": 1,
        "cudaEventRecord": 5,
        "cudaEventSynchronize": 1,
        "cudaStreamSynchronize": 0,
        "cudaMalloc": 0,
        "cudaMallocAsync": 0,
        "cudaHostAlloc": 0,
        "cudaEventCreateWithFlags": 0,
    }

    def counted(self, engine: spmoe.Engine, fake: Any, names: list[str]) -> dict[str, float]:
        """Calls a layer and pass of plain decoding, from the fourth token on."""
        steps = engine.iterate(PROMPT, max_new_tokens=12, draft_length=0)
        for _ in range(3):
            next(steps)
        before = {name: fake.calls(name) for name in names}
        passes = sum(1 for _ in steps)
        layers = engine.runtime.store.layer_count
        return {name: (fake.calls(name) - before[name]) / (passes * layers) for name in names}

    def test_a_layer_of_resident_experts(self, fake_gpu: Any, target_path: Path) -> None:
        with load(target_path, expert_memory="100%", policy="on-demand") as engine:
            written(engine, count=12)  # its experts are resident now
            calls = self.counted(engine, fake_gpu, list(self.RESIDENT))
            assert engine.runtime.stats(by_layer=False)["resident"] > 0
        assert calls == self.RESIDENT

    def test_a_layer_whose_experts_are_fetched(self, fake_gpu: Any, target_path: Path) -> None:
        names = ["cudaMemcpyBatchAsync", "cudaMemcpyAsync", "cudaEventRecord", "cudaLaunchKernel"]
        names += ["cudaMalloc", "cudaHostAlloc", "cudaStreamSynchronize"]
        with load(target_path, policy="on-demand") as engine:
            written(engine, count=12)
            before = engine.runtime.stats(by_layer=False)["misses"]
            calls = self.counted(engine, fake_gpu, names)
            assert engine.runtime.stats(by_layer=False)["misses"] > before
        k = 3  # experts of a token, each fetched and computed by itself at most
        assert calls["cudaMemcpyBatchAsync"] > 0
        assert calls["cudaMemcpyBatchAsync"] + calls["cudaMemcpyAsync"] <= 1 + k
        assert calls["cudaLaunchKernel"] <= 1 + 2 * k
        assert calls["cudaEventRecord"] <= 3 + 3 * k
        assert calls["cudaMalloc"] == calls["cudaHostAlloc"] == calls["cudaStreamSynchronize"] == 0

    def test_the_host_waits_for_the_tokens_of_an_iteration_alone(
        self, fake_gpu: Any, drafts: dict[str, Path], target_path: Path
    ) -> None:
        reads = FakeDevice.current.reads
        with load(target_path, drafts["dense"], policy="horizon") as engine:
            for draft_length in (0, 3):
                steps = engine.iterate(PROMPT, max_new_tokens=12, draft_length=draft_length)
                next(steps)
                reads.clear()
                drafted = [step.drafted for step in steps]
                # Each drafted token, and of a verification its tokens and whether it is finite.
                assert len(reads) <= 2 * len(drafted) + sum(drafted), reads


class TestTheFakeDevice:
    """It refuses what a GPU refuses."""

    def test_tensors_of_the_host_do_not_join_in(self, fake_gpu: Any) -> None:
        tensor = torch.ones(3, device=fake_device.NAME)
        assert (tensor + torch.tensor(1.0)).tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="at least two devices"):
            tensor + torch.ones(3)
        with pytest.raises(TypeError, match="to numpy"):
            tensor.numpy()

    def test_values_that_reach_the_host_are_recorded(self, fake_gpu: Any) -> None:
        reads = FakeDevice.current.reads
        tensor = torch.ones(3, device=fake_device.NAME)
        view = tensor[1:].add_(1)
        assert not reads
        with torch.inference_mode():
            copy = tensor.cpu()
        reads.clear()
        reading = (tensor.cpu, tensor.tolist, view.sum().item, tensor.nonzero)
        for read in (*reading, lambda: tensor[tensor > 1]):
            before = len(reads)
            read()
            assert len(reads) == before + 1
        tensor.zero_()
        assert copy.tolist() == [1, 2, 2]
        assert view.tolist() == [0, 0]


class TestMissingWaits:
    """A wait that is left out is noticed through the engine, and so the tests above can fail."""

    @pytest.mark.parametrize(
        ("streams", "complaint"),
        [
            ("consumer", "read while its fill may be in flight"),
            ("copies", "written while it may be read"),
        ],
    )
    def test_it_is_out_of_order(
        self, fake_gpu: Any, target_path: Path, streams: str, complaint: str
    ) -> None:
        with load(target_path, target_path, policy="horizon") as engine:
            written(engine, 3)
            assert fake_gpu.violations() == []
            fake_gpu.forget_waits_of_streams(streams)
            try:
                written(engine, 3)
            finally:
                fake_gpu.remember()
            assert complaint in fake_gpu.violations()


class TestFailures:
    """Of memory, of copies and launches, and of the device: named, and over as soon as can be."""

    def test_more_memory_than_is_free_is_refused(self, fake_gpu: Any, target_path: Path) -> None:
        fake_gpu.restart(memory_bytes=1 << 18)
        with pytest.raises(spmoe.OutOfMemory, match=r"expert_memory of .*, but 256\.0 KiB are"):
            load(target_path, expert_memory="100%", policy="on-demand")

    def test_memory_that_is_gone_meanwhile(
        self, fake_gpu: Any, target_path: Path, alone: list[int]
    ) -> None:
        fake_gpu.fail("cudaMalloc", 1, fake_cuda.OUT_OF_MEMORY)
        with pytest.raises(spmoe.OutOfMemory, match=r"no memory for .* on cuda:0: .* free of"):
            load(target_path, policy="on-demand")
        with load(target_path, policy="on-demand") as engine:
            assert written(engine) == alone

    def test_no_memory_for_rows_fails_one_request(
        self, fake_gpu: Any, target_path: Path, alone: list[int]
    ) -> None:
        with load(target_path, policy="on-demand") as engine:
            assert written(engine) == alone
            fake_gpu.fail("cudaMallocAsync", 1, fake_cuda.OUT_OF_MEMORY)
            with pytest.raises(spmoe.OutOfMemory, match=r"of rows on cuda:0.*give fewer tokens"):
                engine.generate(PROMPT * 4, max_new_tokens=2)
            assert written(engine) == alone

    def test_experts_that_cannot_be_pinned_come_from_files(
        self,
        fake_gpu: Any,
        target_path: Path,
        alone: list[int],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        fake_gpu.restart(pinned_bytes=(16 << 20) + (1 << 18))  # most of it is for buffers
        with load(target_path, policy="on-demand") as engine:
            stats = engine.runtime.stats(by_layer=False)
            assert 0 < stats["pinned_bytes"] < engine.runtime.store.total_bytes
            assert written(engine) == alone
        assert "of experts are in page-locked memory; the others come from" in caplog.text

    @pytest.mark.parametrize("nth", [1, 5])
    def test_a_copy_that_fails_in_flight_fails_one_request(
        self, fake_gpu: Any, target_path: Path, alone: list[int], nth: int
    ) -> None:
        with load(target_path, policy="on-demand") as engine:
            fake_gpu.fail_copy_in_flight(nth)
            with pytest.raises(spmoe.DeviceError, match="failed in flight: cudaErrorUnknown"):
                written(engine)
            assert written(engine) == alone

    def test_a_launch_that_fails_fails_one_request(
        self, fake_gpu: Any, target_path: Path, alone: list[int]
    ) -> None:
        with load(target_path, policy="on-demand") as engine:
            fake_gpu.fail("cudaLaunchKernel", 4, fake_cuda.LAUNCH_FAILURE)
            with pytest.raises(spmoe.DeviceError, match="cudaErrorLaunchFailure"):
                written(engine)
            assert written(engine) == alone

    @pytest.mark.parametrize("policy", ["on-demand", "horizon"])
    def test_a_broken_context_is_named_with_the_cure(
        self, fake_gpu: Any, target_path: Path, policy: str
    ) -> None:
        cure = "cuda:0 is lost to this process, .*cudaErrorIllegalAddress.*: restart the process"
        with load(target_path, target_path, policy=policy) as engine:
            fake_gpu.lose_context_at_copy(5, fake_cuda.ILLEGAL_ADDRESS)
            for _ in range(2):
                with pytest.raises(spmoe.DeviceError, match=cure):
                    written(engine, 3)
            engine.close()
        assert fake_gpu.restart() == []

    def test_a_machine_whose_device_is_gone(
        self, fake_gpu: Any, target_path: Path, alone: list[int], caplog: pytest.LogCaptureFixture
    ) -> None:
        fake_gpu.restart(device_count=0)
        with pytest.raises(spmoe.DeviceError, match="there is no CUDA device here"):
            load(target_path, policy="on-demand")
        with load(target_path, device="auto", pinned_memory=0, policy="on-demand") as engine:
            assert written(engine) == alone
            assert engine.runtime.stats(by_layer=False)["device"] == "host"
        assert "everything runs on the host: there is no CUDA device here" in caplog.text
