"""Folders and archives as one list of files, which are read where they lie: nothing is unpacked.

A place says where a file's bytes are: (number of its archive, or -1 for a file of the folder; first byte; bytes;
whether deflated). Names are relative to the source, with / between folders; a tar inside it counts as a folder.
"""

import errno
import os
import posixpath
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from pathlib import Path

SYSTEM = {"__MACOSX", "lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"}  # folders
GONE = -1, 0, -1, False  # the place of a file that is not there
OWN_FAULTS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR}  # of one file, not of the disk


def normal(name):
    """A name as it is compared with another's: composed characters, / between folders, its suffix in lower case."""
    stem, suffix = posixpath.splitext(unicodedata.normalize("NFC", name.replace("\\", "/")))
    return stem + suffix.lower()


def is_hidden(name):
    return any(part.startswith(".") or part in SYSTEM for part in name.split("/"))


# ----- listing ------------------------------------------------------------------------------------
def list_folder(root):
    """Path relative to root of every file below it. Links are followed, but for those to a folder they lie in."""
    def walk(folder, prefix, above):
        real = os.path.realpath(folder)
        if real in above:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    yield from walk(entry.path, f"{prefix}{entry.name}/", above | {real})
                else:
                    yield prefix + entry.name
    return walk(root, "", frozenset())


def follow_links(places, links):
    """{name: place} of an archive, with its links {name: target}: to a file, or to a folder and all below it."""
    for name, target in links.items():
        for _ in links:  # a link to a link
            target = links.get(target, target)
        if target in places:
            places[name] = places[target]
        elif target != "." and not name.startswith(f"{target}/"):
            below = [each for each in places if each.startswith(f"{target}/")]
            found = {name + each[len(target):]: places[each] for each in below}
            places.update(found or {name: (0, -1, False)})
    return places


def list_tar(file):
    """{name: (first byte, bytes, False)} of every file in a tar, folders' names ending with /; of
    several files of one name the last counts, as in unpacking."""
    places, links = {}, {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep a kilobyte for each
            name = posixpath.normpath(member.name.lstrip("/"))
            places.pop(name, None)
            links.pop(name, None)
            if member.sparse is not None:
                raise ValueError(f"{name} is packed as a sparse file; pack it again without --sparse")
            if member.isdir():
                places[f"{name}/"] = 0, 0, False
            elif member.issym():
                links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif member.islnk():
                links[name] = posixpath.normpath(member.linkname)
            elif member.isreg() and name.endswith(".tar"):
                inside = list_tar(tar.extractfile(member))
                places.update({f"{name[:-4]}/{inner}": (member.offset_data + start, size, False)
                               for inner, (start, size, _) in inside.items()})
            elif member.isreg():
                places[name] = member.offset_data, member.size, False
        file.seek(tar.offset)
        if file.read(512) != bytes(512):  # tarfile takes a header cut short for the end
            raise tarfile.ReadError("it ends too early")
    return follow_links(places, links)


def list_zip(file):
    """{name: (first byte of its header, bytes, whether deflated)} of every file in a zip, else as list_tar."""
    places, links, archive = {}, {}, zipfile.ZipFile(file)
    for info in archive.infolist():
        written = info.filename.replace("\\", "/")  # by some of Windows' packers
        name = posixpath.normpath(written)
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{info.filename} is encrypted or packed in an unusual way; unpack the zip")
        if stat.S_ISLNK(info.external_attr >> 16):
            target = os.fsdecode(archive.read(info))
            links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        else:
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            places[f"{name}/" if written[-1] == "/" else name] = info.header_offset, info.compress_size, deflated
    return follow_links(places, links)


def list_archive(path):
    """(whether it is a zip, its list_zip or list_tar). Raises ValueError for what cannot be listed."""
    try:
        is_zip = not tarfile.is_tarfile(path)  # a tar that ends in a zip looks like one
        with open(path, "rb") as file:
            return is_zip, list_zip(file) if is_zip else list_tar(file)
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: cannot be listed ({error}); SOURCE must be a folder, a zip or "
                         "an uncompressed, complete tar, or hold such tars") from error


def check_shards(names):
    """Raises ValueError where of files that are called ...00002-of-00005... not all are there."""
    sets = {}
    for name in names:
        found = re.fullmatch(r"(.*?)(\d+)-of-(\d+)(.*)", name)
        if found:
            before, number, count, after = found.groups()
            sets.setdefault((before, count, after), {})[int(number)] = number
    for (before, count, after), there in sets.items():
        if len(there) < int(count):
            width = len(next(iter(there.values())))
            first = next(number for number in range(int(count)) if number not in there)
            raise ValueError(f"{before}{first:0{width}}-of-{count}{after} is missing, one of {int(count) - len(there)} "
                             f"that are; fetch what is missing, or rename what is there")


def list_files(root):
    """(archives, {name: place}, folders) of a folder, a zip or a tar, or a folder with tars in it.

    archives: (path, whether it is a zip) of each. Folders' names end with /: those right below a folder, and among the
    places those of archives. Raises ValueError for what cannot be listed.
    """
    archives, places, folders, tars = [], {}, set(), [""]
    if root.is_dir():
        try:
            names = list(list_folder(root))
            folders = {f"{entry.name}/" for entry in os.scandir(root) if entry.is_dir()}
        except OSError as error:
            raise ValueError(f"{root}: cannot be listed ({error}); SOURCE must be a folder that can be read") from error
        tars = sorted(name for name in names if name.lower().endswith(".tar") and not is_hidden(name))
        check_shards(tars)
        places = {name: (-1, 0, 0, False) for name in {*names} - {*tars}}
    for number, name in enumerate(tars):
        path = root / name if name else root
        is_zip, found = list_archive(path)
        archives.append((path, is_zip))
        places.update({posixpath.join(name[:-4], each): (number, *place) for each, place in found.items()})
    return archives, places, folders


# ----- reading ------------------------------------------------------------------------------------
def read_place(root, archives, name, number, start, size, deflated):
    """The bytes of a file. Raises ValueError for what is its own fault, OSError where the source is gone."""
    if size < 0:
        raise ValueError("no such file, or a link to what is not there")
    if number < 0:
        path = Path(root, name)
        try:
            return path.read_bytes()
        except OSError as error:
            if error.errno in OWN_FAULTS and os.path.lexists(path):
                raise ValueError(str(error)) from error
            raise
    path, is_zip = archives[number]
    with open(path, "rb") as file:
        file.seek(start)
        try:
            if is_zip:  # a header of 30 bytes that ends with the lengths of the two fields between it and the data
                file.seek(sum(struct.unpack("<HH", file.read(30)[26:])), os.SEEK_CUR)
            content = file.read(size)
            return zlib.decompress(content, -zlib.MAX_WBITS) if deflated else content
        except (zlib.error, struct.error) as error:
            raise ValueError(str(error)) from error
