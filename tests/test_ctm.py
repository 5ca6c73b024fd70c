"""CTM's jumps, index laws, losses, adaptive weights and samplers, by vectors and closed forms."""
import copy
import functools
import math

import numpy as np
import pytest
import torch

import common
import ctm
from util import (TINY, VECTORS, close, fill, full, gauss, gaussian_denoiser, gaussian_flow, img,
                  numbered_noise)

V, T_MIN = VECTORS["ctm"], common.T_MIN
TIMES = common.karras_times(40)
WILD = lambda x, t_in, y, cond, masks: 1e6 * x.sin()
HALF = lambda x, t, y: gaussian_denoiser(0.5)(x, t)
X0, NOISE, LABELS = img((4, 3, 16, 16)), gauss((4, 3, 16, 16), 5), torch.tensor([0, 3, 7, 9])


class Toy(torch.nn.Module):
    """a x_in + b tanh(t_in / 1000) + c tanh(s_in / 1000) + w, the reference's toy; last (a, w)."""
    null_y = None

    def __init__(self, a=0.3, b=0.2, c=-0.1, w=0.05):
        super().__init__()
        self.b, self.c, block = b, c, torch.nn.Module()
        block.out_layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(4))
        block.out_layers[3].weight = torch.nn.Parameter(torch.tensor([a, w]))
        self.output_blocks = torch.nn.ModuleList([torch.nn.ModuleList([block])])

    def forward(self, x_in, t_in, y=None, cond=None, masks=None):
        a, w = ctm.last_layer(self)
        s = 0 if cond is None else self.c * (cond / 1000).tanh()
        return a * x_in + common.bcast(self.b * (t_in / 1000).tanh() + s, x_in) + w


def frozen(net):
    return net.requires_grad_(False)


def averaged():
    """The toy's theta^-."""
    return frozen(Toy(0.25, 0.15, -0.05, 0.02))


def watch(net):
    """The calls of a network, as they come: what it is given."""
    calls = []
    net.register_forward_pre_hook(lambda module, args: calls.append(args))
    return calls


def level(t_in):
    return (t_in / 250).exp()


def keeping(function):
    """A distance that keeps what it was given, estimate and target, in .seen."""
    def dist(x, y):
        dist.seen = x, y
        return function(x, y)
    return dist


def tiny(offset=0.0, **more):
    settings = TINY | dict(classes=10, cond=True, mult=(1,), attention=()) | more
    return fill(common.UNet(**settings), offset)


def gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def gradients(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()))


def clear(net):
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    return net


def heun_of(D, times=TIMES):
    return functools.partial(ctm.heun_solve, D, times)


# ---- g and G

def test_g_and_G_vectors():
    table = V["toy_G"]
    t, s = torch.tensor(table["t"]), torch.tensor(table["s"])
    x = torch.linspace(-2, 2, 24).view(8, 3, 1, 1) * t.view(8, 1, 1, 1)
    close(ctm.g(Toy(), x, t, s).detach(), table["g"], 1e-4)
    close(ctm.G(Toy(), x, t, s).detach(), table["G"], 1e-4)
    close(common.denoise(Toy(), x, t).detach(), table["D"], 1e-4)


def test_scalings_vectors():
    """c_skip, c_out of g and G, by networks that return 0, and 1 for zeros; what they are given."""
    table, seen = V["scalings"], []
    t, s = torch.tensor(table["t"]), torch.tensor(table["s"])
    one, zero = torch.ones(8, 1, 1, 1), torch.zeros(8, 1, 1, 1)

    def nothing(x_in, t_in, y, cond, masks):
        seen.extend([x_in, t_in, cond])
        return 0 * x_in
    always = lambda x_in, t_in, y, cond, masks: 1 + 0 * x_in
    close(ctm.g(nothing, one, t, s), table["inner_edm_c_skip"], 1e-4)
    for value, key in zip(seen, ("c_in", "rescaled_t", "rescaled_s")):
        close(value, table[key], 1e-4, 1e-4)
    close(ctm.g(always, zero, t, s), table["inner_edm_c_out"], 1e-4)
    skip, out, inner_skip, inner_out = (torch.tensor(table[key]) for key in (
        "outer_euler_c_skip", "outer_euler_c_out", "inner_edm_c_skip", "inner_edm_c_out"))
    close(ctm.G(nothing, one, t, s), skip + out * inner_skip, 1e-4)
    close(ctm.G(always, zero, t, s), out * inner_out, 1e-4)
    losses = common.edm_loss(nothing, zero, one, t, None, s)  # D = c_skip t
    close(losses / (t * inner_skip) ** 2, table["edm_weight"], 1e-4)


