"""Consistency distillation: a diffusion model made into a one-step generator. And that model.

Without --teacher a diffusion model is trained first, as EDM does, and then distilled; with --w-max
so is its guidance, and the weight w becomes an input of the student.
Papers: Song et al. 2023 (CM, arXiv 2303.01469v2): Alg. 2, its limits (App. B), editing (Alg. 4).
Lu & Song 2024 (sCM, 2410.11081): --objective scm. Karras et al. 2022 (EDM, 2206.00364): the
teacher. Ho & Salimans 2022 (2207.12598): guidance.

    python cd.py                                       digits: a teacher, then the student, minutes
    python cd.py --teacher ideal --dataset images.npz
    torchrun --nproc_per_node=8 cd.py --stage teacher --dataset imagenet64 --data-dir DIR
    python cd.py --ckpt out/cd/last.pt --sample 64 --sigmas 80 1.6 --save out.png
    python cd.py --ckpt out/cd/last.pt --edit inpaint --image photo.png --labels 3

The same command again resumes a run, exactly, on any number of processes. `--ckpt` takes what cd.py
and ct.py write, and released consistency models and EDM teachers (the latter --stage teacher).

Result: of digits drawn in one and two steps 97.7 and 98.4% are read as the label asked for, of the
teacher's in 35 99.4%, after 12 minutes on 2 cores; with --objective scm 99.2 and 99.7%. Published:
FID in one and two steps on CIFAR-10 3.55 and 2.93 (scm 3.66, 2.52), on ImageNet-64 6.20 and 4.70
(scm, XL net 2.44, 1.66).
"""
import argparse
import copy
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from common import (T_MAX, T_MIN, SeededNoise, UserError, bcast, c_guidance, consistency, guide,
                    karras_times, multistep_sample, number)

# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------

SOLVERS = {"heun": common.heun_step, "euler": common.euler_step}


def loss_fn(net, target, D, x0, noise, t_n, t_n1, y, w, masks, solver, dist, weight):
    """The consistency distillation loss of each image.

    Args:    net: f_theta.  target: f_theta^-, or the net itself.  D: the teacher, (x, t, y or None)
             -> denoised x.  x0, noise: (B,C,H,W).  t_n < t_n1: (B,) neighbours on the grid.
             y: (B,) labels or None.  w: (B,) guidance weights or None.  masks: of dropout, the
             same for net and target.  solver: of SOLVERS.  dist: (x, y) -> (B,).
             weight: (t_n, t_n1) -> (B,) or a number.
    Returns: (B,). Gradient flows through net(x_tn1) alone.
    Source:  CM Alg. 2, lines 4 to 6.
    """
    x_tn1 = x0 + bcast(t_n1, x0) * noise
    with torch.no_grad():
        x_tn = solver(guide(D, y, w), x_tn1, t_n1, t_n)
        f_target = consistency(target, x_tn, t_n, y, c_guidance(w), masks)
    f_net = consistency(net, x_tn1, t_n1, y, c_guidance(w), masks)
    return weight(t_n, t_n1) * dist(f_net, f_target)


def ode_path(D, x0, noise, t, y, w):
    """x_t and dx/dt of the probability-flow ODE there, by the teacher: (B,C,H,W) each."""
    x_t = x0 + bcast(t, x0) * noise
    with torch.no_grad():
        x_denoised = guide(D, y, w)(x_t, t)
    return x_t, (x_t - x_denoised) / bcast(t, x_t)


def continuous_loss(net, D, x0, noise, t, y, w, masks, stop_gradient):
    """The limit of `loss_fn` for N -> infinity, l2; arguments as there, t: (B,). Returns (B,).

    Source:  CM App. B, Theorems 3 and 5.
    """
    x_t, dx_dt = ode_path(D, x0, noise, t, y, w)
    return common.continuous_loss(net, x_t, t, dx_dt, y, c_guidance(w), masks, stop_gradient)


