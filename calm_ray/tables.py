"""The tables that `[run]` is made of. A sentence under each field says when to change it.

Types only; reading, hashing and error messages are in `config.py`.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


class Table(BaseModel):
    """Base of every table: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _types_are_meant(cls, value: object, info: ValidationInfo) -> object:
        """TOML has types, so `true` and `"40"` for a number are slips; pydantic alone would take them for 1 and 40.

        Its strict mode was rejected: it refuses TOML's arrays for tuples.
        """
        wanted = cls.model_fields[info.field_name or ""].annotation
        if wanted in (int, float, int | None, float | None) and isinstance(value, bool | str):
            raise ValueError("Input should be a number")
        if wanted is bool and not isinstance(value, bool):
            raise ValueError("Input should be true or false")
        return value


class ModelTable(Table):
    """The model's shape: an ALBERT, fields named as in `transformers.AlbertConfig`. Fixed once a run has started."""

    hidden_size: int = Field(ge=8)
    """Width of the transformer. Parameters and compute grow with its square."""

    num_hidden_layers: int = Field(ge=1)
    """Depth. Costs compute but no parameters: ALBERT's layers share theirs."""

    num_attention_heads: int = Field(ge=1)
    """Must divide `hidden_size`."""

    intermediate_size: int = Field(ge=8)
    """Width of the feed-forward block; four times `hidden_size` unless you have a reason."""

    embedding_size: int = Field(default=128, ge=8)
    """Width of the factorised token embeddings (ALBERT, section 3.1)."""

    num_hidden_groups: int = Field(default=1, ge=1)
    """Groups of layers that share parameters. More groups: more parameters, more bytes per round."""

    max_position_embeddings: int = Field(default=512, ge=8)
    """Longest sequence that the model can ever see."""

    dropout_probability: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout in hidden layers and attention. ALBERT trains best without on large corpora."""

    init_seed: int = Field(default=0, ge=0)
    """Seed of the initial weights: all peers of a new run start from the same ones."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


class TokenizerTable(Table):
    """Where the tokenizer comes from. It is made once, by the organiser, and travels in the run bundle."""

    source: Literal["train", "path", "hub"]
    """`train` a Unigram model on the run's own text, read a `path`, or fetch a Hub id."""

    vocab_size: int | None = Field(default=None, ge=64)
    """For `train`: the size asked for. A small corpus may yield fewer tokens."""

    path: str | None = None
    """For `path`: a folder with tokenizer.json, relative to the config file."""

    hub_id: str | None = None
    """For `hub`: a repository id such as `neuropark/sahajBERT`."""

    revision: str | None = None
    """For `hub`: a commit hash; pin it, or peers of one run may differ from the next."""

    max_training_documents: int = Field(default=1_000_000, ge=1)
    """For `train`: stop reading the corpus here; bounds memory (about 15 bytes for each byte of text)."""

    @model_validator(mode="after")
    def _source_has_its_field(self) -> Self:
        needed = {"train": "vocab_size", "path": "path", "hub": "hub_id"}[self.source]
        if getattr(self, needed) is None:
            raise ValueError(f'source = "{self.source}" needs `{needed}`')
        return self


class TextSource(Table):
    """One corpus of the mixture."""

    kind: Literal["builtin", "files", "hub"]
    """`builtin`: English prose that ships with Python; `files`: local text; `hub`: a data set id, streamed."""

    weight: float = Field(default=1.0, gt=0)
    """Share of documents drawn from this source, relative to the other sources' weights."""

    paths: tuple[str, ...] = ()
    """For `files`: paths or globs of UTF-8 text, one document per line or separated by blank lines (see `layout`)."""

    layout: Literal["line", "paragraph"] = "line"
    """For `files`: `line`: each line is a document; `paragraph`: documents are separated by blank lines."""

    in_bundle: bool = False
    """For `files`: put the text into the run bundle (small corpora only); otherwise every trainer needs the files
    under its own `[peer] data_root`."""

    dataset: str | None = None
    """For `hub`: the data set's id."""

    dataset_config: str | None = None
    """For `hub`: the data set's configuration name, such as a language."""

    split: str = "train"
    """For `hub`: the split to stream."""

    revision: str | None = None
    """For `hub`: a commit hash; pin it so that the data cannot change under the run."""

    text_field: str = "text"
    """For `hub`: the column that holds the text."""

    @model_validator(mode="after")
    def _kind_has_its_field(self) -> Self:
        if self.kind == "files" and not self.paths:
            raise ValueError('kind = "files" needs `paths`')
        if self.kind == "hub" and self.dataset is None:
            raise ValueError('kind = "hub" needs `dataset`')
        return self