def test_network_vectors():
    """The reference's UNet with s, and the same weights without."""
    table, settings = V["tiny_adm"], TINY | dict(head_channels=16, classes=10)
    net, plain = common.UNet(**settings, cond=True), common.UNet(**settings)
    assert len(net.state_dict()) == table["n_keys"]
    assert sum(p.numel() for p in net.parameters()) == table["n_params"]
    for rank, (name, p) in enumerate(sorted(net.named_parameters())):
        value = 0.08 * np.sin(0.7 * np.arange(p.numel()) + 0.31 * rank + 1)
        value = value + (p.ndim == 1 and name.endswith("weight"))
        p.data = torch.tensor(value, dtype=torch.float32).view(p.shape)
    x = (0.05 * torch.arange(1536, dtype=torch.float64)).sin().float().view(2, 3, 16, 16)
    y = torch.tensor(table["y"])
    t_in, s_in = (common.c_noise(torch.tensor(table[key])) for key in ("t_sigma", "s_sigma"))
    plain.load_state_dict({name: net.state_dict()[name] for name in plain.state_dict()})
    with torch.no_grad():
        out = net(x, t_in, y, s_in)
        close([out.mean(), out.std()], [table["out_mean"], table["out_std"]], 1e-4)
        close(out[0, 0, 0], table["out_b0_c0_row0"], 1e-4, 1e-5)
        close(out[1, 2, 15], table["out_b1_c2_row15"], 1e-4, 1e-5)
        close(plain(x, t_in, y)[0, 0, 0], table["out_noS_b0_c0_row0"], 1e-4, 1e-5)


def test_a_jump_to_where_it_starts_is_nothing_to_the_last_bit():
    x = gauss((4, 3, 8, 8), 1)
    for t in (TIMES[[0, 9, 25, 39]], torch.tensor([0.3, 1 / 3, 7.7, 61.1])):
        assert torch.equal(ctm.G(WILD, x, t, t.clone()), x)
        assert not torch.equal(ctm.g(WILD, x, t, t), x)
        assert not torch.equal(ctm.G(WILD, x, t, 0.9 * t), x)


def test_a_student_with_zero_embeddings_of_s_begins_as_its_teacher():
    """g(x, t, s) is its denoiser for all s, a jump its Euler step; with random ones it is not."""
    teacher = tiny(0.1, cond=False)
    student = common.UNet(**TINY | dict(mult=(1,), attention=()), classes=10, cond=True)
    student.load_state_dict(student.state_dict() | teacher.state_dict())
    t = torch.tensor([0.1, 0.5, 2.0, 30.0])
    with torch.no_grad():
        D = common.denoise(teacher, X0, t, LABELS)
        for s in (t, 0.5 * t, full(t, T_MIN)):
            assert torch.equal(ctm.g(student, X0, t, s, LABELS), D)
            wanted = common.euler_step(lambda x, t: D, X0, t, s)
            close(ctm.G(student, X0, t, s, LABELS), wanted, 1e-5, 1e-5)
        student.input_blocks[1][0].emb_layers_s[1].reset_parameters()
        assert not torch.equal(ctm.g(student, X0, t, t, LABELS), D)


# ---- solver

def test_heun_vectors():
    """The Gaussian teacher, F = 0, and the toy; the reference counts i from t_max down."""
    for row in V["heun"]:
        N, k = int(row["grid"][1:]), row["k"]
        times, i = common.karras_times(N), torch.tensor([N - 1 - row["i"]])
        x_u = ctm.heun_solve(HALF, times, times[i].view(1, 1, 1, 1), i, k, None)
        close(x_u, row["x_u"], 1e-4)
        close(gaussian_flow(times[i], times[i], times[i - k], 0.5), row["exact_ode"], 1e-4)
    row = V["heun_toy_teacher"]
    x_t, i = torch.tensor(row["x_t"]).view(3, 1, 1, 1), 39 - torch.tensor(row["i"])
    solve = heun_of(common.net_denoiser(frozen(Toy())))
    close(solve(x_t, i, row["k"], None), row["x_u"], 1e-4)


# ---- how t, u, s and the times of denoising are distributed

def step_probabilities(M):
    """P(k) ~ k."""
    k = np.arange(1, M + 1)
    return k / k.sum()


def index_law(N, M):
    """P(k, i, j), enumerated: i even over k .. N - 1, j over 0 .. i - k."""
    p = step_probabilities(M)
    return {(k, i, j): p[k - 1] / (N - k) / (i - k + 1)
            for k in range(1, M + 1) for i in range(k, N) for j in range(i - k + 1)}