def scm_loss(net, D, x0, noise, t, y, w, masks, r, c):
    """sCD: the same limit, its derivative normalised. Returns what `common.scm_loss` does."""
    x_t, dx_dt = ode_path(D, x0, noise, t, y, w)
    return common.scm_loss(net, x_t, t, dx_dt, y, c_guidance(w), masks, r, c)


def hide_labels(y, share, null_y):
    """Labels (B,), a `share` of them replaced by the null label: so that a teacher can guide."""
    hidden = torch.rand(len(y), device=y.device) < share
    return torch.where(hidden, null_y, y)


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------

def consistency_function(net, y, w=0.0):
    """f(x, t) to sample with. Each output is clipped to [-1, 1], as for the papers' samples."""
    def f(x, t):
        cond = c_guidance(torch.full_like(t, w)) if net.cond else None
        return consistency(net, x, t, y, cond).clamp(-1, 1)
    return f


@torch.no_grad()
def sample(net, sigmas, y, noise, shape, w=0.0):
    """Draw images (B,C,H,W) with a consistency model, in len(sigmas) network calls."""
    x_T = common.initial_noise(net, noise, shape, sigmas[0])
    return multistep_sample(consistency_function(net, y, w), x_T, sigmas, noise)


@torch.no_grad()
def sample_teacher(net, N, y, noise, shape, w=0.0, churn=0.0, sampler="heun"):
    """Draw images (B,C,H,W) with a teacher in N steps of a sampler; churn: of heun alone."""
    x_T = common.initial_noise(net, noise, shape, T_MAX)
    weights = x_T.new_full((len(x_T),), w) if w else None
    D = guide(common.net_denoiser(net), y, weights)
    solve = common.SAMPLERS[sampler]
    if churn:
        solve = partial(solve, churn=churn)
    return solve(D, x_T, N, noise=noise)


# --------------------------------------------------------------------------------------------------
# Editing with a consistency function that was never trained to. CM Sec. 6.3, App. D
# --------------------------------------------------------------------------------------------------

def edit(f, y, known, taus, noise=torch.randn_like):
    """Fill in what an image does not say: (B,C,H,W) whose known part is y's. Source: CM Alg. 4.

    f, taus, noise: as `common.multistep_sample`. y: (B,C,H,W) reference. known: x -> the part of x
    that y tells, an orthogonal projection: CM's A^-1[(A x)(1 - Omega)].
    """
    def draw(x_hat, tau):
        x = f(x_hat, common.levels_like(x_hat, tau))
        return x - known(x) + known(y)

    x_T = known(y) + taus[0] * noise(y)
    x = draw(x_T, taus[0])
    for tau in taus[1:]:
        x = draw(common.renoised(x, tau, noise), tau)
    return x


LUMINANCE = 0.2989, 0.5870, 0.1140  # of red, green and blue


def luminance(x):
    """Each pixel's colour, projected onto the direction of luminance: what a grey picture says."""
    weights = x.new_tensor(LUMINANCE)
    q = F.normalize(weights, dim=0).view(3, 1, 1)
    return q * (q * x).sum(1, keepdim=True)


def grey(x):
    """A grey picture, to look at: the projection is tinted."""
    weights = x.new_tensor(LUMINANCE).view(3, 1, 1)
    return (weights * x).sum(1, keepdim=True).expand_as(x)


def patch_means(x, factor):
    """Each factor x factor patch replaced by its mean: what a small picture says."""
    means = F.avg_pool2d(x, factor)
    return means.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def slerp(z1, z2, a):
    """Unit noise between z1 (a = 0) and z2 (a = 1) on the arc of each image; a: (B,). CM App. D."""
    cosine = F.cosine_similarity(z1.flatten(1), z2.flatten(1))
    psi = bcast(cosine.arccos(), z1)
    a = bcast(a, z1)
    return (((1 - a) * psi).sin() * z1 + (a * psi).sin() * z2) / psi.sin()


GRID = karras_times(40).tolist()[:0:-1]  # all levels of N = 40 but t_min, whose f is x
TASKS = dict(inpaint=GRID, colorize=GRID, superres=GRID, stroke=[5.38, 2.24], denoise=[0.296442],
             interpolate=[T_MAX])  # the noise levels of each, CM App. D


