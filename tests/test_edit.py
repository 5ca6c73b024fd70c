"""Editing with a model never trained for it: vectors, known answers, the command line."""
import argparse
import itertools
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cd
import common
from test_data import REAL
from test_math import toy_c
from util import VECTORS, close, fill, gauss, img, numbered_noise, run_script

SHAPE = (2, 3, 16, 16)
CPU = types.SimpleNamespace(rank=0, world=1, main=True, device=torch.device("cpu"),
                            dtype=torch.float32, checkpointing=False)
HOLE = torch.zeros(1, 1, 16, 16)
HOLE[..., 4:12, 4:12] = 1
KNOWN = {"inpaint": lambda x: (1 - HOLE) * x, "colorize": cd.luminance,
         "superres": lambda x: cd.patch_means(x, 4)}


# ---- CM Alg. 4

def statistics(x):
    return [x.mean(), x.abs().mean(), x.std(unbiased=False), *x.flatten()[:8]]


@pytest.mark.parametrize("name, known", [
    ("colorization", cd.luminance), ("superres", lambda x: cd.patch_means(x, 8))])
def test_vectors(name, known):
    """The reference is given its first noisy input; ours makes it of the image and unit noise."""
    y, later, seen = img(SHAPE, 0.7, 0.8), numbered_noise(), []
    first = (80 * gauss(SHAPE, 60) - known(y)) / 80
    draws = itertools.chain([first], iter(lambda: later(y), None))

    def f(x, t):
        seen.append(t.tolist())
        return toy_c(x, t).clamp(-1, 1)
    taus = common.karras_times(40).flip(0)[[0, 10, 22]].tolist()
    x = cd.edit(f, y, known, taus, lambda x: next(draws))
    for actual, key in ((x, "out"), (known(y), "reference")):
        wanted = VECTORS["editing"][f"{name}_{key}"]
        wanted = [wanted["mean"], wanted["abs_mean"], wanted["std"], *wanted["first8"]]
        close(statistics(actual), wanted, 0, 1e-5)
    assert seen == [[tau] * 2 for tau in taus]


def orthogonal(first):
    """An orthogonal matrix, its first column along `first`, completed as openai does, by QR."""
    Q = np.eye(len(first))
    Q[:, 0] = np.array(first) / np.linalg.norm(first)
    Q = np.linalg.qr(Q)[0]
    return torch.tensor(Q if Q[:, 0].sum() > 0 else -Q)


def transform(task):
    """A, its inverse and the mask Omega, 1 where the model draws, as the paper writes them."""
    if task == "inpaint":
        return (lambda x: x), (lambda x: x), HOLE.double()
    Q = orthogonal(cd.LUMINANCE if task == "colorize" else np.ones(16))
    omega = torch.ones(len(Q), dtype=torch.float64)
    omega[0] = 0
    if task == "colorize":
        return (lambda x: x.movedim(1, -1) @ Q), (lambda z: (z @ Q.T).movedim(-1, 1)), omega

    def A(x):  # (B,C,4,4,16): a patch a vector
        return x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4) @ Q

    def A_inverse(z):
        return (z @ Q.T).unflatten(4, (4, 4)).transpose(3, 4).reshape(SHAPE)
    return A, A_inverse, omega


def edit_by_the_paper(f, y, task, taus, noise):
    A, A_inverse, omega = transform(task)
    y = A_inverse(A(y) * (1 - omega))
    x = y + taus[0] * noise(y)
    for tau in taus:
        if tau != taus[0]:
            x = x + math.sqrt(tau**2 - common.T_MIN**2) * noise(x)
        x = f(x, torch.full((2,), tau, dtype=x.dtype))
        x = A_inverse(A(y) * (1 - omega) + A(x) * omega)
    return x


