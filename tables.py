"""Parquet files of images, as the Hugging Face hub serves them."""

import json
import zlib

import numpy as np

from archives import check_shards, is_hidden
from images import Source, read_image
from labels import texts_of


class ParquetFiles(Source):
    """The images of parquet files as the Hugging Face hub serves them: one file, or a folder of those of one split.
    Needs pyarrow. The column of images is the metadata's, or the one of structs with "bytes", or of bytes; a
    ClassLabel, or whole numbers called "label", are the labels; texts, the captions."""

    def __init__(self, root):
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError(f"{root}: parquet files are read with pyarrow; pip install pyarrow") from error
        files = sorted(path for path in root.glob("*.parquet") if not is_hidden(path.name)) if root.is_dir() else [root]
        splits = {path.name.split("-")[0] for path in files}
        if len(splits) > 1:
            raise ValueError(f"{root}: files of {', '.join(sorted(splits))}; set SOURCE to a folder with one of these")
        check_shards(path.name for path in files)
        tables, columns = [], []
        for path in files:
            try:
                tables.append(parquet.ParquetFile(path))
                columns.append(find_columns(tables[-1].schema_arrow, pyarrow.types))
            except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: damaged, or no images with labels or captions as in the "
                                 f"hub's parquet files ({error})") from error
        self.image, self.label, self.text, self.classes = columns[0]
        for path, found in zip(files, columns):
            if found != columns[0]:
                raise ValueError(f"{path}: has other columns or class names than {files[0]}; set "
                                 "SOURCE to a folder of files of one kind")
        self.groups = [(path, group) for path, file in zip(files, tables) for group in range(file.num_row_groups)]
        rows = [file.metadata.row_group(group).num_rows for file in tables for group in range(file.num_row_groups)]
        self.ends, self.open = np.cumsum(rows), (None, None)
        self.labels = self.unlabelled = np.zeros(self.ends[-1], int)
        if self.label:
            labels = pyarrow.chunked_array([chunk for file in tables for chunk in file.read([self.label])[0].chunks])
            self.unlabelled, self.labels = labels.is_null().to_numpy(), labels.fill_null(0).to_numpy().astype(int)
            self.classes = self.classes or [str(label) for label in range(self.labels.max() + 1)]
        self.captions_checksum = 0 if self.text else None
        self.fingerprint = zlib.crc32(self.labels.tobytes())

    def name(self, i):
        return f"{self.groups[np.searchsorted(self.ends, i, 'right')][0]}, row {i} of all"

    def row(self, i):
        """{column: value} of an image."""
        from pyarrow import parquet
        group = int(np.searchsorted(self.ends, i, "right"))
        if self.open[0] != group:  # images are asked for in order, and a group holds a hundred
            path, number = self.groups[group]
            columns = [name for name in (self.image, self.text) if name]
            self.open = group, parquet.ParquetFile(path).read_row_group(number, columns, use_threads=False)
        return self.open[1].slice(int(i - self.ends[group]) + len(self.open[1]), 1).to_pylist()[0]

    def captions(self, i):
        captions = texts_of(self.row(i)[self.text])
        if not captions:
            raise ValueError("no caption")
        return captions

    def __getitem__(self, i):
        if self.unlabelled[i]:
            raise ValueError("no label")
        said = self.row(i)[self.image]
        content = said.get("bytes") if isinstance(said, dict) else said
        if content is None:
            raise ValueError("unreadable image (there are no bytes of it)")
        return read_image(content)


def find_columns(schema, types):
    """(column of images, of labels or None, of captions or None, class names or None) of a parquet file's schema."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})

    def first(of_features, of_types):
        named = [name for name, feature in features.items() if isinstance(feature, dict) and of_features(feature)]
        return (named or [field.name for field in schema if of_types(field.name, field.type)] or [None])[0]

    image = first(lambda feature: feature.get("_type") == "Image",
                  lambda name, kind: types.is_binary(kind) or types.is_large_binary(kind) or (
                      types.is_struct(kind) and kind.get_field_index("bytes") >= 0))
    label = first(lambda feature: feature.get("_type") == "ClassLabel",
                  lambda name, kind: name in ("label", "labels") and types.is_integer(kind))
    is_text = lambda kind: types.is_string(kind) or types.is_large_string(kind)
    text = first(lambda feature: False, lambda name, kind: name in ("caption", "captions", "text", "prompt") and (
        is_text(kind) or (types.is_list(kind) and is_text(kind.value_type))))
    if image is None or (label is None and text is None):
        raise ValueError(f"columns {', '.join(schema.names)}")
    classes = features.get(label, {}).get("names") if label else ["all"]
    return image, label, text, classes
