"""sCM and the cut time embedding: TrigFlow, closed forms of Gaussian data, vectors, signs."""
import copy
import math

import pytest
import torch

import cd
import common
import ct
from test_cd import Smooth, column, double, fit, slim, tiny
from test_ct import Bent
from util import close, exact_derivative, full, gauss, gaussian_denoiser, gradient, img

S = common.SIGMA_DATA
X0, NOISE, LABELS = img((4, 3, 16, 16)), gauss((4, 3, 16, 16), 5), torch.tensor([0, 3, 7, 9])


class Toy(torch.nn.Module):
    """A network from its formula F(u, t), u = c_in x. The gradient to `probe`, added to F, tells
    what F is pulled by."""
    def __init__(self, formula, shape):
        super().__init__()
        self.formula, self.probe = formula, torch.nn.Parameter(torch.zeros(shape).double())

    def forward(self, u, c_noise, y=None, cond=None, masks=None, dtype=None):
        return self.formula(u, column((c_noise / 250).exp())) + self.probe


@pytest.fixture
def exact(monkeypatch):
    """With forward derivatives in place of central differences."""
    monkeypatch.setattr(common, "network_derivative", exact_derivative)


def tangent(formula, x, t, dx_dt, r=1.0):
    """g before it is normalised, and the loss with c = 0.1."""
    net = Toy(formula, x.shape)
    loss, rms = common.scm_loss(net, x, t, dx_dt, None, None, None, r, 0.0)
    loss.sum().backward()  # the mean over pixels of |F - sg[F - g / rms]|^2
    g = net.probe.grad * x[0].numel() / 2 * column(rms)
    return g, common.scm_loss(net, x, t, dx_dt, None, None, None, r, 0.1)[0].detach()


# ---- TrigFlow

def test_trigflows_consistency_function_is_the_denoiser():
    """f = cos x^ - sin sigma_d F^(x^ / sigma_d), tan = t / sigma_d, F^ = -F, at every t."""
    net = double(tiny())
    for t in (0.002, 0.1, 1.0, 80.0):
        x, t = (X0 + t * NOISE).double(), full(X0.double(), t)
        theta = column(torch.atan(t / S))
        x_hat = theta.cos() * x
        with torch.no_grad():
            F_hat = -net(x_hat / S, common.c_noise(t), LABELS)
            f = theta.cos() * x_hat - theta.sin() * S * F_hat
            close(f, common.denoise(net, x, t, LABELS), 1e-12, 1e-12)


def test_the_tangent_is_R_df_dt(exact):
    """Equation (2), by forward derivatives of F, against differences of f = `denoise`."""
    net, v = double(slim()).requires_grad_(False), gauss(X0.shape, 9).double()
    t = torch.tensor([0.05, 0.5, 3.0, 40.0]).double()
    x, h = X0.double() + column(t) * NOISE.double(), 1e-6 * t
    ends = [common.denoise(net, x + column(step) * v, t + step, LABELS) for step in (h, -h)]
    wanted = column((t**2 + S**2).sqrt()) * (ends[0] - ends[1]) / column(2 * h)
    rms = common.scm_loss(net, x, t, v, LABELS, None, None, 1.0, 0.1)[1]
    close(rms, wanted.square().mean((1, 2, 3)).sqrt(), 1e-6)

    def formula(u, levels):
        return net(u, common.c_noise(levels.flatten()), LABELS)
    g, _ = tangent(formula, x, t, v)
    assert ((g - wanted).flatten(1).norm(dim=1) < 1e-6 * wanted.flatten(1).norm(dim=1)).all()


def test_the_gradient_is_that_of_CMs_objective_with_another_weight(exact):
    """Before normalisation: times (t^2 + sigma_d^2) / (t sigma_d), with f = `denoise`."""
    net, v = double(slim()), gauss(X0.shape, 9).double()
    t = torch.tensor([0.05, 0.5, 3.0, 40.0]).double()
    x = X0.double() + column(t) * NOISE.double()

    def f(x, t):
        return common.denoise(net, x, t, LABELS)
    with torch.no_grad():
        f_x, df_dt = torch.func.jvp(f, (x, t), (v, torch.ones_like(t)))
    weight = (t**2 + S**2) / (t * S)
    (weight * common.l2(f(x, t), f_x - df_dt)).sum().backward()
    wanted = gradient(net)
    net.zero_grad()
    losses, rms = common.scm_loss(net, x, t, v, LABELS, None, None, 1.0, 0.0)
    (rms * losses).sum().backward()
    close(gradient(net), wanted, 1e-9, 1e-12 * wanted.abs().max().item())


