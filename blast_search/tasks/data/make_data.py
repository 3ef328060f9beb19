"""How every data file in this folder was made; run by hand, never at run time.

    python make_data.py wordnet FOLDER    # data.noun, data.verb, ... of WordNet 3.0
    python make_data.py wikipedia FILE    # ...pages-articles1...shortened.bz2 of the gensim wheel
    python make_data.py fashion FOLDER    # the four idx .gz files of Fashion-MNIST

Sources: Debian packages wordnet-base 1:3.0-37 and dataset-fashion-mnist, and the gensim 4.4.0
wheel (gensim/test/test_data).  The same source gives the same bytes: fixed seeds, no times in
the archives.  The licences are the LICENSE-*.txt files beside the data.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import html
import json
import random
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

HERE = Path(__file__).resolve().parent
WORDNET_ENTRIES = 34_512  # 4,000 evaluation, 512 calibration, 30,000 training
WIKIPEDIA_CHARACTERS = 12_000  # kept from the start of each article
FASHION_TRAIN = 12_000  # of the 60,000 training images; the task takes calibration from these
FASHION_TEST = 3_000  # of the 10,000 test images


def wordnet(folder: Path) -> None:
    """Write wordnet.tsv.gz: shuffled lines `lemma <tab> definition`, each of both only once."""
    entries: list[tuple[str, str]] = []
    lemmas: set[str] = set()
    glosses: set[str] = set()
    lines = [
        line
        for part in ("noun", "verb", "adj", "adv")
        for line in (folder / f"data.{part}").read_text("utf-8").splitlines()
        if not line.startswith("  ")  # the licence at the head of each file
    ]
    rng = random.Random(0)
    rng.shuffle(lines)
    for line in lines:
        head, gloss = line.split(" | ", 1)
        fields = head.split()
        words = [
            re.sub(r"\([a-z]+\)$", "", word).replace("_", " ")  # adjective position marks
            for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        ]
        definition = re.split(r"[;:]?\s*[\"`]", gloss, maxsplit=1)[0].strip(" ;")
        key = " ".join(re.findall(r"[a-z0-9]+", definition.lower()))
        # Lower-case lemmas only: names and Latin genera are looked up, not understood.
        for lemma in words:
            if lemma in lemmas or not re.fullmatch(r"[a-z][a-z' -]{2,}", lemma):
                continue
            if re.search(rf"\b{re.escape(lemma)}", definition.lower()):
                continue  # the definition would give the answer away
            if not 4 <= len(definition.split()) <= 10 or key in glosses:
                continue  # short ones: more queries in the same time, hence less noise
            lemmas.add(lemma)
            glosses.add(key)
            entries.append((lemma, definition))
            break
    entries = entries[:WORDNET_ENTRIES]
    text = "".join(f"{lemma}\t{definition}\n" for lemma, definition in entries)
    _write_gzip("wordnet.tsv.gz", text.encode())


def clean_wikitext(text: str) -> str:
    """Wiki markup -> plain paragraphs: no templates, tables, references, files or headings."""
    text = html.unescape(html.unescape(text))
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<(ref|math|gallery|timeline|code)\b[^>]*/>", "", text)
    text = re.sub(r"<(ref|math|gallery|timeline|code)\b.*?</\1>", "", text, flags=re.S)
    for pattern in (r"\{\{[^{}]*\}\}", r"\{\|(?:(?!\{\||\|\}).)*\|\}"):
        previous = None
        while previous != text:  # innermost first
            previous, text = text, re.sub(pattern, "", text, flags=re.S)
    text = re.sub(r"\[\[[^\[\]|]*\|([^\[\]|]*)\]\]", r"\1", text)  # [[page|words]]
    text = re.sub(r"\[\[([^\[\]|:]*)\]\]", r"\1", text)
    previous = None
    while previous != text:  # files, categories, languages; captions may hold links
        previous, text = text, re.sub(r"\[\[[^\[\]]*\]\]", "", text)
    text = re.sub(r"\[\w+://\S+\s+([^\]]*)\]", r"\1", text)
    text = re.sub(r"\[\w+://\S+\]|<[^>]*>|'{2,}|\(\s*[;,]?\s*\)", "", text)
    paragraphs = []
    for raw in text.splitlines():
        line = re.sub(r"\s+", " ", raw).strip()
        if len(line) >= 80 and line[0] not in "=*#:;|!{}[":  # running prose only
            paragraphs.append(line)
    return "\n".join(paragraphs)


def wikipedia(source: Path) -> None:
    """Write wikipedia.jsonl.gz: shuffled lines {"title", "text"}, one article per line."""
    articles = []
    with bz2.open(source) as stream:
        title = ""
        for _, element in ElementTree.iterparse(stream):
            tag = element.tag.rsplit("}", 1)[-1]
            if tag == "title":
                title = element.text or ""
            elif tag == "text":
                text = clean_wikitext(element.text or "")[:WIKIPEDIA_CHARACTERS]
                if len(text) >= 6_000:  # no redirects, lists or stubs
                    text = text[: text.rfind("\n")] if "\n" in text else text
                    articles.append({"title": title, "text": text})
    random.Random(0).shuffle(articles)
    lines = "".join(json.dumps(article, ensure_ascii=False) + "\n" for article in articles)
    _write_gzip("wikipedia.jsonl.gz", lines.encode())


def fashion(folder: Path) -> None:
    """Write fashion.npz: train_images, train_labels, test_images, test_labels (uint8)."""
    arrays: dict[str, Any] = {}
    for name, prefix, count in (("train", "train", FASHION_TRAIN), ("test", "t10k", FASHION_TEST)):
        images = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        arrays[f"{name}_images"] = pixels[:count]  # the source is already shuffled
        arrays[f"{name}_labels"] = np.frombuffer(labels, np.uint8, offset=8)[:count]
    np.savez_compressed(HERE / "fashion.npz", **arrays)


def _write_gzip(name: str, data: bytes) -> None:
    (HERE / name).write_bytes(gzip.compress(data, compresslevel=9, mtime=0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("wordnet", "wikipedia", "fashion"))
    parser.add_argument("source", type=Path, help="folder (wordnet, fashion) or file (wikipedia)")
    arguments = parser.parse_args()
    {"wordnet": wordnet, "wikipedia": wikipedia, "fashion": fashion}[arguments.what](
        arguments.source
    )
