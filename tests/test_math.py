"""Noise levels, preconditioning, solvers and samplers against vectors and closed forms."""
import math

import pytest
import torch

import common
from util import VECTORS, close, full, gauss, gaussian_denoiser, gaussian_flow, img, numbered_noise


@pytest.mark.parametrize("N", ["5", "18", "40"])
def test_karras_times(N):
    times = common.karras_times(int(N))
    assert times.dtype == torch.float32 and (times.diff() > 0).all()
    close(times.flip(0), VECTORS["karras"][N][:-1])


def test_ends_of_grids_are_exact():
    for N in (2, 3, 11, 201, 1281):
        times = common.karras_times(N)
        assert len(times) == N and times[-1] == 80 and times[0] == torch.tensor(0.002)
    with pytest.raises(ValueError):
        common.karras_times(1)


def test_published_time_points():
    for row in VECTORS["time_points"]:
        close(common.karras_times(row["steps"]).flip(0)[row["index"]], row["sigma"])


def test_scalings():
    table = VECTORS["scalings"]
    t = torch.tensor(table["sigma"])
    for scalings, key in ((common.cm_scalings, "boundary"), (common.edm_scalings, "edm")):
        for value, name in zip(scalings(t), ("c_skip", "c_out", "c_in")):
            close(value, table[key][name])
    close(common.c_noise(t), table["net_time_input"])


def test_edm_scalings_give_unit_variance():
    """EDM App. B.6: unit variance in, unit variance asked of the net, c_out minimal."""
    t = torch.logspace(-3, 2, 50, dtype=torch.float64)
    c_skip, c_out, c_in = common.edm_scalings(t)
    variance = 0.5**2
    close(c_in**2 * (variance + t**2), torch.ones(50))
    close(((1 - c_skip) ** 2 * variance + c_skip**2 * t**2) / c_out**2, torch.ones(50))


def test_boundary_condition_to_the_last_bit():
    x = gauss((4, 3, 8, 8), 1)

    def wild(x, t, y, cond, masks):
        return 1e6 * x.sin()
    assert torch.equal(common.consistency(wild, x, full(x, 0.002)), x)
    assert torch.equal(common.consistency(wild, x, common.karras_times(7)[:1].expand(4)), x)
    assert not torch.equal(common.denoise(wild, x, full(x, 0.002)), x)


def test_free_form():
    """x up to t_min, to the last bit, and no gradient of the net there; above, the net alone, at
    the next number above t_min too, fed with c_in x."""
    x, weight = gauss((6, 3, 8, 8), 1), torch.tensor(1e6, requires_grad=True)
    t = torch.tensor([0.001, 0.002, 0.002, 0.002, 0.9, 80.0])
    t[3] = t[3].nextafter(torch.tensor(1.0))

    def net(x, t_in, y, cond, masks):
        return weight * (x + common.bcast(t_in, x)).sin()
    net.parametrisation = "free"
    f = common.consistency(net, x, t)
    column = common.bcast(t, x)
    F_x = weight * (x / (column**2 + 0.25).sqrt() + 250 * column.log()).sin()
    assert torch.equal(f[:3], x[:3])
    close(f[3:].detach(), F_x[3:].detach(), 1e-4, 100)
    for end, wanted in ((f[:3], 0 * F_x), (f[3:], F_x[3:])):
        slope, = torch.autograd.grad(end.sum(), weight, retain_graph=True)
        close(slope, torch.autograd.grad(wanted.sum(), weight, retain_graph=True)[0], 1e-4, 1e-4)
    net.parametrisation = "skip"
    skip = common.consistency(net, x, t).detach()
    del net.parametrisation
    assert torch.equal(common.consistency(net, x, t), skip)
    with pytest.raises(ValueError, match="parametrisation='other' is none of skip, free"):
        common.UNet(**common.NETS["glyphs"], parametrisation="other")


def test_preconditioning_wires_the_net():
    """c_skip x + c_out F(c_in x, 250 ln t, y, cond, masks), written out by hand."""
    x, y, masks = gauss((2, 3, 8, 8), 3), torch.tensor([3, 5]), torch.tensor([7, 9])
    cond, t = torch.tensor([0.5, 2.0]), torch.tensor([0.3, 20.0])

    def net(x, t_in, y, cond, masks):
        return x * common.bcast(t_in + y + 10 * cond + 100 * masks, x)
    root = (t**2 + 0.25).sqrt()
    F_x = (250 * t.log() + y + 10 * cond + 100 * masks) / root
    c_skip = 0.25 / ((t - 0.002) ** 2 + 0.25)
    for function, factor in ((common.denoise, 0.25 / root**2 + 0.5 * t / root * F_x),
                             (common.consistency, c_skip + 0.5 * (t - 0.002) / root * F_x)):
        close(function(net, x, t, y, cond, masks), x * common.bcast(factor, x))


