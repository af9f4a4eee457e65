"""English prose that ships with Python: the language reference, as `pydoc_data.topics` holds it.

It is the demo's corpus, because it needs no download and is there on every machine. But it differs between Python
versions, so only the organiser reads it, once, into the run bundle; no trainer calls this module.

The text is Sphinx's plain-text output: prose between headings, grammar, code, tables and lists. Blocks that do not read
as English sentences are dropped, because a model of this size would spend its capacity on asterisks.
"""

import re
from collections.abc import Iterator

DOCUMENT_CHARS = 500
"""Consecutive paragraphs of a topic are joined until a document has this many characters, about two sequences."""

_MIN_WORDS = 6
_MIN_PROSE_SHARE = 0.88
"""Share of letters, spaces and plain punctuation. Code and tables lie below 0.85, paragraphs that quote code above."""

_FUNCTION_WORDS = re.compile(r"\b(the|a|an|is|are|of|to|in|be|and|or|that)\b")
_NOT_PROSE = re.compile(r"::=|>>>|\w = |^\s*[+|]|^\s*(=|-|\*|~){3,}\s*$", re.MULTILINE)
_LIST_MARK = re.compile(r"^([*-]|\d+\.|\[\d+\])\s+")
_EMPHASIS = re.compile(r"\*+([^*]+)\*+")
_FOOTNOTE = re.compile(r"\s\[\d+\]")


def builtin_documents() -> Iterator[str]:
    """Yield documents of several sentences, each one line, in a fixed order, none twice."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics):
        yield from _join(_fresh_paragraphs(topics[name], seen))


def clean_paragraph(block: str) -> str | None:
    """Return the block as one line of prose, or None if it is a heading, grammar, code, a table or a fragment."""
    if _NOT_PROSE.search(block):
        return None
    text = _LIST_MARK.sub("", " ".join(block.split()))
    text = _EMPHASIS.sub(r"\1", _FOOTNOTE.sub("", text)).replace('"', "").replace("`", "")
    if len(text.split()) < _MIN_WORDS or not text[0].isalnum() or text[-1] not in ".:!?)":
        return None
    if len(_FUNCTION_WORDS.findall(text)) < 2:
        return None
    plain = sum(character.isalpha() or character in " ,.'()" for character in text)
    return text if plain / len(text) >= _MIN_PROSE_SHARE else None


def _fresh_paragraphs(topic: str, seen: set[str]) -> Iterator[str]:
    """Topics overlap; a paragraph in two documents could stand on both sides of the held-out split."""
    for block in re.split(r"\n\s*\n", topic):
        text = clean_paragraph(block)
        if text is not None and text not in seen:
            seen.add(text)
            yield text


def _join(paragraphs: Iterator[str]) -> Iterator[str]:
    parts: list[str] = []
    for paragraph in paragraphs:
        parts.append(paragraph)
        if sum(map(len, parts)) >= DOCUMENT_CHARS:
            yield " ".join(parts)
            parts = []
    if parts:
        yield " ".join(parts)
