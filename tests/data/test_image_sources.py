from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from image_files import CLASSES, _own_cache, class_folders, corrupt, encoded, parquet, pixels, rows  # noqa: F401
from PIL import Image as Pillow

from sparsefit.data import ImageDataModule
from sparsefit.data.image_processing import decode
from sparsefit.data.images import labels_of, open_images
from sparsefit.errors import ConfigError, DataError

PLAIN = {"image_size": 8, "mean": [0.0] * 3, "std": [1.0] * 3}


def numbers(images):
    """The numbers of the pictures, in their order."""
    if images.streamed:
        read = [images.row(None, record) for record in images.table]
    else:
        read = images.rows(list(range(len(images.table))))
    return [int(decode(row.content, "RGB")[0, 0, 0]) for row in read]


@pytest.mark.parametrize("prefix", ["", "stream:"])
@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label"), ("x", "y")])
def test_a_parquet_file_is_read_whatever_its_columns_are_called(tmp_path, image, label, prefix):
    file = parquet(tmp_path, rows(7), image=image, label=label)
    images = open_images(prefix + file)
    assert images.streamed == bool(prefix)
    assert images.class_names == CLASSES
    assert numbers(images) == list(range(7))
    if not prefix:
        assert labels_of(images).tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_parquet_files_of_other_tools_have_no_types_for_images_and_classes(tmp_path, kind):
    images = rows(4)
    column = [{"bytes": image, "path": None} for image in images] if kind == "struct" else images
    pq.write_table(pa.table({"picture": column, "label": [0, 1, 1, 0]}), tmp_path / "other.parquet")
    images = open_images(f"{tmp_path}/other.parquet")
    assert images.class_names is None
    assert numbers(images) == [0, 1, 2, 3]
    assert labels_of(images).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("prefix", ["", "stream:"])
