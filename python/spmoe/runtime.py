"""`Runtime`: the native runtime over torch tensors, for any PyTorch code."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Unpack

import numpy as np
import torch

from spmoe import _core
from spmoe.arguments import choice, real_number, shown, whole_number
from spmoe.config import MAX_ROWS, format_bytes
from spmoe.errors import InvalidArgument
from spmoe.policies import (
    BASELINE,
    EVICTIONS,
    POLICIES,
    SOURCES,
    Event,
    Policy,
    Source,
    eviction_of,
)
from spmoe.reporting.counters import Counters
from spmoe.reporting.progress import Progress, silent
from spmoe.settings import RuntimeSettingNames, Settings
from spmoe.system.closeable import Closeable, close_at_exit, working
from spmoe.system.expert_memory import expert_budget
from spmoe.system.pinned import pinned_budget

__all__ = ["EVICTIONS", "POLICIES", "Runtime"]

log = logging.getLogger("spmoe")

_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_swiglu")

_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_BY_DEFAULT = RuntimeSettingNames(device="host", policy=BASELINE, eviction=None)
_INDEX_DTYPES = frozenset(
    {
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    }
)

# Bounds that no machine reaches and that the native types hold.
_MOST_BYTES = (1 << 63) - 1
_MOST_COUNT = (1 << 32) - 1


class Runtime(Closeable):
    """Routed experts in a fixed amount of memory, fetched from their store when needed.

    Values never depend on what is resident: the same inputs give the same bits at every budget.
    Thread-safe; calls of `forward` take turns. A context manager. On a CUDA device all work goes to
    torch's current stream, and no call waits for bytes.

    It belongs to the process that made it: after ``os.fork()`` the child may close it, and every
    other call there raises `Error`. It is closed when the interpreter ends. There is no backward
    pass, see `forward`.

    Args:
        store: The model's experts; see `spmoe.open_store`.
        experts_per_token: The model's top-k.
        activation: "silu", "gelu", "gelu_tanh" or "clamped_swiglu".
        alpha: Sigmoid factor of "clamped_swiglu".
        limit: Clamp of "clamped_swiglu".
        settings: Of memory, device, link and policy. None: those of `Settings`, but on the host, on
            demand, and with the eviction of least traffic; see bench/results/evictions-8x.md.
        progress: Called as page-locked memory is filled, with a description, and done of total.
        **changes: Settings in place of these, by name: ``expert_memory`` (for "auto": what is free
            on the device, less a reserve of 1 GiB or an eighth; never more than all experts need),
            ``device``, ``policy``, ``eviction``, ``link_gbps`` and others of `Settings`.

    Raises:
        InvalidArgument: A setting is wrong, or the budget is under one wave (the experts that one
            token needs in a layer); the message names the bytes needed.
        OutOfMemory: More memory is asked than is available, or the system refuses the threads;
            the message says what was asked and found.
        DeviceError: The CUDA device cannot be used; the message says why.
        Error: The store is closed.
    """

    def __init__(
        self,
        store: _core.ExpertStore,
        *,
        experts_per_token: int,
        activation: str = "silu",
        alpha: float = 1.702,
        limit: float = 7.0,
        settings: Settings | None = None,
        progress: Progress | None = None,
        **changes: Unpack[RuntimeSettingNames],
    ) -> None:
        if not isinstance(store, _core.ExpertStore):
            raise InvalidArgument(f"store is {shown(store)}; give what spmoe.open_store returned")
        if progress is not None and not callable(progress):
            raise InvalidArgument(f"progress is {shown(progress)}; give a function, or None")
        if unknown := changes.keys() - RuntimeSettingNames.__annotations__.keys():
            raise TypeError(f"Runtime() got an unexpected keyword argument {min(unknown)!r}")
        if settings is None:
            settings = Settings(**_BY_DEFAULT | changes)
        else:
            settings = replace(settings, **changes)
        top_k = whole_number("experts_per_token", experts_per_token, 1, store.expert_count)
        custom = settings.policy if isinstance(settings.policy, Policy) else None
        self.store = store
        self.settings = settings
        self.traits = settings.traits
        self.policy = self.traits.name
        self._custom = custom  # until it fails
        self._planning = threading.RLock()  # a plan may call `predict`
        self.trace_spans = settings.trace_spans
        self.device = settings.place
        granted = expert_budget(settings.expert_memory, store, self.device, experts_per_token=top_k)
        self.expert_memory_bytes = min(granted, store.total_bytes)
        pinned_bytes = pinned_budget(settings.pinned_memory, store.total_bytes, self.device)
        self._native = _core.Runtime(
            store,
            granted,
            experts_per_token=top_k,
            activation=choice("activation", activation, _ACTIVATIONS),
            alpha=real_number("alpha", alpha),
            limit=real_number("limit", limit),
            compute_threads=settings.compute_threads,
            copy_threads=settings.copy_threads,
            link_gbps=settings.link_gbps,
            policy=BASELINE if custom is not None else self.policy,
            eviction=eviction_of(self.traits, settings.eviction),
            trace_spans=settings.trace_spans,
            device=settings.device,
            pinned_memory_bytes=pinned_bytes,
            pinned_progress=_in_megabytes(progress or silent),
        )
        close_at_exit(self)
        if self.device.type != "cpu":
            everything = settings.pinned_memory == "auto"
            self._warn_of_unpinned(store.total_bytes if everything else pinned_bytes)

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
            [tokens, hidden] of the dtype of ``x``, summed in fp32 in the router's order. It has no
            gradient: under ``torch.no_grad()`` or ``torch.inference_mode()`` any input will do,
            elsewhere inputs that require a gradient are refused.

        Raises:
            InvalidArgument: A shape, dtype, device or index is wrong, or a gradient is required.
            DeviceError: An expert could not be read; the runtime stays usable, unless the message
                says that the device is lost.
            Error: The runtime is closed, or belongs to another process.
        """
        layer = self._check_layer(layer)
        for name, tensor in (
            ("x", x),
            ("top_k_index", top_k_index),
            ("top_k_weights", top_k_weights),
        ):
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                raise InvalidArgument(f"{name} must be a dense torch.Tensor, got {_kind(tensor)}")
        if x.ndim != 2 or x.shape[1] != self.store.hidden:
            raise InvalidArgument(f"x must be [tokens, {self.store.hidden}], got {list(x.shape)}")
        if top_k_index.ndim != 2 or top_k_index.shape[0] != x.shape[0]:
            raise InvalidArgument(
                f"top_k_index must be [{x.shape[0]}, k], got {list(top_k_index.shape)}"
            )
        if top_k_index.dtype not in _INDEX_DTYPES:
            raise InvalidArgument(
                f"top_k_index must hold integers, such as torch.int64, got {top_k_index.dtype}"
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
            if tensor.requires_grad and torch.is_grad_enabled():
                raise InvalidArgument(
                    f"{name} requires a gradient, but offloaded experts have no backward pass: "
                    "call under torch.no_grad() or torch.inference_mode(), or detach it"
                )
        with working:
            return self._compute(layer, x, top_k_index, top_k_weights)

    def _compute(
        self,
        layer: int,
        x: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        x = _readable(x)
        top_k_index = _readable(top_k_index.to(self.device, torch.int64))
        top_k_weights = _readable(top_k_weights)
        if self._custom is not None and x.shape[0] <= MAX_ROWS:
            self._plan("access", layer, experts=torch.unique(top_k_index).cpu().numpy())
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
        """Report that another text begins, for policies that compare requests.

        An iteration that the text before left open, because it failed or was given up, ends here.

        Raises:
            CheckpointError: A file of the store was written to after it was opened.
        """
        self._native.begin_request()

    def predict(
        self,
        layer: int,
        scores: torch.Tensor | np.ndarray[Any, Any],
        *,
        source: Source = "draft",
    ) -> None:
        """Report which experts the router of ``layer`` is expected to choose. Does not wait.

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
        layer = self._check_layer(layer)
        choice("source", source, SOURCES)
        count = self.store.expert_count
        shape = list(getattr(scores, "shape", [None]))
        if not isinstance(scores, (torch.Tensor, np.ndarray)) or shape != [count]:
            raise InvalidArgument(
                f"scores must be a tensor or a numpy array of shape [{count}], got {_kind(scores)}"
            )
        if isinstance(scores, torch.Tensor):
            if scores.dtype.is_complex or scores.device.type not in ("cpu", self.device.type):
                raise InvalidArgument(
                    f"scores must be real numbers on the CPU or {self.device}, "
                    f"got {scores.dtype} on {scores.device}"
                )
            if scores.device.type != "cpu":
                self._predict_on_device(layer, scores, source)
                if self._custom is not None:
                    known = _readable(scores.float()).cpu().numpy()
                    self._plan("prediction", layer, source=source, scores=known)
                return
            scores = _readable(scores.to(torch.float32)).numpy()
        elif scores.dtype.kind not in "biuf":
            raise InvalidArgument(f"scores must be real numbers, got {scores.dtype}")
        values = np.ascontiguousarray(scores, dtype=np.float32)
        self._native.predict(layer, values, source)
        if self._custom is not None:
            self._plan("prediction", layer, source=source, scores=values)

    def _plan(self, kind: Literal["prediction", "access", "end"], layer: int, **seen: Any) -> None:
        """Let the policy written in Python plan by an event; one that fails is off from then on."""
        with self._planning:
            policy = self._custom
            if policy is None:
                return
            shape = (self.store.layer_count, self.store.expert_count)
            resident = np.frombuffer(self._native.residency(), dtype=np.bool_).reshape(shape)
            try:
                wanted = policy.plan(Event(kind, layer, resident, **seen))
                plan = None if wanted is None else [self._check_planned(pair) for pair in wanted]
            except Exception as error:  # of the user's code
                self._custom, plan = None, []
                log.warning(
                    "the policy %s is off, and experts are fetched on demand (%s: %s)",
                    self.policy,
                    type(error).__name__,
                    error,
                )
            if plan is not None:
                self._native.plan(plan)

    def _predict_on_device(self, layer: int, scores: torch.Tensor, source: str) -> None:
        if scores.device != self.device:
            raise InvalidArgument(
                f"scores must be on the CPU or {self.device}, got {scores.device}"
            )
        scores = _readable(scores.float())
        self._native.predict_on_device(layer, scores.data_ptr(), source, self._consumer())

    def set_limits(
        self,
        *,
        cutoff_layer: int | None = None,
        budget_bytes: Sequence[int] = (),
        break_even: float = 0.5,
    ) -> None:
        """Set what the measured costs of this machine allow; see `spmoe.costs.cutoff`.

        Each policy reads those that concern it; see docs/policies.md.

        Args:
            cutoff_layer: Leading layers that drafting prefetches for; None means all.
            budget_bytes: What the link can move until each layer runs; or nothing.
            break_even: Probability of use under which nothing is prefetched.

        Raises:
            InvalidArgument: A value is negative or no number, or there is not one budget a layer.
        """
        if not isinstance(budget_bytes, Sequence):
            raise InvalidArgument(
                f"budget_bytes is {shown(budget_bytes)}; give a list with one for each layer"
            )
        layers = self.store.layer_count
        if cutoff_layer is not None:
            layers = whole_number("cutoff_layer", cutoff_layer, 0, layers)
        self._native.set_limits(
            layers,
            [whole_number("budget_bytes", budget, 0, _MOST_BYTES) for budget in budget_bytes],
            real_number("break_even", break_even, 0.0),
        )

    def record_routing(self, on: bool = True) -> None:
        """Record which experts every layer needs from now on, or stop."""
        self._native.record_routing(bool(on))

    def recorded_routing(self) -> list[tuple[int, list[int]]]:
        """Return the record: (layer, experts) of each call of `forward`, in order."""
        return self._native.recorded_routing()

    def replay_routing(self, routing: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Give policies that replay routing (`spmoe.policies.Traits`) all of it that is to come."""
        self._native.replay_routing(
            [self._check_call(call) for call in routing],
            self.store.layer_count,
            self.store.expert_count,
        )

    def spans(self) -> list[tuple[str, int, int | None, float, float, int]]:
        """Return the latest spans: (track, layer, expert, start_s, end_s, queue depth), in order.

        Tracks are "compute", "wait", "demand" and "prefetch"; the first two concern whole layers.
        Seconds are those of `time.perf_counter`.
        """
        return self._native.spans()

    def calibration(self) -> list[tuple[float, float, float]]:
        """Return how predictions came true: (scores from, weight of predictions, of these used)."""
        return self._native.calibration()

    def end_iteration(self, accepted: int = 0) -> None:
        """Report that an iteration ended with ``accepted`` draft tokens; 0 for plain decoding.

        Raises:
            DeviceError: A copy that this iteration computed from failed after all.
        """
        self._native.end_iteration(whole_number("accepted", accepted, 0, _MOST_COUNT))
        if self._custom is not None:
            self._plan("end", 0)

    def reset(self) -> None:
        """Make it as new: nothing resident, learnt or recorded, no limits, all counters 0.

        Copies in flight are cancelled; experts in page-locked memory stay.
        """
        self._native.reset()

    def stats(self, *, by_layer: bool = True) -> dict[str, Any]:
        """Counters since construction or `reset`: hits, late, misses, bytes by kind, seconds.

        Under "layers" the same for each layer, if ``by_layer``.

        `prefetch_wasted_bytes` counts what was moved on a prediction and has not been used (yet):
        demand + prefetch_used + prefetch_wasted = link_bytes, whenever no copy is in flight.
        "pinned_bytes" of experts are in page-locked memory, which took "pinned_fill_s" to fill; on
        a CUDA device "dropped_predictions" came too late or too many, and seconds of compute are
        those of handing it over.
        `cancelled` counts prefetches that were cancelled before they started, `cancelled_bytes` the
        bytes not moved of prefetches that were cancelled in flight; bytes that these moved are
        wasted.
        """
        return self._native.stats(bool(by_layer)) | {"policy": self.policy}

    def counters(self) -> Counters:
        """Return the counters of all layers together; also of a closed runtime."""
        return self._native.counters()

    @contextmanager
    def counting(self) -> Iterator[Counters]:
        """Count what happens in the block.

        Yields:
            Counters that are 0 until the block ends, and then say how much those of the runtime
            grew in it. Calls of other threads count too.
        """
        used = Counters()
        before = self.counters()
        try:
            yield used
        finally:
            used.add(self.counters() - before)

    def close(self) -> None:
        """End the copies in flight and give threads and memory back. May be called twice.

        Waits for a `forward` of another thread. Every call but `stats`, `counters` and `counting`
        then raises `Error`. In a
        forked child it does nothing.
        """
        self._native.close()

    def _check_layer(self, layer: int) -> int:
        return whole_number("layer", layer, 0, self.store.layer_count - 1)

    def _check_planned(self, pair: Any) -> tuple[int, int]:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise InvalidArgument(f"plan holds {shown(pair)}; give (layer, expert) pairs")
        last = self.store.expert_count - 1
        return self._check_layer(pair[0]), whole_number("expert", pair[1], 0, last)

    def _check_call(self, call: tuple[int, Sequence[int]]) -> tuple[int, list[int]]:
        if not isinstance(call, Sequence) or len(call) != 2 or not isinstance(call[1], Sequence):
            raise InvalidArgument(
                f"routing holds {shown(call)}; give (layer, experts) of each call, as "
                "recorded_routing returns them"
            )
        layer, experts = call
        last = self.store.expert_count - 1
        return self._check_layer(layer), [whole_number("expert", e, 0, last) for e in experts]


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose memory holds its values, in order; views may negate what they show."""
    return tensor.detach().resolve_neg().contiguous()


def _kind(value: Any) -> str:
    """Return what a message says of something that is not the tensor it should be."""
    if isinstance(value, torch.Tensor):
        return f"{value.layout} of {value.dtype}, {list(value.shape)}"
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {list(shape)}"


def _in_megabytes(progress: Progress) -> Callable[[int, int], None]:
    def report(done_bytes: int, total_bytes: int) -> None:
        progress("filling page-locked memory, MB", done_bytes // 10**6, total_bytes // 10**6)

    return report
