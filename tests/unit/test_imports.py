"""What imports what: no torch behind a command line or a recipe, and a model from the repository's root.

Each case is a process of its own, because what this one has imported already would hide the answer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "peft", "safetensors", "matplotlib", "reasoning_gym")
CONFIG_MODULES = sorted(f"opd_mesh.config.{path.stem}" for path in (ROOT / "opd_mesh" / "config").glob("[!_]*.py"))


def python(code: str, *arguments: str, path: list[Path] | None = None) -> str:
    """Output of a fresh interpreter in the repository's root; ``path`` replaces its site-packages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
        arguments = ("-S", *arguments)
    command = [sys.executable, *arguments, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["opd_mesh.cli.main", *CONFIG_MODULES])
def test_command_line_and_recipes_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules.keys() & set({HEAVY})))"
    assert python(code) == ""


@pytest.mark.parametrize("words", [["--help"], ["score", "--help"], ["run", "absent.yaml"]])
def test_the_command_line_answers_without_anything_heavy(words: list[str]) -> None:
    code = f"""
import atexit, sys
sys.argv = ["opd", *{words}]
atexit.register(lambda: print("heavy:", *sorted(sys.modules.keys() & set({HEAVY}))))
from opd_mesh.cli.main import main
try:
    main()
except SystemExit:
    pass
"""
    assert python(code).splitlines()[-1].strip() == "heavy:"


# A forward pass, not only the import: transformers asks for the package when it builds layers, too.
MODEL = """
import importlib.util, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2))
assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 32)
print(importlib.util.find_spec("kernels").origin)
"""


def site_packages() -> list[Path]:
    """Where third-party packages are."""
    return sorted({Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")})


def test_a_model_imports_from_the_root_with_hugging_faces_kernels() -> None:
    # The dev extra brings it: without it this would be the other test.
    assert any((folder / "kernels").is_dir() for folder in site_packages())
    assert Path(python(MODEL)).parent.parent in site_packages()


def test_a_model_imports_from_the_root_without_hugging_faces_kernels(tmp_path: Path) -> None:
    for folder in site_packages():
        for entry in folder.iterdir():
            if not entry.name.startswith("kernels"):
                (tmp_path / entry.name).symlink_to(entry)
    assert python(MODEL, path=[tmp_path]) == "None"  # our folder kernels/: a namespace, without an __init__
