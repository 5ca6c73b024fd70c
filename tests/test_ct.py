"""Consistency training against the paper: schedules, loss, stop-gradients, dropout, theory."""
import copy
import math
import types

import pytest
import torch

import common
import ct
from test_unet import reference_lpips
from util import TINY, VECTORS, close, fill, gauss, gradient, img

SETTINGS = {"ct_imagenet64": (800_000, 2, 200), "ct_lsun256": (1_000_000, 2, 150),
            "ct_cifar10": (800_000, 2, 150)}  # K, s0, s1
IMAGENET64 = SETTINGS["ct_imagenet64"]
T_N, T_N1 = torch.tensor([0.2, 3.0]), torch.tensor([0.5, 5.0])
X0, NOISE = img((2, 3, 16, 16)), gauss((2, 3, 16, 16), 5)
HUBER = None, None, common.pseudo_huber, common.WEIGHTS["inverse"]
PLAIN = None, None, common.l2, common.WEIGHTS["one"]


# ---- schedules

def test_sqrt_schedule():
    for key, setting in SETTINGS.items():
        rows = [row for row in VECTORS["schedules"][key] if row[0] <= setting[0]]
        assert len(rows) > 10
        for k, N, _ in rows:
            assert ct.num_points(k, *setting, "sqrt") == N
    for k, N in VECTORS["schedules"]["ct_imagenet64_first_changes"]:
        assert ct.num_points(k, *IMAGENET64, "sqrt") == N
        assert k == 0 or ct.num_points(k - 1, *IMAGENET64, "sqrt") == N - 1


def test_target_decay_is_the_papers_not_the_codes():
    for k, N, mu in VECTORS["schedules"]["paper_formula_ct_imagenet64"]:
        assert ct.num_points(k, *IMAGENET64, "sqrt") == N
        close(ct.target_decay(N, 2, 0.95), mu)
    _, N, code = VECTORS["schedules"]["ct_imagenet64"][0]
    assert abs(ct.target_decay(N, 2, 0.95) - 0.95) < 1e-12 and code == 0.9025
    for N, mu in VECTORS["ct_mu"]:
        close(ct.target_decay(N, 2, 0.95), mu)
    assert ct.target_decay(11, 10, 0.0) == 0.0


def test_doubling_schedule():
    for K in (400_000, 800_000):
        for k, N in VECTORS["ict"]["ict_N"][f"K{K}"]:
            assert ct.num_points(k, K, 10, 1280, "double") == N


@pytest.mark.parametrize("schedule, more", [("sqrt", 0), ("double", 1)])
def test_schedules_of_any_length_grow_and_end_within_s1(schedule, more):
    for K, s0, s1 in ((1, 2, 2), (3, 10, 1280), (7, 2, 150), (4000, 10, 320), (1000, 10, 100)):
        N = [ct.num_points(k, K, s0, s1, schedule) for k in range(K)]
        assert N == sorted(N) and N[0] == s0 + more and N[-1] <= s1 + 1


def test_p_of_t():
    p = common.interval_probabilities(common.karras_times(11), [-1.1, 2.0])
    close(p, VECTORS["ict"]["lognormal_pmf_N11"])
    p = common.interval_probabilities(common.karras_times(1281), [-1.1, 2.0])
    close(p[[0, 320, 640, 960, 1279]],
          VECTORS["ict"]["lognormal_pmf_N1281_indices_0_320_640_960_1279"], 2e-4)
    close(p.sum(), 1)
    close(common.interval_probabilities(common.karras_times(5), ["uniform"]), [0.25] * 4)


def test_mean_and_deviation_of_p_of_t():
    """Those of ln t, for a grid so fine that an interval is a point."""
    times = common.karras_times(4001)
    p = common.interval_probabilities(times, [0.0, 1.2])
    ln_t = (times[1:] * times[:-1]).sqrt().log()
    mean = (p * ln_t).sum()
    close([mean, ((p * (ln_t - mean) ** 2).sum()).sqrt()], [0.0, 1.2], 2e-3, 2e-3)


