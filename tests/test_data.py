"""Data sets: every layout that can be read, pixels against numpy, one-line errors, the order of
batches, the loader."""
import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import common
from util import end_workers

CPU = torch.device("cpu")
REAL = Path(__file__).parents[2] / "shared" / "data" / "cifar10-train.zip"
PLACES = pytest.mark.parametrize("source", ["set", "set.zip"])


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def write(source, files, compression=zipfile.ZIP_STORED):
    """Write {name: bytes} as a zip if `source` ends so, else as a folder."""
    if source.suffix == ".zip":
        with zipfile.ZipFile(source, "w", compression) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        for name, content in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    return source


PNG, JPEG = (encoded(pictures(16, 16, 3), kind) for kind in ("PNG", "JPEG"))


def load(source, size=16, name=None):
    if name:
        return common.load_dataset(name, str(source), size)
    return common.load_dataset(str(source), None, size)


def read(dataset):
    """All images, as (n,H,W,C), and what the batch says are their labels."""
    images, labels = dataset.__getitems__(np.arange(len(dataset)))
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.is_contiguous()
    return images.permute(0, 2, 3, 1).numpy(), labels.tolist()


def assert_holds(dataset, images, labels, classes=None):
    """The data set has these images and labels, None if it has none."""
    n = len(images)
    classes = classes or (0 if labels is None else max(labels) + 1)
    assert len(dataset) == n and dataset.classes == classes
    assert np.array_equal(read(dataset)[0], images)
    assert read(dataset)[1] == ([0] * n if labels is None else list(labels))
    assert dataset.labels is None if labels is None else dataset.labels.tolist() == list(labels)


