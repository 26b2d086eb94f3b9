"""Who may import whom, and that the runtime starts without the libraries that only the exporter needs."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# What only the exporter may need: the runtime works where they are not installed.
EXPORT_ONLY = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "sentencepiece")

# package -> the packages of this repository that it may import, itself included
ARROWS = {
    "engines": {"engines"},
    "runtime": {"engines", "runtime"},
    "export": {"engines", "runtime", "export"},
    "bench": {"engines", "runtime", "export", "bench"},
}

# Compilers lie beside the catalog whose graphs they compile, and are imported by the exporter alone.
COMPILERS = ("engines.compile_", "engines.passes", "engines.quantize")

# The one module of the runtime that may import torch: it is imported when an engine of inductor is asked for.
ON_TORCH = "runtime.runner_inductor"

BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXPORT_ONLY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Block())
"""


def in_fresh_interpreter(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """("runtime.stages.base", its file) of all modules in a package's folder."""
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it, by its full name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_engines_and_runtime_import_without_what_only_the_exporter_needs() -> None:
    names = [name for package in ("engines", "runtime") for name, _ in modules(package)]
    names = [name for name in names if not name.startswith((*COMPILERS, ON_TORCH))]
    assert {"engines.store", "runtime.pipeline", "runtime.runner_ort", "runtime.stages.sr2"} <= set(names)
    in_fresh_interpreter(BLOCK + "".join(f"import {name}\n" for name in names))


@pytest.mark.parametrize("module", ["runtime.pipeline", "runtime.cli"])
def test_importing_the_runtime_loads_no_exporter_library(module: str) -> None:
    # Here they are installed and could be loaded unnoticed.
    loaded = json.loads(in_fresh_interpreter(f"import json, sys, {module}\nprint(json.dumps(sorted(sys.modules)))"))
    assert module in loaded
    assert {name.partition(".")[0] for name in loaded} & set(EXPORT_ONLY) == set()


def test_a_typing_error_is_answered_before_anything_large_is_loaded() -> None:
    loaded = json.loads(in_fresh_interpreter("import json, sys, runtime.cli\nprint(json.dumps([*sys.modules]))"))
    assert {"av", "onnxruntime", "tokenizers", "tqdm"} & set(loaded) == set()


@pytest.mark.parametrize("package", ARROWS)
def test_packages_import_only_what_lies_below_them(package: str) -> None:
    forbidden = set(ARROWS) - ARROWS[package]
    wrong = [
        f"{module} imports {name}"
        for module, path in modules(package)
        for name in imports(path)
        if name.partition(".")[0] in forbidden
    ]
    assert not wrong


@pytest.mark.parametrize("package", ARROWS)
def test_no_modules_of_a_package_import_each_other_in_a_circle(package: str) -> None:
    names = {name for name, _ in modules(package)} - {package}
    circles = TopologicalSorter({name: imports(path) & names for name, path in modules(package) if name in names})
    circles.prepare()  # raises CycleError, with the circle


@pytest.mark.parametrize("package", ["engines", "runtime"])
def test_engines_and_runtime_never_name_an_exporter_library(package: str) -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in modules(package)
        for name in imports(path)
        if name.partition(".")[0] in EXPORT_ONLY and not module.startswith(COMPILERS)
    ]
    assert all(line in (f"{ON_TORCH} imports torch", f"{ON_TORCH} imports torch.Tensor") for line in wrong)


def test_videos_are_judged_without_what_training_needs() -> None:
    in_fresh_interpreter(BLOCK + "import export.demo.captions, export.demo.judge, export.demo.faithfulness")


def test_without_torch_an_engine_of_inductor_says_what_to_install() -> None:
    code = "from pathlib import Path\nfrom runtime.engine import open_runner\n"
    code += "open_runner('inductor', Path('x.pt2'), 'fp32')\n"
    plain = {**os.environ, "PYTHON_COLORS": "0"}
    process = subprocess.run([sys.executable, "-c", BLOCK + code], cwd=ROOT, capture_output=True, text=True, env=plain)
    assert "EngineError: torch is not usable (No module" in process.stderr
    assert "pip install -e '.[inductor]'" in process.stderr


def test_a_bundle_is_verified_without_torch() -> None:
    in_fresh_interpreter(BLOCK.replace(repr(EXPORT_ONLY), repr(("torch",))) + "import export.verify\n")


def test_without_the_exporter_s_libraries_a_build_says_what_to_install() -> None:
    code = "from export.__main__ import main\nsys.exit(main(['build', '--checkpoint', 'demo']))"
    process = subprocess.run([sys.executable, "-c", BLOCK + code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.startswith("error: No module named")
    assert process.stderr.endswith("pip install -e '.[export]'`.\n")


def test_the_runtime_imports_no_compiler() -> None:
    wrong = [f"{module} imports {name}" for module, path in modules("runtime") for name in imports(path)]
    assert not [line for line in wrong if any(name in line for name in COMPILERS)]


def test_the_scan_of_imports_sees_all_forms(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import a.b, c as d\nfrom e import f\ndef g():\n    from h.i import j\n    import torch\n")
    assert imports(path) == {"a.b", "c", "e", "e.f", "h.i", "h.i.j", "torch"}
