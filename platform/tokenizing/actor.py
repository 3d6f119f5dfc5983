"""The actor of the tokenizing job. A task is a window: documents of some shards are encoded, shuffled, packed, written.

Texts and pictures are prepared by threads while the image tokenizer works on its device; both of their libraries let
other threads run. What comes out depends on the window alone, not on how these meet.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calumma.model.document import Document, Image, Text
from calumma.model.encoding import DocumentEncoder, EncodedArrays
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.cluster.tasks import batched
from calumma.platform.shards import documents as document_shards
from calumma.platform.shards import tokens as token_shards
from calumma.platform.shards.receipts import Receipt
from calumma.platform.shards.tokens import PackedRow
from calumma.platform.storage import publishing
from calumma.platform.storage.manifest import FileEntry
from calumma.platform.tokenizing.packing import ImageTooLong, pack, split
from calumma.platform.tokenizing.specification import TokenizeSpecification

if TYPE_CHECKING:
    import torch

# Documents whose texts one thread encodes: at least so many, of so many characters together; not more than.
LEAST_DOCUMENTS, LEAST_CHARACTERS, MOST_DOCUMENTS = 64, 1 << 18, 8192
_WRITER_THREADS = 4  # shards of a window written at once
KNOWN_IMAGES = 16_384  # images of a window whose codes are kept, the last ones met: some kilobytes each


class UnusableDocuments(ValueError):
    """Curated documents that cannot become tokens."""


@dataclass
class _DocumentBatch:
    """Documents that are being encoded, in order."""

    uri: str
    documents: list[Document]
    texts: Future[list[NDArray[np.int32]]]
    images: list[_CodedImage] = field(default_factory=list)
    uncoded: int = 0


@dataclass(eq=False)
class _CodedImage:
    """A picture that is coded once, wherever it stands; ids: None until then. waiting: whose it is meanwhile."""

    ids: NDArray[np.int32] | None = None
    waiting: list[_DocumentBatch] = field(default_factory=list)


class _InlineExecutor(Executor):
    """Runs a call at once, in the caller's thread: two threads on one core only drive each other's data out of its
    cache, which costs a tenth of the time of short texts."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class TokenizingActor:
    """What an actor holds: the tokenizers, read once. Calling it does one window."""

    def __init__(self, specification: dict[str, Any]) -> None:
        self._spec = spec = TokenizeSpecification.model_validate(specification)
        device = "cuda" if spec.resources.gpus_per_worker else "cpu"
        self._threads = max(1, int(spec.resources.cpus_per_worker))
        text, image = spec.locate(spec.text_tokenizer), spec.locate(spec.image_tokenizer)
        with storage.local_copy(text) as text_path, storage.local_copy(image) as image_path:
            self._encoder = DocumentEncoder(
                Vocabulary.read(text_path), TextTokenizer.read(text_path), ImageTokenizer.read(image_path, device)
            )
        vocabulary = self._encoder.vocabulary
        self._is_image = np.zeros(vocabulary.size, np.bool_)
        self._is_image[vocabulary.image_ids] = True

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Encode, pack and write the documents of some shards. Raises UnusableDocuments, ShardError, StorageError.

        `task`: "shards" (URI and sha256 of each), "seed" (of its order), "output" (URI), "shard_prefix", "receipt"
        (URI). Returns a Receipt, written to storage, too.
        """
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            receipt = self._window(task)
        finally:
            torch.set_num_threads(threads)  # it may be a notebook's process
        storage.write_bytes(task["receipt"], receipt.model_dump_json().encode())
        return receipt.model_dump(mode="json")

    def _window(self, task: dict[str, Any]) -> Receipt:
        spec, vocabulary = self._spec, self._encoder.vocabulary
        length = spec.context + 1
        counts: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        sequences: list[EncodedArrays] = []
        documents = 0
        for document, tokens in encode_documents(self._encoder, task["shards"], spec.image_batch, self._threads):
            documents += 1
            if len(tokens.ids) <= length:
                sequences.append(tokens)
                continue
            pieces = split_or_drop(tokens, document.is_conversation, length, vocabulary)
            if isinstance(pieces, str):
                dropped[pieces] += 1
            else:
                counts["split"] += 1
                sequences += pieces
        random = np.random.default_rng(task["seed"])
        sequences = [sequences[i] for i in random.permutation(len(sequences))]
        rows = pack(sequences, length, vocabulary.pad, alone=spec.packing == "off")
        rows = [rows[i] for i in random.permutation(len(rows))]
        counts["documents"] = documents
        counts["sequences"] = len(sequences)
        counts["padding"] = sum(row.padding for row in rows)
        counts["trained"] = sum(row.trained for row in rows)

        def write(numbered: tuple[int, list[PackedRow]]) -> FileEntry:
            number, shard = numbered
            return self._write(task["output"], publishing.shard_name(task["shard_prefix"], number), shard)

        with ThreadPoolExecutor(_WRITER_THREADS) as pool:
            size = spec.micro_batch * spec.micro_batches_per_shard
            files = list(pool.map(write, enumerate(batched(rows, size))))
        return Receipt(files=files, counts=counts, dropped=dropped)

    def _write(self, output: str, path: str, rows: Sequence[PackedRow]) -> FileEntry:
        data = token_shards.to_parquet(rows, self._spec.micro_batch)
        storage.write_bytes(storage.join(output, path), data)
        image = sum(int(np.count_nonzero(self._is_image.take(row.tokens))) for row in rows)
        return FileEntry.from_bytes(
            path,
            data,
            rows=len(rows),
            row_groups=-(-len(rows) // self._spec.micro_batch),
            # Without padding: image codes, and everything else (text and special tokens) as text.
            tokens={"text": sum(len(row.tokens) - row.padding for row in rows) - image, "image": image},
            sequences_per_row_group=self._spec.micro_batch,
            footer=token_shards.footer_digest(data),
        )


def encode_documents(
    encoder: DocumentEncoder, shards: Sequence[tuple[str, str]], image_batch: int, threads: int
) -> Iterator[tuple[Document, EncodedArrays]]:
    """Every document of some shards with its tokens, in order; the images of all documents are coded in batches of
    `image_batch` (the last one smaller), equal ones once. Raises UnusableDocuments, ShardError and StorageError."""
    chunks: deque[_DocumentBatch] = deque()
    uncoded: deque[tuple[_DocumentBatch, Image, _CodedImage]] = deque()
    opened: deque[tuple[_DocumentBatch, Future[torch.Tensor], _CodedImage]] = deque()
    known: OrderedDict[bytes, _CodedImage] = OrderedDict()
    met = 0  # images since some were coded, known ones too: what waits for them is held
    pool = ThreadPoolExecutor(threads)
    texts = pool if threads > 1 else _InlineExecutor()

    def add_image(chunk: _DocumentBatch, image: Image) -> None:
        nonlocal met
        met += 1
        key = image.key()
        coded = known.get(key)
        if coded is None:
            coded = known[key] = _CodedImage()
            uncoded.append((chunk, image, coded))
            if len(known) > KNOWN_IMAGES:
                known.popitem(last=False)
        else:
            known.move_to_end(key)
        chunk.images.append(coded)
        if coded.ids is None:
            coded.waiting.append(chunk)
            chunk.uncoded += 1

    def open_images() -> None:
        while uncoded and len(opened) < 2 * image_batch:  # those of the next batch, and of the one after it
            chunk, image, coded = uncoded.popleft()
            opened.append((chunk, pool.submit(encoder.pixels, image), coded))

    def code() -> None:
        nonlocal met
        met = 0
        batch = [opened.popleft() for _ in range(min(image_batch, len(opened)))]
        open_images()
        ids = encoder.code([_result(chunk, pixels) for chunk, pixels, _ in batch])
        for (_, _, coded), each in zip(batch, ids, strict=True):
            coded.ids = each
            for chunk in coded.waiting:
                chunk.uncoded -= 1
            coded.waiting.clear()

    def assembled() -> Iterator[tuple[Document, EncodedArrays]]:
        chunk = chunks.popleft()
        tokens = encoder.assemble(chunk.documents, _result(chunk, chunk.texts), map(_ids, chunk.images))
        yield from zip(chunk.documents, tokens, strict=True)

    try:
        for uri, sha256 in shards:
            for documents in _batches(document_shards.read_shard(uri, sha256)):
                chunk = _DocumentBatch(uri, documents, texts.submit(encoder.text_ids, documents))
                chunks.append(chunk)
                for document in documents:
                    for image in document.images:
                        add_image(chunk, image)
                open_images()
                while len(uncoded) + len(opened) >= 2 * image_batch or (opened and met >= 4 * image_batch):
                    code()
                while chunks and not chunks[0].uncoded and (chunks[0].texts.done() or len(chunks) > 2 * threads):
                    yield from assembled()
        while chunks:
            while chunks[0].uncoded:
                code()
            yield from assembled()
    finally:
        pool.shutdown(cancel_futures=True)


def _ids(coded: _CodedImage) -> NDArray[np.int32]:
    assert coded.ids is not None
    return coded.ids


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Runs of documents: a few where there are images, which wait there undecoded; many short texts, since the calls,
    and what their data drive out of the processor's cache, would take as long as some of the texts."""
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        for segment in document.segments:
            characters += len(segment.text) if isinstance(segment, Text) else LEAST_CHARACTERS
        if len(chunk) >= MOST_DOCUMENTS or (len(chunk) >= LEAST_DOCUMENTS and characters >= LEAST_CHARACTERS):
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _result(chunk: _DocumentBatch, future: Future[Any]) -> Any:
    try:
        return future.result()
    except ValueError as error:
        raise UnusableDocuments(f"{chunk.uri}: a document cannot be encoded: {error}; curate it again") from error


def split_or_drop(
    tokens: EncodedArrays, conversation: bool, length: int, vocabulary: Vocabulary
) -> list[EncodedArrays] | str:
    """A long document as sequences of at most `length` tokens, or the reason why it is dropped."""
    if conversation:
        return "conversation longer than the context"
    try:
        return split(tokens, length, vocabulary)
    except ImageTooLong:
        return "image longer than the context"