@pytest.mark.parametrize("row", V["index_law"], ids=lambda row: f"{row['N']}-{row['M']}")
def test_published_probabilities(row):
    N, M = row["N"], row["M"]
    p, table = step_probabilities(M), index_law(N, M)
    close([p[0], p[-1]], row["p_k_first_last"], 1e-5)
    close([p.sum(), sum(table.values())], [1, 1], 1e-12)
    close(p @ np.arange(1, M + 1), row["mean_k"], 1e-5)
    where = dict(P_s_eq_u=lambda k, i, j: j == i - k, P_s_last=lambda k, i, j: j == 0,
                 P_t_is_sigma_max=lambda k, i, j: i == N - 1)
    for key, holds in where.items():
        close(sum(value for kij, value in table.items() if holds(*kij)), row[key], 1e-5)


@pytest.mark.parametrize("N, M", [(7, 6), (9, 4)])
def test_indices_follow_their_law(N, M):
    """All (i, j) of each k, and no others, as often as they should, by chi square."""
    torch.manual_seed(0)
    n, table = 40_000, index_law(N, M)
    for k, p_k in enumerate(step_probabilities(M), 1):
        i, j = ctm.draw_indices(n, N, k, "cpu")
        assert i.dtype == j.dtype == torch.int64 and i.shape == j.shape == (n,)
        assert (i.min(), i.max(), j.min(), j.max()) == (k, N - 1, 0, N - 1 - k)
        counts = torch.bincount(i * N + j, minlength=N * N)
        p = torch.zeros(N * N, dtype=torch.float64)
        for (k_of, i_of, j_of), value in table.items():
            if k_of == k:
                p[i_of * N + j_of] = value / p_k
        assert (counts[p == 0] == 0).all() and abs(p.sum() - 1) < 1e-12
        expected = n * p[p > 0]
        freedom = len(expected) - 1
        chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
        assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 1e-9, k


def test_dsm_times():
    """The vectors; half and half, the odd one high; the first half by its p(t), the second even in
    t^(1/7) from 80 to 0.318."""
    table = V["dsm_times"]
    torch.manual_seed(0)
    close(ctm.dsm_times(table["bs"], [-1.2, 1.2], "cpu"), table["torch_seed0_sigmas"], 1e-4)
    torch.manual_seed(0)
    t, (high, low) = ctm.dsm_times(80_001, [0.3, 0.5], "cpu"), table["high_range"]
    first, second = t[:40_000].log(), t[40_000:]
    close([first.mean(), first.std()], [0.3, 0.5], 0.02)
    assert low * 0.9999 < second.min() < low * 1.01 and high * 0.99 < second.max() < high * 1.0001
    u = second.double() ** (1 / 7)
    u = (u - low ** (1 / 7)) / (high ** (1 / 7) - low ** (1 / 7))
    close(torch.histc(u.float(), 10, 0, 1) / 40_001, [0.1] * 10, 0.07)
    assert ctm.dsm_times(1, [-100.0, 0.0], "cpu") > 0.3


# ---- the loss against the reference

def reference_distance(x, y):
    """Its LPIPS replaced by the squared error of (x + 1) / 2, resized."""
    large = [torch.nn.functional.interpolate((v + 1) / 2, size=(224, 224), mode="bilinear")
             for v in (x, y)]
    return common.l2(*large)


def reference_setting():
    meta = V["losses"]["meta"]
    n = torch.arange(48, dtype=torch.float64)
    x0, noise, dsm_noise = (
        v.float().view(4, 3, 2, 2) for v in (n / 24 - 1, n.cos(), (1.3 * n).sin()))
    i, j, k = 39 - torch.tensor(meta["i"]), 39 - torch.tensor(meta["s_index"]), meta["k"]
    net, t = clear(Toy()), torch.tensor(meta["dsm_sigma"])
    dsm = common.edm_loss(net, x0, dsm_noise, t, None, common.c_noise(t))
    return net, averaged(), x0, noise, i, j, k, heun_of(HALF), dsm


def reference_loss(cfg):
    """x_est and x_target: ours by loss_fn, other variants from its parts in other roles."""
    net, target, x0, noise, i, j, k, solve, dsm = reference_setting()
    if not cfg or "gan_training" in cfg:
        dist = keeping(reference_distance)
        losses, x_est = ctm.loss_fn(net, target, solve, x0, noise, TIMES, i, j, k, None, dist)
        assert torch.equal(dist.seen[0], x_est) and not dist.seen[1].requires_grad
        return net, losses, x_est, dist.seen[1], dsm, x0
    t, u, s = TIMES[i], TIMES[i - k], TIMES[j]
    x_t = x0 + common.bcast(t, x0) * noise
    x_u, inner = solve(x_t, i, k, None), cfg.get("ctm_target_inner_type", "model_sg")
    with torch.no_grad():
        if inner == "no":
            x_target = ctm.G(target, x_u, u, full(x0, T_MIN))
        else:
            first = net if inner == "model_sg" else target
            x_target = ctm.estimate(first, target, x_u, u, s, None)
    outer = net if cfg.get("ctm_estimate_outer_type") == "model" else target
    x_est = ctm.estimate(net, outer, x_t, t, s, None)
    return net, reference_distance(x_est, x_target), x_est, x_target, dsm, x0


