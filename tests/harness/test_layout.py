"""Dependencies point one way: analysis and experiments use baselines and hsa, never back."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"hsa", "baselines", "experiments", "analysis", "conf", "tests"}
ALLOWED = {
    "hsa": {"hsa"},
    "baselines": {"hsa", "baselines"},
    "experiments": OURS - {"tests"},
    "analysis": OURS - {"tests"},
}
# What the library stays free of, so that apply_hsa costs its users nothing but diffusers.
HEAVY = {"hydra", "omegaconf", "pandas", "wandb", "matplotlib", "rich", "av"}
FORBIDDEN = {
    "hsa": HEAVY,
    "baselines": HEAVY,
    "experiments": {"pandas", "wandb"},
    "analysis": set(),
}
MODULES = [path for name in ALLOWED for path in sorted((ROOT / name).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Dotted names of all imports of a file, wherever in it they stand."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    top = {name.split(".")[0] for name in imported(path)}
    assert (top & OURS) <= ALLOWED[package]
    assert not top & FORBIDDEN[package]


def test_one_module_builds_objects_from_configuration():
    """Hydra will want to know who may execute targets: there is one place to tell it."""
    builders = [path for path in MODULES if "hydra.utils.instantiate" in imported(path)]
    assert builders == [ROOT / "experiments" / "config.py"]
