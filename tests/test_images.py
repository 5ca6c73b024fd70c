"""What an image is: upright, on white, in a known range; masks; files that are none; the cache of
unpacked arrays; packing."""
import os
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from test_data import PNG, as_read, encoded, load, one_line_error, pictures, read, write
from util import run_script

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """Nobody's cache is touched."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def on_white(rgb, alpha):
    """(H,W,3) and (H,W), both uint8: the composite, not rounded."""
    a = alpha[..., None] / 255
    return rgb * a + 255 * (1 - a)


# ---- pixels

TURNS = {  # EXIF orientation -> what a viewer does to the array to see it upright
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: lambda x: np.rot90(x)}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_orientation(orientation, kind):
    x = pictures(16, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(x, kind, exif=exif)
    assert np.array_equal(as_read(content), TURNS[orientation](x))


def test_a_photograph_held_upright_in_training_and_editing(tmp_path):
    """Of a tall picture stored lying the middle is what is seen in the middle."""
    exif = Image.Exif()
    exif[0x0112] = 6
    x = np.zeros((64, 128, 3), np.uint8)
    x[:32] = 255, 0, 0  # what is stored above is seen at the right
    content = encoded(x, "JPEG", exif=exif, quality=95)
    dataset = load(write(tmp_path / "set", {"a.jpg": content}), 64)
    edited, _ = common.read_image(tmp_path / "set/a.jpg", 64)
    edited = common.to_uint8(edited[None])[0].numpy()
    for seen in (read(dataset)[0][0].astype(int), edited.astype(int)):
        assert abs(seen[:, 40:] - (255, 0, 0)).max() < 6 and seen[:, :24].max() < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparency_is_on_white(mode):
    """RGBA, LA and P with degrees of it; RGB and L with one transparent colour."""
    alpha = pictures(16, 16, seed=1)
    if mode == "P":
        rgb, degrees = pictures(8, 3), pictures(8, seed=1)
        which = pictures(16, 16) % 8
        image = Image.fromarray(which, "P")
        image.putpalette(rgb.tobytes())
        content = encoded(image, transparency=degrees.tobytes())
        rgb, alpha = rgb[which], degrees[which]
    elif mode in ("RGB", "L"):
        rgb = pictures(16, 16, 3) if mode == "RGB" else np.stack([pictures(16, 16)] * 3, 2)
        alpha = 255 * (rgb != rgb[0, 0]).any(2).astype(np.uint8)
        key = tuple(rgb[0, 0].tolist()) if mode == "RGB" else int(rgb[0, 0, 0])
        image = Image.fromarray(rgb if mode == "RGB" else rgb[..., 0])
        content = encoded(image, transparency=key)
    elif mode == "LA":
        grey = pictures(16, 16)
        rgb = np.stack([grey] * 3, 2)
        content = encoded(np.stack([grey, alpha], 2))
    else:
        rgb = pictures(16, 16, 3)
        content = encoded(np.dstack([rgb, alpha]))
    assert (alpha < 128).any()
    assert np.abs(as_read(content) - on_white(rgb, alpha)).max() <= 1
    whole = on_white(rgb, alpha)[alpha == 255]
    assert np.array_equal(as_read(content)[alpha == 255], whole)


def test_transparency_of_arrays(tmp_path):
    """In the size of the network, and shrunk."""
    x = pictures(3, 16, 16, 4)
    np.savez(tmp_path / "x.npz", x)
    wanted = np.stack([on_white(image[..., :3], image[..., 3]) for image in x])
    assert np.abs(read(load(tmp_path / "x.npz"))[0] - wanted).max() <= 1
    wanted = wanted.reshape(3, 8, 2, 8, 2, 3).mean((2, 4))
    assert np.abs(read(load(tmp_path / "x.npz", 8))[0] - wanted).max() <= 1.5


def test_floating_point():
    x = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(as_read(encoded(x, "TIFF"))[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("x, word", [
    (np.full((16, 16), 1.5, np.float32), "[0, 1]"), (np.full((16, 16), -0.5, np.float32), "[0, 1]"),
    (np.full((16, 16), np.nan, np.float32), "[0, 1]"), (np.full((16, 16), 200, np.int32), "32")])
def test_ranges_that_are_not_known(x, word):
    with one_line_error("here", word, "bits" if word == "32" else "save"):
        as_read(encoded(x, "TIFF"))


def test_sixteen_bits_in_every_form():
    """PNG, PGM and TIFF, which Pillow opens in different modes."""
    x = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    pgm = b"P5 16 16 65535\n" + x.astype(">u2").tobytes()
    for content in (encoded(x), encoded(x, "TIFF"), pgm):
        assert np.array_equal(as_read(content), np.stack([np.rint(x / 257)] * 3, 2))


def test_pngs_whose_checksums_are_wrong(tmp_path):
    """Some Pillow decodes, to other pixels."""
    content = encoded(pictures(16, 16, 3) // 64)
    file = write(tmp_path / "set", {"a.png": content}) / "a.png"
    dataset, silent = load(tmp_path / "set"), 0
    pixels = read(dataset)[0][0]
    for at in range(len(content) // 2, len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 128
        try:
            if np.array_equal(as_read(bytes(damaged)), pixels):
                continue
        except Exception:  # it notices
            continue
        silent += 1
        file.write_bytes(damaged)
        with one_line_error("a.png", "cannot be read"):
            read(dataset)
        with one_line_error("--image", "a.png"):
            common.read_image(file, 16)
    assert silent > 0


# ---- masks

HOLE = np.pad(np.ones((8, 8), bool), ((2, 6), (4, 4)))  # above the middle, of 16 pixels


def mask_read(tmp_path, mask, photo=(16, 16), **options):
    Image.new("RGB", photo).save(tmp_path / "photo.png")
    image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    image.save(tmp_path / "mask.png", **options)
    read = common.read_mask(tmp_path / "mask.png", 16, [tmp_path / "photo.png"])
    assert read.shape == (1, 1, 16, 16)
    return read[0, 0].numpy()


ALPHA = np.dstack([pictures(16, 16, 3), 255 * ~HOLE])


@pytest.mark.parametrize("mask", [
    HOLE, 255 * HOLE, HOLE.astype(np.uint8), ALPHA.astype(np.uint8),
    np.dstack([255 * HOLE] * 3 + [np.full_like(HOLE, 255, int)]).astype(np.uint8),
    65535 * HOLE.astype(np.uint16)], ids=["bits", "grey", "0 and 1", "alpha", "whole alpha", "16"])
def test_forms_of_a_mask(tmp_path, mask):
    mask = mask.astype(np.uint8) if mask.dtype == int else mask
    assert np.array_equal(mask_read(tmp_path, mask), HOLE)


def test_a_mask_is_cropped_as_its_image_is(tmp_path):
    """Of a wide photograph the middle is kept; the mask may be of another resolution."""
    wide = np.zeros((32, 64), np.uint8)
    wide[:, 16:24] = 255  # at the left of the middle
    wanted = np.zeros((16, 16), bool)
    wanted[:, :4] = True
    assert np.array_equal(mask_read(tmp_path, wide, photo=(128, 64)), wanted)
    assert np.array_equal(mask_read(tmp_path, wide, photo=(129, 64)), wanted)
    with one_line_error("mask.png", "64x32", "photo.png", "64x64"):
        mask_read(tmp_path, wide, photo=(64, 64))


@pytest.mark.parametrize("level, what", [(0, "nothing"), (255, "everything"), (1, "everything")])
def test_masks_that_paint_nothing_or_everything(tmp_path, level, what):
    with one_line_error("mask.png", what):
        mask_read(tmp_path, np.full((16, 16), level, np.uint8))


def test_a_mask_that_is_white_here_and_transparent_there(tmp_path):
    grey, alpha = np.zeros((2, 16, 16), np.uint8)
    grey[4:8], alpha[:] = 255, 255
    alpha[10:12] = 0
    with one_line_error("mask.png", "transparent in some places and white in others"):
        mask_read(tmp_path, np.dstack([grey] * 3 + [alpha]))


# ---- settings

@pytest.mark.parametrize("words, lost, maps", [
    ("glyphs attention=13", 13, "16,8"), ("cifar-small image_size=28", 16, "28,14,7"),
    ("imagenet64 attention=32,16,4", 4, "64,32,16,8")])
def test_attention_where_there_is_no_map(words, lost, maps):
    with one_line_error("--net", f"attention={lost}", maps):
        common.net_settings(words.split())


def test_attention_where_there_is_one():
    for name in common.NETS:
        assert common.net_settings([name])["attention"] == common.NETS[name]["attention"]
    assert common.net_settings("glyphs attention=".split())["attention"] == ()


# ---- files that are no images, found before the run begins

BAD = {"a/empty.png": b"", "b/small.png": encoded(pictures(8, 16, 3)), "b/text.jpg": b"Not found"}


@pytest.mark.parametrize("source", ["set", "set.zip"])
def test_all_bad_files_are_named_at_once(tmp_path, source):
    good = {f"{kind}/{i}.png": PNG for kind in "ab" for i in range(3)}
    dataset = load(write(tmp_path / source, good | BAD))
    with one_line_error(tmp_path / source, "3 of 9 images", "a/empty.png is empty",
                        "b/small.png is 16x8", "16 pixels", "b/text.jpg cannot be read"):
        dataset.check()
    assert load(write(tmp_path / f"good_{source}", good)).check() is None


def test_many_bad_files_are_counted(tmp_path):
    dataset = load(write(tmp_path / "set", {f"{i:02d}.png": b"" for i in range(30)}))
    with one_line_error("30 of 30", "00.png is empty", "09.png is empty, ..;"):
        dataset.check()


def test_a_run_looks_at_the_files_first(tmp_path, capsys):
    source = write(tmp_path / "set", BAD)
    args = types.SimpleNamespace(dataset=str(source), data_dir=None, cache_dir=None)
    run = types.SimpleNamespace(world=1, main=True)
    with one_line_error("3 of 3 images"):
        common.open_dataset(args, run, 16)
    assert "3 images" in capsys.readouterr().out  # what it is was said before


def test_all_processes_end_when_files_are_bad(tmp_path):
    write(tmp_path / "set", BAD)
    done = run_script("--dataset", "set", "--net", "glyphs", "--workers", 0, cwd=tmp_path, ranks=2)
    assert done.returncode == 2
    line, = done.stderr.strip().splitlines()
    assert line.startswith("ct.py: error: set: 3 of 3 images")


def test_arrays_that_are_too_small(tmp_path):
    np.save(tmp_path / "x.npy", pictures(3, 16, 12, 3))
    with one_line_error("x.npy", "12x16", "16"):
        load(tmp_path / "x.npy").check()


# ---- the cache of unpacked arrays

def cached(folder):
    return sorted(folder.rglob("*.npy"))


def test_an_older_npz_moved_into_place(tmp_path):
    """By its time it would be the one unpacked already."""
    x, y = pictures(2, 4, 16, 16, 3)
    for name, images in (("x", x), ("old", y)):
        np.savez_compressed(tmp_path / f"{name}.npz", images)
    os.utime(tmp_path / "old.npz", (1, 1))
    assert np.array_equal(read(load(tmp_path / "x.npz"))[0], x)
    os.replace(tmp_path / "old.npz", tmp_path / "x.npz")
    assert np.array_equal(read(load(tmp_path / "x.npz"))[0], y)


def test_a_users_own_file_stays(tmp_path):
    x = pictures(4, 16, 16, 3)
    np.savez_compressed(tmp_path / "x.npz", images=x)
    np.save(tmp_path / "x.images.npy", x[:1])
    assert np.array_equal(read(load(tmp_path / "x.npz"))[0], x)
    assert np.array_equal(np.load(tmp_path / "x.images.npy"), x[:1])
    file, = cached(tmp_path / ".unpacked")
    assert file.name.startswith("x.images.") and [file] == [
        path for path in cached(tmp_path) if path.name != "x.images.npy"]


def test_half_an_unpacked_file_is_not_used(tmp_path):
    x = pictures(4, 16, 16, 3)
    np.savez_compressed(tmp_path / "x.npz", x)
    load(tmp_path / "x.npz")
    file, = cached(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    assert np.array_equal(read(load(tmp_path / "x.npz"))[0], x)


def test_two_unpack_at_once(tmp_path):
    """The second begins and ends while the first has unpacked half."""
    x = pictures(4, 16, 16, 3)
    np.savez_compressed(tmp_path / "x.npz", x)
    copy, first = common.shutil.copyfileobj, threading.Event()

    def slow(source, target, length):
        if not first.is_set():
            first.set()
            target.write(source.read(100))
            assert np.array_equal(read(load(tmp_path / "x.npz"))[0], x)
        copy(source, target, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.shutil, "copyfileobj", slow)
        assert np.array_equal(read(load(tmp_path / "x.npz"))[0], x)
    assert first.is_set() and len(cached(tmp_path)) == 1 and not [*tmp_path.rglob("*.tmp")]


def test_where_it_is_unpacked(tmp_path, monkeypatch, home):
    """In --cache-dir if it is named; else beside the data; where that cannot be, at home."""
    x = pictures(4, 16, 16, 3)
    (tmp_path / "data").mkdir()
    np.savez_compressed(tmp_path / "data/x.npz", x)
    dataset = common.load_dataset(str(tmp_path / "data/x.npz"), None, 16, str(tmp_path / "named"))
    assert np.array_equal(read(dataset)[0], x)
    assert len(cached(tmp_path / "named")) == len(cached(tmp_path)) == 1
    (tmp_path / "data/.unpacked").write_text("a file, so that no folder can be made")
    assert np.array_equal(read(load(tmp_path / "data/x.npz"))[0], x)
    assert len(cached(home)) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "data/.unpacked"))
    with one_line_error("x.npz", "--cache-dir"):
        load(tmp_path / "data/x.npz")


def test_without_a_home(tmp_path, monkeypatch):
    """A container's user may have none."""
    def nobody(uid):
        raise KeyError(uid)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    x = pictures(4, 16, 16, 3)
    np.savez_compressed(tmp_path / "x.npz", x)
    assert np.array_equal(read(load(tmp_path / "x.npz"))[0], x)


