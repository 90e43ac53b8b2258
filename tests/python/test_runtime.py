"""`Runtime` by itself: what it takes, what it refuses, and how it ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spmoe
from families import make_checkpoint
from spmoe.reporting.counters import Counters
from spmoe.runtime import Runtime

TOP_K = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("runtime"))
    return spmoe.open_store(sorted(folder.glob("*.safetensors")))


def open_runtime(store: Any, **options: Any) -> Runtime:
    defaults: dict[str, Any] = {"expert_memory": "50%", "experts_per_token": TOP_K}
    return Runtime(store, **(defaults | options))


@pytest.fixture
def runtime(store: Any) -> Iterator[Runtime]:
    with open_runtime(store) as runtime:
        yield runtime


@pytest.fixture
def call(store: Any) -> dict[str, Any]:
    """Arguments of a `forward` that is right."""
    generator = torch.Generator().manual_seed(1)
    return {
        "layer": 1,
        "x": torch.randn(2, store.hidden, generator=generator),
        "top_k_index": torch.tensor([[0, 5, 2], [7, 1, 3]]),
        "top_k_weights": torch.rand(2, TOP_K, generator=generator),
    }


NOT_A_LAYER: tuple[Any, ...] = (-1, 3, 65536, 1 << 64, 1.0, 1.5, None, "1", True)


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("expert_memory", (0, -1, 1 << 64, "9" * 400, "much", None, True, "")),
        ("experts_per_token", (0, -1, 9, 1 << 40, 2.0, None, "3")),
        ("activation", ("relu", None, 3)),
        ("alpha", (float("nan"), float("inf"), "1.7", None)),
        ("limit", (float("-inf"), None, 10**400)),
        ("device", ("tpu", "cuda:x", None, 0)),
        ("compute_threads", (-1, 1025, 1 << 40, 1.5, None)),
        ("copy_threads", (0, -1, 100_000, 1 << 40, 2.0, None)),
        ("link_gbps", (-1, -1e-300, 1e-300, 9e-7, float("nan"), float("inf"), 10**400, "1", None)),
        ("policy", ("bogus", None, 1)),
        ("eviction", ("bogus", "", 1)),
        ("trace_spans", (-1, 1 << 62, 1.5, None)),
        ("pinned_memory", (-1, "much", "9" * 400, None)),
        ("progress", (1, "yes")),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(
    store: Any, option: str, wrong: tuple[Any, ...]
) -> None:
    for value in wrong:
        with pytest.raises(spmoe.InvalidArgument, match=rf"{option}\b.*(give|use|is not one of)"):
            open_runtime(store, **{option: value})


@pytest.mark.parametrize("name", ["draft_length", "dtype", "max_context", "polcy"])
def test_what_is_no_setting_of_a_runtime_is_refused(store: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        open_runtime(store, **{name: 1})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("on-demand", "predicted-use")),
        ({"policy": "on-demand"}, ("on-demand", "predicted-use")),
        ({"policy": "on-demand", "eviction": "auto"}, ("on-demand", "lru")),
        ({"policy": "sp-moe"}, ("sp-moe", "lru")),
        ({"policy": "oracle"}, ("oracle", "belady")),
        ({"eviction": "lfu"}, ("on-demand", "lfu")),
    ],
)
def test_the_default_eviction_is_the_best_one_only_where_no_baseline_is_asked_for(
    store: Any, settings: dict[str, Any], expected: tuple[str, str]
) -> None:
    with open_runtime(store, **settings) as runtime:
        stats = runtime.stats()
    assert (stats["policy"], stats["eviction"]) == expected


def test_the_default_eviction_moves_less_than_lru_where_passes_repeat(store: Any) -> None:
    def bytes_moved(**eviction: str) -> int:
        generator = torch.Generator().manual_seed(3)
        with open_runtime(store, expert_memory="50%", **eviction) as runtime:
            for _ in range(20):
                for layer in range(store.layer_count):
                    # Experts 0 to 2 as a rule, any others at times: plain decoding.
                    likely = torch.tensor([6.0, 6.0, 6.0, 1.0, 1.0, 1.0, 1.0, 1.0])
                    index = torch.multinomial(likely, TOP_K, generator=generator)[None]
                    runtime.forward(layer, torch.ones(1, store.hidden), index, torch.ones(1, TOP_K))
                runtime.end_iteration()
            return int(runtime.stats()["link_bytes"])

    assert bytes_moved() < 0.8 * bytes_moved(eviction="lru")


def test_a_baseline_of_load_keeps_its_published_eviction(target_path: Path) -> None:
    with spmoe.load(target_path, expert_memory="50%", policy="on-demand") as engine:
        assert engine.runtime.stats()["eviction"] == "lru"


@pytest.mark.parametrize("wrong", [None, "model.safetensors", Path(), object()])
def test_a_store_is_what_open_store_returns(wrong: Any) -> None:
    with pytest.raises(spmoe.InvalidArgument, match=r"store is .*open_store"):
        open_runtime(wrong)


@pytest.mark.parametrize("layer", NOT_A_LAYER)
def test_a_wrong_layer_is_refused_by_every_call(
    runtime: Runtime, call: dict[str, Any], layer: Any
) -> None:
    refused = pytest.raises(spmoe.InvalidArgument, match=r"layer is .*integer from 0 to 2")
    with refused:
        runtime.forward(**(call | {"layer": layer}))
    with refused:
        runtime.predict(layer, np.zeros(8, np.float32))
    with refused:
        runtime.replay_routing([(layer, [0])])


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", None, "must be a dense torch.Tensor, got NoneType"),
        ("x", np.zeros((2, 64)), r"must be a dense torch.Tensor, got ndarray \[2, 64\]"),
        ("x", torch.zeros(2, 64).to_sparse(), "must be a dense torch.Tensor, got torch.sparse_coo"),
        ("x", torch.zeros(2, 63), r"must be \[tokens, 64\]"),
        ("x", torch.zeros(2, 64, dtype=torch.int64), "must be float32, bfloat16 or float16"),
        ("x", torch.zeros(2, 64, dtype=torch.complex64), "must be float32, bfloat16 or float16"),
        ("x", torch.zeros(2, 64, device="meta"), "must be .* on cpu, got .* on meta"),
        ("top_k_index", [[0, 1, 2]], "must be a dense torch.Tensor, got list"),
        ("top_k_index", torch.zeros(3, 3, dtype=torch.int64), r"must be \[2, k\]"),
        ("top_k_weights", torch.zeros(2, 2), "must have the shape of top_k_index"),
        ("top_k_weights", torch.zeros(2, 3, dtype=torch.bool), "must be float32"),
    ],
)
def test_a_wrong_tensor_is_refused_by_its_name(
    runtime: Runtime, call: dict[str, Any], name: str, wrong: Any, message: str
) -> None:
    with pytest.raises(spmoe.InvalidArgument, match=f"{name} {message}"):
        runtime.forward(**(call | {name: wrong}))


@pytest.mark.parametrize("value", [1.7, True, 1 + 5j])
def test_an_index_that_is_no_integer_is_refused(
    runtime: Runtime, call: dict[str, Any], value: complex
) -> None:
    index = torch.full((2, TOP_K), value)
    with pytest.raises(spmoe.InvalidArgument, match=r"top_k_index must hold integers"):
        runtime.forward(**(call | {"top_k_index": index}))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint64]
)
def test_an_index_of_every_integer_dtype_means_the_same(
    runtime: Runtime, call: dict[str, Any], dtype: torch.dtype
) -> None:
    expected = runtime.forward(**call)
    call["top_k_index"] = call["top_k_index"].to(dtype)
    assert torch.equal(runtime.forward(**call), expected)


def test_views_are_read_as_what_they_show(runtime: Runtime, call: dict[str, Any]) -> None:
    expected = runtime.forward(**call)
    x, weights, index = call["x"], call["top_k_weights"], call["top_k_index"]
    imaginary = torch.complex(x, -x).conj().imag  # torch negates it when it is read
    assert imaginary.is_neg()
    assert torch.equal(runtime.forward(**(call | {"x": imaginary})), expected)
    for name, plain in (("x", x), ("top_k_weights", weights), ("top_k_index", index)):
        for view in (torch._neg_view(-plain), plain.T.contiguous().T):
            assert torch.equal(runtime.forward(**(call | {name: view})), expected), name


def test_negated_scores_are_read_as_what_they_show(store: Any) -> None:
    scores = torch.arange(8.0) / 8
    expected = None
    for view in (scores, torch._neg_view(-scores), scores.numpy()):
        with open_runtime(store, policy="next-gate") as runtime:
            runtime.predict(0, view)
            runtime.forward(
                0, torch.zeros(1, store.hidden), torch.tensor([[0, 1, 7]]), torch.ones(1, 3)
            )
            counters = {n: runtime.stats()[n] for n in ("predicted_accesses", "recalled")}
        expected = expected or counters
        assert counters == expected
    assert expected == {"predicted_accesses": 3, "recalled": 1}


@pytest.mark.parametrize(
    "scores",
    [
        *(None, [0.0] * 8, np.zeros(7), torch.zeros(1, 8)),
        *(np.zeros(8, complex), np.zeros(8, object)),
        *(torch.zeros(8, dtype=torch.complex64), torch.zeros(8, device="meta")),
    ],
)
def test_wrong_scores_are_refused(runtime: Runtime, scores: Any) -> None:
    with pytest.raises(spmoe.InvalidArgument, match=r"scores must be"):
        runtime.predict(0, scores)


@pytest.mark.parametrize(
    "request_of",
    [
        lambda r: r.predict(0, np.zeros(8), source="oracle"),
        lambda r: r.set_limits(cutoff_layer=-1),
        lambda r: r.set_limits(cutoff_layer=4),
        lambda r: r.set_limits(cutoff_layer="all"),
        lambda r: r.set_limits(budget_bytes=[-1, 0, 0]),
        lambda r: r.set_limits(budget_bytes=[0]),
        lambda r: r.set_limits(budget_bytes=[1 << 64] * 3),
        lambda r: r.set_limits(budget_bytes=7),
        lambda r: r.set_limits(break_even=-0.5),
        lambda r: r.set_limits(break_even=float("nan")),
        lambda r: r.replay_routing([0]),
        lambda r: r.replay_routing([(0, 5)]),
        lambda r: r.replay_routing([(0, [8])]),
        lambda r: r.replay_routing([(0, [1.0])]),
        lambda r: r.end_iteration(-1),
        lambda r: r.end_iteration(1.5),
    ],
)
def test_a_wrong_argument_of_a_call_is_refused(
    runtime: Runtime, request_of: Callable[[Runtime], None]
) -> None:
    with pytest.raises(spmoe.InvalidArgument) as refusal:
        request_of(runtime)
    assert "incompatible function arguments" not in str(refusal.value)


def test_an_input_that_requires_a_gradient_is_refused_where_one_is_recorded(
    runtime: Runtime, call: dict[str, Any]
) -> None:
    expected = runtime.forward(**call)
    for name in ("x", "top_k_weights"):
        learning = call | {name: call[name].clone().requires_grad_()}
        with pytest.raises(spmoe.InvalidArgument, match=rf"{name} requires a gradient.*no_grad"):
            runtime.forward(**learning)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert torch.equal(runtime.forward(**learning), expected)


def test_a_closed_runtime_answers_only_stats(store: Any, call: dict[str, Any]) -> None:
    runtime = open_runtime(store)
    runtime.forward(**call)
    bytes_moved = runtime.stats()["link_bytes"]
    runtime.close()
    runtime.close()
    calls: list[Callable[[], object]] = [
        lambda: runtime.forward(**call),
        runtime.begin_request,
        lambda: runtime.predict(0, np.zeros(8)),
        runtime.set_limits,
        runtime.record_routing,
        runtime.recorded_routing,
        lambda: runtime.replay_routing([(0, [1])]),
        runtime.spans,
        runtime.calibration,
        runtime.end_iteration,
        runtime.reset,
    ]
    public = {name for name, value in vars(Runtime).items() if callable(value) and name[0] != "_"}
    assert len(calls) == len(public - {"stats", "counters", "counting", "close"})
    for refused in calls:
        with pytest.raises(spmoe.Error, match="this Runtime is closed"):
            refused()
    assert runtime.stats()["link_bytes"] == runtime.counters().link_bytes == bytes_moved


def test_counters_are_the_stats_of_all_layers(store: Any, call: dict[str, Any]) -> None:
    with open_runtime(store, policy="horizon") as runtime:
        runtime.predict(0, np.full(8, 2.0))
        runtime.forward(**call)
        runtime.end_iteration(2)
        counters = None
        while counters != (before := runtime.counters()):  # until every prefetch has ended
            counters, stats = before, runtime.stats(by_layer=False)
    names = counters.as_dict()
    assert {name: stats[name] for name in names if name != "prefetch_bytes"} == {
        name: value for name, value in names.items() if name != "prefetch_bytes"
    }
    assert counters.prefetch_wasted_bytes == stats["prefetch_wasted_bytes"]
    assert counters.needed == stats["hits"] + stats["late"] + stats["misses"] > 0
    assert counters.accepted == 2


def test_counting_counts_what_happens_in_the_block(store: Any, call: dict[str, Any]) -> None:
    with open_runtime(store) as runtime:
        runtime.forward(**call)
        before = runtime.counters()
        with suppress(ZeroDivisionError), runtime.counting() as used:
            assert used == Counters()
            runtime.forward(**call)
            _ = 1 / 0
        runtime.forward(**call)
    assert used.needed == used.hits == before.needed == 6
    assert before + used - used == before
    total = Counters()
    total += used
    assert total == used != before
    assert "hits=" not in repr(used)
    assert "'hits': 6" in repr(used)


def test_counters_have_no_other_names() -> None:
    with pytest.raises(TypeError, match="no counter"):
        Counters(hit=1)
    assert Counters(hits=1, stall_s=0.5).as_dict()["stall_s"] == 0.5


def test_other_threads_run_while_a_runtime_goes(store: Any) -> None:
    runtime = open_runtime(store, policy="horizon", link_gbps=2e-4)
    runtime.predict(0, np.full(8, 2.0))
    assert runtime.stats()["link_busy_s"] > 0  # an eighth of a second a copy
    going, runs = True, 0

    def run() -> None:
        nonlocal runs
        while going:
            Path("/").stat()  # lets the GIL go
            runs += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(30)  # nobody takes it away
    thread = threading.Thread(target=run)
    thread.start()
    try:
        before = runs
        del runtime
        assert runs > before
    finally:
        going = False
        sys.setswitchinterval(interval)
        thread.join()


def open_files(folder: Path) -> int:
    here = Path("/proc/self/fd")
    return sum(link.resolve().is_relative_to(folder) for link in here.iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_closing_gives_the_files_back(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path)
    store = spmoe.open_store(sorted(folder.glob("*.safetensors")))
    first, second = open_runtime(store), open_runtime(store)
    held = open_files(folder)
    assert held > 1
    store.close()
    assert open_files(folder) == held  # runtimes still read them
    first.close()
    assert second.stats()["slots"] == 12
    assert open_files(folder) == held
    second.close()
    assert open_files(folder) == 0
    assert (store.layer_count, store.expert_count) == (3, 8)
    with pytest.raises(spmoe.Error, match="this store is closed"):
        open_runtime(store)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_closing_a_loaded_engine_gives_the_files_back(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path)
    engine = spmoe.load(folder, expert_memory="50%", policy="on-demand")
    assert open_files(folder) > 1
    engine.close()
    assert open_files(folder) == 0


_OPEN = """
import os, signal, sys, threading
import torch, spmoe
torch.set_num_threads(1)
store = spmoe.open_store(sys.argv[1:])
def open_runtime(expert_memory="50%", **options):
    return spmoe.Runtime(store, expert_memory=expert_memory, experts_per_token=3, **options)
