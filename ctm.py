"""Consistency trajectory models: one network that jumps from any noise level t to any s <= t, in one step or in many.

    python ctm.py                                            digits: trains a teacher, then distils it, in minutes
    python ctm.py --teacher none --out-dir out/scratch       from scratch: its own jumps take the teacher's place
    python ctm.py --disc conv --disc-start 800 --out-dir out/gan
    torchrun --nproc_per_node=8 ctm.py --teacher edm_imagenet64_ema.pt --dataset imagenet64 --data-dir /data/imagenet64

    python ctm.py --ckpt out/ctm/last.pt --sample 64 --steps 4 --gamma 0 --save out.png
    python ctm.py --ckpt out/ctm/last.pt --sample 64 --sigmas 80 1.6 --gamma 1
    python ctm.py --ckpt out/ctm/last.pt --sample 64 --heun 18
    python ctm.py --ckpt out/ctm/last.pt --eval 50000 --steps 2
    python ctm.py --ckpt out/ctm/last.pt --edit inpaint --image photo.png --mask hole.png --labels 3

`--ckpt` takes what this script writes, and the released ImageNet-64 model. The same command again resumes a run,
exactly, on any number of processes.

Paper: Kim et al. 2023 (CTM, arXiv 2310.02279). Where it and the authors' code (sony/ctm) disagree the code is
followed, and the place is marked: the published results are the code's. Projected critic: Sauer et al. 2021
(arXiv 2111.01007). DiffAugment: Zhao et al. 2020 (arXiv 2006.10738).

Log, one JSON object a line: step (generator's and critic's, in turn, once there is a critic); images = seen so far;
loss = the CTM term, and loss_bins its mean where t is below 0.1, 1, 10 and above; loss_dsm; lambda_dsm = its adaptive
weight; with a critic (disc, in the flags) loss_gan, lambda_gan and loss_disc; k = solver steps of this batch;
grad_norm; lr; images_per_s; peak_gb; skipped = steps left out because their loss or its gradient was not finite. What
a step does not have is that of the step before.
"""
import copy
import functools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import common
from common import UserError, bcast

# Recipes: the paper's, and where it says nothing the authors' commands. glyphs and "path" (your own images) are ours, the former
# tuned on 2 cores; the teachers' are in common.py. Nothing was published for LSUN: ImageNet's settings stand in.
CTM = dict(teacher=None, matching="soft", solver="heun", dist="lpips", mu=0.999, s_init="published", times=[-1.2, 1.2], dropout=0.0,
           ema_decay=0.999, disc="none", disc_weight=1.0, disc_lr=2e-3)
STUDENTS = {
    "glyphs": dict(batch_size=32, total_steps=1300, lr=1e-3, max_steps=3, dist="huber", mu=0.99, ema_decay=0.997, times=[-0.6, 1.4],
                   disc_start=800),
    "path": dict(batch_size=128, total_steps=100_000, lr=2e-4, max_steps=8, dist="huber", disc_start=50_000),
    "cifar10": dict(batch_size=256, total_steps=100_000, lr=4e-4, max_steps=17, mu=0.9999, dropout=0.13, disc="projected", disc_start=50_000),
    "imagenet64": dict(batch_size=2048, total_steps=30_000, lr=8e-6, max_steps=20, disc="projected", disc_start=10_000),
}
SCRATCH = {"glyphs": dict(total_steps=2400, lr=2e-3, mu=0.9)}  # what --teacher none has otherwise
TERMS = ("loss", "loss_dsm", "lambda_dsm", "loss_gan", "lambda_gan")  # of the generator's steps, as the log has them


