"""Conversations as token segments: the same cuts for demonstrations that a rollout makes by itself."""

from __future__ import annotations

from collections.abc import Sequence

from domains.types import Message
from model.encoding import EncodingError, continuation, encode_messages, parse_message
from model.tokenizer import Tokenizer


def prompt_tokens(tokenizer: Tokenizer, messages: Sequence[Message], mode: str) -> list[int]:
    """Encode what the model is shown, up to the place where it starts to write."""
    return tokenizer.encode(encode_messages(list(messages), mode))


def continuation_tokens(tokenizer: Tokenizer, so_far: Sequence[Message], new: Sequence[Message], mode: str) -> list[int]:
    """Encode turns that arrive after an assistant turn (tool results), up to the place where the model goes on."""
    return tokenizer.encode(continuation(list(so_far), list(new), mode))


def demonstration_tokens(
    tokenizer: Tokenizer, prompt: Sequence[Message], turns: Sequence[Message], mode: str
) -> tuple[list[int], list[bool]]:
    """Encode a demonstration segment by segment.

    Args:
        prompt: the turns that the model is shown first.
        turns: assistant turns, with the tool turns between them.
        mode: `thinking` or `chat`.

    Returns:
        tokens [T], and [T] True where the assistant wrote the token (its end-of-sentence included).
    """
    so_far = list(prompt)
    tokens = prompt_tokens(tokenizer, so_far, mode)
    written = [False] * len(tokens)
    waiting: list[Message] = []
    for turn in turns:
        if turn["role"] != "assistant":
            waiting.append(turn)
            continue
        if waiting:
            given = continuation_tokens(tokenizer, so_far, waiting, mode)
            tokens, written = tokens + given, written + [False] * len(given)
            so_far, waiting = so_far + waiting, []
        said = tokenizer.encode(encode_messages([turn], mode, context=so_far))
        tokens, written = tokens + said, written + [True] * len(said)
        so_far = [*so_far, turn]
    return tokens, written


def parse_turn(text: str, mode: str) -> Message:
    """Parse what the model wrote in one turn; what does not parse is kept as it is, with the reason under `error`."""
    try:
        return parse_message(text, mode)
    except EncodingError as error:
        return {"role": "assistant", "content": text, "error": str(error)}