@pytest.mark.parametrize("run", V["losses"]["runs"],
                         ids=["ours", "outer-net", "inner-target", "solver-as-target", "gan"])
def test_loss_vectors(run):
    """Estimates, targets, losses, weighted terms, gradients of the CTM loss and of the sum."""
    net, losses, x_est, x_target, dsm, x0 = reference_loss(run["cfg"])
    close(x_est[:, 0, 0, 0].detach(), run["estimate"], 1e-4)
    close(x_target[:, 0, 0, 0], run["target"], 1e-4)
    close(losses.detach(), run["consistency_per_sample"], 1e-4, 1e-9)
    weight = ctm.last_layer(net)
    grad, = torch.autograd.grad(losses.mean(), weight, retain_graph=True)
    close(grad, run["grad_consistency"], 1e-4)
    critic = lambda x: 2 * x.mean(1)
    gan = -critic(x_est).mean() if "gan_training" in run["cfg"] else None
    weights = ctm.add_gradients(net, losses.mean(), gradients(net, dsm.mean()), gan, 1.0, 1.0,
                                1.0)
    close((weights["lambda_dsm"] * dsm).detach(), run["denoising_per_sample_weighted"], 1e-4)
    close(weight.grad, run["grad_total"], 1e-4)
    assert len(weights) == (1 if gan is None else 2)
    if gan is not None:
        close((weights["lambda_gan"] * gan).detach(), run["g_loss_weighted"], 1e-4)
        close(ctm.hinge_loss(critic, x0, x_est).detach(), run["hinge_d_loss"], 1e-4)


def test_global_matching_vectors():
    """Its target is that of the reference's inner type "no"; where s = u, so is its loss."""
    net, target, x0, noise, i, j, k, solve, _ = reference_setting()
    run, = (run for run in V["losses"]["runs"] if run["cfg"].get("ctm_target_inner_type") == "no")
    dist = keeping(reference_distance)
    losses, _ = ctm.loss_fn(net, target, solve, x0, noise, TIMES, i, i - k, k, None, dist)
    close(dist.seen[1][:, 0, 0, 0], run["target"], 1e-4)
    assert (j == i - k).tolist() == [False, False, False, True]
    close(losses[3].detach(), run["consistency_per_sample"][3], 1e-4)


# ---- what the loss is made of

def parts(labels=None, **more):
    """Arguments of loss_fn for tiny images: all but the networks; `more` replaces some."""
    torch.manual_seed(0)
    x0, noise = 0.5 * torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    i, j = torch.tensor([39, 30, 22, 14]), torch.tensor([20, 3, 12, 1])
    return dict(solve=heun_of(HALF), x0=x0, noise=noise, times=TIMES, i=i, j=j, k=9, y=labels,
                dist=common.l2) | more


def x_t_of(given):
    return given["x0"] + common.bcast(TIMES[given["i"]], given["x0"]) * given["noise"]


def targets(net, target, **more):
    """x_est and x_target of loss_fn."""
    dist = keeping(common.l2)
    ctm.loss_fn(net, target, **parts(dist=dist, **more))
    return [x.detach() for x in dist.seen]


def exact_solve(times):
    return lambda x, i, k, y: gaussian_flow(
        x, common.bcast(times[i], x), common.bcast(times[i - k], x), 0.5)


def test_loss_by_hand():
    """CTM Eq. 10 written out anew, in float64."""
    net, target, given = Toy().double(), averaged().double(), parts()
    times = TIMES.double()
    x0, noise = given["x0"].double(), given["noise"].double()
    given |= dict(x0=x0, noise=noise, times=times, solve=exact_solve(times))
    found, x_est = ctm.loss_fn(net, target, **given)

    def jump(a, b, c, w, x, t, s):
        F = a * x / math.sqrt(t**2 + 0.25) + w
        F = F + b * math.tanh(math.log(t) / 4) + c * math.tanh(math.log(s) / 4)
        g = (0.25 * x + 0.5 * t * math.sqrt(t**2 + 0.25) * F) / (t**2 + 0.25)
        return s / t * x + (1 - s / t) * g
    theta, theta_minus = (0.3, 0.2, -0.1, 0.05), (0.25, 0.15, -0.05, 0.02)
    for n, (i, j) in enumerate([(39, 20), (30, 3), (22, 12), (14, 1)]):
        t, u, s, t_min = (times[index].item() for index in (i, i - 9, j, 0))
        x_t = x0[n] + t * noise[n]
        x_u = x_t * math.sqrt((0.25 + u**2) / (0.25 + t**2))
        a = jump(*theta_minus, jump(*theta, x_t, t, s), s, t_min)
        b = jump(*theta_minus, jump(*theta, x_u, u, s), s, t_min)
        close(x_est[n].detach(), a, 1e-6, 1e-9)
        close(found[n].detach(), (a - b).square().mean(), 1e-5)