# Made once: a daemon thread that is in torch itself when the interpreter ends aborts the process.
inputs = torch.ones(1, store.hidden), torch.tensor([[0, 1, 2]]), torch.ones(1, 3)
def forward(runtime):
    return runtime.forward(0, *inputs)
"""


def run_python(checkpoint: Path, script: str) -> str:
    """Run a script after `_OPEN`, whose exit status must be 0, and return what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", _OPEN + script, *sorted(checkpoint.glob("*.safetensors"))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


_FORK = """
from spmoe.system.closeable import at_work
runtime = open_runtime(compute_threads=2)
expected = forward(runtime)
busy = open_runtime(link_gbps=1e-4)  # a thread is in it at the fork, with its locks
caller = threading.Thread(target=lambda: next(at_work(map(forward, [busy]))))
caller.start()
while not busy.stats()["link_busy_s"]:
    pass

def call_everything():
    for here in (runtime, busy):
        calls = (lambda: forward(here), here.begin_request, here.end_iteration, here.stats,
                 here.spans, here.calibration, here.recorded_routing)
        for call in calls:
            try:
                call()
            except spmoe.Error as error:
                assert "load after the fork" in str(error) and "spawn" in str(error)
            else:
                raise AssertionError("the child was served")

def close():
    for _ in range(2):
        runtime.close()
        busy.close()

def let_go():
    global runtime, busy
    del runtime, busy

def open_its_own():
    with open_runtime() as own:
        assert torch.equal(forward(own), expected)

children = {}
for act in (call_everything, close, let_go, open_its_own, lambda: None):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        act()
        sys.exit(7)
    children[child] = act
for child, act in children.items():
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 7, (act, status)
caller.join()
assert torch.equal(forward(runtime), expected)
"""