def check_edit(args, net, factor):
    """Raises UserError if what `--edit` is given does not fit it, or the network."""
    if args.edit != "interpolate":
        common.check_images(args, net)
    elif args.image:
        raise UserError("--edit interpolate goes from noise to noise: no --image")
    if args.edit == "superres" and net.image_size % factor:
        raise UserError(f"--factor {factor} does not divide the network's {net.image_size} pixels")
    if args.noise_level and args.sigmas:
        raise UserError("--noise-level and --sigmas both say how noisy the images are: name one")


def known_part(task, hole, factor):
    """x -> the part of x that the image of the task tells, a projection; None if it tells none."""
    parts = dict(
        inpaint=lambda x: (1 - hole) * x,
        colorize=luminance,
        superres=partial(patch_means, factor=factor))
    return parts.get(task)


def edit_images(args, run, net, f):
    """`--edit`. A row of the picture: what the model is given, the results, the original, if any.
    f: y (b,) or None -> the consistency function (x, t) -> (b,C,H,W) for these labels."""
    task, size = args.edit, net.image_size
    factor = args.factor or max(2, size // 32)
    check_edit(args, net, factor)
    sigmas = [args.noise_level] if args.noise_level else args.sigmas or TASKS[task]
    if run.main:
        common.note_levels(net, sigmas)
    each = dict(interpolate=10, denoise=1).get(task, 4)  # results of a row
    each = args.sample or each
    labels = args.labels or range(min(net.classes, 8) or 4)
    rows = len(args.image or labels)
    read = [common.read_image(name, size, factor if task == "superres" else None)
            for name in args.image or ()]
    before = after = None  # what a picture shows beside the results
    if read:
        originals = torch.stack([image for image, _ in read]).to(run.device)
        before = originals
    hole = common.read_mask(args.mask, size, args.image or ()).to(run.device)
    known = known_part(task, hole, factor)
    if known:
        before = grey(originals) if task == "colorize" else known(originals)
    if task == "denoise" and not args.noisy:
        noise = SeededNoise(torch.arange(rows), args.seed)
        before = originals + sigmas[0] * noise(originals)
    if known or (task == "denoise" and not args.noisy):
        wholes = [image if whole else torch.ones_like(image)
                  for image, whole in read]
        after = torch.stack(wholes)

    @torch.no_grad()
    def draw(y, noise, shape):
        row, place = noise.indices // each, noise.indices % each
        zeros = torch.zeros(shape, device=run.device)
        if task == "interpolate":  # its ends, and the noise of further levels, are a row's
            left = SeededNoise(2 * row, args.seed)
            right = SeededNoise(2 * row + 1, args.seed)
            share = place / max(each - 1, 1)
            z = slerp(left(zeros), right(zeros), share)
            return multistep_sample(f(y), sigmas[0] * z, sigmas, right)
        z = noise(zeros)
        if known:
            return edit(f(y), originals[row], known, sigmas, noise)
        x = originals[row] + sigmas[0] * z if task == "stroke" else before[row]
        return multistep_sample(f(y), x, sigmas, noise)

    summary = f"{len(sigmas)} network call(s)"
    common.draw_edits(args, run, net, draw, rows, each, summary, before, after)


# --------------------------------------------------------------------------------------------------
# Recipes: the teachers' are EDM's, for LSUN CM's; the students' CM Table 3. Digits, tuned on 2
# cores, and "path", your own images, are ours. `sigmas`: CM's two time points, or ours.
# --------------------------------------------------------------------------------------------------

LSUN_TEACHER = dict(batch_size=2048, lr=1e-4, dropout=0.1, ema_decay=0.9999432)
TEACHERS = {
    "glyphs": dict(batch_size=32, total_steps=2600, lr=2e-3, ema_decay=0.997,
                   p_t=[-0.6, 1.4]),
    "mnist": dict(batch_size=16, total_steps=5000, lr=2e-3, ema_decay=0.9985,
                  p_t=[1.0, 1.2]),
    "path": dict(batch_size=128, total_steps=100_000, lr=4e-4, ema_decay=0.9995),
    "cifar10": dict(batch_size=512, total_steps=400_000, lr=1e-3, ema_decay=0.99929,
                    dropout=0.13, lr_ramp=10_000_000),
    "imagenet64": dict(batch_size=4096, total_steps=610_000, lr=1e-4, ema_decay=0.9999432,
                       dropout=0.1, lr_ramp=10_000_000),
    "bedroom256": LSUN_TEACHER | dict(total_steps=600_000),
    "cat256": LSUN_TEACHER | dict(total_steps=300_000),
}
CD = dict(stage="distill", objective="discrete", solver="heun", dist="lpips",
          p_t=["uniform"], weighting="one", mu=0.0, dropout=0.0, w_max=0.0,
          stop_gradient=True)
OURS = dict(dist="huber", weighting="inverse")
LSUN = dict(batch_size=2048, total_steps=600_000, lr=1e-5, ema_decay=0.999943,
            mu=0.95, sigmas=[80.0, 4.36556])
STUDENTS = {
    "glyphs": dict(batch_size=32, total_steps=3000, lr=1e-3, ema_decay=0.997,
                   sigmas=[80.0, 1.6], **OURS),
    "mnist": dict(batch_size=16, total_steps=3000, lr=1e-3, ema_decay=0.998,
                  solver="euler", N=9,  # the errors of many small steps add up to more
                  sigmas=[80.0, 2.0], **OURS),
    "path": dict(batch_size=128, total_steps=100_000, lr=2e-4, ema_decay=0.9995,
                 sigmas=[80.0, 0.585348], **OURS),
    "cifar10": dict(batch_size=512, total_steps=800_000, lr=4e-4, ema_decay=0.9999,
                    sigmas=[80.0, 0.585348]),
    "imagenet64": dict(batch_size=2048, total_steps=600_000, lr=8e-6, ema_decay=0.999943,
                       mu=0.95, sigmas=[80.0, 1.38237]),
    "bedroom256": LSUN,
    "cat256": LSUN,
}
CONTINUOUS_LR = {True: 5e-6, False: 1e-3}  # by stop_gradient: openai's JAX code, CIFAR-10
# sCM Tables 3 and 4, of CIFAR-10 by later reimplementations; LSUN like ImageNet.
SCM_IMAGENET = dict(total_steps=400_000, p_t=[-1.0, 1.6], lr_decay=35_000, sigmas=[80.0, 0.98238])
SCM_STUDENTS = {
    "glyphs": dict(total_steps=1500, p_t=[0.0, 1.6], r=0.2, warm_up=100),
    "mnist": dict(total_steps=2000, p_t=[0.8, 1.4], r=0.2, warm_up=100),
    "path": {},
    "cifar10": dict(total_steps=400_000, ema_decay=0.99929, sigmas=[80.0, 0.821]),
}


def teacher_recipe(flags):
    """The settings of a teacher for --dataset, general ones first."""
    name = common.known_dataset(flags)
    settings = dict(stage="teacher", teacher="none", out_dir="out/cd/teacher",
                    p_t=[-1.2, 1.2], dropout=0.0, label_dropout=0.0)
    return common.DATASETS[name] | settings | TEACHERS[name]


def recipe(flags):
    """The settings for --stage, --dataset and --objective, general ones first."""
    if flags.get("stage") == "teacher":
        return teacher_recipe(flags)
    name = common.known_dataset(flags)
    settings = common.DATASETS[name] | CD | STUDENTS[name]
    objective = flags.get("objective", "discrete")
    if objective == "discrete":
        return settings
    settings["bandwidth"] = 1.0 if name in common.DIGITS else common.BANDWIDTH
    if objective == "scm":
        return settings | common.SCM | SCM_STUDENTS.get(name, SCM_IMAGENET)
    if name in (*common.DIGITS, "path"):
        return settings | dict(lr=1e-4)
    stop_gradient = flags.get("stop_gradient", True)
    return settings | dict(lr=CONTINUOUS_LR[stop_gradient], dropout=0.3)


def check(args):
    """Raises UserError for values that do not fit each other."""
    if args.stage == "distill" and args.teacher == "none":
        raise UserError("--teacher none: a student needs one; ct.py and ctm.py do without")
    N = getattr(args, "N", 2)  # continuous time has no grid
    common.check_p_t(args.p_t, karras_times(N))


# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------

def make_parser():
    parser = common.Parser(__doc__)
    built = (None, "none", "ideal")  # teachers that leave the student's network to be chosen
    common.add_shared_flags(parser, dict(teacher=built))

    both = parser.group("algorithm")
    both.flag("--stage", choices=("teacher", "distill"),
              help="train a teacher, or distil one (default); or what a --ckpt is that cannot tell")
    both.flag("--N", only=dict(objective=(None, "discrete")), type=number(int, 2), metavar="N",
              help="noise levels: of the distillation's grid, and of a teacher's samples, in N or "
              "2 N - 1 network calls: --sampler (CM, EDM 18 or 40)")
    both.flag("--sigmas", only=dict(stage=(None, "distill")), metavar="T",
              nargs="+", type=common.noise_level,
              help="noise levels t, EDM's sigma, largest first, a network call each, to draw with "
              "(default 80) or to show when training")
    train = parser.group("algorithm, training", ckpt=False)
    train.flag("--p-t", nargs="+", type=common.p_of_t, metavar="MEAN STD",
               help="ln t ~ Normal(MEAN, STD^2) (teacher: EDM -1.2 1.2), or the one word uniform: "
               "over the grid (distillation: CM)")
    train.flag("--label-dropout", only=dict(stage="teacher"), type=common.probability, metavar="P",
               help="share of labels hidden, for guidance (default 0; 0.1 for that of --w-max)")
    train.flag("--lr-ramp", only=dict(stage="teacher"), default=0, type=common.count, metavar="N",
               help="images over which the learning rate rises from 0 (EDM 10 million, the default "
               "for cifar10 and imagenet64; elsewhere 0: none)")

    student = parser.group("algorithm, distillation", ckpt=False, stage="distill")
    discrete = dict(objective="discrete")
    student.flag("--teacher", metavar="FILE",
                 help="a teacher written by this script, released EDM weights, or ideal: the exact "
                 "denoiser of the training images (default: one is trained first)")
    student.flag("--teacher-steps", only=dict(teacher=False), type=common.positive, metavar="K",
                 help="optimizer steps of the teacher that is trained first")
    student.flag("--objective", choices=("discrete", "continuous", "scm"),
                 help="CM Algorithm 2 (default), its limit N -> infinity, or sCM's form of that")
    student.flag("--stop-gradient", only=dict(objective="continuous"),
                 action=argparse.BooleanOptionalAction,
                 help="the pseudo-objective (default), or also differentiate df/dt")
    student.flag("--solver", only=discrete, choices=SOLVERS,
                 help="of the ODE step that the teacher takes (CM heun)")
    student.flag("--mu", only=discrete, type=common.probability, metavar="MU",
                 help="decay of the target network (CM 0 to 0.95); 0: it is the net itself")
    student.flag("--dist", only=discrete, choices=("l1", "l2", "huber", "lpips"),
                 help="distance between the two outputs")
    student.flag("--weighting", only=discrete, choices=common.WEIGHTS,
                 help="of an interval: 1 (CM), or 1 / (t_n1 - t_n)")
    student.flag("--w-max", type=number(float, 0), metavar="W",
                 help="distil guidance too, weights w in [0, W]: (1 + w) cond - w uncond (default "
                 "0: no guidance)")

    common.add_parametrisation_flag(student)
    common.add_continuous_flags(student)

    draw = parser.group("sampling, further flags", ckpt=True)
    draw.flag("--w", default=0.0, type=common.guidance_weight, metavar="W",
              help="guidance weight, with --w-max's student or --label-dropout's teacher; of the "
              "latter down to -1, which is without labels")
    draw.flag("--sampler", choices=common.SAMPLERS,
              help="of a teacher: 2 N - 1 calls in heun (default, EDM's) and dpm2 (DPM-Solver-2), "
              "N in euler (DDIM), dpm++2m (DPM-Solver++), deis (third order), ancestral (DDPM)")
    draw.flag("--churn", default=0.0, only=dict(sampler=(None, "heun")), type=number(float, 0),
              metavar="S",
              help="of a teacher: EDM's S_churn (default 0: deterministic; EDM ImageNet-64 40)")
    common.add_zero_shot_flags(parser)
    return parser


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

def train_first_teacher(args, run, stop, script, label_dropout):
    """Train the teacher that a `script` without --teacher begins with, in teacher/ under --out-dir.

    args.teacher names it afterwards. Stopped on the way, the process ends here.
    """
    out_dir = Path(args.out_dir)
    common.lock_folder(out_dir, run, make=False)
    if (out_dir / "last.pt").exists() and not args.overwrite:
        writer = common.load_checkpoint(out_dir / "last.pt").get("script")
        if writer != script:  # now, not after days of the teacher's training
            raise UserError(f"--out-dir {out_dir} holds a run of {writer}.py: choose another")
    settings = teacher_recipe(vars(args))
    for key in common.RUN_FLAGS:
        settings[key] = getattr(args, key)
    settings["out_dir"] = str(out_dir / "teacher")
    settings["label_dropout"] = label_dropout
    settings["micro_batch_limit"] = settings["micro_batch"]
    settings["micro_batch"] = None
    if (out_dir / "teacher" / "last.pt").exists() and not args.overwrite:  # perhaps of before ramps
        found = common.load_checkpoint(out_dir / "teacher" / "last.pt")
        settings["lr_ramp"] = found["args"].get("lr_ramp", 0)
    if args.micro_batch:
        settings["micro_batch"] = math.gcd(settings["batch_size"], args.micro_batch)
    if args.teacher_steps:
        settings["total_steps"] = args.teacher_steps
    ended = train(argparse.Namespace(**settings), run, stop)
    if not ended:
        common.finish(run, stop)
    args.teacher = str(out_dir / "teacher" / "last.pt")
    del args.teacher_steps, args.net, args.class_cond


def train(args, run, stop):
    """Train, or go on with the run found in --out-dir. Returns whether it came to its end."""
    distil = args.stage == "distill"
    objective = args.objective if distil else "denoise"
    w_max = args.w_max if distil else 0.0
    label_dropout = 0.0 if distil else args.label_dropout
    if objective == "discrete":
        with common.main_process_first(run):  # now, not after days of the teacher's training
            dist = common.make_distance(args.dist, run.device)
    if args.teacher is None:
        train_first_teacher(args, run, stop, "cd", 0.1 if w_max else 0.0)
    teacher, settings = common.open_teacher(args, run)
    size = settings["image_size"]
    dataset = common.open_dataset(args, run, size)
    D, classes = common.teacher_denoiser(args, run, teacher, dataset)
    if distil:
        common.check_guidance(args, teacher, classes)
    elif label_dropout and not classes:
        raise UserError("--label-dropout needs labels, and there are none; so does --w-max")

    model_args = settings | common.dropout_settings(args) | dict(classes=classes)
    if distil:
        model_args["cond"] = w_max > 0
    else:
        model_args["null"] = label_dropout > 0
    if objective == "discrete":
        model_args["parametrisation"] = args.parametrisation
    net = common.new_network(args, run, model_args, teacher)
    if objective in ("continuous", "scm"):
        common.cut_time_embedding(net, args.bandwidth)
    mu = args.mu if objective == "discrete" else 0.0
    target = copy.deepcopy(net).requires_grad_(False) if mu > 0 else net
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizer = torch.optim.RAdam(net.parameters(), args.lr, foreach=True,
                                  capturable=run.capturable)
    gradients = common.flatten_gradients(net)
    totals = common.Totals(run, "loss")
    parts = dict(net=net, ema=ema, optimizer=optimizer)
    parts["target"] = target if mu > 0 else None
    step, skipped = common.resume(args, run, "cd", model_args, parts)
    common.compile_in_place(run, net, target, teacher)
    log = common.start_run(args, run, net, step, skipped)

    if objective == "discrete":
        times = karras_times(args.N)
        p = common.interval_probabilities(times, args.p_t).to(run.device)
        times = times.to(run.device)
        solver = SOLVERS[args.solver]
        weight = common.WEIGHTS[args.weighting]
    draw = partial(sample, ema, [T_MAX])
    if not distil:
        draw = partial(sample_teacher, ema, args.N)
    draws = [draw]  # to be shown
    if w_max or label_dropout:
        draws.append(partial(draw, w=w_max or 2.0))
    elif distil:
        draws.append(partial(sample, ema, args.sigmas))
    all_steps = common.steps(args, run, log, totals, dataset, step, {"a step": step}, [optimizer])
    for step, micro_batches, trial in all_steps:
        # ------------------------------------------------------------------------ one training step
        gradients.zero_()
        totals.zero()
        for m, batch in micro_batches:
            common.seed_everything(common.STEP, args.seed, step, m)
            x0, y = common.to_device(batch, run.device, args.flip)
            y = y if classes else None
            w = w_max * torch.rand(len(x0), device=run.device) if w_max else None
            if objective == "discrete":  # CM Alg. 2, line 3
                n = torch.multinomial(p, len(x0), replacement=True)
                t_n = times[n]
                t = times[n + 1]
            else:
                t = common.random_times(len(x0), args.p_t, run.device)
            if label_dropout:
                y = hide_labels(y, label_dropout, net.null_y)
            noise = torch.randn_like(x0)
            if objective == "denoise":
                losses = common.edm_loss(net, x0, noise, t, y)
            elif objective == "discrete":
                masks = common.dropout_masks(net, len(x0))
                losses = loss_fn(net, target, D, x0, noise, t_n, t, y, w, masks, solver, dist,
                                 weight)
            else:
                masks = common.dropout_masks(net, len(x0))
                t = t.clamp(T_MIN, T_MAX)
                if objective == "scm":
                    r = args.r * min((step + 1) / args.warm_up, 1)
                    losses, rms = scm_loss(net, D, x0, noise, t, y, w, masks, r, args.tangent_c)
                else:
                    losses = continuous_loss(net, D, x0, noise, t, y, w, masks, args.stop_gradient)
            (losses.sum() / args.batch_size).backward()
            totals.add(1 / args.batch_size, loss=losses.sum())
            totals.bin(t, rms if objective == "scm" else losses)
        if trial:
            continue
        stopping = common.sum_over_ranks(run, stop, gradients, totals)
        grad_norm = torch.linalg.vector_norm(gradients).item()
        finite = math.isfinite(totals["loss"]) and math.isfinite(grad_norm)
        lr = common.learning_rate(args, step)
        optimizer.param_groups[0]["lr"] = lr
        if finite:
            optimizer.step()  # CM Alg. 2, line 7
            if target is not net:
                common.ema_update(target, net, mu)  # line 8
            common.ema_update(ema, net, args.ema_decay)
        step += 1
        # ------------------------------------------------------------------------------------------
        # log.jsonl: loss_bins is the mean loss where t (t_n1) is below 0.1, 1, 10, and above; of
        # scm tangent_bins, that of the tangent's rms: the loss is near 1 by construction. skipped
        # counts the steps left out as their loss or gradient was not finite.
        last = stopping or step == args.total_steps
        bins = "tangent_bins" if objective == "scm" else "loss_bins"
        values = dict(loss=totals["loss"], grad_norm=grad_norm, lr=lr)
        values[bins] = totals.loss_bins()
        log.step(step, finite, last, **values)
        if common.due(args.save_every, step) or last:
            common.save_run(args, run, "cd", step, log, model_args, parts)
        common.show_samples(args, run, step, log, draws, classes, (3, size, size))
    log.close()
    return log.done == args.total_steps


# --------------------------------------------------------------------------------------------------
# Using a checkpoint
# --------------------------------------------------------------------------------------------------

def use_checkpoint(args, run):
    """`--ckpt`: sample, measure or edit."""
    net, trained = common.sampling_net(args, run, ("cd", "ct"))
    settings = trained["args"]
    teacher = (settings.get("stage") or args.stage) == "teacher"
    if trained["script"]:
        common.refuse(args, ["stage"], f"to {args.ckpt}, which says what it is")
    elif run.main:
        kind = "teacher" if teacher else "consistency model; --stage teacher takes it for a teacher"
        print(f"{args.ckpt} is taken for a {kind}")
    w_min, w_max = 0.0, settings.get("w_max", 0.0)
    if teacher:
        if net.null_y is not None:
            w_min, w_max = -1.0, math.inf
        common.refuse(args, ["sigmas", "edit"], f"to {args.ckpt}, a teacher with a grid --N")
    else:
        common.refuse(args, ["churn", "sampler", "N"], f"to {args.ckpt}, a consistency model")
    if not w_min <= args.w <= w_max:
        able = f"weights from 0 to {w_max:g}" if w_max else "no guidance"
        raise UserError(f"--w {args.w:g}: {args.ckpt} was trained for {able}")

    if args.edit:
        f = partial(consistency_function, net, w=args.w)
        return edit_images(args, run, net, f)
    if teacher:
        N = args.N or (18 if net.image_size <= 32 else 40)  # EDM's
        sampler = args.sampler or "heun"
        draw = partial(sample_teacher, net, N, w=args.w, churn=args.churn, sampler=sampler)
        calls = common.sampler_calls(sampler, N)
        if args.w:
            calls *= 2
    else:
        sigmas = args.sigmas or [T_MAX]
        if run.main:
            common.note_levels(net, sigmas)
        draw = partial(sample, net, sigmas, w=args.w)
        calls = len(sigmas)
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
#   CIFAR-10 net      the ADM UNet at NCSN++'s depth and width, log-time embedding
#   CIFAR-10 teacher  RAdam, mirrored images. EDM: Adam, geometric augmentation, whose gain needs
#                     the augmentation labels as an input
#   --lr-ramp         10 million images on CIFAR-10 and ImageNet-64, as EDM; CM's teachers: none
#   guidance          distilling it into a consistency model that is told w is ours
#   embedding of w    sinusoids of 25 w: the papers' 1000 w tells 4 from 4.1 too well
#   --parametrisation free: c_in stays; the net is still begun with the teacher's weights, whose
#                     output alone is no denoiser: far from the teacher at first
#   full gradient     (--no-stop-gradient) the paper's squared norm; openai's takes the norm
#   continuous time   the time embedding is cut (--bandwidth); derivatives are central differences
#   sCM               of networks told of ln t in ADM's embedding, cut, with ordinary group norms.
#                     sCM: positional embeddings of theta, double normalisation
#   sCM, the end      trained towards t = 0, drawn with the end at t_min: 0.0023 rms apart at most
#   sCM, norm         the tangent's rms + c, as in FastGen; Alg. 1: its length + c
#   sCM, weight       not learned: it undoes what c does. Nor a further 1 / sigma, which some have
#   sCM, optimizer    RAdam, default betas, a plain average; sCM: beta_2 0.99, on ImageNet Adam and
#                     a power-function average
#   sCM, r            held at 0.2 on digits, see common.scm_loss; sCM: it rises to 1
#   stop-gradient     the loss reported is |df/dt|^2: the pseudo-objective's own value says nothing,
#                     and the gradient is the same
#   teacher's solver  denoised images are not clipped, as in EDM; openai's code clips them
#   fast samplers     on EDM's grid, to 0 by a step of first order; their papers: grids even in ln t
#                     or in powers of their own t, to an end above 0
#   --dist            is what the flag says; openai's --loss_norm never reaches the loss
#   dropout           one mask for both branches on every device, compiled or not; openai's code
#                     replays the CPU's random numbers
#   pseudo-Huber      one norm an image, as in iCT; a common reimplementation: one an element
#   precision         bf16 where the device has it, on CUDA the rest TF32. CM: fp32 on CIFAR-10,
#                     else fp16
#   LPIPS             pools by the average, as openai's code; its JAX code, CIFAR-10: the maximum