@contextlib.contextmanager
def one_line_error(*words):
    with pytest.raises(common.UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


# ---- glyphs

def test_glyphs_are_a_function_of_the_seed():
    images, labels = common.glyphs(50, seed=3)
    assert images.shape == (50, 16, 16, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    np.random.seed(9)  # the global generators must not matter
    again, other = common.glyphs(50, seed=3), common.glyphs(50, seed=4)
    assert np.array_equal(images, again[0]) and np.array_equal(labels, again[1])
    assert not np.array_equal(labels, other[1])
    assert all(not np.array_equal(a, b) for a, b in zip(images, other[0]))
    assert len(np.unique(images.reshape(50, -1), axis=0)) == 50
    assert common.glyphs(2, seed=0, size=24)[0].shape == (2, 24, 24, 3)


def test_glyphs_show_the_digit_their_label_says():
    """Each looks most like the upright digit of its label, somewhere near the middle."""
    images, labels = common.glyphs(400, seed=5)
    contrast = np.abs(images.astype(float) - images[:, :1, :1]).sum(3)  # whatever the colours
    upright = []
    for digit in "0123456789":
        page = Image.new("L", (16, 16))
        font = ImageFont.load_default(15)
        ImageDraw.Draw(page).text((8, 8), digit, fill=255, font=font, anchor="mm")
        upright += [np.roll(page, shift, (0, 1)) for shift in np.ndindex(5, 5)]
    upright = np.roll(upright, (-2, -2), (1, 2))  # shifts 0 to 4 become -2 to 2

    def unit(a):
        a = a.reshape(len(a), -1) - a.mean((1, 2))[:, None]
        return a / np.linalg.norm(a, axis=1, keepdims=True)
    guess = (unit(contrast) @ unit(upright).T).argmax(1) // 25
    seen_as = np.array([np.bincount(guess[labels == d], minlength=10) for d in range(10)])
    assert (seen_as.sum(1) > 20).all() and (seen_as.argmax(1) == range(10)).all()
    assert (guess == labels).mean() > 0.85


def test_glyphs_are_the_default_data_set(monkeypatch):
    few = common.glyphs(7, seed=0)
    monkeypatch.setattr(common, "glyphs", lambda n, seed, size: few)
    assert_holds(load("glyphs"), *few, classes=10)


# ---- folders and zips

def test_folder_with_a_sub_folder_for_each_class(tmp_path):
    x = pictures(5, 16, 16, 3)
    junk = ("dog/notes.txt", "cat/.hidden.png", "__MACOSX/._1.png", ".thumbs/1.png", "README")
    names = ["ant/deep/er.png", "cat/10.png", "cat/9.PNG", "dog/0.png", "dog/1.bmp"]  # sorted
    files = dict.fromkeys(junk, b"")
    for name, image in zip(names[::-1], x[::-1]):
        files[name] = encoded(image, "BMP" if name.endswith("bmp") else "PNG")
    dataset = load(write(tmp_path / "set", files))
    assert_holds(dataset, x, [0, 1, 1, 2, 2])
    some = dataset.__getitems__(np.array([4, 1, 4]))
    assert np.array_equal(some[0].permute(0, 2, 3, 1), x[[4, 1, 4]])
    assert some[1].tolist() == [2, 1, 2]


def test_classes_may_be_links(tmp_path):
    write(tmp_path, {"far/away/1.png": PNG, "set/cat/1.png": PNG})
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "far" / "away")
    assert load(tmp_path / "set").labels.tolist() == [0, 1]


NO_LABELS = {"dataset.json": b'{"labels": null}'}


@pytest.mark.parametrize("name, index", [("{}.png", {}), ("{}.png", NO_LABELS),
                                         ("0000{}/a.png", NO_LABELS), ("a/b/{}.png", NO_LABELS)])
@PLACES
def test_images_without_labels(tmp_path, source, name, index):
    """Loose ones, or wherever a dataset.json says so."""
    x = pictures(3, 16, 16, 3)
    files = {name.format(i): encoded(x[i]) for i in (2, 0, 1)}
    dataset = load(write(tmp_path / source, files | index))
    assert_holds(dataset, x, None)
    assert dataset.names is None and dataset.present == [] and "no labels" in dataset.describe()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@PLACES
def test_labels_of_dataset_json(tmp_path, source, compression):
    """EDM's layout. The sub-folders there say nothing about the class."""
    x = pictures(3, 16, 16, 3)
    files = {f"0000{i // 2}/img{i}.png": encoded(x[i]) for i in range(3)}
    labels = dict(zip(files, [7, 0, 3])) | {"00009/gone.png": 1}
    files["dataset.json"] = json.dumps({"labels": list(labels.items())[::-1]}).encode()
    assert_holds(load(write(tmp_path / source, files, compression)), x, [7, 0, 3])


def test_nothing_is_decoded_before_it_is_asked_for(tmp_path):
    files = {f"{kind}/{i}.jpg": b"garbage" for kind in "ab" for i in range(3)}
    dataset = load(write(tmp_path / "set", files))
    assert len(dataset) == 6 and dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with one_line_error(tmp_path / "set/b/1.jpg", "image"):
        dataset.__getitems__(np.array([4]))


# ---- what a data set is, said before it is used

@PLACES
def test_a_folder_is_described(tmp_path, source):
    wide, tall = encoded(pictures(20, 30, 3)), encoded(pictures(17, 16))
    files = {"bird/a.png": wide, "cat/b.JPG": tall, "dog/list.txt": b"", "dog/README": b"",
             "ant/deep/er.png": PNG, "dog/c.webp": PNG, "eel/f.png": PNG, "eel/deep/f.png": PNG,
             ".hidden/g.txt": b""}
    dataset = load(write(tmp_path / source, files))
    assert dataset.describe() == (
        f"{tmp_path / source}: 6 images of 16x16 to 30x20 pixels, 5 classes: ant, bird, cat, dog, "
        "..; folders within a class belong to it; skipped 2 files (.txt, README)")
    assert dataset.names == ["ant", "bird", "cat", "dog", "eel"] and dataset.present == [*range(5)]
    one = load(write(tmp_path / "one", {"x/a.png": PNG})).describe()
    assert one.endswith("1 images of 16x16 pixels, 1 class: x")


def test_sizes(tmp_path):
    """Width by height; of many files those of some."""
    np.save(tmp_path / "x.npy", pictures(3, 16, 20, 3))
    assert "3 images of 20x16 pixels, no labels" in load(tmp_path / "x.npy").describe()
    files = {f"{i:02d}.png": PNG for i in range(40)} | {"00.png": b"garbage"}
    line = load(write(tmp_path / "set", files)).describe()
    assert line.endswith("set: 40 images of 16x16 pixels (of 16 looked at), no labels")
    assert load(numbered(tmp_path / "bad", 1)).describe().endswith("2 classes, of which 1 occur: 1")
    (tmp_path / "bad" / "000.png").write_bytes(b"garbage")
    assert "1 images of ? pixels" in load(tmp_path / "bad").describe()


def test_built_in_sets_know_their_classes(cifar10, monkeypatch):
    monkeypatch.setattr(common, "glyphs", lambda n, seed, size: common_glyphs(200, seed, size))
    dataset = load("glyphs")
    assert dataset.describe() == "glyphs: 200 images of 16x16 pixels, 10 classes: 0, 1, 2, 3, .."
    mirror(monkeypatch, "cifar10", cifar10)
    names = load(cifar10.parent, 32, "cifar10").names
    assert names == "airplane automobile bird cat deer dog frog horse ship truck".split()


common_glyphs = common.glyphs


def test_a_name_that_is_no_text_can_be_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    dataset = load(write(tmp_path / "set", {f"{name}/a.png": PNG, "b/b.png": PNG}))
    assert dataset.names == ["b", name] and "2 classes: b, caf?" in dataset.describe()


@PLACES
def test_splits_are_no_classes(tmp_path, source):
    """The command that is meant is said, with the flag that named the folder."""
    source = tmp_path / source
    write(source, {"Train/cat/1.png": PNG, "val/cat/2.png": PNG, "classes.txt": b""})
    training = f"{source}/Train" if source.is_dir() else "with a zip of Train"
    with one_line_error(source, "splits, no classes (Train, val)", f"--dataset {training}"):
        load(source)
    with one_line_error(f"--data-dir {training}"):
        load(source, 16, "cat256")
    (tmp_path / "flat").mkdir()
    write(tmp_path / "flat" / source.name, {"test/1.png": PNG, "valid/2.png": PNG})
    with one_line_error("splits", "test"):
        load(tmp_path / "flat" / source.name)
    (tmp_path / "coco").mkdir()
    files = dict.fromkeys(("train2017/1.png", "val_set/2.png", "more/3.png"), PNG)
    with one_line_error("splits", "train2017"):
        load(write(tmp_path / "coco" / source.name, files))
    (tmp_path / "vehicles").mkdir()
    files = dict.fromkeys(("bus/1.png", "train/2.png"), PNG)
    assert load(write(tmp_path / "vehicles" / source.name, files)).names == ["bus", "train"]


@PLACES
def test_a_set_that_lies_alone_in_folders(tmp_path, source):
    """They are stepped into, and the line says so; empty splits beside it are refused."""
    x = pictures(3, 16, 16, 3)
    names = "a/train/cat/1.png", "a/train/cat/2.png", "a/train/dog/0.png"
    files = dict(zip(names, map(encoded, x)))
    (tmp_path / "deep").mkdir()
    dataset = load(write(tmp_path / "deep" / source, files | {"a/notes.txt": b""}))
    assert_holds(dataset, x, [0, 0, 1])
    assert dataset.names == ["cat", "dog"] and dataset.describe().endswith(
        "2 classes: cat, dog; all of it in a/train/; skipped 1 file (.txt)")
    files = {f"train/{i}.png": encoded(x[i]) for i in range(3)}
    assert_holds(load(write(tmp_path / source, files)), x, None)
    write(tmp_path / "half", {"train/cat/1.png": PNG})
    (tmp_path / "half" / "val").mkdir()
    with one_line_error(f"--dataset {tmp_path / 'half'}/train"):
        load(tmp_path / "half")


@PLACES
def test_parts_are_no_classes(tmp_path, source):
    files = {"00000/1.png": PNG, "01000/2.png": PNG}
    with one_line_error(source, "00000, 01000", "parts", '{"labels": null}'):
        load(write(tmp_path / source, files))
    (tmp_path / "with").mkdir()
    assert load(write(tmp_path / "with" / source, files | NO_LABELS)).classes == 0


@PLACES
def test_folders_of_folders_are_no_classes(tmp_path, source):
    files = {"animals/cat/1.png": PNG, "animals/dog/2.png": PNG, "cars/vw/3.png": PNG}
    with one_line_error(source, "folders of folders (animals/cat, animals/dog, cars/vw)", "animals",
                        '{"labels": null}'):
        load(write(tmp_path / source, files))
    del files["animals/cat/1.png"]  # one each: whichever are the classes, the labels are the same
    (tmp_path / "one each").mkdir()
    dataset = load(write(tmp_path / "one each" / source, files))
    assert dataset.names == ["animals", "cars"] and dataset.labels.tolist() == [0, 1]


@PLACES
def test_a_class_without_images(tmp_path, source):
    """It would vanish, and the labels of those after it would move."""
    for i, empty in enumerate(("bird/notes.txt", "bird/")):
        place = tmp_path / str(i) / source
        place.parent.mkdir()
        files = {"ant/1.png": PNG, "cat/1.png": PNG, empty: b""}
        if empty.endswith("/") and not source.endswith(".zip"):
            del files[empty]
            (place / "bird").mkdir(parents=True)
        with one_line_error(place / "bird", "no images"):
            load(write(place, files))
    dataset = load(write(tmp_path / "loose", {"1.png": PNG, "masks/notes.txt": b""}))
    assert dataset.classes == 0 and "skipped 1 file (.txt)" in dataset.describe()


def test_links(tmp_path):
    """To nothing, to a folder above, to a class, to themselves: none vanishes or counts twice."""
    source = write(tmp_path / "set", {"cat/1.png": PNG, "cat/2.png": PNG, "dog/1.png": PNG})
    link = source / "dog" / "more"
    for target, words in (("nowhere", "a link to nothing"), (source, "once more"),
                          (tmp_path, "once more"), ("/", "is / once more"),
                          (source / "cat", "once more"), (link, "symbolic links")):
        link.symlink_to(target)
        with one_line_error(source, words):
            load(source)
        link.unlink()
    assert len(load(source)) == 3
    (source / "dog" / "2.png").symlink_to("nowhere.png")
    with one_line_error(source / "dog" / "2.png", "a link to nothing"):
        load(source)


def test_a_class_that_cannot_be_read(tmp_path, monkeypatch):
    source, scan = write(tmp_path / "set", {"cat/1.png": PNG, "dog/1.png": PNG}), os.scandir

    def forbidding(path):
        if Path(path).name == "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)
    monkeypatch.setattr(os, "scandir", forbidding)
    with one_line_error(source / "cat", "Permission denied"):
        load(source)


@PLACES
def test_numbers_are_sorted_as_numbers(tmp_path, source):
    x = pictures(12, 16, 16, 3)
    files = {f"{i}/a.png": encoded(x[i]) for i in range(12)}
    dataset = load(write(tmp_path / source, files))
    assert dataset.names == [str(i) for i in range(12)]
    images, labels = read(dataset)
    assert sorted(labels) == [*range(12)] and np.array_equal(images, x[labels])
    (tmp_path / "more").mkdir()
    more = load(write(tmp_path / "more" / source, files | {"cat/a.png": PNG, "A/a.png": PNG}))
    assert more.names == [*dataset.names, "A", "cat"]


@pytest.mark.parametrize("name", ["0000{0}/img{0}.png", "{}.png"])
@PLACES
def test_dataset_json_of_a_folder_further_down(tmp_path, source, name):
    """If all lies there, its names are counted from there; else it is refused."""
    x = pictures(3, 16, 16, 3)
    names = list(map(name.format, range(3)))
    labels = dict(zip(names, [2, 0, 1])) | {"00009/gone.png": 0}
    files = {f"set/{name}": encoded(image) for name, image in zip(names, x)}
    files["set/dataset.json"] = json.dumps({"labels": list(labels.items())}).encode()
    dataset = load(write(tmp_path / source, files))
    assert_holds(dataset, x, [2, 0, 1])
    assert dataset.describe().endswith("all of it in set/; 1 in dataset.json have no file")
    (tmp_path / "two").mkdir()
    source = tmp_path / "two" / source
    way = f"{source}/set" if source.suffix != ".zip" else "with a zip of set"
    with one_line_error("set/dataset.json", f"--dataset {way}"):
        load(write(source, files | {"other/a.png": PNG}))


def test_classes_in_the_names_of_files(tmp_path):
    """ADM's naming is not followed, frame_001.png looks the same, but said."""
    files = {f"{name}_{i}.png": PNG for name in ("dog", "cat") for i in range(3)}
    dataset = load(write(tmp_path / "set", files))
    assert dataset.classes == 0 and "; cat, dog are classes if each" in dataset.describe()
    for other in ({f"dog_{i}.png": PNG for i in range(6)}, {f"{i}_dog.png": PNG for i in range(6)},
                  files | {"plain.png": PNG}):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        assert load(write(folder, other)).describe().endswith(", no labels")


def test_labels_that_do_not_occur(tmp_path):
    labels = np.array([217, 0, 491, 482, 0])
    np.savez(tmp_path / "x.npz", pictures(5, 16, 16, 3), labels)
    dataset = load(tmp_path / "x.npz")
    assert dataset.classes == 492 and dataset.present == [0, 217, 482, 491]
    assert dataset.describe().endswith("492 classes, of which 4 occur: 0, 217, 482, 491")
    for far in (1000, 20_000_000, 2**63 - 1):
        np.savez(tmp_path / "x.npz", pictures(5, 16, 16, 3), np.array([0, 1, 2, 3, far], np.uint64))
        with one_line_error(tmp_path / "x.npz", f"label {far}, far beyond its 5 images"):
            load(tmp_path / "x.npz")


def test_what_a_checkpoint_remembers(tmp_path):
    """Other names, labels, numbers of images are noticed, and named; what is not known is not."""
    files = {"cat/1.png": PNG, "cat/2.png": PNG, "dog/1.png": PNG}
    summary = load(write(tmp_path / "set", files)).summary()
    state = dict(n=3, names=["cat", "dog"], present=[0, 1])
    assert {key: summary[key] for key in state} == state and len(summary["digest"]) == 12
    assert json.loads(json.dumps(summary)) == summary == load(tmp_path / "set").summary()
    assert load(write(tmp_path / "set.zip", files)).summary() == summary  # the same, packed
    for i, (changed, words) in enumerate([
            ({"cat/1.png": 1, "cat/2.png": 1, "hound/1.png": 1},
             ["classes only there: dog, only now: hound"]),
            (files | {"eel/1.png": 1}, ["classes only there: none, only now: eel",
                                        "3 images there, 4 now"]),
            ({"cat/1.png": 1, "dog/1.png": 1, "dog/2.png": 1}, ["other labels"]),
            ({"cat/1.png": 1, "cat/3.png": 1, "dog/1.png": 1}, ["other labels"])]):
        other = load(write(tmp_path / str(i), dict.fromkeys(changed, PNG))).summary()
        texts = common.data_differences(summary, other)
        assert len(texts) == len(words) and all(map(str.startswith, texts, words)), texts
    assert common.data_differences(summary, dict(summary)) == []
    assert common.data_differences(None, summary) == common.data_differences(summary, None) == []
    numbers = summary | dict(names=["2", "10"])  # they were sorted as words before
    assert "10 before 2" in common.data_differences(None, numbers)[0]
    np.savez(tmp_path / "a.npz", pictures(3, 16, 16, 3), [0, 1, 1])
    np.savez(tmp_path / "b.npz", pictures(3, 16, 16, 3), [0, 0, 1])
    a, b = (load(tmp_path / name).summary() for name in ("a.npz", "b.npz"))
    assert common.data_differences(a, b)


# ---- pixels

def as_read(content, size=16):
    return common.fit_image(Image.open(io.BytesIO(content)), size, "here")


def test_grayscale_and_palette():
    gray, rgb = pictures(16, 16), pictures(16, 16, 3)
    assert np.array_equal(as_read(encoded(gray)), np.stack([gray] * 3, 2))
    palette = Image.fromarray(gray % 5, "P")
    palette.putpalette(rgb[0, :5].tobytes())
    assert np.array_equal(as_read(encoded(palette)), rgb[0][gray % 5])
    bits = gray > 99
    assert np.array_equal(as_read(encoded(Image.fromarray(bits))), np.stack([bits * 255] * 3, 2))


def test_sixteen_bit_grayscale():
    values = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    values[0, :4] = 0, 65535, 128, 129  # the last two lie either side of 0.5 / 255
    read = as_read(encoded(values))
    assert read.dtype == np.uint8 and read[0, :4, 0].tolist() == [0, 255, 0, 1]
    assert np.array_equal(read, np.stack([np.rint(values * (255 / 65535))] * 3, 2))


def test_cmyk_jpeg():
    for ink, colour in (((0, 255, 255, 0), (255, 0, 0)), ((255, 0, 0, 0), (0, 255, 255)),
                        ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 0, 0), (255, 255, 255))):
        read = as_read(encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95))
        assert np.abs(read.astype(int) - colour).max() <= 3