def recipe(given):
    """The settings for `--dataset`, general ones first. Raises UserError for a flag that does not apply with the others."""
    def refuse(keys, why):
        for key in sorted(given.keys() & keys):
            raise UserError(f"--{key.replace('_', '-')} {why}")

    dataset, teacher = common.known_dataset(given), given.get("teacher")
    settings = dict(class_cond=None, teacher_steps=common.TEACHERS[dataset]["total_steps"]) | common.DATASETS[dataset] | CTM
    settings |= STUDENTS.get(dataset, STUDENTS["imagenet64"])
    refuse({"sigmas"}, "applies to sampling only: name a checkpoint with --ckpt")
    if teacher is not None:
        refuse({"teacher_steps"}, "does not apply with --teacher: that one is trained")
        del settings["teacher_steps"]
    if teacher == "none":
        settings |= dict(solver="jump") | SCRATCH.get(dataset, {})  # code; the paper takes heun steps of the model's own denoiser
    elif given.get("solver") == "jump":
        raise UserError("--solver jump applies to --teacher none only: a teacher's step is heun")
    elif teacher not in (None, "ideal"):
        refuse({"net", "class_cond"}, "does not apply with --teacher FILE: the student is built like its teacher")
        del settings["net"], settings["class_cond"]
    if given.get("matching") == "local":
        refuse({"max_steps"}, "does not apply with --matching local: that is one solver step")
        settings["max_steps"] = 1
    if given.get("matching") == "global":  # the solver alone has to get from t to s
        settings["max_steps"] = given.get("N", settings["N"]) - 1
        if given.get("solver", settings["solver"]) == "jump":
            raise UserError("--matching global needs --solver heun: the model's own jump would be its own target")
    settings |= given
    if settings["disc"] == "none":
        refuse({"disc_start", "disc_weight", "disc_lr"}, "does not apply without a --disc")
    elif settings["disc_start"] >= settings["total_steps"]:
        raise UserError(f"--disc-start {settings['disc_start']}: with --total-steps {settings['total_steps']} the critic never has its turn")
    if settings["times"] == ["uniform"]:
        raise UserError("--times uniform: the denoising loss draws from MEAN STD")
    return settings


def flags():
    parser = common.Parser(__doc__)
    group = parser.add_argument_group("algorithm")
    group.add_argument("--teacher", metavar="FILE", help="a teacher written by cd.py --stage teacher, released EDM weights, ideal: the exact "
                       "denoiser of the training images, or none: train from scratch (default: one is trained first)")
    group.add_argument("--teacher-steps", type=common.positive, metavar="K", help="optimizer steps of the teacher that is trained first")
    group.add_argument("--N", type=common.number(int, 2), metavar="N", help="noise levels of the grid (CTM 18 or 40)")
    group.add_argument("--max-steps", type=common.positive, metavar="M", help="most solver steps from t to u; k of them with probability "
                       "~ k, k = 1 .. M (CTM 17 of N = 18, 20 of N = 40; global N - 1)")
    group.add_argument("--matching", choices=("soft", "local", "global"), help="where the target's jump begins: at any u from t down to s "
                       "(soft, CTM), one step below t (local), at s (global: the solver's result is the target)")
    group.add_argument("--solver", choices=("heun", "jump"), help="from t to u: Heun steps of the teacher or, from scratch, of the model's "
                       "own denoiser (heun; the paper's), or one jump of the model's average (jump: the code's, from scratch only)")
    group.add_argument("--dist", choices=("l1", "l2", "huber", "lpips"), help="distance of estimate and target at t_min (CTM lpips)")
    group.add_argument("--mu", type=common.number(float, 0, 1), metavar="MU", help="decay of the target network (CTM 0.999)")
    group.add_argument("--s-init", choices=("published", "zero"), help="how the embedding of s starts: at random (CTM), or so that it "
                       "adds nothing and the student is its teacher")
    group.add_argument("--times", nargs="+", type=common.law_of_times, metavar="MEAN STD", help="of half the denoising loss: ln t ~ "
                       "Normal(MEAN, STD^2) (CTM -1.2 1.2); the other half is at high noise levels")
    group.add_argument("--disc", choices=("none", *CRITICS), help="critic of the adversarial loss: conv, small and multi-scale, for small "
                       "images; projected (CTM), on EfficientNet and DeiT features, needs timm")
    group.add_argument("--disc-start", type=common.count, metavar="K", help="step from which generator and critic take turns, one step each")
    group.add_argument("--disc-weight", type=common.number(float, 0), metavar="W", help="of the adversarial loss, times its adaptive weight "
                       "(CTM 1)")
    group.add_argument("--disc-lr", type=common.number(float, 0), metavar="LR", help="learning rate of the critic's RAdam (CTM 2e-3)")
    common.add_shared_flags(parser)
    group = parser.add_argument_group("sampling, further flags")
    group.add_argument("--steps", type=common.positive, metavar="n", help="jumps between n + 1 levels of a Karras grid, instead of --sigmas")
    group.add_argument("--gamma", type=common.number(float, 0, 1), metavar="G", help="noise put back after each jump but the last: 0 none "
                       "(default; CTM), 1 all, as in consistency models")
    group.add_argument("--heun", type=common.number(int, 2), metavar="N", help="EDM's sampler instead, on the model's denoiser: N Heun steps, "
                       "2 N - 1 network calls")
    common.add_edit_flags(parser)
    return parser


