"""Consistency trajectory models: one network that jumps from any noise level t to any s <= t.

Distilled from a diffusion model, or trained from scratch, it draws in one step or in many. Kim et
al. 2023, arXiv 2310.02279; where the paper and the authors' code (sony/ctm) disagree, the code,
whose results were published: see the end of this file.

    python ctm.py                                      digits: a teacher, then the student, minutes
    python ctm.py --teacher none --out-dir out/scratch
    torchrun --nproc_per_node=8 ctm.py --dataset imagenet64 --data-dir DIR --teacher edm.pt
    python ctm.py --ckpt out/ctm/last.pt --sample 64 --steps 4 --gamma 0 --save out.png
    python ctm.py --ckpt out/ctm/last.pt --edit inpaint --image photo.png --labels 3

The same command again resumes a run, exactly, on any number of processes. `--ckpt` takes what this
script writes, and the released ImageNet-64 model.
Result: of digits drawn in one, two and four steps 98.2, 99.2 and 99.3% are read as the label asked
for, after 8 minutes on 2 cores. Published: ImageNet-64, FID 1.92 in one step, 1.73 in two.
"""
import copy
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import common
from common import RHO, T_MAX, T_MIN, UserError, bcast, number, positive

# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------

def g(net, x, t, s, y=None):
    """g(x, t, s), where the jump aims at: the denoiser if s = t, the trajectory's end if s is 0."""
    masks = common.dropout_masks(net, len(x))  # in each call others, as in the code
    return common.denoise(net, x, t, y, common.c_noise(s), masks)


def G(net, x, t, s, y=None):
    """G(x, t, s), the point at level s of the PF-ODE's trajectory through (x, t); (B,C,H,W).

    Args:    net: a UNet with `cond`.  x: (B,C,H,W).  t >= s > 0: (B,).  y: (B,) labels or None.
    """
    keep = bcast(s / t, x)
    return keep * x + (1 - keep) * g(net, x, t, s, y)


def draw_indices(B, N, k, device):
    """Indices i of t and j of s, (B,) each, in an ascending grid of N levels; 0 <= j <= i - k."""
    i = k + torch.randint(N - k, (B,), device=device)
    position = torch.rand(B, device=device)  # the largest, just below 1, does not round up
    j = (position * (i - k + 1)).long()
    return i, j


def heun_solve(D, times, x, i, k, y):
    """k Heun steps of the PF-ODE, times[i] to times[i - k]. D: (x, t, y) -> denoised (B,C,H,W)."""
    D_y = partial(D, y=y)
    for n in range(k):
        x = common.heun_step(D_y, x, times[i - n], times[i - n - 1])
    return x


def estimate(net, target, x_t, t, s, y):
    """Where the trajectory through (x_t, t) ends: to s by the net, on to t_min by the target.

    The target is frozen; gradient flows through its input, so the first jump learns.
    """
    t_min = torch.full_like(s, T_MIN)
    x_s = G(net, x_t, t, s, y)
    return G(target, x_s, s, t_min, y)


def loss_fn(net, target, solve, x0, noise, times, i, j, k, y, dist):
    """The CTM loss of each image, and the estimate x_est that a critic judges.

    Args:    net: theta.  target: theta^-, its moving average, frozen.  x0, noise: (B,C,H,W).
             solve: (x_t, i, k, y) -> x_u, from times[i] to times[i - k].  times: (N,) ascending.
             i, j: (B,) indices of t, s.  k: solver steps.  y: (B,) or None.  dist: (x, y) -> (B,).
    Returns: (B,), (B,C,H,W). Gradient flows through net(x_t) alone.
    Source:  CTM, soft consistency matching. Where s = u, as always in global matching, the inner
             jump is nothing and the solver's x_u is the inner target itself.
    """
    t, u, s = times[i], times[i - k], times[j]
    x_t = x0 + bcast(t, x0) * noise
    x_est = estimate(net, target, x_t, t, s, y)
    with torch.no_grad():
        x_u = solve(x_t, i, k, y)
        x_target = estimate(net, target, x_u, u, s, y)
    return dist(x_est, x_target), x_est


