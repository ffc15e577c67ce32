"""Documents to token shards: in parallel, and taken up where it stopped.

One process reads the documents and cuts them into chunks, others encode the chunks, and the first appends
what they return to the shards, in order.
"""

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from train.data.documents import Document, Source, read_documents, size_of
from train.data.holdout import digest, is_held_out
from train.data.lock import locked
from train.data.shard_writer import Encoded, ShardWriter
from train.data.shards import VERSION, Index, is_shards, read_index
from train.data.tokenizer import EncodingError, Tokenizer, token_dtype
from train.errors import UserError

_CHUNK_CHARACTERS = 1 << 21

Progress = Callable[[int, int, int], None]


def tokenize(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    out: Path,
    *,
    text_field: str,
    holdout: float,
    threshold: int,
    processes: int = 0,
    wait: bool = False,
    on_progress: Progress | None = None,
) -> Index:
    """Makes a directory of token shards, or finishes one that was begun from the same documents.

    Args:
      sources: files of documents.
      tokenizer: encodes them.
      out: the directory; made if it is not there.
      text_field: field of a document that holds its text.
      holdout: share of the documents that was asked to be held out, for the index.
      threshold: from ``holdout.choose_threshold``.
      processes: that encode; 0 encodes in this one, on the threads that the tokenizer's library has.
      wait: for another process that writes the same directory, and take what it made.
      on_progress: told after every chunk the bytes of the files that are read, those that there are, and the
        tokens written.

    Raises:
      UserError: a document cannot be used or encoded, or the directory holds something else.
      OSError: the directory cannot be made or written to.
    """
    total = size_of(sources)
    settings = {
        "version": VERSION,
        "tokenizer": tokenizer.fingerprint,
        "text_field": text_field,
        "threshold": threshold,
    }
    position = 0

    def read_to(count: int) -> None:
        nonlocal position
        position = count

    documents = read_documents(sources, text_field, on_file_read=read_to)
    fingerprint = hashlib.sha256()
    first = next(documents, None)  # raises for a bad first file before the directory is made
    if first is None:
        raise UserError("the corpus must hold documents; found only empty ones: add files")
    chunks = _chunks(itertools.chain([first], documents))
    with locked(out, wait=wait):
        if is_shards(out):  # made by the process that was waited for
            return read_index(out)
        with ShardWriter(out, settings, token_dtype(tokenizer.vocab_size)) as writer:
            for line in writer.begin(tokenizer):
                digests = b"".join(digest(document.text) for document in next(chunks, []))
                if hashlib.sha256(digests).hexdigest() != line["digest"]:
                    raise UserError(
                        f"{out} was begun from other documents, or in another order: restore them, or choose "
                        "another directory"
                    )
                fingerprint.update(digests)
            for encoded in _encode(chunks, tokenizer, threshold, processes):
                fingerprint.update(encoded.digests)
                writer.append(encoded)
                if on_progress is not None:
                    on_progress(position, total, writer.tokens)
            index = Index(
                fingerprint=fingerprint.hexdigest(),
                tokenizer=tokenizer.fingerprint,
                holdout=holdout,
                threshold=threshold,
                documents=writer.documents,
                text_bytes=writer.text_bytes,
                dtype=np.dtype(token_dtype(tokenizer.vocab_size)).name,
                train=tuple(writer.counts["train"]),
                heldout=tuple(writer.counts["heldout"]),
                sources=tuple(source.path for source in sources),
            )
            writer.finish(index)
    return index


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer, threshold: int) -> Encoded:
    """Encodes a chunk of documents.

    Raises:
      UserError: names the document that the tokenizer has no tokens for.
    """
    digests = [digest(document.text) for document in documents]
    sides: dict[bool, list[Document]] = {False: [], True: []}
    for document, found in zip(documents, digests, strict=True):
        sides[is_held_out(found, threshold)].append(document)
    heldout = [encode_measured(document, tokenizer) for document in sides[True]]
    return Encoded(
        digests=b"".join(digests),
        text_bytes=sum(len(document.text.encode()) for document in documents),
        train=with_eos(_ids(sides[False], tokenizer), tokenizer),
        heldout=with_eos([ids for ids, _ in heldout], tokenizer),
        heldout_sizes=np.concatenate([np.zeros(0, np.uint32), *(sizes for _, sizes in heldout)]),
    )


def _ids(documents: Sequence[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    try:
        return tokenizer.encode_batch([document.text for document in documents])
    except EncodingError:
        for document in documents:
            with _naming(document):
                tokenizer.encode(document.text)
        raise


def encode_measured(document: Document, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a document, and the UTF-8 bytes that each of them and the EOS behind them stand for: uint32."""
    with _naming(document):
        ids, added = tokenizer.encode_measured(document.text)
    # EOS stands for what its document's tokens leave over, as a tokenizer that trims white space does.
    rest = len(document.text.encode()) - added.sum()
    return ids, np.append(added, rest).astype(np.uint32)


@contextlib.contextmanager
def _naming(document: Document) -> Iterator[None]:
    try:
        yield
    except EncodingError as error:
        raise UserError(f"{document.where}: {error}") from error


def with_eos(documents: Sequence[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    """All documents in order, each followed by EOS, of the smallest unsigned type that holds the ids."""
    count = sum(map(len, documents)) + len(documents)
    joined = np.full(count, tokenizer.eos_id, token_dtype(tokenizer.vocab_size))
    start = 0
    for ids in documents:
        joined[start : start + len(ids)] = ids
        start += len(ids) + 1
    return joined


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode(
    chunks: Iterator[list[Document]], tokenizer: Tokenizer, threshold: int, processes: int
) -> Iterator[Encoded]:
    """Every chunk encoded, in order."""
    if not processes:
        for chunk in chunks:
            yield encode_documents(chunk, tokenizer, threshold)
        return
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, threshold),
    )
    try:
        running: deque[Any] = deque()
        for chunk in chunks:
            running.append(pool.submit(_encode_in_worker, chunk))
            if len(running) > 2 * processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that encodes died, most likely because the memory was full: run the same command "
            "again, with fewer --processes; it goes on where it stopped"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Tokenizer, int] | None = None  # of a process of the pool


def _start_worker(tokenizer: Tokenizer, threshold: int) -> None:
    global _worker
    # One thread a process: the processes are as many as the cores.
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches every process of the terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = tokenizer, threshold


def _end_with_parent() -> None:
    """A process of the pool would wait for work for ever after the first one was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: list[Document]) -> Encoded:
    assert _worker is not None
    return encode_documents(chunk, *_worker)