# ---- the loss

def reference_loss(dist, weighting="one"):
    nets = [fill(common.UNet(**TINY, classes=10), offset) for offset in (0.0, 0.05)]
    t = common.karras_times(11).flip(0)
    i = torch.tensor([0, 3, 6, 9])  # the reference counts from t_max down
    close(t[i], VECTORS["ct_loss"]["t"])
    close(t[i + 1], VECTORS["ct_loss"]["t2"])
    x0, noise, y = img((4, 3, 16, 16)), gauss((4, 3, 16, 16), 5), torch.tensor([0, 3, 7, 9])
    losses = ct.loss_fn(*nets, x0, noise, t[i + 1], t[i], y, None, dist, common.WEIGHTS[weighting])
    return nets, losses, t[i] - t[i + 1]


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_loss_vectors(name):
    (net, target), losses, _ = reference_loss(common.make_distance(name, "cpu"))
    close(losses, VECTORS["ct_loss"][name]["per_sample"], 1e-5, 2e-8)
    if name == "l2":
        losses.mean().backward()
        close(gradient(net).double().norm(), VECTORS["ct_loss"]["l2"]["grad_norm_total"], 1e-5)
        assert all(p.grad is None for p in target.parameters())


def test_loss_vector_lpips(monkeypatch):
    pytest.importorskip("lpips")
    _, losses, _ = reference_loss(reference_lpips(monkeypatch, "average"))
    close(losses, VECTORS["ct_loss"]["lpips"]["per_sample"], 1e-4, 1e-6)


def test_inverse_weighting():
    _, plain, gap = reference_loss(common.pseudo_huber)
    _, weighted, _ = reference_loss(common.pseudo_huber, "inverse")
    close(weighted, plain / gap)
    times = common.karras_times(11)
    n, x0 = torch.arange(10), torch.zeros(10, 3, 8, 8)
    net = lambda x, c_noise, y, cond, masks: torch.ones_like(x)
    ones = lambda x, y: torch.ones(len(x))
    weighted = ct.loss_fn(net, net, x0, x0, times[n], times[n + 1], None, None, ones,
                          common.WEIGHTS["inverse"])
    close(weighted, VECTORS["ict"]["weights_N11"], 1e-5)


class Known(torch.nn.Module):
    """Its consistency function is f(x, t) = c + t_min / t (x - c): exact if c is all the data."""
    c = 0.3

    def forward(self, x_in, c_noise, y=None, cond=None, masks=None):
        t = (c_noise.double() / 250).exp()
        c_skip, c_out, c_in = (common.bcast(s, x_in) for s in common.cm_scalings(t))
        x = x_in.double() / c_in
        f = self.c + common.T_MIN / common.bcast(t, x) * (x - self.c)
        return ((f - c_skip * x) / c_out).float()


def test_loss_vanishes_at_the_true_consistency_function():
    times, noise = common.karras_times(40), gauss((38, 3, 8, 8), 3)
    n = torch.arange(1, 39)  # at t_min itself c_out is 0 and F is undefined
    known = Known()
    x0 = torch.full_like(noise, known.c)
    interval = times[n], times[n + 1]
    assert ct.loss_fn(known, known, x0, noise, *interval, *PLAIN).max() < 1e-7
    assert ct.loss_fn(known, known, x0 + 0.1, noise, *interval, *PLAIN).max() > 1e-4


def test_no_gradient_through_a_target_that_is_the_net():
    """With mu = 0 the gradient is that of a frozen copy as target, not of both branches."""
    torch.manual_seed(0)
    net, frozen = (fill(common.UNet(**TINY)) for _ in range(2))
    grads = []
    for target in (net, frozen):
        net.zero_grad()
        ct.loss_fn(net, target, X0, NOISE, T_N, T_N1, *HUBER).sum().backward()
        grads.append(gradient(net))
    assert grads[0].norm() > 0 and torch.equal(*grads)
    assert all(p.grad is None for p in frozen.parameters())