@torch.no_grad()
def test_the_outer_jump_from_t_min_is_nothing_to_the_last_bit():
    """The loss is then that of a consistency model."""
    net, given = Toy(), parts()
    t, t_min, x_t = TIMES[given["i"]], full(given["x0"], T_MIN), x_t_of(given)
    wanted = ctm.G(net, x_t, t, t_min)
    assert torch.equal(ctm.estimate(net, WILD, x_t, t, t_min, None), wanted)
    x_est, x_target = targets(net, WILD, j=0 * given["i"])
    assert torch.equal(x_est, wanted)
    x_u = given["solve"](x_t, given["i"], 9, None)
    assert torch.equal(x_target, ctm.G(net, x_u, TIMES[given["i"] - 9], t_min))


def test_roles():
    """Inner jumps are the net's, in the target too, outer ones theta^-'s: who changes what."""
    both, neither, i = [True, True], [False, False], parts()["i"]
    for j, by_net, by_target in ((parts()["j"], both, both),  # s between
                                 (0 * i, both, neither),  # s = t_min
                                 (i - 9, [True, False], both)):  # s = u
        before = targets(Toy(), Toy(0.25), j=j)

        def changed(*nets):
            return [not torch.equal(a, b) for a, b in zip(before, targets(*nets, j=j))]
        assert changed(Toy(0.4), Toy(0.25)) == by_net
        assert changed(Toy(), Toy(0.2)) == by_target
        assert changed(Toy(), Toy(0.25)) == neither


@torch.no_grad()
def test_where_s_is_u_the_solvers_result_is_the_inner_target():
    """To the last bit: this is global matching."""
    target, given = averaged(), parts()
    u_index = given["i"] - 9
    x_u = given["solve"](x_t_of(given), given["i"], 9, None)
    wanted = ctm.G(target, x_u, TIMES[u_index], full(x_u, T_MIN))
    assert torch.equal(targets(Toy(), target, j=u_index)[1], wanted)


def test_solver_steps_of_each_matching():
    """Local: one step. Global: as many as the grid has, whatever its length."""
    assert ctm.recipe(dict(matching="local"))["max_steps"] == 1
    for N in ({}, dict(N=9)):
        settings = ctm.recipe(dict(matching="global") | N) | N
        assert settings["max_steps"] == settings["N"] - 1


def test_labels_and_levels_reach_every_network():
    """In the loss, t and u to s and on to t_min, two teacher calls a solver step; in samplers."""
    nets = net, target, teacher = Toy(), frozen(Toy()), Toy()
    given = parts(LABELS, k=2, solve=heun_of(common.net_denoiser(teacher)))
    calls = [watch(module) for module in nets]
    ctm.loss_fn(net, target, **given)
    i, j = given["i"], given["j"]
    of_teacher = [(i, None), (i - 1, None), (i - 1, None), (i - 2, None)]
    for found, levels in zip(calls, ([(i, j), (i - 2, j)], 2 * [(j, 0 * j)], of_teacher)):
        assert len(found) == len(levels)
        for (_, t_in, y, cond, _), (t, s) in zip(found, levels):
            assert torch.equal(y, LABELS) and (cond is None) == (s is None)
            close(level(t_in), TIMES[t])
            if s is not None:
                close(level(cond), TIMES[s])
    calls[0].clear()
    ctm.sample(net, [20.0, 2.0], 0.5, LABELS, torch.ones_like, (4, 3, 2, 2))
    ctm.sample_heun(net, 3, LABELS, torch.ones_like, (4, 3, 2, 2))
    assert len(calls[0]) == 2 + 5 and all(torch.equal(call[2], LABELS) for call in calls[0])


# ---- gradients

def test_gradient_of_the_ctm_loss_by_finite_differences():
    """In float64, x_target held fixed. No s is t_min: all comes through the outer jump's input."""
    net, target = tiny(0.0).double(), frozen(tiny(0.05).double())
    net.dtype = target.dtype = torch.float64
    times, i, j, y = TIMES.double(), torch.tensor([30, 14]), torch.tensor([12, 5]), LABELS[:2]
    x0, noise = X0[:2, :, :8, :8].double(), NOISE[:2, :, :8, :8].double()

    def loss_with(dist):
        losses, _ = ctm.loss_fn(net, target, exact_solve(times), x0, noise, times, i, j, 4, y, dist)
        return losses.mean()
    first = keeping(common.l2)
    loss_with(first).backward()
    assert all(p.grad is None for p in target.parameters()) and gradient(net).norm() > 1e-3

    @torch.no_grad()
    def loss(fixed):
        return loss_with(lambda a, b: common.l2(a, first.seen[1] if fixed else b)).item()
    gaps = []
    for name, n in (("out.2.bias", 1), ("time_embed_s.0.bias", 3), ("input_blocks.0.0.bias", 5),
                    ("label_emb.weight", 7)):
        p, values = net.get_parameter(name), []
        for fixed in (True, False):
            for step in (1e-5, -1e-5):
                p.data.view(-1)[n] += step
                values.append(loss(fixed))
                p.data.view(-1)[n] -= step
        slope, whole = (values[0] - values[1]) / 2e-5, (values[2] - values[3]) / 2e-5
        close(p.grad.flatten()[n], slope, 1e-5, 1e-8)
        gaps.append(abs(whole / slope - 1))
    assert min(gaps) > 0.1, gaps  # the target moves with the net, but its gradient is left out


