"""archives.py: what an archive gives is what its tree gives; what is a shard, what is broken, what is gone."""

import gzip
import io
import os
import shutil
import subprocess
import tarfile
import zipfile

import pytest

from archives import check_shards, list_files, normal, read_place
from images import ImageFiles
from tests.conftest import contents, save


def write_tar(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))


def test_names_are_compared_in_one_form():
    assert normal("a\\cafe\u0301.JPG") == "a/caf\u00e9.jpg" and normal("A/b.c/D") == "A/b.c/D"


def test_a_missing_shard_is_named():
    check_shards(["train-00000-of-00002.tar", "train-00001-of-00002.tar", "x-00001-of-00001.tar", "free.tar"])
    with pytest.raises(ValueError, match="^train-00002-of-00004.tar is missing, one of 2 that are; fetch what is"):
        check_shards(["train-00000-of-00004.tar", "train-00001-of-00004.tar"])


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_broken_tar_among_others_is_named(tmp_path, content):
    for number in range(3):
        write_tar(tmp_path / f"{number:05d}.tar", ["a.jpg"])
    (tmp_path / "00001.tar").write_bytes(content)
    with pytest.raises(ValueError, match="00001.tar: cannot be listed"):
        list_files(tmp_path)


def test_hidden_files_are_no_shards(tmp_path):
    write_tar(tmp_path / "00000.TAR", ["a.jpg"])
    (tmp_path / "._00000.tar").write_bytes(b"of macOS")
    (archive, is_zip), = list_files(tmp_path)[0]
    assert archive.name == "00000.TAR" and not is_zip


def test_a_zip_that_windows_packed_has_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        info = zipfile.ZipInfo("x")
        info.filename = "src\\n01\\0.png"
        file.writestr(info, b"content")
    archives, places, _ = list_files(tmp_path / "a.zip")
    assert read_place(tmp_path, archives, "", *places["src/n01/0.png"]) == b"content"


def test_a_files_own_fault_is_told_from_a_source_that_is_gone(tmp_path):
    os.symlink("nowhere", tmp_path / "dangling.png")
    with pytest.raises(ValueError, match="No such file"):
        read_place(tmp_path, [], "dangling.png", -1, 0, 0, False)
    with pytest.raises(OSError, match="No such file"):
        read_place(tmp_path, [], "gone.png", -1, 0, 0, False)
    with pytest.raises(OSError, match="No such file"):
        read_place(tmp_path, [(tmp_path / "gone.tar", False)], "a.png", 0, 512, 10, False)


def archive(kind, root, path):
    if kind == "tar of tars":
        with tarfile.open(path, "w") as outer:
            for folder in sorted(root.iterdir()):
                inner = io.BytesIO()
                with tarfile.open(fileobj=inner, mode="w") as tar:
                    for file in sorted(folder.iterdir()):
                        tar.add(file, file.name)
                info = tarfile.TarInfo(f"{folder.name}.tar")
                info.size = inner.tell()
                inner.seek(0)
                outer.addfile(info, inner)
    elif kind == "tar":
        (root / "n03/zzz.zip").write_bytes(b"PK\5\6" + bytes(18))  # a tar that also looks like a zip
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            tar.add(root, "./train")
        (root / "n03/zzz.zip").unlink()
        assert zipfile.is_zipfile(path)
    else:
        compression = zipfile.ZIP_DEFLATED if kind == "deflated zip" else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", compression) as file:
            for image in root.rglob("*.*"):
                file.write(image, image.relative_to(root.parent))


@pytest.mark.parametrize("kind", ["tar of tars", "tar", "stored zip", "deflated zip"])
def test_an_archive_gives_what_its_tree_gives(kind, photographs, prepare, tmp_path):
    tree = prepare(SOURCE=str(photographs), DATA_DIR=str(tmp_path / "tree"))
    assert tree.classes == ["n01", "n02", "n03"] and len(tree) == 240
    archive(kind, photographs, tmp_path / "archive")
    prepare(SOURCE=str(tmp_path / "archive"), DATA_DIR=str(tmp_path / "of_archive"), WORKERS=2)
    assert contents(tmp_path / "of_archive") == contents(tmp_path / "tree")


@pytest.mark.parametrize("harm, message", [
    (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "archive: cannot be listed .* an uncompressed"),
    (lambda path: os.truncate(path, 20_000), r"archive: cannot be listed \(.*an uncompressed, complete tar"),
    (lambda path: os.truncate(path, path.read_bytes().index(b"./train/n02/") + 100),
     r"archive: cannot be .*complete tar"),
])
def test_compressed_or_truncated_tar_is_refused(harm, message, photographs, prepare, tmp_path):
    archive("tar", photographs, tmp_path / "archive")
    harm(tmp_path / "archive")
    with pytest.raises(ValueError, match=message):
        prepare(SOURCE=str(tmp_path / "archive"))


def test_zip_of_an_unusual_kind_is_refused(tree, prepare, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as file:
        file.write(tree / "n01/0.png", "n01/0.png")
    with pytest.raises(ValueError, match=r"a.zip: cannot be listed \(n01/0.png is encrypted or packed in an unusual "
                                         r"way"):
        prepare(SOURCE=str(tmp_path / "a.zip"))


def test_links_and_newer_versions_in_archives_are_what_unpacking_gives(tmp_path):
    root = tmp_path / "src"
    for i in range(3):
        save(root / f"a/{i}.png", 10 + i)
    (root / "b").mkdir()
    os.link(root / "a/0.png", root / "b/hard.png")
    os.symlink("../a/1.png", root / "b/soft.png")
    os.symlink("soft.png", root / "b/twice.png")
    os.symlink("a", root / "c")  # a class that is a link to another
    os.symlink("..", root / "b/up")  # to a folder it lies in: no images of others
    os.symlink("nowhere.png", root / "b/z.png")
    (root / "empty").mkdir()
    with tarfile.open(tmp_path / "src.tar", "w") as tar:
        tar.add(root, "src")
    save(root / "a/2.png", 99)  # a newer version, appended
    with tarfile.open(tmp_path / "src.tar", "a") as tar:
        tar.add(root / "a/2.png", "src/a/2.png")
    if shutil.which("zip"):
        subprocess.run(["zip", "-qry", tmp_path / "src.zip", "src"], cwd=tmp_path, check=True)
    wanted = dict(a=[10, 11, 99], b=[10, 11, 11], c=[10, 11, 99], empty=[])
    for name in ("src", "src.tar", "src.zip"):
        if (tmp_path / name).exists():
            source = ImageFiles(tmp_path / name)
            broken = [i for i in range(len(source.labels)) if source.name(i).endswith("z.png")]
            assert len(broken) == 1
            with pytest.raises(ValueError, match="unreadable image"):
                source[broken[0]]
            found = {key: [] for key in source.classes}
            for row, label in enumerate(source.labels):
                if row not in broken:
                    found[source.classes[label]].append(source[row].getpixel((0, 0))[0])
            assert found == wanted, name


def test_a_sparse_tar_is_refused(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(10**6)
    made = subprocess.run(["tar", "--sparse", "-cf", tmp_path / "s.tar", "a.png"], cwd=tmp_path)
    with pytest.raises(ValueError, match="a.png is packed as a sparse file; pack it again without --sparse"):
        assert made.returncode == 0 and ImageFiles(tmp_path / "s.tar")