# ---- closed forms and vectors

GAUSSIAN = {  # t: F / (c_in x) of the denoiser, of the consistency function, g / x of the denoiser
    0.05: (-0.1729729730, -0.0374213693, -0.264277226),
    0.5: (-0.4705882353, 0.0289915109, -0.275257830),
    2.0: (-0.1564792176, 0.3804469250, -0.0221830038),
    80.0: (-0.0039999438, 0.5937692186, -1.40623794e-05),
}


@pytest.mark.parametrize("t", GAUSSIAN)
def test_gaussian_data(t, exact):
    """Of N(0, 0.3^2): g = -R s^2 t / q^2 x of the exact denoiser, 0 of the consistency function."""
    s, x = 0.3, torch.tensor([0.7, -1.2, 0.05, 2.0]).double().view(1, 1, 2, 2)
    levels = full(x, t)
    v = (x - gaussian_denoiser(s)(x, levels)) / t

    def of(f_over_x):
        def formula(u, t):
            c_skip, c_out, c_in = common.edm_scalings(t)
            return (f_over_x(t) - c_skip) / (c_out * c_in) * u
        return formula

    def denoiser(t):
        return s**2 / (s**2 + t**2)

    def consistency(t):
        return s / (s**2 + t**2).sqrt()
    one = torch.ones(1, 1, 1, 1).double()
    k_denoiser, k_consistency, g_over_x = GAUSSIAN[t]
    close(of(denoiser)(one, t * one), k_denoiser, 1e-8)
    close(of(consistency)(one, t * one), k_consistency, 1e-8)
    q = s**2 + t**2
    g, _ = tangent(of(denoiser), x, levels, v)
    close(g / x, [-math.sqrt(t**2 + S**2) * s**2 * t / q**2] * 4, 1e-9, 1e-14)
    close(g / x, [g_over_x] * 4, 1e-7, 1e-12)
    net = Toy(of(consistency), x.shape)
    assert common.scm_loss(net, x, levels, v, None, None, None, 1.0, 0.1)[1].item() < 1e-12


def zero(u, t):
    return 0 * u


def bent(u, t):
    return 0.3 * u + 0.2 * t.log().sin() - 0.1 * u * t.log()


VECTORS = [  # formula, t, kind, r, g, rms, loss
    (zero, 0.5, "cd", 1.0, (-0.13102273, 0.22461039, -0.00935877, -0.37435065), 0.22794889, None),
    (zero, 0.5, "cd", 0.0, (0.11646465, -0.19965368, 0.0083189, 0.33275613), None, None),
    (zero, 0.5, "ct", 1.0, (-0.07071068, 0.28284271, 0, -0.6363961), 0.35, None),
    (zero, 0.5, "ct", 0.0, (0.1767767, -0.14142136, 0.01767767, 0.07071068), None, None),
    (zero, 2.0, "cd", 1.0, (-0.03838432, 0.0658017, -0.00274174, -0.1096695), 0.06677974, None),
    (bent, 0.05, "cd", 1.0, (0.28797881, -0.80128414, -0.08466378, 1.03326399), 0.67078135,
     0.75735512),
    (bent, 0.05, "cd", 0.5, (0.40317959, -0.86449802, -0.03049959, 1.27053795), None, None),
    (bent, 0.5, "cd", 1.0, (-0.00113154, 0.12401702, 0.04168244, -0.0867595), 0.07849544,
     0.19339028),
    (bent, 0.5, "cd", 0.5, (0.08739289, -0.13213584, 0.01229095, 0.23759675), None, None),
    (bent, 0.5, "ct", 1.0, (0.08145464, 0.2037554, 0.05449754, -0.4455822), 0.24983224, 0.51000837),
    (bent, 80.0, "cd", 1.0, (-0.03290715, -0.03164535, -0.03247548, -0.03377048), 0.0327086,
     0.06074714),
]


@pytest.mark.parametrize("formula, t, kind, r, g, rms, loss", VECTORS)
def test_vectors(formula, t, kind, r, g, rms, loss, exact):
    x = torch.tensor([0.7, -1.2, 0.05, 2.0]).double().view(1, 1, 2, 2)
    x0 = torch.tensor([0.1, -0.4, 0.0, 0.9]).double().view(1, 1, 2, 2)
    levels = full(x, t)
    clean = gaussian_denoiser(0.3)(x, levels) if kind == "cd" else x0
    ours, ours_loss = tangent(formula, x, levels, (x - clean) / t, r)
    close(ours, torch.tensor(g), 1e-6, 2e-8)
    if rms:
        close(ours.square().mean().sqrt(), rms, 1e-7)
    if loss:
        close(ours_loss, loss, 1e-7)


