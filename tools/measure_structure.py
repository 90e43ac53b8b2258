"""Print figures of the structure of spmoe's source: sizes, interfaces, imports and repeated names.

The figures of two commits, side by side, show what a redesign changed.

Example:
    python tools/measure_structure.py                # of this checkout
    python tools/measure_structure.py 309053b HEAD   # of two commits
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {".py", ".cpp", ".hpp", ".cu", ".cuh"}
PRODUCT = ("csrc", "python/spmoe")
ADAPTIVE = ("planner", "draft_length", "acceptance", "ema", "prior", "confidence", "fading")
FILL_CONTAINERS = (  # of this and earlier commits
    "SlotTable slots_",
    "TransferQueue queue_",
    "std::vector<Want> wants_",
    "std::vector<Copy> copies_",
    "std::vector<Fill(?:State|Record)> fills_",
    "std::vector<FillChange> changes_",
    "std::size_t prefetches_",
    "std::vector<Pending> pending_",
    "std::vector<std::unique_ptr<Batch>> batches_",
    r"std::vector<Batch\*> open_",
)
POLICIES = ("on-demand", "next-gate", "activation-trace", "sp-moe", "horizon", "oracle")


def sources(root: Path, *folders: str) -> list[Path]:
    """Return the source files below ``folders``."""
    found = (file for folder in folders for file in (root / folder).rglob("*"))
    return sorted(file for file in found if file.suffix in SOURCES)


def line_count(files: list[Path]) -> int:
    """Return the number of lines of ``files``."""
    return sum(len(file.read_text().splitlines()) for file in files)


def area(root: Path, file: Path) -> str:
    """Return the folder by which a file is counted."""
    parts = file.relative_to(root).parts
    depth = {"csrc": 2, "python": 3, "tests": 2, "bench": 2}.get(parts[0], 1)
    return "/".join(parts[: min(depth, len(parts) - 1)])


def public_methods(root: Path, class_name: str) -> int:
    """Return how many distinct public methods a C++ class declares, constructors left out."""
    pattern = re.compile(rf"^class {class_name}( final)?( :[^{{]*)? {{$(.*?)^}};$", re.M | re.S)
    for file in sources(root, "csrc"):
        if found := pattern.search(file.read_text()):
            body = found.group(3).partition(" public:\n")[2]
            body = re.split(r"^ (?:private|protected):", body, flags=re.M)[0]
            body = re.sub(r"//.*", "", body)
            names = re.findall(r"^  (?! )[^(]*?\b([a-z]\w*)\(", body, re.M)
            return len(set(names))
    return 0


def public_python_methods(root: Path, module: str, class_name: str) -> int:
    """Return how many public methods and properties a Python class defines."""
    for file in (root / "python" / "spmoe").rglob(f"{module}.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                defined = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
                return len({name for name in defined if not name.startswith("_")})
    return 0


def python_imports(root: Path) -> dict[str, set[str]]:
    """Return which modules of spmoe each of them imports, those for type checking included."""
    package = root / "python" / "spmoe"
    files = {
        ".".join(file.relative_to(package.parent).with_suffix("").parts): file
        for file in package.rglob("*.py")
    }
    modules = {name.removesuffix(".__init__"): file for name, file in files.items()}
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text())):
            wanted: list[str] = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                wanted = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            found[name] |= {w for w in wanted if w in modules and w not in (name, "spmoe")}
    return found


def cycles(graph: dict[str, set[str]]) -> int:
    """Return how many groups of two or more nodes reach one another."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            if (node := todo.pop()) not in seen:
                seen.add(node)
                todo += graph.get(node, ())
        return seen

    reach = {node: reached(node) for node in graph}
    mutual = {
        frozenset({a} | {b for b in reach[a] if a in reach.get(b, ())})
        for a in graph
        if a in reach[a]
    }
    return len({group for group in mutual if len(group) > 1})