# ------------------------------------------------------------------------------------------------------------
# The method
# ------------------------------------------------------------------------------------------------------------

def g(net, x, t, s, y=None):
    """g(x, t, s), where the jump aims at: the denoiser when s = t, the end of the trajectory when s is 0. Shapes as `G`."""
    return common.denoise(net, x, t, y, common.c_noise(s))


def G(net, x, t, s, y=None):
    """G(x, t, s), the point at level s of the probability-flow trajectory through (x, t); G(x, t, t) = x to the last bit.

    Args:    net: a UNet with `extra`.  x: (B,C,H,W) at noise level t.  t >= s > 0: (B,).  y: (B,) labels or None.
    Returns: (B,C,H,W) float32.
    Source:  CTM, parametrisation of G; the input is scaled by c_in(t) as in EDM (code), which depends on t alone.
    """
    keep = bcast(s / t, x)
    return keep * x + (1 - keep) * g(net, x, t, s, y)


def step_probabilities(M):
    """P(k) ~ k for k = 1 .. M solver steps: (M,) float64. Source: the code's heun_step_strategy "weighted"."""
    return np.arange(1, M + 1) / (M * (M + 1) / 2)


def draw_indices(B, N, k, device):
    """Indices i of t and j of s on an ascending grid of N levels, with u = times[i - k]: t is any level that leaves room for k steps, s any from
    t_min to u, both ends included. Two (B,) int64. Source: the code's order, t, u, then s; the paper draws s before u.
    """
    i = k + torch.randint(N - k, (B,), device=device)
    j = (torch.rand(B, device=device) * (i - k + 1)).long()  # the largest number below 1 does not round up here
    return i, j