def test_a_step_at_r_0_goes_towards_the_teacher_and_normalises_by_image(exact):
    """The sign: F - F_T shrinks, of each image by the same length when c = 0."""
    F_teacher, t = gauss((4, 1, 2, 2), 3).double(), torch.tensor([0.1, 0.4, 0.9, 5.0]).double()
    x = gauss((4, 1, 2, 2), 1).double()
    c_skip, c_out, _ = (column(c) for c in common.edm_scalings(t))
    v = (x - c_skip * x - c_out * F_teacher) / column(t)
    net = Toy(zero, x.shape)
    losses, _ = common.scm_loss(net, x, t, v, None, None, None, 0.0, 0.0)
    close(losses.detach(), torch.ones(4))
    losses.sum().backward()
    step = -net.probe.grad
    assert (torch.cosine_similarity(step.flatten(1), F_teacher.flatten(1)) > 1 - 1e-9).all()
    close(step.flatten(1).norm(dim=1), torch.ones(4))  # 2 / D sqrt(D), D = 4


@pytest.mark.parametrize("r", [0.2, 0.5, 1.0])
def test_what_r_below_1_ends_at(r, exact):
    """g vanishes where f is the mean of D along the trajectory, over levels s < t with
    P(s) = (sin theta_s / sin theta_t)^(1/r - 1): data N(0, 0.3^2), the mean by quadrature."""
    data, power = 0.3, 1 / r - 1
    x = torch.tensor([0.7, -1.2, 0.05, 2.0]).double().view(1, 1, 2, 2)
    nodes = (torch.arange(4000).double() + 0.5) / 4000

    def f_over_x(t):
        """sin theta_s = sin theta_t u, dP = power u^(power - 1) du; s = 0 at r = 1."""
        if power == 0:
            return data / (data**2 + t**2).sqrt()
        sine = t / (t**2 + S**2).sqrt() * nodes
        q_s, q = data**2 + S**2 * sine**2 / (1 - sine**2), data**2 + t**2
        of_levels = data**2 / q_s * (q_s / q).sqrt()
        return (power * nodes ** (power - 1) * of_levels).mean(-1, keepdim=True)

    def formula(u, t):
        c_skip, c_out, c_in = common.edm_scalings(t)
        return (f_over_x(t) - c_skip) / (c_out * c_in) * u
    for t in (0.05, 0.5, 2.0, 80.0):
        levels = full(x, t)
        v = (x - gaussian_denoiser(data)(x, levels)) / t
        net = Toy(formula, x.shape)
        rms = {share: common.scm_loss(net, x, levels, v, None, None, None, share, 0.1)[1].item()
               for share in (r, r / 2)}
        assert rms[r] < 0.01 * rms[r / 2] < 0.01, rms


# ---- the derivative and the cut

@torch.no_grad()
@pytest.mark.parametrize("cond", [None, torch.tensor([1.0, 5.0, 30.0, 60.0])],
                         ids=["plain", "guided"])
