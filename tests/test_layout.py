"""Rules about the tree that no single module can keep: names, imports, what git must not hide."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from viladiff.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("tune", "ablations", "reports", "benchmarks", "scripts")
SOURCES = sorted(path for top in ("viladiff", "tests", *SCRIPTS) for path in (ROOT / top).rglob("*.py"))
GOLDEN = ROOT / "tests" / "golden"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> set[str]:
    """Top-level names of everything imported anywhere in the file."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """(dotted name, call) of each call in the file."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


def pickle_names(path: Path) -> set[str]:
    """What the file takes from ``pickle``; a bare ``import pickle`` counts as what is used of it."""
    nodes = list(ast.walk(tree(path)))
    taken = {alias.name for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "pickle" for alias in n.names}
    renamed = {alias.asname for n in nodes if isinstance(n, ast.Import) for alias in n.names if alias.name == "pickle"}
    used = {
        n.attr
        for n in nodes
        if isinstance(n, ast.Attribute) and ast.unparse(n.value) in {"pickle", *filter(None, renamed)}
    }
    return taken | used


def said(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_something_to_check() -> None:
    assert {"viladiff/runs/config.py", "tests/test_layout.py"} <= {said(path) for path in SOURCES}


def test_stems_of_tests_are_unique() -> None:
    counts = Counter(path.stem for path in (ROOT / "tests").rglob("*.py"))
    assert [stem for stem, count in counts.items() if count > 1] == []


def test_no_script_or_module_shadows_a_package() -> None:
    standard = set(sys.stdlib_module_names)
    scripts = [path for top in SCRIPTS for path in (ROOT / top).rglob("*.py")]
    installed = [place for place in sys.path if Path(place).name == "site-packages"]
    assert installed and PathFinder.find_spec("torch", installed)
    assert [one for one in scripts if one.stem in standard or PathFinder.find_spec(one.stem, installed)] == []
    modules = [path for path in (ROOT / "viladiff").glob("*.py") if not path.stem.startswith("__")]
    assert [said(path) for path in modules if path.stem in standard] == []


def test_script_folders_are_no_packages_and_are_never_imported() -> None:
    assert [said(path) for top in SCRIPTS for path in (ROOT / top).rglob("__init__.py")] == []
    assert [said(path) for path in SOURCES if imports(path) & set(SCRIPTS)] == []


def test_ray_is_imported_below_cluster_only() -> None:
    wrong = [path for path in SOURCES if "ray" in imports(path) and path.parent.name != "cluster"]
    assert [said(path) for path in wrong] == []


def order_of_packages() -> list[str]:
    """From the bottom to the top, as docs/architecture.md says."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith("Order of the packages:"))
    return re.findall(r"`(\w+)`", line)


def package_modules() -> dict[str, Path]:
    """Dotted names of the package's modules; a package itself goes by its name."""
    paths = [path for path in SOURCES if path.is_relative_to(ROOT / "viladiff")]
    names = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    return {".".join(name).removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def module_imports() -> dict[str, set[str]]:
    """Modules of the package that each module imports in any way: when loaded, within functions, or for types."""
    known = package_modules()
    arrows: dict[str, set[str]] = {}
    for name, path in known.items():
        froms = [(str(node.module), alias.name) for node in _from_imports(path) for alias in node.names]
        whole = {f"{module}.{what}" if f"{module}.{what}" in known else module for module, what in froms}
        arrows[name] = (whole & set(known)) - {name}
    return arrows


def test_packages_import_downwards_only() -> None:
    order = order_of_packages()
    packages = {path.parent.name for path in (ROOT / "viladiff").glob("*/__init__.py")} | {"losses"}
    assert sorted(order) == sorted(packages)
    place = {package: i for i, package in enumerate(order)}
    wrong = [
        f"{name} imports {other}"
        for name, others in module_imports().items()
        for other in others
        if name.count(".") and other.count(".") and name.split(".")[1] in place
        if place[other.split(".")[1]] > place[name.split(".")[1]]
    ]
    assert wrong == []


def test_no_modules_import_each_other() -> None:
    arrows = module_imports()
    del arrows["viladiff"]  # the public names, which load what they stand for at first use
    left = dict(arrows)
    while free := [name for name, others in left.items() if not others & set(left)]:
        for name in free:
            del left[name]
    assert sorted(left) == []


def test_the_picture_of_the_packages_is_current() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "draw_packages.py"), "--check"]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


PLUG_INS = {"viladiff/methods", "viladiff/data/sources", "viladiff/models/encoders"}


def test_folders_hold_at_most_twelve_modules() -> None:
    counts = Counter(
        said(path.parent) for path in SOURCES if path.name != "__init__.py" and said(path).startswith("viladiff/")
    )
    assert {folder: count for folder, count in counts.items() if count > 12 and folder not in PLUG_INS} == {}


SHARED_NAMES = {
    "main": "each program's entry point",
    "load": "reads what its module writes or defines",
    "build": "makes what its module defines",
    "Segmenter": "the network, and the network with all that it needs to predict, save and share",
    "Point": "one in each of two kits of charts, which no module imports together",
}
"""Public names that several modules may define. Plug-ins of one folder may share all names, those of its interface."""