def test_crop_is_central():
    """An odd pixel too many is cut off at the right or the bottom, as in ADM."""
    for height, width, top, left in ((16, 24, 0, 4), (24, 16, 4, 0), (16, 19, 0, 1),
                                     (19, 16, 1, 0)):
        image = np.full((height, width, 3), 255, np.uint8)
        image[top:top + 16, left:left + 16] = middle = pictures(16, 16, 3)
        assert np.array_equal(as_read(encoded(image)), middle)


def halved(x):
    """A box filter that rounds as Pillow does: across, then down, halves rounded up both times."""
    for axis in (1, 0):
        x = x.swapaxes(0, axis)[:x.shape[axis] // 2 * 2]
        x = ((x[::2] + x[1::2] + 1) // 2).swapaxes(0, axis)
    return x


def bicubic(n, m):
    """Keys' kernel (a = -1/2), widened for shrinking: weights (m,n) of n pixels in each of m."""
    x = np.abs((np.arange(n) + 0.5) * m / n - (np.arange(m)[:, None] + 0.5))
    far = np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0)
    weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, far)
    return weights / weights.sum(1, keepdims=True)


def middle_square(x):
    top, left = (x.shape[0] - 16) // 2, (x.shape[1] - 16) // 2
    return x[top:top + 16, left:left + 16]


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (64, 128), (160, 64)])
def test_powers_of_two_are_box_averages(height, width):
    x = pictures(height, width, 3)
    small = x.astype(int)
    while min(small.shape[:2]) > 16:
        small = halved(small)
    assert np.abs(as_read(encoded(x)) - middle_square(small)).max() <= 1  # tall ones go down first


