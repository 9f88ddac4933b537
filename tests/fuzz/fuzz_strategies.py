"""Strategies of hypothesis: files that are well formed where the reader is strict, and odd in what they say."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from fuzz_mutators import MUTATORS, ODD, TOKENS, _toml, at, checkpoint_changed, places, written
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

VALUES = st.one_of(
    st.sampled_from(ODD),
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=20),
)
TREES = st.recursive(
    VALUES,
    lambda inside: st.one_of(st.lists(inside, max_size=4), st.dictionaries(st.text(max_size=8), inside, max_size=4)),
    max_leaves=12,
)


@st.composite
def edited(draw: st.DrawFn, tree: Any) -> Any:
    """A sound tree with other values at some of its places."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        ways = [way for way in places(tree) if way]
        if not ways:
            return draw(TREES)
        way = draw(st.sampled_from(ways))
        parent, value = at(tree, way[:-1]), draw(TREES)
        if isinstance(parent, dict) and draw(st.booleans()) and draw(st.booleans()):
            parent[draw(st.one_of(st.sampled_from(sorted(map(str, parent))), st.text(max_size=8)))] = value
        else:
            parent[way[-1]] = value
    return tree


WORDS = st.one_of(
    st.sampled_from(
        [*TOKENS, "one", "two.png", "images/sub/three", "masks/four.png", "cat", "128", "0", "method.name", "voc"]
    ),
    st.text(max_size=12),
    st.integers(-1, 300).map(str),
    st.floats().map(str),
)
LINES = st.lists(st.tuples(WORDS, st.sampled_from([" ", "=", ",", "\t", ".", ""]), WORDS).map("".join), max_size=8)


@st.composite
def text_file(draw: st.DrawFn, data: bytes) -> bytes:
    """Lines of a sound file among others."""
    mine = data.decode("utf-8", "replace").split("\n")
    lines = [*draw(st.lists(st.sampled_from(mine), max_size=6)), *draw(LINES)]
    lines = draw(st.permutations(lines)) if len(lines) < 8 else lines
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def strategy(kind: str, data: bytes) -> st.SearchStrategy[bytes]:
    """Files of a kind like ``data``."""
    numbers = st.integers(0, 2**32 - 1)
    if kind == "lines":
        return text_file(data)
    if kind == "json":
        return st.builds(lambda tree, n: written(json.dumps(tree), Random(n)), edited(json.loads(data)), numbers)
    if kind == "record":
        from fuzz_mutators import record_changed

        return st.builds(
            lambda tree, n: record_changed(Random(n), json.dumps(tree).encode()),
            edited(json.loads(data)).filter(lambda t: isinstance(t, dict)),
            numbers,
        )
    if kind == "jsonl":
        rows = [json.loads(line) for line in data.splitlines()]
        row = st.one_of(st.sampled_from(rows), edited(rows[0]))
        return st.builds(
            lambda found, n: b"\n".join(written(json.dumps(one), Random(n)) for one in found) + b"\n",
            st.lists(row, max_size=5),
            numbers,
        )
    if kind == "toml":
        import tomllib

        return st.builds(
            lambda tree, n: written(
                "\n".join(f"{json.dumps(str(key))} = {_toml(value)}" for key, value in tree.items()) + "\n", Random(n)
            ),
            edited(tomllib.loads(data.decode())).filter(lambda t: isinstance(t, dict)),
            numbers,
        )
    mutator = checkpoint_changed if kind == "checkpoint" else MUTATORS[kind]
    return st.builds(lambda n, much: _repeated(mutator, n, much, data), numbers, st.integers(1, 3))


def _repeated(mutator: Any, n: int, much: int, data: bytes) -> bytes:
    """Several changes one after the other, as long as the result can still be taken apart."""
    rng = Random(n)
    for _ in range(much):
        try:
            data = mutator(rng, data)
        except Exception:
            break
    return data


def drawn(kind: str, data: bytes, number: int, first: int) -> list[bytes]:
    """So many files of the strategy, the same for the same ``first``."""
    found: list[bytes] = []

    @seed(first)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy(kind, data))
    def collect(one: bytes) -> None:
        found.append(one)

    collect()
    return found
