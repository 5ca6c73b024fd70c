"""What two or more of the scripts need, and nothing else.

In this order, each section using only what stands above it:

    constants and errors     T_MIN T_MAX RHO SIGMA_DATA, UserError, atomic_file
    noise levels             karras_times interval_probabilities random_times
    preconditioning          edm_scalings cm_scalings denoise consistency
    solvers and samplers     euler_step heun_step heun_sample multistep_sample edit ideal_denoiser
                             net_denoiser guide
    parts of losses          l1 l2 pseudo_huber LPIPS make_distance edm_loss WEIGHTS replay_random
    continuous time          consistency_jvp continuous_loss
    network                  UNet NETS make_net
    moving average           ema_update
    data                     glyphs ArrayImages FileImages load_dataset index_batches to_device
    processes and seeds      setup seed_everything flatten_gradients StopSignal
    checkpoints              save_checkpoint load_checkpoint load_network
    logs and pictures        start_run Log save_grid save_samples seeded_noise
    evaluation               Inception frechet_distance inception_score precision_recall evaluate
    flags                    add_shared_flags parse_flags sample_checkpoint
    teachers                 teacher_recipe sample_teacher train_teacher open_teacher teacher_denoiser
    zero-shot editing        luminance patch_means slerp add_edit_flags edit_images

Notation, everywhere: t is the noise level, i.e. the standard deviation of the noise (EDM's sigma), so that
x_t = x0 + t * noise. Images x are (B, C, H, W) in [-1, 1], times t and labels y are (B,).

Papers: CM = Song et al. 2023, arXiv 2303.01469v2. iCT = Song & Dhariwal 2023, arXiv 2310.14189. ECT = Geng et al. 2024, arXiv 2406.14548.
EDM = Karras et al. 2022, arXiv 2206.00364. ADM = Dhariwal & Nichol 2021, arXiv 2105.05233.
"""
import argparse
import atexit
import colorsys
import contextlib
import copy
import datetime
import difflib
import functools
import hashlib
import io
import json
import math
import os
import pickle
import signal
import sys
import tarfile
import time
import types
import urllib.request
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ------------------------------------------------------------------------------------------------------------
# Constants and errors
# ------------------------------------------------------------------------------------------------------------

T_MIN, T_MAX, RHO, SIGMA_DATA = 0.002, 80.0, 7.0, 0.5  # EDM Table 1; CM calls t_min epsilon and t_max T


class UserError(Exception):
    """Something the user can put right. The scripts print its message as one line and exit with code 2."""


ranks_differ = False  # once they run, each process meets its own errors; until then all meet the same


def one_line_errors(kind, error, trace):
    """An excepthook: a UserError, or a GPU that is full, is one line and ends the process with exit code 2."""
    if issubclass(kind, torch.OutOfMemoryError):
        error = f"out of memory, lower --micro-batch: {first_line(error)}"
    elif not issubclass(kind, UserError):
        return sys.__excepthook__(kind, error, trace)
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    if ranks_differ or local == 0:
        for bar in list(getattr(sys.modules.get("tqdm"), "tqdm", types.SimpleNamespace(_instances=()))._instances):
            bar.close()  # or the message would stand on its line
        message = str(error).strip().splitlines()[-1]  # a loader's worker sends its traceback along: the last line says it
        print(f"{Path(sys.argv[0]).name}: error: {f'rank {rank}: ' * (rank > 0)}{message.removeprefix('common.UserError: ')}",
              file=sys.stderr, flush=True)
    raise SystemExit(2)


def first_line(error) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.split(" <_io.")[0]  # Pillow names the Python object it read from


@contextlib.contextmanager
def atomic_file(path, mode="wb"):
    """Open a file that appears at `path` whole or not at all, whatever happens meanwhile.

    Raises:  UserError naming the path if it cannot be written (no permission, disk full); what stood there stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # what a killed process leaves, the next one overwrites
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise UserError(f"cannot write {path}: {getattr(cause, 'strerror', None) or cause}") from error
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------
# Noise levels
# ------------------------------------------------------------------------------------------------------------

def karras_times(N: int, t_min=T_MIN, t_max=T_MAX, rho=RHO) -> Tensor:
    """The N noise levels t_min = times[0] < ... < times[N-1] = t_max, ascending, with N-1 intervals.

    The paper counts t_1 .. t_N; times[n] is its t_{n+1}. EDM and openai's code count downwards.

    Returns: (N,) float32, computed in float64.
    Raises:  ValueError if N < 2.
    Source:  CM Sec. 2, EDM Eq. 5.
    """
    if N < 2:
        raise ValueError(f"a time grid needs at least 2 points, got {N}")
    i = torch.arange(N, dtype=torch.float64)
    low, high = t_min ** (1 / rho), t_max ** (1 / rho)
    return ((low + i / (N - 1) * (high - low)) ** rho).float()


def interval_probabilities(times: Tensor, law) -> Tensor:
    """p(n), n = 0 .. N-2, of drawing the interval times[n] .. times[n+1]: (N-1,) float32.

    Args:    law: ["uniform"] (CM Alg. 2 and 3), or [mean, std]: what ln t ~ Normal(mean, std^2) gives the interval (iCT Table 1).
    """
    if law == ["uniform"]:
        return torch.full_like(times[1:], 1 / (len(times) - 1))
    mean, std = law
    p = ((times.double().log() - mean) / (std * math.sqrt(2))).erf().diff()
    return (p / p.sum()).float()


def random_times(n: int, law, device) -> Tensor:
    """(n,) noise levels: uniform in t^(1/RHO), which is karras_times with N -> infinity, or ln t ~ Normal(mean, std^2) unclipped.

    Args:    law: as `interval_probabilities`.
    Source:  CM App. B (continuous time); EDM Table 1 (training).
    """
    if law == ["uniform"]:
        low, high = T_MIN ** (1 / RHO), T_MAX ** (1 / RHO)
        return ((low + torch.rand(n, device=device) * (high - low)) ** RHO).clamp(T_MIN, T_MAX)
    mean, std = law
    return (mean + std * torch.randn(n, device=device)).exp()


# ------------------------------------------------------------------------------------------------------------
# Preconditioning
# ------------------------------------------------------------------------------------------------------------

def bcast(t: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to multiply x."""
    return t.view(-1, *[1] * (x.ndim - 1))