def public_names() -> dict[str, list[str]]:
    """Modules that define each public class or function, outside plug-ins as ``folder/``."""
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        folder = said(path.parent)
        if folder.split("/")[0] != "viladiff":
            continue
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                found.setdefault(node.name, set()).add(f"{folder}/" if folder in PLUG_INS else said(path))
    return {name: sorted(modules) for name, modules in found.items()}


def test_a_public_name_is_defined_once() -> None:
    twice = {name: where for name, where in public_names().items() if len(where) > 1 and name not in SHARED_NAMES}
    assert twice == {}


EQUATION = "the symbols of its equation"
INPUTS = "independent inputs, each with its meaning; a class for them would have this one use"
KERNEL = "an operation of torch or a kernel of Triton is called with tensors and numbers alone"
MANY_ARGUMENTS = {
    "models/fused/chain.py:_reverse_step": KERNEL,
    "models/fused/chain_kernels.py:_reverse_kernel": KERNEL,
    "models/fused/norm_kernels.py:_group_gradient_kernel": KERNEL,
    "models/fused/norm_kernels.py:_group_kernel": KERNEL,
    "models/fused/norm_kernels.py:_group_sums_kernel": KERNEL,
    "models/fused/norm_kernels.py:joined_statistics": KERNEL,
    "models/fused/norm_kernels.py:_layer_gradient_kernel": KERNEL,
    "models/fused/norm_kernels.py:_layer_kernel": KERNEL,
    "models/fused/norms.py:_": KERNEL,
    "models/fused/norms.py:_add_layer_norm_backward": KERNEL,
    "models/fused/norms.py:_group_norm_backward": KERNEL,
    "models/fused/pixel_kernels.py:_between": KERNEL,
    "models/fused/pixel_kernels.py:_gradient_kernel": KERNEL,
    "models/fused/pixel_kernels.py:_loss_kernel": KERNEL,
    "models/fused/pixel_kernels.py:_top_kernel": KERNEL,
    "cluster/captioning.py:_carry_out": INPUTS,
    "cluster/torch_trainer.py:_train": INPUTS,
    "data/loader.py:BatchLoader.__init__": INPUTS,
    "inference/pretrained.py:Segmenter.from_pretrained": "the arguments that users of Hugging Face know",
    "data/registry.py:load_dataset": "the entries of a DatasetSpec, for callers without a configuration",
    "data/transforms/augment.py:strong": "the fields of the strong view, which tests call without a configuration",
    "evaluation/pixel_counts.py:evaluate_network": "those of measure_all, for one network",
    "evaluation/pixel_counts.py:measure_all": "core of the evaluation: knows no configuration",
    "methods/viladiff_mixe.py:MixeTeacher._diffuse": "the maps of one step",
    "models/encoders/build.py:build_encoder": "the fields of an encoder, each optional, which tests call alone",
    "models/mixe/diffusion.py:posterior": EQUATION,
    "models/mixe/denoiser.py:refine": EQUATION,
    "report/table/exports.py:to_markdown": "the parts of a page, each optional",
    "report/table/table_page.py:render_table": "the parts of a page, each optional",
    "sweeps/controller.py:SweepController.__init__": INPUTS,
    "sweeps/optuna_study.py:OptunaStudy.__init__": INPUTS,
    "sweeps/trial_queue.py:TrialQueue.__init__": INPUTS,
    "tables/plan.py:make_plan": "the options of a table's command",
    "text/embedding_bank.py:load_text": "the fields of a text section, for callers without a configuration",
    "training/launch.py:_worker": "arguments of a process, which pickles them",
}
"""Functions of more than six arguments, with the reason."""


def functions(path: Path) -> list[tuple[str, ast.FunctionDef]]:
    """(dotted name, function) of each function at the top of the file or of its classes."""
    nodes = tree(path).body
    found = [(node.name, node) for node in nodes if isinstance(node, ast.FunctionDef)]
    for owner in (node for node in nodes if isinstance(node, ast.ClassDef)):
        found += [(f"{owner.name}.{node.name}", node) for node in owner.body if isinstance(node, ast.FunctionDef)]
    return found


PACKAGE = [path for path in SOURCES if path.is_relative_to(ROOT / "viladiff")]


def test_functions_have_at_most_fifty_lines() -> None:
    lengths = {
        f"{said(path)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in PACKAGE
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > 50} == {}, "signature and docstring count"