def test_a_forked_child_is_refused_and_ends_by_itself(target_path: Path) -> None:
    run_python(target_path, _FORK)


_DAEMONS = """
def decode(runtime, begun):
    try:
        while True:
            begun.set()
            forward(runtime)
    except spmoe.Error as error:
        os.write(1, f"{error}\\n".encode())  # print would hold a lock that the exit needs

# One waits for copies all the time, the other never does.
for runtime in (open_runtime("13%", link_gbps=0.003), open_runtime("100%")):
    begun = threading.Event()
    threading.Thread(target=decode, args=[runtime, begun], daemon=True).start()
    begun.wait()
"""


def test_daemon_threads_in_a_layer_do_not_abort_the_exit(target_path: Path) -> None:
    printed = run_python(target_path, _DAEMONS)
    assert set(printed.splitlines()) <= {"this Runtime is closed; make a new one"}


_DAEMON_IN_TORCH = """
from spmoe.system.closeable import at_work
begun = threading.Event()
square = torch.ones(1500, 1500)
def passes():
    while True:
        begun.set()
        square @ square  # torch comes back from this for the GIL, and may not have it then
        forward(runtime)
        yield
def decode():
    try:
        for _ in at_work(passes()):
            pass
    except spmoe.Error as error:
        os.write(1, f"{error}\\n".encode())  # print would hold a lock that the exit needs
runtime = open_runtime()
threading.Thread(target=decode, daemon=True).start()
begun.wait()
"""


def test_a_daemon_thread_in_torch_does_not_abort_the_exit(target_path: Path) -> None:
    printed = run_python(target_path, _DAEMON_IN_TORCH)
    assert printed == "this Runtime is closed; make a new one\n"


_SHORTAGE = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
for threads in ({"copy_threads": 1024}, {"compute_threads": 1024}):
    try:
        open_runtime(**threads)
    except spmoe.OutOfMemory as error:
        assert "lower copy_threads and compute_threads" in str(error), error
    else:
        raise AssertionError("256 MiB of addresses held the stacks of 1024 threads")
open_runtime().close()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_threads_that_the_system_refuses_are_out_of_memory(target_path: Path) -> None:
    run_python(target_path, _SHORTAGE)
