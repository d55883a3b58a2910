"""The lab models' corpus: Python source that is on every learner's machine, and its tokenizer.

    python -m llmopt_lab.nn.train corpus        # writes .lab/corpus; six minutes of one core

Sources: the standard library, and the packages that this course's own metadata asks for (all
extras, and what those ask for in turn), each only under a licence in PERMISSIVE. Left out are
files that are vendored, generated, mostly data, no UTF-8, under another licence, or nearly the
same as a file that is in already. HELD_OUT is never trained on.

Two files are near-duplicates when they share lines, so that is what is compared: every run of four
lines that say something (no blank lines, comments or indentation) is a piece, and a file is left
out when more than half of its pieces stand in the files kept before it. MinHash estimates how
alike two files are as wholes; this finds as well the file that is put together from parts of
several others, needs no choice of bands and hashes, and is one pass over a set that fits in
memory.
"""

import ast
import gzip
import hashlib
import importlib.metadata
import json
import lzma
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llmopt_lab.core.errors import BadInput, require

# Whole modules and packages that no model sees: files, and folders that end in a slash.
HELD_OUT = (
    "stdlib/argparse.py",
    "stdlib/csv.py",
    "stdlib/dataclasses.py",
    "stdlib/fractions.py",
    "stdlib/heapq.py",
    "stdlib/json/",
    "stdlib/sched.py",
    "stdlib/statistics.py",
    "stdlib/textwrap.py",
    "stdlib/zipfile.py",
    "jinja2/",
    "rich/",
)
SLICE_BYTES = 260_000  # of the held-out text, shipped with the package

PERMISSIVE = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python",
    "HPND", "ISC", "LLVM-exception", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Python-2.0",
    "Unlicense", "Zlib",
}  # fmt: skip
# What older metadata calls them: the last part of a classifier, or the whole licence field.
SPELLINGS = {
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Python Software Foundation License": "PSF-2.0",
}

VENDORED = re.compile(r"(^|/)(_?vendor(ed)?|third_party|extern(al|als)?|_distutils|lib2to3)/")
GENERATED = re.compile(
    r"automatically generated|auto-?generated|generated (by|from)|do not edit|@generated", re.I
)
OTHER_LICENCE = re.compile(
    r"GNU (Lesser |Affero )?General Public|\b[AL]?GPL\b|Mozilla Public", re.I
)
MOST_BYTES = 200_000
LONGEST_LINE = 1_000
PIECE = 4  # lines
COPIED = 0.5  # share of a file's pieces that stand in kept files
LEAKED = 0.2  # the same for held-out files

SEPARATOR = "<|endoftext|>"
N_VOCAB = 4096
# Line ends, indentation, words with the space before them, single digits, the rest. A run of line
# ends and a run of spaces are one piece each, so every depth of indentation can be one token.
PIECES = r"[\r\n]+| ?[\p{L}\p{M}_]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}_]+|[^\S\r\n]+"


@dataclass
class Package:
    """One source of the corpus: what it is, and which of its files were kept."""

    name: str
    version: str
    licence: str  # SPDX
    licence_from: str  # the metadata field that says so
    folder: Path
    paths: list[str]  # Python files, relative to folder
    prefix: str = ""  # what a document's name has before its path
    notice: str = ""  # the licence's text
    kept: list["Document"] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)  # reason -> files


@dataclass(frozen=True)
class Document:
    """One file of Python source."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether no model may see it."""
        return any(
            self.name == entry or (entry.endswith("/") and self.name.startswith(entry))
            for entry in HELD_OUT
        )


# Packages and their licences


def licence_of(metadata) -> tuple[str | None, str]:
    """A package's licence as SPDX, None unless it is clearly permissive, and where it is said.

    The SPDX expression counts first, then the classifiers, then a licence field that holds a name.
    """
    expression = metadata.get("License-Expression")
    if expression:
        return (expression if is_permissive(expression) else None), f"expression: {expression}"
    classifiers = [
        c.rpartition(" :: ")[2]
        for c in metadata.get_all("Classifier") or []
        if c.startswith("License ::") and not c.endswith("DFSG approved")
    ]
    if classifiers:
        names = [SPELLINGS.get(c) for c in classifiers]
        said = f"classifier: {', '.join(classifiers)}"
        return (" AND ".join(names) if all(names) else None), said
    text = (metadata.get("License") or "").strip()
    name = SPELLINGS.get(text, text)
    said = f"field: {text.splitlines()[0][:60] if text else 'nothing'}"
    return (name if name and is_permissive(name) else None), said