def edm_scalings(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in of a denoiser at noise level t, each shaped like t. Source: EDM Table 1."""
    root = (t**2 + SIGMA_DATA**2).sqrt()
    return (SIGMA_DATA / root) ** 2, t * SIGMA_DATA / root, 1 / root


def cm_scalings(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in of a consistency function: c_skip(t_min) = 1 and c_out(t_min) = 0, exactly.

    Source: CM App. C. Note that t_min is subtracted in the numerator of c_out only, not under its root.
    """
    root = (t**2 + SIGMA_DATA**2).sqrt()
    return SIGMA_DATA**2 / ((t - T_MIN) ** 2 + SIGMA_DATA**2), SIGMA_DATA * (t - T_MIN) / root, 1 / root


def c_noise(t: Tensor) -> Tensor:
    """What the network is told of the noise level: EDM's ln(t)/4 on a scale of 1000, as ADM's embedding expects."""
    return 250 * t.log()


def precondition(net, x, t, y, extra, scalings):
    assert x.ndim == 4 and t.shape == x.shape[:1] and t.dtype == x.dtype, (x.shape, t.shape, t.dtype)
    c_skip, c_out, c_in = (bcast(c, x) for c in scalings(t))
    return c_skip * x + c_out * net(c_in * x, c_noise(t), y, extra)  # F_x = net(...), float32


def denoise(net, x: Tensor, t: Tensor, y: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
    """D(x, t), an estimate of E[x0 | x_t = x].

    Args:    net: a UNet.  x: (B,C,H,W) float32 at noise level t.  t: (B,) float32, > 0.  y: (B,) int64 labels.
             extra: (B,) a further scalar input of the net, if it was built with one.
    Returns: (B,C,H,W) float32.
    Source:  EDM Eq. 7.
    """
    return precondition(net, x, t, y, extra, edm_scalings)


def consistency(net, x: Tensor, t: Tensor, y: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
    """f(x, t), the end at t_min of the probability-flow trajectory through (x, t); f(x, t_min) = x to the last bit.

    Args, returns as `denoise`.
    Source:  CM Sec. 3, App. C.
    """
    return precondition(net, x, t, y, extra, cm_scalings)


# ------------------------------------------------------------------------------------------------------------
# Solvers and samplers
# ------------------------------------------------------------------------------------------------------------

def euler_step(D, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """One Euler step of the probability-flow ODE dx/dt = (x - D(x, t)) / t, from t to t_next.

    Args:    D: (x (B,C,H,W), t (B,)) -> clean estimate (B,C,H,W).  x: images at level t.  t: (B,) > 0.  t_next: (B,) >= 0.
    Returns: (B,C,H,W), images at level t_next.
    Source:  EDM Alg. 1 without its correction; a solver of CM Alg. 2.
    """
    d_cur = (x - D(x, t)) / bcast(t, x)
    return x + bcast(t_next - t, x) * d_cur


def heun_step(D, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """One Heun step of the same ODE: Euler, then the trapezoid rule. Where t_next is 0 Euler's result stands.

    Args, returns as `euler_step`. Always two calls of D.
    Source:  EDM Alg. 1, lines 3-8.
    """
    d_cur = (x - D(x, t)) / bcast(t, x)
    x_next = x + bcast(t_next - t, x) * d_cur
    t_safe = torch.where(t_next > 0, t_next, t)  # the slope at 0 is 0/0
    d_prime = (x_next - D(x_next, t_safe)) / bcast(t_safe, x)
    return torch.where(bcast(t_next > 0, x), x + bcast(t_next - t, x) * (d_cur + d_prime) / 2, x_next)


def heun_sample(D, x_T: Tensor, N: int, churn=0.0, churn_min=0.05, churn_max=50.0, churn_noise=1.003,
                noise=torch.randn_like) -> Tensor:
    """Solve the ODE from T_MAX to 0 in N Heun steps over karras_times(N); with churn, EDM's stochastic sampler.

    Args:    D: as `euler_step`.  x_T: (B,C,H,W), T_MAX * unit noise.  churn, churn_min, churn_max, churn_noise: EDM's
             S_churn, S_tmin, S_tmax, S_noise.  noise: x -> unit noise shaped like x, called once for each churned step.
    Returns: (B,C,H,W). NFE = 2 N - 1: the last step, to 0, is Euler's.
    Source:  EDM Alg. 1 (churn = 0) and Alg. 2.
    """
    x = x_T
    times = [*karras_times(N).tolist()[::-1], 0.0]
    for t, t_next in zip(times[:-1], times[1:]):
        gamma = min(churn / N, math.sqrt(2) - 1) if churn_min <= t <= churn_max else 0.0
        if gamma > 0:
            t_hat = t * (1 + gamma)
            x = x + math.sqrt(t_hat**2 - t**2) * churn_noise * noise(x)
            t = t_hat
        step = heun_step if t_next > 0 else euler_step
        x = step(D, x, torch.full_like(x[:, 0, 0, 0], t), torch.full_like(x[:, 0, 0, 0], t_next))
    return x


def multistep_sample(f, x_T: Tensor, taus, noise=torch.randn_like) -> Tensor:
    """Draw with a consistency function, in one step or several.

    Args:    f: (x (B,C,H,W), t (B,)) -> (B,C,H,W).  x_T: (B,C,H,W), taus[0] * unit noise.  taus: noise levels, largest
             first, the first that of x_T.  noise: x -> unit noise shaped like x, called before each level but the first.
    Returns: (B,C,H,W). NFE = len(taus).
    Source:  CM Alg. 1.
    """
    x = f(x_T, torch.full_like(x_T[:, 0, 0, 0], taus[0]))
    for tau in taus[1:]:
        x_hat = x + math.sqrt(max(tau**2 - T_MIN**2, 0)) * noise(x)
        x = f(x_hat, torch.full_like(x[:, 0, 0, 0], tau))
    return x


def edit(f, y: Tensor, known, taus, noise=torch.randn_like) -> Tensor:
    """Fill in what an image does not say, with a consistency function that was never trained to.

    Args:    f, taus, noise: as `multistep_sample`.  y: (B,C,H,W) reference.  known: x -> the part of x that y tells, an
             orthogonal projection: CM's A^-1[(A x)(1 - Omega)], whatever A and the mask Omega are.
    Returns: (B,C,H,W) whose known part is y's. NFE = len(taus).
    Source:  CM Alg. 4.
    """
    x_hat = known(y) + taus[0] * noise(y)
    for i, tau in enumerate(taus):
        if i > 0:
            x_hat = x + math.sqrt(max(tau**2 - T_MIN**2, 0)) * noise(x)
        x = f(x_hat, torch.full_like(x_hat[:, 0, 0, 0], tau))
        x = x - known(x) + known(y)
    return x


def ideal_denoiser(data: Tensor, labels: Tensor | None = None, chunk: int = 4096):
    """The denoiser that minimises EDM's loss on a finite data set: the posterior mean over its images.

    Args:    data: (n,C,H,W), uint8 or float in [-1, 1], on the device to compute on.  labels: (n,) int64.
             chunk: images taken at a time; memory is about chunk * C*H*W * 8 bytes.
    Returns: D(x, t, y=None) -> (B,C,H,W) in x's dtype. With y the mean is over the images of that label.
    Raises:  ValueError if labels are missing for a y, or no image has one of them.
    Source:  EDM App. B.3. The logits -|x - x_i|^2 / 2t^2 reach 1e9 at t = 0.002, so they are taken in float64,
             without |x|^2, which all share, and summed with a running maximum.
    """
    def D(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if y is not None and (labels is None or not torch.isin(y, labels).all()):
            raise ValueError("the data has no image of a label that was asked for")
        flat, inverse_variance = x.flatten(1).double(), t.double()[:, None] ** -2  # (B,D), (B,1)
        top = torch.full_like(inverse_variance, -torch.inf)
        total, mean = torch.zeros_like(top), torch.zeros_like(flat)
        for start in range(0, len(data), chunk):
            part = data[start:start + chunk].flatten(1).double()
            if data.dtype == torch.uint8:
                part = part / 127.5 - 1
            logits = (flat @ part.T - part.square().sum(1) / 2) * inverse_variance  # (B,chunk)
            if y is not None:
                logits = logits.masked_fill(labels[start:start + chunk] != y[:, None], -torch.inf)
            new_top = torch.maximum(top, logits.amax(1, keepdim=True))
            shift = new_top.nan_to_num(neginf=0.0)  # no image of label y yet: exp(-inf - 0) = 0
            rescale, p = (top - shift).exp(), (logits - shift).exp()
            total, mean, top = total * rescale + p.sum(1, keepdim=True), mean * rescale + p @ part, new_top
        return (mean / total).view_as(x).to(x.dtype)
    return D


def net_denoiser(net):
    """D(x, t, y) of a network, whose null label stands for y = None if it has one."""
    def D(x, t, y):
        return denoise(net, x, t, torch.full_like(t, net.null_y, dtype=torch.int64) if y is None and net.null_y is not None else y)
    return D


def guide(D, y, w):
    """D(x, t) for labels y: with guidance (1 + w) D(x, t, y) - w D(x, t, None), w (B,); without if w is None."""
    if w is None:
        return lambda x, t: D(x, t, y)
    return lambda x, t: (1 + bcast(w, x)) * D(x, t, y) - bcast(w, x) * D(x, t, None)


# ------------------------------------------------------------------------------------------------------------
# What losses are made of: distances d(x, y) -> (B,), one number per image, weights, and shared randomness
# ------------------------------------------------------------------------------------------------------------

def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference over pixels and channels."""
    return (x - y).abs().flatten(1).mean(1)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference over pixels and channels (the papers call the square l2 too)."""
    return (x - y).square().flatten(1).mean(1)


def pseudo_huber(x: Tensor, y: Tensor) -> Tensor:
    """sqrt(|x - y|^2 + c^2) - c with one norm per image and c = 0.00054 sqrt(C*H*W). Source: iCT Table 1."""
    c = 0.00054 * math.sqrt(x[0].numel())
    return ((x - y).square().flatten(1).sum(1) + c**2).sqrt() - c


def norm(x: Tensor, y: Tensor) -> Tensor:
    """|x - y| with one norm per image. Its gradient where x = y is 0. Source: ECT, as pseudo-Huber with c = 0."""
    return torch.linalg.vector_norm((x - y).flatten(1), dim=1)


class LPIPS(nn.Module):
    """LPIPS with VGG16 and average pooling, on images resized to 224 if they are smaller than 256.

    Args:    pretrained: False leaves VGG16 random, which needs no download (for tests).
    Raises:  UserError in one line if `lpips` or its torchvision cannot be imported or the weights cannot be had.
    Source:  CM App. C. Pooling and sizes as in openai's code; the paper does not name the pooling.
    """
    def __init__(self, pretrained: bool = True):
        super().__init__()
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # a torchvision built for another torch fails with RuntimeError
            raise UserError(f"--dist lpips needs the packages lpips and torchvision, the latter built for "
                            f"torch {torch.__version__}: {first_line(error)}") from error
        try:
            self.model = lpips.LPIPS(net="vgg", pnet_rand=not pretrained, verbose=False).requires_grad_(False)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--dist lpips could not get VGG16's weights ({first_line(error)}). Put vgg16-397923af.pth "
                            f"into {torch.hub.get_dir()}/checkpoints, or choose another --dist") from error
        for part in self.model.net.children():
            for name, layer in part.named_children():
                if isinstance(layer, nn.MaxPool2d):
                    setattr(part, name, nn.AvgPool2d(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[-1] < 256:
            x, y = (F.interpolate(image, size=(224, 224), mode="bilinear") for image in (x, y))
        return self.model(x, y).flatten()  # (B,1,1,1) -> (B,)


def make_distance(name: str, device):
    """The distance called l1, l2, norm, huber or lpips. LPIPS is imported and its weights sought only here."""
    return LPIPS().to(device) if name == "lpips" else {"l1": l1, "l2": l2, "norm": norm, "huber": pseudo_huber}[name]


def edm_loss(net, x0: Tensor, noise: Tensor, t: Tensor, y: Tensor | None, extra: Tensor | None = None) -> Tensor:
    """The denoising loss of each image, weighted by lambda(t) = 1/t^2 + 1/sigma_data^2: mean over pixels, 1 for F_x = 0 on average.

    Args:    net: a UNet.  x0, noise: (B,C,H,W).  t: (B,).  y, extra: as `denoise`.
    Returns: (B,).
    Source:  EDM Eq. 8, Table 1 (there the sum over pixels).
    """
    D_x = denoise(net, x0 + bcast(t, x0) * noise, t, y, extra)
    return (1 / t**2 + 1 / SIGMA_DATA**2) * l2(D_x, x0)


WEIGHTS = {"one": lambda t_n, t_n1: 1.0, "inverse": lambda t_n, t_n1: 1 / (t_n1 - t_n)}  # lambda of an interval: CM, iCT


@contextlib.contextmanager
def replay_random(device):
    """Whatever runs after this block draws the random numbers that the block drew: the same dropout masks, say."""
    generator = torch.random if device.type == "cpu" else torch.get_device_module(device)
    state = generator.get_rng_state()
    yield
    generator.set_rng_state(state)


# ------------------------------------------------------------------------------------------------------------
# Continuous time: the limits N -> infinity of the consistency losses
# ------------------------------------------------------------------------------------------------------------

def consistency_jvp(net, x: Tensor, t: Tensor, dx_dt: Tensor, y: Tensor | None = None, extra: Tensor | None = None):
    """f(x, t) and its derivative df/dt along a path through (x, t) with velocity dx_dt, exact, in float32.

    Args:    as `consistency`; dx_dt: (B,C,H,W).
    Returns: two (B,C,H,W) float32. Both carry gradients to the net's parameters unless they are switched off outside.
    Source:  CM App. B.
    """
    dtype, net.dtype = net.dtype, x.dtype  # float32: a derivative needs more than bf16's three digits
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused kernels have no forward derivative
            return torch.func.jvp(lambda x, t: consistency(net.forward, x, t, y, extra),  # .forward is never the compiled one
                                  (x, t), (dx_dt, torch.ones_like(t)))
    finally:
        net.dtype = dtype


def continuous_loss(net, x_t: Tensor, t: Tensor, dx_dt: Tensor, y, extra, stop_gradient: bool) -> Tensor:
    """|df/dt|^2 of each image along the trajectory, the mean over pixels: 0 for a consistency function.

    Args:    as `consistency_jvp`.  stop_gradient: differentiate with respect to f but not df/dt, as if a target network
             supplied it, which is CM's pseudo-objective 2 f . df/dt: it has the same gradient, but a value that says nothing.
    Returns: (B,). Both branches of the pseudo-objective drop out the same units.
    Source:  CM App. B, l2: Theorems 3 (without stop_gradient), 5 and 6, with lambda = (1 / tau'(u))^2 for the first and
             1 / tau'(u) for the others, so that no factor is left. The gradients are the limits of those of the discrete
             losses with weights 1 / (t_n1 - t_n)^2 and 1 / (t_n1 - t_n).
    """
    if not stop_gradient:  # differs from openai's JAX code, which takes the norm, not its square
        _, df_dt = consistency_jvp(net, x_t, t, dx_dt, y, extra)
        return df_dt.square().flatten(1).mean(1)
    with torch.no_grad(), replay_random(x_t.device):
        _, df_dt = consistency_jvp(net, x_t, t, dx_dt, y, extra)
    f_net = consistency(net, x_t, t, y, extra)
    return l2(f_net, f_net.detach() - df_dt)


# ------------------------------------------------------------------------------------------------------------
# Network: the ADM UNet, with the parameter names, shapes and order of operations of the released checkpoints
# ------------------------------------------------------------------------------------------------------------

class Conv2d(nn.Conv2d):
    """Keeps float32 weights and computes in the dtype of its input."""
    def forward(self, x):
        return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class GroupNorm32(nn.GroupNorm):
    """32 groups whatever the width; statistics and affine map in float32, result in the dtype of the input."""
    def __init__(self, channels):
        super().__init__(32, channels)

    def forward(self, x):
        if x.device.type == "cpu":  # its kernel takes bfloat16 with a float32 map, and computes in float32
            return super().forward(x)
        return super().forward(x.float()).to(x.dtype)


def zeroed(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim): cosines, then sines, of t times frequencies from 1 down to nearly 1/10000."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=t.dtype))
    angles = t[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], 1), (0, dim % 2))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0))


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, emb_dim, dropout, scale_shift, extra, resample=None):
        super().__init__()
        width = 2 * c_out if scale_shift else c_out
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(GroupNorm32(c_in), nn.SiLU(), Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, width))
        if extra:  # zero: a net with the extra input begins as the net without it
            self.emb_layers_s = nn.Sequential(nn.SiLU(), zeroed(nn.Linear(emb_dim, width)))
        self.out_layers = nn.Sequential(GroupNorm32(c_out), nn.SiLU(), nn.Dropout(dropout),
                                        zeroed(Conv2d(c_out, c_out, 3, padding=1)))
        self.skip_connection = nn.Identity() if c_in == c_out else Conv2d(c_in, c_out, 1)

    def forward(self, x, emb, emb_s):
        h = self.in_layers[:2](x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)
        e = self.emb_layers(emb) if emb_s is None else self.emb_layers(emb) + self.emb_layers_s(emb_s)
        e = e.to(h.dtype)[:, :, None, None]  # (B,C) or (B,2C) -> (...,1,1)
        if self.scale_shift:
            scale, shift = e.chunk(2, 1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    def __init__(self, channels, head_channels):
        super().__init__()
        self.heads = channels // head_channels
        self.norm = GroupNorm32(channels)
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.proj_out = zeroed(Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        # The 3C channels are q of all heads, k of all heads, v of all heads. (B,3C,H,W) -> 3 of (B,heads,HW,C/heads)
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(3, 4).unbind(1)
        if x.device.type == "cpu":  # twice as fast there, forward and backward, as the fused kernel
            h = torch.softmax((q * (C // self.heads) ** -0.5) @ k.transpose(2, 3), -1) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(2, 3).reshape(B, C, H, W))


class Layers(nn.Sequential):
    """One entry of the encoder, middle or decoder: only its residual blocks see the embeddings."""
    def forward(self, h, emb, emb_s):
        for layer in self:
            h = layer(h, emb, emb_s) if isinstance(layer, ResBlock) else layer(h)
        return h


class UNet(nn.Module):
    """The ADM UNet F(x, t_in, y, extra).

    Args:    image_size: pixels of a side; must halve evenly at each level.  base: channels.  mult: channel multiplier of
             each level.  blocks: residual blocks a level.  attention: the feature-map sizes that get attention (the middle
             always does).  head_channels: channels of an attention head.  classes: number of labels, 0 for none.
             dropout: probability.  scale_shift: the embedding scales and shifts the second norm, otherwise it is added.
             resblock_updown: resample inside residual blocks, otherwise by strided convolution.
             extra: room for one further scalar input (CTM's s, guidance weight w), which at first changes nothing.
             null: one more label, numbered `classes`, that means "no label" (classifier-free guidance).
             time_scale: factor on t_in; 1/1000 reads NVIDIA's weights, whose c_noise is ln(t)/4.
    Raises:  ValueError if the sizes do not fit each other.
    Source:  ADM, with the settings of openai's consistency models.
    """
    def __init__(self, image_size, base, mult, blocks, attention, head_channels, classes=0, dropout=0.0,
                 scale_shift=True, resblock_updown=True, extra=False, null=False, time_scale=1.0, channels=3):
        super().__init__()
        if image_size % 2 ** (len(mult) - 1) or image_size < 8:
            raise ValueError(f"image size {image_size} does not halve {len(mult) - 1} times, or is below 8")
        if any(base * m % 32 for m in mult) or any(base * m % head_channels for m in mult):
            raise ValueError(f"widths {[base * m for m in mult]} are not multiples of 32 and of head_channels={head_channels}")
        if null and not classes:
            raise ValueError("a null label needs other labels beside it")
        self.image_size, self.base, self.classes, self.extra, self.dtype = image_size, base, classes, extra, torch.float32
        self.null_y, self.time_scale = classes if null else None, time_scale
        emb_dim = 4 * base

        def time_mlp():
            return nn.Sequential(nn.Linear(base, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))

        def res(c_in, c_out, resample=None):
            return ResBlock(c_in, c_out, emb_dim, dropout, scale_shift, extra, resample)

        def attend(size, width):
            return [AttentionBlock(width, head_channels)] if size in attention else []

        self.time_embed = time_mlp()
        if extra:
            self.time_embed_s = time_mlp()
        if classes:
            self.label_emb = nn.Embedding(classes + null, emb_dim)

        size, width, last = image_size, base * mult[0], len(mult) - 1
        self.input_blocks = nn.ModuleList([Layers(Conv2d(channels, width, 3, padding=1))])
        skips = [width]
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.input_blocks.append(Layers(res(width, base * m), *attend(size, base * m)))
                width = base * m
                skips.append(width)
            if level < last:
                down = res(width, width, functools.partial(F.avg_pool2d, kernel_size=2))
                self.input_blocks.append(Layers(down if resblock_updown else Downsample(width)))
                skips.append(width)
                size //= 2

        self.middle_block = Layers(res(width, width), AttentionBlock(width, head_channels), res(width, width))

        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                layers = [res(width + skips.pop(), base * m), *attend(size, base * m)]
                width = base * m
                if level > 0 and i == blocks:
                    up = res(width, width, functools.partial(F.interpolate, scale_factor=2.0))
                    layers.append(up if resblock_updown else Upsample(width))
                    size *= 2
                self.output_blocks.append(Layers(*layers))
        self.out = nn.Sequential(GroupNorm32(width), nn.SiLU(), zeroed(Conv2d(width, channels, 3, padding=1)))

    def forward(self, x: Tensor, t_in: Tensor, y: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
        """x (B,C,H,W) float32, t_in (B,) = c_noise(t), y (B,) int64 iff `classes`, extra (B,) iff `extra` -> like x.

        Convolutions and attention run in `self.dtype` (float32 or bfloat16); embeddings, norms and the head in float32.
        """
        assert (y is not None) == (self.classes > 0) and (extra is not None) == self.extra, "labels or extra do not fit the net"
        emb = self.time_embed(sinusoidal_embedding(t_in * self.time_scale, self.base))
        if y is not None:
            emb = emb + self.label_emb(y)
        emb_s = self.time_embed_s(sinusoidal_embedding(extra, self.base)) if self.extra else None
        h, skips = x.to(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb, emb_s)
            skips.append(h)
        h = self.middle_block(h, emb, emb_s)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], 1), emb, emb_s)
        return self.out(h.to(x.dtype))


# Settings of the named networks; `--net NAME KEY=VALUE ...` changes single ones. imagenet64 and lsun256 are those of the
# released checkpoints. The papers' CIFAR-10 net is an NCSN++; cifar10 here is the ADM net of its depth and width.
NETS = {
    "glyphs": dict(image_size=16, base=32, mult=(1, 2, 2), blocks=1, attention=(), head_channels=32, resblock_updown=False),
    "cifar-small": dict(image_size=32, base=64, mult=(1, 2, 2), blocks=2, attention=(16,), head_channels=32),
    "cifar10": dict(image_size=32, base=128, mult=(2, 2, 2), blocks=4, attention=(16,), head_channels=64),
    "imagenet64": dict(image_size=64, base=192, mult=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8), head_channels=64),
    "lsun256": dict(image_size=256, base=256, mult=(1, 1, 2, 2, 4, 4), blocks=2, attention=(32, 16, 8), head_channels=64,
                    scale_shift=False),
}


def net_settings(words) -> dict:
    """The model arguments that `--net NAME KEY=VALUE ...` asks for. Raises UserError for what it does not know."""
    name, *changes = words
    if name not in NETS:
        raise UserError(f"--net {name}: not one of {', '.join(NETS)}")
    settings = dict(scale_shift=True, resblock_updown=True) | NETS[name]
    for change in changes:
        key, _, value = change.partition("=")
        if key not in settings:
            raise UserError(f"--net {change}: the keys are {', '.join(settings)}")
        try:
            kind = type(settings[key])
            settings[key] = (tuple(int(v) for v in value.split(",") if v) if kind is tuple
                             else {"true": True, "false": False}[value] if kind is bool else kind(value))
        except (ValueError, KeyError):
            raise UserError(f"--net {change}: {key} is like {key}={show_value(settings[key])}") from None
    return settings


def show_value(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value).lower() if value in (None, True, False) else str(value)


def make_net(settings: dict) -> UNet:
    """The UNet of these settings. Raises UserError if they do not fit each other."""
    try:
        return UNet(**settings)
    except ValueError as error:
        raise UserError(f"--net: {error}") from error


# ------------------------------------------------------------------------------------------------------------
# Moving average
# ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def ema_update(average: nn.Module, net: nn.Module, decay: float):
    """average <- decay * average + (1 - decay) * net, all parameters in one fused call; decay 0 copies."""
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)


# ------------------------------------------------------------------------------------------------------------
# Data: uint8 until it is on the device. A data set answers len() and __getitems__(indices) with a batch
# (images (b,C,H,W) uint8, labels (b,) int64), and has `labels` ((n,) int64 array or None) and `classes` (0 if unlabelled).
# ------------------------------------------------------------------------------------------------------------

def glyphs(n: int, seed: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """n coloured digits in Pillow's built-in font: shifted, turned, slanted, stretched, light on dark.

    Returns: images (n,size,size,3) uint8, labels (n,) int64, label = the digit. A pure function of its arguments.
    """
    from PIL import Image, ImageDraw, ImageFont
    font, big = ImageFont.load_default(60), 4 * size  # drawn four times as large, then averaged
    digits = []
    for digit in "0123456789":
        page = Image.new("L", (64, 64))
        ImageDraw.Draw(page).text((32, 32), digit, fill=255, font=font, anchor="mm", stroke_width=2)
        digits.append(page)

    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n)
    turn, slant = rng.uniform(-0.2, 0.2, n), rng.uniform(-0.2, 0.2, n)  # radians, and dx/dy
    wide, high = rng.uniform(0.8, 1.15, n), rng.uniform(0.85, 1.15, n)
    shift = rng.uniform(-0.08, 0.08, (n, 2)) * 64
    hue, saturation = rng.uniform(0, 1, (n, 2)), rng.uniform(0, 0.8, (n, 2))
    value = rng.uniform((0, 0.8), (0.35, 1), (n, 2))  # back, front

    images = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        cos, sin, zoom = math.cos(turn[i]), math.sin(turn[i]), 64 / big
        # Output pixel -> page: the inverse of stretch, slant, turn, shift, about the middle of both.
        A = np.array([[cos, sin], [-sin, cos]]) * zoom
        A = np.array([[1 / wide[i], 0], [0, 1 / high[i]]]) @ np.array([[1, slant[i]], [0, 1]]) @ A
        b = 32 - A @ np.full(2, big / 2) - shift[i]
        mask = digits[labels[i]].transform((big, big), Image.Transform.AFFINE, (*A[0], b[0], *A[1], b[1]),
                                           Image.Resampling.BILINEAR).reduce(4)
        back, front = (np.array(colorsys.hsv_to_rgb(hue[i, k], saturation[i, k], value[i, k])) for k in (0, 1))
        m = np.asarray(mask, np.float64)[:, :, None] / 255
        images[i] = np.round(255 * (back + m * (front - back)))
    return images, labels


def fit_image(image, size: int, source) -> np.ndarray:
    """Make a Pillow image (size,size,3) uint8: 8-bit RGB, shrunk to `size` on its short side, centre-cropped.

    Raises:  UserError naming `source` if the image is smaller than that.
    Source:  ADM's pipeline: halve with a box filter while twice too large, then bicubic.
    """
    from PIL import Image
    if image.mode.startswith("I"):  # 16 bits a pixel
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    image = image.convert("RGB")
    if min(image.size) < size:
        raise UserError(f"{source} is {image.width}x{image.height}, smaller than the {size} pixels of the network")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


def as_batch(images: np.ndarray, labels) -> tuple[Tensor, Tensor]:
    """(b,H,W,3) uint8 and labels or None -> the batch a data set answers with."""
    labels = np.zeros(len(images), np.int64) if labels is None else labels
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.copy())


@contextlib.contextmanager
def explain(what: str):
    """Whatever goes wrong inside becomes a UserError in one line: damaged files surface in many ways."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {first_line(error)}") from error


class ArrayImages:
    """Images in arrays (n,H,W,C), C = 1, 3 or 4, or planar (n,3,H,W): in memory or memory-mapped."""
    def __init__(self, parts, labels, size, source):
        self.parts, self.size, self.source = parts, size, source
        self.ends = np.cumsum([len(part) for part in parts])
        self.labels, self.classes = check_labels(labels, self.ends[-1], source)

    def __len__(self):
        return int(self.ends[-1])

    def __getitems__(self, indices):
        from PIL import Image
        images = []
        for i in indices:
            part = int(np.searchsorted(self.ends, i, side="right"))
            image = np.asarray(self.parts[part][i - self.ends[part]])  # counted from the part's end
            image = image.transpose(1, 2, 0) if image.shape[0] in (1, 3, 4) and image.shape[2] not in (1, 3, 4) else image
            if image.shape != (self.size, self.size, 3):
                image = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
                image = fit_image(image, self.size, f"{self.source}: image {i}")
            images.append(image)
        return as_batch(np.stack(images), None if self.labels is None else self.labels[indices])


class FileImages:
    """Image files of a folder or a zip, decoded when asked for."""
    def __init__(self, source, names, labels, size):
        self.source, self.size = source, size
        self.names = np.array([os.fsencode(name) for name in names])  # bytes: compact, and shared with the workers
        self.labels, self.classes = check_labels(labels, len(names), source)

    def __len__(self):
        return len(self.names)

    def __getitems__(self, indices):
        images = np.stack([self.read(os.fsdecode(name)) for name in self.names[indices]])
        return as_batch(images, None if self.labels is None else self.labels[indices])

    def read(self, name):
        from PIL import Image
        with explain(f"{self.source}/{name} cannot be read as an image"):
            with (open_zip(self.source, os.getpid()).open(name) if self.source.is_file()
                  else open(self.source / name, "rb")) as file, Image.open(io.BytesIO(file.read())) as image:
                image.load()
                return fit_image(image, self.size, f"{self.source}/{name}")


@functools.lru_cache(1)
def open_zip(path, pid):  # one handle for each process: forked ones would share their place in the file
    return zipfile.ZipFile(path)


def check_labels(labels, n, source):
    """-> labels (n,) int64 or None, number of classes (0 without labels)."""
    if labels is None:
        return None, 0
    labels = np.asarray(labels)
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(f"{source}: the labels must be {n} integers, none negative, and are {labels.dtype} of shape {labels.shape}")
    return labels.astype(np.int64), int(labels.max()) + 1


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def load_files(source: Path, size: int) -> FileImages:
    """A folder or zip of images. Labels: `dataset.json` (EDM's layout) if there is one; else a folder's sub-folders."""
    index = "dataset.json"
    with explain(f"{source} cannot be read"):
        archive = open_zip(source, os.getpid()) if source.is_file() else None
        names = (archive.namelist() if archive else
                 [Path(folder, file).relative_to(source).as_posix()  # a class may well be a link to a folder
                  for folder, _, files in os.walk(source, followlinks=True) for file in files])
        text = (archive.read(index) if archive and index in names else
                (source / index).read_bytes() if index in names else None)
        names = sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES)
                       and not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))
    if not names:
        raise UserError(f"{source} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    labels = None
    if text is not None:
        try:
            pairs = json.loads(text)["labels"]
            label_of = None if pairs is None else {name: int_label(label) for name, label in pairs}
            labels = None if pairs is None else [label_of[name] for name in names]
        except KeyError as error:
            raise UserError(f"{source}/{index} has no entry {error}") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{source}/{index} is not a list of [file, integer label]: {first_line(error)}") from None
    elif not archive and any("/" in name for name in names):
        loose = next((name for name in names if "/" not in name), None)
        if loose:
            raise UserError(f"{source}/{loose} has no label: other images lie in sub-folders, one for each class")
        classes = sorted({name.split("/")[0] for name in names})
        labels = np.searchsorted(classes, [name.split("/")[0] for name in names])
    return FileImages(source, names, labels, size)


def int_label(label) -> int:
    if type(label) is not int:
        raise ValueError(f"label {label!r}")
    return label


def map_array(path: Path, key: str | None = None) -> np.ndarray:
    """Memory-map a .npy file, or one array of an .npz. A compressed one is first unpacked into a .npy beside it.

    Raises:  UserError naming the file if it is not such a file, or holds pickled objects, which are never loaded.
    """
    with explain(f"{path} cannot be read as {'an array' if key is None else f'an npz with {key}'}"):
        if key is None:
            return np.lib.format.open_memmap(path, mode="r")
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{key}.npy")
            if member.compress_type == zipfile.ZIP_STORED:
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                                             else np.lib.format.read_array_header_2_0)(file)
                    header = file.tell()
                if not dtype.hasobject:
                    with open(path, "rb") as file:  # the member's data follow its local header, name and extra field
                        file.seek(member.header_offset + 26)
                        name_extra = np.frombuffer(file.read(4), "<u2").sum(dtype=int)
                    return np.memmap(path, dtype, "r", member.header_offset + 30 + int(name_extra) + header, shape,
                                     "F" if fortran else "C")
            unpacked = path.with_name(f"{path.stem}.{key}.npy")
            if not unpacked.exists() or unpacked.stat().st_mtime < path.stat().st_mtime:
                with archive.open(member) as source, atomic_file(unpacked) as target:
                    while block := source.read(1 << 24):
                        target.write(block)
            return np.lib.format.open_memmap(unpacked, mode="r")


IMAGE_KEYS = "arr_0", "images", "x", "data"


def load_arrays(path: Path, size: int) -> ArrayImages:
    """A .npy of images, or an .npz with them as `arr_0`, `images`, `x` or `data`, labels as `arr_1`, `labels` or `y`."""
    labels = None
    if path.suffix == ".npz":
        with explain(f"{path} cannot be read as an npz"):
            keys = [name.removesuffix(".npy") for name in zipfile.ZipFile(path).namelist()]
        key = next((key for key in IMAGE_KEYS if key in keys), None)
        if key is None:
            raise UserError(f"{path} holds {', '.join(keys)}: call the images arr_0 and the labels arr_1")
        images = map_array(path, key)
        labels = next((map_array(path, key) for key in ("arr_1", "labels", "y") if key in keys), None)
    else:
        images = map_array(path)
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or not {images.shape[1], images.shape[3]} & {1, 3, 4} or not len(images):
        raise UserError(f"{path}: images must be uint8 of shape (n, height, width, 3), got {images.dtype} {images.shape}")
    return ArrayImages([images], labels, size, path)


CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


def load_cifar10(folder: Path, size: int) -> ArrayImages:
    """CIFAR-10's 50,000 training images from its binary archive in `folder`, fetched there if it is missing."""
    archive = folder / CIFAR10_URL.rsplit("/")[-1]
    if archive.exists():
        data = archive.read_bytes()
    else:
        from tqdm import tqdm
        with explain(f"--dataset cifar10: put {CIFAR10_URL} into {folder}, or name other images with --data-dir; "
                     "it cannot be fetched"), urllib.request.urlopen(CIFAR10_URL, timeout=60) as source:
            length = int(source.headers["Content-Length"] or 0)
            with tqdm.wrapattr(source, "read", total=length, desc="fetching CIFAR-10") as stream:
                data = b"".join(iter(lambda: stream.read(1 << 20), b""))
    if hashlib.md5(data).hexdigest() != CIFAR10_MD5:
        raise UserError(f"{archive} is damaged (its MD5 is not {CIFAR10_MD5}): delete it, if it is there, and fetch it again")
    if not archive.exists():
        with explain(f"--data-dir {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(archive) as file:
            file.write(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        rows = np.concatenate([np.frombuffer(tar.extractfile(f"cifar-10-batches-bin/data_batch_{i}.bin").read(), np.uint8)
                               for i in range(1, 6)]).reshape(50000, 3073)  # one byte of label, then planes of 32x32
    return ArrayImages([rows[:, 1:].reshape(-1, 3, 32, 32)], rows[:, 0].astype(np.int64), size, archive)


NAMED = "cifar10", "imagenet64", "bedroom256", "cat256"


def load_dataset(name: str, data_dir: str | None, size: int):
    """The data set called `name`, or the one at that path, with images of `size` pixels.

    Args:    name: glyphs, cifar10, imagenet64, bedroom256, cat256, or a path: a folder or zip of images, an .npz or .npy.
             data_dir: where a named data set lies, in any of those forms; cifar10 is fetched into it.
    Raises:  UserError in one line for anything that is missing or not as it should be.
    """
    if name == "glyphs":
        return ArrayImages([(data := glyphs(20000, seed=0, size=size))[0]], data[1], size, name)
    known = name in NAMED
    if known and data_dir is None and name != "cifar10":
        raise UserError(f"--dataset {name} needs --data-dir: a folder or zip of its images"
                        + (", or the folder of the official train_data_batch_*.npz" if name == "imagenet64" else ""))
    path = Path(data_dir or "data") if known else Path(name)
    archive = path / CIFAR10_URL.rsplit("/")[-1]
    if name == "cifar10" and (data_dir is None or archive.exists() or not path.is_file() and not any(path.glob("*"))):
        return load_cifar10(path, size)
    if not path.exists():
        raise UserError(f"{'--data-dir' if known else '--dataset'} {path} does not exist"
                        + ("" if known else "; the named data sets are glyphs, cifar10, imagenet64, bedroom256, cat256"))
    if path.suffix in (".npz", ".npy"):
        return load_arrays(path, size)
    if name == "imagenet64" and (batches := sorted(path.rglob("train_data_batch_*.npz"),
                                                   key=lambda path: (len(path.stem), path.stem))):  # 10 comes after 9
        parts = [map_array(batch, "data") for batch in batches]
        if any(part.dtype != np.uint8 or part.shape[1:] != (3 * 64 * 64,) for part in parts):
            raise UserError(f"{path}: the batches must be uint8 of shape (n, 12288)")
        labels = np.concatenate([map_array(batch, "labels") for batch in batches]).astype(np.int64) - 1  # they count from 1
        if (names := path / "map_clsloc.txt").exists():  # "n02119789 1 kit_fox": to the order of the names, which others train by
            with explain(f"{names} is not ImageNet's list of classes"):
                wnids = [line.split()[0] for line in sorted(names.read_text().splitlines(), key=lambda line: int(line.split()[1]))]
                labels = np.argsort(np.argsort(wnids))[labels]
        return ArrayImages([part.reshape(-1, 3, 64, 64) for part in parts], labels, size, path)
    return load_files(path, size)


def index_batches(n, seed, step, total_steps, batch_size, micro_batch, rank=0, world=1):
    """Yield the indices of micro-batches rank, rank + world, ... of every step from `step` on.

    The images form one endless stream, a fresh permutation of all n for each pass; micro-batch m of step k is the
    piece of it that (k, m) says. So the data depend on nothing but (seed, step, m).
    """
    @functools.lru_cache(2)  # a batch spans at most two passes, or many of a tiny data set
    def order(epoch):
        return np.random.default_rng((seed, epoch)).permutation(n)

    for k in range(step, total_steps):
        for m in range(rank, batch_size // micro_batch, world):
            places = np.arange(micro_batch) + k * batch_size + m * micro_batch
            yield np.array([order(int(p) // n)[p % n] for p in places])


def make_loader(dataset, batches, workers: int | None, device):
    """The batches of `dataset` that the iterator of indices `batches` asks for, in order, decoded ahead by `workers`."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1  # of the cores this process may use
        workers = min(max(share, 1), 8) if isinstance(dataset, FileImages) else 0
    return iter(torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=unchanged, num_workers=workers,
                                            pin_memory=device.type == "cuda", prefetch_factor=4 if workers else None,
                                            worker_init_fn=leave_group if workers else None))


def leave_group(worker):
    """Ctrl-C and torchrun's SIGTERM go to a whole process group, but the step they interrupt still needs its images."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def unchanged(batch):
    return batch


def to_device(batch, device, flip: bool) -> tuple[Tensor, Tensor]:
    """uint8 batch -> x0 (b,C,H,W) float32 in [-1, 1], flipped left-right with probability 1/2 if `flip`; y (b,)."""
    x0, y = (part.to(device, non_blocking=True) for part in batch)
    x0 = x0.float() / 127.5 - 1
    if flip:
        x0 = torch.where(bcast(torch.rand(len(x0), device=device) < 0.5, x0), x0.flip(3), x0)
    return x0, y


# ------------------------------------------------------------------------------------------------------------
# Processes and seeds. The unit of work is the micro-batch: micro-batch m of step k draws its images and all its random
# numbers from (seed, k, m) alone, so a run does not depend on how many processes share it, nor on where it was resumed.
# ------------------------------------------------------------------------------------------------------------

def setup(args):
    """Join the processes that torchrun started, if it did, and choose the device.

    Returns: a namespace: rank, world, main (is this rank 0?), restarted (by torchrun, after a worker died), device, dtype
             (of convolutions and attention), compile.
    Raises:  UserError if the device is not there.
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    kind = args.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind != "cpu" and not getattr(torch.backends if kind == "mps" else torch, kind).is_available():
        raise UserError(f"--device {kind}: this machine, or this build of torch, has none")
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False  # fp32 is to mean fp32
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if world > 1:
        # Before there is a group: imported later, as by the optimizer, its default arguments would hold the group, whose threads
        # then outlive destroy_process_group and at times abort the process at its end.
        from torch.distributed.nn import functional  # noqa: F401
        store, _, _ = next(torch.distributed.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # one node keeps its store when it restarts its workers,
            store = torch.distributed.PrefixStore(f"restart {restarts}", store)  # with the dead ones' addresses in it
        torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                             timeout=datetime.timedelta(hours=2))  # of unpacking ImageNet, say
        sys.excepthook = one_line_errors  # torch has just wrapped it
        most = torch.tensor(restarts, device=device)  # only the node of the failed worker counts it
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        restarts = most.item()
    has_bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if kind == "cuda" else
                kind == "cpu" and torch.cpu._is_avx512_bf16_supported())
    bf16 = args.precision == "bf16" or (args.precision == "auto" and has_bf16)
    return types.SimpleNamespace(rank=rank, world=world, main=rank == 0, restarted=restarts > 0, device=device,
                                 dtype=torch.bfloat16 if bf16 else torch.float32,
                                 compile=kind == "cuda" if args.compile is None else args.compile)


@contextlib.contextmanager
def main_process_first(run):
    """Rank 0 passes through alone, then the others: whatever it downloads or unpacks they find ready."""
    if run.world > 1 and not run.main:
        torch.distributed.barrier()
    yield
    if run.world > 1 and run.main:
        torch.distributed.barrier()


def place(net: UNet, run) -> UNet:
    """Move a net to the device, in the memory format and compute dtype that suit it."""
    net.dtype = run.dtype
    return net.to(run.device, memory_format=torch.channels_last if run.device.type == "cuda" else torch.contiguous_format)


INIT, STEP, SAMPLE, SOLVER = 1, 2, 3, 4  # what a seed is for stands first in its key, so that no two uses share a stream


def seed_everything(*key: int):
    """Seed torch's generators of all devices with a hash of the integers `key`."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def flatten_gradients(net: nn.Module, tail: int) -> tuple[Tensor, Tensor]:
    """One buffer that holds all gradients, as views, and `tail` more numbers: what the ranks sum at once each step.

    Returns: buffer (n + tail,), and the view of its tail. Zero the buffer instead of calling zero_grad.
    """
    parameters = list(net.parameters())
    buffer = torch.zeros(sum(p.numel() for p in parameters) + tail, device=parameters[0].device)
    start = 0
    for p in parameters:  # with the strides of p, so that the optimizer's fused updates need no copies
        p.grad = buffer[start:start + p.numel()].as_strided(p.shape, p.stride())
        start += p.numel()
    return buffer, buffer[start:]


class StopSignal:
    """Remembers SIGTERM or Ctrl-C, for the loop to finish its step and save. A second one interrupts at once."""
    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.number:
            raise KeyboardInterrupt
        self.number = number


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: one dictionary of tensors and plain values, loaded without unpickling anything else
# ------------------------------------------------------------------------------------------------------------

def save_checkpoint(path, state):
    """Write `state` to `path`, whole or not at all. Raises UserError if it cannot be written."""
    with atomic_file(path) as file:
        torch.save(state, file)


def load_checkpoint(path) -> dict:
    """Read a checkpoint. Raises UserError if it is missing, damaged, or holds anything that could run code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is no checkpoint, or holds more than tensors and plain values. It was not loaded: "
                        "that could run code") from error
    except Exception as error:  # a damaged archive surfaces in many ways
        raise UserError(f"{path} is no checkpoint, or is damaged: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return state


def from_nvidia(state: dict) -> dict:
    """The weights of NVlabs/edm's DhariwalUNet under the names used here. Their order in `state` is that of construction.

    NVIDIA numbers the qkv channels by (head, channel, which of q k v), ADM by (which, head, channel).
    """
    layers = {"norm0": "in_layers.0", "conv0": "in_layers.2", "affine": "emb_layers.1", "norm1": "out_layers.0", "skip": "skip_connection",
              "conv1": "out_layers.3", "norm2": "norm", "qkv": "qkv", "proj": "proj_out"}
    tops = {"map_layer0": "time_embed.0", "map_layer1": "time_embed.2", "out_norm": "out.0", "out_conv": "out.2"}
    seen, renamed = {"enc": [], "dec": []}, {}
    attention = {key.rsplit(".", 2)[0] for key in state if ".qkv." in key}
    for key, value in state.items():
        block, _, name = key.rpartition(".")
        if name == "resample_filter" or "map_augment" in key:  # a constant; and an input that is 0 when sampling
            continue
        part, _, rest = block.removeprefix("model.").partition(".")
        if part in tops:
            renamed[f"{tops[part]}.{name}"] = value
        elif part == "map_label":
            renamed["label_emb.weight"] = value.t()
        else:
            level, _, layer = rest.partition(".")  # 32x32_block1, conv0
            if level not in seen[part]:
                seen[part].append(level)
            if level.endswith(("_in0", "_in1")):
                entry, last = ("middle_block", 2 if level.endswith("1") else 0)
            elif part == "enc":
                entry, last = f"input_blocks.{seen[part].index(level)}", 0
            else:  # an up block closes the entry of the block before it
                blocks = [other for other in seen[part] if "_block" in other]
                entry, last = f"output_blocks.{len(blocks) - 1}", 0
                if level.endswith("_up"):
                    last = 2 if block.removesuffix(rest) + blocks[-1] in attention else 1
            if layer in ("norm2", "qkv", "proj"):
                last += 1
            if layer == "qkv":
                value = value.unflatten(0, (-1, 3)).movedim(1, 0).flatten(0, 1)
            renamed[".".join(filter(None, (entry, str(last), layers.get(layer), name)))] = value
    return renamed


def load_network(path, scripts: tuple[str, ...]) -> tuple[UNet, dict]:
    """The network to sample with: `ema` of a checkpoint, or a plain state dict of one of NETS, NVIDIA's names included.

    Returns: the net in eval mode on the CPU, without gradients; and the checkpoint, of which `script`, `args` (None and {} for
             a plain state dict) and `model_args` say what it is.
    Raises:  UserError if the file cannot be loaded, is of none of the `scripts`, or fits no network known here.
    """
    with warnings.catch_warnings(action="ignore"):  # torch's, of NVIDIA's pickles, which are refused
        state = load_checkpoint(path)
    if "model_args" in state:
        if state.get("script") not in scripts:
            raise UserError(f"{path} was written by {state.get('script', 'another tool')}" + ".py" * ("script" in state)
                            + f"; what is asked for here is written by {' or '.join(script + '.py' for script in scripts)}")
        with explain(f"{path} holds no network of this version"):
            net = UNet(**state["model_args"])
            net.load_state_dict(state["ema"])
        return net.requires_grad_(False).eval(), state
    state, theirs = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}, {}
    if any("map_layer0" in name for name in state):
        with contextlib.suppress(RuntimeError, KeyError, IndexError):  # no DhariwalUNet after all: fits no network
            state, theirs = from_nvidia(state), dict(time_scale=1e-3)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    theirs["classes"] = (*shapes.get("label_emb.weight", ()), 0)[0]
    if "time_embed_s.0.weight" in shapes:
        if "ctm" not in scripts:
            raise UserError(f"{path}: this network has a further input, as trajectory models have, which go to ctm.py --ckpt, and guided "
                            "students, of which name last.pt")
        theirs["extra"] = True
    for name, settings in NETS.items():
        if "time_scale" in theirs and (settings["head_channels"] != 64 or settings["base"] < 128):
            continue  # the shapes may fit, but NVIDIA's heads have 64 channels, and its narrow layers fewer groups
        with torch.device("meta"):
            net = UNet(**settings | theirs)
        if {key: tuple(value.shape) for key, value in net.state_dict().items()} == shapes:
            net.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
            return net.requires_grad_(False).eval(), dict(script=None, args={}, model_args=settings | theirs)
    raise UserError(f"{path}: these weights fit none of the networks {', '.join(NETS)}")


# Flags that may change when a run is resumed: where things lie, what is reported, what machine it is.
FREE_FLAGS = {"data_dir", "teacher", "out_dir", "overwrite", "log_every", "sample_every", "save_every", "tensorboard", "workers", "device",
              "compile"}


def resume_state(args, run, script: str, model_args: dict) -> dict | None:
    """The checkpoint to go on from, if `args.out_dir` holds one. With `--overwrite` what stands there is deleted instead.

    Raises:  UserError if that run had other flags, and nothing is touched; or if the nodes do not see the same folder.
    """
    out_dir, state = Path(args.out_dir), None
    if args.overwrite and not run.restarted:  # a restarted run has obeyed --overwrite already
        if run.main:
            with explain(f"--out-dir {out_dir}"):
                for old in [out_dir / "last.pt", out_dir / "ema.pt", *(out_dir / "samples").glob("*.png"),
                            *(out_dir / "tensorboard").glob("events.*")]:
                    old.unlink(missing_ok=True)
    elif (out_dir / "last.pt").exists():
        state = load_checkpoint(out_dir / "last.pt")
        if state.get("script") != script:
            raise UserError(f"--out-dir {out_dir} holds a run of {state.get('script')}.py; choose another, or --overwrite it")
        old, new = ({"--" + key.replace("_", "-"): value for key, value in flags.items() if key not in FREE_FLAGS} | net
                    for flags, net in ((state["args"], state["model_args"]), (vars(args), model_args)))
        changed = [f"{key} {show_value(old.get(key))} there, {show_value(new.get(key))} now"
                   for key in old.keys() | new.keys() if show_value(old.get(key)) != show_value(new.get(key))]
        if changed:
            raise UserError(f"--out-dir {out_dir} holds a run with other settings ({'; '.join(sorted(changed))}); "
                            "use its flags to resume it, choose another --out-dir, or --overwrite it")
    elif (out_dir / "ema.pt").exists():
        raise UserError(f"--out-dir {out_dir} holds an ema.pt without its last.pt; choose another, or --overwrite it")
    if run.world > 1:
        steps = torch.tensor([1, -1], device=run.device) * (state["step"] if state else 0)
        torch.distributed.all_reduce(steps, torch.distributed.ReduceOp.MAX)
        if steps[0] != -steps[1]:
            raise UserError(f"--out-dir {out_dir} is not the same folder on all nodes: they would resume at different steps")
    return state


def load_optimizer(optimizer, state: dict):
    """Restore an optimizer, its tensors in the strides of their parameters: what fused updates need to be fast."""
    optimizer.load_state_dict(state)
    for p, values in optimizer.state.items():
        for key, value in values.items():
            if value.shape == p.shape:
                values[key] = torch.empty_like(p).copy_(value)


# ------------------------------------------------------------------------------------------------------------
# Logs and pictures
# ------------------------------------------------------------------------------------------------------------

def summary_writer():
    """The class that writes TensorBoard's event files. Raises UserError if its package is missing."""
    with explain("--tensorboard needs the package tensorboard (pip install tensorboard)"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


def append_record(path: Path, record: dict):
    """Add a line of JSON to a file, after whatever a killed process may have left. Raises UserError if it cannot be written."""
    try:
        with open(path, "a+b") as file:
            file.seek(max(file.tell() - 1, 0))
            file.write(b"\n" * (file.read(1) not in (b"", b"\n")) + json.dumps(record).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


class Log:
    """`log.jsonl`: one JSON object a line; and `samples/`. With `tensorboard` the same numbers and grids go to a folder of that name too.

    What a killed run wrote after the step it resumes from is dropped; TensorBoard is told to forget it.
    """
    def __init__(self, path, step: int, tensorboard: bool = False):
        self.path, self.events, kept = Path(path), None, []
        if step and self.path.exists():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line may be half-written
                    kept += [line] if json.loads(line)["step"] <= step else []
        with atomic_file(self.path, "w") as file:
            file.writelines(line + "\n" for line in kept)
        if tensorboard:
            with explain(f"cannot write {self.path.with_name('tensorboard')}"):
                self.events = summary_writer()(self.path.with_name("tensorboard"), purge_step=step + 1)
            atexit.register(self.events.close)  # however the run ends

    def write(self, record: dict):
        record = json.loads(json.dumps(record), parse_constant=lambda not_finite: None)  # JSON knows no NaN
        append_record(self.path, record)
        if self.events:
            step = record.pop("step")
            for key, value in record.items():
                numbers = {f"{key}/{i}": part for i, part in enumerate(value)} if isinstance(value, list) else {key: value}
                for tag, number in numbers.items():
                    if number is not None:
                        self.events.add_scalar(tag, number, step)
            self.events.flush()  # a killed run loses nothing

    def grid(self, step: int, blocks: list[np.ndarray], columns: int, name: str = ""):
        """Write samples/STEP.png, `name` after STEP, see `save_grid`."""
        picture = save_grid(self.path.parent / "samples" / f"{step:06d}{name}.png", blocks, columns)
        if self.events:
            self.events.add_image("samples", picture, step, dataformats="HWC")
            self.events.flush()


def to_uint8(x: Tensor) -> Tensor:
    """(n,C,H,W) in [-1, 1] -> (n,H,W,C) uint8, rounded, so that it inverts x/127.5 - 1."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def save_grid(path, blocks: list[np.ndarray], columns: int) -> np.ndarray:
    """Write a PNG: each block (n,H,W,C) uint8 a grid of `columns`, the blocks side by side; small images are enlarged.

    Returns: the picture, (H,W,C) uint8.
    """
    from PIL import Image
    grids, size = [], blocks[0].shape[1]
    for images in blocks:
        images = np.concatenate([images, np.zeros((-len(images) % columns, *images.shape[1:]), np.uint8)])
        rows = [np.concatenate(list(images[i:i + columns]), 1) for i in range(0, len(images), columns)]
        grids += [np.concatenate(rows, 0), np.full((len(rows) * size, 4, 3), 255, np.uint8)]
    picture = Image.fromarray(np.concatenate(grids[:-1], 1))
    zoom = max(1, 48 // size)
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    with atomic_file(path) as file:
        picture.save(file, "PNG")
    return np.asarray(picture)


def grid_columns(classes: int) -> int:
    """Columns of the grids of samples that training writes, each of 8 rows: one a class."""
    return min(classes, 10) or 8


def grid_labels(classes: int, device) -> Tensor | None:
    """The labels of such a grid: all classes in turn; None without labels."""
    return torch.arange(8 * grid_columns(classes), device=device) % classes if classes else None


def make_save_path(path) -> Path:
    """See that samples can be saved at `path`, before hours are spent on drawing them. Raises UserError."""
    path = Path(path)
    if path.suffix not in ("", ".png", ".npz"):
        raise UserError(f"--save {path}: name a .png, an .npz or a folder")
    try:
        (path if path.suffix == "" else path.parent).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save {path}: {error.strerror}") from error
    return path


def save_samples(path: Path, images: np.ndarray, labels: Tensor | None, columns: int):
    """Write samples (n,H,W,C) uint8 as a .png grid, an .npz as ADM's evaluator reads it (arr_0 uint8 NHWC, arr_1 labels), or a folder of PNGs."""
    from PIL import Image
    if path.suffix == ".png":
        save_grid(path, [images], columns)
    elif path.suffix == ".npz":
        with atomic_file(path) as file:
            np.savez(file, images, *([] if labels is None else [labels.cpu().numpy()]))
    else:
        for i, image in enumerate(images):
            with atomic_file(path / f"{i:06d}.png") as file:
                Image.fromarray(image).save(file, "PNG")


def seeded_noise(indices, seed: int):
    """A source of unit noise, x -> noise like x, in which image i has a generator of its own, seeded by (seed, i).

    So a sample does not depend on the size of the batch it is drawn in, nor on the device.
    """
    keys = [np.random.SeedSequence((SAMPLE, seed, i)).generate_state(1, np.uint64)[0] >> 1 for i in indices]
    generators = [torch.Generator().manual_seed(int(key)) for key in keys]
    return lambda x: torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x.device)


def draw_part(draw, part: Tensor, y: Tensor | None, shape, seed: int) -> Tensor:
    """Images `part` (b,) of those that `draw_many` draws: (b,H,W,C) uint8, of which image i depends on (seed, i) alone."""
    return to_uint8(draw(None if y is None else y[part], seeded_noise(part.tolist(), seed), (len(part), *shape), part))


BINS = 4  # of noise levels, parted at 0.1, 1 and 10, that the log reports the loss by


def tally(bins: Tensor, t: Tensor, loss: Tensor):
    """Add the losses (B,) of images at noise levels t (B,) to bins[0] (4,), and how many they were to bins[1]."""
    which = torch.bucketize(t, torch.tensor([0.1, 1.0, 10.0], device=t.device))
    bins[0].index_add_(0, which, loss)
    bins[1].index_add_(0, which, torch.ones_like(loss))


def start_run(args, run, net, step: int) -> Log | None:
    """Rank 0 makes the output folder, says what runs, and opens the log; the others get None.

    Raises:  UserError if the folder cannot be written to.
    """
    global ranks_differ
    ranks_differ = True
    if not run.main:
        return None
    out_dir = Path(args.out_dir)
    try:
        (out_dir / "samples").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out-dir {args.out_dir}: {error.strerror}") from error
    log = Log(out_dir / "log.jsonl", step, args.tensorboard)
    print(" ".join(f"{key}={show_value(value)}" for key, value in vars(args).items()))
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f}M parameters, {run.world} process(es) on {run.device.type}, "
          f"{str(run.dtype).removeprefix('torch.')}" + (f"; resumed at step {step}" if step else ""))
    if run.world > args.batch_size // args.micro_batch:
        print(f"note: {run.world} processes share {args.batch_size // args.micro_batch} micro-batches; lower --micro-batch")
    return log


def progress(args, run, step: int):
    """A progress bar over the steps, on rank 0."""
    from tqdm import tqdm
    return tqdm(total=args.total_steps, initial=step, unit="step", disable=not run.main, dynamic_ncols=True)


def report(log: Log, bar, args, step: int, since: tuple[float, int], **values) -> tuple[float, int]:
    """Write a line of the log, with the speed since `since` = (time, step), and show some of it. Returns the new `since`."""
    now = time.perf_counter()
    images_per_s = (step - since[1]) * args.batch_size / (now - since[0])
    log.write(dict(step=step, images=step * args.batch_size) | values | dict(lr=values.get("lr", args.lr), images_per_s=images_per_s))
    shown = {key: f"{values[key]:.4g}" for key in ("loss", "N") if values.get(key) is not None}
    bar.set_postfix(**shown, **{"img/s": f"{images_per_s:.0f}"})
    return now, step


def too_many_bad_steps(step: int, loss: float, grad_norm: float, out_dir):
    """Stop a run of which ten steps in a row were left out. Raises SystemExit with exit code 1."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: stopped at step {step}: the loss or its gradient was not finite 10 steps in a row (loss {loss}, "
                     f"gradient norm {grad_norm}); what {out_dir} holds is from before. Start anew with a lower --lr")


def finish(run, stop: StopSignal | None = None):
    """Leave: exit code 0, or 128 + the number of the signal that stopped the run, here or on another rank."""
    if run.world > 1:
        torch.distributed.barrier()  # or torchrun, seeing one process stopped, would interrupt the saving of another
        torch.distributed.destroy_process_group()
    raise SystemExit(128 + (stop.number or signal.SIGTERM) if stop else 0)


def peak_memory_gb(device) -> float:
    """The most memory this process has held: the GPU's where there is one, otherwise resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


# ------------------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------------------

class Inception:
    """(b,3,H,W) uint8 -> (b, 2048 + 1008): what TensorFlow's Inception of 2015 pools, and its logits without their bias, by torch-fidelity.

    Raises:  UserError in one line if the package or the weights are missing, or the file holds others.
    """
    widths = 2048, 1008

    def __init__(self, path, device):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # a torchvision built for another torch fails with RuntimeError
            raise UserError(f"--eval needs torch-fidelity (pip install torch-fidelity), and a torchvision built for torch "
                            f"{torch.__version__}: {first_line(error)}") from error
        cached = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/")[-1])
        self.path = Path(path or cached)
        if not path and not cached.exists():
            raise UserError(f"--eval needs Inception's weights: fetch {URL_INCEPTION_V3} and name the file with --inception, "
                            f"or put it into {cached.parent}")
        safe = io.BytesIO()  # torch-fidelity would unpickle whatever the file holds
        torch.save(load_checkpoint(self.path), safe)
        safe.seek(0)
        try:
            self.net = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], safe).to(device).eval()
        except Exception as error:
            raise UserError(f"--inception {self.path} holds other weights than those of torch-fidelity's InceptionV3") from error
        self.sha = file_sha(self.path)
        self.published = self.sha.startswith(cached.stem.rsplit("-")[-1])  # the name ends with the start of its SHA-256

    @torch.no_grad()
    def __call__(self, images):
        return torch.cat(self.net(images), 1)


def file_sha(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of means (D,) and covariances (D,D), float64.

    With sigma = R R^T the eigenvalues of sigma1 sigma2 are the squared singular values of R1^T R2: nothing is squared and rooted
    again, so equal arguments give 0 to 1e-10, even where the covariances are singular.
    """
    R1, R2 = (V * value.clamp(min=0).sqrt() for value, V in map(torch.linalg.eigh, (sigma1, sigma2)))
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * torch.linalg.svdvals(R1.T @ R2).sum()
    return max(distance.item(), 0.0)


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """exp of the mean KL divergence of p(y|x) from p(y), i.e. of H(y) - H(y|x), averaged over consecutive splits; logits (n,K).

    Source:  Salimans et al. 2016; the splits are those of ADM's evaluator, 5,000 each of 50,000.
    """
    H, parts = torch.special.entr, logits.cpu().double().softmax(1).tensor_split(splits)  # entr(p) = -p ln p, 0 at 0
    return torch.stack([(H(p.mean(0)).sum() - H(p).sum(1).mean()).exp() for p in parts]).mean().item()


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3, chunk: int = 1000) -> tuple[float, float]:
    """Share of the samples (n,D) within reach of a reference (m,D), and the reverse; an image's reach is its k-th nearest neighbour of its kind.

    Source:  Kynkaanniemi et al. 2019 (k = 3; they used VGG's features), in Inception's features as in ADM's evaluator.
    """
    samples, reference = samples.double(), reference.double()  # squared distances are differences of large numbers

    def squared_distances(a, b):
        scale = a.square().sum(1)[:, None] + b.square().sum(1)
        found = scale - 2 * a @ b.T
        return found.where(found > 1e-12 * scale, 0)  # features in float32 do not tell copies of an image apart

    def covered(points, centres):
        reach = torch.cat([squared_distances(part, centres).kthvalue(k + 1)[0] for part in centres.split(chunk)])  # the nearest is itself
        return torch.cat([(squared_distances(part, centres) <= reach).any(1) for part in points.split(chunk)]).double().mean().item()

    return covered(samples, reference), covered(reference, samples)


def image_features(run, inception, batches, n: int, keep: int):
    """Features of n images, shared out among the ranks: their mean (D,) and covariance (D,D), float64 on the CPU, and the first `keep` rows.

    Args:    batches: this rank's, of places (b,) in 0 .. n-1 and images (b,3,H,W) uint8, on the device.
    Returns: mu, sigma (unbiased), features (keep,D) and logits (keep,K), on every rank. Images are never all in memory.
    """
    D, K = inception.widths
    exact = torch.device("cpu") if run.device.type == "mps" else run.device  # mps has no float64
    total, square = torch.zeros(D, dtype=torch.float64, device=exact), torch.zeros(D, D, dtype=torch.float64, device=exact)
    kept = torch.zeros(keep, D + K, device=exact)
    for places, images in batches:
        found = inception(images).to(exact)
        x, places = found[:, :D].double(), places.to(exact)
        total += x.sum(0)
        square += x.T @ x
        kept[places[places < keep]] = found[places < keep]
    if run.world > 1:
        for part in (total, square, kept):
            torch.distributed.all_reduce(part)
    mu = total / n
    return mu.cpu(), ((square - n * mu[:, None] * mu) / (n - 1)).cpu(), *kept.split([D, K], 1)


REFERENCE_IMAGES = 10_000  # of which precision and recall are taken, as many as ADM's reference files have


def load_statistics(path: Path, D: int):
    """mu (D,) and sigma (D,D), float64, of an .npz in EDM's or ADM's layout, or None if it holds none. Raises UserError for wrong ones."""
    with explain(f"--dataset {path} cannot be read as an npz"), np.load(path) as file:
        if not {"mu", "sigma"} <= set(file):
            return None
        mu, sigma = (torch.from_numpy(file[key].astype(np.float64)) for key in ("mu", "sigma"))
    if mu.shape != (D,) or sigma.shape != (D, D) or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise UserError(f"--dataset {path}: mu must be of shape ({D},) and sigma ({D}, {D}), both finite")
    return mu, sigma


def dataset_of(args, trained: dict) -> tuple[str, str | None]:
    """`--dataset` and `--data-dir` where there is a checkpoint: by default those in its `trained["args"]`. Raises UserError."""
    found = trained.get("args", {})
    name = args.dataset or found.get("dataset")
    if name is None:
        raise UserError(f"{args.ckpt} does not say what it was trained on; name --dataset")
    if args.data_dir and name not in NAMED:
        raise UserError("--data-dir says where a named data set lies; give a path of your own as --dataset")
    return name, args.data_dir or (found.get("data_dir") if name == found.get("dataset") else None)


def open_reference(args, run, size: int, D: int, trained: dict):
    """The name of what `--eval` compares with; its statistics, if it is an .npz of them; its images, if it has any, of `size` pixels."""
    name, data_dir = dataset_of(args, trained)
    path, statistics = Path(name), None
    if path.suffix == ".npz" and path.exists():
        statistics = load_statistics(path, D)
    if statistics and not any(f"{key}.npy" in zipfile.ZipFile(path).namelist() for key in IMAGE_KEYS):
        return name, statistics, None
    with main_process_first(run):
        dataset = load_dataset(name, data_dir, size)
    if len(dataset) < 4:
        raise UserError(f"--dataset {name} holds {len(dataset)} image(s), and precision and recall look at three neighbours: name more")
    return name, statistics, dataset


def reference_features(run, inception, dataset, statistics):
    """`image_features` of a data set without the logits, keeping REFERENCE_IMAGES drawn at random; where there are statistics, of those alone.

    Returns: mu, sigma, features; and a digest of all the images, decoded and shrunk as the network would see them, in their order.
    """
    from tqdm import tqdm
    order = np.random.default_rng(0).permutation(len(dataset))[:REFERENCE_IMAGES if statistics else None]
    parts = torch.arange(len(order)).split(64)[run.rank::run.world]
    digests = torch.zeros(len(dataset), dtype=torch.int64)

    def batches():
        chosen = [order[part.numpy()] for part in parts]  # a tensor of one number would be taken for that number
        loader = make_loader(dataset, chosen, None, run.device)
        for part, places, (images, _) in zip(tqdm(parts, desc="reference", unit="batch", leave=False, disable=not run.main), chosen, loader):
            for i, image in zip(places, images):
                digests[i] = int.from_bytes(hashlib.sha256(image.numpy()).digest()[:8], "little", signed=True)
            yield part.to(run.device), images.to(run.device)

    mu, sigma, features, _ = image_features(run, inception, batches(), len(order), min(len(order), REFERENCE_IMAGES))
    digests = digests.to(run.device)
    if run.world > 1:
        torch.distributed.all_reduce(digests)
    return mu, sigma, features, hashlib.sha256(digests.cpu().numpy()).hexdigest()[:12]


def evaluate(args, run, draw, y: Tensor | None, shape, calls: int, trained: dict, batch: int):
    """`--ckpt --eval n`: FID, IS, precision and recall of n samples, in one line, and one of eval.jsonl beside the checkpoint.

    Args:    draw, y, shape, batch: as `draw_many`, of n images.  calls: of the network for an image.  trained: the checkpoint.
    """
    from tqdm import tqdm
    global ranks_differ
    n, inception = args.eval, Inception(args.inception, run.device)
    name, statistics, dataset = open_reference(args, run, shape[1], inception.widths[0], trained)
    ranks_differ, reference = True, None
    if dataset is not None:
        *moments, reference, sha = reference_features(run, inception, dataset, statistics)
    if statistics:
        moments, sha = statistics, file_sha(name)

    parts = torch.arange(n, device=run.device).split(batch)[run.rank::run.world]
    batches = ((part, draw_part(draw, part, y, shape, args.seed).permute(0, 3, 1, 2))
               for part in tqdm(parts, desc="samples", unit="batch", leave=False, disable=not run.main))
    mu, sigma, features, logits = image_features(run, inception, batches, n, n)
    if not run.main:
        return
    found = {"FID" if n == 50_000 else f"FID@{n}": frechet_distance(mu, sigma, *moments), "IS": inception_score(logits)}
    if reference is not None:
        found |= zip(("precision", "recall"), precision_recall(features, reference))
    labels = "unconditional" if y is None else f"labels {' '.join(map(str, args.labels))} in turn" if args.labels else "all labels in turn"
    images = "statistics" if statistics else f"{len(dataset):,} images"
    if reference is None:
        images += " without images for precision and recall"
    elif statistics or len(reference) < len(dataset):
        images += f" ({len(reference):,} images for precision and recall)"
    sampler = "".join(f", {key} {show_value(getattr(args, key))}" for key in ("sigmas", "steps", "gamma", "heun", "N", "sampler", "churn", "w")
                      if getattr(args, key, None))
    print(f"{', '.join(f'{key} {value:.3f}' for key, value in found.items())}: {n:,} samples, {labels}, NFE {calls}{sampler}, seed {args.seed}, "
          f"EMA weights of {args.ckpt}; reference {name}, {images}, sha {sha}; Inception {inception.sha}"
          + ("" if inception.published else f", {inception.path}, not the weights of published numbers"), flush=True)
    append_record(Path(args.ckpt).parent / "eval.jsonl", found | dict(
        n=n, labels=labels, nfe=calls, seed=args.seed, step=trained.get("step"), reference=name, reference_holds=images, reference_sha=sha,
        inception_sha=inception.sha, dtype=str(run.dtype).removeprefix("torch."),
        args={key: value for key, value in vars(args).items() if value is not None and key not in ("sample", "save")}))


# ------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Flags are absent unless given; an error is one line with exit code 2."""
    def __init__(self, description):
        super().__init__(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        if message.startswith("unrecognized arguments: --"):
            wrong = message.split()[2].split("=")[0]
            near = difflib.get_close_matches(wrong, self._option_string_actions, 1)
            message += f" (did you mean {near[0]}?)" if near else ""
        raise UserError(message)


def number(kind, low, high=math.inf, name="number"):
    """An argparse type: `kind` within [low, high]."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value
    convert.__name__ = name
    return convert


positive = number(int, 1, name="positive integer")
count = number(int, 0, name="count")


def law_of_times(word):
    """The argparse type of `--times MEAN STD | uniform`."""
    return word if word == "uniform" else float(word)


def check_times(law, times: Tensor):
    """See that `law` can be drawn from on the grid `times`. Raises UserError."""
    if law != ["uniform"] and (len(law) != 2 or "uniform" in law or law[1] <= 0
                               or not interval_probabilities(times, law).isfinite().all()):
        raise UserError(f"--times {' '.join(map(str, law))}: name a mean and a standard deviation of ln t, or uniform")


def add_shared_flags(parser):
    """The flags that mean the same in all four scripts."""
    data = parser.add_argument_group("data and network")
    data.add_argument("--dataset", metavar="NAME", help="glyphs (default), cifar10, imagenet64, bedroom256, cat256, or a path: "
                      "a folder (class = sub-folder) or zip of images, an .npz or .npy of uint8 images")
    data.add_argument("--data-dir", metavar="DIR", help="where a named data set lies; cifar10 is fetched into it (default data)")
    data.add_argument("--class-cond", action=argparse.BooleanOptionalAction, help="condition on the labels (default: as the "
                      "paper does; for a path, if it has labels)")
    data.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images (default: not for glyphs)")
    data.add_argument("--net", nargs="+", metavar="NAME KEY=VALUE", help=f"network: {', '.join(NETS)}, and changes to its "
                      "settings, e.g. --net cifar-small base=32 mult=1,2,2 blocks=1 attention=16,8 image_size=32")
    data.add_argument("--dropout", type=number(float, 0, 1), metavar="P", help="dropout probability in the residual blocks")
    data.add_argument("--workers", type=count, metavar="N", help="processes that decode image files (default: cores - 1, at most "
                      "8; 0 for arrays)")

    train = parser.add_argument_group("training")
    train.add_argument("--out-dir", metavar="DIR", help=f"receives last.pt, ema.pt, log.jsonl, samples/ (default "
                       f"out/{parser.prog.removesuffix('.py')}). A run found there is resumed")
    train.add_argument("--overwrite", action="store_true", help="start anew in --out-dir")
    train.add_argument("--total-steps", type=positive, metavar="K", help="optimizer steps of the whole run")
    train.add_argument("--batch-size", type=positive, metavar="B", help="images a step, over all processes")
    train.add_argument("--micro-batch", type=positive, metavar="B", help="images a pass through the network; when training it divides "
                       "--batch-size, when sampling it is 64 by default. Lower it if memory runs out")
    train.add_argument("--lr", type=number(float, 0), metavar="LR", help="learning rate of RAdam, constant; guided_distill.py: of Adam, "
                       "falling to 0 in each round")
    train.add_argument("--ema-decay", type=number(float, 0, 1), metavar="D", help="decay, a step, of the average used for sampling")
    train.add_argument("--seed", type=count, metavar="S", help="seed of everything random (default 0)")
    train.add_argument("--log-every", type=count, metavar="K", help="steps between lines of log.jsonl; 0 = never (default 50)")
    train.add_argument("--sample-every", type=count, metavar="K", help="steps between grids of samples; 0 = never (default 500)")
    train.add_argument("--save-every", type=count, metavar="K", help="steps between checkpoints; 0 = only at the end (default 500)")
    train.add_argument("--tensorboard", action="store_true", help="write the log and the grids for TensorBoard too, to tensorboard/ "
                       "in --out-dir (pip install tensorboard)")

    sample = parser.add_argument_group("sampling")
    sample.add_argument("--ckpt", metavar="FILE", help="sample with this checkpoint's EMA weights instead of training")
    sample.add_argument("--sample", type=positive, metavar="N", help="how many images (default 64)")
    sample.add_argument("--eval", type=number(int, 10, name="count (10 or more)"), metavar="N", help="draw N images and measure FID, IS, "
                        "precision and recall against --dataset, which may be an .npz of statistics (mu, sigma) too and is by default "
                        "what the checkpoint was trained on. Called FID where N is 50000, FID@N elsewhere")
    sample.add_argument("--inception", metavar="FILE", help="weights of torch-fidelity's Inception for --eval (default: where it keeps them)")
    sample.add_argument("--sigmas", type=number(float, T_MIN, T_MAX, "noise level"), nargs="+", metavar="T", help="noise levels, "
                        "largest first, one network call each (default when sampling: 80, one step)")
    sample.add_argument("--labels", type=count, nargs="+", metavar="Y", help="classes to draw, in turn (default: all)")
    sample.add_argument("--save", metavar="PATH", help="a .png grid, an .npz as ADM's evaluator reads it, or a folder "
                        "(default samples.png)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), help="default: the first of these that is there")
    machine.add_argument("--precision", choices=("auto", "bf16", "fp32"), help="of convolutions and attention (default: bf16 "
                         "where the device computes in it)")
    machine.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the network (default: on CUDA)")


SHARED_DEFAULTS = dict(dataset="glyphs", data_dir=None, class_cond=None, workers=None, overwrite=False, seed=0, log_every=50,
                       sample_every=500, save_every=500, tensorboard=False, device="auto", precision="auto", compile=None)
EVAL_FLAGS = dict(inception=None, dataset=None, data_dir=None)
SAMPLING_DEFAULTS = dict(sample=64, micro_batch=64, eval=None, sigmas=[T_MAX], labels=None, save="samples.png", seed=0, device="auto",
                         precision="auto", compile=False) | EVAL_FLAGS
RUN_FLAGS = {"ckpt", "micro_batch", "dataset", "data_dir", "sigmas", "seed", "device", "precision", "compile"}  # apply to sampling and to training


def parse_flags(parser, recipe, sampling={}, both=()):
    """Read the command line. `recipe(given)` supplies whatever the user did not.

    Args:    sampling: a script's own flags that apply with --ckpt alone, and their defaults.  both: those that apply always.
    Returns: the namespace of all settings. From here on an error is one line, and exit code 2.
    Raises:  UserError for an unknown flag or value, or one that does not apply with the others.
    """
    sys.excepthook = one_line_errors
    given = vars(parser.parse_args())
    name = {key: "--" + key.replace("_", "-") for key in given}
    wrong = {"sample", "save", "edit", "search_times"} if "eval" in given else EVAL_FLAGS.keys() - sampling
    sampling, both = SAMPLING_DEFAULTS | sampling, RUN_FLAGS | set(both)
    if "ckpt" in given:
        for key in given.keys() & wrong:
            raise UserError(f"{name[key]} does not apply with{'' if 'eval' in given else 'out'} --eval")
        for key in given.keys() - sampling.keys() - both:
            raise UserError(f"{name[key]} does not apply with --ckpt, which samples; the checkpoint knows its settings")
    else:
        for key in given.keys() & (sampling.keys() - both):
            raise UserError(f"{name[key]} applies to sampling only: name a checkpoint with --ckpt")
        if "data_dir" in given and given.get("dataset", "glyphs") not in NAMED:
            raise UserError("--data-dir says where a named data set lies; give a path of your own as --dataset")
    sigmas = given.get("sigmas", [T_MAX])
    if sorted(sigmas, reverse=True) != sigmas:
        raise UserError(f"--sigmas {' '.join(map(str, sigmas))}: name the largest first")
    if "ckpt" in given:
        return argparse.Namespace(**sampling | given)
    args = SHARED_DEFAULTS | {"out_dir": f"out/{parser.prog.removesuffix('.py')}"} | recipe(given) | given
    if "micro_batch" not in given:  # the largest divisor the recipe's memory allows for
        args["micro_batch"] = max(b for b in range(1, args["micro_batch"] + 1) if args["batch_size"] % b == 0)
    if args["batch_size"] % args["micro_batch"]:
        raise UserError(f"--batch-size {args['batch_size']} is not a multiple of --micro-batch {args['micro_batch']}")
    if args["tensorboard"]:
        summary_writer()  # now, not when the data set is unpacked
    return argparse.Namespace(**args)


def labels_to_draw(args, net, n: int, device, key: str = "labels") -> Tensor | None:
    """`--labels` in turn, or all classes in turn, for n images: (n,) int64, or None for a net without labels. Raises UserError."""
    labels = getattr(args, key)
    if labels and (not net.classes or max(labels) >= net.classes):
        raise UserError(f"--{key.replace('_', '-')} {' '.join(map(str, labels))}: this network has "
                        + (f"the labels 0 to {net.classes - 1}" if net.classes else "no labels"))
    labels = labels or list(range(net.classes))
    return torch.tensor([labels[i % len(labels)] for i in range(n)], device=device) if labels else None


def draw_many(run, draw, n: int, y: Tensor | None, shape, seed: int, batch: int = 64) -> np.ndarray:
    """n images (n,H,W,C) uint8, shared out among the ranks; image i depends on (seed, i) alone.

    Args:    draw: (y (b,), noise, shape (b,C,H,W), indices (b,)) -> images (b,C,H,W) in [-1, 1], with b at most `batch`.
    """
    from tqdm import tqdm
    C, H, W = shape
    images = torch.zeros(n, H, W, C, dtype=torch.uint8, device=run.device)
    for part in tqdm(torch.arange(n, device=run.device).split(batch)[run.rank::run.world], unit="batch",
                     leave=False, disable=not run.main or n <= 8 * batch):
        images[part] = draw_part(draw, part, y, shape, seed)
    if run.world > 1:
        torch.distributed.all_reduce(images)
    return images.cpu().numpy()


def sample_checkpoint(args, run, net, draw, calls: int, trained: dict):
    """`--ckpt`: draw images and save them, or with `--eval n` measure them.

    Args:    draw: as `draw_many`.  calls: of the network for an image, to be said.  trained: the checkpoint that the net is of.
    """
    if run.compile:
        net.compile()
    if args.eval:
        y = labels_to_draw(args, net, args.eval, run.device)
        return evaluate(args, run, draw, y, (3, net.image_size, net.image_size), calls, trained, args.micro_batch)
    y, path = labels_to_draw(args, net, args.sample, run.device), make_save_path(args.save)
    images = draw_many(run, draw, args.sample, y, (3, net.image_size, net.image_size), args.seed, args.micro_batch)
    if run.main:
        side, turn = math.isqrt(args.sample - 1) + 1, len(args.labels or range(net.classes))
        turn = turn if 0 < turn <= 16 else 1
        save_samples(path, images, y, columns=turn * max(round(side / turn), 1))  # a column, one label
        print(f"{args.sample} samples, {calls} network call(s) each, EMA weights of {args.ckpt}: {args.save}")


# ------------------------------------------------------------------------------------------------------------
# Teachers: denoisers, trained as in EDM, that students are distilled from
# ------------------------------------------------------------------------------------------------------------

# EDM's training settings, CM's for LSUN. glyphs and "path" (your own images) are ours, the former tuned on 2 cores.
BIG = dict(flip=True, N=40)
DATASETS = {  # what a teacher and the students distilled from it have in common
    "glyphs": dict(net=["glyphs"], flip=False, micro_batch=32, N=18),
    "path": dict(net=["cifar-small"], flip=True, micro_batch=32, N=18),
    "cifar10": dict(net=["cifar10"], flip=True, micro_batch=128, N=18, class_cond=False),
    "imagenet64": dict(net=["imagenet64"], micro_batch=64, class_cond=True) | BIG,
    "bedroom256": dict(net=["lsun256"], micro_batch=8, class_cond=False) | BIG,
    "cat256": dict(net=["lsun256"], micro_batch=8, class_cond=False) | BIG,
}
TEACHERS = {
    "glyphs": dict(batch_size=32, total_steps=2600, lr=2e-3, dropout=0.0, ema_decay=0.997, times=[-0.6, 1.4]),
    "path": dict(batch_size=128, total_steps=100_000, lr=4e-4, dropout=0.0, ema_decay=0.9995),
    "cifar10": dict(batch_size=512, total_steps=400_000, lr=1e-3, dropout=0.13, ema_decay=0.99929),
    "imagenet64": dict(batch_size=4096, total_steps=610_000, lr=1e-4, dropout=0.1, ema_decay=0.9999432),
    "bedroom256": dict(batch_size=2048, total_steps=600_000, lr=1e-4, dropout=0.1, ema_decay=0.9999432),
    "cat256": dict(batch_size=2048, total_steps=300_000, lr=1e-4, dropout=0.1, ema_decay=0.9999432),
}


def known_dataset(given: dict) -> str:
    """The name under which the recipes of `--dataset` stand: "path" for your own images."""
    dataset = given.get("dataset", "glyphs")
    return dataset if dataset in DATASETS else "path"


def teacher_recipe(given: dict) -> dict:
    """The settings of a teacher for `--dataset`."""
    dataset = known_dataset(given)
    return dict(class_cond=None) | DATASETS[dataset] | dict(stage="teacher", out_dir="out/cd/teacher", times=[-1.2, 1.2],
                                                            label_dropout=0.0) | TEACHERS[dataset]


@torch.no_grad()
def sample_teacher(net, N: int, y: Tensor | None, noise, shape, w: float = 0.0, churn: float = 0.0) -> Tensor:
    """Draw images (B,C,H,W) with a teacher: N Heun steps, 2 N - 1 calls of the denoiser; guided if w > 0, two calls for one."""
    x_T = T_MAX * noise(torch.zeros(shape, device=next(net.parameters()).device))
    D = guide(net_denoiser(net), y, x_T.new_full((len(x_T),), w) if w else None)
    return heun_sample(D, x_T, N, churn, noise=noise)


def train_first_teacher(args, run, stop: StopSignal, script: str, label_dropout: float = 0.0):
    """Train the teacher that a `script` without `--teacher` begins with, in `teacher` under its own --out-dir; `args` then names it.

    Stopped on the way, the process ends here.
    """
    last = Path(args.out_dir) / "last.pt"  # now, not after days of the teacher's training
    if last.exists() and not args.overwrite and (other := load_checkpoint(last).get("script")) != script:
        raise UserError(f"--out-dir {args.out_dir} holds a run of {other}.py; choose another, or --overwrite it")
    first = teacher_recipe(vars(args))
    first |= {key: value for key, value in vars(args).items() if key in SHARED_DEFAULTS.keys() | {"net", "flip"}}
    first |= dict(out_dir=str(Path(args.out_dir) / "teacher"), total_steps=args.teacher_steps, label_dropout=label_dropout,
                  micro_batch=math.gcd(first["batch_size"], args.micro_batch))
    finished, stopped = train_teacher(argparse.Namespace(**first), run, stop)
    if stopped or not finished:
        finish(run, stop)
    args.teacher = str(Path(args.out_dir) / "teacher" / "last.pt")
    del args.teacher_steps, args.net, args.class_cond


def choose_classes(args, dataset) -> int:
    """How many labels the net is to know, 0 for none. Raises UserError for `--class-cond` without labels."""
    if args.class_cond and not dataset.classes:
        raise UserError(f"--class-cond: {args.dataset} has no labels")
    return 0 if args.class_cond is False else dataset.classes


def train_teacher(args, run, stop: StopSignal) -> tuple[bool, bool]:
    """Train a denoiser as EDM does, or go on with the run found in `args.out_dir`. The loop of the scripts, with `edm_loss` in it.

    Returns: whether it came to its end; and whether a signal, here or on another rank, asked to stop.
    """
    settings = net_settings(args.net)
    size = settings["image_size"]
    check_times(args.times, karras_times(args.N))
    with main_process_first(run):
        dataset = load_dataset(args.dataset, args.data_dir, size)
    classes, null = choose_classes(args, dataset), args.label_dropout > 0
    if null and not classes:
        raise UserError("--label-dropout needs labels, and there are none; so does --w-max")

    # ---- networks, optimizer, resume
    model_args = settings | dict(classes=classes, dropout=args.dropout, null=null)
    seed_everything(INIT, args.seed)
    net = place(make_net(model_args), run)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizer = torch.optim.RAdam(net.parameters(), args.lr, foreach=True)
    buffer, tail = flatten_gradients(net, tail=2 + 2 * BINS)  # what the ranks sum each step
    loss_sum, stop_sum, bins = tail[0], tail[1], tail[2:].view(2, -1)  # bins: of the losses, of the images

    out_dir, step, skipped, bad_in_a_row, stopping = Path(args.out_dir), 0, 0, 0, False
    if state := resume_state(args, run, "cd", model_args):
        step, skipped = state["step"], state["skipped"]
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        load_optimizer(optimizer, state["optimizer"])
    del state
    if run.compile:
        net.compile()  # in place: names of the weights stay as they are
    log = start_run(args, run, net, step)

    def save():
        if run.main:
            save_checkpoint(out_dir / "last.pt", dict(
                script="cd", step=step, images=step * args.batch_size, skipped=skipped, args=vars(args), model_args=model_args,
                net=net.state_dict(), target=None, ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                torch_version=str(torch.__version__)))
            save_checkpoint(out_dir / "ema.pt", ema.state_dict())

    def sample_grid():
        """Write samples/STEP.png from the same noise every time; with guidance on the right if there is any."""
        y = grid_labels(classes, run.device)
        blocks = [draw_many(run, lambda y, noise, shape, _: sample_teacher(ema, args.N, y, noise, shape, w), 8 * grid_columns(classes), y,
                            (3, size, size), args.seed, args.micro_batch) for w in ((0.0, 2.0) if null else (0.0,))]
        if run.main:
            log.grid(step, blocks, grid_columns(classes))

    # ---- training
    indices = index_batches(len(dataset), args.seed, step, args.total_steps, args.batch_size, args.micro_batch, run.rank, run.world)
    loader = make_loader(dataset, indices, args.workers, run.device)
    bar, since = progress(args, run, step), (time.perf_counter(), step)
    while step < args.total_steps and not stopping:
        # ------------------------------------------------------------------------------------ one training step
        buffer.zero_()
        for m in range(run.rank, args.batch_size // args.micro_batch, run.world):
            seed_everything(STEP, args.seed, step, m)
            x0, y = to_device(next(loader), run.device, args.flip)
            y = y if classes else None
            t = random_times(len(x0), args.times, run.device)
            if null:
                y = torch.where(torch.rand(len(y), device=run.device) < args.label_dropout, net.null_y, y)
            loss = edm_loss(net, x0, torch.randn_like(x0), t, y)
            (loss.sum() / args.batch_size).backward()
            loss_sum += loss.detach().sum() / args.batch_size
            tally(bins, t, loss.detach())
        stop_sum.fill_(stop.number > 0)
        if run.world > 1:
            torch.distributed.all_reduce(buffer)

        loss, stopping = tail[:2].tolist()
        grad_norm = torch.linalg.vector_norm(buffer[:-len(tail)]).item()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            bad_in_a_row = 0
            optimizer.step()
            ema_update(ema, net, args.ema_decay)
        else:
            bad_in_a_row, skipped = bad_in_a_row + 1, skipped + 1
        step += 1
        # -----------------------------------------------------------------------------------------------------

        if bad_in_a_row == 10:
            bar.close()
            too_many_bad_steps(step, loss, grad_norm, out_dir)
        bar.update()
        last = stopping or step == args.total_steps
        if args.log_every and (step % args.log_every == 0 or last) and run.main:
            since = report(log, bar, args, step, since, loss=loss, loss_bins=(bins[0] / bins[1]).tolist(), grad_norm=grad_norm,
                           skipped=skipped, peak_gb=peak_memory_gb(run.device))
        if (args.save_every and step % args.save_every == 0) or last:
            save()
        if args.sample_every and (step % args.sample_every == 0 or step == args.total_steps):
            sample_grid()
    bar.close()
    return step == args.total_steps, bool(stopping)


def open_teacher(args, run) -> tuple[UNet | None, dict]:
    """The network of `--teacher FILE`, placed, and its model arguments; for `ideal` and `none` no network, and those of `--net`.

    The file's digest is kept in `args.teacher_digest`, so that a resumed run notices another teacher.
    Raises:  UserError if the file holds no teacher.
    """
    if args.teacher in ("ideal", "none"):
        return None, net_settings(args.net)
    if Path(args.teacher).resolve().parent == Path(args.out_dir).resolve():
        raise UserError(f"--out-dir {args.out_dir} holds the --teacher; choose another for the student")
    with main_process_first(run):
        teacher, found = load_network(args.teacher, ("cd",))
        with open(args.teacher, "rb") as file:
            args.teacher_digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    if found["args"].get("stage", "teacher") != "teacher":
        raise UserError(f"--teacher {args.teacher} holds a student: a teacher is what cd.py --stage teacher writes")
    return place(teacher, run), found["model_args"]


def teacher_denoiser(args, run, teacher: UNet | None, dataset):
    """What the student is distilled from.

    Returns: D(x, t, y or None) -> denoised x, None for `none`; and how many labels the student is to know.
    Raises:  UserError if teacher and data set do not fit each other, or the data set is too large for the ideal teacher.
    """
    if teacher is not None:
        if teacher.classes and dataset.classes != teacher.classes:
            raise UserError(f"--teacher {args.teacher} knows {teacher.classes} classes, and {args.dataset} has {dataset.classes}")
        return net_denoiser(teacher), teacher.classes
    if args.teacher == "none":
        return None, choose_classes(args, dataset)
    if len(dataset) * 3 * dataset.size**2 > 4e9:
        raise UserError(f"--teacher ideal goes through all images at every step, and {args.dataset} has {len(dataset)}")
    images, labels = (part.to(run.device) for part in dataset.__getitems__(np.arange(len(dataset))))
    if args.flip:
        images, labels = torch.cat([images, images.flip(3)]), labels.repeat(2)
    return ideal_denoiser(images, labels), choose_classes(args, dataset)


# ------------------------------------------------------------------------------------------------------------
# Zero-shot editing
# ------------------------------------------------------------------------------------------------------------

LUMINANCE = 0.2989, 0.5870, 0.1140  # of red, green and blue


def luminance(x: Tensor) -> Tensor:
    """The projection of each pixel's colour onto the direction of luminance: what a grey picture says."""
    q = F.normalize(x.new_tensor(LUMINANCE), dim=0).view(3, 1, 1)
    return q * (q * x).sum(1, keepdim=True)


def patch_means(x: Tensor, factor: int) -> Tensor:
    """Each factor x factor patch replaced by its mean: what a small picture says."""
    return F.avg_pool2d(x, factor).repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def slerp(z1: Tensor, z2: Tensor, a: Tensor) -> Tensor:
    """Unit noise between z1 (a = 0) and z2 (a = 1) on the arc of each image; a: (B,). Source: CM App. D."""
    a, psi = bcast(a, z1), bcast(F.cosine_similarity(z1.flatten(1), z2.flatten(1)).arccos(), z1)
    return (((1 - a) * psi).sin() * z1 + (a * psi).sin() * z2) / psi.sin()


GRID = karras_times(40).tolist()[:0:-1]  # CM App. D: every level of N = 40 but the last, whose f(x, t_min) = x
TASKS = dict(inpaint=GRID, colorize=GRID, superres=GRID, stroke=[5.38, 2.24], denoise=[0.296442], interpolate=[T_MAX])


def add_edit_flags(parser):
    group = parser.add_argument_group("editing")
    group.add_argument("--edit", choices=TASKS, help="with --ckpt: what to do to the --image files, --sample results each "
                       "(default 4; denoise 1, interpolate 10 steps)")
    group.add_argument("--image", nargs="+", metavar="FILE", help="images to edit; interpolate needs none")
    group.add_argument("--mask", metavar="FILE", help="inpaint: white where to paint (default: a central square of half the side)")
    group.add_argument("--factor", type=number(int, 2), metavar="P", help="superres: pixels of a patch's side (default: size / 32, at "
                       "least 2; CM 8 at 256 pixels)")
    group.add_argument("--noise-level", type=number(float, T_MIN, T_MAX), metavar="T", help="denoise: standard "
                       "deviation, in units of [-1, 1] (default 0.296)")
    group.add_argument("--noisy", action="store_true", help="denoise: the images carry that noise already; add none")


def check_edit_flags(args):
    """Raises UserError for flags of editing that do not apply to `--edit`, or without it."""
    for key, task in (("image", None), ("mask", "inpaint"), ("factor", "superres"), ("noise_level", "denoise"), ("noisy", "denoise")):
        if getattr(args, key) and not args.edit:
            raise UserError(f"--{key.replace('_', '-')} does not apply without --edit")
        if getattr(args, key) and task and args.edit != task:
            raise UserError(f"--{key.replace('_', '-')} applies to --edit {task} only")


EDITING_DEFAULTS = dict(edit=None, image=None, mask=None, factor=None, noise_level=None, noisy=False)


def read_image(path, size: int, factor: int | None = None, flag: str = "--image") -> tuple[Tensor, bool]:
    """An image file -> (3,size,size) in [-1, 1] and whether it was whole; with `factor` one of size / factor pixels will do."""
    from PIL import Image
    with explain(f"{flag} {path} cannot be read as an image"), Image.open(path) as image:
        image.load()
        small = factor is not None and image.size == (size // factor, size // factor)
        if small:
            image = image.resize((size, size), Image.Resampling.NEAREST)
        return torch.from_numpy(fit_image(image, size, f"{flag} {path}").copy()).permute(2, 0, 1) / 127.5 - 1, not small


def read_mask(path, size: int) -> Tensor:
    """(1,1,size,size) float: 1 where the mask image is white, nearer than to black. Without one the central square."""
    mask = torch.zeros(1, 1, size, size)
    if path is None:
        mask[..., size // 4:size - size // 4, size // 4:size - size // 4] = 1
        return mask
    image, _ = read_image(path, size, flag="--mask")
    return (image.mean(0) > 0).float().expand_as(mask)


def edit_images(args, run, net, f):
    """`--edit`: change images with a consistency model that was never trained to, and write a picture of it.

    A row of the picture: what the model is given, the results, and the original if there is one.

    Args:    f: y (b,) or None -> the consistency function (x, t) -> (b,C,H,W) for these labels.
    Source:  CM Sec. 6.3, App. D.
    """
    task, size, sigmas = args.edit, net.image_size, args.sigmas or TASKS[args.edit]
    factor = args.factor or max(2, size // 32)
    if task == "superres" and size % factor:
        raise UserError(f"--factor {factor} does not divide the network's {size} pixels")
    if task == "denoise":
        if args.noise_level and args.sigmas:
            raise UserError("--noise-level and --sigmas both say how noisy the images are: name one")
        sigmas = args.sigmas or [args.noise_level or sigmas[0]]
    if (task == "interpolate") == bool(args.image):
        raise UserError("--edit interpolate goes from noise to noise: no --image" if args.image else f"--edit {task} needs --image")
    if args.image and net.classes and not args.labels:
        raise UserError("this network draws classes: say with --labels which one each --image is")
    if args.image and len(args.labels or [0]) not in (1, len(args.image)):
        raise UserError(f"--labels names {len(args.labels)} classes for {len(args.image)} images: name one, or one for each")

    path, each = make_save_path(args.save), args.sample or dict(interpolate=10, denoise=1).get(task, 4)
    read = [read_image(name, size, factor if task == "superres" else None) for name in args.image or ()]
    rows = len(read) or len(args.labels or range(min(net.classes, 8) or 4))
    originals = torch.stack([image for image, _ in read]).to(run.device) if read else None
    given = originals
    if task in ("inpaint", "colorize", "superres"):
        hole = read_mask(args.mask, size).to(run.device)
        known = dict(inpaint=lambda x: (1 - hole) * x, colorize=luminance, superres=lambda x: patch_means(x, factor))[task]
        given = known(originals)
        if task == "colorize":  # to look at: the known part is tinted
            given = (originals.new_tensor(LUMINANCE).view(3, 1, 1) * originals).sum(1, keepdim=True).expand_as(originals)
    elif task == "denoise" and not args.noisy:
        given = originals + sigmas[0] * seeded_noise(range(rows), args.seed)(originals)

    @torch.no_grad()
    def draw(y, noise, shape, indices):
        row = indices // each
        f_y = f(y)
        if task == "interpolate":  # the ends of a row, and the noise of its further levels, are the same for all its images
            left, right = (seeded_noise((2 * row + end).tolist(), args.seed) for end in (0, 1))
            z = slerp(left(torch.zeros(shape, device=run.device)), right(torch.zeros(shape, device=run.device)),
                      indices % each / max(each - 1, 1))
            return multistep_sample(f_y, sigmas[0] * z, sigmas, right)
        first = noise(torch.zeros(shape, device=run.device))  # an image's own; `given` was made with such noise
        if task == "stroke":
            return multistep_sample(f_y, originals[row] + sigmas[0] * first, sigmas, noise)
        if task == "denoise":
            return multistep_sample(f_y, given[row], sigmas, noise)
        return edit(f_y, originals[row], known, sigmas, noise)

    y = labels_to_draw(args, net, rows, run.device)
    y = None if y is None else y.repeat_interleave(each)
    results = draw_many(run, draw, rows * each, y, (3, size, size), args.seed, args.micro_batch)
    if run.main:
        panel = list(torch.from_numpy(results).unflatten(0, (rows, each)))  # (each,H,W,3) for a row
        for i, (_, whole) in enumerate(read):
            column = task != "stroke" and not args.noisy
            original = [originals[i] if whole else torch.ones_like(originals[i])] * column
            panel[i] = torch.cat([to_uint8(given[i:i + 1]).cpu(), panel[i], *(to_uint8(x[None]).cpu() for x in original)])
        panel = torch.cat(panel) if path.suffix == ".png" else torch.from_numpy(results)
        save_samples(path, panel.numpy(), y, columns=len(panel) // rows)
        print(f"{task}: {rows} row(s), {each} result(s) each, {len(sigmas)} network call(s), EMA weights of {args.ckpt}: {args.save}")