@pytest.mark.parametrize("task", KNOWN)
def test_a_projection_does_what_the_papers_linear_map_and_mask_do(task):
    y = img(SHAPE, 0.7, 0.8).double()
    A, A_inverse, _ = transform(task)
    close(A_inverse(A(y)), y, 0, 1e-12)
    taus = [80.0, 7.0, 0.4, 0.02]
    ours = cd.edit(toy_c, y, KNOWN[task], taus, numbered_noise())
    close(ours, edit_by_the_paper(toy_c, y, task, taus, numbered_noise()), 0, 1e-12)
    assert (ours - y).abs().max() > 0.1


@pytest.mark.parametrize("task", KNOWN)
def test_what_is_known_holds_after_every_step(task):
    known, y, noised, drawn = KNOWN[task], img(SHAPE, 0.7, 0.8), [], []
    source = common.SeededNoise(torch.arange(2), 0)

    def wild(x, t):
        drawn.append((17 * x + t[0]).sin())
        return drawn[-1]

    def noise(x):
        noised.append(x)
        return source(x)
    x = cd.edit(wild, y, known, cd.GRID, noise)
    steps = [*noised[1:], x]  # noise is added to what the step before left
    assert len(drawn) == len(steps) == 39
    for x, f_x in zip(steps, drawn):
        if task == "inpaint":
            assert torch.equal(known(x), known(y)) and torch.equal(x * HOLE, f_x * HOLE)
        close(known(x), known(y), 0, 1e-6)
        close(x - known(x), f_x - known(f_x), 0, 1e-6)


@pytest.mark.parametrize("factor", [None, 2, 3, 8, 41, 47, 83])
def test_projections_are_orthogonal(factor):
    """In float32, where 1 / 41 is rounded so that an interpolation by 41 puts the first pixel of a
    patch into the patch before. Without a factor: luminance."""
    def project(x):
        return cd.patch_means(x, factor) if factor else cd.luminance(x)
    size = 2 * factor if factor else 16
    x, z = gauss((1, 3, size, size), 1), gauss((1, 3, size, size), 2)
    close(project(project(x)), project(x), 0, 1e-6)
    close((project(x) * z).double().sum(), (x * project(z)).double().sum(), 1e-5, 1e-4)
    assert (project(x) - x).abs().max() > 0.1


def test_projections_keep_what_they_are_named_after():
    x = img(SHAPE)
    weights = torch.tensor(cd.LUMINANCE).view(1, 3, 1, 1)
    close((weights * cd.luminance(x)).sum(1), (weights * x).sum(1), 0, 1e-6)
    means = cd.patch_means(x, 4)
    close(F.avg_pool2d(means, 4), F.avg_pool2d(x, 4), 0, 1e-6)
    close(means[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3), means)


def test_levels_are_the_papers():
    """All of N = 40 but t_min, where f(x, t) = x; strokes at its indices 16 and 20; EDM's 18 levels
    for denoising."""
    times = common.karras_times(40).flip(0)
    close(cd.GRID, times[:39])
    assert all(cd.TASKS[task] is cd.GRID for task in KNOWN)
    close(cd.TASKS["stroke"], times[[16, 20]], 0, 5e-3)
    close(cd.TASKS["denoise"], common.karras_times(18)[5:6])
    assert cd.TASKS["interpolate"] == [80]


# ---- with the exact consistency function of a few images the answers are known

class Exact(torch.nn.Module):
    """A network whose consistency function is exact for a few images: it solves the ODE of their
    ideal denoiser. Notes its (x, t)."""
    classes, cond, levels = 0, False, None

    def __init__(self, images):
        super().__init__()
        self.image_size, self.p = images.shape[-1], torch.nn.Parameter(torch.zeros(()))
        self.seen, self.y, self.D = [], None, common.ideal_denoiser(images)

    def flow(self, x, t):
        self.seen.append((x.float(), t.float()))
        times = common.karras_times(10, t_max=t[0].item()).double().flip(0)
        for a, b in zip(times, times[1:]):
            x = common.heun_step(self.D, x, a.expand(len(x)), b.expand(len(x)))
        return x

    def forward(self, x_in, t_in, y=None, cond=None, masks=None):
        self.y = y
        scalings = common.cm_scalings((t_in.double() / 250).exp())
        c_skip, c_out, c_in = (common.bcast(c, x_in) for c in scalings)
        x = x_in.double() / c_in
        return ((self.flow(x, (t_in.double() / 250).exp()) - c_skip * x) / c_out).float()