def is_permissive(expression: str) -> bool:
    """Whether an SPDX expression lets us train and publish: every AND part, any OR alternative."""
    if "(" in expression:  # without precedence, be strict: all of them
        expression = re.sub(r"[()]", " ", expression).replace(" OR ", " AND ")
    return any(
        all(name.strip() in PERMISSIVE for name in re.split(r" AND | WITH ", alternative))
        for alternative in expression.split(" OR ")
    )


def find_packages(root: str = "llmopt_lab") -> tuple[list[Package], list[dict]]:
    """The standard library and every installed package that `root` asks for, with all its extras.

    Returns:
        Packages by name, the standard library first; and what was refused: name, version, why.
    """
    from packaging.requirements import Requirement

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    found: dict[str, importlib.metadata.Distribution | None] = {plain(root): None}
    todo = [(root, tuple(importlib.metadata.metadata(root).get_all("Provides-Extra") or ()))]
    while todo:
        name, extras = todo.pop()
        for line in importlib.metadata.requires(name) or []:
            wanted = Requirement(line)
            asked = wanted.marker is None or any(
                wanted.marker.evaluate({"extra": extra}) for extra in (*extras, "")
            )
            key = plain(wanted.name)
            if not asked or key in found:
                continue
            try:
                found[key] = importlib.metadata.distribution(key)
            except importlib.metadata.PackageNotFoundError:
                found[key] = None
                continue
            todo.append((key, tuple(wanted.extras)))

    packages, refused = [standard_library()], []
    for key, distribution in sorted(found.items()):
        if distribution is None:
            continue
        licence, said = licence_of(distribution.metadata)
        if licence is None:
            refused.append({"name": key, "version": distribution.version, "why": said})
            continue
        files = distribution.files or []
        packages.append(
            Package(
                name=key,
                version=distribution.version,
                licence=licence,
                licence_from=said,
                folder=Path(str(distribution.locate_file(""))),
                paths=sorted(
                    file.as_posix()
                    for file in files
                    if file.suffix == ".py" and file.parts[0] != ".."
                ),
                notice="\n".join(
                    file.read_text(encoding="utf-8")
                    for file in files
                    if re.match(r"(LICEN[CS]E|COPYING|NOTICE)", file.name)
                    and ".dist-info" in str(file)
                ),
            )
        )
    return packages, refused


