#!/usr/bin/env python3
"""Keeps the arrows between folders: each sees only those that CMakeLists.txt names for it (and what those see), and
headers of CUDA, MPI, NCCL and BLAS stay in their folders. Usage: include_order.py ROOT"""

import pathlib
import re
import sys

FOREIGN = {
    re.compile(r"<?\"?(cuda|cublas|cudnn|nccl|cutlass)"): {"cuda", "dist"},
    re.compile(r"<?\"?mpi\.h"): {"dist"},
    re.compile(r"<?\"?(cblas|openblas|dnnl)"): {"cpu"},
    re.compile(r"<?\"?hwy/"): {"cpu"},
    re.compile(r"<?\"?(boost|openssl)/"): {"serve"},
}


def visible_folders(root):
    """Folder -> folders it may include, from latente_library(NAME SEES a b LINK ...)."""
    files = [root / "CMakeLists.txt", *sorted((root / "cmake").glob("*.cmake"))]
    text = "\n".join(file.read_text() for file in files)
    direct = {}
    for name, rest in re.findall(r"^\s*latente_library\((\w+)([^)]*)\)", text, re.M):
        sees = re.search(r"SEES((?:\s+\w+)*?)(?:\s+LINK|\s*$)", rest)
        direct[name] = set(sees.group(1).split()) if sees else set()

    def closure(name):
        seen = {name}
        for other in direct.get(name, set()):
            seen |= closure(other)
        return seen

    return {name: closure(name) for name in direct}


def main():
    root = pathlib.Path(sys.argv[1])
    visible = visible_folders(root)
    problems = []
    for path in sorted((root / "src").rglob("*")):
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        folder = path.relative_to(root / "src").parts[0]
        if folder not in visible:
            problems.append(f"{path}: CMakeLists.txt names no folder {folder}")
            continue
        for include in re.findall(r"^\s*#\s*include\s+([<\"][^>\"]+[>\"])", path.read_text(), re.M):
            own = include.startswith('"') and "/" in include and include[1:].split("/")[0]
            if own and (root / "src" / own).is_dir() and own not in visible[folder]:
                problems.append(f"{path}: {folder} must not see {own} ({include})")
            for pattern, folders in FOREIGN.items():
                foreign = pattern.match(include.lstrip("<\"")) and not (own and (root / "src" / own).is_dir())
                if foreign and folder not in folders:
                    problems.append(f"{path}: {include} belongs in {', '.join(sorted(folders))}")
    print("\n".join(problems) or f"{len(visible)} folders, every arrow in order")
    return 1 if problems or len(visible) < 8 else 0


if __name__ == "__main__":
    sys.exit(main())