def terms(net, target, teacher):
    """The three losses of a generator step, and the critic that judges."""
    torch.manual_seed(0)
    critic = ctm.ConvCritic(16, width=8).eval()
    critic.heads.requires_grad_(False)
    solve = heun_of(common.net_denoiser(teacher))
    i, j = torch.tensor([39, 30, 22, 14]), torch.tensor([20, 3, 0, 11])
    losses, x_est = ctm.loss_fn(net, target, solve, X0, NOISE, TIMES, i, j, 3, LABELS, common.l2)
    t = torch.tensor([0.05, 0.4, 2.0, 30.0])
    dsm = common.edm_loss(net, X0, gauss(X0.shape, 6), t, LABELS, common.c_noise(t))
    return losses.mean(), dsm.mean(), -critic(x_est).mean(), critic


def test_each_term_has_a_gradient_and_reaches_the_net_alone():
    """All of it, also s's embedding; not target, critic, teacher; in the critic's turn no net."""
    net, target, teacher = tiny(), frozen(tiny(0.05)), tiny(0.1, cond=False)
    *losses, critic = terms(net, target, teacher)
    for loss in losses:
        for p in net.parameters():
            p.grad = None
        loss.backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.norm() > 0 for p in net.parameters())
    others = [p for module in (target, teacher, critic) for p in module.parameters()]
    assert all(p.grad is None for p in others)
    critic.heads.requires_grad_(True)  # the critic's turn
    with torch.no_grad():
        _, fake = ctm.loss_fn(net, target, **parts(LABELS, x0=X0, noise=NOISE))
    before = gradient(net)
    ctm.hinge_loss(critic, X0, fake).backward()
    assert torch.equal(gradient(net), before)
    assert all(p.grad.norm() > 0 for p in critic.heads.parameters() if p.ndim > 1)


# ---- adaptive weights

LOWER_END = {"grad2_norm": 5e3, "raw": 1e-3, "gan_clip_0.01_10": 0.01}  # which the reference's omit


@pytest.mark.parametrize("case", [*V["adaptive_lambda"]["cases"], LOWER_END],
                         ids=lambda case: f"{case['grad2_norm']}")
def test_adaptive_weight_vectors(case):
    """On losses that are linear in the toy's last layer."""
    net, n = clear(Toy()), case["grad2_norm"]
    weight = ctm.last_layer(net)
    strong, other = torch.tensor([3.0, 4.0]), torch.tensor([0.0, n])
    assert strong.norm() == V["adaptive_lambda"]["grad1_norm"]
    dsm = gradients(net, n * weight[0])
    found = ctm.add_gradients(net, strong @ weight, dsm, other @ weight, 1.0, 1.0, 1.0)
    close(list(found.values()), [case["raw"], case["gan_clip_0.01_10"]])


def test_last_layer_is_the_second_convolution_of_the_last_residual_block():
    with torch.device("meta"):
        net = common.UNet(**common.NETS["imagenet64"], classes=1000, cond=True)
    assert ctm.last_layer(net) is net.get_parameter("output_blocks.15.0.out_layers.3.weight")
    assert ctm.last_layer(net).shape == (192, 192, 3, 3)


@pytest.mark.parametrize("with_gan, dsm_weight", [(False, 1), (True, 1), (True, 0.3), (True, 0),
                                                  (False, 0)])
