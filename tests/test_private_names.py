"""Names of other libraries that begin with an underscore and that the code uses: those listed here alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("ray", "optuna", "torch", "wandb", "timm", "transformers", "open_clip", "pydantic", "huggingface_hub")
FOLDERS = ("viladiff", "tests", "scripts", "benchmarks", "ablations", "tune", "reports")
FILES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}

FAKE = "torch has no public tensor without memory that keeps its device apart; what a step does on a GPU is seen by it"
DISPATCH = "torch has no public way to see each operation"
FUSED = "the operation's name in torch's list; without content the public function is made of parts, as on no device"
NO_WAY_BACK = "open_clip adds folders of configurations and takes none out again"
ALLOWED = {
    "viladiff/methods/semivl.py: _apply": "CLIP is no part of the state and moves with the method, by whichever of "
    "nn.Module's ways; test_semivl says so",
    "tests/evaluation/test_evaluation.py: torch._subclasses.fake_tensor.FakeTensorMode": FAKE,
    "tests/methods/test_methods.py: torch._subclasses.fake_tensor.FakeTensorMode": FAKE,
    "tests/methods/test_methods.py: torch.utils._python_dispatch.TorchDispatchMode": DISPATCH,
    "tests/methods/test_methods.py: torch.utils._pytree.tree_leaves": "arguments of an operation may be nested",
    "tests/methods/test_methods.py: torch.ops.aten._to_copy": "the operation's name in torch's list of operations",
    "tests/methods/test_semivl.py: open_clip.factory._MODEL_CONFIG_PATHS": NO_WAY_BACK,
    "tests/methods/test_semivl.py: open_clip.factory._rescan_model_configs": NO_WAY_BACK,
    "tests/methods/test_ohem.py: torch._subclasses.FakeTensorMode": FAKE,
    "tests/models/test_diffusion.py: torch.utils._python_dispatch.TorchDispatchMode": DISPATCH,
    "tests/evaluation/test_operations.py: torch._foreach_lerp_": "what the moving average calls through torch.optim",
    "viladiff/models/cast_weights.py: torch._foreach_copy_": "documented among the foreach operations; nothing else "
    "copies a list of tensors at once",
    "viladiff/evaluation/operations.py: torch.utils._python_dispatch.TorchDispatchMode": DISPATCH,
    "viladiff/evaluation/operations.py: torch.utils._pytree.tree_leaves": "arguments of an operation may be nested",
    "viladiff/evaluation/meta_precision.py: torch.ops.aten._scaled_dot_product_flash_attention": FUSED,
    "viladiff/evaluation/meta_precision.py: torch.ops.aten._scaled_dot_product_efficient_attention": FUSED,
}
"""Each with its reason."""
ARGUMENTS = {
    "viladiff/cluster/executor.py: _temp_dir": "ray.init's documented argument for the place of its logs and sockets",
}
OF_PYTHON = {"_asdict", "_replace", "_fields", "_make", "_exit", "_ntuple_diskusage"}
"""Of named tuples, of os and of shutil."""
HOOKS = {name for kind in (nn.Module, optuna.study.Study) for name in vars(kind) if re.match(r"_[a-z]", name)}
"""Methods of theirs that a class of ours would override."""


def private(name: str) -> bool:
    """Whether a dotted name is one of the libraries' and has a part that begins with one underscore."""
    first, *parts = name.split(".")
    return first in LIBRARIES and any(re.match(r"_(?!_)", part) for part in parts)


def chain(node: ast.expr) -> list[str]:
    """The parts of ``a.b.c``; none if it does not begin with a name."""
    if isinstance(node, ast.Attribute):
        before = chain(node.value)
        return [*before, node.attr] if before else []
    return [node.id] if isinstance(node, ast.Name) else []


def names(nodes: list[ast.AST]) -> Iterator[str]:
    """Dotted names of imports, of attributes reached from imported names, and of strings that name modules."""
    bound: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                first = alias.name.split(".")[0]
                bound |= {alias.asname: alias.name} if alias.asname else {first: first}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in nodes:
        if isinstance(node, ast.Attribute) and (parts := chain(node)) and parts[0] in bound:
            yield ".".join([bound[parts[0]], *parts[1:]])
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+(\.\w+)+", node.value)
        ):
            yield node.value


