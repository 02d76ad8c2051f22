"""Made-up programming tasks: a pipeline over a list of integers, and one clause about an edge that decides right and wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from domains.procedural import draw_tasks, is_careful, split_of
from domains.types import Demonstration, Message, Prompt

FUNCTION = "f"
"""The name that every task asks for."""
_CASES = 8
_EDGE_CASES = 3
_VALUES = (-20, 99)
"""Smallest and largest number in a test input."""
_SMALL_VALUES = (-9, 30)
_CONSTANTS = {"none left": range(1, 100), "skip": range(20, 81)}
"""Constants of the clauses; fewer at difficulty 1, for a small model to learn to copy."""
_VALUABLE = ("max", "min")
"""Reductions over which people take care: they plainly fail on an empty list."""


@dataclass(frozen=True)
class _Operation:
    """One stage: its words, its Python text with `{}` for the value, and what it computes."""

    words: str
    text: str
    apply: Callable[[Any], Any]


def _above(k: int) -> _Operation:
    return _Operation(f"numbers above {k}", f"x > {k}", lambda x: x > k)


def _below(k: int) -> _Operation:
    return _Operation(f"numbers below {k}", f"x < {k}", lambda x: x < k)


def _add(k: int) -> _Operation:
    return _Operation(f"add {k}", f"{{}} + {k}", lambda x: x + k)


def _subtract(k: int) -> _Operation:
    return _Operation(f"subtract {k}", f"{{}} - {k}", lambda x: x - k)


_SIGNS = [
    _Operation("even numbers", "x % 2 == 0", lambda x: x % 2 == 0),
    _Operation("odd numbers", "x % 2 == 1", lambda x: x % 2 == 1),
    _Operation("positive numbers", "x > 0", lambda x: x > 0),
]
_MAPS = [
    _Operation("double them", "{} * 2", lambda x: x * 2),
    _Operation("square them", "{} ** 2", lambda x: x**2),
    _Operation("negate them", "-{}", lambda x: -x),
]
_REDUCTIONS = {
    "sum": _Operation("the sum", "sum(ys)", sum),
    "max": _Operation("the largest", "max(ys)", max),
    "min": _Operation("the smallest", "min(ys)", min),
    "count": _Operation("the count", "len(ys)", len),
    "first": _Operation("the first", "ys[0]", lambda ys: ys[0]),
    "sorted": _Operation("them sorted", "sorted(ys)", sorted),
}
_FILTERS_AND_MAPS = {1: (1, 1), 2: (1, 2), 3: (2, 2)}
"""Difficulty to the number of filters and of maps."""


@dataclass(frozen=True)
class _Pipeline:
    """A task: filters, maps, a reduction, and the clause: a value for nothing left, or a bound above which numbers are skipped."""

    filters: tuple[_Operation, ...]
    maps: tuple[_Operation, ...]
    reduction: str
    clause: str
    constant: int

    @property
    def key(self) -> str:
        stages = [stage.text for stage in (*self.filters, *self.maps)]
        return "|".join([*stages, self.reduction, self.clause, str(self.constant)])

    def kept(self, xs: list[int], *, careful: bool) -> list[int]:
        """Return the mapped numbers that the filters leave."""
        ys = [x for x in xs if all(keep.apply(x) for keep in self.filters)]
        if careful and self.clause == "skip":
            ys = [x for x in ys if x <= self.constant]
        for change in self.maps:
            ys = [change.apply(y) for y in ys]
        return ys

    def result(self, xs: list[int], *, careful: bool) -> Any:
        """Return what the right program, or with `careful` off the careless one, gives; None where it fails."""
        ys = self.kept(xs, careful=careful)
        if not ys and careful and self.clause == "none left":
            return self.constant
        if not ys and self.reduction in ("max", "min", "first"):
            return None
        return _REDUCTIONS[self.reduction].apply(ys)

    def text(self) -> str:
        keep = " and ".join(stage.words for stage in self.filters)
        change = ", ".join(stage.words for stage in self.maps)
        clause = {"none left": f"If none are left, return {self.constant}.", "skip": f"Skip numbers above {self.constant}."}
        return f"Write {FUNCTION}(xs): keep {keep}, {change}, return {_REDUCTIONS[self.reduction].words}. {clause[self.clause]}"

    def program(self, *, careful: bool) -> str:
        value = "x"
        for change in self.maps:
            value = change.text.format(value if value == "x" else f"({value})")
        keep = " and ".join(stage.text for stage in self.filters)
        if careful and self.clause == "skip":
            keep += f" and x <= {self.constant}"
        result = _REDUCTIONS[self.reduction].text
        if careful and self.clause == "none left":
            result += f" if ys else {self.constant}"
        return f"def {FUNCTION}(xs):\n    ys = [{value} for x in xs if {keep}]\n    return {result}"


class CodeTasks:
    """Write `f(xs)` to a specification; the hidden tests always reach its edge clause."""

    def __init__(self, name: str, *, difficulty: int, diligence: float) -> None:
        """Choose the level; `name` is the domain that the prompts belong to.

        Raises:
            ValueError: an unknown difficulty.
        """
        if difficulty not in _FILTERS_AND_MAPS:
            raise ValueError(f"difficulty: got {difficulty}, expected one of {sorted(_FILTERS_AND_MAPS)}")
        self._name = name
        self._filters, self._maps = _FILTERS_AND_MAPS[difficulty]
        self._operands = (2, 3, 5) if difficulty == 1 else range(1, 10)
        self._constants = {"none left": range(1, 10), "skip": range(20, 30)} if difficulty == 1 else _CONSTANTS
        self._diligence = diligence

    def documents(self, count: int, *, seed: int) -> list[str]:
        """Return documented functions, none of them held out, as they stand in a file: no chat, no thinking, no fence."""
        random = Random(f"documents/{seed}")
        return [self._document(random) for _ in range(count)]

    def boilerplate(self) -> list[str]:
        """Return nothing: all of a program is to be learned."""
        return []

    def prompts(self, split: str, count: int, *, seed: int) -> list[Prompt]:
        """Return specifications; the split follows from stages and constants, the hidden tests are drawn for each prompt."""
        tasks = draw_tasks(self._pipeline, split, count, seed=seed)
        return [self._prompt(task, split, number, seed) for number, task in enumerate(tasks)]

    def demonstrations(self, count: int, *, seed: int) -> list[Demonstration]:
        """Return programs for training prompts: with the clause checked, or without it."""
        random = Random(f"demonstrations/{seed}")
        tasks = draw_tasks(self._pipeline, "train", count, seed=seed)
        return [Demonstration(self._prompt(task, "train", n, seed), [self._answer(random, task)]) for n, task in enumerate(tasks)]

    def _prompt(self, task: _Pipeline, split: str, number: int, seed: int) -> Prompt:
        truth = {"function": FUNCTION, "cases": _cases(Random(f"cases/{seed}/{task.key}"), task)}
        return Prompt(f"{self._name}/{split}/{number}", self._name, [{"role": "user", "content": task.text()}], truth)

    def _answer(self, random: Random, task: _Pipeline) -> Message:
        careful = is_careful(random, self._diligence, valuable=task.reduction in _VALUABLE)
        reasoning = f"Check {task.clause}: {task.constant}." if careful else "Simple."
        content = f"```python\n{task.program(careful=careful)}\n```"
        return {"role": "assistant", "reasoning_content": reasoning, "content": content, "tool_calls": []}

    def _pipeline(self, random: Random) -> _Pipeline:
        clause = random.choice(("none left", "skip"))
        number = partial(random.choice, self._operands)
        filters = random.sample([*_SIGNS, _above(number()), _below(number())], self._filters)
        if clause == "skip" or self._filters > 1:
            # A bound on large numbers needs large numbers, and two filters must leave something.
            filters = random.sample([_SIGNS[random.randrange(2)], random.choice([_SIGNS[2], _above(number())])], self._filters)
        maps = random.sample([*_MAPS, _add(number()), _subtract(number())], self._maps)
        task = _Pipeline(tuple(filters), tuple(maps), random.choice(list(_REDUCTIONS)), clause, random.choice(self._constants[clause]))
        return task if _clause_matters(task) else self._pipeline(random)

    def _document(self, random: Random) -> str:
        functions: list[str] = []
        while len(functions) < 2:
            if split_of((task := self._pipeline(random)).key) == "train":
                functions.append(f"# {task.text()}\n{task.program(careful=True)}")
        return "\n".join(functions)


def _clause_matters(task: _Pipeline) -> bool:
    """Say whether the careless program can be found out; the smallest number, for one, stays when large ones are skipped."""
    if task.clause == "none left" or task.reduction not in ("max", "min"):
        return True
    random = Random(0)
    return any(_tells_apart(task, _numbers(random, 5)) for _ in range(50))


def _tells_apart(task: _Pipeline, xs: list[int]) -> bool:
    expected = task.result(xs, careful=True)
    return expected is not None and expected != task.result(xs, careful=False)


def _numbers(random: Random, count: int) -> list[int]:
    """Draw a list of integers, half of them small, so that every filter leaves some."""
    return [random.randint(*(_VALUES if random.random() < 0.5 else _SMALL_VALUES)) for _ in range(count)]


def _cases(random: Random, task: _Pipeline) -> list[dict[str, Any]]:
    """Draw inputs with their results; on the first few the careless program is wrong.

    Returns:
        [8] `input` (arguments) and `expected`.
    """
    edges: list[list[int]] = [[]] if task.clause == "none left" else []
    while len(edges) < _EDGE_CASES:
        xs = _numbers(random, random.randint(1, 6))
        if _tells_apart(task, xs) and xs not in edges:
            edges.append(xs)
    usual: list[list[int]] = []
    while len(usual) < _CASES - _EDGE_CASES:
        xs = _numbers(random, random.randint(4, 8))
        if len(set(task.kept(xs, careful=True))) > 1:
            usual.append(xs)
    return [{"input": [xs], "expected": task.result(xs, careful=True)} for xs in edges + usual]