def test_modules_have_at_most_four_hundred_lines() -> None:
    lengths = {said(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_functions_have_at_most_six_arguments() -> None:
    counts = {
        f"{path.relative_to(ROOT / 'viladiff').as_posix()}:{name}": len(
            [
                a
                for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                if a.arg not in ("self", "cls")
            ]
        )
        for path in PACKAGE
        for name, node in functions(path)
    }
    many = {name for name, count in counts.items() if count > 6}
    assert sorted(many - set(MANY_ARGUMENTS)) == [], "give each a reason, or pass a dataclass"
    assert sorted(set(MANY_ARGUMENTS) - many) == [], "no longer has many arguments"


def test_nothing_loads_code_with_data() -> None:
    package = [path for path in SOURCES if not path.is_relative_to(ROOT / "tests")]
    assert [said(path) for path in package if imports(path) & {"dill", "cloudpickle", "joblib"}] == []
    assert [said(path) for path in package if any(n.module == "yaml" for n in _from_imports(path))] == []
    assert [said(path) for path in package if pickle_names(path) - {"UnpicklingError"}] == []
    for path in package:
        for name, call in calls(path):
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert name != "torch.load" or given.get("weights_only") == "True", f"{said(path)}:{call.lineno}"
            assert not _unsafe_yaml(name, given), f"{said(path)}:{call.lineno}"
            assert given.get("allow_pickle", "False") == "False", f"{said(path)}:{call.lineno}"
            assert not (name.endswith("model_copy") and call.keywords), f"{said(path)}:{call.lineno}: does not validate"


def _from_imports(path: Path) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)]


def _unsafe_yaml(name: str, given: dict[str | None, str]) -> bool:
    """Any reader of YAML that can make objects of other types: all but ``safe_load`` and those told to be safe."""
    return name.startswith("yaml.") and name != "yaml.safe_load" and given.get("Loader") != "yaml.SafeLoader"


def test_no_import_path_is_edited() -> None:
    found = [said(path) for path in SOURCES for node in ast.walk(tree(path)) if _is_path_edit(node)]
    assert found == []


def _is_path_edit(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).startswith("sys.path.")
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
    return any(ast.unparse(target).startswith("sys.path") for target in targets)


def test_backward_stands_in_one_place() -> None:
    package = [path for path in SOURCES if path.is_relative_to(ROOT / "viladiff")]
    places = [said(path) for path in package for name, _ in calls(path) if name.endswith(".backward")]
    assert places in ([], ["viladiff/training/trainer.py"])


def test_only_a_method_and_the_table_know_its_name() -> None:
    for path in (ROOT / "viladiff").rglob("*.py"):
        if path.parent.name == "methods":
            continue
        modules = {node.module for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and node.module}
        known = modules & {f"viladiff.methods.{name}" for name in METHODS} - {"viladiff.methods.supervised"}
        assert not known or _for_types_only(path, known), f"{said(path)} imports {known}"


def _for_types_only(path: Path, modules: set[str]) -> bool:
    """Whether each import of ``modules`` stands under ``if TYPE_CHECKING``."""
    guarded = {
        inner.module
        for node in tree(path).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in node.body
        if isinstance(inner, ast.ImportFrom)
    }
    return modules <= guarded


def git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)


def test_git_hides_no_source() -> None:
    if git("rev-parse").returncode:
        pytest.skip("not a git checkout")
    paths = [said(path) for path in SOURCES] + ["viladiff/data/new.py", "viladiff/models/new.safetensors"]
    assert git("check-ignore", *paths, "reports/render_new.py", "reports/published/x.md").stdout.split() == []
    ignored = [".venv/x", "runs/x", "reports/quick/x.md"]
    assert git("check-ignore", *ignored).stdout.split() == ignored


def test_readme_tree_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```text\n(viladiff/\n.*?)```", text, re.DOTALL)
    assert block is not None
    package = ROOT / "viladiff"
    there = {path.name for path in package.glob("*.py") if not path.stem.startswith("__")}
    there |= {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    inside = block.group(1).split("\ntests/")[0]
    named = {line.split()[0] for line in inside.splitlines()[1:] if re.match(r"  \S", line)}
    assert sorted(there - named) == [], "exist, but are not in README's tree"
    assert sorted(named - there) == [], "in README's tree, but do not exist"


def test_readme_and_make_name_the_same_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):.*## ", makefile, re.MULTILINE))
    assert {"setup", "table5", "test", "lint", "bench", "published", "help"} <= targets
    used = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M))
    assert {"table5", "test"} <= used <= targets


def makefile_scripts() -> set[str]:
    """Scripts that the Makefile runs, those of its loops one by one."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = set(re.findall(r"(?<![\w$/])[a-z]+/\w+\.(?:py|sh)", text))
    for name, items, body in re.findall(r"for (\w+) in ([\w ]+); do(.*?)done", text, re.DOTALL):
        for script in re.findall(rf"[a-z]+/\w+\$\${name}\.py", body):
            found |= {script.replace(f"$${name}", item) for item in items.split()}
    return found


def test_scripts_that_make_runs_exist() -> None:
    scripts = makefile_scripts()
    assert {"tune/sweep_lambda.py", "ablations/run_table7.py", "tests/make_records.py"} <= scripts
    assert sorted(script for script in scripts if not (ROOT / script).is_file()) == []


def test_version_is_one() -> None:
    import viladiff

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == viladiff.__version__


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_golden_file(name: str) -> None:
    files = {path.stem for path in GOLDEN.glob("*.json")}
    if not files:
        pytest.skip("no golden files yet")
    assert name in files