def standard_library() -> Package:
    """Python's own library, its tests included, site-packages not."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [path.relative_to(folder) for path in folder.rglob("*.py")]
    licence = folder / "LICENSE.txt"
    return Package(
        name="stdlib",
        version=platform.python_version(),
        licence="PSF-2.0",
        licence_from="Python's LICENSE.txt",
        folder=folder,
        paths=sorted(
            path.as_posix()
            for path in paths
            if not {"site-packages", "dist-packages", "__pycache__"} & set(path.parts)
            and not path.parts[0].startswith("config-")
        ),
        prefix="stdlib/",
        notice=licence.read_text(encoding="utf-8") if licence.is_file() else "",
    )


# Files


def read_document(name: str, raw: bytes) -> Document:
    """One file's text with line ends as \\n.

    Raises:
        BadInput: the file is not for learning from; the message is the reason, in a few words.
    """
    require(not VENDORED.search(name), "vendored")
    require(len(raw) <= MOST_BYTES, f"over {MOST_BYTES:,} bytes")
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise BadInput("not UTF-8") from None
    require("\0" not in text and not text.startswith("\ufeff"), "not plain UTF-8")
    require(not GENERATED.search(text[:1000]), "generated")
    require(not OTHER_LICENCE.search(text[:3000]), "another licence")
    require(max(map(len, text.split("\n"))) <= LONGEST_LINE, "very long lines")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadInput("no Python of this version") from None
    require(len(telling_lines(text)) >= PIECE, "next to nothing in it")
    require(lines_of_data(tree) * 2 <= text.count("\n") + 1, "mostly data")
    return Document(name, text)


def lines_of_data(tree: ast.Module) -> int:
    """Lines of module-level assignments that hold nothing but literals."""
    literals = (ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Constant, ast.expr_context, ast.UnaryOp)
    literals += (ast.USub, ast.UAdd)
    return sum(
        node.end_lineno - node.lineno + 1
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        if all(isinstance(part, literals) for part in ast.walk(node.value))
    )


def telling_lines(text: str) -> list[str]:
    """The lines of a file that say something, without their indentation."""
    lines = (line.strip() for line in text.split("\n"))
    return [x for x in lines if not x.startswith("#") and sum(map(str.isalnum, x)) >= 3]


def pieces_of(text: str) -> set[bytes]:
    """Hashes of all runs of PIECE telling lines."""
    lines = [line.encode() for line in telling_lines(text)]
    return {
        hashlib.blake2b(b"\n".join(lines[i : i + PIECE]), digest_size=8).digest()
        for i in range(len(lines) - PIECE + 1)
    }


def collect(packages: list[Package]) -> None:
    """Fill `kept` and `left_out` of every package. Held-out files are kept first."""
    seen: set[bytes] = set()
    held_out: set[bytes] = set()
    readable: list[tuple[Package, Document]] = []
    for package in packages:
        for path in package.paths:
            file = package.folder / path
            if not file.is_file():
                continue
            try:
                readable.append((package, read_document(package.prefix + path, file.read_bytes())))
            except BadInput as reason:
                package.left_out[str(reason)] += 1

    for package, document in readable:
        if document.held_out:
            package.kept.append(document)
            held_out |= pieces_of(document.text)
    for package, document in readable:
        if document.held_out:
            continue
        pieces = pieces_of(document.text)
        if len(pieces & held_out) > LEAKED * len(pieces):
            package.left_out["near-duplicate of a held-out file"] += 1
        elif len(pieces & seen) > COPIED * len(pieces):
            package.left_out["near-duplicate"] += 1
        else:
            package.kept.append(document)
            seen |= pieces


def split(packages: list[Package]) -> tuple[list[Document], list[Document]]:
    """All kept documents: those to train on, and those held out."""
    documents = [document for package in packages for document in package.kept]
    return (
        [document for document in documents if not document.held_out],
        [document for document in documents if document.held_out],
    )


# The tokenizer


def train_tokenizer(documents: list[Document], n_vocab: int = N_VOCAB):
    """A byte-level BPE of `n_vocab` tokens: SEPARATOR, 256 bytes, and merges. Decodes any text.

    Words are cut before merging as PIECES says. `encode` puts SEPARATOR first, where every
    document began in training.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", pair=f"{SEPARATOR} $A $B", special_tokens=[(SEPARATOR, 0)]
    )
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers reads."""
    special = {"bos_token": SEPARATOR, "eos_token": SEPARATOR}
    settings = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special)


def encode_documents(tokenizer, documents: list[Document]) -> np.ndarray:
    """All documents in one row, uint16, SEPARATOR before each.

    A SEPARATOR that stands in a file's text is encoded as the text that it is.
    """
    tokenizer.encode_special_tokens = True
    rows = []
    for start in range(0, len(documents), 512):
        batch = [document.text for document in documents[start : start + 512]]
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            rows += [np.zeros(1, np.uint16), np.array(encoding.ids, np.uint16)]
    tokenizer.encode_special_tokens = False
    return np.concatenate(rows)


def write_tokens(file: Path, tokens: np.ndarray) -> None:
    """uint16, little-endian, compressed by xz."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]  # pairs of bytes
    file.write_bytes(lzma.compress(tokens.astype("<u2").tobytes(), filters=filters))


def read_tokens(file: Path) -> np.ndarray:
    """What `write_tokens` wrote, as (n,) uint16."""
    require(
        file.is_file(),
        f"{file} is missing; make it with: python -m llmopt_lab.nn.train corpus",
    )
    return np.frombuffer(lzma.decompress(file.read_bytes()), "<u2")


# What is written


def manifest_of(packages: list[Package], refused: list[dict]) -> dict:
    """What the corpus is made of, and what it left out: ready for JSON."""
    entries = []
    for package in packages:
        files = [
            {
                "name": document.name,
                "bytes": len(document.text.encode()),
                "sha256": hashlib.sha256(document.text.encode()).hexdigest(),
                "held_out": document.held_out,
            }
            for document in package.kept
        ]
        entries.append(
            {
                "name": package.name,
                "version": package.version,
                "licence": package.licence,
                "licence_from": package.licence_from,
                "bytes": sum(f["bytes"] for f in files),
                "left_out": dict(package.left_out.most_common()),
                "files": files,
            }
        )
    return {"packages": entries, "refused": refused, "held_out": list(HELD_OUT)}