@pytest.mark.parametrize("height, width, halvings, new_height, new_width", [
    (24, 24, 0, 16, 16), (31, 24, 0, 21, 16), (36, 100, 1, 16, 44), (140, 100, 2, 22, 16)])
def test_other_sizes_are_bicubic(height, width, halvings, new_height, new_width):
    x = pictures(height, width, 3) // 2 + 64  # no overshoot, which would be clipped
    small = x.astype(int)
    for _ in range(halvings):
        small = halved(small)
    down, across = bicubic(small.shape[0], new_height), bicubic(small.shape[1], new_width)
    small = middle_square(np.einsum("ih,jw,hwc->ijc", down, across, small))
    assert np.abs(as_read(encoded(x)) - small).max() < 1.2  # Pillow rounds twice


# ---- arrays

@pytest.mark.parametrize("larger", [False, True])
@pytest.mark.parametrize("layout", ["nhwc", "nchw", "gray", "gray1"])
def test_shapes_of_arrays(tmp_path, layout, larger):
    """Twice as large, with margins left and right, they are shrunk."""
    x = pictures(3, 16, 16, 3)
    if "gray" in layout:
        x[:] = x[..., :1]
    whole = x
    if larger:
        whole = np.pad(x.repeat(2, 1).repeat(2, 2), ((0, 0), (0, 0), (6, 6), (0, 0)))
    np.save(tmp_path / "x.npy", dict(
        nhwc=whole, nchw=whole.transpose(0, 3, 1, 2), gray=whole[..., 0],
        gray1=whole[..., :1])[layout])
    assert_holds(load(tmp_path / "x.npy"), x, None)


@pytest.mark.parametrize("keys", [
    ("arr_0", "arr_1"), ("images", "labels"), ("x", "y"), ("data",), ("images", "label"),
    ("data", "targets"), ("X_train", "y_train")])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save, keys):
    x, y = pictures(6, 16, 16, 3), np.array([3, 1, 0, 0, 2, 1], np.int32)
    save(tmp_path / "x.npz", **dict(zip(keys, (x, y))))
    dataset = load(tmp_path / "x.npz")
    assert isinstance(dataset.parts[0], np.memmap)
    assert_holds(dataset, x, y if len(keys) == 2 else None)


def test_other_arrays_of_an_npz_are_named(tmp_path):
    x, path = pictures(4, 16, 16, 3), tmp_path / "x.npz"
    arrays = dict(x_train=x, y_train=[1, 0, 1, 0], x_test=x, y_test=[0, 1, 1, 1])
    np.savez(path, **arrays)
    dataset = load(path)
    assert_holds(dataset, x, [1, 0, 1, 0])
    assert dataset.describe() == (f"{path}: 4 images of 16x16 pixels, 2 classes: 0, 1; neither "
                                  "images nor labels: x_test, y_test")
    for more in ("labels", "images"):
        np.savez(path, **arrays, **{more: arrays["x_train"]})
        with one_line_error(path, more, "could both be meant"):
            load(path)


def test_names_of_classes_in_an_npz(tmp_path):
    x, path = pictures(4, 16, 16, 3), tmp_path / "x.npz"
    np.savez(path, images=x, labels=[1, 0, 1, 0], class_names=["cat", "dog", "eel"])
    dataset = load(path)
    assert_holds(dataset, x, [1, 0, 1, 0], classes=3)
    assert dataset.names == ["cat", "dog", "eel"]
    assert dataset.describe().endswith("3 classes, of which 2 occur: cat, dog")
    for names, words in ((["cat"], "label 1, and 1 class names"), ([3, 4], "names of the classes"),
                         ([["cat", "dog"]], "names of the classes")):
        np.savez(path, images=x, labels=[1, 0, 1, 0], class_names=names)
        with one_line_error(path, words):
            load(path)


def test_stored_arrays_are_mapped_in_place(tmp_path):
    x = pictures(4, 16, 16, 3)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x, np.arange(4))
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(x))
    for name in ("x.npy", "x.npz", "fortran.npz"):
        images = load(tmp_path / name).parts[0]
        assert isinstance(images, np.memmap) and Path(images.filename) == tmp_path / name
        assert np.array_equal(images, x)
        with pytest.raises(ValueError):  # read-only
            images[0] = 0
    assert len(list(tmp_path.iterdir())) == 3


def test_compressed_arrays_are_unpacked_once(tmp_path):
    x, path = pictures(4, 16, 16, 3), tmp_path / "x.npz"
    np.savez_compressed(path, x)
    images = load(path).parts[0]
    unpacked, = tmp_path.rglob("*.npy")
    assert isinstance(images, np.memmap) and Path(images.filename) == unpacked
    assert np.array_equal(np.load(unpacked), x)
    first = unpacked.stat()
    load(path)
    again = unpacked.stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    np.savez_compressed(path, 255 - x)
    os.utime(path, (first.st_mtime + 9, first.st_mtime + 9))  # newer than what was unpacked
    assert np.array_equal(read(load(path))[0], 255 - x)


