"""`show1-rt doctor` on machines of every kind, as their packages and drivers would describe them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from engines import gpu, tensorrt
from engines.errors import EngineError, Show1Error, install
from engines.gpu import Gpu, find_gpus
from export.kernels import build_library, native, prepare_inductor
from runtime import doctor, kernels
from runtime.cli import main

ADA = Gpu("GeForce RTX 4090", (8, 9), 24 * 2**30, (13, 1))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> object:
    """`machine(gpus, packages, providers)`: what doctor will find."""
    monkeypatch.setattr(doctor, "why_not_half", lambda: None)

    def describe(gpus: list[Gpu], packages: dict[str, str], providers: tuple[str, ...] = ("CPU",)) -> doctor.Diagnosis:
        ort = SimpleNamespace(
            __version__="1.31", get_available_providers=lambda: [f"{name}ExecutionProvider" for name in providers]
        )

        def import_module(name: str) -> object:
            if not any(package.startswith("onnxruntime") for package in packages):
                raise ImportError(f"No module named {name!r}")
            return ort

        monkeypatch.setattr(doctor, "find_gpus", lambda: gpus)
        monkeypatch.setattr(doctor, "installed_version", packages.get)
        monkeypatch.setattr(tensorrt, "installed_version", packages.get)
        monkeypatch.setattr(doctor, "_no_cuda_runtime", lambda: None)
        monkeypatch.setattr(doctor, "load", lambda flavour: ModuleType(flavour))
        monkeypatch.setattr(doctor, "find_spec", lambda name: name in packages or None)
        monkeypatch.setattr(doctor.importlib, "import_module", import_module)
        target = gpus[0].target if gpus else "cpu-x86-64-v3"
        monkeypatch.setattr(doctor, "_torch", lambda gpus: (packages["torch"], target, None, None))
        monkeypatch.setattr(doctor, "missing_programs", lambda library: [])
        return doctor.diagnose()

    return describe


EXPORT = dict.fromkeys(doctor._EXPORT, "1")


def test_this_machine_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "can run:" in out and "onnxruntime" in out
    assert ("none that an NVIDIA driver shows" in out) == (not find_gpus())


def test_a_cpu_machine_runs_and_builds_with_onnx_runtime(machine) -> None:
    found = machine([], {"onnxruntime": "1.31", **EXPORT})
    assert found.runs == ["onnxruntime (CPU)", "inductor (CPU)"]
    assert found.builds == ["onnxruntime (fp32, fp16, int8)", "inductor (fp32, fp16, bf16) for cpu-x86-64-v3"]
    assert not found.problems and not found.hints


def test_what_a_build_refuses_is_not_promised(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "why_not_half", lambda: "it is inexact here")
    assert machine([], {"onnxruntime": "1.31", **EXPORT}).builds[0] == "onnxruntime (fp32, int8)"


def test_tensorrt_rtx_builds_without_a_gpu_and_does_not_run(machine) -> None:
    found = machine([], {"onnxruntime": "1.31", "tensorrt-rtx": "1.7", "polygraphy": "1", **EXPORT})
    assert any(built.startswith("tensorrt-rtx") and "sm89" in built for built in found.builds)
    assert found.runs == ["onnxruntime (CPU)", "inductor (CPU)"]
    proper = machine([], {"onnxruntime": "1.31", "tensorrt": "11.0", "polygraphy": "1", **EXPORT})
    assert not any(built.startswith("tensorrt") for built in proper.builds), "which builds on its card"


def test_a_card_with_everything_runs_tensorrt_rtx(machine) -> None:
    packages = {"onnxruntime-gpu": "1.31", "tensorrt-rtx": "1.7", "polygraphy": "1", **EXPORT}
    found = machine([ADA], packages, ("CUDA", "CPU"))
    assert found.runs == ["onnxruntime (CUDA)", "tensorrt-rtx", "inductor (CUDA)"]
    assert found.builds[0] == "onnxruntime (fp32, fp16)", "which has no int8 for CUDA"
    assert found.builds[-1] == "inductor (fp32, fp16, bf16) for sm89"
    assert "RTX 4090, sm89, 24 GiB" in found.found["GPU 0"]
    assert not found.problems and not found.hints


def test_a_card_without_kernels_in_onnx_runtimes_wheel_is_not_promised_any(machine) -> None:
    blackwell = Gpu("NVIDIA B200", (10, 0), 180 * 2**30, (13, 0))
    found = machine([blackwell], {"onnxruntime-gpu": "1.31", **EXPORT}, ("CUDA", "CPU"))
    assert "onnxruntime (CUDA)" not in found.runs
    assert any("no kernels for NVIDIA B200 (sm100): build with --engine inductor" in line for line in found.problems)
    assert [built.split()[0] for built in found.builds] == ["inductor"]
    (hint,) = machine([blackwell], {"onnxruntime": "1.31", **EXPORT}).hints
    assert hint == "onnxruntime-gpu has no kernels for NVIDIA B200 (sm100): build with --engine inductor."
    pascal = machine([Gpu("GTX 1080", (6, 1), 2**33, (13, 0))], {"onnxruntime-gpu": "1.31", **EXPORT}, ("CUDA", "CPU"))
    assert any("no kernels for GTX 1080 (sm61). Or run on the CPU" in line for line in pascal.problems)


def test_tensorrt_without_what_it_runs_by_is_not_said_to_run(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(flavour: str) -> None:
        raise EngineError(f"{flavour} is not usable.")

    machine([ADA], {"onnxruntime-gpu": "1.31", "tensorrt-rtx": "1.7", "polygraphy": "1", **EXPORT}, ("CUDA", "CPU"))
    monkeypatch.setattr(doctor, "_no_cuda_runtime", lambda: "libcudart is not found")
    found = doctor.diagnose()
    assert "tensorrt-rtx" not in found.runs and found.hints == ["libcudart is not found."]
    monkeypatch.setattr(doctor, "load", broken)
    found = doctor.diagnose()
    assert found.problems == ["tensorrt-rtx is not usable."]
    assert not any("tensorrt" in name for name in found.runs + found.builds)


def test_onnx_runtime_for_gpus_runs_on_the_cpu_where_there_is_no_card(machine) -> None:
    assert machine([], {"onnxruntime-gpu": "1.31"}, ("CUDA", "CPU")).runs == ["onnxruntime (CPU)"]


def test_tensorrt_rtx_is_not_recommended_for_a_card_that_it_does_not_serve(machine) -> None:
    hopper = Gpu("H200", (9, 0), 2**37, (13, 0))
    assert not machine([hopper], {"onnxruntime-gpu": "1.31", **EXPORT}, ("CUDA", "CPU")).hints


def test_cards_are_described_as_their_driver_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def tells(**answers: int) -> SimpleNamespace:
        def answer(value: Any) -> Callable[..., int]:
            return lambda place, *_: setattr(getattr(place, "_obj", place), "value", value) or 0

        return SimpleNamespace(
            cuInit=lambda _: answers.get("init", 0),
            cuDeviceGetCount=answer(2),
            cuDriverGetVersion=answer(12040),
            cuDeviceGet=lambda _, index: answers.get("first", 0) if index == 0 else 0,
            cuDeviceGetName=answer(b"GeForce RTX 4090"),
            cuDeviceTotalMem_v2=answer(24 * 2**30),
            cuDeviceGetAttribute=lambda place, attribute, _: answer({75: 8, 76: 9}[attribute])(place),
            cuDeviceGetPCIBusId=answer(b"0000:01:00.0"),
        )

    card = Gpu("GeForce RTX 4090", (8, 9), 24 * 2**30, (12, 4), b"0000:01:00.0")
    for driver, cards in ((tells(), [card, card]), (tells(first=46), [card]), (tells(init=100), [])):
        monkeypatch.setattr(gpu.ctypes, "CDLL", lambda _, driver=driver: driver)
        assert find_gpus() == cards


@pytest.mark.parametrize(("driver", "runs"), [((13, 0), True), ((12, 9), False), ((14, 0), True)], ids=str)
def test_a_driver_runs_every_minor_version_of_cuda_that_it_has_the_major_one_of(
    driver: tuple[int, int], runs: bool
) -> None:
    told = gpu.old_driver(Gpu("GeForce RTX 4090", (8, 9), 24 * 2**30, driver), "torch", (13, 2))
    assert told is None if runs else "the driver is for CUDA 12.9, torch needs 13.2: install" in str(told)


def test_both_onnx_runtimes_are_a_conflict(machine, capsys: pytest.CaptureFixture[str]) -> None:
    found = machine([], {"onnxruntime": "1.31", "onnxruntime-gpu": "1.30"})
    with pytest.raises(Show1Error, match="needs mending"):
        doctor.report(found)
    error = capsys.readouterr().err
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in error and ".[cpu]" in error


@pytest.mark.parametrize(
    ("gpus", "packages", "hint"),
    [
        ([ADA], {"onnxruntime": "1.31"}, "leaves the GPU idle"),
        ([ADA], {"onnxruntime": "1.31"}, "pip install -e '.[tensorrt-rtx]'"),
        (
            [Gpu("H200", (9, 0), 2**37, (13, 0))],
            {"onnxruntime": "1.31", "tensorrt-rtx": "1.7", "polygraphy": "1"},
            "sm90",
        ),
        ([], {"onnxruntime": "1.31"}, "building needs torch"),
        ([], {}, "pip install -e '.[cpu]'"),
    ],
)
def test_what_is_missing_comes_with_the_command_that_mends_it(machine, gpus, packages, hint) -> None:
    assert any(hint in line for line in machine(gpus, packages).hints)


def test_an_old_driver_and_a_missing_polygraphy_are_problems(machine) -> None:
    old = Gpu("GeForce RTX 3090", (8, 6), 24 * 2**30, (12, 4))
    packages = {"onnxruntime": "1.31", "tensorrt-rtx": "1.7", "polygraphy": "1"}
    assert any("install a newer NVIDIA driver" in line for line in machine([old], packages).hints)
    cuda = machine([old], {"onnxruntime-gpu": "1.31"}, ("CUDA", "CPU"))
    assert any("onnxruntime-gpu needs 13.0" in line for line in cuda.problems) and "onnxruntime (CUDA)" not in cuda.runs
    del packages["polygraphy"]
    assert any("polygraphy" in line for line in machine([ADA], packages).problems)


def test_a_torch_that_cannot_see_the_card_is_told(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine([ADA], {"onnxruntime-gpu": "1.31", **EXPORT}, ("CUDA", "CPU"))
    monkeypatch.setattr(doctor, "_torch", lambda gpus: ("2.13.0", "cpu-x86-64-v3", None, f"{gpus[0].name} is idle"))
    found = doctor.diagnose()
    assert "inductor (CPU)" in found.runs and "GeForce RTX 4090 is idle." in found.hints


def test_turing_is_not_offered_bf16_by_what_builds_for_this_card(machine) -> None:
    turing = Gpu("GeForce RTX 2080 Ti", (7, 5), 11 * 2**30, (13, 0))
    packages = {"onnxruntime-gpu": "1.31", "tensorrt": "11.0", "polygraphy": "1", **EXPORT}
    found = machine([turing], packages, ("CUDA", "CPU"))
    assert found.builds[1:] == ["tensorrt (fp16, fp32, int8)", "inductor (fp32, fp16) for sm75"]


def test_inductor_without_its_kernels_is_not_said_to_run(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine([], {"onnxruntime": "1.31", **EXPORT})
    monkeypatch.setattr(
        doctor, "_torch", lambda gpus: ("2.13.0", "cpu-x86-64-v3", "build/kernels holds no library", None)
    )
    found = doctor.diagnose()
    assert found.runs == ["onnxruntime (CPU)"] and any("build/kernels holds no library" in hint for hint in found.hints)


def test_what_compiles_kernels_is_asked_for(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine([], {"onnxruntime": "1.31", **EXPORT})
    monkeypatch.setattr(doctor, "missing_programs", lambda library: ["CMake (`pip install cmake`)", "a C++ compiler"])
    found = doctor.diagnose()
    assert found.builds == ["onnxruntime (fp32, fp16, int8)"]
    assert found.hints == ["building inductor's engines needs CMake (`pip install cmake`) and a C++ compiler."]


def test_nothing_that_runs_is_an_error(machine) -> None:
    with pytest.raises(Show1Error, match="no engine can run here"):
        doctor.report(machine([], {}))


def test_the_cuda_runtime_of_nvidias_wheel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA 13's wheels have it in a folder where Polygraphy does not look."""
    seen: list[str] = []

    def wrapper() -> None:
        seen.append(os.environ["LD_LIBRARY_PATH"])
        if len(seen) > 1:
            raise OSError("no libcudart")

    wheels = SimpleNamespace(submodule_search_locations=["/site/nvidia"])
    monkeypatch.setattr(gpu, "find_spec", {"nvidia": wheels}.get)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(sys.modules, "polygraphy.cuda", cast(Any, SimpleNamespace(wrapper=wrapper)))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    tensorrt.load_cuda_runtime()
    assert "LD_LIBRARY_PATH" not in os.environ
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    with pytest.raises(EngineError, match=r"not found \(no libcudart\): `pip install 'nvidia-cuda-runtime>=13,<14'`"):
        tensorrt.load_cuda_runtime()
    assert seen == ["/site/nvidia/cu13/lib", os.pathsep.join(["/mine", "/site/nvidia/cu13/lib"])]
    assert os.environ["LD_LIBRARY_PATH"] == "/mine"