def toys():
    """Five images (5,16,16,3) uint8 that their patch means, luminance and borders tell apart: grey
    blocks, and a little of all else."""
    rng = np.random.default_rng(0)
    blocks = np.where(rng.random((5, 4, 4, 1)) < 0.5, 30, 225).repeat(4, 1).repeat(4, 2)
    return (blocks + rng.integers(-25, 26, (5, 16, 16, 3))).astype(np.uint8)


def exact():
    return Exact(torch.tensor(toys()).permute(0, 3, 1, 2))


def as_x(images):
    return torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1


FILES = [f"{i}.png" for i in range(5)]


def lay_out(images):
    """Save them as 0.png, 1.png, .."""
    for name, image in zip(FILES, images):
        Image.fromarray(image).save(name)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The folder one works in, with the toys as 0.png .. 4.png."""
    monkeypatch.chdir(tmp_path)
    lay_out(toys())
    return tmp_path


def edit(net, task, save="out.npz", **flags):
    """cd.edit_images as the command line calls it. Returns results (rows, each, H, W, 3)."""
    settings = cd.make_parser().defaults | common.SAMPLING_DEFAULTS | dict(edit=task, save=save)
    args = argparse.Namespace(**settings | dict(ckpt="it") | flags)
    cd.edit_images(args, CPU, net, lambda y: cd.consistency_function(net, y, args.w))
    if save.endswith(".npz"):
        images = np.load(save)["arr_0"]
        return images.reshape(len(flags.get("image", range(4))), -1, *images.shape[1:])


def cells(rows, size=16):
    """The images of a picture, (rows,columns,size,size,3)."""
    picture = np.asarray(Image.open("out.png"))[::3, ::3]
    return picture.reshape(rows, size, -1, size, 3).swapaxes(1, 2)


def assert_found(results, images, tolerance=2):
    assert results.shape[0] == len(images)
    assert (np.abs(results.astype(int) - images[:, None]) <= tolerance).all()


@pytest.mark.parametrize("task", KNOWN)
def test_edits_of_images_of_the_set_return_them(desk, task):
    net, known = exact(), KNOWN[task]
    flags = dict(factor=4) if task == "superres" else {}
    assert_found(edit(net, task, image=FILES, sample=2, **flags), toys())
    close([t[0] for _, t in net.seen], cd.GRID, 1e-5)
    y = known(as_x(toys())).repeat_interleave(2, 0)
    close((net.seen[0][0] - y).std(), 80, 0.03)
    shares = [(known(x) - y).std().item() ** 2 / t[0].item() ** 2 for x, t in net.seen[1:-5]]
    close(np.mean(shares) ** 0.5, known(gauss((10, 3, 16, 16), 1)).std(), 0.1)


def test_edits_of_strangers_keep_what_is_known(desk):
    """An image that is not of the set: the two sources disagree, and what is known wins."""
    stranger = toys()[:1, ::-1, ::-1]
    lay_out(stranger)
    results = edit(exact(), "inpaint", image=FILES[:1], sample=3)[0]
    outside = HOLE[0, 0].numpy() == 0
    assert (results[:, outside] == stranger[:, outside]).all()
    assert (results != stranger).any((1, 2, 3)).all()


@pytest.mark.skipif(not REAL.exists(), reason=f"no real images: {REAL.name} is not there")
@pytest.mark.parametrize("task", [*KNOWN, "denoise"])
def test_edits_of_real_images(desk, task):
    dataset = common.load_dataset(str(REAL), None, 32)
    images, _ = dataset.__getitems__(np.arange(0, 50000, 1000))
    some = images[:3].permute(0, 2, 3, 1).numpy()
    lay_out(some)
    flags = dict(factor=2) if task == "superres" else {}
    assert_found(edit(Exact(images), task, image=FILES[:3], sample=1, **flags), some)


def test_strokes_become_the_nearest_image(desk):
    strokes = (0.8 * toys() + 25).astype(np.uint8)
    lay_out(strokes)
    net = exact()
    assert_found(edit(net, "stroke", image=FILES, sample=1), toys())
    close([t[0] for _, t in net.seen], [5.38, 2.24])
    added = net.seen[0][0] - as_x(strokes), net.seen[1][0] - as_x(toys())
    close([noise.std() for noise in added], [5.38, 2.24], 0.05)


@pytest.mark.parametrize("flags, level", [
    ({}, 0.296442), (dict(noise_level=0.7), 0.7), (dict(sigmas=[0.5]), 0.5)])
def test_denoising_is_one_evaluation(desk, flags, level):
    """Of one result for each image, as more would be the same."""
    net = exact()
    assert_found(edit(net, "denoise", image=FILES, **flags), toys())
    (x, t), = net.seen
    noise = (x - as_x(toys())) / level
    close(t, [level] * 5, 1e-5)
    close([noise.std(), noise.mean()], [1, 0], 0.05, 0.05)
    edit(net, "denoise", image=FILES, seed=1, **flags)
    other = net.seen[1][0] - as_x(toys())
    assert abs(F.cosine_similarity(noise.flatten(), other.flatten(), dim=0)) < 0.1


def test_noisy_images_get_no_more_noise(desk):
    noise = np.random.default_rng(1).integers(-40, 41, (5, 16, 16, 3))
    noisy = (toys() + noise).clip(0, 255).astype(np.uint8)
    lay_out(noisy)
    net = exact()
    assert_found(edit(net, "denoise", image=FILES, noisy=True), toys())
    (x, _), = net.seen
    close(x, as_x(noisy), 0, 1e-5)


@pytest.mark.parametrize("task", ["denoise", "interpolate", "stroke"])
def test_steps_draw_noise_of_their_own(desk, task):
    """What the second step adds is independent of what the picture started from."""
    net = exact()
    flags = {} if task == "interpolate" else dict(image=FILES[:1])
    edit(net, task, sample=1, sigmas=[3.0, 2.0], seed=5, **flags)
    (first, t), (second, _) = net.seen
    second = second - net.flow(first.double(), t)
    if task != "interpolate":
        first = first - as_x(toys()[:1])
    assert F.cosine_similarity(first.flatten(1), second.flatten(1)).abs().max() < 0.25


def test_rows_may_fill_several_batches(desk):
    net = exact()
    assert_found(edit(net, "denoise", image=FILES, sample=20), toys())
    assert len(net.seen) == 2


def test_labels_are_those_of_the_rows(desk):
    net = exact()
    net.classes = 10
    edit(net, "stroke", image=FILES[:2], labels=[3, 9], sample=3)
    assert net.y.tolist() == [3, 3, 3, 9, 9, 9]
    cases = (10, None, range(8)), (2, None, range(2)), (10, [7, 7, 4], [7, 7, 4])
    for classes, labels, wanted in cases:
        net.classes = classes
        edit(net, "interpolate", "out.png", labels=labels, sample=2)
        assert net.y.tolist() == [y for y in wanted for _ in range(2)]


def test_what_edits_see_of_a_network_is_clipped(desk):
    class Wild(Exact):
        def forward(self, x_in, t_in, y=None, cond=None, masks=None):
            _, _, c_in = common.cm_scalings((t_in / 250).exp())
            self.seen.append((x_in / common.bcast(c_in, x_in), t_in))
            return 100 * x_in
    net = Wild(torch.zeros(1, 3, 16, 16))
    edit(net, "stroke", image=FILES, sample=1)
    noise = net.seen[1][0] - (100 * net.seen[0][0]).clamp(-1, 1)
    close(noise.std(), 2.24, 0.05)


def test_a_patch_may_come_as_one_pixel(desk):
    small = toys().reshape(5, 4, 4, 4, 4, 3).mean((2, 4)).round().astype(np.uint8)
    lay_out(small)
    results = edit(exact(), "superres", image=FILES, factor=4, sample=2)
    assert_found(results, toys(), 3)
    edit(exact(), "superres", "out.png", image=FILES, factor=4, sample=2)
    picture = cells(5)
    assert (picture[:, 0] == small.repeat(4, 1).repeat(4, 2)).all()
    assert (picture[:, 1:3] == results).all() and (picture[:, 3] == 255).all()


def test_sixteen_bit_and_palette_images_may_be_small_too(desk):
    grey = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000
    Image.fromarray(grey).save("deep.png")
    Image.fromarray(toys()[0, ::4, ::4]).quantize(16).save("palette.png")
    deep, whole = common.read_image("deep.png", 16, 4)
    wanted = torch.tensor(grey / 65535.0) * 2 - 1
    assert not whole and (deep[0, ::4, ::4] - wanted).abs().max() < 0.01
    palette, _ = common.read_image("palette.png", 16, 4)
    wanted = np.asarray(Image.open("palette.png").convert("RGB"))[None]
    close(palette, as_x(wanted.repeat(4, 1).repeat(4, 2)))


def test_pictures_show_what_is_known_the_results_and_the_original(desk):
    net, x = exact(), as_x(toys())
    grey = torch.einsum("nchw,c->nhw", x, torch.tensor([0.2989, 0.587, 0.114]))[:, None]
    known = dict(inpaint=(1 - HOLE) * x, stroke=x, colorize=grey.expand_as(x))
    for task, first in known.items():
        results = edit(net, task, image=FILES[:2], sample=3)
        edit(net, task, "out.png", image=FILES[:2], sample=3)
        picture = cells(2)
        assert (picture[:, 0] == common.to_uint8(first[:2]).numpy()).all()
        assert (picture[:, 1:4] == results).all()
        assert picture.shape[1] == (4 if task == "stroke" else 5)
        assert task == "stroke" or (picture[:, 4] == toys()[:2]).all()


def test_masks(desk):
    assert torch.equal(common.read_mask(None, 16), HOLE)
    grey = np.zeros((32, 32), np.uint8)
    grey[:, 16:] = 129
    Image.fromarray(grey).save("mask.png")
    wanted = torch.zeros(1, 1, 16, 16)
    wanted[..., 8:] = 1
    assert torch.equal(common.read_mask("mask.png", 16), wanted)


# ---- interpolation

def test_slerp():
    """Ends, equal angles, constant length; each image has an arc of its own."""
    torch.manual_seed(0)
    z1, other = torch.randn(2, 3, 3, 16, 16)
    z2 = torch.stack([other[0], 0.9 * z1[1] + 0.1 * other[1], -0.8 * z1[2] + 0.2 * other[2]])
    length = z1.flatten(1).norm(dim=1)
    z2 = z2 * common.bcast(length / z2.flatten(1).norm(dim=1), z2)
    frames = torch.stack([cd.slerp(z1, z2, torch.full((3,), a / 8)) for a in range(9)])
    close(frames[[0, 8]], torch.stack([z1, z2]), 0, 1e-5)
    flat = frames.flatten(2)
    close(flat.norm(dim=2), length.expand(9, 3), 1e-4)
    steps = F.cosine_similarity(flat[1:], flat[:-1], dim=2).arccos()
    psi = F.cosine_similarity(z1.flatten(1), z2.flatten(1)).arccos()
    close(steps, (psi / 8).expand(8, 3), 1e-2)
    assert psi[1] < 0.5 < 1 < psi[0] < 2 < psi[2]
    mixed = cd.slerp(z1, z2, torch.tensor([0.0, 0.5, 1.0]))
    close(mixed, torch.stack([frames[0, 0], frames[4, 1], frames[8, 2]]), 0, 1e-5)


def test_interpolation_goes_from_sample_to_sample(desk):
    """Row i begins with sample 2 i and ends with sample 2 i + 1 of the same seed; what f sees is
    unit noise times 80 all the way."""
    net = exact()
    results = edit(net, "interpolate", sample=5, seed=3)

    def draw(y, noise, shape):
        return cd.sample(net, [80.0], None, noise, shape)
    samples = common.draw_many(CPU, draw, 8, None, (3, 16, 16), 3)
    assert results.shape[:2] == (4, 5)
    assert (results[:, [0, -1]] == samples.reshape(4, 2, 16, 16, 3)).all()
    x, t = net.seen[0]
    close(t, [80] * 20, 1e-5)
    close((x / 80).unflatten(0, (4, 5)).std((2, 3, 4)), torch.ones(20), 0.08)
    net.seen.clear()
    edit(net, "interpolate", "out.png")
    assert len(net.seen[0][0]) == 40 and Image.open("out.png").size == (10 * 48, 4 * 48)
    edit(net, "interpolate", sample=1)
    assert net.seen[-1][0].isfinite().all()


# ---- the command line

STUDENT = dict(stage="distill", dataset="glyphs", data_dir=None, w_max=0.0)


def save_net(path, args, script="cd", filled=True, **more):
    torch.manual_seed(0)
    model_args = common.net_settings(["glyphs", "image_size=8", "base=32", "mult=1", "blocks=1"])
    model_args |= dict(classes=0, dropout=0.0) | more
    net = common.UNet(**model_args)
    state = (fill(net) if filled else net).state_dict()
    torch.save(dict(script=script, step=6, images=48, skipped=0, args=args, model_args=model_args,
                    net=state, target=None, ema=state, optimizer={}), path)


EDITS = {  # task, checkpoint, further flags, and the columns and rows of the picture
    "inpaint": ("inpaint plain --image a.png b.png", 6, 2),
    "inpaint masked": ("inpaint plain --image a.png b.png --mask mask.png --sample 3 "
                       "--sigmas 80 2.5 0.4", 5, 2),
    "colorize": ("colorize plain --image a.png b.png --sample 2", 4, 2),
    "superres": ("superres plain --image a.png b.png --sample 2", 4, 2),
    "superres by 4": ("superres plain --image a.png b.png --sample 2 --factor 4", 4, 2),
    "superres small": ("superres plain --image small.png --sample 2 --factor 4 --sigmas 80 1",
                       4, 1),
    "stroke": ("stroke wild --image a.png", 5, 1),
    "denoise": ("denoise wild --image a.png b.png --sample 1 --noise-level 0.5", 3, 2),
    "denoise noisy": ("denoise wild --image a.png b.png --noisy", 2, 2),
    "interpolate": ("interpolate wild", 10, 4),
    "interpolate labels": ("interpolate labels --labels 3 5 --sample 4", 4, 2),
    "labels": ("stroke labels --image a.png b.png --labels 3 9", 5, 2),
    "guided": ("stroke guided --image a.png --labels 3 --w 2 --sample 1", 2, 1),
    "guided by 0": ("stroke guided --image a.png --labels 3 --sample 1", 2, 1),
    "ct": ("stroke ct --image a.png --sample 1", 2, 1),
}


def as_flags(words):
    task, ckpt, *more = words.split()
    return ["--edit", task, "--ckpt", f"{ckpt}.pt", *more, "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    save_net(folder / "wild.pt", STUDENT)
    save_net(folder / "plain.pt", STUDENT, filled=False)
    save_net(folder / "labels.pt", STUDENT, classes=10)
    save_net(folder / "guided.pt", STUDENT | dict(w_max=4.0), classes=10, cond=True)
    save_net(folder / "teacher.pt", dict(stage="teacher", dataset="glyphs"), null=False)
    save_net(folder / "ct.pt", dict(dataset="glyphs", recipe="ict"), "ct")
    save_net(folder / "ctm.pt", dict(dataset="glyphs"), "ctm")
    images = common.glyphs(2, 0, size=8)[0] // 2 + 64  # far from where bytes are cut off
    files = dict(a=images[0], b=images[1], small=images[0, ::4, ::4], flat=images[0, ::4, ::4][:1],
                 mask=np.tri(8) * 255)
    for name, image in files.items():
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{name}.png")
    (folder / "text.png").write_text("not an image\nat all")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-30])
    return folder


@pytest.fixture(scope="module")
def edited(folder):
    """All edits, each saved as .png and .npz: name -> what was said, by kind."""
    runs = {}
    for name, (words, *_) in EDITS.items():
        for kind in ("png", "npz"):
            runs[name, kind] = run_script(*as_flags(words), "--save", f"{name}.{kind}",
                                          script="cd.py", cwd=folder, code=0)
    return runs


@pytest.mark.parametrize("name", EDITS)
def test_command_line(folder, edited, name):
    words, columns, rows = EDITS[name]
    task = words.split()[0]
    calls = len(cd.TASKS[task])
    if "--sigmas" in words:
        calls = len(words.split("--sigmas ")[1].split())
    for kind in ("png", "npz"):
        done = edited[name, kind]
        assert not done.stderr and done.stdout.count("\n") == 1 and f"{name}.{kind}" in done.stdout
        assert done.stdout.startswith(f"{task}: {rows} row(s), ")
        assert f" {calls} network call(s)" in done.stdout
    assert Image.open(folder / f"{name}.png").size == (48 * columns, 48 * rows)
    shown = 0 if task == "interpolate" else 1 if task == "stroke" or "noisy" in name else 2
    each = columns - shown
    with np.load(folder / f"{name}.npz") as saved:
        assert saved["arr_0"].shape == (rows * each, 8, 8, 3) and saved["arr_0"].std() > 5
        if "--labels" in words:
            labels = words.split("--labels ")[1].split(" --")[0].split()
            assert saved["arr_1"].tolist() == [int(y) for y in labels for _ in range(each)]


def patches(x, factor):
    return x.reshape(len(x), -1, 8 // factor, factor, 8 // factor, factor).mean((3, 5))


@pytest.mark.parametrize("name, known, rounding", [
    ("inpaint", 1 - np.pad(np.ones((4, 4)), 2), 0), ("inpaint masked", 1 - np.tri(8), 0),
    ("colorize", None, 0.8), ("superres", 2, 0.51), ("superres by 4", 4, 0.51)])
def test_known_parts_hold_to_rounding(folder, edited, name, known, rounding):
    """Where nothing was cut off at black or white. known: a mask, or a patch's side."""
    results = np.load(folder / f"{name}.npz")["arr_0"].transpose(0, 3, 1, 2).astype(float)
    images = np.stack([np.asarray(Image.open(folder / f"{x}.png")) for x in "ab"])
    images = images.transpose(0, 3, 1, 2).astype(float).repeat(len(results) // 2, 0)
    off = results - images
    whole = ((results > 0) & (results < 255)).all(1, keepdims=True)
    if isinstance(known, int):
        difference, whole = patches(off, known), patches(whole, known) == 1
    elif known is None:
        weights = np.array(cd.LUMINANCE) / np.linalg.norm(cd.LUMINANCE)
        difference = np.einsum("c,nchw->nhw", weights, off)[:, None]
    else:
        difference, whole = known * off, np.ones_like(whole)
    assert whole.mean() > 0.3 and np.abs(difference * whole).max() <= rounding
    assert np.abs(off).mean() > 3


def test_guidance_changes_the_result(folder, edited):
    a, b = (np.load(folder / f"{name}.npz")["arr_0"] for name in ("guided", "guided by 0"))
    assert (a != b).mean() > 0.1


def test_results_are_saved_to_a_folder(folder, edited):
    run_script(*as_flags(EDITS["stroke"][0]), "--save", "some/folder", script="cd.py", cwd=folder,
               code=0)
    saved = np.load(folder / "stroke.npz")["arr_0"]
    files = sorted((folder / "some" / "folder").iterdir())
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), saved)
    assert len(np.unique(saved.reshape(4, -1), axis=0)) == 4


