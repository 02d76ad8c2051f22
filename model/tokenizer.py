"""The tokenizer: byte-level BPE with DeepSeek-V4's special tokens, in the `tokenizer.json` format."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from model import encoding
from model.encoding import BOS, EOS, SPECIAL_TOKENS

FILE_NAME = "tokenizer.json"


class Tokenizer:
    """Text to token ids and back; any text survives the round trip.

    Attributes:
        vocab_size: ids run from 0 to this, exclusive.
        bos, eos: ids of the begin and the end of sentence; EOS is also the padding.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wrap a loaded `tokenizers` tokenizer.

        Raises:
            ValueError: it is not byte-level or lacks BOS or EOS.
        """
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos = self.token_id(BOS)
        self.eos = self.token_id(EOS)
        self._bytes = _token_bytes(backend, self.vocab_size)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, boilerplate: Sequence[str] = ()) -> Tokenizer:
        """Learn merges from `texts`; numbers are cut in groups of up to three digits as in V4's own, BOS is id 0 and EOS id 1.

        Args:
            texts: what the model will read; the same texts give the same tokenizer.
            vocab_size: at most this many tokens, special and boilerplate ones included.
            boilerplate: constant strings that become one token each beside the encoding's own (tools preamble, call syntax), such as a
                domain's schema lines: a laptop does not spend its time on text that is the same in every sequence.

        Raises:
            ValueError: no room for the 256 bytes and the fixed tokens.
        """
        fixed = list(dict.fromkeys([*SPECIAL_TOKENS, *encoding.boilerplate(), *boilerplate]))
        if vocab_size < len(fixed) + 256:
            raise ValueError(
                f"vocab_size: got {vocab_size}, expected at least {len(fixed) + 256} (256 bytes and {len(fixed)} fixed tokens)"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
        backend.decoder = decoders.ByteLevel()
        added = [AddedToken(text, normalized=False, special=text in SPECIAL_TOKENS) for text in fixed]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=added,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(_without(fixed, texts), trainer)
        return cls(backend)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read `tokenizer.json` from a directory.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it cannot serve this architecture.
        """
        path = Path(directory) / FILE_NAME
        return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` into an existing directory."""
        (Path(directory) / FILE_NAME).write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; special and boilerplate tokens are recognised, nothing is added."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts at once, on all cores."""
        return [list(encoding.ids) for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self._bytes.__getitem__, ids)).decode("utf-8", errors="replace")

    def token_id(self, token: str) -> int:
        """Return the id of a token given as text.

        Raises:
            ValueError: the vocabulary has no such token.
        """
        id = self._backend.token_to_id(token)
        if id is None:
            raise ValueError(f"tokenizer: got no token {token!r}, expected one")
        return int(id)

    def digest(self) -> str:
        """Return 16 hexadecimal digits that two tokenizers share only when they encode alike."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:16]


def _without(fixed: Sequence[str], texts: Iterable[str]) -> Iterable[str]:
    """Yield the stretches of `texts` between fixed tokens, so that no merge is spent on them."""
    pattern = re.compile("|".join(re.escape(text) for text in sorted(fixed, key=len, reverse=True)))
    for text in texts:
        yield from filter(None, pattern.split(text))


def _token_bytes(backend: tokenizers.Tokenizer, size: int) -> list[bytes]:
    """Map every id to the bytes it stands for."""
    byte_of = _byte_of_character()
    added = backend.get_added_tokens_decoder()
    table: list[bytes] = []
    for id in range(size):
        if id in added:
            table.append(added[id].content.encode())
            continue
        token = backend.id_to_token(id)
        if token is None or any(character not in byte_of for character in token):
            raise ValueError(f"tokenizer: got token {id} = {token!r}, expected a byte-level vocabulary without gaps")
        table.append(bytes(byte_of[character] for character in token))
    return table


def _byte_of_character() -> dict[str, int]:
    """Return the character that stands for each byte in a byte-level vocabulary, inverted.

    Printable Latin-1 bytes stand for themselves, the others take the characters from U+0100 on in order. Source: the GPT-2 vocabulary.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(rest)}
