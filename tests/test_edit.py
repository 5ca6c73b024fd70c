"""Editing with a model never trained for it, and the search for time points: vectors, known
answers, the command line."""

import argparse
import itertools
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import bench
import cd
import common
from test_data import REAL
from test_math import toy_c
from util import VECTORS, close, fill, gauss, img, numbered_noise, run_script

SHAPE = (2, 3, 16, 16)
CPU = types.SimpleNamespace(
    rank=0, world=1, main=True, device=torch.device("cpu"), dtype=torch.float32
)
HOLE = torch.zeros(1, 1, 16, 16)
HOLE[..., 4:12, 4:12] = 1
KNOWN = {
    "inpaint": lambda x: (1 - HOLE) * x,
    "colorize": common.luminance,
    "superres": lambda x: common.patch_means(x, 4),
}


def seen_by(f):
    """f, and the list of all (x, t) it is given."""
    seen = []
    return lambda x, t: seen.append((x, t)) or f(x, t), seen


# ---- CM Alg. 4


def statistics(x):
    return [x.mean(), x.abs().mean(), x.std(unbiased=False), *x.flatten()[:8]]


@pytest.mark.parametrize(
    "name, known",
    [("colorization", common.luminance), ("superres", lambda x: common.patch_means(x, 8))],
)
def test_vectors(name, known):
    """The reference is given its first noisy input; ours makes it of the reference image and
    unit noise."""
    y, later = img(SHAPE, 0.7, 0.8), numbered_noise()
    draws = itertools.chain([(80 * gauss(SHAPE, 60) - known(y)) / 80], iter(lambda: later(y), None))
    f, seen = seen_by(lambda x, t: toy_c(x, t).clamp(-1, 1))
    taus = [common.karras_times(40).flip(0)[i].item() for i in (0, 10, 22)]
    x = common.edit(f, y, known, taus, lambda x: next(draws))
    for actual, key in ((x, "out"), (known(y), "reference")):
        wanted = VECTORS["editing"][f"{name}_{key}"]
        close(
            statistics(actual),
            [wanted["mean"], wanted["abs_mean"], wanted["std"], *wanted["first8"]],
            0,
            1e-5,
        )
    assert [t.tolist() for _, t in seen] == [[tau] * 2 for tau in taus]


def orthogonal(first):
    """An orthogonal matrix whose first column is the unit vector along `first`, completed by a
    QR decomposition as openai does."""
    Q = np.eye(len(first))
    Q[:, 0] = np.array(first) / np.linalg.norm(first)
    Q = np.linalg.qr(Q)[0]
    return torch.tensor(Q if Q[:, 0].sum() > 0 else -Q)


def transform(task):
    """A, its inverse and the mask Omega, 1 where the model draws, as the paper writes them."""
    if task == "inpaint":
        return (lambda x: x), (lambda x: x), HOLE.double()
    Q = orthogonal(common.LUMINANCE if task == "colorize" else np.ones(16))
    omega = torch.ones(len(Q), dtype=torch.float64)
    omega[0] = 0
    if task == "colorize":
        return (lambda x: x.movedim(1, -1) @ Q), (lambda z: (z @ Q.T).movedim(-1, 1)), omega
    return (
        lambda x: (
            x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4) @ Q
        ),  # (B,C,4,4,16): a patch a vector
        lambda z: (z @ Q.T).unflatten(4, (4, 4)).transpose(3, 4).reshape(SHAPE),
        omega,
    )


def edit_by_the_paper(f, y, task, taus, noise):
    A, A_inverse, omega = transform(task)
    y = A_inverse(A(y) * (1 - omega))
    x = y + taus[0] * noise(y)
    x = f(x, torch.full((2,), taus[0], dtype=x.dtype))
    x = A_inverse(A(y) * (1 - omega) + A(x) * omega)
    for tau in taus[1:]:
        x = x + math.sqrt(tau**2 - common.T_MIN**2) * noise(x)
        x = f(x, torch.full((2,), tau, dtype=x.dtype))
        x = A_inverse(A(y) * (1 - omega) + A(x) * omega)
    return x


@pytest.mark.parametrize("task", KNOWN)
def test_a_projection_does_what_the_papers_linear_map_and_mask_do(task):
    y = img(SHAPE, 0.7, 0.8).double()
    A, A_inverse, _ = transform(task)
    close(A_inverse(A(y)), y, 0, 1e-12)
    ours, theirs = (
        edit(toy_c, y, what, [80.0, 7.0, 0.4, 0.02], numbered_noise())
        for edit, what in ((common.edit, KNOWN[task]), (edit_by_the_paper, task))
    )
    close(ours, theirs, 0, 1e-12)
    assert (ours - y).abs().max() > 0.1