def dsm_times(B, law, device):
    """Noise levels of the denoising loss (B,): the first half from `law`, the rest high, from 80 down to 0.318. Source: CTM, training details; code."""
    first = common.random_times(B // 2, law, device)
    low, high = common.T_MIN ** (1 / common.RHO), common.T_MAX ** (1 / common.RHO)
    return torch.cat([first, (high + 0.7 * torch.rand(B - B // 2, device=device) * (low - high)) ** common.RHO])


def heun_solve(D, times, x, i, k, y):
    """k Heun steps of the probability-flow ODE down the grid, from times[i] to times[i - k]. D: (x, t, y) -> denoised x."""
    for done in range(k):
        x = common.heun_step(lambda x, t: D(x, t, y), x, times[i - done], times[i - done - 1])
    return x


def jump_solve(target, times, x, i, k, y):
    """The same in one jump of the target network: what stands in for a teacher."""
    return G(target, x, times[i], times[i - k], y)


def estimate(net, target, x_t, t, s, t_min, y):
    """Where the trajectory through (x_t, t) ends, by two jumps: t to s by the net, then s to t_min by the target network.

    The target's weights are frozen, but the gradient flows through its input: that is how the first jump learns.
    """
    return G(target, G(net, x_t, t, s, y), s, t_min, y)


def loss_fn(net, target, solve, x0, noise, times, i, j, k, y, dist):
    """The CTM loss of each image, and the estimate x_est that the critic judges.

    Args:    net: theta.  target: theta^-, its moving average, frozen.  solve: (x_t, i, k, y) -> x_u, from times[i] to times[i - k].
             x0, noise: (B,C,H,W).  times: (N,) ascending.  i, j: (B,) indices of t and s.  k: solver steps.  y: (B,) labels or None.
             dist: (x, y) -> (B,). Where s = u, always in global matching, the solver's x_u is the inner target itself.
    Returns: two: (B,), (B,C,H,W). Gradient flows through net(x_t) alone.
    Source:  CTM, soft consistency matching. As in the code the inner target is the net's, without gradient, and both outer jumps are theta^-'s.
    """
    t, u, s, t_min = times[i], times[i - k], times[j], times[0].expand(len(x0))
    x_t = x0 + bcast(t, x0) * noise
    x_est = estimate(net, target, x_t, t, s, t_min, y)
    with torch.no_grad():
        x_target = estimate(net, target, solve(x_t, i, k, y), u, s, t_min, y)
    return dist(x_est, x_target), x_est


def adaptive_weight(gradient, other):
    """The factor that makes a loss as strong as the CTM loss, by their gradients in the last layer. Source: CTM, adaptive weighting."""
    return (gradient.norm() / (other.norm() + 1e-4)).clamp(0, 1e4)


def last_layer(net):
    """The weight whose gradients are compared: the second convolution of the last residual block (code, for ImageNet)."""
    return net.output_blocks[-1][0].out_layers[3].weight


def add_gradients(net, ctm, dsm, gan, disc_weight, share):
    """p.grad += share * d/dp (ctm + lambda_dsm dsm + disc_weight lambda_gan gan) for all parameters p of the net.

    Args:    ctm, dsm, gan: losses, numbers; gan may be None.  share: of the batch.
    Returns: lambda_dsm, lambda_gan (0 without gan).
    Source:  CTM's total loss; lambda_gan is kept within 0.01 and 10, as in the code.
    """
    parameters, lambda_gan = list(net.parameters()), torch.zeros(())
    last = next(number for number, p in enumerate(parameters) if p is last_layer(net))
    total = torch.autograd.grad(ctm, parameters, retain_graph=gan is not None)  # the same graph: both see x_est
    strength = total[last]
    gradient = torch.autograd.grad(dsm, parameters)
    lambda_dsm = adaptive_weight(strength, gradient[last])
    total = torch._foreach_add(total, torch._foreach_mul(gradient, lambda_dsm))
    if gan is not None:
        gradient = torch.autograd.grad(gan, parameters)
        lambda_gan = adaptive_weight(strength, gradient[last]).clamp(0.01, 10)
        total = torch._foreach_add(total, torch._foreach_mul(gradient, disc_weight * lambda_gan))
    torch._foreach_add_([p.grad for p in parameters], total, alpha=share)
    return lambda_dsm, lambda_gan


def hinge_loss(critic, real, fake):
    """The critic's loss, a number. Source: the code; the paper writes the logistic form."""
    return F.relu(1 - critic(real)).mean() + F.relu(1 + critic(fake)).mean()


# ------------------------------------------------------------------------------------------------------------
# Critics: images (B,C,H,W) in [-1, 1] -> logits (B,K), real above 0
# ------------------------------------------------------------------------------------------------------------

def augment(x, brightness, saturation, contrast, shift, hole):
    """DiffAugment with these draws: colour, then translation, then a square hole; gradients flow through.

    Args:    x: (B,C,H,H).  brightness, added, saturation and contrast, factors around the mean: (B,).  shift: (B,2) int, rows and
             columns by which the content moves up and left, zeros moving in.  hole: (B,2) int, the centre's row and column.
    """
    size = x.shape[-1]
    x = x + bcast(brightness, x)
    x = x.mean(1, keepdim=True).lerp(x, bcast(saturation, x))
    x = x.mean((1, 2, 3), keepdim=True).lerp(x, bcast(contrast, x))
    where = torch.arange(size, device=x.device)
    rows, columns = ((where[:, None] + shift[:, i, None, None] == where).to(x).unsqueeze(1) for i in (0, 1))  # output, input pixel
    side = int(0.2 * size + 0.5)
    cut = [((where - hole[:, i:i + 1] + side // 2) // side == 0) for i in (0, 1)]  # (B,H)
    return (rows @ x @ columns.mT) * ~(cut[0][:, None, :, None] & cut[1][:, None, None, :])


def random_augment(x):
    """`augment` with DiffAugment's draws."""
    B, size = len(x), x.shape[-1]
    reach, side = int(0.125 * size + 0.5), int(0.2 * size + 0.5)
    brightness, saturation, contrast = torch.rand(3, B, device=x.device)
    return augment(x, brightness - 0.5, 2 * saturation, contrast + 0.5, torch.randint(-reach, reach + 1, (B, 2), device=x.device),
                   torch.randint(size + 1 - side % 2, (B, 2), device=x.device))


def down(c_in, c_out):
    """Half the size. Batch statistics are those of the micro-batch at hand, always, so that there are none to synchronise."""
    return nn.Sequential(spectral_norm(nn.Conv2d(c_in, c_out, 4, 2, 1)), nn.BatchNorm2d(c_out, track_running_stats=False), nn.LeakyReLU(0.2))


class ConvCritic(nn.Module):
    """A small critic without pretrained parts: three heads, on the image, its half and its quarter. Ours."""
    def __init__(self, size, width=64):
        super().__init__()
        self.heads = nn.ModuleList()
        for scale in range(3):
            halvings = max(int(math.log2(size)) - 2 - scale, 0)  # down to 4 pixels
            widths = [width * min(2**i, 4) for i in range(halvings + 1)]
            self.heads.append(nn.Sequential(spectral_norm(nn.Conv2d(3, width, 3, padding=1)), nn.LeakyReLU(0.2),
                                            *(down(a, b) for a, b in zip(widths, widths[1:])), spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))))

    def forward(self, x):
        x = random_augment(x)
        return torch.cat([head(F.avg_pool2d(x, 2**scale)).flatten(1) for scale, head in enumerate(self.heads)], 1)


class Projector(nn.Module):
    """Features of a frozen network at four scales, mixed by frozen random convolutions across channels and from coarse to fine.

    Args:    name: of the network in timm.  pretrained: False leaves it random, which needs no download (for tests).
    Returns: of an image batch: 4 tensors, (B,64,112,112) (B,64,56,56) (B,128,28,28) (B,256,14,14).
    Raises:  UserError in one line if timm is missing or the weights cannot be had.
    Source:  Projected GAN; the taps, sizes and random layers are those of CTM's code.
    """
    TAPS = {"tf_efficientnet_lite0": ((1, 2, 3, 4), (24, 40, 112, 320)),
            "deit_base_distilled_patch16_224": ((2, 5, 8, 11), (96, 192, 384, 768))}

    def __init__(self, name, pretrained=True):
        super().__init__()
        try:
            import timm
        except (ImportError, RuntimeError) as error:  # a torchvision built for another torch fails with RuntimeError
            raise UserError(f"--disc projected needs timm (pip install timm), and a torchvision built for torch {torch.__version__}: "
                            f"{common.first_line(error)}") from error
        (taps, widths), about = self.TAPS[name], timm.get_pretrained_cfg(name)
        try:  # without hf_hub_id: from torch.hub, which does not try again for a minute and reads files put there by hand
            features = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=taps,
                                         pretrained_cfg_overlay=dict(hf_hub_id=None))
        except Exception as error:  # whatever a download may fail with
            raise UserError(f"--disc projected could not get the weights of {name} ({common.first_line(error)}). Put "
                            f"{about.url} into {torch.hub.get_dir()}/checkpoints, or choose another --disc") from error
        self.features = (features.eval().requires_grad_(False),)  # in a tuple: no part of the state that is saved
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(getattr(about, key)).view(3, 1, 1), persistent=False)
        self.reassemble = nn.ModuleList(nn.Identity() for _ in range(4))
        if name.startswith("deit"):  # its taps are all (B,768,14,14)
            resample = (nn.ConvTranspose2d(96, 96, 4, 4), nn.ConvTranspose2d(192, 192, 2, 2), nn.Identity(), nn.Conv2d(768, 768, 3, 2, 1))
            self.reassemble = nn.ModuleList(nn.Sequential(nn.Conv2d(768, width, 1), layer) for width, layer in zip(widths, resample))
        mixed = (64, 128, 256, 512)
        self.channels = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(widths, mixed))
        self.scales = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in zip((64, *mixed), mixed))
        self.requires_grad_(False)

    def _apply(self, fn, recurse=True):  # .to(device) reaches the frozen network too
        self.features[0]._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, x):
        x = F.interpolate(((x + 1) / 2 - self.mean) / self.std, (224, 224), mode="bilinear")  # larger ones too: DeiT takes no others
        taps, outputs, coarse = self.features[0](x), [], 0.0
        for i in (3, 2, 1, 0):
            mixed = coarse + self.channels[i](self.reassemble[i](taps[i]))
            coarse = self.scales[i](F.interpolate(mixed, scale_factor=2.0, mode="bilinear", align_corners=True))
            outputs.insert(0, coarse)
        return outputs


class ProjectedCritic(nn.Module):
    """CTM's critic: for each of two feature networks four heads, one a scale, 64 logits in all."""
    def __init__(self, size, pretrained=True):
        super().__init__()
        self.projectors = nn.ModuleList(Projector(name, pretrained) for name in Projector.TAPS)
        widths = (64, 64, 128, 256, 512)  # a head's first is that of its scale, its last map is 7x7
        self.heads = nn.ModuleList(nn.Sequential(*(down(a, b) for a, b in zip(widths[scale:], widths[scale + 1:])),
                                                 spectral_norm(nn.Conv2d(512, 1, 4, bias=False)))
                                   for _ in self.projectors for scale in range(4))

    def forward(self, x):
        maps = [feature for projector in self.projectors for feature in projector(random_augment(x))]
        return torch.cat([head(feature).flatten(1) for head, feature in zip(self.heads, maps)], 1)


CRITICS = {"conv": ConvCritic, "projected": ProjectedCritic}


def renew_norms(critic):
    """One power iteration of each spectral norm. Once a step: how often the critic is called depends on the number of processes."""
    critic.train()
    for layer in critic.modules():
        if nn.utils.parametrize.is_parametrized(layer):
            layer.weight  # noqa: B018  computing it in training mode is what iterates
    critic.eval()


# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------

def gamma_sample(jump, x_T, levels, gamma, noise=torch.randn_like):
    """Draw with a CTM: from each level jump to below the next one, and add noise up to it.

    Args:    jump: (x (B,C,H,W), t (B,), s (B,)) -> G(x, t, s).  x_T: (B,C,H,W), levels[0] * unit noise.  levels: noise levels, largest
             first, one jump from each, the last to t_min.  gamma: 0 deterministic, 1 multistep consistency sampling.  noise: x -> unit
             noise shaped like x.
    Returns: (B,C,H,W). NFE = len(levels).
    Source:  CTM, gamma-sampling, in the code's form: offset by t_min, so that no jump goes below it and the noise restores the level exactly.
    """
    x, t_min = x_T, common.T_MIN
    for t, t_next in zip(levels, (*levels[1:], t_min)):
        s = math.sqrt(1 - gamma**2) * (t_next - t_min) + t_min
        x = jump(x, torch.full_like(x[:, 0, 0, 0], t), torch.full_like(x[:, 0, 0, 0], s))
        if gamma > 0 and t_next > t_min:
            x = x + math.sqrt(t_next**2 - s**2) * noise(x)
    return x


def step_levels(n):
    """The levels from which n jumps start: karras_times(n + 1), largest first, without t_min."""
    return common.karras_times(n + 1).tolist()[:0:-1]


@torch.no_grad()
def sample(net, levels, gamma, y, noise, shape):
    """Draw images (B,C,H,W) in len(levels) network calls."""
    x_T = levels[0] * noise(torch.zeros(shape, device=next(net.parameters()).device))
    return gamma_sample(lambda x, t, s: G(net, x, t, s, y), x_T, levels, gamma, noise).clamp(-1, 1)


@torch.no_grad()
def sample_heun(net, N, y, noise, shape):
    """Draw images (B,C,H,W) with EDM's sampler on the denoiser g(x, t, t), in 2 N - 1 network calls."""
    x_T = common.T_MAX * noise(torch.zeros(shape, device=next(net.parameters()).device))
    return common.heun_sample(lambda x, t: g(net, x, t, t, y), x_T, N).clamp(-1, 1)


def use_checkpoint(args, run):
    """`--ckpt`: sample or edit. Raises UserError for flags that do not go together."""
    net, trained = common.load_network(args.ckpt, ("ctm",))
    if not net.extra:
        raise UserError(f"{args.ckpt} holds no CTM: its network has no input s. cd.py takes consistency models and teachers")
    common.check_edit_flags(args)
    ways = [f"--{key}" for key in ("sigmas", "steps", "heun", "edit") if getattr(args, key) is not None]
    if len(ways) > 1 and ways != ["--sigmas", "--edit"]:
        raise UserError(f"{ways[0]} and {ways[1]} do not apply together")
    levels = step_levels(args.steps) if args.steps else args.sigmas or [common.T_MAX]
    if args.gamma is not None and (args.heun or args.edit):
        raise UserError(f"--gamma does not apply with {ways[-1]}")
    if args.gamma is not None and len(levels) == 1:
        raise UserError("--gamma says what happens between jumps: name several with --steps or --sigmas")
    net = common.place(net, run)
    if args.edit:
        def f(y):
            return lambda x, t: G(net, x, t, torch.full_like(t, common.T_MIN), y).clamp(-1, 1)
        return common.edit_images(args, run, net, f)
    args.sample = args.sample or 64
    draw, calls = functools.partial(sample, net, levels, args.gamma or 0.0), len(levels)
    if args.heun:
        draw, calls = functools.partial(sample_heun, net, args.heun), 2 * args.heun - 1
    common.sample_checkpoint(args, run, net, lambda y, noise, shape, _: draw(y, noise, shape), calls, trained)


SAMPLING = dict(sample=None, sigmas=None, steps=None, gamma=None, heun=None, **common.EDITING_DEFAULTS)

if __name__ == "__main__":
    args = common.parse_flags(flags(), recipe, SAMPLING)
    run = common.setup(args)

    # ---- sampling, editing: python ctm.py --ckpt FILE
    if hasattr(args, "ckpt"):
        use_checkpoint(args, run)
        common.finish(run)

    # ---- teacher: without --teacher, one is trained first
    stop = common.StopSignal()
    if args.max_steps >= args.N:
        raise UserError(f"--max-steps {args.max_steps}: a grid of --N {args.N} levels has {args.N - 1} steps")
    common.check_times(args.times, common.karras_times(args.N))
    with common.main_process_first(run):  # now, not after days of the teacher's training
        dist = common.make_distance(args.dist, run.device)
        if args.teacher is None and args.disc == "projected":
            ProjectedCritic(64)  # whether its networks can be had
    if args.teacher is None:
        common.train_first_teacher(args, run, stop, "ctm")
    teacher, settings = common.open_teacher(args, run)
    size = settings["image_size"]

    # ---- data
    with common.main_process_first(run):
        dataset = common.load_dataset(args.dataset, args.data_dir, size)
    D, classes = common.teacher_denoiser(args, run, teacher, dataset)

    # ---- networks, optimizer, resume
    model_args = settings | dict(classes=classes, dropout=args.dropout, extra=True)
    common.seed_everything(common.INIT, args.seed)
    net = common.make_net(model_args)
    if args.s_init == "published":
        for name, layer in net.named_modules():
            if name.endswith("emb_layers_s.1"):
                layer.reset_parameters()
    if teacher is not None:  # all but the embedding of s
        net.load_state_dict(net.state_dict() | teacher.state_dict())
    net = common.place(net, run)
    target = copy.deepcopy(net).requires_grad_(False)  # in training mode: it drops out too, by masks of its own (code)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizers = [torch.optim.RAdam(net.parameters(), args.lr, foreach=True)]
    numbers = len(TERMS) + 1 + 2 * common.BINS  # beside the gradients
    buffers, critic = [common.flatten_gradients(net, numbers)], None  # what the ranks sum each step
    if args.disc != "none":
        common.seed_everything(common.INIT, args.seed, 1)
        with common.main_process_first(run):
            critic = CRITICS[args.disc](size).to(run.device).eval()
        optimizers.append(torch.optim.RAdam(critic.heads.parameters(), args.disc_lr, betas=(0.5, 0.9), foreach=True))
        buffers.append(common.flatten_gradients(critic.heads, numbers))

    out_dir, step, skipped, bad_in_a_row, stopping = Path(args.out_dir), 0, 0, [0, 0], False
    if state := common.resume_state(args, run, "ctm", model_args):
        step, skipped = state["step"], state["skipped"]
        for module, key in ((net, "net"), (target, "target"), (ema, "ema"), (critic, "critic")):
            if module is not None:
                module.load_state_dict(state[key])
        for optimizer, key in zip(optimizers, ("optimizer", "critic_optimizer")):
            common.load_optimizer(optimizer, state[key])
    del state
    if run.compile:
        for module in {net, target, teacher} - {None}:
            module.compile()  # in place: names of the weights stay as they are
        if critic is not None:
            import torch._functorch.config
            torch._functorch.config.donated_buffer = False  # the CTM and the adversarial gradient go through one graph
    log = common.start_run(args, run, net, step)

    def save():
        """Write last.pt, which resumes the run, and ema.pt, which other tools can load."""
        if run.main:
            common.save_checkpoint(out_dir / "last.pt", dict(
                script="ctm", step=step, images=step * args.batch_size, skipped=skipped, args=vars(args), model_args=model_args,
                net=net.state_dict(), target=target.state_dict(), ema=ema.state_dict(), optimizer=optimizers[0].state_dict(),
                critic=critic and critic.state_dict(), critic_optimizer=critic and optimizers[1].state_dict(),
                torch_version=str(torch.__version__)))
            common.save_checkpoint(out_dir / "ema.pt", ema.state_dict())

    def sample_grid():
        """Write samples/STEP.png from the same noise every time: in one step, in two and in four, deterministic."""
        y, columns = common.grid_labels(classes, run.device), common.grid_columns(classes)
        blocks = [common.draw_many(run, lambda y, noise, shape, _: sample(ema, step_levels(n), 0.0, y, noise, shape), 8 * columns, y,
                                   (3, size, size), args.seed, args.micro_batch) for n in (1, 2, 4)]
        if run.main:
            log.grid(step, blocks, columns)

    # ---- training
    micro_batches = args.batch_size // args.micro_batch
    indices = common.index_batches(len(dataset), args.seed, step, args.total_steps, args.batch_size, args.micro_batch,
                                   run.rank, run.world)
    loader = common.make_loader(dataset, indices, args.workers, run.device)
    times = common.karras_times(args.N).to(run.device)
    if args.solver == "jump":
        solve = functools.partial(jump_solve, target, times)
    else:
        solve = functools.partial(heun_solve, D or (lambda x, t, y: g(target, x, t, t, y)), times)
    bar, since, record = common.progress(args, run, step), (time.perf_counter(), step), {}
    while step < args.total_steps and not stopping:
        # ------------------------------------------------------------------------------------ one training step
        k = 1 + int(np.random.default_rng((common.SOLVER, args.seed, step)).choice(args.max_steps, p=step_probabilities(args.max_steps)))
        adversarial = critic is not None and step >= args.disc_start
        critics_turn = adversarial and (step - args.disc_start) % 2 == 1
        terms = TERMS if adversarial else TERMS[:3]
        buffer, tail = buffers[critics_turn]
        sums, stop_sum, bins = tail[:len(TERMS)], tail[len(TERMS)], tail[len(TERMS) + 1:].view(2, -1)  # bins: of the losses, of the images
        buffer.zero_()
        if adversarial:
            critic.heads.requires_grad_(critics_turn)
        if critics_turn:
            renew_norms(critic)
        for m in range(run.rank, micro_batches, run.world):
            common.seed_everything(common.STEP, args.seed, step, m)
            x0, y = common.to_device(next(loader), run.device, args.flip)
            y, noise, share = y if classes else None, torch.randn_like(x0), len(x0) / args.batch_size
            i, j = draw_indices(len(x0), args.N, k, run.device)
            if args.matching == "global":
                j = i - k  # s = u
            if critics_turn:
                with torch.no_grad():
                    fake = estimate(net, target, x0 + bcast(times[i], x0) * noise, times[i], times[j], times[0].expand(len(x0)), y)
                loss = hinge_loss(critic, x0, fake)
                (share * loss).backward()
                sums[0] += share * loss.detach()
            else:
                losses, x_est = loss_fn(net, target, solve, x0, noise, times, i, j, k, y, dist)
                t, ctm = dsm_times(len(x0), args.times, run.device), losses.mean()
                dsm = common.edm_loss(net, x0, torch.randn_like(x0), t, y, common.c_noise(t)).mean()
                gan = -critic(x_est).mean() if adversarial else None
                lambda_dsm, lambda_gan = add_gradients(net, ctm, dsm, gan, args.disc_weight, share)
                for number, value in zip(range(len(terms)), (ctm, dsm, lambda_dsm, gan, lambda_gan)):
                    sums[number] += share * value.detach()
                common.tally(bins, times[i], losses.detach())
        stop_sum.fill_(stop.number > 0)
        if run.world > 1:
            torch.distributed.all_reduce(buffer)

        loss, stopping = sums[0].item(), stop_sum.item() > 0
        grad_norm = torch.linalg.vector_norm(buffer[:-len(tail)]).item()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            bad_in_a_row[critics_turn] = 0
            optimizers[critics_turn].step()
            if not critics_turn:
                common.ema_update(target, net, args.mu)
                common.ema_update(ema, net, args.ema_decay)
        else:
            bad_in_a_row[critics_turn] += 1
            skipped += 1
        step += 1
        # -----------------------------------------------------------------------------------------------------

        if bad_in_a_row[critics_turn] == 10:
            bar.close()
            common.too_many_bad_steps(step, loss, grad_norm, out_dir)
        bar.update()
        last = stopping or step == args.total_steps
        record |= dict(loss_disc=loss) if critics_turn else dict(zip(terms, sums.tolist())) | dict(
            loss_bins=(bins[0] / bins[1]).tolist(), grad_norm=grad_norm, k=k)
        if args.log_every and (step % args.log_every == 0 or last) and run.main:
            since = common.report(log, bar, args, step, since, **record, skipped=skipped, peak_gb=common.peak_memory_gb(run.device))
        if (args.save_every and step % args.save_every == 0) or last:
            save()
        if args.sample_every and (step % args.sample_every == 0 or step == args.total_steps):
            sample_grid()
    bar.close()
    common.finish(run, stop if step < args.total_steps else None)