def test_a_wheel_has_no_sources_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BUILD", tmp_path / "build" / "kernels")
    assert any("clone the repository" in line for line in kernels.missing_programs(kernels.REFERENCE))


@pytest.mark.skipif(sys.platform == "win32", reason="the programs of this test are shell scripts")
def test_programs_that_pip_installed_go_before_those_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("environment", "system"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "cmake").write_text("#!/bin/sh\n")
        (tmp_path / folder / "cmake").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    assert kernels.find_program("cmake") != str(tmp_path / "environment" / "cmake")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "environment" / "python"))
    assert kernels.find_program("cmake") == str(tmp_path / "environment" / "cmake")


@pytest.fixture
def toolkits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], str]]:
    """`toolkits(variable, major)`: a toolkit that a variable names; there are no others."""

    def install(variable: str, major: int) -> str:
        nvcc = tmp_path / variable / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {major}.0, V{major}.0.88'\n")
        nvcc.chmod(0o755)
        monkeypatch.setenv(variable, str(nvcc.parents[1]))
        kernels.find_nvcc.cache_clear()
        return nvcc.as_posix()

    monkeypatch.setattr(kernels, "_TOOLKIT", str(tmp_path))
    monkeypatch.setattr(kernels, "wheel_folders", lambda _: [])
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    kernels.find_nvcc.cache_clear()
    yield install
    kernels.find_nvcc.cache_clear()