MISTAKES = [  # task, checkpoint and flags, or after a space all flags; what the message says
    ("inpaint wild", "--image"),
    ("inpaint wild --image a.png nowhere.png", "--image nowhere.png"),
    ("stroke wild --image text.png", "--image text.png"),
    ("stroke wild --image cut.png", "--image cut.png"),
    ("stroke wild --image small.png", "--image small.png", "2x2", "8"),
    ("superres wild --image small.png", "--image small.png", "2x2"),
    ("superres wild --factor 4 --image flat.png", "--image flat.png", "2x1"),
    ("interpolate wild --image a.png", "--image", "interpolate"),
    ("paint wild", "--edit", "inpaint"),
    ("colorize wild --image a.png --mask mask.png", "--mask", "colorize"),
    ("inpaint wild --image a.png --mask nowhere.png", "--mask nowhere.png"),
    ("inpaint wild --image a.png --mask small.png", "--mask small.png", "2x2"),
    ("inpaint wild --image a.png --factor 4", "--factor", "inpaint"),
    ("superres wild --image a.png --factor 3", "--factor 3", "8"),
    ("superres wild --image a.png --factor 16", "--factor 16"),
    ("stroke wild --image a.png --noise-level 1", "--noise-level", "stroke"),
    ("denoise wild --image a.png --noise-level 100", "--noise-level"),
    ("denoise wild --image a.png --noise-level 1 --sigmas 2", "--noise-level", "--sigmas"),
    ("stroke wild --image a.png --noisy", "--noisy", "stroke"),
    ("inpaint labels --image a.png", "--labels"),
    ("inpaint labels --image a.png b.png --labels 1 2 3", "--labels"),
    ("inpaint wild --image a.png --labels 3", "--labels 3"),
    ("inpaint labels --image a.png --labels 10", "--labels 10", "9"),
    ("inpaint teacher --image a.png", "--edit", "teacher.pt"),
    ("stroke wild --image a.png --w 0.5", "--w 0.5", "wild.pt"),
    ("stroke guided --image a.png --w 4.5", "--w 4.5", "from 0 to 4"),
    ("stroke ct --image a.png --w 1", "--w 1", "ct.pt"),
    ("stroke wild --image a.png --N 18", "--N"),
    ("stroke wild --image a.png --churn 10", "--churn", "wild.pt"),
    ("stroke wild --image a.png --eval 50", "--edit"),
    ("stroke wild --image a.png --dataset glyphs", "--dataset"),
    ("interpolate ctm", "ctm.pt", "ctm.py"),
    ("interpolate wild --save out.jpg", "--save out.jpg"),
    (" --ckpt wild.pt --image a.png", "--image"),
    (" --ckpt teacher.pt --w 1", "--w 1", "teacher.pt"),
    (" --ckpt wild.pt --data-dir data", "--data-dir"),
    (" --edit stroke --image a.png", "--edit", "--ckpt"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[0])
def test_mistakes_end_in_one_line(folder, mistake):
    words, *parts = mistake
    flags = words.split() if words.startswith(" ") else as_flags(words)
    done = run_script(*flags, script="cd.py", cwd=folder, code=2)
    assert not done.stdout and done.stderr.count("\n") == 1
    assert done.stderr.startswith("cd.py: error: ")
    assert all(part in done.stderr for part in parts), done.stderr