def test_gradients_are_those_of_the_weighted_sum(with_gan, dsm_weight):
    """Of the share of the batch, added to what there is; the adaptive weights are constants."""
    net, target, weight = clear(tiny()), frozen(tiny(0.05)), 0.7
    teacher = frozen(tiny(0.1, cond=False))
    last = net.get_parameter("output_blocks.1.0.out_layers.3.weight")
    losses = terms(net, target, teacher)[:3]
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in losses]
    wanted = {}
    total = losses[0]
    if dsm_weight:
        wanted["lambda_dsm"] = norms[0] / (norms[1] + 1e-4)
        total = total + dsm_weight * wanted["lambda_dsm"] * losses[1]
    if with_gan:
        wanted["lambda_gan"] = (norms[0] / (norms[2] + 1e-4)).clamp(0.01, 10)
        total = total + weight * wanted["lambda_gan"] * losses[2]
    once = torch.cat([grad.flatten() for grad in gradients(net, total)])
    before = [p.grad for p in net.parameters()]
    for share in (0.25, 0.5):
        ctm_loss, dsm, gan, _ = terms(net, target, teacher)
        dsm = gradients(net, dsm) if dsm_weight else None
        found = ctm.add_gradients(net, ctm_loss, dsm, gan if with_gan else None, dsm_weight, weight,
                                  share)
        assert found.keys() == wanted.keys()
        close(list(found.values()), list(wanted.values()), 1e-4)
        assert not any(value.requires_grad for value in found.values())
    assert (gradient(net) - 0.75 * once).norm() < 1e-4 * once.norm() and once.norm() > 0
    # In place: the ranks sum a buffer that the gradients are views of.
    assert all(p.grad is grad for p, grad in zip(net.parameters(), before))
    scale = [norms[0]]
    if dsm_weight:
        scale.append(dsm_weight * wanted["lambda_dsm"] * norms[1])
    if with_gan:
        scale.append(weight * wanted["lambda_gan"] * norms[2])
    assert min(scale) > 1e-3 * max(scale)  # no term is lost in the tolerance


# ---- training to the exact solution

class Scale(torch.nn.Module):
    """F(x, t, s) = a(ln t, ln s) x: every g of data N(0, s^2 I)."""
    def __init__(self):
        super().__init__()
        linear, act = torch.nn.Linear, torch.nn.SiLU
        self.layers = torch.nn.Sequential(
            linear(3, 32), act(), linear(32, 32), act(), linear(32, 1))

    def forward(self, x_in, t_in, y=None, cond=None, masks=None):
        t, s = t_in / 500, cond / 500
        return common.bcast(self.layers(torch.stack([t, s, s - t], 1)), x_in) * x_in


@pytest.mark.parametrize("matching, solver, M, steps, bound", [
    ("soft", "teacher", 8, 1500, 0.06), ("local", "teacher", 1, 2000, 0.08),
    ("global", "teacher", 39, 1500, 0.06), ("soft", "own denoiser", 4, 1500, 0.06),
    ("soft", "own jump", 8, 1500, 0.12)])
def test_a_small_student_learns_every_jump(matching, solver, M, steps, bound):
    """Data N(0, 0.8^2): G(x, t, s) = x sqrt((0.64 + s^2) / (0.64 + t^2)), g(x, t, t) = 0.64 x /
    (0.64 + t^2). G's error is relative, at worst over all 820 pairs of levels; g's in deviations.
    """
    torch.manual_seed(0)
    deviation, rng = 0.8, np.random.default_rng(0)
    D = lambda x, t, y: gaussian_denoiser(deviation)(x, t)
    net = Scale()
    target = frozen(copy.deepcopy(net))
    solve = {"teacher": heun_of(D),
             "own denoiser": heun_of(lambda x, t, y: ctm.g(target, x, t, t, y)),
             "own jump": lambda x, i, k, y: ctm.G(target, x, TIMES[i], TIMES[i - k], y)}[solver]
    optimizer = torch.optim.Adam(net.parameters(), 0.02, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, steps)

    @torch.no_grad()
    def errors():
        t, s = TIMES[torch.tril_indices(40, 40)]
        x = (deviation**2 + t**2).sqrt().view(-1, 1, 1, 1)
        jumps, ends = ctm.G(net, x, t, s).flatten(), (deviation**2 + s**2).sqrt()
        denoised, wanted = ctm.g(net, x[t == s], TIMES, TIMES), D(x[t == s], TIMES, None)
        return ((jumps / ends - 1).abs().max().item(),
                ((denoised - wanted).abs().max() / deviation).item())
    before = errors()
    for _ in range(steps):
        k = 1 + int(rng.choice(M, p=step_probabilities(M)))
        i, j = ctm.draw_indices(256, 40, k, "cpu")
        j = i - k if matching == "global" else j
        unit, noise, dsm_noise = (torch.randn(256, 1, 4, 4) for _ in range(3))
        x0 = deviation * unit
        losses, _ = ctm.loss_fn(net, target, solve, x0, noise, TIMES, i, j, k, None, common.l2)
        t = ctm.dsm_times(256, [-0.6, 1.4], "cpu")
        dsm = common.edm_loss(net, x0, dsm_noise, t, None, common.c_noise(t))
        optimizer.zero_grad()
        (losses.mean() + dsm.mean()).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        common.ema_update(target, net, 0.9)
    after = errors()
    assert before[0] > 0.5 and before[1] > 0.2, before
    assert after[0] < bound and after[1] < 0.02, after