def test_gradient_by_finite_differences():
    net, target = (fill(common.UNet(**TINY), offset) for offset in (0.0, 0.05))
    args = target, X0, NOISE, T_N, T_N1, *HUBER
    ct.loss_fn(net, *args).sum().backward()
    p = net.out[2].bias
    for i in range(3):
        values = []
        for step in (1e-2, -2e-2):
            p.data[i] += step
            values.append(ct.loss_fn(net, *args).sum().item())
        p.data[i] += 1e-2
        close(p.grad[i], (values[0] - values[1]) / 2e-2, 2e-3)


# ---- dropout

class OneBlock(common.UNet):
    """Little to compile: with its dropout, one block of the UNet."""
    def __init__(self):
        torch.nn.Module.__init__(self)
        self.dropout, self.block_shapes, self.layout = 0.5, [(32, 16, 16)], torch.contiguous_format
        self.dropout_size = 16
        self.first = common.Conv2d(3, 32, 1)
        self.block = common.ResBlock(32, 32, 16, 1, 0.5, scale_shift=True, cond=False)
        self.last = common.Conv2d(32, 3, 1)

    def forward(self, x, c_noise, y=None, cond=None, masks=None):
        h = self.first(x.to(self.dtype))
        return self.last(self.block(h, c_noise[:, None] / 250, None, masks[0]).to(x.dtype))


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_both_branches_drop_out_the_same_units(dtype, compiled, device, monkeypatch):
    """Equal inputs to both: the loss is 0, to rounding, if and only if they do. The student's graph
    has a backward pass and the target's has none, so what is compiled differs."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    net = OneBlock() if compiled and device == "cpu" else common.UNet(**TINY, dropout=0.5)
    net = fill(net)
    net.dtype, net.layout = dtype, torch.channels_last
    net = net.to(device, memory_format=net.layout)
    target = copy.deepcopy(net).requires_grad_(False)
    eager = copy.deepcopy(target)
    if compiled:
        net.compile()
        target.compile()
    x0, noise, t = X0.to(device), NOISE.to(device), torch.tensor([0.5, 2.0], device=device)
    masks = common.dropout_masks(net, 2)
    assert masks[0].is_contiguous(memory_format=torch.channels_last)
    rest = None, masks, common.l2, common.WEIGHTS["one"]
    with torch.no_grad():
        a, b = (common.consistency(eager, x0, t, masks=common.dropout_masks(net, 2))
                for _ in range(2))
    apart = common.l2(a, b).min()
    rounding = 1e-3 if dtype == torch.float32 else 2e-2
    if dtype == torch.bfloat16 and compiled and device == "cuda":
        rounding = 3e-2  # of the whole UNet: 0.023 on an H200
    for other in (net, target, eager):
        same = ct.loss_fn(net, other, x0, noise, t, t, *rest).max()
        assert same < rounding**2 * apart and apart > 1e-4, (same, apart)


def test_a_mask_is_shared_by_the_branches_and_by_no_one_else():
    """With two given masks, each branch is the network with that mask, in value and gradient."""
    torch.manual_seed(0)
    net, target = (fill(common.UNet(**TINY, dropout=0.5), offset) for offset in (0.0, 0.05))
    masks = common.dropout_masks(net, 2)
    ct.loss_fn(net, target, X0, NOISE, T_N, T_N1, None, masks, *HUBER[2:]).sum().backward()
    found = gradient(net)
    net.zero_grad()
    x_tn, x_tn1 = (X0 + t.view(2, 1, 1, 1) * NOISE for t in (T_N, T_N1))
    with torch.no_grad():
        wanted = common.consistency(target, x_tn, T_N, masks=masks)
    f_net = common.consistency(net, x_tn1, T_N1, masks=masks)
    (common.pseudo_huber(f_net, wanted) / (T_N1 - T_N)).sum().backward()
    assert found.norm() > 0 and torch.equal(gradient(net), found)


# ---- CM Theorem 2: with the exact denoiser, distillation by Euler steps and training agree

class Bent(torch.nn.Module):
    """A network with one parameter an image, so that backward gives the gradient of each image."""
    def __init__(self, a):
        super().__init__()
        self.a = torch.nn.Parameter(a)

    def forward(self, x, c_noise, y=None, cond=None, masks=None, dtype=None):
        return (self.a * x + common.bcast(c_noise, x) / 500).tanh() + 0.3 * self.a


def test_training_loss_tends_to_the_distillation_loss():
    """Differences of losses and of gradients shrink like 1/N^2, the steps of the grid like 1/N."""
    torch.manual_seed(0)
    n = 1_000_000
    data = torch.tensor([-0.9, -0.2, 0.1, 0.7]).view(-1, 1, 1, 1)
    D = common.ideal_denoiser(data)
    net = Bent(torch.full((n, 1, 1, 1), 0.8))
    target = Bent(torch.tensor(2.0)).requires_grad_(False)
    gaps = []
    for N in (12, 24, 48):
        times = common.karras_times(N)
        x0, noise = data[torch.randint(4, (n,))], torch.randn(n, 1, 1, 1)
        i = torch.randint(N - 1, (n,))
        t_n, t_n1 = times[i], times[i + 1]
        x_tn1 = x0 + common.bcast(t_n1, x0) * noise
        with torch.no_grad():
            x_tn = common.euler_step(D, x_tn1, t_n1, t_n)
            f_target = common.consistency(target, x_tn, t_n)
        distillation = common.l2(common.consistency(net, x_tn1, t_n1), f_target)
        training = ct.loss_fn(net, target, x0, noise, t_n, t_n1, *PLAIN)
        losses = training, distillation
        grads = [torch.autograd.grad(loss.sum(), net.a)[0].flatten() for loss in losses]
        row = []
        for a, b in (losses, grads):
            d = (a - b).detach().double()
            row.append((abs(d.mean().item()), d.std().item() / math.sqrt(n), b.mean().item()))
        gaps.append(row)
    for coarse, fine in zip(gaps, gaps[1:]):
        for (gap, error, _), (gap2, error2, _) in zip(coarse, fine):
            assert gap > 5 * error, gaps  # a difference there is at first ...
            assert gap2 + 3 * error2 < gap / 2, gaps  # ... and falls faster than steps, which halve
    assert all(gap < 0.05 * abs(value) for gap, _, value in gaps[-1]), gaps


# ---- recipes

def test_recipes_are_the_papers():
    """CM Table 3 and iCT's published settings."""
    lsun = dict(lr=1e-5, batch_size=2048, s0=2, s1=150, mu0=0.95, ema_decay=0.999943,
                total_steps=1_000_000)
    wanted = {
        ("ct", "cifar10"): dict(lr=4e-4, batch_size=512, s0=2, s1=150, mu0=0.9, ema_decay=0.9999,
                                total_steps=800_000, dropout=0),
        ("ct", "imagenet64"): dict(lr=8e-6, batch_size=2048, s0=2, s1=200, mu0=0.95,
                                   ema_decay=0.999943, total_steps=800_000),
        ("ct", "bedroom256"): lsun,
        ("ct", "cat256"): lsun,
        ("ict", "cifar10"): dict(lr=1e-4, batch_size=1024, s0=10, s1=1280, mu0=0,
                                 ema_decay=0.99993, total_steps=400_000, dropout=0.3),
        ("ict", "imagenet64"): dict(lr=1e-4, batch_size=4096, s0=10, s1=1280, mu0=0,
                                    ema_decay=0.99997, total_steps=800_000, dropout=0.2,
                                    dropout_size=16, net=["imagenet64", "scale_shift=false"]),
        ("ict", "cat256"): lsun | dict(s0=10, s1=1280, mu0=0, dropout=0.2, dropout_size=16),
    }
    method = {"ct": dict(schedule="sqrt", dist="lpips", p_t=["uniform"], weighting="one"),
              "ict": dict(schedule="double", dist="huber", p_t=[-1.1, 2.0], weighting="inverse")}
    for (recipe, dataset), settings in wanted.items():
        settings = settings | method[recipe]
        actual = ct.recipe(dict(recipe=recipe, dataset=dataset))
        assert settings == {key: actual[key] for key in settings}, (recipe, dataset)
        assert actual["batch_size"] % actual["micro_batch"] == 0
    assert ct.recipe({})["recipe"] == "ict"
    assert ct.recipe(dict(dataset="some/folder"))["net"] == ["cifar-small"]
    ours = common.net_settings(ct.recipe(dict(dataset="imagenet64"))["net"])
    assert ours == common.net_settings(["imagenet64"]) | dict(scale_shift=False)