def test_a_pattern_joins_its_files_by_name_and_a_slice_takes_a_part(tmp_path, prefix):
    for part in (1, 0, 2):
        parquet(tmp_path, [encoded(pixels(10 * part + number)) for number in range(3)], f"train-{part}.parquet")
    source = f"{prefix}{tmp_path}/train-*.parquet"
    whole = [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert numbers(open_images(source)) == whole
    assert numbers(open_images(f"{source}[2:5]")) == whole[2:5]
    assert numbers(open_images(f"{source}[7:]")) == whole[7:]
    assert numbers(open_images(f"{source}[:4]")) == whole[:4]
    assert numbers(open_images(f"{source}[5:100]")) == whole[5:]


@pytest.mark.parametrize("part", ["[-3:]", "[::2]", "[a:]", "[:-1]", "[1.5:]"])
def test_a_slice_that_sources_do_not_take_is_reported(tmp_path, part):
    file = parquet(tmp_path, rows(3))
    with pytest.raises(ConfigError, match=r"ends in no slice .*SOURCE\[start:stop\] has whole numbers from 0 on"):
        open_images(file + part)


@pytest.mark.parametrize("source", ["", "[:5]"])
def test_a_source_without_a_name_is_not_the_current_folder(source):
    with pytest.raises(ConfigError, match="names no source of images"):
        open_images(source)


@pytest.mark.parametrize("kind", [pa.uint8(), pa.uint16(), pa.uint64(), pa.int8()])
@pytest.mark.parametrize("missing", [False, True])
def test_labels_of_any_whole_numbers(tmp_path, kind, missing):
    labels = pa.array([2, None if missing else 0, 1], kind)
    pq.write_table(pa.table({"image": rows(3), "label": labels}), tmp_path / "kinds.parquet")
    if missing:
        with pytest.raises(DataError, match="1 of 3 images have a label that is missing or negative: image 1 of"):
            open_images(f"{tmp_path}/kinds.parquet")
    else:
        assert labels_of(open_images(f"{tmp_path}/kinds.parquet")).tolist() == [2, 0, 1]
        loader = ImageDataModule(test_source=f"{tmp_path}/kinds.parquet", **PLAIN).test_dataloader()
        assert next(iter(loader))["labels"].tolist() == [2, 0, 1]


@pytest.mark.parametrize("prefix", ["", "stream:"])
def test_a_folder_laid_out_as_on_the_hub(tmp_path, prefix):
    for split, first in (("train", 0), ("test", 50)):
        images = [encoded(pixels(first + number)) for number in range(4)]
        parquet(tmp_path / "pets", images, f"data/{split}-00000-of-00001.parquet")
    assert numbers(open_images(f"{prefix}{tmp_path}/pets:test")) == [50, 51, 52, 53]
    assert open_images(f"{prefix}{tmp_path}/pets:train").class_names == CLASSES
    with pytest.raises(DataError, match=r'pets cannot be read: (Bad|Unknown) split.*"?validation'):
        open_images(f"{prefix}{tmp_path}/pets:validation")
    with pytest.raises(ConfigError, match=r"is a folder without a split: name one .*pets:train"):
        open_images(f"{prefix}{tmp_path}/pets")


def test_class_folders_are_classes_by_name_whatever_they_are_called(tmp_path):
    folder = class_folders(tmp_path / "images", {"train": 2, "test": 3, "[a]*": 1})
    (tmp_path / "images/.cache").mkdir()
    (tmp_path / "images/test/.DS_Store").write_bytes(b"hidden")
    images = open_images(folder)
    assert images.class_names == ["[a]*", "test", "train"]
    assert list(zip(labels_of(images).tolist(), numbers(images), strict=True)) == [
        (0, 5),
        (1, 2),
        (1, 3),
        (1, 4),
        (2, 0),
        (2, 1),
    ]


def test_an_empty_class_folder_is_named(tmp_path):
    folder = class_folders(tmp_path / "images", {"cat": 2, "dog": 0})
    with pytest.raises(DataError, match=r"the class folder .*dog holds no image: fill it, or remove it"):
        open_images(folder)


def test_files_that_are_no_images_are_named(tmp_path):
    folder = class_folders(tmp_path / "images", {"cat": 2, "dog": 1})
    (tmp_path / "images/cat/notes.txt").write_text("not a cat")
    (tmp_path / "images/cat/more").mkdir()
    with pytest.raises(DataError, match=r"2 in the class folder .*cat are no image files: more, notes.txt\. Move"):
        open_images(folder)
    with pytest.warns(UserWarning, match=r"2 in the class folder .*cat are no image files: more, notes.txt\. They"):
        assert numbers(open_images(folder, skip_corrupt=True)) == [0, 1, 2]


@pytest.mark.parametrize("loose", ["labels.csv", None])
def test_a_folder_that_holds_other_things_than_class_folders(tmp_path, loose):
    if loose:
        class_folders(tmp_path, {"cat": 1})
        (tmp_path / loose).write_text("image,label")
    with pytest.raises(DataError, match=f"must hold one folder for each class.* but it holds {loose or 'nothing'}"):
        open_images(str(tmp_path))


def two_of(tmp_path, images=("image",), labels=("label",), values=(0, 1)):
    features = {name: Image(decode=False) for name in images} | {name: ClassLabel(names=CLASSES) for name in labels}
    columns = {name: [{"bytes": one, "path": None} for one in rows(2)] for name in images}
    columns |= {name: list(values) for name in labels}
    Dataset.from_dict(columns, features=Features(features)).to_parquet(tmp_path / "two.parquet")
    return f"{tmp_path}/two.parquet"


def test_columns_that_cannot_be_distinguished_are_named(tmp_path):
    file = two_of(tmp_path, images=("left", "right"))
    with pytest.raises(ConfigError, match=r"several columns of images \(left, right\): set image_column"):
        open_images(file)
    assert numbers(open_images(file, image_column="right")) == [0, 1]
    with pytest.raises(ConfigError, match=r"has no column 'up': set image_column to one of left, right, label"):
        open_images(file, image_column="up")


def test_of_several_label_columns_the_usual_name_is_taken(tmp_path):
    assert open_images(two_of(tmp_path, labels=("fine_label", "coarse_label"))).class_names == CLASSES
    file = two_of(tmp_path, labels=("kind", "colour"))
    with pytest.raises(ConfigError, match=r"several columns of labels \(kind, colour\) .*set label_column"):
        open_images(file)
    assert open_images(file, label_column="colour").class_names == CLASSES
    file = two_of(tmp_path, labels=("label", "fine_label"))
    with pytest.raises(ConfigError, match=r"several columns of labels \(label, fine_label\)"):
        open_images(file)


def test_images_without_labels_or_labels_without_images(tmp_path):
    with pytest.raises(ConfigError, match="no column of labels among image"):
        open_images(two_of(tmp_path, labels=()))
    with pytest.raises(ConfigError, match="has no image among label"):
        open_images(two_of(tmp_path, images=()))
    pq.write_table(pa.table({"image": rows(2), "label": ["cat", "dog"]}), tmp_path / "words.parquet")
    with pytest.raises(DataError, match=r"labels of .* \(column 'label'\) are .*string.* not whole numbers"):
        open_images(f"{tmp_path}/words.parquet")


@pytest.mark.parametrize("wrong", [None, -1])
def test_labels_that_are_missing_or_negative_name_the_image(tmp_path, wrong):
    file = parquet(tmp_path, rows(5), labels=[0, 1, wrong, 2, wrong], names=None)
    with pytest.raises(DataError, match=r"2 of 5 images have a label .* image 2 of .*, image 4 of .*parquet"):
        open_images(file)
    with pytest.raises(DataError, match=r"2 of 3 images .* image 2 of .*, image 4 of"):
        open_images(f"{file}[2:]")
    with pytest.raises(DataError, match=rf"the label of image of .* is {wrong}\. Such images"):
        numbers(open_images(f"stream:{file}"))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("{file}[9:]", DataError, "takes no image: there are 3"),
        ("{file}[2:2]", ConfigError, "its slice ends before it starts"),
        ("{folder}/imagse.parquet", DataError, "there is no file .*Did you mean .*images.parquet"),
        ("{folder}/clases", DataError, "there is no file or folder .*Did you mean .*classes"),
        ("{folder}/clases:train", DataError, "there is no folder .*Did you mean .*classes"),
        ("{folder}/notes.txt", ConfigError, "is a file, but no .parquet file"),
        ("{folder}/broken.parquet", DataError, r"broken.parquet cannot be read: .*Fetch the file again"),
        ("stream:{folder}/classes", ConfigError, "leave stream: out"),
        ("digits:validation", ConfigError, "use digits:train or digits:test"),
        ("stream:digits:train", ConfigError, "use digits:train or digits:test"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path, source, error, message):
    file = parquet(tmp_path, rows(3))
    class_folders(tmp_path / "classes", {"cat": 1})
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + bytes(99))
    with pytest.raises(error, match=message):
        open_images(source.format(file=file, folder=tmp_path))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("cifar10:train", "uoft-cs/cifar10"),
        ("imagenet-1k:validation", "ILSVRC/imagenet-1k"),
        ("stream:some/images:test", "some/images"),
    ],
)
def test_without_a_network_a_data_set_of_the_hub_says_how_to_bring_it(monkeypatch, source, name):
    monkeypatch.setattr("sparsefit.data.image_readers.hub_problem", lambda: "the hub cannot be reached")
    with pytest.raises(DataError, match=rf"(?s){name}.*the hub cannot be reached.*`hf download {name} .*FOLDER:SPLIT"):
        open_images(source)