def dsm_times(B, p_t, device):
    """Levels of the denoising loss (B,): half from p(t), the rest high, from 80 down to 0.318."""
    first = common.random_times(B // 2, p_t, device)
    position = 0.7 * torch.rand(B - B // 2, device=device)
    low = T_MIN ** (1 / RHO)
    high = T_MAX ** (1 / RHO)
    rest = (high + position * (low - high)) ** RHO
    return torch.cat([first, rest])


def last_layer(net):
    """Where the strength of a loss is read: the last residual block's second convolution."""
    return net.output_blocks[-1][0].out_layers[3].weight


def add_gradients(net, ctm, dsm_gradient, gan, dsm_weight, disc_weight, share):
    """p.grad += share * d/dp (ctm + dsm_weight lambda_dsm dsm + disc_weight lambda_gan gan), for
    all p.

    Args:    ctm, gan: numbers; gan may be None.  dsm_gradient: of dsm, for all p, or None; taken
             before the other terms are computed, so that its graph is gone by then.
    Returns: lambda_dsm, lambda_gan by name, adaptive: they make the terms as strong as the CTM
             loss, by the gradients of the last layer.
    """
    parameters = list(net.parameters())
    last = [p is last_layer(net) for p in parameters].index(True)
    # The CTM and the adversarial loss share a graph: both see x_est.
    total = torch.autograd.grad(ctm, parameters, retain_graph=gan is not None)
    strength = total[last].norm()
    terms, weights = {}, {}
    if dsm_gradient is not None:
        terms["lambda_dsm"] = dsm_gradient, dsm_weight, 0, 1e4
    if gan is not None:
        gan_gradient = torch.autograd.grad(gan, parameters)
        terms["lambda_gan"] = gan_gradient, disc_weight, 0.01, 10
    for name, (gradient, factor, low, high) in terms.items():
        ratio = strength / (gradient[last].norm() + 1e-4)
        weights[name] = ratio.clamp(low, high)
        term = torch._foreach_mul(gradient, factor * weights[name])
        total = torch._foreach_add(total, term)
    gradients = [p.grad for p in parameters]
    torch._foreach_add_(gradients, total, alpha=share)
    return weights


def hinge_loss(critic, real, fake):
    """The critic's loss, a number."""
    real_loss = F.relu(1 - critic(real)).mean()
    fake_loss = F.relu(1 + critic(fake)).mean()
    return real_loss + fake_loss


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------

def gamma_sample(jump, x_T, levels, gamma, noise=torch.randn_like):
    """Draw with a CTM: from each level jump to below the next one, and add noise up to it.

    Args:    jump: (x, t (B,), s (B,)) -> G(x, t, s).  x_T: (B,C,H,W), levels[0] * unit noise.
             levels: largest first, the last jump goes to t_min.  gamma: 0 deterministic, 1
             multistep consistency sampling.  noise: x -> unit noise like x.
    """
    x = x_T
    for t, t_next in zip(levels, (*levels[1:], T_MIN)):
        s = math.sqrt(1 - gamma**2) * (t_next - T_MIN) + T_MIN
        x = jump(x, common.levels_like(x, t), common.levels_like(x, s))
        if gamma > 0 and t_next > T_MIN:
            deviation = math.sqrt(t_next**2 - s**2)
            x = x + deviation * noise(x)
    return x


def step_levels(n):
    """The levels from which n jumps start: karras_times(n + 1), largest first, without t_min."""
    times = common.karras_times(n + 1)
    return times.tolist()[:0:-1]


@torch.no_grad()
def sample(net, levels, gamma, y, noise, shape):
    """Draw images (B,C,H,W) in len(levels) network calls."""
    x_T = common.initial_noise(net, noise, shape, levels[0])
    jump = partial(G, net, y=y)
    x = gamma_sample(jump, x_T, levels, gamma, noise)
    return x.clamp(-1, 1)


@torch.no_grad()
def sample_heun(net, N, y, noise, shape):
    """Draw images (B,C,H,W) with EDM's sampler on the denoiser g(x, t, t), in 2 N - 1 calls."""
    def D(x, t):
        return g(net, x, t, t, y)
    x_T = common.initial_noise(net, noise, shape, T_MAX)
    x = common.heun_sample(D, x_T, N)
    return x.clamp(-1, 1)


# --------------------------------------------------------------------------------------------------
# Critics: images (B,C,H,W) in [-1, 1] -> logits (B,K), real above 0
# --------------------------------------------------------------------------------------------------

def augment(x, brightness, saturation, contrast, shift, hole):
    """DiffAugment (arXiv 2006.10738) with these draws: colour, translation, a square hole.

    Args:    x: (B,C,H,H).  brightness: (B,), added.  saturation, contrast: (B,), factors.
             shift: (B,2) int, rows and columns by which it moves up and left.  hole: its centre.
    """
    size = x.shape[-1]
    pixel = torch.arange(size, device=x.device)
    x = x + bcast(brightness, x)
    grey = x.mean(1, keepdim=True)
    x = grey.lerp(x, bcast(saturation, x))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean.lerp(x, bcast(contrast, x))
    moved = pixel[:, None] + shift[:, :, None, None] == pixel  # (B,2,H,H): output, input pixel
    rows, columns = moved.to(x).split(1, 1)  # (B,1,H,H) each
    side = int(0.2 * size + 0.5)
    cut = (pixel - hole[:, :, None] + side // 2) // side == 0  # (B,2,H)
    cut_rows, cut_columns = cut.split(1, 1)  # (B,1,H) each
    cut = cut_rows.mT & cut_columns  # (B,H,H)
    x = rows @ x @ columns.mT
    return x * ~cut[:, None]


def random_augment(x):
    """`augment` with DiffAugment's draws."""
    B = len(x)
    size = x.shape[-1]
    reach = int(0.125 * size + 0.5)
    side = int(0.2 * size + 0.5)
    brightness, saturation, contrast = torch.rand(3, B, device=x.device)
    shift = torch.randint(-reach, reach + 1, (B, 2), device=x.device)
    hole = torch.randint(size + 1 - side % 2, (B, 2), device=x.device)
    colours = brightness - 0.5, 2 * saturation, contrast + 0.5
    return augment(x, *colours, shift, hole)


def make_head(layers, widths, **last):
    """These layers, one that halves the size between each two widths, and a last convolution."""
    for c_in, c_out in zip(widths, widths[1:]):
        conv = spectral_norm(nn.Conv2d(c_in, c_out, 4, 2, 1))
        norm = nn.BatchNorm2d(c_out, track_running_stats=False)  # the micro-batch's, always
        layers.append(nn.Sequential(conv, norm, nn.LeakyReLU(0.2)))
    last = spectral_norm(nn.Conv2d(widths[-1], 1, **last))
    return nn.Sequential(*layers, last, nn.Flatten())


class ConvCritic(nn.Module):
    """Small, without pretrained parts: a head on the image, its half and its quarter. Ours."""
    def __init__(self, size, width=64):
        super().__init__()
        self.heads = nn.ModuleList()
        for scale in range(3):
            halvings = int(math.log2(size)) - 2 - scale  # down to 4 pixels
            halvings = max(halvings, 0)
            widths = [width * min(2**i, 4) for i in range(halvings + 1)]
            first = spectral_norm(nn.Conv2d(3, width, 3, padding=1))
            layers = [first, nn.LeakyReLU(0.2)]
            head = make_head(layers, widths, kernel_size=3, padding=1)
            self.heads.append(head)

    def forward(self, x):
        x = random_augment(x)
        logits = []
        for scale, head in enumerate(self.heads):
            small = F.avg_pool2d(x, 2**scale)
            logits.append(head(small))
        return torch.cat(logits, 1)


class Projector(nn.Module):
    """Features of a frozen network, mixed by frozen random convolutions across channels and scales.

    Returns: of images (B,64,112,112) (B,64,56,56) (B,128,28,28) (B,256,14,14).
    Source:  Sauer et al. 2021, arXiv 2111.01007; taps, sizes, random layers: those of CTM's code.
    """
    TAPS = {  # by the name of the network in timm
        "tf_efficientnet_lite0": (1, 2, 3, 4),
        "deit_base_distilled_patch16_224": (2, 5, 8, 11),
    }

    def __init__(self, name, pretrained=True):
        super().__init__()
        timm = common.import_optional("timm", "--disc projected needs timm")
        settings = timm.get_pretrained_cfg(name)
        with common.explain(f"--disc projected: put the weights of {name} ({settings.url}) into "
                            f"{torch.hub.get_dir()}/checkpoints, or choose another --disc"):
            # Without hf_hub_id from torch.hub, which reads files put there, and fails at once.
            features = timm.create_model(
                name, pretrained=pretrained, features_only=True, out_indices=self.TAPS[name],
                pretrained_cfg_overlay=dict(hf_hub_id=None))
        self.features = (features.eval(),)  # in a tuple: no part of the state that is saved
        features.requires_grad_(False)
        moments = torch.tensor([settings.mean, settings.std])
        self.register_buffer("moments", moments.view(2, 3, 1, 1), persistent=False)
        widths = features.feature_info.channels()
        self.reassemble = nn.ModuleList(nn.Identity() for _ in widths)
        if name.startswith("deit"):  # its taps are all (B,768,14,14)
            widths = [96, 192, 384, 768]
            resample = [
                nn.ConvTranspose2d(96, 96, 4, 4),
                nn.ConvTranspose2d(192, 192, 2, 2),
                nn.Identity(),
                nn.Conv2d(768, 768, 3, 2, 1),
            ]
            narrow = [nn.Conv2d(768, width, 1) for width in widths]
            self.reassemble = nn.ModuleList(map(nn.Sequential, narrow, resample))
        mixed = 64, 128, 256, 512
        coarser = 64, 64, 128, 256
        channels = [nn.Conv2d(a, b, 1) for a, b in zip(widths, mixed)]
        scales = [nn.Conv2d(a, b, 1) for a, b in zip(mixed, coarser)]
        self.channels = nn.ModuleList(channels)
        self.scales = nn.ModuleList(scales)
        self.requires_grad_(False)

    def _apply(self, fn, recurse=True):  # .to(device) reaches the frozen network too
        self.features[0]._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, x):
        mean, std = self.moments
        x = ((x + 1) / 2 - mean) / std
        x = F.interpolate(x, (224, 224), mode="bilinear")
        taps = self.features[0](x)
        outputs = []
        coarse = 0.0
        for i in (3, 2, 1, 0):
            tap = self.reassemble[i](taps[i])
            mixed = coarse + self.channels[i](tap)
            large = F.interpolate(mixed, scale_factor=2.0, mode="bilinear", align_corners=True)
            coarse = self.scales[i](large)
            outputs.insert(0, coarse)
        return outputs


class ProjectedCritic(nn.Module):
    """CTM's critic: for each of two feature networks four heads, one a scale, 64 logits in all."""
    def __init__(self, size, pretrained=True):
        super().__init__()
        self.projectors = nn.ModuleList(Projector(name, pretrained) for name in Projector.TAPS)
        self.heads = nn.ModuleList()
        widths = (64, 64, 128, 256, 512)  # a head's last map is 7x7
        for scale in (0, 1, 2, 3) * len(self.projectors):
            head = make_head([], widths[scale:], kernel_size=4, bias=False)
            self.heads.append(head)

    def forward(self, x):
        views = []
        for projector in self.projectors:
            views += projector(random_augment(x))
        logits = [head(view) for head, view in zip(self.heads, views)]
        return torch.cat(logits, 1)


CRITICS = {"conv": ConvCritic, "projected": ProjectedCritic}


def renew_norms(critic):
    """One power iteration of each spectral norm: once a step, on any number of processes."""
    critic.train()
    for layer in critic.modules():
        if nn.utils.parametrize.is_parametrized(layer):
            layer.parametrizations.weight()  # computing it in training mode is what iterates
    critic.eval()


# --------------------------------------------------------------------------------------------------
# Recipes: the paper's, or where it says nothing those of the authors' commands. Digits and "path",
# your own images, are ours. Nothing was published for LSUN: ImageNet's settings stand in.
# --------------------------------------------------------------------------------------------------

CTM = dict(
    matching="soft", solver="heun", dist="lpips", mu=0.999, s_init="published",
    p_t=[-1.2, 1.2], dsm_weight=1.0, dropout=0.0, ema_decay=0.999,
    disc="none", disc_weight=1.0, disc_lr=2e-3)
STUDENTS = {
    "glyphs": dict(
        batch_size=32, total_steps=1300, lr=1e-3, ema_decay=0.997, disc_start=800,
        max_steps=3, dist="huber", mu=0.99, p_t=[-0.6, 1.4]),
    "mnist": dict(
        batch_size=16, total_steps=1300, lr=1e-3, ema_decay=0.998, disc_start=800,
        N=10, max_steps=2, dist="huber", mu=0.99, p_t=[1.0, 1.2]),
    "path": dict(
        batch_size=128, total_steps=100_000, lr=2e-4, disc_start=50_000,
        max_steps=8, dist="huber"),
    "cifar10": dict(
        batch_size=256, total_steps=100_000, lr=4e-4, disc_start=50_000, disc="projected",
        max_steps=17, mu=0.9999, dropout=0.13),
    "imagenet64": dict(
        batch_size=2048, total_steps=30_000, lr=8e-6, disc_start=10_000, disc="projected",
        max_steps=20),
}
SCRATCH = {  # --teacher none: ours
    "glyphs": dict(total_steps=2400, lr=2e-3, mu=0.9),
    "mnist": dict(total_steps=4000, lr=1e-3, mu=0.9),
}


def recipe(flags):
    """The settings for --dataset, --teacher and --matching, general ones first."""
    name = common.known_dataset(flags)
    student = STUDENTS.get(name, STUDENTS["imagenet64"])
    settings = common.DATASETS[name] | CTM | student
    if flags.get("teacher") == "none":
        settings["solver"] = "jump"  # the code's; the paper takes Heun steps of g
        settings |= SCRATCH.get(name, {})
    if flags.get("matching") == "local":
        settings["max_steps"] = 1
    if flags.get("matching") == "global":  # the solver alone has to get from t to s
        settings["max_steps"] = flags.get("N", settings["N"]) - 1
    return settings


def check(args):
    """Raises UserError for values that do not fit each other."""
    if args.solver == "jump" and args.teacher != "none":
        raise UserError("--solver jump applies to --teacher none only: a teacher's step is heun")
    if args.solver == "jump" and args.matching == "global":
        raise UserError("--matching global needs --solver heun: a jump would be its own target")
    if args.matching == "local" and args.max_steps > 1:
        raise UserError("--max-steps does not apply with --matching local: that is one solver step")
    if args.max_steps >= args.N:
        raise UserError(f"--max-steps {args.max_steps}: a grid of --N {args.N} levels has "
                        f"{args.N - 1} steps")
    if args.disc != "none" and args.disc_start >= args.total_steps:
        raise UserError(f"--disc-start {args.disc_start}: with --total-steps {args.total_steps} "
                        "the critic never has its turn")
    if args.dsm_weight == 0 and args.teacher == "none":
        raise UserError("--dsm-weight 0: with --teacher none it is the denoising loss that shows "
                        "the net what images are")
    if args.dsm_weight > 0:
        if args.p_t == ["uniform"]:
            raise UserError("--p-t uniform: the denoising loss draws from MEAN STD")
        common.check_p_t(args.p_t, common.karras_times(args.N))


# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------

def make_parser():
    parser = common.Parser(__doc__)
    chosen = dict(teacher=(None, "none", "ideal"))  # not by a --teacher FILE
    common.add_shared_flags(parser, chosen)

    train = parser.group("algorithm", ckpt=False)
    train.flag("--teacher", metavar="FILE", help="written by cd.py --stage teacher, released EDM "
               "weights, ideal: the exact denoiser of the training images, or none: from scratch "
               "(default: one is trained first)")
    train.flag("--teacher-steps", only=dict(teacher=False), type=positive, metavar="K",
               help="optimizer steps of the teacher that is trained first")
    train.flag("--N", type=number(int, 2), help="noise levels of the grid (CTM 18 or 40)")
    train.flag("--max-steps", type=positive, metavar="M",
               help="solver steps from t to u: k with probability ~ k, k = 1 .. M (CTM 17 of "
               "N = 18, 20 of N = 40; global N - 1; local 1)")
    train.flag("--matching", choices=("soft", "local", "global"),
               help="u, where the target's jump begins: anywhere from s to t (soft, CTM), one step "
               "below t (local), at s (global: the solver's result is the target)")
    train.flag("--solver", choices=("heun", "jump"),
               help="from t to u: Heun steps of the teacher or, from scratch, of the model's own "
               "denoiser (heun, the paper's); one jump of its average (jump, the code's)")
    train.flag("--dist", choices=("l1", "l2", "huber", "lpips"),
               help="distance of estimate and target at t_min (CTM lpips)")
    train.flag("--mu", type=common.probability,
               help="decay of the target network (CTM 0.999)")
    train.flag("--s-init", choices=("published", "zero"),
               help="how the embedding of s starts: at random (CTM), or adding nothing")
    train.flag("--dsm-weight", type=number(float, 0), metavar="W",
               help="of the denoising loss, times its adaptive weight (CTM 1); 0: it is left out")
    train.flag("--p-t", only=dict(dsm_weight=True), nargs="+", type=common.p_of_t,
               metavar="MEAN STD",
               help="of half the denoising loss: ln t ~ Normal(MEAN, STD^2) (CTM -1.2 1.2)")
    train.flag("--disc", choices=("none", *CRITICS),
               help="critic of the adversarial loss: conv, for small images; projected (CTM), on "
               "EfficientNet and DeiT features, needs timm")
    played = dict(disc=tuple(CRITICS))
    train.flag("--disc-start", only=played, type=common.count, metavar="K",
               help="step from which generator and critic take turns, one step each")
    train.flag("--disc-weight", only=played, type=number(float, 0), metavar="W",
               help="of the adversarial loss, times its adaptive weight (CTM 1)")
    train.flag("--disc-lr", only=played, type=number(float, 0), metavar="LR",
               help="learning rate of the critic's RAdam (CTM 2e-3)")

    draw = parser.group("sampling, further flags", ckpt=True)
    draw.flag("--sigmas", nargs="+", type=common.noise_level, metavar="T",
              help="noise levels t, EDM's sigma, largest first, a jump from each (default 80)")
    draw.flag("--steps", only=dict(sigmas=False, edit=False),
              type=positive, metavar="n",
              help="jumps between n + 1 levels of a Karras grid, instead of --sigmas")
    draw.flag("--gamma", only=dict(heun=False, edit=False),
              type=common.probability, metavar="G",
              help="noise put back between jumps: 0 none (default, CTM), 1 all, as in CM")
    draw.flag("--heun", only=dict(sigmas=False, steps=False, edit=False),
              type=number(int, 2), metavar="N",
              help="N Heun steps on the model's denoiser instead, 2 N - 1 calls")
    common.add_zero_shot_flags(parser)
    return parser


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

DSM = "loss_dsm", "lambda_dsm"  # what the log says of a term
GAN = "loss_gan", "lambda_gan"


def train(args, run, stop):
    """Train, or go on with the run found in --out-dir. Returns whether it came to its end."""
    with common.main_process_first(run):  # now, not after days of the teacher's training
        dist = common.make_distance(args.dist, run.device)
        if args.disc == "projected":
            ProjectedCritic(64)  # whether its networks can be had
    if args.teacher is None:
        common.train_first_teacher(args, run, stop, "ctm")
    teacher, settings = common.open_teacher(args, run)
    size = settings["image_size"]
    dataset = common.open_dataset(args, run, size)
    D, classes = common.teacher_denoiser(args, run, teacher, dataset)

    model_args = settings | common.dropout_settings(args) | dict(classes=classes, cond=True)
    common.seed_everything(common.INIT, args.seed)
    net = common.make_net(model_args)
    if args.s_init == "published":
        for block in net.modules():
            if isinstance(block, common.ResBlock):
                block.emb_layers_s[1].reset_parameters()
    if teacher is not None:
        net.load_state_dict(net.state_dict() | teacher.state_dict())
    net = common.place(net, run)
    target = copy.deepcopy(net).requires_grad_(False)  # it drops out too, by masks of its own
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizer = torch.optim.RAdam(net.parameters(), args.lr, foreach=True,
                                  capturable=run.capturable)
    gradients = common.flatten_gradients(net)
    critic = critic_optimizer = None
    if args.disc != "none":
        common.seed_everything(common.INIT, args.seed, 1)
        critic = CRITICS[args.disc](size)
        critic.to(run.device).eval()
        critic_optimizer = torch.optim.RAdam(
            critic.heads.parameters(), args.disc_lr, betas=(0.5, 0.9), foreach=True,
            capturable=run.capturable)
        critic_gradients = common.flatten_gradients(critic.heads)
    totals = common.Totals(run, "loss", *DSM, *GAN, "loss_disc")
    parts = dict(net=net, target=target, ema=ema, optimizer=optimizer, critic=critic,
                 critic_optimizer=critic_optimizer)
    step, skipped = common.resume(args, run, "ctm", model_args, parts)
    common.compile_in_place(run, net, target, teacher)
    if run.compile and critic is not None:  # two gradients go through the graph of x_est
        from torch._functorch import config
        config.donated_buffer = False
    log = common.start_run(args, run, net, step, skipped)

    times = common.karras_times(args.N).to(run.device)

    def own_denoiser(x, t, y):  # from scratch
        return g(target, x, t, t, y)

    D = D or own_denoiser

    def solve(x, i, k, y):
        if args.solver == "jump":
            return G(target, x, times[i], times[i - k], y)
        return heun_solve(D, times, x, i, k, y)

    draws = [partial(sample, ema, step_levels(n), 0.0) for n in (1, 2, 4)]
    share = args.micro_batch / args.batch_size
    disc_weight = getattr(args, "disc_weight", 0.0)
    kinds, optimizers = {}, [optimizer]
    if critic is None or step < args.disc_start:
        kinds["a step"] = step
    if critic is not None:
        first = max(step, args.disc_start)  # its player may be either
        kinds |= {"a step with the critic": first, "the other player's": first + 1}
        optimizers.append(critic_optimizer)
    all_steps = common.steps(args, run, log, totals, dataset, step, kinds, optimizers)
    for step, micro_batches, trial in all_steps:
        # ------------------------------------------------------------------------ one training step
        rng = np.random.default_rng((common.SOLVER, args.seed, step))
        steps = np.arange(1, args.max_steps + 1)
        p = steps / steps.sum()  # P(k) ~ k
        k = int(rng.choice(steps, p=p))  # u lies k levels below t, one k for the whole batch
        adversarial = critic is not None and step >= args.disc_start
        critics_turn = adversarial and (step - args.disc_start) % 2 == 1
        if adversarial:
            critic.heads.requires_grad_(critics_turn)
        if critics_turn and not trial:
            renew_norms(critic)
        player_gradients = critic_gradients if critics_turn else gradients
        player_gradients.zero_()
        totals.zero()
        for m, batch in micro_batches:
            common.seed_everything(common.STEP, args.seed, step, m)
            x0, y = common.to_device(batch, run.device, args.flip)
            y = y if classes else None
            noise = torch.randn_like(x0)
            i, j = draw_indices(len(x0), args.N, k, run.device)
            if args.matching == "global":
                j = i - k  # s = u
            if critics_turn:
                x_t = x0 + bcast(times[i], x0) * noise
                with torch.no_grad():
                    fake = estimate(net, target, x_t, times[i], times[j], y)
                loss_disc = hinge_loss(critic, x0, fake)
                (share * loss_disc).backward()
                totals.add(share, loss_disc=loss_disc)
                continue
            dsm_gradient = None
            if args.dsm_weight > 0:
                t = dsm_times(len(x0), args.p_t, run.device)
                dsm_noise = torch.randn_like(x0)
                dsm = common.edm_loss(net, x0, dsm_noise, t, y, common.c_noise(t)).mean()
                dsm_gradient = torch.autograd.grad(dsm, list(net.parameters()))
                totals.add(share, loss_dsm=dsm)
            losses, x_est = loss_fn(net, target, solve, x0, noise, times, i, j, k, y, dist)
            loss = losses.mean()
            gan = -critic(x_est).mean() if adversarial else None
            weights = add_gradients(
                net, loss, dsm_gradient, gan, args.dsm_weight, disc_weight, share)
            totals.add(share, loss=loss, **weights)
            if adversarial:
                totals.add(share, loss_gan=gan)
            totals.bin(times[i], losses)
        if trial:
            continue
        stopping = common.sum_over_ranks(run, stop, player_gradients, totals)
        grad_norm = torch.linalg.vector_norm(player_gradients).item()
        loss = totals["loss_disc" if critics_turn else "loss"]
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite and critics_turn:
            critic_optimizer.step()
        elif finite:
            optimizer.step()
            common.ema_update(target, net, args.mu)
            common.ema_update(ema, net, args.ema_decay)
        step += 1
        # ------------------------------------------------------------------------------------------
        # log.jsonl: step (of generator and critic in turn, once there is one); images so far; loss,
        # the CTM term, loss_bins, its mean where t is below 0.1, 1, 10, above; loss_dsm, loss_gan,
        # their adaptive weights lambda_dsm, lambda_gan, where there are such terms; loss_disc, the
        # critic's; k; grad_norm; lr; images_per_s; peak_gb; skipped, the steps whose loss or
        # gradient was not finite.
        last = stopping or step == args.total_steps
        values = dict(loss_disc=loss)
        if not critics_turn:
            values = dict(grad_norm=grad_norm, k=k)
            values["loss_bins"] = totals.loss_bins()
            names = ["loss"]
            if args.dsm_weight > 0:
                names += DSM
            if adversarial:
                names += GAN
            for name in names:
                values[name] = totals[name]
        log.step(step, finite, last, player=critics_turn, **values)
        if common.due(args.save_every, step) or last:
            common.save_run(args, run, "ctm", step, log, model_args, parts)
        common.show_samples(args, run, step, log, draws, classes, (3, size, size))
    log.close()
    return log.done == args.total_steps


# --------------------------------------------------------------------------------------------------
# Using a checkpoint
# --------------------------------------------------------------------------------------------------

def use_checkpoint(args, run):
    """`--ckpt`: sample, measure or edit."""
    levels = args.sigmas or [T_MAX]
    if args.steps:
        levels = step_levels(args.steps)
    if args.gamma is not None and len(levels) == 1:
        raise UserError("--gamma says what happens between jumps: name several, by --steps or "
                        "--sigmas")
    net, trained = common.sampling_net(args, run, ("ctm",))
    if not net.cond:
        raise UserError(f"{args.ckpt} holds no CTM: its network has no input s; cd.py takes it")

    def consistency_function(y):
        def f(x, t):
            t_min = torch.full_like(t, T_MIN)
            return G(net, x, t, t_min, y).clamp(-1, 1)
        return f

    if args.edit:
        cd = common.import_beside("cd", "--edit is done by cd.py")
        return cd.edit_images(args, run, net, consistency_function)
    draw = partial(sample, net, levels, args.gamma or 0.0)
    calls = len(levels)
    if args.heun:
        draw = partial(sample_heun, net, args.heun)
        calls = 2 * args.heun - 1
    common.sample_checkpoint(args, run, net, draw, calls, trained)


if __name__ == "__main__":
    args = common.parse_flags(make_parser(), recipe, check)
    run = common.setup(args)
    if args.ckpt:
        use_checkpoint(args, run)
        common.finish(run)
    stop = common.StopSignal()
    ended = train(args, run, stop)
    common.finish(run, None if ended else stop)

# Where this differs from the paper and from the official code
#   inner target      the net, without gradient; outer jumps by the average: code, the paper is open
#   order of draws    t, then u, then s at or below u: code. The paper draws s before u
#   critic's loss     hinge on x_est(x_t, t, s) from --disc-start on: code. The paper's is logistic,
#                     with s = 0 and a warm-up
#   critic's copies   one, projections saved, spectral norms renewed once a step. The code: one a
#                     GPU, new projections when resumed
#   gamma-sampling    sqrt(1 - gamma^2) (t - t_min) + t_min: code; the noise restores t exactly
#   from scratch      one jump of the average for the solver: code. The paper: --solver heun
#   adaptive weights  by the last residual block: code on ImageNet; CIFAR-10: its output convolution
#   learning rate     ImageNet-64 8e-6: the paper; the published command without critic has 4e-4
#   accumulation      micro-batches are averaged; the code sums them
#   dropout           another mask in each call, the average drops out too: code
#   critic's images   shrunk to 224 pixels too: DeiT takes no others
#   critic's logits   batch statistics of a micro-batch: code, but without its unused running ones