# ---- solvers and samplers

X_T = 80 * gauss((2, 3, 4, 4), 50)


def toy(x, t):
    return x * 0.25 / (common.bcast(t, x) ** 2 + 0.25)


def toy_c(x, t):
    return (0.3 * x / (common.bcast(t, x) ** 2 + 1).sqrt() + 0.2).tanh()


def test_heun_sampler_vectors():
    close(common.heun_sample(toy, X_T, 6).flatten()[:8], VECTORS["samplers"]["heun"])
    close(common.heun_sample(toy, X_T, 5).flatten()[:8], VECTORS["edm_sampler"]["steps5"])
    close(common.heun_sample(toy, X_T, 18).flatten()[:8], VECTORS["edm_sampler"]["steps18"])


def test_churned_sampler_vectors():
    """References draw noise at every step, used or not; ours within churn_min..churn_max."""
    levels = common.karras_times(6).tolist()[::-1]
    within = [i for i, t in enumerate(levels) if 0.05 <= t <= 50]
    steps = iter(within)
    x = common.heun_sample(toy, X_T, 6, churn=2,
                           noise=lambda x: gauss(tuple(x.shape), 101 + next(steps)))
    close(x.flatten()[:8], VECTORS["samplers"]["heun_churn"])
    assert 0 < len(within) < 6 and next(steps, None) is None


def test_euler_sampler_vector():
    x, times = X_T, [*common.karras_times(6).tolist()[::-1], 0.0]
    for t, t_next in zip(times, times[1:]):
        x = common.euler_step(toy, x, full(x, t), full(x, t_next))
    close(x.flatten()[:8], VECTORS["samplers"]["euler"])


@pytest.mark.parametrize("points, key", [
    ((0,), "onestep"), ((0, 22), "multistep_ts_0_22_39_steps40"),
    ((0, 10, 22), "multistep_ts_0_10_22_39_steps40")])
def test_multistep_sampler_vectors(points, key):
    taus = [common.karras_times(40).flip(0)[i].item() for i in points]
    x = common.multistep_sample(toy_c, X_T, taus, numbered_noise())
    close(x.flatten()[:8], VECTORS["samplers"][key])


def test_multistep_noise_level():
    """Noise of variance tau^2 - t_min^2 is added: f sees level tau (CM Alg. 1, line 3)."""
    seen, unit = [], torch.tensor([1.0, -1, 1, -1])

    def f(x, t):
        seen.append((x.std() / unit.std(), t[0]))
        return torch.zeros_like(x)
    common.multistep_sample(f, torch.zeros(1, 1, 2, 2), [80.0, 3.0, 0.002],
                            lambda x: unit.view(x.shape))
    close([s for s, _ in seen[1:]], [math.sqrt(9 - 4e-6), 0.0])
    close([t for _, t in seen], [80.0, 3.0, 0.002])


def test_heun_step_ends_at_zero_with_euler():
    x = gauss((2, 3, 4, 4), 9).double()
    t, t_next = torch.tensor([[0.4, 0.7], [0.0, 0.2]], dtype=torch.float64)
    stepped = common.heun_step(toy, x, t, t_next)
    close(stepped[0], toy(x, t)[0], rtol=1e-12)  # an Euler step to 0 lands on D
    close(stepped[1], common.heun_step(toy, x[1:], t[1:], t_next[1:]), rtol=1e-12)
    assert not torch.allclose(stepped[1], common.euler_step(toy, x, t, t_next)[1])


@pytest.mark.parametrize("step, order", [(common.euler_step, 1), (common.heun_step, 2)])
@pytest.mark.parametrize("s", [0.3, 2.0])
def test_order_of_convergence_on_gaussian_data(step, order, s):
    """On N(0, s^2 I) the flow map is known: halving the steps divides the error by 2^order."""
    x_T, errors = gauss((1, 3, 4, 4), 2).double() * 80, []
    for N in (161, 321, 641):
        x, times = x_T, common.karras_times(N).double().flip(0)
        for t, t_next in zip(times[:-1], times[1:]):
            x = step(gaussian_denoiser(s), x, full(x, t), full(x, t_next))
        errors.append((x - gaussian_flow(x_T, times[0], times[-1], s)).abs().max().item())
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(o - order) < 0.15 for o in orders), orders