def test_the_names_of_the_hub_and_what_is_streamed(monkeypatch, tmp_path):
    from datasets import load_dataset

    asked = []
    file = parquet(tmp_path, rows(3))

    def load(name, split, streaming):
        asked.append((name, split, streaming))
        return load_dataset("parquet", data_files=file, split="train", streaming=streaming)

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("sparsefit.data.image_readers.hub_problem", lambda: None)
    sources = ("cifar10:train", "imagenet-1k:validation", "stream:cifar10:test", "ILSVRC/imagenet-1k:train")
    streamed = [open_images(source).streamed for source in sources]
    assert streamed == [streaming for *_, streaming in asked] == [False, True, True, False]
    assert [(name, split) for name, split, _ in asked] == [
        ("uoft-cs/cifar10", "train"),
        ("ILSVRC/imagenet-1k", "validation"),
        ("uoft-cs/cifar10", "test"),
        ("ILSVRC/imagenet-1k", "train"),
    ]


GREY = pixels(3, channels=1)[..., 0]
COLOUR = pixels(4)
ALPHA = pixels(5, channels=4)
WIDE = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)


def on_white(rgba):
    share = rgba[..., 3:] / 255
    return rgba[..., :3] * share + 255 * (1 - share)


def thrice(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def palette(transparent=None):
    image = Pillow.new("P", (8, 8))
    image.putpalette(COLOUR.reshape(-1, 3).flatten().tolist())
    image.putdata(list(range(64)))
    return encoded(image, **({} if transparent is None else {"transparency": transparent}))


def with_white(place):
    colours = COLOUR.copy()
    colours.reshape(-1, 3)[place] = 255
    return colours


def turned(orientation):
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    return encoded(COLOUR[:6], exif=exif)


KINDS = {
    "rgb": (encoded(COLOUR), COLOUR),
    "grey": (encoded(GREY), thrice(GREY)),
    "rgba": (encoded(ALPHA), on_white(ALPHA)),
    "grey with alpha": (encoded(ALPHA[..., [0, 3]]), on_white(ALPHA[..., [0, 0, 0, 3]])),
    "1 bit": (encoded(GREY > 99), thrice(np.where(GREY > 99, 255, 0))),
    "16 bits": (encoded(WIDE), thrice(WIDE >> 8)),
    "16 bits, tiff": (encoded(WIDE, "tiff"), thrice(WIDE >> 8)),
    "palette": (palette(), COLOUR),
    "palette with a transparent colour": (palette(transparent=5), with_white(5)),
    "cmyk": (encoded(Pillow.fromarray(COLOUR).convert("CMYK"), "tiff"), COLOUR),
    "turned": (turned(6), np.rot90(COLOUR[:6], 3)),
    "upright": (turned(1), COLOUR[:6]),
    "webp": (encoded(COLOUR, "webp", lossless=True), COLOUR),
}


@pytest.mark.parametrize(("file", "expected"), KINDS.values(), ids=KINDS)
def test_images_of_every_kind_become_rgb_or_grey(file, expected):
    read = decode(file, "RGB")
    assert read.dtype == np.uint8
    assert read.shape == (3, *expected.shape[:2])
    np.testing.assert_allclose(read.transpose(1, 2, 0), expected, atol=1)  # blending rounds
    grey = decode(file, "L")
    assert grey.shape == (1, *expected.shape[:2])
    np.testing.assert_allclose(grey[0], expected @ [0.299, 0.587, 0.114], atol=2)  # ITU-R 601


def test_jpegs_are_read_as_pillow_reads_them():
    image = Pillow.fromarray(pixels(1, 40, 24))
    for mode in ("RGB", "L", "CMYK"):
        file = encoded(image.convert(mode), "jpeg")
        with Pillow.open(io.BytesIO(file)) as again:
            expected = np.asarray(again.convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(decode(file, "RGB"), expected)


@pytest.mark.parametrize("content", [*map(corrupt, ("garbage", "empty", "truncated", "broken")), None, "no/such.png"])
def test_images_that_cannot_be_decoded_raise(content):
    with pytest.raises((OSError, SyntaxError, ValueError)):
        decode(content, "RGB")


def test_numbers_that_are_no_levels_of_8_or_16_bits_are_refused():
    with pytest.raises(ValueError, match=r"mode F.* neither of 8 nor of 16 bits"):
        decode(encoded(np.ones((4, 4), np.float32), "tiff"), "RGB")
