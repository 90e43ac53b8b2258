"""`Runtime`: the native runtime over torch tensors, for any PyTorch code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from spmoe import _core
from spmoe.closeable import Closeable
from spmoe.config import format_bytes
from spmoe.devices import native_name, resolve_device
from spmoe.errors import InvalidArgument
from spmoe.expert_memory import expert_budget
from spmoe.pinned import pinned_budget
from spmoe.policies import EVICTIONS, POLICIES
from spmoe.progress import Progress, silent

__all__ = ["EVICTIONS", "POLICIES", "Runtime"]

log = logging.getLogger("spmoe")

_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


class Runtime(Closeable):
    """Routed experts in a fixed amount of memory, fetched from their store when needed.

    Values never depend on what is resident: the same inputs give the same bits at every budget.
    Thread-safe; calls of `forward` take turns. A context manager. On a CUDA device all work goes to
    torch's current stream, and no call waits for bytes.

    Args:
        store: The model's experts; see `spmoe.open_store`.
        expert_memory: Memory for experts: "25%" of all, "6GiB", bytes, or "auto": what is free on
            the device, less a reserve of 1 GiB or an eighth. Never more than all experts need.
        experts_per_token: The model's top-k.
        activation: "silu", "gelu", "gelu_tanh" or "clamped_swiglu".
        alpha: Sigmoid factor of "clamped_swiglu".
        limit: Clamp of "clamped_swiglu".
        device: "host", "cuda", "cuda:<index>", or "auto": CUDA where it can be used.
        pinned_memory: Experts to hold in page-locked RAM, from which a CUDA device copies at full
            speed: an amount as for ``expert_memory``, 0 for none, or "auto": all that fit in RAM,
            none on the host. The others stay in the checkpoint's files.
        compute_threads: Threads of the expert kernels; 0 means one a core.
        copy_threads: Threads that read from the store.
        link_gbps: Paces the link to so many 10^9 bytes a second; 0 means as fast as it goes.
        policy: What is prefetched: one of `POLICIES`.
        eviction: What leaves for it: one of `EVICTIONS`, or "auto", the one that goes with the
            policy.
        trace_spans: The latest spans of time to keep for `spans`; 0 means none.
        progress: Called as page-locked memory is filled, with a description, and done of total.

    Raises:
        InvalidArgument: A setting is wrong, or the budget is under one wave (the experts that one
            token needs in a layer); the message names the bytes needed.
        OutOfMemory: More memory is asked than is available; the message names both.
        DeviceError: The CUDA device cannot be used; the message says why.
    """

    def __init__(
        self,
        store: _core.ExpertStore,
        *,
        expert_memory: int | str,
        experts_per_token: int,
        activation: str = "silu",
        alpha: float = 1.702,
        limit: float = 7.0,
        device: str = "host",
        compute_threads: int = 0,
        copy_threads: int = 2,
        link_gbps: float = 0.0,
        policy: str = "on-demand",
        eviction: str = "auto",
        trace_spans: int = 0,
        pinned_memory: int | str = "auto",
        progress: Progress | None = None,
    ) -> None:
        self.device = resolve_device(device)
        self.store = store
        self.policy = policy
        self.trace_spans = trace_spans
        granted = expert_budget(
            expert_memory, store, self.device, experts_per_token=experts_per_token
        )
        self.expert_memory_bytes = min(granted, store.total_bytes)
        budget = pinned_budget(pinned_memory, store.total_bytes, self.device)
        self._native = _core.Runtime(
            store,
            granted,
            experts_per_token,
            activation=activation,
            alpha=alpha,
            limit=limit,
            compute_threads=compute_threads,
            copy_threads=copy_threads,
            link_gbps=link_gbps,
            policy=policy,
            eviction=eviction,
            trace_spans=trace_spans,
            device=native_name(self.device),
            pinned_memory_bytes=budget,
            pinned_progress=_in_megabytes(progress or silent),
        )
        if self.device.type != "cpu":
            self._warn_of_unpinned(store.total_bytes if pinned_memory == "auto" else budget)

    def _warn_of_unpinned(self, wanted: int) -> None:
        """Say once that not all experts are in page-locked memory that were meant to be."""
        pinned = self._native.stats(False)["pinned_bytes"]
        if pinned + self.store.blob_bytes <= wanted:
            log.warning(
                "%s of %s of experts are in page-locked memory; the others come from the "
                "checkpoint's files, which is slower: raise pinned_memory if RAM allows",
                format_bytes(pinned),
                format_bytes(self.store.total_bytes),
            )

    def _consumer(self) -> int:
        """Return the stream that torch works on now, 0 on the host."""
        if self.device.type == "cpu":
            return 0
        stream: int = torch.cuda.current_stream(self.device).cuda_stream
        return stream

    def forward(
        self,
        layer: int,
        x: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Run one MoE layer, fetching what is not resident.

        Blocks until done on the host. On a CUDA device it waits for the router's choice alone.

        Args:
            layer: MoE layer, 0-based.
            x: [tokens, hidden], float32, bfloat16 or float16, on the runtime's device.
            top_k_index: [tokens, k], the router's choices.
            top_k_weights: [tokens, k], what each choice weighs.

        Returns:
            [tokens, hidden] of the dtype of ``x``, summed in fp32 in the router's order.

        Raises:
            InvalidArgument: A shape, dtype, device or index is wrong.
            DeviceError: An expert could not be read; the runtime stays usable.
        """
        if x.ndim != 2 or x.shape[1] != self.store.hidden:
            raise InvalidArgument(f"x must be [tokens, {self.store.hidden}], got {list(x.shape)}")
        if top_k_index.ndim != 2 or top_k_index.shape[0] != x.shape[0]:
            raise InvalidArgument(
                f"top_k_index must be [{x.shape[0]}, k], got {list(top_k_index.shape)}"
            )
        if top_k_weights.shape != top_k_index.shape:
            raise InvalidArgument(
                f"top_k_weights must have the shape of top_k_index, {list(top_k_index.shape)}, "
                f"got {list(top_k_weights.shape)}"
            )
        for name, tensor in (("x", x), ("top_k_weights", top_k_weights)):
            if tensor.dtype not in _DTYPE_NAMES or tensor.device != self.device:
                raise InvalidArgument(
                    f"{name} must be float32, bfloat16 or float16 on {self.device}, "
                    f"got {tensor.dtype} on {tensor.device}"
                )
        x = x.detach().contiguous()
        top_k_index = top_k_index.to(self.device, torch.int64).contiguous()
        top_k_weights = top_k_weights.detach().contiguous()
        out = torch.empty_like(x)
        self._native.forward(
            layer,
            x.shape[0],
            top_k_index.shape[1],
            x.data_ptr(),
            _DTYPE_NAMES[x.dtype],
            top_k_index.data_ptr(),
            top_k_weights.data_ptr(),
            _DTYPE_NAMES[top_k_weights.dtype],
            out.data_ptr(),
            self._consumer(),
        )
        return out

    def begin_request(self) -> None:
        """Tell that another text begins, for policies that compare requests.

        An iteration that the text before left open, because it failed or was given up, ends here.
        """
        self._native.begin_request()

    def predict(
        self,
        layer: int,
        scores: torch.Tensor | np.ndarray[Any, Any],
        *,
        source: Literal["draft", "target"] = "draft",
    ) -> None:
        """Tell what the router of ``layer`` is expected to choose. Does not wait.

        Scores on a CUDA device take effect once the work that makes them has run, within the
        iteration.

        Scores of several calls before the layer runs add up. Whatever they are, outputs stay the
        same.

        Args:
            layer: MoE layer, 0-based.
            scores: [experts], router probabilities of one token or summed over several, and 1 more
                for each token whose router selects the expert; at most 1 where none does. Any
                scores will do that are higher where use is likelier; what is not a number counts
                as 0.
            source: Whose state they were made from.
        """
        if isinstance(scores, torch.Tensor) and scores.device.type == "cuda":
            if scores.shape != (self.store.expert_count,) or scores.device != self.device:
                raise InvalidArgument(
                    f"scores must be [{self.store.expert_count}] on the CPU or {self.device}, "
                    f"got {list(scores.shape)} on {scores.device}"
                )
            scores = scores.detach().float().contiguous()
            self._native.predict_on_device(layer, scores.data_ptr(), source, self._consumer())
            return
        if isinstance(scores, torch.Tensor):
            scores = scores.detach().to("cpu", torch.float32).numpy()
        self._native.predict(layer, np.ascontiguousarray(scores, dtype=np.float32), source)

    def set_limits(
        self,
        *,
        cutoff_layer: int | None = None,
        budget_bytes: Sequence[int] = (),
        break_even: float = 0.5,
    ) -> None:
        """Tell what the measured costs of this machine allow; see `spmoe.cutoff`.

        Args:
            cutoff_layer: Leading layers that "sp-moe" prefetches for; None means all.
            budget_bytes: What the link can move until each layer runs, for "horizon"; or nothing.
            break_even: Probability of use under which "horizon" does not prefetch.
        """
        layers = self.store.layer_count if cutoff_layer is None else cutoff_layer
        self._native.set_limits(layers, list(budget_bytes), break_even)

    def record_routing(self, on: bool = True) -> None:
        """Record which experts every layer needs from now on, or stop."""
        self._native.record_routing(on)

    def recorded_routing(self) -> list[tuple[int, list[int]]]:
        """Return the record: (layer, experts) of each call of `forward`, in order."""
        return self._native.recorded_routing()

    def replay_routing(self, routing: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Tell the policy "oracle" and the eviction "belady" what is to come, from its start."""
        self._native.replay_routing(
            [(layer, list(experts)) for layer, experts in routing],
            self.store.layer_count,
            self.store.expert_count,
        )

    def spans(self) -> list[tuple[str, int, int | None, float, float, int]]:
        """Return the latest spans: (lane, layer, expert, start_s, end_s, queue depth), in order.

        Lanes are "compute", "wait", "demand" and "prefetch"; the first two concern whole layers.
        Seconds are those of `time.perf_counter`.
        """
        return self._native.spans()

    def calibration(self) -> list[tuple[float, float, float]]:
        """Return how predictions came true: (scores from, weight of predictions, of these used)."""
        return self._native.calibration()

    def end_iteration(self, accepted: int = 0) -> None:
        """Tell that an iteration ended with ``accepted`` draft tokens; 0 for plain decoding.

        Raises:
            DeviceError: A copy that this iteration computed from failed after all.
        """
        self._native.end_iteration(accepted)

    def inject(self, *, fail_at_copy: int = 0, delay_seed: int = 0, max_delay_us: int = 0) -> None:
        """Plant faults in the link, for tests.

        Args:
            fail_at_copy: The n-th piece copied from now on fails, once; 0: none.
            delay_seed: Seed of the random delays.
            max_delay_us: Each piece waits a random time up to this, in microseconds.
        """
        self._native.inject(fail_at_copy, delay_seed, max_delay_us)

    def stats(self, *, by_layer: bool = True) -> dict[str, Any]:
        """Counters since construction: hits, late, misses, bytes by kind, seconds.

        Under "layers" the same for each layer, if ``by_layer``.

        `prefetch_wasted_bytes` counts what was moved on a prediction and has not been used (yet):
        demand + prefetch_used + prefetch_wasted = link_bytes, whenever no copy is under way.
        "pinned_bytes" of experts are in page-locked memory, which took "pinned_fill_s" to fill; on
        a CUDA device "dropped_predictions" came too late or too many, and seconds of compute are
        those of handing it over.
        `cancelled` counts prefetches withdrawn before they started, `cancelled_bytes` what was not
        moved of prefetches withdrawn on their way; what was moved of these is wasted.
        """
        return self._native.stats(by_layer)

    def close(self) -> None:
        """End the copies under way and give the memory back. May be called twice."""
        self._native.close()


def _in_megabytes(progress: Progress) -> Callable[[int, int], None]:
    def report(done_bytes: int, total_bytes: int) -> None:
        progress("filling page-locked memory, MB", done_bytes // 10**6, total_bytes // 10**6)

    return report
