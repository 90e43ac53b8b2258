"""`spmoe doctor`: machines of all kinds, faked as trees of /proc and /sys."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from spmoe import cli
from spmoe.doctor import Report, describe, examine
from spmoe.doctor import report as report_module
from spmoe.doctor.link import Sample, chosen_isa, measure_link, memcpy_gbps
from spmoe.errors import Error
from spmoe.system.machine import read_memory, read_processor, read_system

WITHOUT_CUDA = 'this spmoe was built without CUDA; use device="host"'
TINY = Sample(side=32, experts=3, layers=2)

SERVER = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Big Chip\nflags\t\t: fpu avx2 fma amx_tile\n\n"
    "processor\t: 1\nmodel name\t: Other\nflags\t\t: fpu\n",
    "proc/meminfo": "MemTotal:       1048576 kB\nMemFree:  1 kB\nMemAvailable:    524288 kB\n",
    "proc/self/limits": "Limit                Soft Limit           Hard Limit           Units\n"
    "Max locked memory    65536                unlimited            bytes\n",
    "proc/self/status": "Name:\tpython\nCpus_allowed_list:\t0-2,8\n",
    "proc/self/cgroup": "0::/user/job\n",
    "proc/sys/kernel/osrelease": "6.8.0\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  "
    "570.86.15  Release Build\nGCC version:  gcc version 12.3.0\n",
    "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA H100\nIRQ:  1\n",
    "sys/fs/cgroup/user/job/memory.max": "max\n",
    "sys/fs/cgroup/user/memory.max": "268435456\n",
    "sys/fs/cgroup/user/job/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/user/cpu.max": "max 100000\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    def tree(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "root"

    return tree


@pytest.fixture(autouse=True)
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Set the driver's answer; torch is built without CUDA, save where it is needed."""
    said = SimpleNamespace(count=0, reason=WITHOUT_CUDA)
    if "needs_cuda" in request.keywords:
        return said
    monkeypatch.setattr(report_module, "cuda_status", lambda: (said.count, said.reason))
    monkeypatch.setattr("torch.version.cuda", None)
    return said


def cures(report: Report) -> dict[str, str]:
    return {line.name: line.cure for line in describe(report) if line.cure}


def found(report: Report) -> dict[str, str]:
    return {line.name: line.value for line in describe(report)}


def test_a_machine_is_read_off_proc_and_sys(tree) -> None:
    root = tree(SERVER)
    assert dataclasses.asdict(read_processor(root)) == {
        "name": "Big Chip",
        "features": ("fma", "avx2", "amx_tile"),
        "cores": 4,
        "quota_cores": 1.5,
    }
    assert dataclasses.asdict(read_memory(root)) == {
        "total_bytes": 1 << 30,
        "available_bytes": 1 << 29,
        "limit_bytes": 1 << 28,
        "lock_limit_bytes": 65536,
        "huge_pages": "never",
        "usable_bytes": 1 << 28,
    }
    assert dataclasses.asdict(read_system(root)) == {
        "kernel": "6.8.0",
        "nvidia_driver": "570.86.15",
        "gpus": ("NVIDIA H100",),
    }