class SequenceWarmup(Table):
    """Start with short sequences, lengthen them as the run goes on (CALM: 128 to 512 by 32 over 10,000 epochs)."""

    start_length: int = Field(ge=8)
    """Length at epoch 0, in tokens."""

    length_step: int = Field(ge=1)
    """The length grows by this many tokens at a time."""

    num_epochs: int = Field(ge=1)
    """Epoch at which the full `sequence_length` is reached."""


class DataTable(Table):
    """What the model reads, and how text becomes examples."""

    sources: tuple[TextSource, ...] = Field(min_length=1)
    """The mixture; weights are relative."""

    sequence_length: int = Field(ge=8)
    """Tokens per example, both segments and special tokens included."""

    sequence_warmup: SequenceWarmup | None = None
    """Omit it to train at full length from the start."""

    shuffle_buffer: int = Field(default=10_000, ge=1)
    """Documents held in memory to shuffle a stream. More memory, better mixing."""

    held_out_fraction: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of documents, chosen by a hash of their text, that no trainer ever sees: the evaluation's."""

    masking: Literal["token", "whole-word"] = "token"
    """Mask single tokens, or all tokens of a word together (harder, usually better)."""

    mask_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Share of tokens to predict; of these 80 % are masked, 10 % replaced, 10 % kept (BERT, section 3.1)."""


class OptimizerTable(Table):
    """The optimizer of the global step. One epoch is one step."""

    name: Literal["lamb", "adamw"]
    """LAMB for very large batches (4096 and up), AdamW below."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate, reached after `warmup_epochs`."""

    min_learning_rate: float = Field(default=0.0, ge=0)
    """Floor, in the same unit as `learning_rate`, reached at `decay_epochs` and held after it."""

    warmup_epochs: int = Field(default=0, ge=0)
    """Linear warm-up from zero."""

    decay_epochs: int = Field(ge=1)
    """Epoch at which the linear decay ends."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""

    eps: float = Field(default=1e-6, gt=0)
    """Added to the denominator."""

    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled; biases and layer norms are exempt."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Clip the *averaged* gradient to this norm, once per epoch."""

    @model_validator(mode="after")
    def _schedule_is_sane(self) -> Self:
        if self.decay_epochs <= self.warmup_epochs:
            raise ValueError(f"decay_epochs {self.decay_epochs} must exceed warmup_epochs {self.warmup_epochs}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError("min_learning_rate is greater than learning_rate")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        return self


class AveragingTable(Table):
    """How peers average with each other. The defaults suit the internet; `network = "lan"` suits one machine."""

    network: Literal["lan", "internet", "slow"] = "internet"
    """Where most peers are: one building, the internet, or lines under 10 Mbit/s. The start of all
    times: rounds that were measured to take longer stretch the limits of later ones."""

    matchmaking_seconds: float | None = Field(default=None, ge=0.5)
    """Look for a group this long at most. Omit it to take `network`'s."""

    averaging_timeout_seconds: float | None = Field(default=None, gt=0)
    """Give an all-reduce up after this long. Omit it: then it follows from the parameters' bytes and the bandwidth."""

    compression: Literal["none", "fp16", "8bit"] = "fp16"
    """Of gradients on the wire: 4, 2 or 1 byte per parameter. State is always averaged in 32 bits."""

    max_staleness: Literal[0, 1] = 1
    """1: trainers go on computing while the last epoch's gradients are averaged, so some samples of an epoch were
    computed with the parameters before. 0: everyone waits for the average; exact, and slower."""

    offload_optimizer: bool = True
    """Keep the optimizer and a copy of the parameters in main memory (16 bytes per parameter with AdamW). False saves
    4 of them, and needs a CPU trainer and `max_staleness = 0`."""

    average_state_every: int = Field(default=10, ge=1)
    """Average parameters every so many epochs if peers' sketches of them differ at all. Costs a second round then."""

    @model_validator(mode="after")
    def _timeout_outlasts_matchmaking(self) -> Self:
        timeout, matchmaking = self.averaging_timeout_seconds, self.matchmaking_seconds
        if timeout is not None and matchmaking is not None and timeout <= matchmaking:
            raise ValueError("averaging_timeout_seconds must be greater than matchmaking_seconds")
        if not self.offload_optimizer and self.max_staleness:
            raise ValueError("offload_optimizer = false needs max_staleness = 0: there is only one set of parameters")
        return self