@pytest.mark.parametrize("dataset", common.DATASETS)
def test_precision_of_the_recipes(dataset):
    """TF32 where outputs nearly as close as r and t are compared, at paper scale; or auto."""
    flags = dict(dataset=dataset)
    for method, objective, tf32 in (("ict", "discrete", True), ("ect", "discrete", True),
                                    ("ct", "discrete", False), ("ct", "scm", False),
                                    ("ict", "continuous", False)):
        found = ct.recipe(flags | dict(recipe=method, objective=objective)).get("precision")
        assert found == ("tf32" if tf32 and dataset not in ("glyphs", "mnist", "path") else None)


def test_two_step_levels_are_the_papers_time_points():
    """CM's published indices 106 of 200, 67 and 62 of 150 count from t_max."""
    for name, N, index in (("imagenet64", 201, 94), ("bedroom256", 151, 83), ("cat256", 151, 88)):
        sigmas = ct.recipe(dict(recipe="ct", dataset=name))["sigmas"]
        close(sigmas, [80.0, common.karras_times(N)[index].item()])


@pytest.mark.parametrize("dataset", common.DATASETS)
@pytest.mark.parametrize("recipe", ["ct", "ict"])
def test_levels_of_two_steps_are_on_the_grid(dataset, recipe):
    """A network from scratch has learned no others: a small one then drew noise, 22% of it read
    where from the nearest level it was 96%."""
    settings = ct.recipe(dict(recipe=recipe, dataset=dataset))
    offset = (common.karras_times(settings["s1"] + 1) / settings["sigmas"][1]).log().abs().min()
    assert offset < 0.025


