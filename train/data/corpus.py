"""What a run is trained on: the token shards of its corpus, whatever the configuration names.

Text is tokenized once, into a cache that the run's later starts read; a directory of token shards is read as
it is. Several ``paths`` are one corpus, or with ``weights`` a mixture of one corpus a path.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data.documents import Source, find_sources, read_documents
from train.data.holdout import choose_threshold, digest, is_held_out
from train.data.lock import locked
from train.data.shard_writer import LOG
from train.data.shards import VERSION, Joined, TokenShards, Values, is_shards
from train.data.tokenize import Progress, tokenize
from train.data.tokenizer import (
    FILE_NAME,
    Tokenizer,
    check_fitted_size,
    check_vocabulary,
    fit_bpe,
    load_tokenizer,
)
from train.errors import UserError

if TYPE_CHECKING:
    from train.config import DataConfig

_FIT_CHARACTERS = 1 << 30  # a tokenizer is fitted on so much text at most

Say = Callable[[str], None]
Group = TokenShards | list[Source]


@dataclasses.dataclass(frozen=True)
class Heldout:
    """Text that is not trained on.

    Attributes:
      ids: tokens of the documents, each followed by EOS.
      sizes: the UTF-8 bytes that each token stands for.
    """

    ids: Values
    sizes: Values


@dataclasses.dataclass(frozen=True)
class Stream:
    """What windows are cut from: one corpus of a mixture, or all there is.

    Attributes:
      train: tokens of the training documents, each followed by EOS.
      heldout: the rest.
    """

    train: Values
    heldout: Heldout


@dataclasses.dataclass(frozen=True)
class CorpusIdentity:
    """What tells a corpus from another, small enough for every checkpoint.

    Attributes:
      fingerprint: SHA-256 of the documents' content and order, and of a mixture's weights. The files that
        hold them, their names and their compression make no difference.
      threshold: documents whose hash lies under it are held out (`holdout.is_held_out`).
      documents: on both sides.
      tokens: of the training documents.
      heldout_tokens: of the held-out documents.
    """

    fingerprint: str
    threshold: int
    documents: int
    tokens: int
    heldout_tokens: int

    def __str__(self) -> str:
        return describe(self.documents, self.fingerprint)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus as tokens, open for reading.

    Attributes:
      tokenizer: made the tokens.
      streams: what windows are cut from.
      weights: share of each stream in the windows.
      identity: which corpus it is.
    """

    tokenizer: Tokenizer
    streams: tuple[Stream, ...]
    weights: tuple[float, ...]
    identity: CorpusIdentity

    @property
    def heldout(self) -> tuple[Heldout, ...]:
        """Held-out text of each stream."""
        return tuple(stream.heldout for stream in self.streams)


def describe(documents: int, fingerprint: str) -> str:
    """A corpus in the words of a message."""
    return f"{documents:,} documents with fingerprint {fingerprint[:12]}"


def choose_tokenizer(
    config: "DataConfig", vocab_size: int, cache: Path, *, say: Say = lambda sentence: None
) -> Tokenizer:
    """The tokenizer that a configuration names, for a model of ``vocab_size`` ids.

    ``"bpe"`` is the one that token shards bring, or is fitted to the training documents and kept in the
    cache.

    Args:
      config: which tokenizer and files.
      vocab_size: ids of the model.
      cache: directory for a tokenizer that is fitted; made when it is needed.
      say: told what takes time, and what of a tokenizer's file is not taken over.

    Raises:
      UserError: there is no such tokenizer, the corpus is bad, or the model's vocabulary is too small.
      OSError: the cache cannot be written to.
    """
    groups = find_groups(config)
    if config.tokenizer != "bpe":
        tokenizer = load_tokenizer(config.tokenizer)
    elif isinstance(groups[0], TokenShards):
        tokenizer = load_tokenizer(groups[0].directory)
    else:
        tokenizer = _fitted(config, vocab_size, _all_sources(groups), cache, say)
    for note in tokenizer.notes:
        say(note)
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def open_corpus(
    config: "DataConfig",
    tokenizer: Tokenizer,
    cache: Path,
    *,
    threshold: int | None = None,
    on_progress: Progress | None = None,
    say: Say = lambda sentence: None,
) -> Corpus:
    """Opens the corpus that a configuration names; tokenizes its text first if the cache does not have it.

    Several processes may do so at a time: one tokenizes, the others wait for it.

    Args:
      config: which files and share of held-out documents.
      tokenizer: of the model.
      cache: directory for what is made from text; made when it is needed.
      threshold: of a run that is resumed with a changed corpus; by default chosen for ``config.holdout``.
      on_progress: as in ``tokenize``.
      say: told what takes time.

    Raises:
      UserError: there is no such corpus, it is bad, or its shards do not fit tokenizer or ``config``.
      OSError: the cache cannot be written to.
    """
    groups = find_groups(config)
    if isinstance(groups[0], TokenShards):
        parts = [group for group in groups if isinstance(group, TokenShards)]
        _check_shards(parts, config, tokenizer)
        return _joined(parts, tokenizer, config.weights)
    everything = _all_sources(groups)
    parts = []
    for number, group in enumerate(groups):
        assert not isinstance(group, TokenShards)
        directory = cache / f"tokens-{_key(config, everything, [number, tokenizer.fingerprint, threshold])}"
        if not is_shards(directory):
            say(f"tokenizing the corpus, once for all starts with it, into {directory}")
            tokenize(
                group,
                tokenizer,
                directory,
                text_field=config.text_field,
                holdout=config.holdout,
                threshold=threshold or choose_split(config, everything),
                wait=True,
                on_progress=on_progress,
            )
        parts.append(TokenShards(directory))
    return _joined(parts, tokenizer, config.weights)


