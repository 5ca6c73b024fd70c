"""Consistency training: a one-step generator from scratch, or from a diffusion model.

    python ct.py                                   digits (glyphs) on a laptop, minutes
    python ct.py --recipe ect --out-dir out/ect    digits: trains a diffusion model, then tunes it
    python ct.py --objective scm --teacher none    digits, from scratch, in continuous time
    python ct.py --dataset my_images/              your own: a folder, a zip, an .npz or .npy
    torchrun --nproc_per_node=8 ct.py --dataset imagenet64 --data-dir /data/imagenet64
    python ct.py --ckpt out/ct/last.pt --sample 64 --sigmas 80 1.6 --save out.png

The same command again resumes a run, exactly, on any number of processes.

Papers: Song et al. 2023 (CM, arXiv 2303.01469v2), Algorithm 3, with --recipe ct, and its limit in
continuous time (App. B) with --objective continuous; Song & Dhariwal 2023 (iCT, arXiv 2310.14189)
with --recipe ict, the default; Geng et al. 2024 (ECT, arXiv 2406.14548) with --recipe ect: like
ict, but from a diffusion model, and without a grid: t is any level, t_n = r(t), nearer to t stage
by stage; Lu & Song 2024 (sCM, arXiv 2410.11081) with --objective scm.

Result: 94.3% of one-step and 96.2% of two-step digits are read as the label asked for, 7 minutes
on 2 cores; ect 97.7% and 99.0%, scm 98.6% and 99.5%, from scratch 96.7% and 98.5%. Published: FID
8.70 (CT), 2.83 (iCT), 3.86 (ECT), 2.85 (sCT) on CIFAR-10, 13.0, 4.02, 5.51, 2.04 on ImageNet-64 in
one step, not run here.
"""
import copy
import math
from functools import partial

import torch

import common
from common import UserError, bcast, consistency

# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------