@pytest.mark.parametrize("images", [np.array([{}, {}]), np.zeros((2, 16, 16, 3), np.float32),
                                    np.zeros((2, 16), np.uint8)])
def test_nothing_is_unpacked_that_cannot_be_used(tmp_path, images):
    np.savez_compressed(tmp_path / "x.npz", images, [0, 1])
    with one_line_error("x.npz"):
        load(tmp_path / "x.npz")
    assert not cached(tmp_path)


def test_a_checksum_that_is_wrong(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", pictures(4, 16, 16, 3) // 64)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    at = content.find(b"PK\1\2") + 16  # the checksum in the directory
    content[at] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with one_line_error("x.npz", "CRC"):
        load(tmp_path / "x.npz")
    assert not cached(tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_length_that_is_wrong(tmp_path, save):
    """Fewer images by the header: the rest would be lost. (Compressed, the checksum tells.)"""
    save(tmp_path / "x.npz", pictures(8, 16, 16, 3))
    np.save(tmp_path / "y.npy", pictures(8, 16, 16, 3))
    for name in ("x.npz", "y.npy"):
        content = (tmp_path / name).read_bytes()
        if save is np.savez or name == "y.npy":
            assert content.count(b"(8, 16, 16, 3)") == 1
        (tmp_path / name).write_bytes(content.replace(b"(8, 16, 16, 3)", b"(6, 16, 16, 3)"))
        if content != (tmp_path / name).read_bytes():
            with one_line_error(name, "length"):
                load(tmp_path / name)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mapped_file_that_is_overwritten(tmp_path, channels):
    """Cut off, it would end the process by a bus error. Replaced, it stays as it was."""
    x = pictures(400, 16, 16, channels)
    np.savez(tmp_path / "x.npz", x)
    dataset = load(tmp_path / "x.npz")
    os.rename(tmp_path / "x.npz", tmp_path / "old.npz")
    np.savez(tmp_path / "x.npz", 255 - x)
    assert np.array_equal(read(dataset)[0], x.repeat(3 // channels, 3))
    dataset = load(tmp_path / "x.npz")
    os.truncate(tmp_path / "x.npz", 1000)
    with one_line_error("x.npz", "overwritten"):
        read(dataset)


# ---- packing

def pack(*words):
    command = [sys.executable, str(ROOT / "common.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("source", ["set", "set.zip"])
def test_packed_images_are_those_of_the_files(tmp_path, source):
    """And labels, and the classes' names; it is mapped as it is, and not unpacked."""
    files = {f"{kind}/{i}.png": encoded(pictures(20 + i, 40, 3, seed=i))
             for kind in ("cat", "dog", "eel") for i in range(3)}
    before = load(write(tmp_path / source, files))
    done = pack(tmp_path / source, tmp_path / "x.npz", "--size", 16, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "9 images" in done.stdout and "3 classes" in done.stdout
    assert common.file_sha(tmp_path / "x.npz") in done.stdout
    after = load(tmp_path / "x.npz")
    assert all(np.array_equal(a, b) for a, b in zip(read(after), read(before)))
    assert after.names == before.names == ["cat", "dog", "eel"] and not cached(tmp_path)
    with np.load(tmp_path / "x.npz") as arrays:  # other tools read it too
        assert arrays["arr_0"].shape == (9, 16, 16, 3) and arrays["arr_1"].dtype == np.int64
    again = pack(tmp_path / source, tmp_path / "x.npz", "--size", 16)
    assert again.returncode == 2 and "does not exist yet" in again.stderr


def test_packing_without_labels_twice_gives_the_same_file(tmp_path):
    np.save(tmp_path / "x.npy", pictures(70, 16, 16, 3))
    for name in "ab":
        assert pack(tmp_path / "x.npy", tmp_path / f"{name}.npz", "--size", 8).returncode == 0
    assert common.file_sha(tmp_path / "a.npz") == common.file_sha(tmp_path / "b.npz")
    assert load(tmp_path / "a.npz", 8).classes == 0


def test_packing_names_every_damaged_image_and_leaves_nothing(tmp_path):
    """The headers of these are whole."""
    cut = {f"{i:03d}.png": PNG if i % 50 else PNG[:-99] for i in range(150)}
    done = pack(write(tmp_path / "set", cut), tmp_path / "x.npz", "--size", 16)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert "3 of 150 images" in error
    assert all(f"{name}.png" in error for name in ("000", "050", "100"))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# ---- files that are damaged behind their headers

SMALL = ("--net glyphs base=32 mult=1,1 blocks=1 --batch-size 4 --micro-batch 2 --total-steps 6 "
         "--log-every 1 --sample-every 0 --seed 3 --out-dir run").split()
SCRIPTS = {"ct.py": [], "cd.py": ["--stage", "teacher"],
           "ctm.py": ["--teacher", "none", "--N", "4", "--max-steps", "1"]}


def first_step_of_each(n, seed):
    batches = common.index_batches(n, seed, 0, 6, 4, 4)
    return {int(i): k for k, indices in reversed([*enumerate(batches)]) for i in indices}


@pytest.mark.parametrize("script, workers, ranks", [
    ("ct.py", 0, 0), ("ct.py", 2, 0), ("ct.py", 0, 2), ("cd.py", 0, 0), ("ctm.py", 0, 0)])
def test_a_run_that_meets_a_damaged_file_saves_and_goes_on_when_it_is_mended(
        tmp_path, script, workers, ranks):
    """To the same weights as one that met none. It ends at the step before the file is needed."""
    content = {f"{i % 2}/{i:02d}.png": encoded(pictures(16, 16, 3, seed=i)) for i in range(20)}
    write(tmp_path / "set", content)
    command = [*SMALL, *SCRIPTS[script], "--dataset", "set", "--workers", workers]
    run_script(*command, script=script, cwd=tmp_path, ranks=ranks, code=0)
    last = tmp_path / "run/last.pt"
    wanted = torch.load(last, weights_only=True)["ema"]
    shutil.rmtree(tmp_path / "run")

    names = sorted(content)
    when = first_step_of_each(20, 3)
    bad = next(i for i in range(2, 20) if when.get(i) == 3)  # the trial reads the first two
    (tmp_path / "set" / names[bad]).write_bytes(content[names[bad]][:-99])
    done = run_script(*command, script=script, cwd=tmp_path, ranks=ranks)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert any(names[bad] in line and "Step 3 is saved" in line for line in errors), errors
    assert torch.load(last, weights_only=True)["step"] == 3
    again = run_script(*command, script=script, cwd=tmp_path, ranks=ranks)
    assert again.returncode == 2 and "Traceback" not in again.stderr
    (tmp_path / "set" / names[bad]).write_bytes(content[names[bad]])
    done = run_script(*command, script=script, cwd=tmp_path, ranks=ranks, code=0)
    assert "resumed at step 3" in done.stdout
    found = torch.load(last, weights_only=True)["ema"]
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