def joined_fingerprint(fingerprints: Sequence[str], weights: Sequence[float]) -> str:
    """Fingerprint of a corpus of several."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256(json.dumps([list(fingerprints), list(weights)]).encode()).hexdigest()


def find_groups(config: "DataConfig") -> list[Group]:
    """The corpora that ``config.paths`` are: each directory of token shards, and the files of documents
    together or, in a mixture, those of each path.

    Raises:
      UserError: there is no path and there must be one, a path names no file or unfinished shards, or some
        name text and others token shards.
    """
    if config.require_paths and not config.paths:
        raise UserError(
            "data.paths must name the corpus to train on, as the one that comes with the package is too "
            "small for this model; got none: pass --data.paths, or --data.no-require-paths to take it anyway"
        )
    for path in config.paths:
        if (Path(path).expanduser() / LOG).exists():
            raise UserError(
                f"{path} holds token shards that are not finished: run the same sparse-lm tokenize again, "
                "which goes on where it stopped"
            )
    kinds = {is_shards(path) for path in config.paths}
    if kinds == {True, False}:
        raise UserError(
            "data.paths must name either files of documents or directories of token shards; got both: make "
            "token shards of the documents with sparse-lm tokenize"
        )
    if kinds == {True}:
        return [TokenShards(path) for path in config.paths]
    if config.weights:
        return [find_sources([path]) for path in config.paths]
    return [find_sources(config.paths)]


def choose_split(config: "DataConfig", sources: Sequence[Source]) -> int:
    """The threshold under which documents are held out; see `holdout.choose_threshold`."""
    documents = read_documents(sources, config.text_field)
    return choose_threshold((document.text for document in documents), config.holdout)


def fit_tokenizer(
    config: "DataConfig", vocab_size: int, sources: Sequence[Source], threshold: int
) -> Tokenizer:
    """A byte-level BPE of ``vocab_size`` ids, fitted on the training documents: on the first GiB of them.

    Raises:
      UserError: the corpus is bad or the vocabulary too small.
    """

    def texts() -> Any:
        characters = 0
        for document in read_documents(sources, config.text_field):
            if not is_held_out(digest(document.text), threshold):
                yield document.text
                characters += len(document.text)
                if characters >= _FIT_CHARACTERS:
                    return

    return fit_bpe(texts(), vocab_size)


def _all_sources(groups: Sequence[Group]) -> list[Source]:
    return [source for group in groups if not isinstance(group, TokenShards) for source in group]


def _check_shards(parts: Sequence[TokenShards], config: "DataConfig", tokenizer: Tokenizer) -> None:
    for part in parts:
        index = part.index
        if index.tokenizer != tokenizer.fingerprint:
            raise UserError(
                f"{part.directory} was tokenized with another tokenizer, fingerprint {index.tokenizer[:12]} "
                f"where {tokenizer.fingerprint[:12]} is wanted: make it again with that one, or "
                f"pass its own, --data.tokenizer {part.directory / FILE_NAME}"
            )
        if index.holdout != config.holdout:
            raise UserError(
                f"{part.directory} holds out {index.holdout} of its documents, and data.holdout is "
                f"{config.holdout}: pass --data.holdout {index.holdout}"
            )


def _fitted(
    config: "DataConfig", vocab_size: int, sources: Sequence[Source], cache: Path, say: Say
) -> Tokenizer:
    check_fitted_size(vocab_size)
    directory = cache / f"bpe-{_key(config, sources, [vocab_size])}"
    if not (directory / FILE_NAME).is_file():
        threshold = choose_split(config, sources)  # raises for a bad corpus before the directory is made
        with locked(directory, wait=True):
            if not (directory / FILE_NAME).is_file():  # nor made by a process that was waited for
                say(f"fitting a tokenizer of {vocab_size:,} ids to the corpus")
                fit_tokenizer(config, vocab_size, sources, threshold).save(directory)
    return load_tokenizer(directory)


def _key(config: "DataConfig", sources: Sequence[Source], also: list[Any]) -> str:
    """Names what is made from files as they are now: a file of another size or date is another one."""
    files = [_stamp(source) for source in sources]
    settings = [VERSION, files, config.text_field, config.holdout, also]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _stamp(source: Source) -> list[Any]:
    if not isinstance(source.file, Path):  # of the package, in an archive
        return [source.name]
    try:
        status = os.stat(source.file)
    except OSError as error:
        raise UserError(
            f"data.paths must name files; there is no file {source.name}: check the path"
        ) from error
    return [str(source.file.absolute()), status.st_size, status.st_mtime_ns]


def _joined(parts: Sequence[TokenShards], tokenizer: Tokenizer, weights: tuple[float, ...]) -> Corpus:
    thresholds = {part.index.threshold for part in parts}
    if len(thresholds) > 1:
        raise UserError(
            "all token shards of a run must hold out the same documents; found different thresholds: make "
            "them again with one --data.holdout, small corpora together with large ones"
        )
    streams = [Stream(part.train, Heldout(part.heldout, part.heldout_sizes)) for part in parts]
    if not weights:
        ids, sizes = (Joined([getattr(each.heldout, name) for each in streams]) for name in ("ids", "sizes"))
        streams = [Stream(Joined([each.train for each in streams]), Heldout(ids, sizes))]
    identity = CorpusIdentity(
        fingerprint=joined_fingerprint([part.index.fingerprint for part in parts], weights),
        threshold=thresholds.pop(),
        documents=sum(part.index.documents for part in parts),
        tokens=sum(part.index.tokens for part in parts),
        heldout_tokens=sum(part.index.heldout_tokens for part in parts),
    )
    return Corpus(tokenizer, tuple(streams), weights or (1.0,), identity)