def test_churned_sampler_keeps_the_distribution():
    """With the exact denoiser of N(0, s^2) and many steps churn leaves the deviation s."""
    torch.manual_seed(0)
    s, n = 0.7, 40_000
    x_T = (80**2 + s**2) ** 0.5 * torch.randn(1, 1, 200, n // 200)
    x = common.heun_sample(gaussian_denoiser(s), x_T, 64, churn=20, churn_noise=1.0)
    assert abs(x.std().item() / s - 1) < 4 / math.sqrt(2 * n) + 0.005
    correlation = torch.corrcoef(torch.stack([x.flatten(), x_T.flatten()]))[0, 1]
    assert abs(correlation) < 0.9  # and it did stir


# ---- the ideal denoiser

def naive_posterior_mean(x, t, data):
    """Softmax over the whole data in float64 with |x - x_i|^2 taken as it stands."""
    x, data = x.double().flatten(1), data.double().flatten(1)
    d2 = torch.stack([(row - data).square().sum(1) for row in x])
    return torch.softmax(-d2 / (2 * t.double()[:, None] ** 2), 1) @ data


@pytest.mark.parametrize("t", [0.002, 0.05, 0.5, 3.0, 80.0])
def test_ideal_denoiser_is_the_posterior_mean(t):
    torch.manual_seed(1)
    data = torch.rand(10, 3, 8, 8) * 2 - 1
    data[1] = data[0] + 1e-3  # close ones: a soft decision at the smallest t too
    x = torch.cat([data[:4] + t * torch.randn(4, 3, 8, 8), 2 * t * torch.randn(2, 3, 8, 8)])
    expected = naive_posterior_mean(x, full(x, t), data)
    for chunk in (3, 100):
        close(common.ideal_denoiser(data, chunk=chunk)(x, full(x, t)), expected, 1e-6, 1e-7)


def test_ideal_denoiser_takes_bytes_and_labels():
    torch.manual_seed(2)
    images, labels = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8), torch.arange(12) % 3
    data, y = images / 127.5 - 1, torch.tensor([2, 0])
    x, t = data[:2] + 2 * torch.randn(2, 3, 8, 8), torch.tensor([2.0, 0.3])
    D = common.ideal_denoiser(images, labels, chunk=2)  # some chunks lack a label asked for
    close(D(x, t), naive_posterior_mean(x, t, data), 1e-6, 1e-7)
    for i in range(2):
        expected = naive_posterior_mean(x[i:i + 1], t[i:i + 1], data[labels == y[i]])
        close(D(x, t, y)[i], expected, 1e-6, 1e-7)
    missing = D(x, t, torch.tensor([0, 7]))  # no image has label 7
    assert missing[0].isfinite().all() and missing[1].isnan().all()


def test_ideal_denoiser_of_gaussian_data():
    """Many draws of N(0, s^2): the posterior mean tends to the closed form."""
    torch.manual_seed(3)
    s, x = 0.5, torch.tensor([-0.6, 0.1, 0.9]).view(3, 1, 1, 1)
    D = common.ideal_denoiser(s * torch.randn(400_000, 1, 1, 1))
    for t in (0.2, 1.0):
        close(D(x, full(x, t)), gaussian_denoiser(s)(x, full(x, t)), rtol=0.02, atol=0.005)


# ---- distances

def test_distances_by_hand():
    x, y = img((2, 3, 4, 4)), gauss((2, 3, 4, 4), 4)
    d = (x - y).flatten(1).tolist()
    close(common.l1(x, y), [sum(map(abs, row)) / 48 for row in d])
    close(common.l2(x, y), [sum(v * v for v in row) / 48 for row in d])
    close(common.norm(x, y), [math.hypot(*row) for row in d])


def test_pseudo_huber():
    n = torch.arange(96, dtype=torch.float64)
    x, y = ((0.11 * n + shift).sin().reshape(2, 3, 4, 4) for shift in (0, 0.01))
    close(common.pseudo_huber(x, y), VECTORS["pseudo_huber"])
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    common.pseudo_huber(x, torch.zeros_like(x)).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))  # smooth where the images agree
    c = 0.0299298  # 0.00054 sqrt(3072)
    close(common.pseudo_huber(x, torch.ones_like(x)), math.sqrt(3072 + c**2) - c)