@pytest.mark.parametrize("task", KNOWN)
def test_what_is_known_holds_after_every_step(task):
    known, y, given, drawn = KNOWN[task], img(SHAPE, 0.7, 0.8), [], []
    wild = lambda x, t: drawn.append((17 * x + t[0]).sin()) or drawn[-1]
    source = common.SeededNoise(torch.arange(2), 0)
    x = common.edit(wild, y, known, common.GRID, lambda x: given.append(x) or source(x))
    steps = [*given[1:], x]  # noise is added to what the step before left
    assert len(drawn) == len(steps) == 39
    for x, f_x in zip(steps, drawn):
        if task == "inpaint":
            assert torch.equal(known(x), known(y)) and torch.equal(x * HOLE, f_x * HOLE)
        close(known(x), known(y), 0, 1e-6)
        close(x - known(x), f_x - known(f_x), 0, 1e-6)


@pytest.mark.parametrize(
    "project, size",
    [
        (common.luminance, 16),
        *((lambda x, p=p: common.patch_means(x, p), 2 * p) for p in (2, 3, 8, 41, 47, 83)),
    ],
    ids=["colorize", "2", "3", "8", "41", "47", "83"],
)
def test_projections_are_orthogonal(project, size):
    """In float32: 1 / 41 is rounded there so that an interpolation by 41 puts the first pixel
    of a patch into the patch before."""
    x, z = gauss((1, 3, size, size), 1), gauss((1, 3, size, size), 2)
    close(project(project(x)), project(x), 0, 1e-6)
    close((project(x) * z).double().sum(), (x * project(z)).double().sum(), 1e-5, 1e-4)
    assert (project(x) - x).abs().max() > 0.1


def test_projections_keep_what_they_are_named_after():
    x = img(SHAPE)
    weights = torch.tensor(common.LUMINANCE).view(1, 3, 1, 1)
    close((weights * common.luminance(x)).sum(1), (weights * x).sum(1), 0, 1e-6)
    close(F.avg_pool2d(common.patch_means(x, 4), 4), F.avg_pool2d(x, 4), 0, 1e-6)
    close(
        common.patch_means(x, 4)[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3),
        common.patch_means(x, 4),
    )


def test_levels_are_the_papers():
    """Every level of N = 40 but t_min, where f(x, t) = x; strokes at its indices 16 and 20;
    EDM's 18 levels for denoising."""
    times = common.karras_times(40).flip(0)
    close(common.GRID, times[:39])
    assert all(common.TASKS[task] is common.GRID for task in KNOWN)
    close(common.TASKS["stroke"], times[[16, 20]], 0, 5e-3)
    close(common.TASKS["denoise"], common.karras_times(18)[5:6])
    assert common.TASKS["interpolate"] == [80]


# ---- with the exact consistency function of a few images the answers are known


class Exact(torch.nn.Module):
    """A network whose consistency function is exact for a few images: it solves the ODE of
    their ideal denoiser. Notes its (x, t)."""

    classes, cond = 0, False

    def __init__(self, images):
        super().__init__()
        self.image_size, self.p, self.seen, self.y = (
            images.shape[-1],
            torch.nn.Parameter(torch.zeros(())),
            [],
            None,
        )
        self.D = common.ideal_denoiser(images)

    def flow(self, x, t):
        self.seen.append((x.float(), t.float()))
        times = common.karras_times(10, t_max=t[0].item()).double().flip(0)
        for a, b in zip(times, times[1:]):
            x = common.heun_step(self.D, x, a.expand(len(x)), b.expand(len(x)))
        return x

    def forward(self, x_in, t_in, y=None, cond=None):
        self.y = y
        t = (t_in.double() / 250).exp()
        c_skip, c_out, c_in = (common.bcast(c, x_in) for c in common.cm_scalings(t))
        x = x_in.double() / c_in
        return ((self.flow(x, t) - c_skip * x) / c_out).float()


def toys():
    """Five images (5,16,16,3) uint8 that their patch means, luminance and borders tell apart:
    grey blocks, and a little of all else."""
    rng = np.random.default_rng(0)
    blocks = np.where(rng.random((5, 4, 4, 1)) < 0.5, 30, 225).repeat(4, 1).repeat(4, 2)
    return (blocks + rng.integers(-25, 26, (5, 16, 16, 3))).astype(np.uint8)


def exact():
    return Exact(torch.tensor(toys()).permute(0, 3, 1, 2))


