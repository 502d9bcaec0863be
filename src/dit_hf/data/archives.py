"""Damage and bombs in archives and tables that the libraries which read them don't see.

A tar that was cut at a member, or has a damaged header, is read as one that ends there; so is an Arrow stream that was
cut at a batch. Checksums of images are the image formats' own: PNG has them, JPEG has none.
"""

import os
import zipfile
from pathlib import Path

from ..files import check_file, reading
from .pixels import MAX_IMAGE_BYTES


BLOCK = 512
# Of pax headers that are searched for sparse files.
MAX_PAX_BYTES = 2**20
# Images hardly compress; more than this, and more than this many bytes, is a bomb.
MAX_RATIO = 100
MAX_UNPACKED = 2**30
# How an Arrow stream ends that was written to its end.
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def check_archive(path: str | Path) -> None:
    """
    Checks a `.tar`, `.arrow`, `.parquet` or `.zip`, as far as it can be without reading all of it; other files pass.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        ValueError: naming the file, if it is cut or damaged, or would unpack to far more than it is.
    """
    check = CHECKS.get(Path(path).suffix.lower())
    if check is not None:
        check_file(path)
        check(path)


def check_tar(path):
    """Follows the headers to the block of zeros that ends a tar; each has a checksum."""
    cut = f"{path} is cut or damaged"
    with open(path, "rb", buffering=0) as file:
        size, position, members = os.fstat(file.fileno()).st_size, 0, 0
        while True:
            file.seek(position)
            header = file.read(BLOCK)
            if header == bytes(BLOCK):
                return
            if len(header) < BLOCK:
                raise ValueError(f"{cut}: it ends after {members} members, without a tar's end. Copy it again.")
            if not (length := _member_length(header)) >= 0:
                raise ValueError(f"{cut}, or no plain tar: the header at byte {position} has a wrong checksum.")
            kind = header[156:157]
            pax = kind in (b"x", b"g")
            if kind == b"S" or (pax and length <= MAX_PAX_BYTES and b"GNU.sparse" in file.read(length)):
                raise ValueError(f"{path} has sparse files, which are not read; pack it without --sparse.")
            if length > (MAX_PAX_BYTES if pax else MAX_IMAGE_BYTES):
                raise ValueError(f"{path} has a file of {length:,} bytes; at most {MAX_IMAGE_BYTES:,} are read.")
            position += BLOCK + -(-length // BLOCK) * BLOCK
            members += 1
            if position > size:
                raise ValueError(f"{cut}: it ends in its member {members}. Copy it again.")


def _member_length(header):
    """The length of a tar's member, -1 if the header is damaged."""
    try:
        if int(header[148:156].strip(b" \0") or b"-1", 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            return -1
        if header[124] & 0x80:  # of 8 GB and more, in base 256
            return int.from_bytes(header[125:136], "big")
        return int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def check_arrow(path):
    """The last bytes tell whether an Arrow stream was written to its end; Arrow's other format ends in an index."""
    with open(path, "rb") as file:
        start = file.read(6)
        file.seek(-min(8, os.fstat(file.fileno()).st_size), os.SEEK_END)
        if start != b"ARROW1" and file.read() != END_OF_STREAM:
            raise ValueError(f"{path} is cut or damaged: it does not end as an Arrow stream. Copy it again.")


def check_parquet(path):
    """Parquet's own index is at its end; here is checked what it claims."""
    from pyarrow.parquet import read_metadata  # comes with `datasets`

    with reading(path, "Parquet"):
        metadata = read_metadata(path)
        groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
        unpacked = sum(group.total_byte_size for group in groups)
    _check_unpacked(path, max(unpacked, metadata.num_rows))


def check_zip(path):
    """What the index of a `.zip` claims."""
    with reading(path, "a zip"), zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    _check_unpacked(path, unpacked)


def _check_unpacked(path, unpacked):
    size = os.path.getsize(path)
    if unpacked > max(MAX_UNPACKED, MAX_RATIO * size):
        raise ValueError(f"{path} has {size:,} bytes and would unpack to {unpacked:,}, more than images do.")


CHECKS = {".tar": check_tar, ".arrow": check_arrow, ".parquet": check_parquet, ".zip": check_zip}
