"""The installed package: what it links, exports and carries, and a C++ project that uses it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from package_tools import REPOSITORY, Package, cuobjdump, find_package, missing

elffile = pytest.importorskip("elftools.elf.elffile", reason="run: pip install pyelftools")

ALLOWED_LIBRARIES = re.compile(
    r"(libc|libm|libpthread|libdl|librt|libgcc_s|libstdc\+\+|ld-linux[-\w]*)\.so\.\d+"
)
# An absolute path of a source, or a temporary file of nvcc, whose name holds a process id.
SOURCE_PATH = re.compile(rb"(?<![\w.])/\w{2,}/\w\S*\.(cu|cuh|cpp|h|hpp)\b|tmpxft_")
BUILD_FOLDER = re.compile(rb"/(home|root|Users)/|pip-req-build|/_skbuild")
MAX_WHEEL_BYTES = 100 * 10**6  # PyPI's limit for a file


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return find_package(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def module_elf(package: Package) -> Iterator[elffile.ELFFile]:
    with package.module.open("rb") as stream:
        yield elffile.ELFFile(stream)


def dynamic_tags(elf: elffile.ELFFile, name: str) -> list:
    return list(elf.get_section_by_name(".dynamic").iter_tags(name))


def test_needs_only_system_libraries(module_elf: elffile.ELFFile) -> None:
    needed = [tag.needed for tag in dynamic_tags(module_elf, "DT_NEEDED")]
    assert "libc.so.6" in needed
    assert [name for name in needed if not ALLOWED_LIBRARIES.fullmatch(name)] == []


def test_no_library_search_path(module_elf: elffile.ELFFile) -> None:
    assert dynamic_tags(module_elf, "DT_RPATH") + dynamic_tags(module_elf, "DT_RUNPATH") == []


def test_hardening(module_elf: elffile.ELFFile) -> None:
    segments = {segment["p_type"]: segment for segment in module_elf.iter_segments()}
    assert "PT_GNU_RELRO" in segments
    assert segments["PT_GNU_STACK"]["p_flags"] & 1 == 0, "the stack is executable"
    writable_code = [s for s in module_elf.iter_segments() if s["p_flags"] & 3 == 3]
    assert writable_code == [], "a segment is both writable and executable"
    flags = dynamic_tags(module_elf, "DT_FLAGS_1")
    assert flags and flags[0].entry.d_val & 1, "not linked with -z now"


def test_exports_the_init_function_alone(module_elf: elffile.ELFFile) -> None:
    exported = [
        symbol.name
        for symbol in module_elf.get_section_by_name(".dynsym").iter_symbols()
        if symbol.entry.st_shndx != "SHN_UNDEF" and symbol.entry.st_info.bind != "STB_LOCAL"
    ]
    assert exported == ["PyInit__C"]


@pytest.mark.parametrize("attribute", ["module", "library"])
def test_no_build_paths(package: Package, attribute: str) -> None:
    content = getattr(package, attribute).read_bytes()
    strings = re.findall(rb"[\x20-\x7e]{6,}", content)
    leaks = [text for text in strings if SOURCE_PATH.search(text) or BUILD_FOLDER.search(text)]
    assert leaks == []


def test_size(package: Package) -> None:
    files = [path for path in package.folder.rglob("*") if path.is_file()]
    # Unpacked, so an upper bound of the wheel's size.
    assert sum(path.stat().st_size for path in files) < MAX_WHEEL_BYTES


def test_architectures_are_those_it_names(package: Package) -> None:
    machine_code = {
        match.replace("sm_", "")
        for match in re.findall(r"sm_\d+[af]?", cuobjdump("--list-elf", str(package.module)))
    }
    ptx = {
        match.replace("sm_", "") + "-virtual"
        for match in re.findall(r"sm_\d+[af]?", cuobjdump("--list-ptx", str(package.module)))
    }
    claimed = package.run("import sla2.env as e; print(e.collect_env()['sla2']['archs'])")
    assert machine_code | ptx == set(claimed.split(";"))
    assert claimed == package.info["ARCHS"]


def test_licences_are_carried(package: Package) -> None:
    (metadata,) = package.site.glob("sla2-*.dist-info")
    for name in ("LICENSE", "NOTICE"):
        assert (metadata / "licenses" / name).read_text() == (REPOSITORY / name).read_text()


def test_imports_without_torch(package: Package) -> None:
    code = "import sla2.env as e; print(e.why_not())"
    assert "torch does not import" in package.run(code, without=("torch",))


def test_module_loads_without_torch_or_gpu(package: Package) -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if not package.module.name.endswith(suffix):
        pytest.skip(f"{package.module.name} is for another Python than this one ({suffix})")
    code = "import sla2._C as c; print(c.version(), c.built_archs(), c.runtime_version() // 1000)"
    version, archs, cuda = package.run(code, without=("torch",)).split()
    assert archs == package.info["ARCHS"]
    assert cuda == package.info["CUDA_VERSION"].split(".")[0]
    assert version == package.run("import sla2.env as e; print(e.__version__)")


def test_headers_are_where_the_package_says(package: Package) -> None:
    include = Path(package.run("import sla2.env as e; print(e.get_include())"))
    installed = (include / "sla2" / "sla2.h").read_text()
    assert installed == (REPOSITORY / "csrc" / "include" / "sla2" / "sla2.h").read_text()


def build_project(package: Package, source: str, folder: Path, compiler: str) -> None:
    """Builds a CMake project of this repository against the installed package."""
    _ = package.library
    for tool in ("cmake", compiler):
        if shutil.which(tool) is None:
            missing(f"{tool} is not on PATH")
    cmake_dir = package.run("import sla2.env as e; print(e.get_cmake_dir())")
    for command in (
        ["cmake", "-S", str(REPOSITORY / source), "-B", str(folder), f"-Dsla2_DIR={cmake_dir}"],
        ["cmake", "--build", str(folder)],
    ):
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_cpp_project_uses_the_package(package: Package, tmp_path: Path) -> None:
    build_project(package, "tests/cpp", tmp_path, "c++")
    command = [str(tmp_path / "consumer")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "consumer: ok" in result.stdout


@pytest.mark.slow
def test_cuda_example_uses_the_package(package: Package, tmp_path: Path) -> None:
    build_project(package, "examples/cpp", tmp_path, "nvcc")
    command = [str(tmp_path / "attention"), "--seqlen", "1000", "--heads", "2", "--topk", "0.2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode != 0:  # no usable GPU: said in one line
        assert result.stderr.startswith("attention: ") and result.stderr.count("\n") == 1
    else:
        assert "3 of 16 key blocks" in result.stdout
    result = subprocess.run([command[0], "--topk"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (1, "attention: --topk needs a value\n")