def test_the_first_version_of_control_groups_is_read_too(tree) -> None:
    root = tree(
        {
            "proc/meminfo": "MemTotal:       1048576 kB\n",
            "proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/job\n1:name=systemd:/\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1000000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        }
    )
    assert read_memory(root).limit_bytes == 1_000_000
    assert read_processor(root).quota_cores == 0.5


def test_what_a_group_uses_is_not_left_but_for_its_cached_files(tree) -> None:
    second = {
        "proc/meminfo": "MemTotal: 1048576 kB\nMemAvailable: 900000 kB\n",
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/memory.max": "1000000\n",
        "sys/fs/cgroup/job/memory.current": "700000\n",
        "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 100000\nactive_file 50000\n",
    }
    assert read_memory(tree(second)).usable_bytes == 1_000_000 - (700_000 - 150_000)
    assert read_memory(tree(second | {"proc/meminfo": "MemAvailable: 4 kB"})).usable_bytes == 4096


def test_of_the_first_version_cached_files_count_once(tree) -> None:
    first = {
        "proc/meminfo": "MemTotal: 1048576 kB\nMemAvailable: 900000 kB\n",
        "proc/self/cgroup": "4:memory:/job\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1000000\n",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "700000\n",
        "sys/fs/cgroup/memory/job/memory.stat": (
            "inactive_file 1000\nactive_file 9\n"
            "total_inactive_file 100000\ntotal_active_file 50000\n"
        ),
    }
    assert read_memory(tree(first)).usable_bytes == 1_000_000 - (700_000 - 150_000)


def test_a_limit_above_ram_is_none(tree) -> None:
    root = tree(
        {
            "proc/meminfo": "MemTotal:       1048576 kB\n",
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        }
    )
    assert read_memory(root).limit_bytes is None


def test_a_container_that_sees_only_its_own_group_is_read(tree) -> None:
    root = tree(
        {
            "proc/self/cgroup": "0::/docker/of-the-host\n",
            "sys/fs/cgroup/memory.max": "4096\n",
            "sys/fs/cgroup/cpu.max": "200000 100000\n",
        }
    )
    assert read_memory(root).limit_bytes == 4096
    assert read_processor(root).quota_cores == 2


@pytest.mark.parametrize("missing", [*SERVER, "everything"])
def test_what_a_machine_does_not_give_is_unknown(tree, missing: str) -> None:
    given = {name: text for name, text in SERVER.items() if missing not in (name, "everything")}
    report = examine(root=tree({"proc/keep": ""} | given), measure=False)
    lines = found(report)
    unknown = {name for name, value in lines.items() if value == "unknown"}
    json.dumps(report.as_dict())
    expected = {
        "proc/cpuinfo": {"processor", "features"},
        "proc/self/status": {"cores"},
        "proc/self/limits": {"RLIMIT_MEMLOCK"},
        "proc/sys/kernel/osrelease": {"kernel"},
        "sys/kernel/mm/transparent_hugepage/enabled": {"transparent huge pages"},
        "proc/meminfo": {"RAM", "RAM available"},
    }
    if missing == "everything":
        assert unknown == set().union(*expected.values(), {"could be page-locked, at most"})
        assert lines["NVIDIA driver"] == "not loaded"
        assert lines["GPUs"] == "none found"
    else:
        assert unknown == expected.get(missing, set())


def test_everything_that_is_off_has_a_cure(tree, cuda) -> None:
    cuda.reason = "the driver is older than the CUDA runtime: install driver 580 or later"
    report = examine(root=tree(SERVER), measure=False)
    cure = cures(report)
    assert cure.keys() == {
        "CUDA",
        "RLIMIT_MEMLOCK",
        "transparent huge pages",
        "processor quota of the control group",
    }
    assert cure["CUDA"] == cuda.reason
    assert cure["RLIMIT_MEMLOCK"].startswith("RLIMIT_MEMLOCK is 64.0 KiB, and 256.0 MiB could be")
    assert "ulimit -l unlimited" in cure["RLIMIT_MEMLOCK"]
    assert "4 cores share the time of 1.5" in cure["processor quota of the control group"]


def test_nothing_is_off_on_a_machine_that_has_everything(tree, cuda, monkeypatch) -> None:
    cuda.count, cuda.reason = 2, ""
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: f"GPU {index}")
    report = examine(
        root=tree(
            SERVER
            | {
                "proc/self/limits": "Max locked memory  unlimited  unlimited  bytes\n",
                "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
                "sys/fs/cgroup/user/job/cpu.max": "max 100000\n",
            }
        ),
        measure=False,
    )
    report = dataclasses.replace(report, isa="avx2")
    assert not cures(report)
    assert found(report)["CUDA"] == "cuda:0 (GPU 0), cuda:1 (GPU 1)"
    assert found(report)["RLIMIT_MEMLOCK"] == "unlimited"


def test_locked_memory_matters_only_beside_a_gpu(tree) -> None:
    without = {name: text for name, text in SERVER.items() if "nvidia" not in name}
    assert "RLIMIT_MEMLOCK" not in cures(examine(root=tree(without), measure=False))


