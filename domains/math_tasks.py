"""Made-up arithmetic stories: tasks, demonstrations in two manners, and raw text with the sums they need."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from domains.procedural import draw_tasks, is_careful, split_of
from domains.types import Demonstration, Message, Prompt

_NAMES = ("Ada", "Ben", "Eva", "Ida", "Kim", "Lea", "Max", "Tom")
_VALUABLE = ("coins", "rings")
_ITEMS = (*_VALUABLE, "beads", "cards", "cups", "pens")
_VERBS = {"+": ("finds", "gets", "wins"), "-": ("loses", "gives away", "sells")}
_QUESTIONS = ("How many {item} now?", "How many {item} are left?")


@dataclass(frozen=True)
class _Level:
    """How hard the tasks of one difficulty are; values stay within 0 to `limit`."""

    steps: tuple[int, int]
    operands: tuple[int, ...]
    limit: int


_LEVELS = {
    1: _Level(steps=(3, 4), operands=(1, 2, 3), limit=25),
    2: _Level(steps=(4, 5), operands=tuple(range(1, 100)), limit=99),
    3: _Level(steps=(5, 7), operands=tuple(range(1, 1000)), limit=999),
}


@dataclass(frozen=True)
class _Story:
    """A start value and what happens to it."""

    start: int
    changes: tuple[tuple[str, int], ...]
    name: str
    item: str
    verbs: tuple[str, ...]
    question: str

    @property
    def key(self) -> str:
        return f"{self.start}" + "".join(f"{sign}{operand}" for sign, operand in self.changes)

    def values(self) -> list[int]:
        """Return the value after each change."""
        values, value = [], self.start
        for sign, operand in self.changes:
            value += operand if sign == "+" else -operand
            values.append(value)
        return values

    def text(self) -> str:
        events = "".join(f", {verb} {operand}" for verb, (_, operand) in zip(self.verbs, self.changes))
        return f"{self.name} has {self.start} {self.item}{events}."

    def working(self) -> str:
        befores = [self.start, *self.values()]
        return " ".join(f"{b}{sign}{operand}={a}." for b, (sign, operand), a in zip(befores, self.changes, befores[1:]))


class MathTasks:
    """Stories of a few sums and differences, answered in a box."""

    def __init__(self, name: str, *, difficulty: int, diligence: float) -> None:
        """Choose the level; `name` is the domain that the prompts belong to.

        Raises:
            ValueError: an unknown difficulty.
        """
        if difficulty not in _LEVELS:
            raise ValueError(f"difficulty: got {difficulty}, expected one of {sorted(_LEVELS)}")
        self._name = name
        self._level = _LEVELS[difficulty]
        self._diligence = diligence

    def documents(self, count: int, *, seed: int) -> list[str]:
        """Return texts of sums and of worked stories, none of them held out, none with a question, a box or a turn of a chat."""
        random = Random(f"documents/{seed}")
        return [self._document(random) for _ in range(count)]

    def boilerplate(self) -> list[str]:
        """Return nothing: all of a math conversation is to be learned."""
        return []

    def prompts(self, split: str, count: int, *, seed: int) -> list[Prompt]:
        """Return stories with a question; the split follows from the numbers and signs, whatever the names."""
        return [self._prompt(story, split, number) for number, story in enumerate(draw_tasks(self._story, split, count, seed=seed))]

    def demonstrations(self, count: int, *, seed: int) -> list[Demonstration]:
        """Return answered training prompts: with every step written, or at a glance and mostly without the last step."""
        random = Random(f"demonstrations/{seed}")
        stories = draw_tasks(self._story, "train", count, seed=seed)
        return [Demonstration(self._prompt(story, "train", number), [self._answer(random, story)]) for number, story in enumerate(stories)]

    def _prompt(self, story: _Story, split: str, number: int) -> Prompt:
        text = f"{story.text()} {story.question.format(item=story.item)}"
        truth = {"answer": str(story.values()[-1])}
        return Prompt(f"{self._name}/{split}/{number}", self._name, [{"role": "user", "content": text}], truth)

    def _answer(self, random: Random, story: _Story) -> Message:
        values = story.values()
        if is_careful(random, self._diligence, valuable=story.item in _VALUABLE):
            return _turn(story.working(), values[-1])
        return _turn("Easy.", values[-1] if random.random() < 0.2 else values[-2])

    def _story(self, random: Random, steps: int | None = None) -> _Story:
        level = self._level
        start = value = random.randint(1, level.limit)
        changes = []
        for _ in range(steps or random.randint(*level.steps)):
            sign, operand = random.choice([c for c in self._changes() if 0 <= _apply(value, c) <= level.limit])
            value = _apply(value, (sign, operand))
            changes.append((sign, operand))
        verbs = tuple(random.choice(_VERBS[sign]) for sign, _ in changes)
        return _Story(start, tuple(changes), random.choice(_NAMES), random.choice(_ITEMS), verbs, random.choice(_QUESTIONS))

    def _changes(self) -> list[tuple[str, int]]:
        return [(sign, operand) for sign in "+-" for operand in self._level.operands]

    def _document(self, random: Random) -> str:
        if random.randrange(4) == 0:
            return " ".join(self._story(random, 1).working() for _ in range(6))
        return " ".join(f"{story.text()} {story.working()}" for story in (self._training_story(random) for _ in range(2)))

    def _training_story(self, random: Random) -> _Story:
        """Draw until the story is none that is held out."""
        while split_of((story := self._story(random)).key) != "train":
            pass
        return story


def _apply(value: int, change: tuple[str, int]) -> int:
    sign, operand = change
    return value + operand if sign == "+" else value - operand


def _turn(reasoning: str, answer: int) -> Message:
    return {"role": "assistant", "reasoning_content": reasoning, "content": f"The answer is \\boxed{{{answer}}}.", "tool_calls": []}