@pytest.mark.skipif(sys.platform == "win32", reason="the compilers of this test are shell scripts")
def test_nvcc_is_found_where_toolkits_are_and_the_newest_taken(toolkits: Callable[[str, int], str]) -> None:
    assert kernels.find_nvcc() is None
    assert [line for line in kernels.missing_programs(kernels.CUDA) if line.startswith("nvcc 13 (of the CUDA toolkit")]
    old = toolkits("CUDA_PATH", 12)
    assert [line for line in kernels.missing_programs(kernels.CUDA) if line.endswith(f"; {old} is of 12)")]
    new = toolkits("CUDA_HOME", 13)
    assert kernels.find_nvcc() == (new, 13)
    assert not [line for line in kernels.missing_programs(kernels.CUDA) if "nvcc" in line]


@pytest.mark.skipif(sys.platform == "win32", reason="the compilers of this test are shell scripts")
def test_torch_is_shown_the_toolkit_that_nvcc_is_of(
    toolkits: Callable[[str, int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it is one: the folder of a link on PATH, which torch would take, is none."""
    home = Path(toolkits("CUDA_PATH", 13)).parents[1]
    (tmp_path / "nvcc").symlink_to(home / "bin" / "nvcc")  # on PATH
    kernels.find_nvcc.cache_clear()
    monkeypatch.setattr("export.kernels._WSL", str(tmp_path))
    monkeypatch.setattr("export.kernels.missing_headers", lambda _: [])
    monkeypatch.setenv("SHOW1_KERNELS", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", "")  # so that what is set below does not outlive this test
    monkeypatch.delenv("CUDA_HOME")
    for made in (None, home / "include" / "cuda_runtime.h"):
        monkeypatch.setenv("LIBRARY_PATH", "/opt/lib")
        if made:
            made.parent.mkdir()
            made.touch()
        with pytest.raises(EngineError, match="holds no show1_kernels"):
            prepare_inductor("cuda")
        assert os.environ.get("CUDA_HOME") == (str(home) if made else None)
        assert os.environ["LIBRARY_PATH"] == f"{tmp_path}{os.pathsep}/opt/lib"


@pytest.mark.skipif(kernels.find_program("cmake") is None, reason="no cmake")
def test_a_compiler_that_cmake_cannot_use_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CMake alone would remember that there is none."""
    broken, folder, seen = tmp_path / "nvcc", tmp_path / "build" / "kernels", []
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr("export.kernels.find_nvcc", lambda: (str(broken), 13))
    monkeypatch.setattr("export.kernels.missing_programs", lambda _: [])
    run = subprocess.run

    def configure(*arguments: Any, **options: Any) -> Any:
        seen.append((folder / "CMakeCache.txt").exists())
        return run(*arguments, **options)

    monkeypatch.setattr("export.kernels.subprocess.run", configure)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"could not compile with .*nvcc\. .*CMakeConfigureLog\.yaml says why"):
            build_library(kernels.CUDA, folder)
    assert seen == [False, False]


def test_kernels_are_built_for_the_cards_that_nvcc_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    pascal = Gpu("GeForce GTX 1060", (6, 1), 6 * 2**30, (13, 0))
    monkeypatch.setattr("export.kernels.find_gpus", lambda: [pascal, ADA])
    assert native() == "89"


@pytest.mark.skipif(sys.platform == "win32", reason="the compilers of this test are shell scripts")
def test_an_nvcc_that_does_not_start_is_passed_over(toolkits: Callable[[str, int], str]) -> None:
    Path(toolkits("CUDA_HOME", 13)).write_bytes(b"\x7fELF of another machine")
    assert kernels.find_nvcc() is None


def test_pythons_headers_are_asked_for_where_triton_compiles(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.sysconfig, "get_path", lambda _: "/nowhere")
    packages = {"onnxruntime-gpu": "1.31", **EXPORT}
    found = machine([ADA], packages, ("CUDA", "CPU"))
    assert any("apt install python3-dev" in hint for hint in found.hints)
    assert not any("headers" in hint for hint in machine([], packages).hints)
    with pytest.raises(EngineError, match=r"inductor cannot compile for cuda here\. Install Python's headers"):
        prepare_inductor("cuda")


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "`pip install -e '.[cpu]'`"),
        ({"url": Path("/o'b/x").as_uri(), "dir_info": {"editable": True}}, "`pip install -e '/o'\"'\"'b/x[cpu]'`"),
        ({"url": Path("/src/show1-rt").as_uri(), "dir_info": {"editable": True}}, "`pip install -e '{}[cpu]'`"),
        (
            {"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "a1b2"}},
            "`pip install 'show1-rt[cpu] @ git+https://host/x.git@a1b2'`",
        ),
        ({"url": "file:///x.whl", "archive_info": {}}, "`pip install 'show1-rt[cpu] @ file:///x.whl'`"),
    ],
)
def test_extras_are_added_to_what_was_installed(
    monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None, command: str
) -> None:
    text = None if origin is None else json.dumps(origin)
    monkeypatch.setattr("engines.errors.distribution", lambda _: SimpleNamespace(read_text=lambda _: text))
    assert install("cpu") == command.format(Path("/src/show1-rt"))
