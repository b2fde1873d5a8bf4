"""Rebuilds memzoo/data/prose.txt.xz (four novels by Jane Austen) from Debian's package r-cran-janeaustenr.

    apt-get download r-cran-janeaustenr && python scripts/build_prose.py r-cran-janeaustenr_1.0.0-1_all.deb

The package keeps each novel as an R character vector, one string a printed line. Here lines become paragraphs, one a line of the
output; title pages, chapter headings and mark-up go, and nothing else changes.
"""

from __future__ import annotations

import argparse
import io
import lzma
import re
import struct
import tarfile
import zlib
from pathlib import Path

# In order of publication; the last tenth of the text, which is the test split, is the second half of Persuasion.
NOVELS = ("SENSE AND SENSIBILITY", "PRIDE AND PREJUDICE", "NORTHANGER ABBEY", "PERSUASION")
OUTPUT = Path(__file__).resolve().parents[1] / "memzoo" / "data" / "prose.txt.xz"
CHARSXP, STRSXP, NA_LENGTH = 9, 16, -1


def read_package_file(path: Path, suffix: str) -> bytes:
    """The content of the one file in a .deb (an `ar` archive that holds data.tar.xz) whose name ends in `suffix`."""
    archive, position = path.read_bytes(), 8
    if archive[:8] != b"!<arch>\n":
        raise ValueError(f"{path} is not a Debian package")
    while position < len(archive):
        name, size = archive[position : position + 16].strip(), int(archive[position + 48 : position + 58])
        body = archive[position + 60 : position + 60 + size]
        if name.startswith(b"data.tar"):
            with tarfile.open(fileobj=io.BytesIO(body)) as tar:
                member = next((m for m in tar.getmembers() if m.name.endswith(suffix)), None)
                if member is not None:
                    return tar.extractfile(member).read()
        position += 60 + size + size % 2
    raise ValueError(f"{path} holds no {suffix}")


def read_vectors(database: bytes) -> list[list[str]]:
    """Every character vector of an R lazy-load database: records of a 4-byte length and a zlib stream of R's XDR format."""
    vectors = []
    while database:
        stream = zlib.decompressobj()
        vectors.append(read_character_vector(stream.decompress(database[4:])))
        database = stream.unused_data
    return vectors


def read_character_vector(data: bytes) -> list[str]:
    """Decode one serialised R character vector (format `X`, version 3)."""
    encoding_length = struct.unpack(">i", data[14:18])[0]
    position = 18 + encoding_length
    flags, count = struct.unpack(">ii", data[position : position + 8])
    if flags & 0xFF != STRSXP:
        raise ValueError("an R object in the package is not a character vector")
    position, strings = position + 8, []
    for _ in range(count):
        flags, length = struct.unpack(">ii", data[position : position + 8])
        if flags & 0xFF != CHARSXP:
            raise ValueError("an element of an R character vector is not a string")
        position += 8
        if length != NA_LENGTH:
            strings.append(data[position : position + length].decode("utf-8"))
            position += length
    return strings


def paragraphs(lines: list[str]) -> list[str]:
    """Join lines into paragraphs of plain text, without the title page, chapter headings, mark-up and the closing line."""
    found, current, started = [], [], False
    for line in [*lines, ""]:
        line = line.strip()
        if re.fullmatch(r"(?:CHAPTER|Chapter|VOLUME|Volume)\s+\w+\.?|THE END\.?|Finis|_?FINIS_?", line):
            started, line = True, ""
        if line:
            current.append(line)
        elif current:
            if started:
                found.append(re.sub(r"\s+", " ", " ".join(current).replace("_", "")).strip())
            current = []
    editorial = re.compile(r"\[At this point|\(End of volume|\*Vide")
    return [p.replace("*", "") for p in found if re.search(r"[a-z]", p) and not editorial.match(p)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="r-cran-janeaustenr_1.0.0-1_all.deb")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    vectors = {
        next(s for s in v if s.strip()).strip().upper(): v for v in read_vectors(read_package_file(args.package, "Rdata.rdb"))
    }
    missing = [title for title in NOVELS if title not in vectors]
    if missing:
        raise SystemExit(f"{args.package} lacks {', '.join(missing)}; it holds {', '.join(vectors)}")
    text = "".join(p + "\n" for title in NOVELS for p in paragraphs(vectors[title]))
    packed = lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)
    args.output.write_bytes(packed)
    print(f"{args.output}: {len(text):,} characters, {len(text.split()):,} words, {len(packed):,} bytes compressed")


if __name__ == "__main__":
    main()