def as_x(images):
    return torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The folder one works in, with the toys as 0.png .. 4.png."""
    monkeypatch.chdir(tmp_path)
    for i, image in enumerate(toys()):
        Image.fromarray(image).save(f"{i}.png")
    return tmp_path


FILES = [f"{i}.png" for i in range(5)]


def edit(net, task, save="out.npz", **flags):
    """common.edit_images as the command line calls it. Returns the results (rows, each, H, W,
    3)."""
    defaults = cd.make_parser().defaults | common.SAMPLING_DEFAULTS
    args = argparse.Namespace(**defaults | dict(ckpt="it", edit=task, save=save) | flags)
    common.edit_images(args, CPU, net, lambda y: cd.consistency_function(net, y, args.w))
    if save.endswith(".npz"):
        images = np.load(save)["arr_0"]
        return images.reshape(len(flags.get("image", range(4))), -1, *images.shape[1:])


def assert_found(results, images, tolerance=2):
    assert (
        results.shape[0] == len(images)
        and (np.abs(results.astype(int) - images[:, None]) <= tolerance).all()
    )


@pytest.mark.parametrize(
    "task, flags", [("inpaint", {}), ("colorize", {}), ("superres", dict(factor=4))]
)
def test_edits_of_images_of_the_set_return_them(desk, task, flags):
    net = exact()
    assert_found(edit(net, task, image=FILES, sample=2, **flags), toys())
    close([t[0] for _, t in net.seen], common.GRID, 1e-5)
    close((net.seen[0][0] - KNOWN[task](as_x(toys())).repeat_interleave(2, 0)).std(), 80, 0.03)
    y = KNOWN[task](as_x(toys())).repeat_interleave(2, 0)
    close(
        np.mean(
            [(KNOWN[task](x) - y).std().item() ** 2 / t[0].item() ** 2 for x, t in net.seen[1:-5]]
        )
        ** 0.5,
        KNOWN[task](gauss((10, 3, 16, 16), 1)).std(),
        0.1,
    )


def test_edits_of_strangers_keep_what_is_known(desk):
    """An image that is not of the set: the two sources disagree, and what is known wins."""
    stranger = toys()[:1, ::-1, ::-1]
    Image.fromarray(stranger[0]).save("stranger.png")
    net = exact()
    results = edit(net, "inpaint", image=["stranger.png"], sample=3)[0]
    outside = HOLE[0, 0].numpy() == 0
    assert (results[:, outside] == stranger[:, outside]).all() and (results != stranger).any(
        (1, 2, 3)
    ).all()


@pytest.mark.skipif(not REAL.exists(), reason=f"no real images: {REAL.name} is not there")
@pytest.mark.parametrize(
    "task, flags",
    [("inpaint", {}), ("colorize", {}), ("superres", dict(factor=2)), ("denoise", {})],
)
def test_edits_of_real_images(desk, task, flags):
    images = common.load_dataset(str(REAL), None, 32).__getitems__(np.arange(0, 50000, 1000))[0]
    some = images[:3].permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(some):
        Image.fromarray(image).save(f"{i}.png")
    assert_found(edit(Exact(images), task, image=FILES[:3], sample=1, **flags), some)


def test_strokes_become_the_nearest_image(desk):
    for i, image in enumerate(toys()):
        Image.fromarray((0.8 * image + 25).astype(np.uint8)).save(f"{i}.png")
    net = exact()
    assert_found(edit(net, "stroke", image=FILES, sample=1), toys())
    start = net.seen[0][0] - as_x(np.stack([np.asarray(Image.open(name)) for name in FILES]))
    close([t[0] for _, t in net.seen], [5.38, 2.24])
    close([start.std(), (net.seen[1][0] - as_x(toys())).std()], [5.38, 2.24], 0.05)


@pytest.mark.parametrize(
    "flags, level", [({}, 0.296442), (dict(noise_level=0.7), 0.7), (dict(sigmas=[0.5]), 0.5)]
)
def test_denoising_is_one_evaluation(desk, flags, level):
    """Of one result for each image, as more would be the same."""
    net = exact()
    assert_found(edit(net, "denoise", image=FILES, **flags), toys())
    ((x, t),) = net.seen
    noise = (x - as_x(toys())) / level
    close(t, [level] * 5, 1e-5)
    close([noise.std(), noise.mean()], [1, 0], 0.05, 0.05)
    edit(net, "denoise", image=FILES, seed=1, **flags)
    assert (
        abs(
            torch.corrcoef(
                torch.stack([noise.flatten(), (net.seen[1][0] - as_x(toys())).flatten()])
            )[0, 1]
        )
        < 0.1
    )


def test_noisy_images_get_no_more_noise(desk):
    noisy = (
        (toys() + np.random.default_rng(1).integers(-40, 41, (5, 16, 16, 3)))
        .clip(0, 255)
        .astype(np.uint8)
    )
    for i, image in enumerate(noisy):
        Image.fromarray(image).save(f"{i}.png")
    net = exact()
    assert_found(edit(net, "denoise", image=FILES, noisy=True), toys())
    ((x, _),) = net.seen
    close(x, as_x(noisy), 0, 1e-5)


@pytest.mark.parametrize(
    "task, flags",
    [("denoise", dict(image=["0.png"])), ("interpolate", {}), ("stroke", dict(image=["0.png"]))],
)
def test_steps_draw_noise_of_their_own(desk, task, flags):
    """What the second step adds is independent of what the picture started from."""
    net = exact()
    edit(net, task, sample=1, sigmas=[3.0, 2.0], seed=5, **flags)
    first, second = (x - as_x(toys()[:1]) * (task != "interpolate") for x, _ in net.seen)
    second = (
        second
        if task != "interpolate"
        else net.seen[1][0] - net.flow(net.seen[0][0].double(), net.seen[0][1])
    )
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
    for classes, labels, wanted in (
        (10, None, range(8)),
        (2, None, range(2)),
        (10, [7, 7, 4], [7, 7, 4]),
    ):
        net.classes = classes
        edit(net, "interpolate", "out.png", labels=labels, sample=2)
        assert net.y.tolist() == [y for y in wanted for _ in range(2)]


def test_what_edits_see_of_a_network_is_clipped(desk):
    class Wild(Exact):
        def forward(self, x_in, t_in, y=None, cond=None):
            self.seen.append(
                (x_in / common.bcast(common.cm_scalings((t_in / 250).exp())[2], x_in), t_in)
            )
            return 100 * x_in

    net = Wild(torch.zeros(1, 3, 16, 16))
    edit(net, "stroke", image=FILES, sample=1)
    noise = net.seen[1][0] - (100 * net.seen[0][0]).clamp(-1, 1)
    close(noise.std(), 2.24, 0.05)


def test_a_patch_may_come_as_one_pixel(desk):
    small = toys().reshape(5, 4, 4, 4, 4, 3).mean((2, 4)).round().astype(np.uint8)
    for i, image in enumerate(small):
        Image.fromarray(image).save(f"{i}.png")
    net = exact()
    results = edit(net, "superres", image=FILES, factor=4, sample=2)
    assert_found(results, toys(), 3)
    edit(net, "superres", "out.png", image=FILES, factor=4, sample=2)
    picture = np.asarray(Image.open("out.png"))[::3, ::3].reshape(5, 16, 4, 16, 3).swapaxes(1, 2)
    assert (picture[:, 0] == small.repeat(4, 1).repeat(4, 2)).all() and (picture[:, 3] == 255).all()
    assert (picture[:, 1:3] == results).all()


def test_sixteen_bit_and_palette_images_may_be_small_too(desk):
    grey = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000
    Image.fromarray(grey).save("deep.png")
    Image.fromarray(toys()[0, ::4, ::4]).quantize(16).save("palette.png")
    deep, whole = common.read_image("deep.png", 16, 4)
    assert (
        not whole
        and (deep[0, ::4, ::4] - (torch.tensor(grey / 65535.0) * 2 - 1)).abs().max() < 0.01
    )
    palette, _ = common.read_image("palette.png", 16, 4)
    close(
        palette,
        as_x(np.asarray(Image.open("palette.png").convert("RGB"))[None].repeat(4, 1).repeat(4, 2)),
    )


def test_pictures_show_what_was_given_the_results_and_the_original(desk):
    net = exact()
    for task, given in (
        ("inpaint", (1 - HOLE) * as_x(toys())),
        ("stroke", as_x(toys())),
        (
            "colorize",
            torch.einsum("nchw,c->nhw", as_x(toys()), torch.tensor([0.2989, 0.587, 0.114]))[
                :, None
            ].expand(-1, 3, -1, -1),
        ),
    ):  # grey
        results = edit(net, task, image=FILES[:2], sample=3)
        edit(net, task, "out.png", image=FILES[:2], sample=3)
        picture = np.asarray(Image.open("out.png"))[::3, ::3]
        cells = picture.reshape(2, 16, -1, 16, 3).swapaxes(1, 2)
        assert (cells[:, 0] == common.to_uint8(given[:2]).numpy()).all() and (
            cells[:, 1:4] == results
        ).all()
        assert cells.shape[1] == (4 if task == "stroke" else 5)
        assert task == "stroke" or (cells[:, 4] == toys()[:2]).all()


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
    z1 = torch.randn(3, 3, 16, 16)
    z2 = torch.stack(
        [
            torch.randn(3, 16, 16),
            0.9 * z1[1] + 0.1 * torch.randn(3, 16, 16),
            -0.8 * z1[2] + 0.2 * torch.randn(3, 16, 16),
        ]
    )
    length = z1.flatten(1).norm(dim=1)
    z2 = z2 * common.bcast(length / z2.flatten(1).norm(dim=1), z2)
    frames = torch.stack([common.slerp(z1, z2, torch.full((3,), a / 8)) for a in range(9)])
    close(frames[[0, 8]], torch.stack([z1, z2]), 0, 1e-5)
    flat = frames.flatten(2)
    close(flat.norm(dim=2), length.expand(9, 3), 1e-4)
    steps = F.cosine_similarity(flat[1:], flat[:-1], dim=2).arccos()
    psi = F.cosine_similarity(z1.flatten(1), z2.flatten(1)).arccos()
    close(steps, (psi / 8).expand(8, 3), 1e-2)
    assert psi[1] < 0.5 < 1 < psi[0] < 2 < psi[2]
    mixed = common.slerp(z1, z2, torch.tensor([0.0, 0.5, 1.0]))
    close(mixed, torch.stack([frames[0, 0], frames[4, 1], frames[8, 2]]), 0, 1e-5)


def test_interpolation_goes_from_sample_to_sample(desk):
    """Row i begins with sample 2 i and ends with sample 2 i + 1 of the same seed; what f sees
    is unit noise times 80 all the way."""
    net = exact()
    results = edit(net, "interpolate", sample=5, seed=3)
    samples = common.draw_many(
        CPU,
        lambda y, noise, shape: cd.sample(net, [80.0], None, noise, shape),
        8,
        None,
        (3, 16, 16),
        3,
    )
    assert (
        results.shape[:2] == (4, 5)
        and (results[:, [0, -1]] == samples.reshape(4, 2, 16, 16, 3)).all()
    )
    x, t = net.seen[0]
    close(t, [80] * 20, 1e-5)
    close((x / 80).unflatten(0, (4, 5)).std((2, 3, 4)), torch.ones(20), 0.08)
    net.seen.clear()
    edit(net, "interpolate", "out.png")
    assert len(net.seen[0][0]) == 40 and Image.open("out.png").size == (10 * 48, 4 * 48)
    edit(net, "interpolate", sample=1)
    assert net.seen[-1][0].isfinite().all()


# ---- time points


@pytest.mark.parametrize("case", VECTORS["ternary_search"])
def test_ternary_search_vectors(case):
    best, _, low, high = (int(word) if word.isdigit() else word for word in case.split("_")[2:])
    seen = []
    assert (
        bench.ternary_search(lambda i: seen.append(i) or (i - best) ** 2, low, high)
        == VECTORS["ternary_search"][case]["result"]
    )
    assert seen == VECTORS["ternary_search"][case]["unique_evaluations_in_order"]


@pytest.mark.parametrize("low", [0, 7])
@pytest.mark.parametrize("width", [0, 1, 2, 3, 4, 5, 12, 39])
def test_ternary_search_finds_every_minimum(low, width):
    """The ends, too, and in ranges too narrow to be split: openai's search returns a neighbour
    there, or fails."""
    for best in range(low, low + width + 1):
        assert bench.ternary_search(lambda i: abs(i - best), low, low + width) == best


def test_ternary_search_of_random_valleys():
    rng = np.random.default_rng(0)
    for _ in range(300):
        width = int(rng.integers(0, 300))
        best = int(rng.integers(0, width + 1))
        left, right = (
            rng.exponential(size=best).cumsum()[::-1],
            rng.exponential(size=width - best).cumsum(),
        )
        values, seen = [*left, -1.0, *right], []
        assert (
            bench.ternary_search(lambda i: seen.append(i) or values[i], 0, width)
            == best
            == int(np.argmin(values))
        )
        assert len(seen) == len(set(seen)) <= 2 * math.log(max(width, 1), 1.5) + 3


def test_search_is_greedy_from_the_largest_level_down():
    """The m-th level is best at goals[m], whatever the others are."""
    goals, seen = [80.0, 9.0, 1.0, 0.05], []
    grid = common.karras_times(40).flip(0)

    def score(sigmas):
        seen.append(sigmas)
        return abs(math.log(sigmas[-1] / goals[len(sigmas) - 1]))

    found = bench.search_times(score, 4, 40)
    close(found, [grid[(grid / goal).log().abs().argmin()] for goal in goals])
    assert found[0] == 80 and all(isinstance(t, float) for t in found)
    for sigmas in seen:
        *before, level = sigmas
        assert before == found[: len(before)] and common.T_MIN <= level <= before[-1] * (1 + 1e-6)
    assert [len(sigmas) for sigmas in seen] == sorted(len(sigmas) for sigmas in seen)
    assert bench.search_times(score, 1, 40) == [80]
    close(bench.search_times(lambda sigmas: sigmas[-1], 2, 40), [80, common.T_MIN])


@pytest.mark.parametrize(
    "row",
    [row for row in VECTORS["time_points"] if 0 < row["index"] < row["steps"] - 1],
    ids=lambda row: f"{row['index']} of {row['steps']}",
)
def test_published_time_points_are_found_where_the_score_is_best(row):
    grid = common.karras_times(row["steps"]).flip(0).tolist()
    found = bench.search_times(
        lambda sigmas: abs(grid.index(sigmas[1]) - row["index"]), 2, row["steps"]
    )
    close(found, [80, row["sigma"]], 2e-6)


# ---- the command line


def save_net(path, args, script="cd", seed=0, filled=True, **model_args):
    torch.manual_seed(seed)
    model_args = (
        common.net_settings(["glyphs", "image_size=8", "base=32", "mult=1", "blocks=1"])
        | dict(classes=0, dropout=0.0)
        | model_args
    )
    net = common.UNet(**model_args)
    state = (fill(net) if filled else net).state_dict()
    torch.save(
        dict(
            script=script,
            step=6,
            images=48,
            skipped=0,
            args=args,
            model_args=model_args,
            net=state,
            target=None,
            ema=state,
            optimizer={},
            torch_version=str(torch.__version__),
        ),
        path,
    )


STUDENT = dict(stage="distill", dataset="glyphs", data_dir=None, w_max=0.0)
EDITS = {  # flags, and the columns and rows of the picture
    "inpaint": ["--edit inpaint --ckpt plain.pt --image a.png b.png", (6, 2)],
    "inpaint masked": [
        "--edit inpaint --ckpt plain.pt --image a.png b.png --mask mask.png --sample 3 --sigmas 80 "
        "2.5 0.4",
        (5, 2),
    ],
    "colorize": ["--edit colorize --ckpt plain.pt --image a.png b.png --sample 2", (4, 2)],
    "superres": ["--edit superres --ckpt plain.pt --image a.png b.png --sample 2", (4, 2)],
    "superres by 4": [
        "--edit superres --ckpt plain.pt --image a.png b.png --sample 2 --factor 4",
        (4, 2),
    ],
    "superres small": [
        "--edit superres --ckpt plain.pt --image small.png --sample 2 --factor 4 --sigmas 80 1",
        (4, 1),
    ],
    "stroke": ["--edit stroke --ckpt wild.pt --image a.png", (5, 1)],
    "denoise": [
        "--edit denoise --ckpt wild.pt --image a.png b.png --sample 1 --noise-level 0.5",
        (3, 2),
    ],
    "denoise noisy": ["--edit denoise --ckpt wild.pt --image a.png b.png --noisy", (2, 2)],
    "interpolate": ["--edit interpolate --ckpt wild.pt", (10, 4)],
    "interpolate labels": ["--edit interpolate --ckpt labels.pt --labels 3 5 --sample 4", (4, 2)],
    "labels": ["--edit stroke --ckpt labels.pt --image a.png b.png --labels 3 9", (5, 2)],
    "guided": ["--edit stroke --ckpt guided.pt --image a.png --labels 3 --w 2 --sample 1", (2, 1)],
    "guided by 0": ["--edit stroke --ckpt guided.pt --image a.png --labels 3 --sample 1", (2, 1)],
    "ct": ["--edit stroke --ckpt ct.pt --image a.png --sample 1", (2, 1)],
}
MISTAKES = {
    "no image": ["--edit inpaint --ckpt wild.pt", "--image"],
    "missing image": [
        "--edit inpaint --ckpt wild.pt --image a.png nowhere.png",
        "--image nowhere.png",
    ],
    "unreadable image": ["--edit stroke --ckpt wild.pt --image text.png", "--image text.png"],
    "cut image": ["--edit stroke --ckpt wild.pt --image cut.png", "--image cut.png"],
    "image too small": [
        "--edit stroke --ckpt wild.pt --image small.png",
        "--image small.png",
        "2x2",
        "8",
    ],
    "superres of too small an image": [
        "--edit superres --ckpt wild.pt --image small.png",
        "--image small.png",
        "2x2",
    ],
    "superres of half a small image": [
        "--edit superres --ckpt wild.pt --factor 4 --image flat.png",
        "--image flat.png",
        "2x1",
    ],
    "image to interpolate": [
        "--edit interpolate --ckpt wild.pt --image a.png",
        "--image",
        "interpolate",
    ],
    "image without edit": ["--ckpt wild.pt --image a.png", "--image"],
    "edit without checkpoint": ["--edit stroke --image a.png", "--ckpt"],
    "edit unknown": ["--edit paint --ckpt wild.pt", "--edit", "inpaint"],
    "mask of another task": [
        "--edit colorize --ckpt wild.pt --image a.png --mask mask.png",
        "--mask does not apply with --edit colorize",
    ],
    "missing mask": [
        "--edit inpaint --ckpt wild.pt --image a.png --mask nowhere.png",
        "--mask nowhere.png",
    ],
    "small mask": [
        "--edit inpaint --ckpt wild.pt --image a.png --mask small.png",
        "--mask small.png",
        "2x2",
    ],
    "factor of another task": [
        "--edit inpaint --ckpt wild.pt --image a.png --factor 4",
        "--factor does not apply with --edit inpaint",
    ],
    "factor that does not divide": [
        "--edit superres --ckpt wild.pt --image a.png --factor 3",
        "--factor 3",
        "8",
    ],
    "factor beyond the image": [
        "--edit superres --ckpt wild.pt --image a.png --factor 16",
        "--factor 16",
    ],
    "noise level of another task": [
        "--edit stroke --ckpt wild.pt --image a.png --noise-level 1",
        "--noise-level does not apply with --edit stroke",
    ],
    "noise level out of range": [
        "--edit denoise --ckpt wild.pt --image a.png --noise-level 100",
        "--noise-level",
    ],
    "noise level twice": [
        "--edit denoise --ckpt wild.pt --image a.png --noise-level 1 --sigmas 2",
        "--noise-level",
        "--sigmas",
    ],
    "noisy of another task": [
        "--edit stroke --ckpt wild.pt --image a.png --noisy",
        "--noisy does not apply with --edit stroke",
    ],
    "no labels": ["--edit inpaint --ckpt labels.pt --image a.png", "--labels"],
    "labels of an unconditional net": [
        "--edit inpaint --ckpt wild.pt --image a.png --labels 3",
        "--labels 3",
    ],
    "label out of range": [
        "--edit inpaint --ckpt labels.pt --image a.png --labels 10",
        "--labels 10",
        "9",
    ],
    "edit with a teacher": [
        "--edit inpaint --ckpt teacher.pt --image a.png",
        "--edit",
        "teacher.pt",
    ],
    "levels of a teacher": ["--ckpt teacher.pt --sigmas 80", "--sigmas", "teacher.pt"],
    "guidance of a plain teacher": ["--ckpt teacher.pt --w 1", "--w 1", "teacher.pt"],
    "guidance of a plain student": [
        "--edit stroke --ckpt wild.pt --image a.png --w 0.5",
        "--w 0.5",
        "wild.pt",
    ],
    "guidance of ct.py's": ["--ckpt ct.pt --w 1", "--w 1", "ct.pt"],
    "too much guidance": ["--ckpt guided.pt --w 4.5", "--w 4.5", "4.0"],
    "grid of a student": ["--ckpt wild.pt --N 18", "--N", "wild.pt"],
    "grid of an edit": ["--edit stroke --ckpt wild.pt --image a.png --N 18", "--N"],
    "churn of a student": ["--ckpt wild.pt --churn 10", "--churn", "wild.pt"],
    "a search that moved": ["--ckpt wild.pt --search-times 2", "tests/bench.py search-times"],
    "data without --eval": ["--ckpt wild.pt --dataset glyphs", "--dataset"],
    "data folder without --eval": ["--ckpt wild.pt --data-dir data", "--data-dir"],
    "stage of a known checkpoint": ["--ckpt wild.pt --stage teacher", "--stage"],
    "another script's checkpoint": ["--edit interpolate --ckpt ctm.pt", "ctm.pt", "ctm.py"],
    "picture of unknown kind": [
        "--edit interpolate --ckpt wild.pt --save out.jpg",
        "--save out.jpg",
    ],
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All command lines: their folder, and name -> (code, out, err)."""
    folder = tmp_path_factory.mktemp("desk")
    save_net(folder / "wild.pt", STUDENT)
    save_net(folder / "plain.pt", STUDENT, filled=False)
    save_net(folder / "labels.pt", STUDENT, classes=10)
    save_net(folder / "guided.pt", STUDENT | dict(w_max=4.0), classes=10, cond=True)
    save_net(folder / "teacher.pt", dict(stage="teacher", dataset="glyphs"), null=False)
    save_net(folder / "ct.pt", dict(dataset="glyphs", recipe="ict"), "ct")
    save_net(folder / "ctm.pt", dict(dataset="glyphs"), "ctm")
    # Far from black and white, where bytes are cut off.
    first, second = (common.glyphs(2, 0, size=8)[0] // 2 + 64).astype(np.uint8)
    small, mask = first[::4, ::4], np.tri(8, dtype=np.uint8) * 255
    images = dict(a=first, b=second, small=small, flat=small[:1], mask=mask)
    for name, image in images.items():
        Image.fromarray(image).save(folder / f"{name}.png")
    (folder / "text.png").write_text("not an image\nat all")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-30])
    commands = {name: words[0].split() for name, words in MISTAKES.items()}
    for name, (words, _) in EDITS.items():
        for kind in ("png", "npz"):
            commands[f"{name} {kind}"] = [*words.split(), "--save", f"{name}.{kind}"]
    commands["folder"] = [*EDITS["stroke"][0].split(), "--save", "some/folder"]
    runs = {}
    for name, words in commands.items():
        machine = "--device", "cpu", "--precision", "fp32"
        run = run_script(*words, *machine, script="cd.py", cwd=folder)
        runs[name] = run.returncode, run.stdout, run.stderr
    return folder, runs


