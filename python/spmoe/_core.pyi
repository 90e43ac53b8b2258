"""
Native runtime of spmoe. Use the documented classes in `spmoe`, not this module.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing
__all__: list[str] = ['CheckpointChanged', 'CheckpointError', 'Counters', 'DeviceError', 'Error', 'ExpertStore', 'FaultPlan', 'InvalidArgument', 'OutOfMemory', 'Runtime', 'cuda_device_problem', 'cuda_status', 'evictions', 'policies']
class Error(Exception):
    pass
class InvalidArgument(Error, ValueError):
    pass
class OutOfMemory(Error, MemoryError):
    pass
class DeviceError(Error, OSError):
    pass
class CheckpointError(Error, ValueError):
    pass
class CheckpointChanged(CheckpointError, DeviceError):
    pass
class ExpertStore:
    """
    Where the blobs of a model's routed experts rest. Its sizes stay known once it is closed.
    """
    def __init__(self, files: collections.abc.Sequence[str], layers: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] = [], interleaved: bool = False, names: collections.abc.Mapping[str, str] = {}) -> None:
        """
        Find the experts in the safetensors shards of a checkpoint; see `spmoe.open_store`.
        """
    def check_unchanged(self) -> None:
        """
        Compare size and time of writing of every shard with those from when it was opened.

        Raises:
            CheckpointChanged: A shard was written to.
            Error: The store is closed.
        """
    def close(self) -> None:
        """
        Close the files, unless runtimes over them are open: then the last of these does.

        May be called twice. No runtime can be opened over a closed store.
        """
    def find_nonfinite(self, layer: typing.SupportsInt | typing.SupportsIndex | None = None, budget_s: typing.SupportsFloat | typing.SupportsIndex = 1.0) -> tuple[int, int, str] | None:
        """
        Look in the files for an expert with a weight that is infinite or not a number.

        Args:
            layer: MoE layer, 0-based; None means all, from the first.
            budget_s: Seconds after which the search ends without a result.

        Returns:
            Layer, expert, and a description that names the file, of the first one; or None.

        Raises:
            InvalidArgument: There is no such layer.
            Error: The store is closed.
        """
    @property
    def blob_bytes(self) -> int:
        ...
    @property
    def dtype(self) -> str:
        ...
    @property
    def expert_count(self) -> int:
        ...
    @property
    def hidden(self) -> int:
        ...
    @property
    def inter(self) -> int:
        ...
    @property
    def layer_count(self) -> int:
        ...
    @property
    def tensor_names(self) -> list[str]:
        ...
    @property
    def total_bytes(self) -> int:
        ...
class Counters:
    """
    Counters of a runtime, over all its layers; a difference says what happened meanwhile.
    """
    __hash__: typing.ClassVar[None] = None
    def __add__(self, other: Counters) -> Counters:
        ...
    def __eq__(self, other: Counters) -> bool:
        ...
    def __init__(self, **kwargs) -> None:
        ...
    def __repr__(self) -> str:
        ...
    def __sub__(self, other: Counters) -> Counters:
        ...
    def add(self, other: Counters) -> None:
        """
        Add `other` in place.
        """
    def as_dict(self) -> dict:
        """
        All counters by name.
        """
    @property
    def accepted(self) -> int:
        ...
    @property
    def cancelled(self) -> int:
        ...
    @property
    def cancelled_bytes(self) -> int:
        ...
    @property
    def compute_s(self) -> float:
        ...
    @property
    def critical(self) -> int:
        ...
    @property
    def demand_bytes(self) -> int:
        ...
    @property
    def hits(self) -> int:
        ...
    @property
    def iterations(self) -> int:
        ...
    @property
    def late(self) -> int:
        ...
    @property
    def link_busy_s(self) -> float:
        ...
    @property
    def link_bytes(self) -> int:
        ...
    @property
    def misses(self) -> int:
        ...
    @property
    def needed(self) -> int:
        """
        Experts that layers asked for.
        """
    @property
    def predicted_accesses(self) -> int:
        ...
    @property
    def predictions(self) -> int:
        ...
    @property
    def prefetch_bytes(self) -> int:
        ...
    @property
    def prefetch_used_bytes(self) -> int:
        ...
    @property
    def prefetch_wasted_bytes(self) -> int:
        """
        Moved on a prediction and not used (yet).
        """
    @property
    def recalled(self) -> int:
        ...
    @property
    def recalled_2k(self) -> int:
        ...
    @property
    def repeated(self) -> int:
        ...
    @property
    def stall_s(self) -> float:
        ...
class FaultPlan:
    """
    Faults that a test plants in the links of the runtimes it gives this to.
    """
    def __init__(self) -> None:
        ...
    def plant(self, fail_at_chunk: typing.SupportsInt | typing.SupportsIndex = 0, delay_seed: typing.SupportsInt | typing.SupportsIndex = 0, max_delay_us: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        """
        From now on the n-th chunk fails, once, and chunks wait a random time.
        """
class Runtime:
    """
    The native runtime; see `spmoe.Runtime`, which checks its arguments.
    """
    def __init__(self, store: ExpertStore, expert_memory_bytes: typing.SupportsInt | typing.SupportsIndex, experts_per_token: typing.SupportsInt | typing.SupportsIndex, activation: str = 'silu', alpha: typing.SupportsFloat | typing.SupportsIndex = 1.7020000219345093, limit: typing.SupportsFloat | typing.SupportsIndex = 7.0, compute_threads: typing.SupportsInt | typing.SupportsIndex = 0, copy_threads: typing.SupportsInt | typing.SupportsIndex = 2, link_gbps: typing.SupportsFloat | typing.SupportsIndex = 0.0, isa: str = 'auto', policy: str = 'on-demand', eviction: str = 'auto', trace_spans: typing.SupportsInt | typing.SupportsIndex = 0, device: str = 'host', pinned_memory_bytes: typing.SupportsInt | typing.SupportsIndex = 0, pinned_progress: typing.Any = None, faults: FaultPlan = None) -> None:
        ...
    def begin_request(self) -> None:
        ...
    def calibration(self) -> list:
        """
        Per bucket of scores: (score_from, weight of predictions, of these used).
        """
    def close(self) -> None:
        ...
    def counters(self) -> Counters:
        ...
    def end_iteration(self, accepted: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def forward(self, layer: typing.SupportsInt | typing.SupportsIndex, tokens: typing.SupportsInt | typing.SupportsIndex, k: typing.SupportsInt | typing.SupportsIndex, x: typing.SupportsInt | typing.SupportsIndex, x_dtype: str, top_k_index: typing.SupportsInt | typing.SupportsIndex, top_k_weights: typing.SupportsInt | typing.SupportsIndex, weights_dtype: str, out: typing.SupportsInt | typing.SupportsIndex, consumer: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        """
        One MoE layer over contiguous tensors, given by their addresses, on the stream consumer.
        """
    def plan(self, experts: collections.abc.Sequence[tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]]) -> None:
        """
        Replace the prefetches that wait by (layer, expert), in this order.
        """
    def predict(self, layer: typing.SupportsInt | typing.SupportsIndex, scores: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], source: str = 'draft') -> None:
        """
        Scores of the target's router, float32 [experts].
        """
    def predict_on_device(self, layer: typing.SupportsInt | typing.SupportsIndex, scores: typing.SupportsInt | typing.SupportsIndex, source: str, consumer: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Router scores, float32 in device memory, made by work on the stream consumer.
        """
    def record_routing(self, on: bool) -> None:
        ...
    def recorded_routing(self) -> list[tuple[int, list[int]]]:
        ...
    def replay_routing(self, routing: collections.abc.Sequence[tuple[typing.SupportsInt | typing.SupportsIndex, collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]]], layer_count: typing.SupportsInt | typing.SupportsIndex, expert_count: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def reset(self) -> None:
        ...
    def residency(self) -> bytes:
        """
        Whether each expert is resident or being filled: a byte, 1 or 0, for [layer, expert].
        """
    def set_limits(self, cutoff_layer: typing.SupportsInt | typing.SupportsIndex, budget_bytes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], break_even: typing.SupportsFloat | typing.SupportsIndex) -> None:
        ...
    def spans(self) -> list:
        """
        The latest spans: (track, layer, expert or None, start_s, end_s, queue_depth).
        """
    def stats(self, by_layer: bool = True) -> dict:
        ...
def cuda_device_problem(index: typing.SupportsInt | typing.SupportsIndex) -> str:
    """
    Why the CUDA device of an index cannot be used; empty if it can.
    """
def cuda_status() -> tuple[int, str]:
    """
    How many CUDA devices there are, and if none, why.
    """
def evictions() -> list:
    """
    Each eviction policy: its name, and whether it replays routing.
    """
def policies() -> list:
    """
    Each prefetch policy as it describes itself; see `spmoe.policies.Traits`.
    """