def test_the_difference_is_the_derivative(cond):
    """In float32, of a network whose embedding is cut, to 3 thousandths (of rounding, at small t);
    and whatever the dtype of its convolutions."""
    net, v = slim(cond=cond is not None), gauss(X0.shape, 9)
    with torch.enable_grad():
        common.cut_time_embedding(net, 1.0)
    t = torch.tensor([0.01, 0.3, 4.0, 40.0])
    x = X0 + column(t) * NOISE
    F_x, dF = common.network_derivative(net, x, t, v, LABELS, cond)
    wanted_F, wanted = exact_derivative(net, x, t, v, LABELS, cond)
    off = (dF - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert (off < 3e-3).all(), off
    close(F_x, wanted_F, 1e-4, 1e-4)
    net.dtype = torch.bfloat16
    again = common.network_derivative(net, x, t, v, LABELS, cond)
    assert torch.equal(again[0], F_x) and torch.equal(again[1], dF)


@torch.no_grad()
def test_the_difference_is_of_second_order():
    net, v = double(tiny()), gauss(X0.shape, 9).double()
    t = torch.tensor([0.01, 0.3, 4.0, 40.0]).double()
    x = X0.double() + column(t) * NOISE.double()
    wanted = exact_derivative(net, x, t, v, LABELS)[1]
    errors = [(common.network_derivative(net, x, t, v, LABELS, h=h)[1] - wanted).norm()
              for h in (1e-3, 5e-4)]
    assert 3.8 < errors[0] / errors[1] < 4.2 and errors[0] < 0.05 * wanted.norm(), errors


@pytest.mark.parametrize("time_scale", [1.0, 0.1])
def test_the_cut_keeps_what_is_slow(time_scale):
    """Frequencies 250 time_scale 10000^(-i / 16) of base 32: cosines first, then sines."""
    net = tiny(time_scale=time_scale)
    before = copy.deepcopy(net.state_dict())
    common.cut_time_embedding(net, 2.5)
    kept = [i for i in range(16) if 250 * time_scale * 10000 ** (-i / 16) <= 2.5]
    assert kept[0] == (8 if time_scale == 1 else 4)
    columns = torch.tensor([*kept, *(16 + i for i in kept)])
    for name, weight in net.state_dict().items():
        if name == "time_embed.0.weight":
            assert torch.equal(weight[:, columns], before[name][:, columns])
            weight[:, columns] = 0
            assert weight.abs().max() == 0
        else:
            assert torch.equal(weight, before[name])


def test_the_cut_holds_while_training():
    """Of the net that is trained; not of a copy made before."""
    net = tiny()
    other = copy.deepcopy(net)
    common.cut_time_embedding(net, 1.0)
    gradients = common.flatten_gradients(net)
    cut = net.time_embed[0].weight.detach() == 0
    assert cut.any() and not cut.all() and cut.all(0).sum() == cut.any(0).sum()
    optimizer = torch.optim.RAdam(net.parameters(), 1e-2, foreach=True)
    for step in range(20):
        gradients.zero_()
        common.edm_loss(net, X0, NOISE, full(X0, 0.3 + step), LABELS).sum().backward()
        common.edm_loss(net, X0, NOISE, full(X0, 0.2 + step), LABELS).sum().backward()
        optimizer.step()
    weight = net.time_embed[0].weight
    assert (weight[cut] == 0).all() and (weight.grad[cut] == 0).all()
    assert (weight.grad[~cut] != 0).any()
    assert (weight[~cut] != other.time_embed[0].weight[~cut]).any()
    common.edm_loss(other, X0, NOISE, full(X0, 0.3), LABELS).sum().backward()
    assert (other.time_embed[0].weight.grad[cut] != 0).any()


def test_a_cut_of_everything_is_refused():
    """The slowest of base 32 turns by 250 10000^(-15 / 16) = 0.0445 rad."""
    common.cut_time_embedding(tiny(), 0.045)
    with pytest.raises(common.UserError, match="--bandwidth 0.044 would cut all .* by 0.044 rad"):
        common.cut_time_embedding(tiny(), 0.044)


def test_inf_cuts_nothing():
    net, other = tiny(), tiny()
    common.cut_time_embedding(net, math.inf)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


# ---- the losses of the scripts

def test_the_scripts_supply_the_slopes():
    """cd.py the teacher's, also guided; ct.py the noise. Both end at their common loss."""
    net, teacher = tiny(cond=True, null=True), tiny(0.1, null=True).requires_grad_(False)
    t, w = torch.tensor([0.1, 0.5, 3.0, 40.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    x = X0 + column(t) * NOISE
    cond = common.denoise(teacher, x, t, LABELS)
    uncond = common.denoise(teacher, x, t, torch.full_like(LABELS, 10))
    guided = (1 + column(w)) * cond - column(w) * uncond
    slope = (x - guided) / column(t)
    wanted = common.scm_loss(net, x, t, slope, LABELS, 25 * w, None, 0.7, 0.1)
    ours = cd.scm_loss(net, common.net_denoiser(teacher), X0, NOISE, t, LABELS, w, None, 0.7, 0.1)
    close(ours[0].detach(), wanted[0].detach()), close(ours[1], wanted[1])
    plain = tiny()
    wanted = common.scm_loss(plain, x, t, NOISE, LABELS, None, None, 0.7, 0.1)
    ours = ct.scm_loss(plain, X0, NOISE, t, LABELS, None, 0.7, 0.1)
    close(ours[0].detach(), wanted[0].detach()), close(ours[1], wanted[1])


def test_gradient_reaches_the_net_alone():
    """And there F of the gradient pass alone: not the tangent, nor the teacher."""
    net, teacher, t = tiny(), tiny(0.1), torch.tensor([0.1, 0.5, 3.0, 40.0])
    D = common.net_denoiser(teacher)
    losses, rms = cd.scm_loss(net, D, X0, NOISE, t, LABELS, None, None, 1.0, 0.1)
    losses.sum().backward()
    assert not rms.requires_grad and all(p.grad is None for p in teacher.parameters())
    close(losses.detach(), (rms / (rms + 0.1)) ** 2, 1e-4)
    ours = gradient(net)
    net.zero_grad()
    x = X0 + column(t) * NOISE
    with torch.no_grad():
        v = (x - D(x, t, LABELS)) / column(t)
        F_x, dF = common.network_derivative(net, x, t, v, LABELS)
        c_skip, c_out, c_in = (column(c) for c in common.edm_scalings(t))
        R = column((t**2 + S**2).sqrt())
        g = R * (c_skip * v + (S / R) ** 3 * F_x - 2 * column(t) * S**2 / R**4 * x)
        g += R * c_out * dF / column(t)  # R df/dt, f = c_skip x + c_out F, by the product rule
        g /= column(g.square().mean((1, 2, 3)).sqrt() + 0.1)
    F_net = net(c_in * x, common.c_noise(t), LABELS)
    (2 * F_net * g).mean((1, 2, 3)).sum().backward()
    assert (gradient(net) - ours).norm() < 1e-3 * ours.norm()


def test_the_tangent_drops_out_what_the_gradient_pass_does():
    net, t = slim(dropout=0.5).train(), torch.tensor([0.1, 0.5, 3.0, 40.0])
    seen = []
    net.register_forward_pre_hook(lambda net, args: seen.append(args[4]))
    torch.manual_seed(0)
    masks = common.dropout_masks(net, 4)
    ct.scm_loss(net, X0, NOISE, t, LABELS, masks, 1.0, 0.1)
    ct.continuous_loss(net, X0, NOISE, t, LABELS, masks)
    assert len(seen) == 6 and all(given is masks for given in seen)


def test_training_has_the_gradient_of_distillation():
    """On average, with the exact denoiser, where nothing is normalised (c is large)."""
    torch.manual_seed(0)
    n, data = 400_000, column(torch.tensor([-0.9, -0.2, 0.1, 0.7]))
    net, ideal = Bent(torch.full((n, 1, 1, 1), 0.8)), common.ideal_denoiser(data)
    x0, noise = data[torch.randint(4, (n,))], torch.randn(n, 1, 1, 1)
    t = common.random_times(n, [0.0, 1.0], "cpu")

    def D(x, t, y):
        return ideal(x, t)
    losses = (ct.scm_loss(net, x0, noise, t, None, None, 0.7, 1e3)[0],
              cd.scm_loss(net, D, x0, noise, t, None, None, None, 0.7, 1e3)[0])
    training, distillation = (torch.autograd.grad(loss.sum(), net.a)[0].flatten().double()
                              for loss in losses)
    gap = training - distillation
    error = gap.std() / math.sqrt(n)
    assert gap.mean().abs() < 4 * error and distillation.mean().abs() > 20 * error > 0


def test_a_small_student_learns_the_exact_solution():
    """Data N(0.2, 0.4^2). At r = 1/4 it is the mean of D over (sin theta_s / sin theta_t)^3.

    Seen error, at worst over t and x within two deviations: 10% of the deviation.
    """
    torch.manual_seed(0)
    m, s, net = 0.2, 0.4, Smooth()
    t = common.karras_times(50)[5:]
    x = m + (s**2 + t**2).sqrt() * torch.linspace(-2, 2, 45)[torch.randperm(45)]
    u = (torch.arange(2000) + 0.5) / 2000
    sine = (t / (t**2 + S**2).sqrt())[:, None] * u
    q = s**2 + S**2 * sine**2 / (1 - sine**2)
    exact = m + (x - m) * (3 * u**2 * s**2 / q.sqrt()).mean(1) / (s**2 + t**2).sqrt()

    def D(x, t, y):
        return m + gaussian_denoiser(s)(x - m, t)

    @torch.no_grad()
    def error():
        return (common.denoise(net, column(x), t).flatten() - exact).abs().max().item() / s

    def losses():
        x0, noise = m + s * torch.randn(256, 1, 1, 1), torch.randn(256, 1, 1, 1)
        levels = common.random_times(256, [0.0, 2.0], "cpu").clamp(common.T_MIN, common.T_MAX)
        return cd.scm_loss(net, D, x0, noise, levels, None, None, None, 0.25, 1.0)[0]
    before = error()
    fit(net, losses, 0.01, 800)
    assert before > 1 and error() < 0.2, (before, error())