def write_imagenet64(folder, compressed=(), batches=10):
    """Ten official batches of two images, the first labelled with the batch's number. -> images"""
    x = pictures(batches, 2, 64, 64, 3)
    for i in range(batches):
        part = folder / f"part{i // 5}"
        part.mkdir(parents=True, exist_ok=True)
        rows = x[i].transpose(0, 3, 1, 2).reshape(2, -1)  # all of red, green, then blue
        save = np.savez_compressed if i in compressed else np.savez
        save(part / f"train_data_batch_{i + 1}.npz", data=rows, labels=np.array([i + 1, 1000]),
             mean=np.zeros(12288))
    return x.reshape(-1, 64, 64, 3)


def test_official_imagenet64(tmp_path):
    x = write_imagenet64(tmp_path, compressed=[3])
    dataset = load(tmp_path, 64, "imagenet64")
    assert_holds(dataset, x, [label for i in range(10) for label in (i, 999)])
    assert all(isinstance(part, np.memmap) for part in dataset.parts)
    half = read(load(tmp_path, 32, "imagenet64"))[0]
    assert np.abs(half - x.reshape(20, 32, 2, 32, 2, 3).mean((2, 4))).max() <= 1


def test_official_batches_with_a_network_of_another_order(tmp_path):
    """Without map_clsloc.txt classes are not in the order of released networks: those are refused,
    as is one that says it was trained on something else. Older ones do not say."""
    write_imagenet64(tmp_path, batches=1)
    dataset = load(tmp_path, 64, "imagenet64")
    assert "numbers do not compare; its classes in an order of their own" in dataset.describe()
    own, other = dataset.summary(), dataset.summary() | dict(names=["n100"])
    teacher = types.SimpleNamespace(classes=1000, script=None, data=None)
    run = types.SimpleNamespace(data=own, main=True)
    args = types.SimpleNamespace(teacher="edm.pt", dataset="imagenet64")
    for script, data, right in ((None, None, False), (None, other, False), ("cd", other, False),
                                ("cd", own, True), ("cd", None, True)):
        teacher.script, teacher.data = script, data
        with contextlib.nullcontext() if right else one_line_error("map_clsloc.txt", "edm.pt"):
            assert common.teacher_denoiser(args, run, teacher, dataset)[1] == 1000
    teacher.script, teacher.data, teacher.classes = None, None, 0  # it hears of no labels
    common.teacher_denoiser(args, run, teacher, dataset)
    lines = (f"n{1000 - number:03d} {number} x" for number in range(1, 1001))
    (tmp_path / "map_clsloc.txt").write_text("\n".join(lines))
    dataset, teacher.classes = load(tmp_path, 64, "imagenet64"), 1000
    assert dataset.names == [f"n{i:03d}" for i in range(1000)]
    assert "numbers do not compare" in dataset.describe() and "order" not in dataset.describe()
    common.teacher_denoiser(args, run, teacher, dataset)


def test_imagenet_classes_are_renumbered_by_their_names(tmp_path):
    """Official batches count classes as map_clsloc.txt does; released networks by their names."""
    np.savez(tmp_path / "train_data_batch_1.npz", data=np.zeros((4, 12288), np.uint8),
             labels=np.array([1, 2, 3, 1]))
    assert load(tmp_path, 64, "imagenet64").labels.tolist() == [0, 1, 2, 0]
    classes = tmp_path / "map_clsloc.txt"
    classes.write_text("n300 1 kit_fox\nn100 3 dhole\nn200 2 dingo\n")
    assert load(tmp_path, 64, "imagenet64").labels.tolist() == [2, 1, 0, 2]
    np.savez(tmp_path / "train_data_batch_1.npz", data=np.zeros((4, 12288), np.uint8),
             labels=np.array([1, 2, 0, 1]))
    with one_line_error("count from 1, not from 0"):
        load(tmp_path, 64, "imagenet64")
    np.savez(tmp_path / "train_data_batch_1.npz", data=np.zeros((4, 12288), np.uint8),
             labels=np.array([1, 2, 3, 1]))
    classes.write_text("kit_fox\n")
    with one_line_error("map_clsloc.txt is not ImageNet's list"):
        load(tmp_path, 64, "imagenet64")


# ---- CIFAR-10 and MNIST

@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """Like the official one: image j of batch i has label (i + j) % 10, colour i, j % 251, row."""
    path = tmp_path_factory.mktemp("mirror") / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for i in range(1, 6):
            rows = np.empty((10000, 3073), np.uint8)
            planes = rows[:, 1:].reshape(10000, 3, 32, 32)
            rows[:, 0] = (i + np.arange(10000)) % 10
            planes[:, 0], planes[:, 2] = i, np.arange(32)[:, None]
            planes[:, 1] = (np.arange(10000) % 251)[:, None, None]
            member = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i}.bin")
            member.size = rows.nbytes
            tar.addfile(member, io.BytesIO(rows))
    return path


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """Like the official files: of the 7 digits to train on and the 3 of the test, image j is of
    label j % 10 and grey 20 j + its row, beside 100 in those of the test."""
    folder = tmp_path_factory.mktemp("mnist")
    for part, n, base in (("train", 7, 0), ("t10k", 3, 100)):
        images = np.full((n, 28, 28), base, np.uint8)
        images += (20 * np.arange(n)[:, None, None] + np.arange(28)[:, None]).astype(np.uint8)
        labels = np.arange(n, dtype=np.uint8)
        for name, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
            header = np.array([magic, *array.shape], ">i4").tobytes()
            path = folder / f"{part}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def mirror(monkeypatch, name, *files, url=None):
    """Let a data set be fetched from these files."""
    md5s = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in files}
    url = url or files[0].parent.as_uri() + "/"
    monkeypatch.setitem(common.FETCHED, name, (url, md5s))


@pytest.mark.parametrize("folder", ["missing/folder", "."])
def test_cifar10_is_fetched_and_checked(cifar10, tmp_path, monkeypatch, folder):
    mirror(monkeypatch, "cifar10", cifar10)
    fetched = tmp_path / folder / cifar10.name
    assert len(load(tmp_path / folder, 32, "cifar10")) == 50000
    assert fetched.read_bytes() == cifar10.read_bytes()
    assert list(fetched.parent.iterdir()) == [fetched]
    fetched.write_bytes(b"something else")
    with one_line_error(fetched, "damaged"):
        load(tmp_path / folder, 32, "cifar10")
    fetched.unlink()
    common.FETCHED["cifar10"][1][cifar10.name] = "0" * 32
    with one_line_error(fetched, "damaged"):  # on the way, say
        load(tmp_path / folder, 32, "cifar10")


