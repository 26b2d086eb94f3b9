"""`show1-rt doctor` on machines of every kind, as their packages and drivers would describe them."""

from types import ModuleType, SimpleNamespace

import pytest

from engines import tensorrt
from engines.errors import Show1Error
from engines.gpu import Gpu, find_gpus
from runtime import doctor
from runtime.cli import main

ADA = Gpu("GeForce RTX 4090", (8, 9), 24 * 2**30, (13, 1))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> object:
    """`machine(gpus, packages, providers)`: what doctor will find."""

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
        monkeypatch.setattr(doctor, "_torch", lambda: (packages["torch"], target, None))
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


def test_tensorrt_rtx_builds_without_a_gpu_and_does_not_run(machine) -> None:
    found = machine([], {"onnxruntime": "1.31", "tensorrt-rtx": "1.7", "polygraphy": "1", **EXPORT})
    assert any(built.startswith("tensorrt-rtx") and "sm89" in built for built in found.builds)
    assert found.runs == ["onnxruntime (CPU)", "inductor (CPU)"]


def test_a_card_with_everything_runs_tensorrt_rtx(machine) -> None:
    packages = {"onnxruntime-gpu": "1.31", "tensorrt-rtx": "1.7", "polygraphy": "1", **EXPORT}
    found = machine([ADA], packages, ("CUDA", "CPU"))
    assert found.runs == ["onnxruntime (CUDA)", "tensorrt-rtx", "inductor (CUDA)"]
    assert found.builds[-1] == "inductor (fp32, fp16, bf16) for sm89"
    assert "RTX 4090, sm89, 24 GiB" in found.found["GPU 0"]
    assert not found.problems and not found.hints


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
    del packages["polygraphy"]
    assert any("polygraphy" in line for line in machine([ADA], packages).problems)


def test_a_torch_that_cannot_see_the_card_is_told(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_cuda() -> tuple[str, str, None]:
        return "2.13.0", "cpu-x86-64-v3", None

    machine([ADA], {"onnxruntime-gpu": "1.31", **EXPORT}, ("CUDA", "CPU"))
    monkeypatch.setattr(doctor, "_torch", without_cuda)
    found = doctor.diagnose()
    assert "inductor (CPU)" in found.runs and any("torch here leaves the GPU idle" in hint for hint in found.hints)


def test_inductor_without_its_kernels_is_not_said_to_run(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine([], {"onnxruntime": "1.31", **EXPORT})
    monkeypatch.setattr(doctor, "_torch", lambda: ("2.13.0", "cpu-x86-64-v3", "build/kernels holds no library"))
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