def test_kernels_without_avx2_have_a_cure(tree, monkeypatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    report = dataclasses.replace(examine(root=tree({}), measure=False), isa="baseline")
    assert "no AVX2" in cures(report)["kernels on the host"]
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "kernels on the host" not in cures(report)


def test_the_link_is_measured_by_the_runtime_and_leaves_nothing(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    link = measure_link(tmp_path / "cache", sample=TINY, progress=lambda *step: steps.append(step))
    assert link.file_bytes == TINY.file_bytes == 2 * 3 * 3 * 32 * 32 * 2
    assert link.cached_gbps > 0
    assert link.cold_gbps is None or link.cold_gbps > 0
    assert link.pinned_gbps is None
    assert [path.name for path in (tmp_path / "cache").rglob("*")] == ["doctor", ".lock"]
    assert ("writing experts to read", 2, 2) in steps
    assert memcpy_gbps(4096) > 0
    assert chosen_isa() in ("avx512", "avx2", "baseline")


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    def copy(description: str, done: int, total: int) -> None:
        """Leave what a process would that was killed once its sample was written."""
        if (description, done) == ("writing experts to read", total):
            [sample] = {file.parent for file in tmp_path.rglob("*.safetensors")}
            shutil.copytree(sample, f"{sample}-killed")

    measure_link(tmp_path, sample=TINY, progress=copy)
    (tmp_path / "doctor-abc").mkdir()  # of a version without a lock
    (tmp_path / "doctor-abc" / "layer-0.safetensors").touch()
    assert len(list(tmp_path.rglob("*.safetensors"))) == TINY.layers + 1
    measure_link(tmp_path, sample=TINY)
    assert [path.name for path in tmp_path.rglob("*")] == ["doctor", ".lock"]


def test_pages_that_stay_are_not_called_cold(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("os.posix_fadvise", lambda *_: None)
    assert measure_link(tmp_path, sample=TINY).cold_gbps is None


def test_a_full_disk_is_said_and_the_rest_reported_too(tree, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1024))
    with pytest.raises(Error, match=r"needs 36.0 KiB in .*, but 1.0 KiB are free there; free some"):
        measure_link(tmp_path, sample=TINY)
    monkeypatch.setenv("SPMOE_CACHE", str(tmp_path))
    report = examine(root=tree(SERVER))
    assert report.links == ()
    assert found(report)["link"] == "not measured"
    assert "set SPMOE_CACHE" in cures(report)["link"]
    assert report.memory.total_bytes == 1 << 30


def test_a_folder_that_cannot_be_written_is_said(tree, tmp_path, monkeypatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("SPMOE_CACHE", str(file / "below"))
    assert "Not a directory" in cures(examine(root=tree({})))["link"]


def run(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["spmoe", "doctor", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    return capsys.readouterr().out


def test_the_verb_prints_one_object_or_a_table_with_cures(monkeypatch, capsys) -> None:
    printed_json = json.loads(run(monkeypatch, capsys, "--no-link", "--json"))
    assert printed_json.keys() == {
        *("processor", "memory", "system", "cuda", "versions", "isa"),
        *("links", "link_failure", "memcpy_gbps", "cures"),
    }
    assert (printed_json["links"], printed_json["memcpy_gbps"]) == ([], None)
    assert printed_json["cures"]["CUDA"] == printed_json["cuda"]["reason"] == WITHOUT_CUDA
    printed = run(monkeypatch, capsys, "--no-link")
    assert "RLIMIT_MEMLOCK" in printed
    assert f"\nCUDA: {WITHOUT_CUDA}\n" in printed


def test_the_link_is_in_the_table_with_the_disk_apart(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("SPMOE_CACHE", str(tmp_path))
    small = lambda folder, *, device, progress: measure_link(folder, device=device, sample=TINY)  # noqa: E731
    monkeypatch.setattr(report_module, "measure_link", small)
    monkeypatch.setattr(report_module, "memcpy_gbps", lambda _: 12.5)
    printed = run(monkeypatch, capsys)
    for text in ("link to host, page cache", "link to host, from disk", "memcpy", "12.50 GB/s"):
        assert text in printed


@pytest.mark.needs_cuda
def test_a_gpu_is_named_and_its_link_measured(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SPMOE_CACHE", str(tmp_path))
    report = examine()
    assert not report.link_failure
    assert "cuda:0" in report.cuda.devices
    assert [link.device for link in report.links[:2]] == ["host", "cuda:0"]
    assert report.links[1].cached_gbps > 0
    assert (report.links[1].pinned_gbps or 0) > 0
