"""What ``ray up`` accepts and then fails at, or leaves open to others, is found here first, and for free.

Ray's own validation rejects unknown keys, but passes a file without a region, with a GPU machine as head, or with a
dashboard that runs anybody's code. Nothing is started, and no cloud is asked.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

# yaml, jsonschema and click are Ray's own dependencies.
import jsonschema
import ray.autoscaler
import yaml
from click import ClickException
from ray.autoscaler._private.util import prepare_config, validate_config

from viladiff.cluster.config_rules import RULES, Cluster, ConfigProblem, Keys
from viladiff.config.base import did_you_mean
from viladiff.core.checks import Check


def examine_cluster(file: str | Path) -> list[Check]:
    """Return a line for each rule, and one for each violation. Raises OSError if the file cannot be read.

    Later rules are checked only if Ray itself accepts the file, since they rely on its structure.
    """
    path = Path(file)
    text = path.read_text(encoding="utf-8")
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        found = f"{path.name}:{where.line + 1 if where else '?'}: {getattr(error, 'problem', error)}"
        return [Check("cluster: yaml", found, "fix the line; quote values with ': ', '#' or '*' in them", True)]
    if not isinstance(raw, dict):
        return [Check("cluster: yaml", f"{path.name}: not a mapping", "write key: value at the top level", True)]
    lines: dict[Keys, int] = {}
    twice = [ConfigProblem(keys, "given twice; the first is lost", "keep one") for keys in _repeated(tree, (), lines)]
    cluster = Cluster(path, raw, {}, lines)
    checks = [*_said(cluster, "keys", [*twice, *_schema(raw)])]
    if any(check.broken for check in checks):
        return checks
    output = io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            ready = prepare_config(yaml.safe_load(text))
            validate_config(ready)
    except (ValueError, KeyError, AssertionError, RuntimeError, ClickException, jsonschema.ValidationError) as error:
        told = f"{error} {output.getvalue()}".strip().splitlines()[0] if f"{error}{output.getvalue()}" else repr(error)
        return [*checks, *_said(cluster, "ray", [ConfigProblem((), f"Ray refuses it: {told}", "fix what Ray names")])]
    cluster = cluster._replace(ready=ready)
    for name, rule in RULES.items():
        checks += _said(cluster, name, list(rule(cluster)))
    return checks


def _said(cluster: Cluster, name: str, faults: list[ConfigProblem]) -> Iterator[Check]:
    if not faults:
        yield Check(f"cluster: {name}", "as it should be")
    for fault in faults:
        known = fault.keys
        while known and known not in cluster.lines:
            known = known[:-1]
        line = f":{cluster.lines[known]}" if known else ""
        where = f"{cluster.file.name}{line}: {'.'.join(map(str, fault.keys))}".rstrip(": ")
        yield Check(f"cluster: {name}", f"{where}: {fault.found}", fault.remedy, fault.broken)


def _repeated(node: yaml.Node | None, keys: Keys, lines: dict[Keys, int]) -> Iterator[Keys]:
    """Record the line of each key, and yield keys that stand twice in one mapping."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*keys, str(key.value))
            if path in lines and lines[path] != key.start_mark.line + 1:
                yield path
            lines[path] = key.start_mark.line + 1
            yield from _repeated(value, path, lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[*keys, i] = value.start_mark.line + 1
            yield from _repeated(value, (*keys, i), lines)


def _schema(raw: dict[str, Any]) -> Iterator[ConfigProblem]:
    """Yield the errors of Ray's schema by key; a mistyped key with the nearest that exists."""
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    for error in jsonschema.Draft7Validator(schema).iter_errors(raw):
        keys = tuple(error.absolute_path)
        known = list(error.schema.get("properties", ()))
        if error.validator == "additionalProperties":
            for name in sorted(set(error.instance) - set(known)):
                yield ConfigProblem(
                    (*keys, name), "no such key", f"allowed: {', '.join(known)}{did_you_mean(name, known)}"
                )
        else:
            yield ConfigProblem(
                keys, error.message, f"see what Ray expects: {error.validator} {error.validator_value}"[:120]
            )
    provider = raw.get("provider")
    known = list(schema["properties"]["provider"]["properties"])
    for name in provider if isinstance(provider, dict) else ():
        if name not in known and (like := did_you_mean(name, known)):
            yield ConfigProblem(("provider", name), "no such key, and Ray would ignore it", like.removeprefix("; "))
