"""What is shipped: the wheel's contents and that it runs from an environment of its own; the build files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CONTENTS = (
    "memc/py.typed",
    "memc/cli/__init__.py",
    "memc/dialect/__init__.py",
    "memc/passes/window.py",
    "memc/passes/linearize/__init__.py",
    "memc/passes/prune/__init__.py",
    "memc/backends/eager/__init__.py",
    "memc/backends/onnx/__init__.py",
    "memc/backends/tvm/__init__.py",
    "memc/kernels/__init__.py",
    "memc/recipes/long-context.yaml",
    "memc/recipes/streaming.yaml",
    "memc/recipes/dense.yaml",
    "memc/recipes/prune-then-remember.yaml",
    "memc/targets/cpu.toml",
    "memc/kernels/tiles.toml",
    "memc/targets/nvidia-sm90.toml",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tree, so that nothing stays behind in it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("memc", "passes", "backends", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    readme = ROOT / "README.md"
    (source / "README.md").write_text(readme.read_text() if readme.is_file() else "memc\n")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("memc-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into a new environment that sees the libraries of this one, but not this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (library,) = (folder / "lib").glob("python*/site-packages")
    target = ["install", "-q", "--no-deps", "--target", str(library), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *target], check=True, capture_output=True)
    here = Path(pytest.__file__).parents[1]
    # A plain path line: its own .pth files, such as that of an editable install, are not run.
    (library / "libraries.pth").write_text(f"{here}\n")
    return folder


def run(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from memc.cli import main; sys.exit(main())"
    python = installed / "bin" / "python"
    return subprocess.run([python, "-c", code, *words], capture_output=True, text=True, cwd=installed)


def test_wheel_holds_every_room(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(CONTENTS) <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    strays = {name.split("/")[0] for name in names} - {"memc"}
    assert {name for name in strays if not name.endswith(".dist-info")} == set()


def test_wheel_runs_from_an_environment_of_its_own(installed: Path) -> None:
    where = "import memc, memc.passes.window; print(memc.__file__, memc.passes.window.__file__)"
    python = installed / "bin" / "python"
    shown = subprocess.run([python, "-c", where], capture_output=True, text=True, cwd=installed, check=True).stdout
    assert all(path.startswith(str(installed)) for path in shown.split())
    help_text = run(installed, "--help")
    assert help_text.returncode == 0
    assert "convert" in help_text.stdout
    recipes = run(installed, "recipes")
    assert "long-context" in recipes.stdout, recipes.stderr
    passes = run(installed, "passes", "window")
    assert "sinks" in passes.stdout, passes.stderr
    targets = run(installed, "targets", "cpu", "--json")
    assert '"available": true' in targets.stdout, targets.stderr


def test_one_conversion_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny_model.py").write_text(FACTORY)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from memc.cli import main; sys.exit(main())"
    model, out = "python:tiny_model:make", tmp_path / "out"
    words = ["convert", model, "-o", str(out), "--pass", "window:window=8,sinks=2", "--backend", "eager"]
    python = installed / "bin" / "python"
    done = subprocess.run([python, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    assert (out / "memc.json").is_file()


FACTORY = """
import torch, transformers

def make():
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=10)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
"""


def test_constraints_are_exact_and_cover_the_requirements() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert pins["torch"] == "2.13.0"
    assert all(re.fullmatch(r"[0-9][\w.]*", version) for version in pins.values())
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    normal = {name.lower().replace("_", "-") for name in pins}
    missing = {re.split(r"[<>=!\[ ]", line)[0].lower() for line in wanted} - normal
    assert missing == set()


def test_build_files_do_what_is_promised() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for goal in ("venv", "test", "check", "conformance", "demo"):
        assert re.search(rf"^{goal}:", makefile, re.M), goal
    assert "torch==2.13.0" in makefile
    assert "OMP_WAIT_POLICY := PASSIVE" in makefile
    assert "GOMP_SPINCOUNT := 0" in makefile
    ci = ROOT / ".ci" / "run"
    assert ci.stat().st_mode & 0o111
    assert "make check test conformance" in ci.read_text()


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command as c; c()"
    return subprocess.run([sys.executable, "-c", code, "--no-cache"], capture_output=True, text=True, cwd=folder)


def test_import_arrows_hold_and_a_planted_fault_is_found(tmp_path: Path) -> None:
    for name in ("memc", "passes", "backends", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    kept = lint_imports(tmp_path)
    assert kept.returncode == 0, kept.stdout
    faults = {
        "memc/blocks.py": "import memc.passes.window",
        "passes/window.py": "import memc.kernels.norm",
        "kernels/norm/__init__.py": "import memc.program",
        "memc/another_room.py": "",
    }
    for path, line in faults.items():
        before = (tmp_path / path).read_text() if (tmp_path / path).is_file() else ""
        (tmp_path / path).write_text(f"{before}\n{line}\n")
        broken = lint_imports(tmp_path)
        assert broken.returncode != 0, path
        (tmp_path / path).write_text(before)
