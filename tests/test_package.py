"""The package as it is installed: lazy names, what the wheel holds, what the repository promises."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hp_edit_trl
from tests.processes import Script


ROOT = Path(__file__).parents[1]


def test_importing_is_quick_and_pulls_in_nothing_heavy():
    code = (
        "import sys, time; start = time.perf_counter(); import hp_edit_trl; seconds = time.perf_counter() - start; "
        "assert not {'torch', 'transformers', 'diffusers', 'trl'} & set(sys.modules), sys.modules.keys(); "
        "assert {'DPOEditTrainer', 'FlowGRPOEditTrainer'} <= set(dir(hp_edit_trl)); print(seconds)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2


def test_people_and_judges_on_servers_need_no_models_here():
    code = (
        "import sys, hp_edit_trl.bench, hp_edit_trl.calibration, hp_edit_trl.rewards; "
        "assert not {'diffusers', 'torchvision', 'trl', 'peft'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    for name in hp_edit_trl.__all__:
        assert getattr(hp_edit_trl, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        hp_edit_trl.Nothing  # noqa: B018


# A room imports only from rooms on floors below its own (docs/design.md).
FLOORS = (
    {"version", "utils", "tasks", "flow"},
    {"cases"},
    {"ratings"},
    {"policies", "judges", "lora_formats", "reviews"},
    {"editors", "rewards"},
    {"trainer", "calibration", "data", "bench"},
    {"metrics", "miniature", "scripts"},
    {"cli"},
)
PACKAGE = ROOT / "hp_edit_trl"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(module: str) -> list[tuple[str, str | None]]:
    """
    Every import of the package's modules in a module, wherever it stands: the module, and the name that is taken from
    it.
    """
    found: list[tuple[str, str | None]] = []
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found.append((whole, None) if whole in MODULES else (source, alias.name))
    return [(source, name) for source, name in found if source.split(".")[0] == "hp_edit_trl"]


def room(module: str) -> str:
    return module.split(".")[1]


def test_floors():
    rooms = {room(module) for module in MODULES if module != "hp_edit_trl"}
    assert rooms == set().union(*FLOORS)
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for module in MODULES:
        if module == "hp_edit_trl":  # lends its names to users, and is imported by no module
            continue
        for source, _ in imports(module):
            assert source != "hp_edit_trl", f"{module} imports the top-level package"
            inside = room(source) == room(module)
            assert inside or floor[room(source)] < floor[room(module)], f"{module} imports {source}"


def test_no_circle_of_imports():
    graph = {module: {source for source, _ in imports(module)} - {module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for source in sorted(graph[module]):
                visit(source, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def test_no_private_name_of_another_module():
    for module in MODULES:
        for source, name in imports(module):
            parts = [*source.split("."), *([name] if name else [])]
            private = [part for part in parts if part.startswith("_") and not part.startswith("__")]
            assert not private, f"{module} imports {name or source} of {source}"


def test_no_two_public_functions_of_one_name():
    homes: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    # Each family of commands and each script has its own entry point.
    double = {name: where for name, where in homes.items() if len(where) > 1 and name not in ("main", "register")}
    assert not double


@pytest.mark.slow
def test_the_wheel_holds_the_prompts_and_the_miniature(tmp_path):
    # The wheel is built from the source distribution, so that it shows what that one lacks.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [tmp_path / f"hp_edit_trl-{hp_edit_trl.__version__}{end}" for end in (".tar.gz", "-py3-none-any.whl")]
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = files[1]
    names = zipfile.ZipFile(wheel).namelist()
    prompts = {path.relative_to(ROOT / "prompts").as_posix() for path in (ROOT / "prompts").rglob("*.md")}
    assert {f"hp_edit_trl/prompts/{name}" for name in prompts} <= set(names)
    assert "hp_edit_trl/py.typed" in names and "hp_edit_trl/trainer/model_card.md" in names
    assert {"hp_edit_trl/data/pairs_card.md", "hp_edit_trl/data/builder/dataset_card.md"} <= set(names)
    assert {"hp_edit_trl/prompts/instructions/bokeh.md", "hp_edit_trl/recipes/qwen_image_edit_2509.yaml"} <= set(names)
    assert {
        "hp_edit_trl/bench/gallery.html",
        "hp_edit_trl/calibration/worst.html",
        "hp_edit_trl/prompts/gedit/quality.md",
    } <= set(names)
    assert {
        f"hp_edit_trl/metrics/{name}/{name}.py" for name in ("realpref_bench", "gedit_bench", "dreambench_plus")
    } <= set(names)
    assert not any(name.startswith(("tests/", "benchmarks/", "examples/")) for name in names)
    weights = [info for info in zipfile.ZipFile(wheel).infolist() if "/miniature/weights/" in info.filename]
    assert weights and sum(info.compress_size for info in weights) < 15e6
    # Unpacked elsewhere, away from the repository, both load. The process forgets the package that it has imported.
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        f"import sys; sys.path[:] = [{str(target)!r}, *(path for path in sys.path if path != {str(ROOT)!r})]\n"
        "for name in [name for name in sys.modules if name.split('.')[0] == 'hp_edit_trl']: del sys.modules[name]\n"
        "import hp_edit_trl; from hp_edit_trl.miniature import load_pipeline; load_pipeline();"
        "print(hp_edit_trl.__file__, len(hp_edit_trl.load_scorer_prompts()))"
    )
    done = Script("-c", code, cwd=tmp_path).wait()
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout and done.stdout.split()[-1] == "9"