def overridden(nodes: list[ast.AST]) -> Iterator[str]:
    """Private methods of the libraries' classes that a class defines."""
    for node in nodes:
        if isinstance(node, ast.ClassDef) and node.bases:
            yield from (f.name for f in node.body if isinstance(f, ast.FunctionDef) and f.name in HOOKS)


def used(text: str) -> set[str]:
    """Private names that a file uses or overrides, under the names that it imports them by."""
    nodes = list(ast.walk(ast.parse(text)))
    return shortest({name for name in names(nodes) if private(name)}) | set(overridden(nodes))


def defined(text: str) -> Iterator[str]:
    """Names that a file gives to functions, classes, arguments, variables and attributes."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


def reached(text: str, ours: set[str]) -> set[str]:
    """Private attributes of any object, arguments and keys of options whose names are not ``ours``: of a library's."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            found.add(str(node.slice.value))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            found |= {str(word.value) for word in node.args if isinstance(word, ast.Constant)}
    return {name for name in found if re.match(r"_[a-z]", name)} - ours - OF_PYTHON


def shortest(found: set[str]) -> set[str]:
    """Without names that go on from another one: of ``torch._dynamo`` and ``torch._dynamo.exc``, the first."""
    return {name for name in found if not any(name.startswith(f"{other}.") for other in found)}


def test_no_private_name_of_a_library_is_used_without_a_reason() -> None:
    assert len(FILES) > 300
    here = Path(__file__).relative_to(ROOT).as_posix()
    assert {f"{path}: {name}" for path, text in FILES.items() if path != here for name in used(text)} == set(ALLOWED)


def test_no_private_name_of_an_object_of_a_library_is_used_without_a_reason() -> None:
    """Of a trial, a result or a run of a tracker, whose class no import tells."""
    ours = {name for text in FILES.values() for name in defined(text)}
    allowed = {key.rpartition(".")[2].rpartition(" ")[2] for key in ALLOWED}
    found = {f"{path}: {name}" for path, text in FILES.items() for name in reached(text, ours)}
    assert {place for place in found if place.rpartition(" ")[2] not in allowed} == set(ARGUMENTS)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("trial._trial_id", "_trial_id"),
        ("run = wandb.init()\nrun._backend.stop()", "_backend"),
        ("ray.init(_node_name='a')", "_node_name"),
        ("options['_memory'] = 1", "_memory"),
        ("getattr(study, '_storage', None)", "_storage"),
    ],
)
def test_each_way_to_a_private_name_of_an_object_is_seen(text: str, name: str) -> None:
    assert reached(text, {"_ours"}) == {name}
    assert reached("self._ours\npoint._replace(a=1)\nx.__class__\ntorch.__version__", {"_ours"}) == set()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import wandb.sdk._x", "wandb.sdk._x"),
        ("import ray._private.worker", "ray._private.worker"),
        ("import torch._dynamo.exc as e", "torch._dynamo.exc"),
        ("from ray._private import services", "ray._private.services"),
        ("from torch import _foreach_mul_", "torch._foreach_mul_"),
        ("import torch\ntorch._foreach_mul_([], 1)", "torch._foreach_mul_"),
        ("from torch import nn\nnn.modules.batchnorm._BatchNorm", "torch.nn.modules.batchnorm._BatchNorm"),
        ("import optuna as o\no.storages._base", "optuna.storages._base"),
        ("import_module('ray._raylet')", "ray._raylet"),
    ],
)
def test_each_way_to_a_private_name_is_seen(text: str, name: str) -> None:
    assert used(text) == {name}


@pytest.mark.parametrize("text", ["import torch\ntorch.__version__", "from ray import tune\ntune.Tuner", "self._ray"])
def test_public_names_and_our_own_are_none(text: str) -> None:
    assert used(text) == set()


def test_an_overridden_hook_is_seen() -> None:
    assert used("class M(nn.Module):\n    def _apply(self): ...\n    def _ours(self): ...") == {"_apply"}
    assert used("class S(optuna.Study):\n    def _get_trials(self): ...") == {"_get_trials"}
