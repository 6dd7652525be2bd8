"""The package as a whole: what is installed, what the objects contain, what the documents promise."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pycodesign

ROOT = Path(__file__).parents[1]
ISAS = ("avx2", "avx2_vnni", "avx512", "avx512_vbmi", "avx512_amx")

x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the ISA files exist on x86-64 only")


def run(*command, **options):
    if shutil.which(command[0]) is None:
        pytest.fail(f"{command[0]} is missing: it comes with the compiler, as part of binutils")
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def objects():
    """Object files of the newest build in this checkout, by ISA; those of every other file under "baseline"."""
    builds = sorted((ROOT / "build").glob("cp*/libpycodesign_kernels.a"), key=lambda path: path.stat().st_mtime)
    if not builds:
        pytest.fail("no object files under build/: `pip install .` in this checkout leaves them there")
    by_isa = {}
    for path in builds[-1].parent.rglob("*.cpp.o"):
        name = path.name.removesuffix(".cpp.o")
        by_isa.setdefault(name if name in ISAS else "baseline", []).append(path)
    return by_isa


def find_instructions_above_baseline(path):
    """Disassemble an object, and let the assembler say what plain x86-64 does not have."""
    listing = run("objdump", "-d", "--no-show-raw-insn", path, check=True).stdout
    code = {re.sub(r"[<#].*", "", line.split("\t")[1]).strip() for line in listing.splitlines() if "\t" in line}
    code = sorted(code)
    # Older processors run tzcnt as bsf and endbr64 as nothing; compilers emit both for plain x86-64.
    allowed = {"tzcnt", "endbr64"}
    if path.name == "cpu.cpp.o":
        allowed.add("xgetbv")  # behind a check of CPUID's OSXSAVE
    errors = run("as", "-march=generic64", "-o", "/dev/null", "-", input="\n".join(code) + "\n").stderr
    lines = re.findall(r":(\d+): Error: .* is not supported on", errors)
    return [code[int(line) - 1] for line in lines if code[int(line) - 1].split()[0] not in allowed]


@x86_64
def test_baseline_objects_run_on_every_x86_64(objects):
    found = {path.name: find_instructions_above_baseline(path) for path in objects["baseline"]}
    assert not {name: instructions[:5] for name, instructions in found.items() if instructions}
    assert {"cpu.cpp.o", "scalar.cpp.o", "module.cpp.o", "factor.cpp.o"} <= found.keys()


@x86_64
@pytest.mark.parametrize("isa", ["avx2", "avx2_vnni", "avx512", "avx512_vbmi"])
def test_isa_objects_use_their_isa(objects, isa):
    assert all(find_instructions_above_baseline(path) for path in objects[isa])


@x86_64
@pytest.mark.parametrize("isa", ISAS)
def test_isa_objects_share_nothing_but_their_fill_function(objects, isa):
    # A weak symbol is one that the linker keeps once: it might keep this file's copy for everyone.
    for path in objects.get(isa, []):
        symbols = run("nm", "--demangle", "--defined-only", "--extern-only", path, check=True).stdout.splitlines()
        names = [re.fullmatch(r"[0-9a-f]+ T pycodesign::\w+::(\w+)\(.*\)", symbol) for symbol in symbols]
        assert [name and name[1] for name in names] == [f"fill_{isa}"], f"{path}: {symbols}"
        sections = run("objdump", "--section-headers", path, check=True).stdout
        assert ".init_array" not in sections, f"{path} runs code when the module is loaded"


def test_one_version():
    version = importlib.metadata.version("pycodesign")
    assert pycodesign.__version__ == version
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_installed_files():
    package = importlib.metadata.distribution("pycodesign")
    if json.loads(package.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"):
        pytest.skip("an editable install leaves the files in the checkout")
    files = {str(path) for path in package.files}
    needed = {"py.typed", "_core.pyi", "data/mnist_ternary.safetensors", "data/mnist_binary.safetensors"}
    assert {f"pycodesign/{name}" for name in needed} <= files
    assert any(name.endswith("licenses/LICENSE") for name in files)
    assert not [name for name in files if name.endswith((".pyx", ".cpp", ".h", ".cu", ".a", ".o"))]
    assert {name.split("/")[0] for name in files if not name.startswith("..")} == {
        "pycodesign",
        f"pycodesign-{package.version}.dist-info",
    }


def test_stubs_match_the_modules(tmp_path):
    names = [name for name in ("_core", "_cuda") if importlib.util.find_spec(f"pycodesign.{name}")]
    stubs = tmp_path / "stubs" / "pycodesign"  # alone: what the package imports, torch too, takes a minute to check
    stubs.mkdir(parents=True)
    (stubs / "__init__.pyi").touch()
    for name in names:
        shutil.copy(Path(pycodesign.__file__).parent / f"{name}.pyi", stubs)
    modules = [f"pycodesign.{name}" for name in names]
    environment = {**os.environ, "MYPYPATH": str(stubs.parent)}
    stubtest = run(sys.executable, "-m", "mypy.stubtest", *modules, cwd=tmp_path, env=environment)
    assert stubtest.returncode == 0, stubtest.stdout + stubtest.stderr


def test_sources_without_the_compiled_module_say_how_to_build_it(tmp_path):
    shutil.copytree(ROOT / "pycodesign", tmp_path / "pycodesign")
    python = run(sys.executable, "-S", "-c", "import pycodesign", cwd=tmp_path)  # -S: nothing that is installed
    assert "`pip install .`" in python.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("source", "state"),
    [("raise ImportError('libcudart.so.12: no such file')", "libcudart.so.12"), (None, "not built")],
)
def test_a_cuda_module_that_cannot_be_loaded_is_no_missing_one(source, state, tmp_path, monkeypatch):
    if source:
        (tmp_path / "_cuda.py").write_text(source)
    monkeypatch.setattr(pycodesign, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "pycodesign._cuda", raising=False)
    monkeypatch.delattr(pycodesign, "_cuda", raising=False)
    text = pycodesign.show_config()["cuda"]
    assert state in text and ("not built" in text) == (source is None)


def test_every_command_of_contributing_runs_in_ci():
    ci = (ROOT / ".ci/run").read_text()
    commands = re.findall(r"^\|.*\| `(.*)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(commands) >= 10
    assert not [command for command in commands if command not in ci]


PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]


def test_readme_commands():
    readme = (ROOT / "README.md").read_text()
    assert 'pip install ".[demo]" && pycodesign demo' in readme
    assert 'pip install ".[test]" && pytest' in readme
    assert 'pip install ".[test]" && pytest' in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_links_of_pages(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!http)([^)#]+)", path.read_text())
    assert links
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    several = {"README.md": 8, "docs/branches.md": 2, "docs/gpu.md": 0, "docs/sharing.md": 2, "docs/torch.md": 3}
    assert len(blocks) == several.get(page, 1)
    exec("\n".join(blocks), {})