def num_points(k, K, s0, s1, schedule):
    """N(k): how many noise levels the grid has at step k of K; at most s1 + 1, for s1 intervals."""
    if schedule == "sqrt":  # CM App. C
        square = k / K * ((s1 + 1) ** 2 - s0**2) + s0**2
        return math.ceil(math.sqrt(square) - 1) + 1
    doublings = math.log2(s1 // s0)
    stage = max(math.floor(K / (doublings + 1)), 1)  # iCT Table 1: K'
    return min(s0 * 2 ** (k // stage), s1) + 1


def target_decay(N, s0, mu0):
    """mu(k) = exp(s0 ln(mu0) / N(k)), CM App. C; 0 for mu0 = 0."""
    return mu0 ** (s0 / N)  # differs from openai cm: they divide by N(k) - 1


def ect_r(t, stage, q, k, b):
    """r(t) in [0, t), the level of the target, (B,): nearer to t the later the stage = 0, 1, ..

    Source:  ECT, continuous-time schedule; its code counts stages from 0, the paper from 1.
    """
    n = 1 + k * torch.sigmoid(-b * t)
    ratio = 1 - n / q ** (stage + 1)
    return t * ratio.clamp(min=0)


def loss_fn(net, target, x0, noise, t_n, t_n1, y, masks, dist, weight):
    """The consistency training loss of each image. CM Alg. 3, line 5.

    Args:    net: f_theta.  target: f_theta^-, or the net itself.  x0, noise: (B,C,H,W).
             t_n < t_n1: (B,) neighbours on the grid, or ECT's r(t) and t.  y: (B,) labels or None.
             masks: of dropout, the same for both.  dist: (x, y) -> (B,).
             weight: (t_n, t_n1) -> (B,) or a number.
    Returns: (B,). Gradient flows through net(x_tn1) alone.
    """
    # The weight comes first: it sees ECT's r(t) as it is, and r(t) = 0 weighs 1 / t. The networks
    # end at t_min. Weighted after the clamp, a t below t_min would weigh 1 / 0.
    scale = weight(t_n, t_n1)
    t_n = t_n.clamp(min=common.T_MIN)
    t_n1 = t_n1.clamp(min=common.T_MIN)
    x_tn = x0 + bcast(t_n, x0) * noise
    x_tn1 = x0 + bcast(t_n1, x0) * noise
    with torch.no_grad():
        f_target = consistency(target, x_tn, t_n, y, masks=masks)
    f_net = consistency(net, x_tn1, t_n1, y, masks=masks)
    return scale * dist(f_net, f_target)


def continuous_loss(net, x0, noise, t, y, masks):
    """The limit of `loss_fn` for N -> infinity, l2: (B,). CM App. B, Theorem 6."""
    x_t = x0 + bcast(t, x0) * noise
    dx_dt = noise  # (x_t - x0) / t stands for the ODE's slope
    return common.continuous_loss(net, x_t, t, dx_dt, y, None, masks, stop_gradient=True)


def scm_loss(net, x0, noise, t, y, masks, r, c):
    """sCT: the same limit, its derivative normalised. Returns what `common.scm_loss` does."""
    x_t = x0 + bcast(t, x0) * noise
    dx_dt = noise
    return common.scm_loss(net, x_t, t, dx_dt, y, None, masks, r, c)


def weight_edm(t_n, t_n1):
    """1 / t^2 + 1 / sigma_data^2, ECT on ImageNet-64."""
    return 1 / t_n1**2 + 1 / common.SIGMA_DATA**2


WEIGHTS = common.WEIGHTS | {"edm": weight_edm}


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------

@torch.no_grad()
def sample(net, sigmas, y, noise, shape):
    """Draw images (B,C,H,W) in len(sigmas) network calls.

    Each output is clipped to [-1, 1], as for the papers' samples.
    """
    def f(x, t):
        return consistency(net, x, t, y).clamp(-1, 1)
    x_T = common.initial_noise(net, noise, shape, sigmas[0])
    return common.multistep_sample(f, x_T, sigmas, noise)


# --------------------------------------------------------------------------------------------------
# Recipes: CM Table 3, iCT's published settings and ECT's; digits and "path", your own images, are
# ours. `sigmas`: levels of the two-step samples, CM's time points, iCT's 0.821 and 1.526, or ours.
# --------------------------------------------------------------------------------------------------

METHODS = {  # what sets the methods apart, iCT Table 1
    "ct": dict(teacher="none", schedule="sqrt", s0=2, dist="lpips",
               p_t=["uniform"], weighting="one", dropout=0.0),
    "ict": dict(teacher="none", schedule="double", s0=10, s1=1280, mu0=0.0, dist="huber",
                p_t=[-1.1, 2.0], weighting="inverse", dropout=0.0),
    "ect": dict(q=4.0, stages=4, mapping=[8.0, 1.0], dist="norm",
                p_t=[-1.1, 2.0], weighting="inverse", dropout=0.0),
}
LSUN = dict(net=["lsun256"], flip=True, micro_batch=8, class_cond=False,
            batch_size=2048, lr=1e-5, ema_decay=0.999943, total_steps=1_000_000)
DATASETS = {
    "glyphs": dict(net=["glyphs"], flip=False, micro_batch=32, sigmas=[80.0, 1.6],
                   batch_size=32, lr=1e-3, ema_decay=0.997, total_steps=3600),
    "mnist": dict(net=["mnist"], flip=False, micro_batch=16, sigmas=[80.0, 2.515],
                  batch_size=16, ema_decay=0.998, total_steps=6500,
                  lr=5e-4),  # at 1e-3 iCT forgets its digits
    "path": dict(net=["cifar-small"], flip=True, micro_batch=32, sigmas=[80.0, 0.821],
                 batch_size=128, lr=4e-4, ema_decay=0.9995, total_steps=100_000),
    "cifar10": dict(net=["cifar10"], flip=True, micro_batch=128, sigmas=[80.0, 0.821],
                    class_cond=False),
    "imagenet64": dict(net=["imagenet64"], flip=True, micro_batch=64, sigmas=[80.0, 1.526],
                       class_cond=True),
    "bedroom256": LSUN | dict(sigmas=[80.0, 3.99122]),
    "cat256": LSUN | dict(sigmas=[80.0, 5.2485]),
}
ICT_IMAGENET = dict(dropout=0.2, dropout_size=16)
ECT_IMAGENET = dict(batch_size=128, ema_decay=0.9999, total_steps=100_000, flip=False,
                    dropout=0.4, dropout_size=16,
                    dist="huber",  # iCT's c is ECT's 0.06 here
                    p_t=[-0.8, 1.6], weighting="edm")
LSUN_METHODS = {  # iCT and ECT have published none: as on ImageNet
    "ct": dict(s1=150, mu0=0.95),
    "ict": ICT_IMAGENET,
    "ect": ECT_IMAGENET | dict(lr=1e-5),
}
RECIPES = {
    "glyphs": {
        "ct": dict(s1=20, mu0=0.9, dist="l2"),
        "ict": dict(s1=40, p_t=[0.0, 1.6]),
        "ect": dict(q=16.0, stages=1, total_steps=1000, p_t=[0.0, 1.6]),
    },
    "mnist": {
        "ct": dict(s1=20, mu0=0.9, dist="l2"),
        "ict": dict(s1=10, p_t=[0.8, 1.4]),  # N stays 11: when it doubled, 13% were read
        "ect": dict(q=16.0, stages=1, total_steps=2000, p_t=[0.8, 1.4]),
    },
    "path": {
        "ct": dict(s1=150, mu0=0.9),
        "ict": {},
        "ect": dict(lr=1e-4),
    },
    "cifar10": {
        "ct": dict(batch_size=512, lr=4e-4, ema_decay=0.9999, total_steps=800_000,
                   s1=150, mu0=0.9),
        "ict": dict(batch_size=1024, lr=1e-4, ema_decay=0.99993, total_steps=400_000,
                    dropout=0.3),
        "ect": dict(batch_size=128, lr=1e-4, ema_decay=0.9999, total_steps=200_000,
                    dropout=0.2, q=2.0, stages=8, flip=False),
    },
    "imagenet64": {
        "ct": dict(batch_size=2048, lr=8e-6, ema_decay=0.999943, total_steps=800_000,
                   s1=200, mu0=0.95, sigmas=[80.0, 1.91284]),
        "ict": ICT_IMAGENET | dict(batch_size=4096, lr=1e-4, ema_decay=0.99997,
                                   total_steps=800_000, net=["imagenet64", "scale_shift=false"]),
        "ect": ECT_IMAGENET | dict(lr=1e-4),
    },
    "bedroom256": LSUN_METHODS,
    "cat256": LSUN_METHODS,
}
# --objective continuous: openai's JAX code, CIFAR-10; that of small runs is ours.
CONTINUOUS = dict(lr=5e-6, dropout=0.3)
OUR_CONTINUOUS = dict.fromkeys((*common.DIGITS, "path"), dict(lr=1e-4))
# --objective scm: sCM Tables 3 and 4, of CIFAR-10 by later reimplementations; LSUN like ImageNet.
SCM_IMAGENET = dict(batch_size=2048, total_steps=400_000, ema_decay=0.999943, p_t=[-1.0, 1.6],
                    dropout=0.45, dropout_size=16, lr_decay=35_000, sigmas=[80.0, 0.98238])
SCM_DATASETS = {
    "glyphs": dict(total_steps=1500, p_t=[0.0, 1.6], r=0.2, warm_up=100),
    "mnist": dict(total_steps=2000, p_t=[0.8, 1.4], r=0.2, warm_up=100),
    "path": {},
    "cifar10": dict(batch_size=512, total_steps=400_000, ema_decay=0.99929, dropout=0.2,
                    p_t=[-1.0, 1.8]),
}
SCRATCH = {"glyphs": dict(lr=1e-3, r=0.1, warm_up=1500),
           "mnist": dict(lr=5e-4, r=0.1, warm_up=1500)}  # --teacher none: ours


def recipe(flags):
    """The settings of --recipe for --dataset, general ones first."""
    objective = flags.get("objective", "discrete")
    method = flags.get("recipe", "ict" if objective == "discrete" else "ct")
    name = common.known_dataset(flags)
    settings = dict(recipe=method, objective="discrete") | METHODS[method]
    settings |= DATASETS[name] | RECIPES[name][method]
    if objective == "discrete":
        if method != "ct" and name not in (*common.DIGITS, "path"):
            settings["precision"] = "tf32"
        return settings
    bandwidth = 1.0 if name in common.DIGITS else common.BANDWIDTH
    settings |= dict(teacher=None, bandwidth=bandwidth)
    if objective == "continuous":
        return settings | dict(p_t=["uniform"]) | OUR_CONTINUOUS.get(name, CONTINUOUS)
    settings |= common.SCM | SCM_DATASETS.get(name, SCM_IMAGENET)
    if flags.get("teacher") == "none":
        settings |= SCRATCH.get(name, dict(r=0.1))
    return settings


def check(args):
    """Raises UserError for values that do not fit each other."""
    ect = args.recipe == "ect"
    grid = not ect and args.objective == "discrete"
    if grid and args.teacher != "none":
        raise UserError(f"--teacher does not apply with --recipe {args.recipe}, which starts from "
                        "random weights; --recipe ect takes one")
    if args.teacher == "ideal":
        raise UserError("--teacher ideal has no weights to start from; name a file")
    if args.recipe != "ct" and args.objective != "discrete":
        raise UserError(f"--objective {args.objective} does not apply with --recipe {args.recipe}")
    if ect and args.q**args.stages > 1e5:  # float32 has 7 digits
        raise UserError(f"--q {args.q:g} --stages {args.stages}: in the last stage r and t would "
                        "be the same number")
    times = common.karras_times(2)
    if grid:
        if args.s1 < args.s0:
            raise UserError(f"--s1 {args.s1} is below --s0 {args.s0}: the number of noise levels "
                            "grows")
        if num_points(0, args.total_steps, args.s0, args.s1, args.schedule) < 2:
            raise UserError(f"--s0 {args.s0} leaves no interval to train on; name 2 or more")
        times = common.karras_times(args.s1 + 1)
    common.check_p_t(args.p_t, times)


# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------

def make_parser():
    parser = common.Parser(__doc__)
    built = dict(teacher=(None, "none"))  # not like a --teacher FILE
    common.add_shared_flags(parser, built)

    train = parser.group("algorithm", ckpt=False)
    train.flag("--recipe", choices=METHODS,
               help="ict (default): improved consistency training; ct: the seed paper; ect: from a "
               "diffusion model")
    train.flag("--objective", choices=("discrete", "continuous", "scm"),
               help="CM Algorithm 3 (default), its limit N -> infinity, or sCM's form of that")
    grid = dict(recipe=("ct", "ict"), objective="discrete")
    train.flag("--schedule", only=grid, choices=("sqrt", "double"),
               help="how N(k), the number of noise levels, grows")
    train.flag("--s0", only=grid, type=common.positive, metavar="N",
               help="where N(k) starts: points (sqrt, CM 2) or intervals (double, iCT 10)")
    train.flag("--s1", only=grid, type=common.positive, metavar="N",
               help="intervals at the end (CM 150 to 200, iCT 1280)")
    train.flag("--mu0", only=grid, type=common.probability, metavar="MU",
               help="target's decay at the start (CM 0.9 to 0.95); 0: the target is the net itself "
               "(iCT)")
    train.flag("--teacher", metavar="FILE",
               help="ect, continuous, scm: the diffusion model to start from, written by cd.py "
               "--stage teacher or released EDM weights, or none: random weights (default: one is "
               "trained first, by cd.py's recipe)")
    train.flag("--teacher-steps", only=dict(teacher=False), type=common.positive, metavar="K",
               help="optimizer steps of the teacher that is trained first")
    ect = dict(recipe="ect")
    train.flag("--q", only=ect, type=common.number(float, 1), metavar="Q",
               help="r(t) = t max(0, 1 - n(t) / Q^(a + 1)) in stage a = 0, 1, .. (ECT 2 to 256)")
    train.flag("--stages", only=ect, type=common.positive, metavar="A",
               help="stages of equal length (ECT CIFAR-10 8, ImageNet-64 4)")
    train.flag("--mapping", only=ect, type=common.number(float, 0), nargs=2,
               metavar=("K", "B"), help="n(t) = 1 + K sigmoid(-B t) (ECT 8 1)")
    discrete = dict(objective="discrete")
    train.flag("--dist", only=discrete, choices=("l1", "l2", "norm", "huber", "lpips"),
               help="distance between the two outputs; norm: l2 without the square (ECT CIFAR-10)")
    train.flag("--weighting", only=discrete, choices=WEIGHTS,
               help="of an interval: 1, or 1 / (t_n1 - t_n), or edm: 1 / t_n1^2 + 1 / sigma_data^2 "
               "(ECT ImageNet-64)")
    train.flag("--p-t", nargs="+", type=common.p_of_t, metavar="MEAN STD",
               help="draw intervals by ln t ~ Normal(MEAN, STD^2) (iCT, ECT -1.1 2.0), or the one "
               "word uniform (CM)")
    common.add_parametrisation_flag(train)
    common.add_continuous_flags(train)
    both = parser.group("sampling and training, further flags")
    both.flag("--sigmas", nargs="+", type=common.noise_level, metavar="T",
              help="noise levels t, EDM's sigma, largest first, one network call each (default "
              "when sampling: 80, one step)")
    return parser


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

def train(args, run, stop):
    """Train, or go on with the run found in --out-dir. Returns whether it came to its end."""
    ect = args.recipe == "ect"
    discrete = args.objective == "discrete"
    scm = args.objective == "scm"
    grid = discrete and not ect
    if discrete:
        with common.main_process_first(run):  # now, not after days of the teacher's training
            dist = common.make_distance(args.dist, run.device)
        weight = WEIGHTS[args.weighting]
    if args.teacher is None:
        common.train_first_teacher(args, run, stop, "ct")
    teacher, settings = common.open_teacher(args, run)
    size = settings["image_size"]
    dataset = common.open_dataset(args, run, size)
    _, classes = common.teacher_denoiser(args, run, teacher, dataset)

    model_args = settings | common.dropout_settings(args) | dict(classes=classes)
    if discrete:
        model_args["parametrisation"] = args.parametrisation
    net = common.new_network(args, run, model_args, teacher)
    del teacher
    if not discrete:
        common.cut_time_embedding(net, args.bandwidth)
    target = copy.deepcopy(net).requires_grad_(False) if grid and args.mu0 > 0 else net
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizer = torch.optim.RAdam(net.parameters(), args.lr, foreach=True,
                                  capturable=run.capturable)
    gradients = common.flatten_gradients(net)
    totals = common.Totals(run, "loss")
    parts = dict(net=net, ema=ema, optimizer=optimizer, target=None if target is net else target)
    step, skipped = common.resume(args, run, "ct", model_args, parts)
    common.compile_in_place(run, net, target)
    log = common.start_run(args, run, net, step, skipped)

    one_step = partial(sample, ema, [common.T_MAX])
    draws = [one_step, partial(sample, ema, args.sigmas)]
    all_steps = common.steps(args, run, log, totals, dataset, step, {"a step": step}, [optimizer])
    for step, micro_batches, trial in all_steps:
        # ------------------------------------------------------------------------ one training step
        N = mu = stage = None
        if ect:
            stage = step * args.stages // args.total_steps
        if grid:
            N = num_points(step, args.total_steps, args.s0, args.s1, args.schedule)
            mu = target_decay(N, args.s0, args.mu0)
            times = common.karras_times(N)
            p = common.interval_probabilities(times, args.p_t).to(run.device)
            times = times.to(run.device)
        gradients.zero_()
        totals.zero()
        for m, batch in micro_batches:
            common.seed_everything(common.STEP, args.seed, step, m)
            x0, y = common.to_device(batch, run.device, args.flip)
            y = y if classes else None
            if grid:  # CM Alg. 3, line 3
                n = torch.multinomial(p, len(x0), replacement=True)
                t_n = times[n]
                t = times[n + 1]
            else:
                t = common.random_times(len(x0), args.p_t, run.device)
            if ect:
                t_n = ect_r(t, stage, args.q, *args.mapping)
            noise = torch.randn_like(x0)
            masks = common.dropout_masks(net, len(x0))
            if discrete:
                losses = loss_fn(net, target, x0, noise, t_n, t, y, masks, dist, weight)
            else:
                t = t.clamp(common.T_MIN, common.T_MAX)
                if scm:
                    r = args.r * min((step + 1) / args.warm_up, 1)
                    losses, rms = scm_loss(net, x0, noise, t, y, masks, r, args.tangent_c)
                else:
                    losses = continuous_loss(net, x0, noise, t, y, masks)
            (losses.sum() / args.batch_size).backward()
            totals.add(1 / args.batch_size, loss=losses.sum())
            totals.bin(t, rms if scm else losses)
        if trial:
            continue
        stopping = common.sum_over_ranks(run, stop, gradients, totals)
        grad_norm = torch.linalg.vector_norm(gradients).item()
        finite = math.isfinite(totals["loss"]) and math.isfinite(grad_norm)
        lr = common.learning_rate(args, step)
        optimizer.param_groups[0]["lr"] = lr
        if finite:
            optimizer.step()  # CM Alg. 3, line 6
            if target is not net:
                common.ema_update(target, net, mu)  # line 7
            common.ema_update(ema, net, args.ema_decay)
        step += 1
        # ------------------------------------------------------------------------------------------
        # log.jsonl: loss_bins is the mean loss where t_n1 is below 0.1, 1, 10 and above; of scm
        # tangent_bins, that of the tangent's rms: the loss is near 1 by construction
        last = stopping or step == args.total_steps
        bins = "tangent_bins" if scm else "loss_bins"
        values = dict(loss=totals["loss"], grad_norm=grad_norm, lr=lr)
        values[bins] = totals.loss_bins()
        log.step(step, finite, last, N=N, mu=mu, stage=stage, **values)
        if common.due(args.save_every, step) or last:
            common.save_run(args, run, "ct", step, log, model_args, parts, levels=N)
        common.show_samples(args, run, step, log, draws, classes, (3, size, size))
    log.close()
    return log.done == args.total_steps


# --------------------------------------------------------------------------------------------------
# Using a checkpoint
# --------------------------------------------------------------------------------------------------

def use_checkpoint(args, run):
    """`--ckpt`: sample or measure; cd.py edits with it."""
    net, trained = common.sampling_net(args, run, ("ct",))
    sigmas = args.sigmas = args.sigmas or [common.T_MAX]
    if run.main:
        common.note_levels(net, sigmas)
    draw = partial(sample, net, sigmas)
    common.sample_checkpoint(args, run, net, draw, len(sigmas), trained)


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
#   mu(k)             exp(s0 ln mu0 / N(k)), the paper's; openai's code divides by N(k) - 1
#   N(k)              ends at total steps; openai's code never stops, and N grows on
#   start of CT       random weights, as in the paper; openai's launch file: from EDM's teacher
#   learning rate     CT on ImageNet-64 8e-6, on LSUN 1e-5 at batch 2048: the paper's Table 3;
#                     openai's launch file: 1e-4, and 5e-5 at batch 256
#   LPIPS             pools by the average, as openai's code; its JAX code, CIFAR-10: the maximum
#   continuous CT     starts from a diffusion model, as openai's JAX code; --teacher none: from
#                     random weights. Its learning rate and dropout are CIFAR-10's everywhere
#   glyphs, ct        l2: LPIPS judges 16-pixel digits badly and needs a download
#   pseudo-Huber      one norm per image, as in iCT; a common reimplementation takes it by elements
#   ECT, the end      t_min = 0.002 in training and sampling; r is t_min at least, and there the
#                     target is x0 + t_min noise. ECT's code: the end at 0, x0 itself the target
#   ECT, ImageNet-64  ADM net, RAdam, learning rate 1e-4 constant, dropout 0.4. ECT tunes EDM2
#                     nets: Adam, 1e-3 to 7e-4 falling like 1/sqrt(step), dropout 0.4 (S) to 0.5
#   ECT, mirroring    of no image, as in its code; nor for the teacher that is trained first
#   iCT, ECT, LSUN    nothing published: dropout, and ECT's settings, are ImageNet-64's
#   precision         iCT, ECT: TF32 on CUDA, as ECT's ImageNet-64; ECT on CIFAR-10: fp32; iCT does
#                     not say; so does the teacher that is trained first. CT: bf16, the rest TF32;
#                     CM: fp32 on CIFAR-10, else fp16
#   ECT, c            0.0599 for 64 pixels, iCT's formula; ECT's is 0.06. --dist norm is c = 0,
#                     with gradient 0 where outputs are equal; its code makes NaN of it, then 0
#   ECT, stages       of equal length, for any number of steps; its code counts ticks
#   continuous, scm   see cd.py
#   sCT               from a diffusion model, as in the paper; --teacher none: from random weights,
#                     r held at 0.1
#   dropout           one mask for both branches, on every device, compiled or not; openai's code
#                     replays the CPU's random numbers
