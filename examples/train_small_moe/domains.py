"""Text already on a machine, by domain, as tokens: one corpus that several trainings and evaluations share.

Run it as `python domains.py my-corpus`. It looks where a machine with Python has text and says how much it found:

- `code`: Python sources;
- `prose`: documentation in .md, .rst and .txt files, and the docstrings of the sources;
- `man`: manual pages, as written, packed or not.

A file is in one part only, training or held-out, with its docstrings. Files with the same content count once.
"""

import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
from corpus import END_OF_TEXT, HELD_OUT_ONE_IN, InputError, encode, standard_library
from sources import find_files, read_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

DOMAINS = ("code", "prose", "man")
PARTS = ("training", "held_out")
TOKENIZER_CHARACTERS = 20_000_000  # of each domain that the tokenizer is trained on
HELD_OUT_TOKENS = 2**17  # of each domain, at most


@dataclass(frozen=True)
class Corpus:
    """Token ids, uint16 [tokens] of each domain, and what they were made from."""

    tokenizer: Tokenizer
    training: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray]
    counts: Mapping[str, object]


def find_folders() -> tuple[Path, ...]:
    """Where a machine with Python has text, as far as there is any."""
    paths = sysconfig.get_paths()
    system = sorted(Path("/usr/lib").glob("python3*"))
    folders = [standard_library(), Path(paths["purelib"]), Path(paths["platlib"]), *system]
    folders += [folder / "dist-packages" for folder in (*system, *Path("/usr/local/lib").glob("python3*"))]
    folders += [Path("/usr/share/doc"), Path("/usr/share/man")]
    return tuple(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def read_texts(folders: Sequence[Path], *, most: int) -> dict[str, dict[str, list[str]]]:
    """Part -> domain -> texts, at most `most` characters of a domain, drawn from all files alike."""
    files = list(find_files(folders))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # other libraries' threads survive no fork
        found = [text for texts in pool.map(read_file, files, chunksize=64) for text in texts]
    texts = {part: {domain: [] for domain in DOMAINS} for part in PARTS}
    left, seen = dict.fromkeys(DOMAINS, most), set()
    for domain, digest, text in sorted(found):
        if (domain, digest) in seen or left[domain] <= 0:
            continue
        seen.add((domain, digest))
        left[domain] -= len(text)
        # Not the digest's first bytes: they order the files.
        part = "held_out" if int.from_bytes(digest[-8:]) % HELD_OUT_ONE_IN == 0 else "training"
        texts[part][domain].append(text)
    return texts


def train_tokenizer(texts: Sequence[str], *, vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise InputError(f"the text gives {tokenizer.get_vocab_size()} tokens, not {vocab}: give more text or --vocab")
    return tokenizer


def make_corpus(folders: Sequence[Path], *, vocab: int, most: int) -> Corpus:
    """Read, split and tokenise; InputError unless every domain that has text has enough for both parts."""
    texts = read_texts(folders, most=most)
    domains = [domain for domain in DOMAINS if all(texts[part][domain] for part in PARTS)]
    if not domains:
        raise InputError(f"no text of {', '.join(DOMAINS)} in {', '.join(map(str, folders))}: name other folders")
    sample = [text for domain in domains for text in take(texts["training"][domain], TOKENIZER_CHARACTERS)]
    tokenizer = train_tokenizer(sample, vocab=vocab)
    training, held_out = ({domain: encode(tokenizer, texts[part][domain]) for domain in domains} for part in PARTS)
    counts = {
        domain: {
            "files": sum(len(texts[part][domain]) for part in PARTS),
            "characters": sum(len(text) for part in PARTS for text in texts[part][domain]),
            "training_tokens": len(training.get(domain, ())),
            "held_out_tokens": len(held_out.get(domain, ())),
        }
        for domain in DOMAINS
    }
    held_out = {domain: tokens[:HELD_OUT_TOKENS] for domain, tokens in held_out.items()}
    return Corpus(tokenizer, training, held_out, counts)


def take(texts: Sequence[str], characters: int) -> Iterator[str]:
    """The first texts, until they have so many characters."""
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def write_corpus(folder: Path, corpus: Corpus) -> None:
    """The folder appears whole or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        corpus.tokenizer.save(str(partial / "tokenizer.json"))
        for part in PARTS:
            np.savez(partial / f"{part}.npz", **getattr(corpus, part))
        (partial / "counts.json").write_text(json.dumps(corpus.counts, indent=1) + "\n")
        partial.chmod(0o755)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_corpus(folder: Path) -> Corpus:
    """What `write_corpus` wrote."""
    if not (folder / "counts.json").is_file():
        raise InputError(f"{folder} is no corpus: make one with python domains.py {folder}")
    parts = {}
    for part in PARTS:
        with np.load(folder / f"{part}.npz") as held:
            parts[part] = dict(held)
    counts = json.loads((folder / "counts.json").read_text())
    return Corpus(Tokenizer.from_file(str(folder / "tokenizer.json")), **parts, counts=counts)


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), multiple=True, help="Folder; default: where text usually is.")
@click.option("--vocab", type=click.IntRange(257, 2**16), default=8192, show_default=True)
@click.option("--most", type=click.IntRange(1), default=80, show_default=True, help="Million characters of a domain.")
def main(output: Path, text: tuple[Path, ...], vocab: int, most: int) -> None:
    """Collect text by domain, train a tokenizer on it, and write both as tokens to the new folder OUTPUT."""
    if os.path.lexists(output):
        raise InputError(f"{output} exists: name a new folder, or remove it first")
    for folder in text:
        if not folder.is_dir():
            raise InputError(f"text folder {folder} does not exist: name one that does")
    corpus = make_corpus(text or find_folders(), vocab=vocab, most=most * 1_000_000)
    write_corpus(output, corpus)
    click.echo("domain     files  M characters  training tokens  held-out tokens")
    for domain, count in corpus.counts.items():
        sizes = f"{count['characters'] / 1e6:12.1f}  {count['training_tokens']:15,}  {count['held_out_tokens']:15,}"
        click.echo(f"{domain:8} {count['files']:7,}  {sizes}{'' if domain in corpus.training else '  left out'}")


if __name__ == "__main__":
    main()
