"""Compiles every CUDA kernel and reads what the compiler says of it.

``python tests/cuda_kernels.py`` rewrites cuda_kernels.json, which test_compiled_cuda.py compares with;
``--report FOLDER`` keeps the objects and the compiler's own words there instead.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".json")
ARCHITECTURES = ("80", "90a")

Usage: TypeAlias = dict[str, dict[str, int]]  # by architecture: registers, spilled bytes, bytes of stack


def find_compiler() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")


def find_disassembler() -> tuple[str, str] | None:
    """Return cuobjdump, and the folder of the nvdisasm that it calls: of a toolkit, or of NVIDIA's wheels."""
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    path = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin", str(wheels)])
    found, called = shutil.which("cuobjdump", path=path), shutil.which("nvdisasm", path=path)
    return (found, str(Path(called).parent)) if found and called else None


def read_version(compiler: str) -> str:
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    assert found is not None
    return found[1]


def compile_kernels(compiler: str, folder: Path) -> dict[str, str]:
    """Compile each family's kernels into ``FAMILY.sm_N.cubin``; return what the compiler says, also in files beside."""
    sources = sorted(path for path in ROOT.glob("csrc/*/*.cu") if "__global__" in path.read_text())
    options = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-cubin"]

    def run(pair: tuple[Path, str]) -> tuple[str, str]:
        source, arch = pair
        target = folder / f"{source.parent.name}_{source.stem}.sm_{arch}.cubin"
        code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        done = subprocess.run([compiler, *options, code, "-o", target, source], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        target.with_suffix(".txt").write_text(done.stderr)
        return target.name, done.stderr

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        largest_first = sorted(sources, key=lambda path: -path.stat().st_size)
        return dict(pool.map(run, product(largest_first, ARCHITECTURES)))


def demangle(names: list[str]) -> dict[str, str]:
    """Return what people call kernels: without the package, what is anonymous, and arguments."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"pycodesign::|cuda::|\(anonymous namespace\)::", "", name) for name in plain.splitlines()]
    return {name: re.sub(r"^void |\(.*\)$", "", s) for name, s in zip(names, short, strict=True)}


def read_usage(report: str) -> dict[str, Usage]:
    """Return what each kernel uses."""
    entry = (
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = re.findall(entry, report, re.DOTALL)
    short = demangle([name for name, *_ in found])
    usage: dict[str, Usage] = {}
    for name, architecture, stack, stores, loads, registers in found:
        numbers = {"registers": int(registers), "spilled": int(stores) + int(loads), "stack": int(stack)}
        usage.setdefault(short[name], {})[architecture] = numbers
    return usage


def list_registers(usage: dict[str, Usage]) -> dict[str, dict[str, int]]:
    """Return each kernel's registers, by architecture."""
    return {name: {arch: numbers["registers"] for arch, numbers in use.items()} for name, use in usage.items()}


def read_instructions(disassembler: tuple[str, str], target: Path) -> dict[str, set[str]]:
    """Return the names of each kernel's machine instructions."""
    program, folder = disassembler
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run([program, "-sass", target], capture_output=True, text=True, check=True, env=environment)
    pieces = re.split(r"\n\s*Function : (\w+)\n", done.stdout)
    short = demangle(pieces[1::2])
    instruction = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)")
    return {short[name]: set(instruction.findall(text)) for name, text in zip(pieces[1::2], pieces[2::2], strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, metavar="FOLDER")
    folder = parser.parse_args().report
    compiler = find_compiler()
    if compiler is None:
        raise SystemExit("no nvcc: install the CUDA toolkit, or set CUDACXX")
    target = folder or ROOT / "build" / "cuda_kernels"
    usage = read_usage("".join(compile_kernels(compiler, target).values()))
    for name, numbers in sorted(usage.items()):
        print(name, numbers)
    if folder is None:
        table = {"nvcc": read_version(compiler), "registers": list_registers(usage)}
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
