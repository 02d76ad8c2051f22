"""The mathematical comparison of two answers; runs in a process of its own, that may be killed at any time.

Source: math-verify 0.9, which uses signals and must have the main thread of its process.
"""

from __future__ import annotations

from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

_SOFT_LIMIT_S = 1


def grade(request: dict[str, Any]) -> dict[str, Any]:
    """Compare two answers as mathematics.

    Args:
        request: `gold` and `answer`, the contents of the two boxes.

    Returns:
        `correct`: bool.
    """
    gold, answer = (
        parse(f"\\boxed{{{request[name]}}}", [LatexExtractionConfig()], parsing_timeout=_SOFT_LIMIT_S) for name in ("gold", "answer")
    )
    return {"correct": bool(gold and answer) and bool(verify(gold, answer, timeout_seconds=_SOFT_LIMIT_S))}
