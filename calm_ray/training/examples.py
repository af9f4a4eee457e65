"""Documents to sentence pairs for sentence-order prediction (ALBERT, section 3.1), as token ids.

As in the ancestors: sentences are gathered until they fill a sequence, the gathered run is cut at random, and half of
the pairs are swapped. Unlike them: a document of one sentence is cut at a word instead of being dropped (sahajBERT) or
always labelled "in order" (CALM, which taught the head that short means ordered), and what is too short is counted.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from calm_ray.tables import DataTable
from calm_ray.training.tokenizer import SpecialIds

NUM_SPECIAL = 3
"""[CLS] first [SEP] second [SEP]"""

MIN_TOKENS = 8
"""A shorter run of tokens teaches neither head anything and still counts as a sample."""

_SENTENCE_END = re.compile("(?<=[.!?\u0964\u0965\u061f\u06d4\u2026])[\"'\u201d\u2019)\\]]*\\s+|\\n+")
"""Full stops, danda and double danda, Arabic question mark and full stop, ellipsis; then closing quotes."""
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[^\W\d_]|e\.g|i\.e|etc|vs|cf|Mr|Mrs|Dr|St|No)\.$")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence, not padded and not masked. The three lists have one length."""

    input_ids: list[int]
    token_type_ids: list[int]
    word_ids: list[int]
    """Number of the word that a token belongs to, from 0; -1 for special tokens."""

    is_swapped: bool


@dataclass(frozen=True)
class _Span:
    """Tokens with the number of each one's word, growing from left to right."""

    ids: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


def sequence_length_at(epoch: int, *, table: DataTable) -> int:
    """Return the sequence length in `epoch`: whole steps of a linear growth, full at the warm-up's last epoch."""
    warmup = table.sequence_warmup
    if warmup is None or epoch >= warmup.num_epochs:
        return table.sequence_length
    grown = (table.sequence_length - warmup.start_length) * max(0, epoch) // warmup.num_epochs
    return warmup.start_length + grown // warmup.length_step * warmup.length_step


def split_sentences(text: str) -> list[str]:
    """Split after sentence marks of Latin, Bengali and Arabic script and at line ends; keep single letters' dots."""
    sentences: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        if "\n" not in match.group() and _ABBREVIATION.search(text[start : match.start()]):
            continue
        sentences.append(text[start : match.end()].strip())
        start = match.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


class ExampleMaker:
    """Turns documents into examples; same seed and documents, same examples."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, special_ids: SpecialIds, rng: random.Random) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._special_ids = special_ids
        self._rng = rng
        self.num_skipped = 0
        """Runs of tokens too short to cut or to learn from, over this maker's life."""

    def examples(self, documents: Sequence[str], *, sequence_length: int) -> list[Example]:
        """Return the examples of `documents`, in order, none longer than `sequence_length` tokens."""
        split = [split_sentences(document) for document in documents]
        # One call for all sentences: the backend works in parallel, and a call for each would cost more than the work.
        encoded = iter(self._backend.encode_batch([s for ss in split for s in ss], add_special_tokens=False))
        made: list[Example] = []
        for sentences in split:
            spans = [_Span(e.ids, _numbered(e.word_ids)) for e in (next(encoded) for _ in sentences)]
            for chunk in _chunks(spans, max_tokens=sequence_length - NUM_SPECIAL):
                example = self._make(chunk, max_tokens=sequence_length - NUM_SPECIAL)
                if example is None:
                    self.num_skipped += 1
                else:
                    made.append(example)
        return made

    def _make(self, chunk: list[_Span], *, max_tokens: int) -> Example | None:
        if sum(map(len, chunk)) < min(MIN_TOKENS, max_tokens):
            return None
        cut = self._cut(chunk)
        if cut is None:
            return None
        first, second = truncate_longest_first(*cut, max_tokens=max_tokens)
        is_swapped = self._rng.random() < 0.5
        if is_swapped:
            first, second = second, first
        special = self._special_ids
        offset = first.words[-1] + 1
        return Example(
            input_ids=[special.cls, *first.ids, special.sep, *second.ids, special.sep],
            token_type_ids=[0] * (len(first) + 2) + [1] * (len(second) + 1),
            word_ids=[-1, *first.words, -1, *(word + offset for word in second.words), -1],
            is_swapped=is_swapped,
        )

    def _cut(self, chunk: list[_Span]) -> tuple[_Span, _Span] | None:
        """Cut between two sentences, or between two words if there is but one sentence; None if it is one word."""
        if len(chunk) > 1:
            position = self._rng.randint(1, len(chunk) - 1)
            return _joined(chunk[:position]), _joined(chunk[position:])
        span = chunk[0]
        starts = [i for i in range(1, len(span)) if span.words[i] != span.words[i - 1]]
        if not starts:
            return None
        position = self._rng.choice(starts)
        return _slice(span, 0, position), _slice(span, position, len(span))


def truncate_longest_first(first: _Span, second: _Span, *, max_tokens: int) -> tuple[_Span, _Span]:
    """Drop tokens from the ends, always of the longer segment, until both fit: tokenizers' `longest_first`."""
    excess = len(first) + len(second) - max_tokens
    if excess <= 0:
        return first, second
    half = max_tokens // 2
    if len(first) <= half:
        return first, _slice(second, 0, max_tokens - len(first))
    if len(second) <= max_tokens - half:
        return _slice(first, 0, max_tokens - len(second)), second
    return _slice(first, 0, half), _slice(second, 0, max_tokens - half)


def _chunks(spans: Iterable[_Span], *, max_tokens: int) -> Iterator[list[_Span]]:
    """Gather sentences until they fill a sequence. A sentence longer than one is cut first, or its rest were lost."""
    chunk: list[_Span] = []
    num_tokens = 0
    for span in spans:
        for piece in _pieces(span, max_tokens=max_tokens):
            chunk.append(piece)
            num_tokens += len(piece)
            if num_tokens >= max_tokens:
                yield chunk
                chunk, num_tokens = [], 0
    if chunk:
        yield chunk


def _pieces(span: _Span, *, max_tokens: int) -> Iterator[_Span]:
    for start in range(0, len(span), max_tokens):
        yield _slice(span, start, min(start + max_tokens, len(span)))


def _slice(span: _Span, start: int, stop: int) -> _Span:
    """Tokens from `start` to `stop`, their words numbered from 0 again."""
    words = span.words[start:stop]
    return _Span(span.ids[start:stop], [word - words[0] for word in words])


def _joined(spans: Iterable[_Span]) -> _Span:
    ids: list[int] = []
    words: list[int] = []
    for span in spans:
        offset = words[-1] + 1 if words else 0
        ids += span.ids
        words += [word + offset for word in span.words]
    return _Span(ids, words)


def _numbered(word_ids: Sequence[int | None]) -> list[int]:
    """Renumber the backend's word ids without gaps; a token of no word (None) is a word of its own."""
    numbers: list[int] = []
    previous: int | None = None
    for word in word_ids:
        is_new = word is None or word != previous
        numbers.append((numbers[-1] + is_new) if numbers else 0)
        previous = word
    return numbers