def test_mnist_is_fetched_and_checked(mnist, tmp_path, monkeypatch):
    files = [mnist / name for name in common.FETCHED["mnist"][1]]
    mirror(monkeypatch, "mnist", *files)
    dataset = load(tmp_path / "new", 28, "mnist")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {path.name for path in files}
    assert dataset.describe().endswith("train-images-idx3-ubyte.gz: 7 images of 28x28 pixels, 10 "
                                       "classes, of which 7 occur: 0, 1, 2, 3, ..")
    rows = np.arange(28)[:, None, None]
    grey = [np.broadcast_to(20 * j + rows, (28, 28, 3)) for j in range(7)]
    assert_holds(dataset, np.array(grey, np.uint8), np.arange(7), classes=10)
    mirror(monkeypatch, "mnist", *files, url="file:///nowhere/")  # they are there now
    test = common.load_mnist(tmp_path / "new", 28, test=True)
    assert_holds(test, 100 + np.array(grey[:3], np.uint8), np.arange(3), classes=10)
    (tmp_path / "new" / files[3].name).write_bytes(b"half")
    with one_line_error(files[3].name, "damaged"):
        load(tmp_path / "new", 28, "mnist")
    (tmp_path / "new" / files[1].name).unlink()
    with one_line_error("file:///nowhere/" + files[1].name, tmp_path / "new", "--data-dir"):
        load(tmp_path / "new", 28, "mnist")


def test_cifar10_is_fetched_only_if_missing(cifar10, monkeypatch):
    mirror(monkeypatch, "cifar10", cifar10, url="file:///nowhere/")
    dataset = load(cifar10.parent, 32, "cifar10")
    i, j = np.arange(50000) // 10000 + 1, np.arange(50000) % 10000
    assert len(dataset) == 50000 and dataset.classes == 10
    assert np.array_equal(dataset.labels, (i + j) % 10)
    some = np.array([0, 9999, 10000, 49999])
    images, labels = dataset.__getitems__(some)
    assert images.shape == (4, 3, 32, 32) and labels.tolist() == [1, 0, 2, 4]
    for image, at in zip(images, some):
        assert (image[0] == i[at]).all() and (image[1] == j[at] % 251).all()
        assert torch.equal(image[2], torch.arange(32, dtype=torch.uint8)[:, None].expand(32, 32))


def test_cifar10_that_cannot_be_fetched(tmp_path, monkeypatch):
    url = "file:///nowhere/"
    monkeypatch.setitem(common.FETCHED, "cifar10", (url, common.FETCHED["cifar10"][1]))
    with one_line_error(url + "cifar-10-binary.tar.gz", tmp_path / "new", "--data-dir"):
        load(tmp_path / "new", 32, "cifar10")
    with one_line_error("--data-dir", tmp_path / "new.npz", "does not exist"):  # no folder's name
        load(tmp_path / "new.npz", 32, "cifar10")
    assert not list(tmp_path.rglob("*.*"))


def test_two_data_sets_are_fetched_into_one_folder(mnist, tmp_path, monkeypatch):
    """Not into one of other files."""
    mirror(monkeypatch, "mnist", *(mnist / name for name in common.FETCHED["mnist"][1]))
    for name in ("cifar-10-binary.tar.gz", "other.txt"):
        write(tmp_path / name.split(".")[0], {name: b"something"})
    assert len(load(tmp_path / "cifar-10-binary", 28, "mnist")) == 7
    with one_line_error(tmp_path / "other", "holds no images"):
        load(tmp_path / "other", 28, "mnist")


@pytest.mark.parametrize("name", common.NAMED)
def test_a_named_data_set_from_other_images(tmp_path, name):
    x = pictures(2, 32, 32, 3)
    files = {f"n{i}/a.png": encoded(x[i]) for i in range(2)}
    assert_holds(load(write(tmp_path / "set", files), 32, name), x, [0, 1])
    assert_holds(load(write(tmp_path / "set.zip", files), 32, name), x, [0, 1])


@pytest.mark.skipif(not REAL.exists(), reason=f"no real images: {REAL.name} is not there")
def test_real_cifar10():
    with zipfile.ZipFile(REAL) as archive:
        label_of = dict(json.loads(archive.read("dataset.json"))["labels"])
        names = sorted(label_of)
        dataset = load(REAL, 32)
        assert len(dataset) == 50000 and dataset.classes == 10
        assert dataset.labels.tolist() == [label_of[name] for name in names]
        some = np.random.default_rng(0).integers(0, 50000, 64)
        images, labels = dataset.__getitems__(some)
        assert images.shape == (64, 3, 32, 32)
        for image, label, i in zip(images, labels, some):
            assert label == label_of[names[i]]
            assert np.array_equal(image.permute(1, 2, 0), Image.open(archive.open(names[i])))


# ---- errors: one line that names the file