# ---- sampling

def test_levels_that_were_not_learned_are_named(capsys):
    """By the nearest ones in ln t, as the network sees t; t_min, where f is the identity, is none.
    From scratch alone."""
    levels = [(0.002**(1 / 7) + i / 20 * (80**(1 / 7) - 0.002**(1 / 7)))**7 for i in range(21)]
    net = types.SimpleNamespace(levels=21)
    common.note_levels(net, [80.0, 0.96 * levels[9], 1.04 * levels[9]])
    assert not capsys.readouterr().out
    middle = (levels[9] + levels[10]) / 2 - 0.02
    common.note_levels(net, [80.0, middle, 0.003])
    line, = capsys.readouterr().out.splitlines()
    assert line.endswith(f"--sigmas 80 {levels[10]:.4g} {levels[1]:.4g}")
    net.levels = None
    common.note_levels(net, [middle])
    assert not capsys.readouterr().out


def test_sampler_clips_every_output_and_starts_at_the_first_level():
    class Wild(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.seen = torch.nn.Parameter(torch.zeros(1)), []

        def forward(self, x, c_noise, y=None, cond=None, masks=None):
            c_in = common.cm_scalings((c_noise / 250).exp())[2]
            self.seen.append((x / common.bcast(c_in, x), c_noise))
            return 100 * x
    wild, noise = Wild(), common.SeededNoise(torch.arange(2), 0)
    x = ct.sample(wild, [80.0, 0.8], None, noise, (2, 3, 8, 8))
    assert x.abs().max() == 1
    close(wild.seen[0][0].std(), 80, 0.1)
    assert (wild.seen[1][0].abs() <= 1 + 0.8 * 6).all()  # the clipped first output, and noise
    told = torch.cat([c_noise for _, c_noise in wild.seen])
    close(told, [250 * math.log(80)] * 2 + [250 * math.log(0.8)] * 2)
