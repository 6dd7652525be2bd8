"""What nvcc makes of the kernels: no spills, as many registers as recorded, the instructions that are meant.

``python tests/cuda_kernels.py`` records.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import cuda_kernels
import pytest

# By kernel: patterns of instructions that it lives from.
INTENDED = {
    "growth::expand_rows": ("LDG.*128", "STG.*128"),
    "sharing::add_deltas<[48]>": ("LDS.128", "STS.128", "FFMA"),
    "sharing::add_deltas": ("FFMA", "LDG.*CONSTANT"),
    "repetition::multiply_tiles<repetition::Bytes": ("IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.*128"),
    "repetition::multiply_tiles<repetition::(Floats|BFloat16)": ("HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDGSTS.*128"),
    "repetition::multiply_tiles<repetition::Float16": ("HMMA.16816.F32$", "LDSM.16.M88.4", "LDGSTS.*128"),
    "repetition::multiply_.*, [12]": ("PRMT",),
    "repetition::multiply_few_rows<repetition::Bytes": ("IMMA.16832", "LDG.*(64|128)"),
    "repetition::multiply_few_rows<repetition::(Floats|BFloat16)": ("HMMA.16816.F32.BF16", "LDG"),
    "repetition::multiply_few_rows<repetition::Float16": ("HMMA.16816.F32$", "LDG"),
    "repetition::stage_chunks_of": ("STG.*128",),
    "repetition::stage_chunks_of<(signed|unsigned)": ("LDG.*128",),
    "repetition::add_factored": ("LDS", "STS", "LDG.*128"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Objects of all kernels, and what the compiler says of them."""
    compiler = cuda_kernels.find_compiler()
    if compiler is None:
        pytest.skip("no nvcc: what it makes of the kernels is checked where it is")
    folder = tmp_path_factory.mktemp("kernels")
    cuda_kernels.compile_kernels(compiler, folder)
    return folder


@pytest.fixture(scope="module")
def usage(folder: Path) -> dict[str, cuda_kernels.Usage]:
    return cuda_kernels.read_usage("".join(report.read_text() for report in folder.glob("*.txt")))


def test_no_kernel_spills(usage: dict[str, cuda_kernels.Usage]) -> None:
    assert usage and all(use.keys() == set(cuda_kernels.ARCHITECTURES) for use in usage.values())
    assert not {name: use for name, use in usage.items() for n in use.values() if n["spilled"] or n["stack"]}


def test_registers_are_those_recorded(usage: dict[str, cuda_kernels.Usage]) -> None:
    table = json.loads(cuda_kernels.TABLE.read_text())
    compiler = cuda_kernels.find_compiler()
    assert compiler is not None
    if (version := cuda_kernels.read_version(compiler)) != table["nvcc"]:
        pytest.skip(f"recorded with nvcc {table['nvcc']}, this is {version}")
    assert cuda_kernels.list_registers(usage) == table["registers"], "if that is meant: python tests/cuda_kernels.py"


@pytest.mark.parametrize("architecture", cuda_kernels.ARCHITECTURES)
def test_machine_code_is_what_is_meant(folder: Path, architecture: str) -> None:
    disassembler = cuda_kernels.find_disassembler()
    if disassembler is None:
        pytest.skip("no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    found: dict[str, set[str]] = {}
    for target in folder.glob(f"*.sm_{architecture}.cubin"):
        found |= cuda_kernels.read_instructions(disassembler, target)
    spills = re.compile("LDL|STL")
    assert not [name for name, instructions in found.items() if any(map(spills.match, instructions))]
    for kernel, patterns in INTENDED.items():
        kernels = [name for name in found if re.match(kernel, name)]
        assert kernels, kernel
        for name in kernels:
            missing = [p for p in patterns if not any(re.match(p, instruction) for instruction in found[name])]
            assert not missing, f"{name}: {missing}"