@pytest.mark.parametrize("name", EDITS)
def test_command_line(done, name):
    folder, runs = done
    words, (columns, rows) = EDITS[name]
    for kind in ("png", "npz"):
        code, out, err = runs[f"{name} {kind}"]
        calls = (
            len(words.split("--sigmas ")[1].split())
            if "--sigmas" in words
            else len(common.TASKS[words.split()[1]])
        )
        assert code == 0 and not err and out.count("\n") == 1 and f"{name}.{kind}" in out, out + err
        assert (
            out.startswith(f"{words.split()[1]}: {rows} row(s), ")
            and f" {calls} network call(s)" in out
        )
    assert Image.open(folder / f"{name}.png").size == (48 * columns, 48 * rows)
    with np.load(folder / f"{name}.npz") as saved:
        extra = 0 if "interpolate" in name else 1 if "stroke" in words or "noisy" in name else 2
        assert (
            saved["arr_0"].shape == (rows * (columns - extra), 8, 8, 3) and saved["arr_0"].std() > 5
        )
        if "--labels" in words:
            labels = [int(word) for word in words.split("--labels ")[1].split(" --")[0].split()]
            assert saved["arr_1"].tolist() == [y for y in labels for _ in range(columns - extra)]


@pytest.mark.parametrize(
    "name, known, rounding",
    [
        ("inpaint", 1 - np.pad(np.ones((4, 4)), 2), 0),
        ("inpaint masked", 1 - np.tri(8), 0),
        ("colorize", None, 0.8),
        ("superres", 2, 0.51),
        ("superres by 4", 4, 0.51),
    ],
)
def test_known_parts_hold_to_rounding(done, name, known, rounding):
    """Where nothing was cut off at black or white."""
    folder, _ = done
    results = np.load(folder / f"{name}.npz")["arr_0"].transpose(0, 3, 1, 2).astype(float)
    images = (
        np.stack([np.asarray(Image.open(folder / f"{x}.png")) for x in "ab"])
        .transpose(0, 3, 1, 2)
        .astype(float)
    )
    images = images.repeat(len(results) // 2, 0)
    whole = ((results > 0) & (results < 255)).all(1, keepdims=True)
    if isinstance(known, int):
        patch = lambda x: x.reshape(len(x), -1, 8 // known, known, 8 // known, known).mean((3, 5))
        difference, whole = patch(results - images), patch(whole) == 1
    elif known is None:
        weights = np.array(common.LUMINANCE) / np.linalg.norm(common.LUMINANCE)
        difference = np.einsum("c,nchw->nhw", weights, results - images)[:, None]
    else:
        difference, whole = known * (results - images), np.ones_like(whole)
    assert whole.mean() > 0.3 and np.abs(difference * whole).max() <= rounding
    assert np.abs(results - images).mean() > 3


def test_guidance_changes_the_result(done):
    a, b = (np.load(done[0] / f"{name}.npz")["arr_0"] for name in ("guided", "guided by 0"))
    assert (a != b).mean() > 0.1


def test_results_are_saved_to_a_folder(done):
    folder, runs = done
    assert runs["folder"][0] == 0
    saved = np.load(folder / "stroke.npz")["arr_0"]
    files = sorted((folder / "some" / "folder").iterdir())
    assert len(files) == 4 and all(
        (np.asarray(Image.open(file)) == image).all() for file, image in zip(files, saved)
    )
    assert len(np.unique(saved.reshape(4, -1), axis=0)) == 4


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line(done, name):
    code, out, err = done[1][name]
    assert code == 2 and not out and err.count("\n") == 1 and err.startswith("cd.py: error: "), (
        code,
        out,
        err,
    )
    assert all(word in err for word in MISTAKES[name][1:]), err