def slice_of(packages: list[Package], most_bytes: int = SLICE_BYTES) -> dict:
    """The part of the held-out text that ships: its documents, and the licences they are under.

    Packages take turns, each in the order of its names' hashes, so the slice is a mixture.
    """
    turns = []
    for package in packages:
        documents = [document for document in package.kept if document.held_out]
        documents.sort(key=lambda document: hashlib.sha256(document.name.encode()).digest())
        turns += [(turn, package.name, d, package) for turn, d in enumerate(documents)]
    chosen, total = [], 0
    for _, _, document, package in sorted(turns, key=lambda place: place[:2]):
        size = len(document.text.encode())
        if total + size <= most_bytes:
            total += size
            chosen.append((document, package))
    return {
        "licences": {
            package.name: {
                "version": package.version,
                "spdx": package.licence,
                "text": package.notice,
            }
            for _, package in chosen
        },
        "documents": [
            {"name": document.name, "package": package.name, "text": document.text}
            for document, package in chosen
        ],
    }


def in_shards(documents: list[Document], most_bytes: int = 1 << 25) -> Iterator[list[Document]]:
    """Documents in lists of about `most_bytes` of text."""
    shard, size = [], 0
    for document in documents:
        shard.append(document)
        size += len(document.text)
        if size >= most_bytes:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def build(out: Path, say=print) -> None:
    """Write the corpus of this environment below `out`: `write_corpus` of all its packages."""
    packages, refused = find_packages()
    say(f"{len(packages)} packages under permissive licences, {len(refused)} refused")
    collect(packages)
    names = [document.name for package in packages for document in package.kept]
    for entry in HELD_OUT:
        require(
            any(name == entry or name.startswith(entry) for name in names),
            f"{entry} is to be held out, but this environment has no such file; install the "
            "versions of constraints.txt",
        )
    write_corpus(packages, refused, out, say=say)


def write_corpus(
    packages: list[Package], refused: list[dict], out: Path, *, n_vocab: int = N_VOCAB, say=print
) -> None:
    """Write collected packages as text, tokenizer, tokens and baselines.

    manifest.json (what is in it), train-00.jsonl.xz ..., heldout.json (the slice that ships), the
    tokenizer's files, train.tokens.xz and heldout.tokens.xz, corpus.json (sizes and the bits per
    byte of gzip, xz and a 5-gram model on the held-out text).
    """
    from llmopt_lab.nn.ngram import NGram

    out.mkdir(parents=True, exist_ok=True)
    train, held_out = split(packages)
    require(len(held_out) > 0, "no file is held out: collect packages that HELD_OUT names")
    texts = [document.text.encode() for document in held_out]
    text = b"".join(texts)
    n_bytes = sum(len(document.text.encode()) for document in train)
    say(
        f"{len(train)} files, {n_bytes / 1e6:.1f} MB to train on; {len(text) / 1e6:.2f} MB held out"
    )
    write_json(out / "manifest.json", manifest_of(packages, refused))
    write_json(out / "heldout.json", slice_of(packages))
    for i, shard in enumerate(in_shards(train)):
        lines = [json.dumps({"name": d.name, "text": d.text}, ensure_ascii=False) for d in shard]
        packed = lzma.compress("\n".join(lines).encode(), preset=3)
        (out / f"train-{i:02d}.jsonl.xz").write_bytes(packed)

    tokenizer = train_tokenizer(train, n_vocab)
    save_tokenizer(tokenizer, out)
    tokens, unseen = encode_documents(tokenizer, train), encode_documents(tokenizer, held_out)
    write_tokens(out / "train.tokens.xz", tokens)
    write_tokens(out / "heldout.tokens.xz", unseen)
    say(f"{len(tokens) / 1e6:.1f} M tokens to train on, {len(unseen) / 1e3:.0f} k held out")

    predicted = unseen != 0  # the separators are given
    nats = -np.log(NGram(tokens, order=5, n_vocab=n_vocab).probabilities(unseen)[predicted]).sum()
    bits_per_byte = {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
        "5-gram": float(nats / np.log(2) / len(text)),
    }
    sizes = {
        "n_vocab": n_vocab,
        "train_bytes": n_bytes,
        "train_files": len(train),
        "train_tokens": len(tokens),
        "heldout_bytes": len(text),
        "heldout_tokens": int(predicted.sum()),
        "heldout_document_bytes": [len(one) for one in texts],
        "bits_per_byte": bits_per_byte,
    }
    write_json(out / "corpus.json", sizes)
    say(", ".join(f"{name}: {bits:.3f} bits a byte" for name, bits in bits_per_byte.items()))


def write_json(file: Path, content: dict) -> None:
    """Readable, UTF-8."""
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