def package_arrows(graph: dict[str, set[str]]) -> int:
    """Return how many pairs of different packages of spmoe import from one to the other."""

    def package(module: str) -> str:
        return ".".join(module.split(".")[:2])

    pairs = {(package(a), package(b)) for a, wanted in graph.items() for b in wanted}
    return len({pair for pair in pairs if pair[0] != pair[1]})


def path_of_a_fill(root: Path) -> dict[str, int]:
    """Return what the classes declare through which a fill passes, CUDA's own left out.

    A container counts if it holds something of each fill; an index over one, such as a queue of
    pointers, counts with it. A completion passes from each class that owns threads to the next,
    and from the last to the caller: one hop each.
    """
    names = "copy_lane|copy_pool|copy_engine|fill_table|scheduler|runtime|transfer_queue"
    files = [f for f in sources(root, "csrc") if re.fullmatch(names, f.stem) and f.suffix == ".hpp"]
    declared = {
        "containers of a fill": rf"^ +(?:{'|'.join(FILL_CONTAINERS)})\b",
        "mutexes on the way of a fill": r"^ +(?:mutable )?std::mutex (?!call_)",
        "thread hops of a completion": r"^ +(?:std::vector<)?std::thread\b",
    }
    texts = [file.read_text() for file in files]
    return {
        name: sum(len(re.findall(pattern, text, re.M)) for text in texts)
        for name, pattern in declared.items()
    }


def measure(root: Path) -> dict[str, int]:
    """Return every figure of a checkout, by name."""
    result: dict[str, int] = {}
    by_area: dict[str, list[Path]] = defaultdict(list)
    for file in sources(root, "csrc", "python", "tests", "bench", "examples", "tools"):
        by_area[area(root, file)].append(file)
    for name, files in sorted(by_area.items()):
        result[f"lines in {name}"] = line_count(files)
    product = sources(root, *PRODUCT)
    texts = {file: file.read_text() for file in product}
    result["lines of product code"] = line_count(product)
    result["product files over 250 lines"] = sum(
        len(text.splitlines()) > 250 for text in texts.values()
    )
    adaptive = [f for f in product if f.suffix == ".py" and f.stem in ADAPTIVE]
    result["lines of adaptive code"] = line_count(adaptive)
    result["public methods of Scheduler (C++)"] = public_methods(root, "Scheduler")
    result["public methods of Runtime (C++)"] = public_methods(root, "Runtime")
    result["public methods of Runtime (Python)"] = public_python_methods(root, "runtime", "Runtime")
    result |= path_of_a_fill(root)
    graph = python_imports(root)
    result["imports between Python modules"] = sum(map(len, graph.values()))
    result["imports between Python packages"] = package_arrows(graph)
    result["import cycles"] = cycles(graph)
    python = {f: t for f, t in texts.items() if f.suffix == ".py"}
    result["mentions of pinned_memory in Python"] = sum(
        text.count("pinned_memory") for text in python.values()
    )
    quoted = re.compile("|".join(f'"{name}"' for name in POLICIES))
    uses = Counter({file: len(quoted.findall(text)) for file, text in texts.items()})
    uses = Counter({file: count for file, count in uses.items() if file.stem != "policies"})
    result["policy names in strings outside policies.*"] = sum(uses.values())
    return result


def of_commit(commit: str) -> dict[str, int]:
    """Return the figures of a commit of this repository."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", commit], cwd=ROOT, check=True, capture_output=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        return measure(Path(folder))


def main(commits: list[str]) -> None:
    """Print a table of the figures, a column a commit, or of the checkout without any."""
    columns = {commit: of_commit(commit) for commit in commits} or {"checkout": measure(ROOT)}
    names = dict.fromkeys(name for figures in columns.values() for name in figures)
    print("| |", *(f"{commit} |" for commit in columns))
    print("| --- |", *("---: |" for _ in columns))
    for name in names:
        print(f"| {name} |", *(f"{figures.get(name, 0)} |" for figures in columns.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