# ---- samplers

def run_id(run):
    return "-".join(map(str, (run["sampler"], run.get("steps", run.get("levels")), run["gamma"])))


@pytest.mark.parametrize("run", V["samplers"], ids=run_id)
def test_sampler_vectors(run):
    """t, s and first pixel of each network call, and the result, with noise of ones."""
    net, shape = Toy(), (1, 3, 2, 2)
    calls = watch(net)
    if run["sampler"] == "heun":
        x = ctm.sample_heun(net, run["steps"], None, torch.ones_like, shape)
        assert len(calls) == 35
        run = run | dict(s=run["t"])
    else:
        levels = run.get("levels") or ctm.step_levels(run["steps"])
        x = ctm.sample(net, levels, run["gamma"], None, torch.ones_like, shape)
        assert len(calls) == len(levels) == run.get("steps", len(levels))
    close(x[0, 0, 0, 0], run["x0"], 1e-4)
    for place, key in ((1, "t"), (3, "s")):
        if key in run:
            close([level(call[place]) for call in calls], run[key], 1e-4)
    if "x_in" in run:
        found = [call[0][0, 0, 0, 0] * (level(call[1]) ** 2 + 0.25).sqrt() for call in calls]
        close(found, run["x_in"], 1e-4)


def test_step_levels():
    for N, sigmas in V["sampler_sigmas"].items():
        close([*ctm.step_levels(int(N) - 1), T_MIN, 0.0], sigmas, 1e-4)
    assert ctm.step_levels(1) == [80.0]


def test_samplers_start_from_their_level_and_end_within_the_image():
    samplers = {20.0: functools.partial(ctm.sample, levels=[20.0, 2.0], gamma=0.3),
                80.0: functools.partial(ctm.sample_heun, N=3)}
    for first, draw in samplers.items():
        for w, end in ((50.0, 1.0), (-50.0, -1.0)):
            net = Toy(w=w)
            calls = watch(net)
            x = draw(net, y=None, noise=torch.ones_like, shape=(2, 3, 2, 2))
            assert torch.equal(x, torch.full((2, 3, 2, 2), end)) and not x.requires_grad
            close(calls[0][0], torch.full(x.shape, first / math.sqrt(first**2 + 0.25)), 1e-5)


@torch.no_grad()
def test_gamma_of_one_is_multistep_consistency_sampling():
    """To the last bit, on a network that depends on s, with the same noise."""
    levels, net, x_T = [80.0, 24.4, 5.84, 0.9, 0.661], Toy(), 80 * gauss((2, 3, 4, 4), 50)
    f = lambda x, t: ctm.G(net, x, t, full(x, T_MIN))
    found = ctm.gamma_sample(functools.partial(ctm.G, net), x_T, levels, 1.0, numbered_noise())
    assert torch.equal(found, common.multistep_sample(f, x_T, levels, numbered_noise()))


def test_gamma_of_zero_draws_no_noise_and_follows_the_trajectory():
    """From level to level and on to t_min: the exact G of N(0, s^2) ends where the flow does."""
    def noise(x):
        raise AssertionError("noise")
    jump = lambda x, t, s: gaussian_flow(x, common.bcast(t, x), common.bcast(s, x), 0.7)
    x_T = gauss((2, 3, 4, 4), 50).double() * 80
    for levels in ([80.0], [80.0, 20.0, 0.5], ctm.step_levels(9)):
        found = ctm.gamma_sample(jump, x_T, levels, 0.0, noise)
        close(found, gaussian_flow(x_T, 80.0, T_MIN, 0.7), 1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("deviation", [0.3, 1.0])
def test_noise_restores_the_level(gamma, deviation):
    """Exact jumps, each noise in a direction of its own: |x|^2 is the variance of the marginal.

    Noise of variance t'^2 - s^2 is put onto N(0, deviation^2 + s^2).
    """
    levels, seen = ctm.step_levels(5), []
    directions = iter(torch.eye(8, dtype=torch.float64)[1:].view(-1, 1, 1, 1, 8))
    variance = lambda t: deviation**2 + t**2

    def jump(x, t, s):
        assert (s <= t).all() and (s >= T_MIN).all()
        seen.append((t.item(), x.square().sum().item()))
        return gaussian_flow(x, common.bcast(t, x), common.bcast(s, x), deviation)
    x_T = math.sqrt(variance(80.0)) * torch.eye(8, dtype=torch.float64)[:1].view(1, 1, 1, 8)
    x = ctm.gamma_sample(jump, x_T, levels, gamma, lambda x: next(directions))
    close(seen, [(t, variance(t)) for t in levels], 1e-9)
    close(x.square().sum(), variance(T_MIN), 1e-9)
    assert len(list(directions)) == 7 - (gamma > 0) * 4  # none after the last jump