@PLACES
@pytest.mark.parametrize("name, content", [
    ("text.png", b"not an image\nat all"), ("empty.jpg", b""), ("header.png", PNG[:20]),
    ("cut.png", PNG[:len(PNG) // 2]), ("cut.jpg", JPEG[:len(JPEG) // 2]),
    ("damaged.png", PNG[:60] + bytes(60) + PNG[120:]), ("low.png", encoded(pictures(15, 40, 3))),
    ("narrow.png", encoded(pictures(16, 15).astype(np.uint16)))])
def test_bad_images(tmp_path, source, name, content):
    dataset = load(write(tmp_path / source, {"0.png": PNG, name: content}))
    dataset.__getitems__(np.array([0]))
    with one_line_error(tmp_path / source / name):
        dataset.__getitems__(np.array([0, 1]))


@pytest.mark.parametrize("damage", ["stored", "deflated", "encrypted"])
def test_damage_within_a_zip(tmp_path, damage):
    compression = zipfile.ZIP_STORED if damage == "stored" else zipfile.ZIP_DEFLATED
    source = write(tmp_path / "set.zip", {"a.png": PNG}, compression)
    content = bytearray(source.read_bytes())
    if damage == "encrypted":
        for flags in (6, content.index(b"PK\1\2") + 8):  # in both headers: a password is needed
            content[flags] |= 1
    else:
        content[35:235] = b"\xff" * 200  # from the first byte after the header and the name
    source.write_bytes(content)
    with one_line_error(source):
        read(load(source))


def test_zip_damage_elsewhere(tmp_path):
    source = write(tmp_path / "set.zip", {"a.png": PNG})
    whole = source.read_bytes()
    directory = whole.index(b"PK\1\2") + 6
    future = whole[:directory] + b"\xff" + whole[directory + 1:]  # a version of zip yet to come
    for content in (b"no zip", whole[:-10], future):
        source.write_bytes(content)
        with one_line_error(source):
            load(source)


def test_nothing_there(tmp_path):
    write(tmp_path / "empty.zip", {"notes.txt": b""})
    for words, source, name in (
            (["gone"], "gone", None), (["--data-dir", "gone"], "gone", "cat256"),
            ([tmp_path, "no images"], ".", None), (["empty.zip", "no images"], "empty.zip", None)):
        with one_line_error(*words):
            load(tmp_path / source, 64, name)
    for name in ("imagenet64", "bedroom256", "cat256"):
        with one_line_error("--data-dir", name):
            common.load_dataset(name, None, 64)


def test_loose_files_beside_class_folders(tmp_path):
    with one_line_error(tmp_path / "set" / "loose.png"):
        load(write(tmp_path / "set", {"cat/1.png": PNG, "loose.png": PNG, "dog/1.png": PNG}))


@pytest.mark.parametrize("files, words", [
    (["data.mdb", "lock.mdb"], "LSUN's lmdb"), (["lsun/data.mdb"], "dataset_tool.py"),
    (["n01440764.tar", "n01443537.tar"], "but a tar: unpack it"),
    (["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/batches.meta"], "--dataset cifar10"),
    (["cifar-10-python.tar.gz"], "--dataset cifar10"),
    (["t10k-labels-idx1-ubyte", "train-images-idx3-ubyte"], "--dataset mnist"),
    (["MNIST/raw/train-images-idx3-ubyte.gz"], "--dataset mnist"),
    (["train_data_batch_1.npz"], "--dataset imagenet64"), (["x.npz"], "name the file itself"),
    (["imagenet64.pkl"], "pickle.load"), (["a.heic", "b.heic"], "but 2 files (.heic)")])
@PLACES
def test_something_else_than_images(tmp_path, source, files, words):
    """What was found, and the way from there."""
    with one_line_error(tmp_path / source, "holds no images", words):
        load(write(tmp_path / source, dict.fromkeys(files, b"something")))


@pytest.mark.parametrize("name, words", [
    ("photo.JPG", "one image"), ("ILSVRC2012_img_train.tar", "a tar: unpack"),
    ("cifar-10-binary.tar.gz", "--dataset cifar10"), ("data.mdb", "lmdb"),
    ("edm2-img64.pkl", "np.savez('x.npz'"), ("x.parquet", "not a zip file")])
def test_a_file_that_is_no_data_set(tmp_path, name, words):
    (tmp_path / name).write_bytes(JPEG)
    with one_line_error(tmp_path / name, words):
        load(tmp_path / name)


def test_avif_and_jfif(tmp_path, monkeypatch):
    from PIL import features
    files = {"a.jfif": JPEG, "b.avif": PNG}
    monkeypatch.setattr(features, "check", lambda name: name == "avif")
    assert len(load(write(tmp_path / "set", files))) == 2
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    with one_line_error(tmp_path / "set", ".avif", "pillow 11.3"):
        load(tmp_path / "set")
    (tmp_path / "set" / "b.avif").unlink()
    assert len(load(tmp_path / "set")) == 1


@pytest.mark.parametrize("text, word", [
    (b'{"labels": [', "dataset.json"), (b"\xff\xfe", "dataset.json"), (b"[]", "dataset.json"),
    (b"{}", "labels"), (b'{"labels": [["a.png", 0]]}', "b.png"), (b'{"labels": []}', "a.png"),
    (b'{"labels": [["a.png"]]}', "dataset.json"),
    (b'{"labels": [["a.png", "0"], ["b.png", "1"]]}', "'0'"),
    (b'{"labels": [["a.png", 0], ["b.png", 1.5]]}', "1.5"),
    (b'{"labels": [["a.png", 0], ["b.png", true]]}', "True"),
    (b'{"labels": [["a.png", 0], ["b.png", [0, 1]]]}', "[0, 1]"),
    (b'{"labels": [["a.png", 0], ["b.png", -1]]}', "none negative"),
    (b'{"labels": [["a.png", 0], ["b.png", 99999999999999999999]]}', "integers")])
def test_bad_dataset_json(tmp_path, text, word):
    for source in ("set", "set.zip"):
        write(tmp_path / source, {"a.png": PNG, "b.png": PNG, "dataset.json": text})
        with one_line_error(tmp_path / source, word):
            load(tmp_path / source)


@pytest.mark.parametrize("images, word", [
    (np.zeros((2, 16, 16, 3), np.float32), "float32"),
    (np.zeros((2, 16, 16, 2), np.uint8), "(2, 16, 16, 2)"), (np.uint8(1), "()"),
    (np.zeros((2, 3072), np.uint8), "(2, 3072)"), (np.array([["text"]]), "uint8"),
    (np.zeros((1, 2, 16, 16, 3), np.uint8), "(1, 2, 16, 16, 3)"),
    (np.zeros((0, 16, 16, 3), np.uint8), "(0, 16, 16, 3)")])
def test_bad_arrays(tmp_path, images, word):
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "x.npz", images)
    for name in ("x.npy", "x.npz"):
        with one_line_error(tmp_path / name, word):
            load(tmp_path / name)


def test_arrays_of_small_images(tmp_path):
    np.save(tmp_path / "x.npy", pictures(3, 8, 30, 3))
    with one_line_error(tmp_path / "x.npy", "image 2", "30x8"):
        load(tmp_path / "x.npy").__getitems__(np.array([2]))


@pytest.mark.parametrize("labels", [np.arange(3), np.zeros(4), np.eye(4, dtype=int),
                                    np.array([0, 1, -1, 2]), np.array(["a", "b", "c", "d"])])
def test_bad_labels_of_arrays(tmp_path, labels):
    np.savez(tmp_path / "x.npz", pictures(4, 16, 16, 3), labels)
    with one_line_error(tmp_path / "x.npz", "labels"):
        load(tmp_path / "x.npz")


SAVE = {"x.npy": np.save, "x.npz": np.savez, "c.npz": np.savez_compressed}


@pytest.mark.parametrize("content", ["half", "header", "garbage", "empty", "other", "crc"])
@pytest.mark.parametrize("name", SAVE)
def test_damaged_arrays(tmp_path, name, content):
    def saved(name):
        file = io.BytesIO()
        SAVE[name](file, pictures(4, 16, 16, 3))
        return file.getvalue()
    whole, other = saved(name), saved("x.npz" if name == "x.npy" else "x.npy")
    (tmp_path / name).write_bytes(dict(
        half=whole[:len(whole) // 2], header=whole[:40], garbage=b"garbage", empty=b"",
        other=other, crc=whole[:20] + bytes(100) + whole[120:])[content])
    with one_line_error(tmp_path / name):
        load(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_npz_of_something_else(tmp_path):
    np.savez(tmp_path / "x.npz", weights=np.zeros(3), bias=np.zeros(3))
    with one_line_error(tmp_path / "x.npz", "weights, bias", "arr_0"):
        load(tmp_path / "x.npz")


class Bomb:
    """Pickled, it makes a folder when it is unpickled."""
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("part", ["images", "labels"])
@pytest.mark.parametrize("name", SAVE)
def test_pickles_are_never_loaded(tmp_path, name, part):
    crater, path = tmp_path / "crater", tmp_path / name
    bombs = np.array([Bomb(crater)] * 4)
    arrays = [bombs] if part == "images" or name == "x.npy" else [pictures(4, 16, 16, 3), bombs]
    SAVE[name](path, *arrays)
    with one_line_error(path):
        load(path)
    assert not crater.exists()
    loaded = np.load(path, allow_pickle=True)
    list(loaded if name == "x.npy" else loaded.values())
    assert crater.exists()  # the bomb was live


DATA, LABELS = np.zeros((2, 12288), np.uint8), np.array([1, 2])


@pytest.mark.parametrize("damage, arrays", [
    ("dtype", dict(data=DATA.astype(float), labels=LABELS)), ("empty", {}), ("name", {}),
    ("shape", dict(data=DATA[:, 1:], labels=LABELS)), ("label", dict(data=DATA, labels=LABELS - 1)),
    ("labels", dict(data=DATA)), ("few labels", dict(data=DATA, labels=LABELS[:1])),
    ("pickle", dict(data=DATA, labels=np.array([Bomb("crater"), 1])))])
def test_bad_imagenet64(tmp_path, monkeypatch, damage, arrays):
    monkeypatch.chdir(tmp_path)
    write_imagenet64(tmp_path, batches=2)
    path = tmp_path / "part0" / "train_data_batch_2.npz"
    np.savez(path, **arrays)
    if damage == "name":
        path = path.rename(path.with_name("train_data_batch_2_of_2.npz"))
    with one_line_error(tmp_path if damage in ("dtype", "shape", "label", "few labels") else path):
        load(tmp_path, 64, "imagenet64")
    assert not (tmp_path / "crater").exists()


# ---- the order of images

def batches(n=10, seed=0, step=0, total_steps=5, batch_size=8, micro_batch=4, **ranks):
    return list(common.index_batches(n, seed, step, total_steps, batch_size, micro_batch, **ranks))


@pytest.mark.parametrize("n", [1, 3, 10, 20, 40])
def test_each_pass_shows_every_image_once(n):
    """40 images are drawn: up to 40 passes, whose ends lie within batches and micro-batches."""
    stream = np.concatenate(batches(n))
    assert stream.shape == (40,)
    passes = [stream[i:i + n].tolist() for i in range(0, 40, n)]
    assert all(sorted(one) == list(range(n)) for one in passes if len(one) == n)
    assert len(set(passes[-1])) == len(passes[-1])  # it may end early
    assert n in (1, 3, 40) or passes[0] != passes[1]  # three images have too few orders to tell


def test_order_is_shuffled_by_the_seed():
    first, again, other = (batches(1000, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(np.sort(np.concatenate(first)), np.arange(40))


def test_order_depends_neither_on_the_first_step_nor_on_the_micro_batch():
    for step in range(6):
        assert np.array_equal(batches(step=step), batches()[2 * step:])
    ones, eights = batches(micro_batch=1), batches(micro_batch=8)
    assert np.array_equal(np.concatenate(ones), np.concatenate(eights))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_order_does_not_depend_on_the_number_of_processes(world):
    """Micro-batch m belongs to rank m % world: of three 2, 1 and 1; of five, one gets none."""
    settings = dict(n=21, batch_size=8, micro_batch=2)
    ranks = [iter(batches(**settings, rank=rank, world=world)) for rank in range(world)]
    together = [next(ranks[m % world]) for k in range(5) for m in range(4)]
    assert np.array_equal(together, batches(**settings))
    assert all(next(rank, None) is None for rank in ranks)


# ---- the loader, and the way to the device

def numbered(source, n):
    """n images, of which number i is of brightness i and has the label n - i."""
    files = {f"{i:03d}.png": encoded(np.full((16, 16, 3), i, np.uint8)) for i in range(n)}
    labels = [[name, n - i] for i, name in enumerate(files)]
    return write(source, files | {"dataset.json": json.dumps({"labels": labels}).encode()})


@pytest.mark.parametrize("workers", [0, 2])
@PLACES
def test_loader_keeps_the_order(tmp_path, workers, source):
    dataset = load(numbered(tmp_path / source, 50))
    read(dataset)  # the zip is open already when the workers start
    indices = [np.random.default_rng(i).integers(0, 50, 8) for i in range(30)]
    loaded = list(common.make_loader(dataset, iter(indices), workers, CPU))
    assert len(loaded) == 30
    for (images, labels), i in zip(loaded, indices):
        assert images.shape == (8, 3, 16, 16)
        assert (images == torch.tensor(i)[:, None, None, None]).all()
        assert labels.tolist() == (50 - i).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_workers_arrive(tmp_path, workers):
    files = {f"{i}.png": b"garbage" if i == 7 else PNG for i in range(10)}
    source = write(tmp_path / "set", files)
    loader = common.make_loader(load(source), iter(np.arange(10).reshape(5, 2)), workers, CPU)
    for _ in range(3):
        next(loader)
    with pytest.raises(common.UserError) as caught:
        next(loader)
    message = str(caught.value).strip().splitlines()[-1]  # what the scripts print
    message = message.removeprefix("common.UserError: ")
    assert message.startswith(f"{source}/7.png cannot be read as an image")
    end_workers()


def test_arrays_in_memory_need_no_worker_and_arrays_on_a_disk_one(tmp_path):
    np.save(tmp_path / "x.npy", pictures(4, 16, 16, 3))
    mapped = load(tmp_path / "x.npy")
    held = common.ArrayImages([pictures(4, 16, 16, 3)], None, 16, "x")
    for dataset, workers in ((held, 0), (mapped, 1)):
        before = set(multiprocessing.active_children())
        loader = common.make_loader(dataset, iter([np.arange(2)] * 9), None, CPU)
        images = next(loader)[0]
        assert torch.equal(images, dataset.__getitems__([0, 1])[0])
        assert len(set(multiprocessing.active_children()) - before) == workers


def test_workers_outlive_a_signal_to_the_group(tmp_path):
    """Ctrl-C goes to the whole process group: the step it interrupts still needs its images."""
    before = set(multiprocessing.active_children())
    dataset = load(numbered(tmp_path / "set", 9))
    loader = common.make_loader(dataset, iter([np.arange(9)] * 20), 2, CPU)
    next(loader), next(loader)  # one of each, so both are up
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    assert all(os.getpgid(worker.pid) != os.getpgrp() for worker in workers)
    assert len(list(loader)) == 18


def test_pixels_become_minus_one_to_one():
    levels = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, 256)
    x0, y = common.to_device((levels, torch.tensor([3, 1])), CPU, flip=False)
    assert x0.dtype == torch.float32 and y.tolist() == [3, 1]
    assert x0[0, 0, 0, 0] == -1 and x0[0, 0, 0, 255] == 1
    assert (x0.double() - (levels.double() * 2 - 255) / 255).abs().max() < 1e-7
    assert torch.equal(common.to_uint8(x0), levels.permute(0, 2, 3, 1))


def test_half_of_the_images_are_mirrored():
    images, y = torch.from_numpy(pictures(400, 3, 4, 6)), torch.arange(400)
    plain = images.float() / 127.5 - 1
    torch.manual_seed(0)
    flipped, y_flipped = common.to_device((images, y), CPU, flip=True)
    same, mirrored = ((flipped == x).flatten(1).all(1) for x in (plain, plain.flip(3)))
    assert (same ^ mirrored).all() and 160 < mirrored.sum() < 240 and torch.equal(y, y_flipped)
    torch.manual_seed(0)
    assert torch.equal(common.to_device((images, y), CPU, flip=True)[0], flipped)  # seeded
    assert torch.equal(common.to_device((images, y), CPU, flip=False)[0], plain)
