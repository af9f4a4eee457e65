"""The tokenizer: trained once by the organiser (Unigram, as sahajBERT did), or brought along, checked, and loaded.

It is not trained on each machine because training is not deterministic. All rules live in the tokenizers library's own
normalizer, so they travel in tokenizer.json and a reader of the model needs none of our code.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from calm_ray.errors import ConfigError

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
"""In the order of their ids, 0 to 4: sahajBERT's, so that ids mean the same in both."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "*.model")

_TRAINING_BATCH = 1000
"""Documents handed over at a time: one by one, Python would be the bottleneck."""


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Ids of the tokens with a meaning of their own."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def train_tokenizer(documents: Iterable[str], *, vocab_size: int, max_documents: int) -> PreTrainedTokenizerFast:
    """Train a Unigram tokenizer on at most `max_documents` of `documents`.

    The vocabulary may come out smaller than `vocab_size` when the text has too few pieces: use `len(tokenizer)`. Raise
    ConfigError when there is no text at all, or too little to train upon.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    # lstrip takes the space before [MASK] with it; a lone "▁" token would stand there otherwise.
    mask = AddedToken(MASK, lstrip=True, special=True, normalized=False)
    # Without unk_token here, an unseen character raises at encoding time (sahajBERT patched its tokenizer.json).
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL_TOKENS[:-1], mask], unk_token=UNK, show_progress=False
    )
    counted = _Counted(islice(documents, max_documents))
    try:
        tokenizer.train_from_iterator(_batches(counted), trainer=trainer)
    except Exception as exc:  # the library raises bare Exception; a panic of its Rust side is not one, and passes
        if counted.num_documents:
            raise ConfigError(f"tokenizer.vocab_size {vocab_size}: training failed on this corpus: {exc}") from exc
    if not counted.num_documents:
        raise ConfigError("tokenizer: the run's sources have no text to train on; check [[run.data.sources]]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(CLS, tokenizer.token_to_id(CLS)), (SEP, tokenizer.token_to_id(SEP))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        cls_token=CLS,
        sep_token=SEP,
        mask_token=mask,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer in a folder; raise ConfigError that names the folder if that cannot be.

    An older one without tokenizer.json is converted; saved again, it has one.
    """
    if not any(file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)):
        raise ConfigError(f"{path}: no tokenizer.json there; name a folder that holds one (see tokenizer.path)")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as exc:  # transformers raises OSError, ValueError, KeyError, ImportError or a bare Exception here
        raise ConfigError(f"{path}: cannot be loaded as a tokenizer: {exc}") from exc
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"{path}: not a fast tokenizer; convert it and save tokenizer.json")
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, *, vocab_size: int, where: str) -> SpecialIds:
    """Return the special ids of a tokenizer that fits a model of `vocab_size`; raise ConfigError if it does not fit.

    `where` names the tokenizer in the message: a folder or a Hub id.
    """
    ids = {
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
        "cls": tokenizer.cls_token_id,
        "sep": tokenizer.sep_token_id,
        "mask": tokenizer.mask_token_id,
    }
    missing = [name for name, token_id in ids.items() if token_id is None]
    if missing:
        raise ConfigError(
            f"{where}: tokenizer has no {', '.join(f'{name}_token' for name in missing)}; masked-language modelling "
            'needs all of pad, unk, cls, sep and mask: add them to tokenizer_config.json, or use source = "train"'
        )
    if len(set(ids.values())) < len(ids):
        raise ConfigError(f"{where}: two of pad, unk, cls, sep and mask are the same token ({ids}); give each its own")
    top = max(tokenizer.get_vocab().values())
    if top >= vocab_size:
        raise ConfigError(
            f"{where}: token id {top} is beyond the model's vocabulary of {vocab_size}; it was made for "
            "another tokenizer: make the run bundle again"
        )
    return SpecialIds(**ids)


def ordinary_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that a random replacement may draw: all but the special tokens."""
    special = set(tokenizer.all_special_ids)
    return sorted(token_id for token_id in tokenizer.get_vocab().values() if token_id not in special)


def _normalizer() -> normalizers.Normalizer:
    """sahajBERT's rules with two changes for runs in other scripts, and CALM's two Arabic ones.

    Changed: a pipe becomes a danda only after a Bengali letter, where it is a typing habit, not everywhere. Added:
    tatweel and short vowels go (CALM's cleaner, less its digit and letter damage).
    """
    return normalizers.Sequence(
        [
            normalizers.Nmt(),
            normalizers.NFKC(),
            normalizers.Replace(Regex("[\u0640\u064b-\u0652]"), ""),
            normalizers.Replace("\u09e4", "\u0964"),
            normalizers.Replace("\u09e5", "\u0965"),
            normalizers.Replace("\u09f7", "\u0964"),
            normalizers.Replace(Regex(r"(?<=[\u0980-\u09ff]) ?\|"), "\u0964"),
            normalizers.Replace(Regex(r"(?<=[\u0980-\u09ff]):"), "\u0983"),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Lowercase(),
        ]
    )


class _Counted:
    """Iterate over documents and remember how many there were: an empty corpus trains to an empty vocabulary."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents = documents
        self.num_documents = 0

    def __iter__(self) -> Iterator[str]:
        for document in self._documents:
            self.num_documents += 1
            yield document


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, _TRAINING_BATCH)):
        yield batch
