"""Consistency training: a one-step generator from scratch, with no teacher; or, easier, from a diffusion model.

    python ct.py                                             digits (glyphs) on a laptop, minutes
    python ct.py --recipe ect --out-dir out/ect              digits: trains a diffusion model, then tunes it
    python ct.py --objective continuous                      the same of the limit N -> infinity
    python ct.py --dataset my_images/                        your own: a folder or zip of images, an .npz or .npy
    torchrun --nproc_per_node=8 ct.py --dataset imagenet64 --data-dir /data/imagenet64
    python ct.py --ckpt out/ct/last.pt --sample 64 --sigmas 80 1.6 --save out.png
    python ct.py --ckpt out/ct/last.pt --eval 50000

The same command again resumes a run, exactly, on any number of processes.

Paper: Song et al. 2023 (CM, arXiv 2303.01469v2), Algorithm 3, with `--recipe ct`; its successor Song & Dhariwal 2023
(iCT, arXiv 2310.14189) with `--recipe ict`, the default. What sets them apart (iCT Table 1):

    setting       ct                                          ict
    --schedule    sqrt: N(k) grows like sqrt(k) (CM App. C)   double: N(k) doubles at equal intervals
    --mu0         target = moving average of the net, mu(k)   0: target = the net itself, without gradient
    --dist        lpips                                       huber: pseudo-Huber
    --times       uniform over the grid                       -1.1 2.0: ln t normal, more often where it is hard
    --weighting   one                                         inverse: 1 / (t_n1 - t_n)

`--recipe ect` is Geng et al. 2024 (ECT, arXiv 2406.14548): like ict, but from a diffusion model, --teacher, and
without a grid: t is any level, and t_n = r(t), which comes nearer to t with each of --stages.

Log, one JSON object a line: step; images = seen so far; loss, and loss_bins its mean where t_n1 is below 0.1, 1, 10 and
above; grad_norm; N and mu, or stage; lr; images_per_s; peak_gb; skipped = steps left out because their loss was not
finite.
"""
import copy
import math
import time
from pathlib import Path

import torch
import torch.distributed

import common
from common import UserError, consistency

# Recipes: CM Table 3, iCT's published settings and ECT's; glyphs and "path" (your own images) are ours, the former tuned on 2 cores.
# `sigmas` are the levels of the two-step samples: published ones (CM's time points, iCT's 0.821 and 1.526, also ECT's), or ours.
METHODS = {
    "ct": dict(teacher="none", schedule="sqrt", s0=2, dist="lpips", times=["uniform"], weighting="one", dropout=0.0),
    "ict": dict(teacher="none", schedule="double", s0=10, s1=1280, mu0=0.0, dist="huber", times=[-1.1, 2.0], weighting="inverse",
                dropout=0.0),
    "ect": dict(teacher=None, q=4.0, stages=4, mapping=[8.0, 1.0], dist="norm", times=[-1.1, 2.0], weighting="inverse", dropout=0.0),
}
RECIPES = {
    "glyphs": dict(net=["glyphs"], flip=False, micro_batch=32, sigmas=[80.0, 1.6], batch_size=32, total_steps=3600, lr=1e-3,
                   ema_decay=0.997, ct=dict(s1=20, mu0=0.9, dist="l2"), ict=dict(s1=40, times=[0.0, 1.6]),
                   ect=dict(q=16.0, stages=1, total_steps=1000, times=[0.0, 1.6])),
    "path": dict(net=["cifar-small"], flip=True, micro_batch=32, sigmas=[80.0, 0.821], batch_size=128, total_steps=100_000,
                 lr=4e-4, ema_decay=0.9995, ct=dict(s1=150, mu0=0.9), ict=dict(), ect=dict(lr=1e-4)),
    "cifar10": dict(net=["cifar10"], flip=True, micro_batch=128, sigmas=[80.0, 0.821], class_cond=False,
                    ct=dict(batch_size=512, lr=4e-4, s1=150, mu0=0.9, ema_decay=0.9999, total_steps=800_000),
                    ict=dict(batch_size=1024, lr=1e-4, ema_decay=0.99993, total_steps=400_000, dropout=0.3),
                    ect=dict(batch_size=128, lr=1e-4, ema_decay=0.9999, total_steps=200_000, dropout=0.2, q=2.0, stages=8)),
    "imagenet64": dict(net=["imagenet64"], flip=True, micro_batch=64, class_cond=True,
                       ct=dict(batch_size=2048, lr=8e-6, s1=200, mu0=0.95, ema_decay=0.999943, total_steps=800_000,
                               sigmas=[80.0, 1.91284]),
                       ict=dict(batch_size=4096, lr=1e-4, ema_decay=0.99997, total_steps=800_000, dropout=0.2,
                                sigmas=[80.0, 1.526]),
                       ect=dict(batch_size=128, lr=1e-4, ema_decay=0.9999, total_steps=100_000, dropout=0.1, dist="huber",
                                times=[-0.8, 1.6], weighting="edm", sigmas=[80.0, 1.526])),  # iCT's c is ECT's 0.06 here
}
for name, tau in ("bedroom256", 3.99122), ("cat256", 5.2485):  # iCT and ECT have published none for these
    RECIPES[name] = dict(net=["lsun256"], flip=True, micro_batch=8, class_cond=False, batch_size=2048, lr=1e-5,
                         ema_decay=0.999943, total_steps=1_000_000, sigmas=[80.0, tau], ct=dict(s1=150, mu0=0.95), ict=dict(),
                         ect=RECIPES["imagenet64"]["ect"] | dict(lr=1e-5, sigmas=[80.0, tau]))


GRID = {"schedule", "s0", "s1", "mu0"}  # what ect has no use for
EASY = {"q", "stages", "mapping"}  # what the others have no use for
DISCRETE = GRID | {"dist", "weighting"}  # what continuous time has no use for
WEIGHTS = common.WEIGHTS | {"edm": lambda t_n, t_n1: 1 / t_n1**2 + 1 / common.SIGMA_DATA**2}


def recipe(given):
    """The settings of `--recipe` for `--dataset`, general ones first. Raises UserError for a flag that does not apply with the others."""
    def refuse(keys, why):
        for key in sorted(given.keys() & keys):
            raise UserError(f"--{key.replace('_', '-')} {why}")

    continuous = given.get("objective") == "continuous"  # CM App. B
    method, dataset, teacher = given.get("recipe", "ct" if continuous else "ict"), common.known_dataset(given), given.get("teacher")
    chosen = dict(RECIPES[dataset])
    special = {key: chosen.pop(key) for key in METHODS}[method]
    settings = dict(class_cond=None) | METHODS[method] | {"recipe": method, "objective": "discrete"} | chosen | special
    if continuous:
        refuse(DISCRETE, "does not apply with --objective continuous")
        if method == "ect":
            raise UserError("--objective continuous does not apply with --recipe ect")
        settings = {key: value for key, value in settings.items() if key not in DISCRETE} | dict(teacher=None, times=["uniform"])
        settings["lr"] = 1e-4 if dataset in ("glyphs", "path") else 5e-6  # openai's JAX code, CIFAR-10
    if method == "ect":
        refuse(GRID, "does not apply with --recipe ect")
        q, stages = (given.get(key, settings[key]) for key in ("q", "stages"))
        if q**stages > 1e5:  # float32 has 7 digits
            raise UserError(f"--q {q:g} --stages {stages}: in the last stage r and t would be the same number")
    else:
        refuse(EASY, f"does not apply with --recipe {method}")
    if settings["teacher"] == "none":
        refuse({"teacher_steps"}, f"does not apply with --recipe {method}")
        if teacher not in (None, "none"):
            raise UserError(f"--teacher does not apply with --recipe {method}, which starts from random weights; --recipe ect takes one")
    elif teacher is None:
        settings["teacher_steps"] = common.TEACHERS[dataset]["total_steps"]
    else:
        refuse({"teacher_steps"}, "does not apply with --teacher: that one is trained")
        if teacher == "ideal":
            raise UserError("--teacher ideal has no weights to start from; name a file")
        if teacher != "none":
            refuse({"net", "class_cond"}, "does not apply with --teacher FILE: the net is built like its teacher")
            del settings["net"], settings["class_cond"]
    return settings


def flags():
    parser = common.Parser(__doc__)
    group = parser.add_argument_group("algorithm")
    group.add_argument("--recipe", choices=METHODS, help="ict (default): improved consistency training; ct: the seed paper; ect: from "
                       "a diffusion model")
    group.add_argument("--objective", choices=("discrete", "continuous"), help="CM Algorithm 3 (default), or its limit N -> infinity")
    group.add_argument("--schedule", choices=("sqrt", "double"), help="how N(k), the number of noise levels, grows")
    group.add_argument("--s0", type=common.positive, metavar="N", help="where N(k) starts: points (sqrt, CM 2) or intervals (double, iCT 10)")
    group.add_argument("--s1", type=common.positive, metavar="N", help="intervals at the end (CM 150 to 200, iCT 1280)")
    group.add_argument("--mu0", type=common.number(float, 0, 1), metavar="MU", help="target's decay at the start (CM 0.9 to "
                       "0.95); 0: the target is the net itself (iCT)")
    group.add_argument("--teacher", metavar="FILE", help="ect, continuous: the diffusion model to start from, written by cd.py --stage "
                       "teacher or released EDM weights, or none: random weights (default: one is trained first, by cd.py's recipe)")
    group.add_argument("--teacher-steps", type=common.positive, metavar="K", help="optimizer steps of the teacher that is trained first")
    group.add_argument("--q", type=common.number(float, 1), metavar="Q", help="ect: r(t) = t max(0, 1 - n(t) / Q^(a + 1)) in stage a = 0, 1, .. "
                       "(ECT 2 to 256)")
    group.add_argument("--stages", type=common.positive, metavar="A", help="ect: stages of equal length (ECT CIFAR-10 8, ImageNet-64 4)")
    group.add_argument("--mapping", nargs=2, type=common.number(float, 0), metavar=("K", "B"), help="ect: n(t) = 1 + K sigmoid(-B t) (ECT 8 1)")
    group.add_argument("--dist", choices=("l1", "l2", "norm", "huber", "lpips"), help="distance between the two outputs; norm: l2 "
                       "without the square (ECT CIFAR-10)")
    group.add_argument("--times", nargs="+", type=common.law_of_times, metavar="MEAN STD",
                       help="draw intervals by ln t ~ Normal(MEAN, STD^2) (iCT, ECT -1.1 2.0), or the one word uniform (CM)")
    group.add_argument("--weighting", choices=WEIGHTS, help="of an interval: 1, or 1 / (t_n1 - t_n), or edm: 1 / t_n1^2 + 1 / sigma_data^2 "
                       "(ECT ImageNet-64)")
    common.add_shared_flags(parser)
    return parser


# ------------------------------------------------------------------------------------------------------------
# The method
# ------------------------------------------------------------------------------------------------------------

def num_points(k, K, s0, s1, schedule):
    """N(k): how many noise levels the grid has at step k of K. At most s1 + 1: s1 intervals."""
    if schedule == "sqrt":  # CM App. C
        return math.ceil(math.sqrt(k / K * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1
    stage = max(math.floor(K / (math.log2(s1 // s0) + 1)), 1)  # iCT Table 1: K'
    return min(s0 * 2 ** (k // stage), s1) + 1


def target_decay(N, s0, mu0):
    """mu(k) = exp(s0 ln(mu0) / N(k)), CM App. C; 0 for mu0 = 0."""
    return mu0 ** (s0 / N)  # differs from openai cm: they divide by N(k) - 1


def ect_r(t, stage, q, k, b):
    """r(t) in [0, t), the level of the target, for t (B,): nearer to t the later the stage = 0, 1, .. and the higher t.

    Source:  ECT, continuous-time schedule; its code counts stages from 0, the paper from 1.
    """
    n = 1 + k * torch.sigmoid(-b * t)
    return t * (1 - n / q ** (stage + 1)).clamp(min=0)


def loss_fn(net, target, x0, noise, t_n, t_n1, y, dist, weight):
    """The consistency training loss of each image.

    Args:    net: f_theta.  target: f_theta^-, or the net itself.  x0, noise: (B,C,H,W).  t_n < t_n1: (B,) neighbours on the
             grid, or ECT's r(t) and t.  y: (B,) labels or None.  dist: (x, y) -> (B,).  weight: (t_n, t_n1) -> (B,) or a number.
    Returns: (B,). Gradient flows through net(x_tn1) alone. Both networks drop out the same units.
    Source:  CM Alg. 3, line 5.
    """
    scale = weight(t_n, t_n1)
    t_n, t_n1 = t_n.clamp(min=common.T_MIN), t_n1.clamp(min=common.T_MIN)  # f ends at t_min; differs from ECT's code, whose ends at 0
    x_tn, x_tn1 = (x0 + common.bcast(t, x0) * noise for t in (t_n, t_n1))
    with torch.no_grad(), common.replay_random(x0.device):
        f_target = consistency(target, x_tn, t_n, y)
    f_net = consistency(net, x_tn1, t_n1, y)
    return scale * dist(f_net, f_target)


def continuous_loss(net, x0, noise, t, y):
    """The limit of `loss_fn` for N -> infinity, l2; t: (B,). Returns (B,). Source: CM App. B, Theorem 6."""
    x_t = x0 + common.bcast(t, x0) * noise
    return common.continuous_loss(net, x_t, t, noise, y, None, stop_gradient=True)  # (x_t - x0) / t stands for the ODE's slope


def sample(net, sigmas, y, noise, shape):
    """Draw images (B,C,H,W) in len(sigmas) network calls. Each output is clipped to [-1, 1], as for the papers' samples."""
    x_T = sigmas[0] * noise(torch.zeros(shape, device=next(net.parameters()).device))
    with torch.no_grad():
        return common.multistep_sample(lambda x, t: consistency(net, x, t, y).clamp(-1, 1), x_T, sigmas, noise)


if __name__ == "__main__":
    args = common.parse_flags(flags(), recipe)
    run = common.setup(args)

    # ---- sampling: python ct.py --ckpt FILE
    if hasattr(args, "ckpt"):
        net, trained = common.load_network(args.ckpt, ("ct",))
        net = common.place(net, run)
        common.sample_checkpoint(args, run, net, lambda y, noise, shape, _: sample(net, args.sigmas, y, noise, shape), len(args.sigmas), trained)
        common.finish(run)

    # ---- teacher: without --teacher, ect and continuous time train one first
    stop, ect, continuous = common.StopSignal(), args.recipe == "ect", args.objective == "continuous"
    grid = not ect and not continuous
    if grid:
        if args.s1 < args.s0:
            raise UserError(f"--s1 {args.s1} is below --s0 {args.s0}: the number of noise levels grows")
        if num_points(0, args.total_steps, args.s0, args.s1, args.schedule) < 2:
            raise UserError(f"--s0 {args.s0} leaves no interval to train on; name 2 or more")
    common.check_times(args.times, common.karras_times(args.s1 + 1 if grid else 2))
    with common.main_process_first(run):  # now, not after days of the teacher's training
        dist = None if continuous else common.make_distance(args.dist, run.device)
    if args.teacher is None:
        common.train_first_teacher(args, run, stop, "ct")
    teacher, settings = common.open_teacher(args, run)
    size = settings["image_size"]

    # ---- data
    with common.main_process_first(run):
        dataset = common.load_dataset(args.dataset, args.data_dir, size)
    _, classes = common.teacher_denoiser(args, run, teacher, dataset)

    # ---- networks, optimizer, resume
    model_args = settings | dict(classes=classes, dropout=args.dropout)
    common.seed_everything(common.INIT, args.seed)
    net = common.make_net(model_args)
    if teacher is not None:
        net.load_state_dict(teacher.state_dict())
    del teacher
    net = common.place(net, run)
    target = copy.deepcopy(net).requires_grad_(False) if grid and args.mu0 > 0 else net
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizer = torch.optim.RAdam(net.parameters(), args.lr, foreach=True)
    buffer, tail = common.flatten_gradients(net, tail=2 + 2 * common.BINS)  # what the ranks sum each step
    loss_sum, stop_sum, bins = tail[0], tail[1], tail[2:].view(2, -1)  # bins: of the losses, of the images

    out_dir, step, skipped, bad_in_a_row, stopping = Path(args.out_dir), 0, 0, 0, False
    if state := common.resume_state(args, run, "ct", model_args):
        step, skipped = state["step"], state["skipped"]
        for module, key in ((net, "net"), (target, "target"), (ema, "ema")):
            module.load_state_dict(state[key] or state["net"])
        common.load_optimizer(optimizer, state["optimizer"])
    del state
    if run.compile and (not continuous or not args.dropout):  # df/dt is never compiled, and f must drop out what it drops out
        for module in {net, target}:
            module.compile()  # in place: names of the weights stay as they are
    log = common.start_run(args, run, net, step)

    def save():
        """Write last.pt, which resumes the run, and ema.pt, which other tools can load."""
        if run.main:
            common.save_checkpoint(out_dir / "last.pt", dict(
                script="ct", step=step, images=step * args.batch_size, skipped=skipped, args=vars(args), model_args=model_args,
                net=net.state_dict(), target=None if target is net else target.state_dict(), ema=ema.state_dict(),
                optimizer=optimizer.state_dict(), torch_version=str(torch.__version__)))
            common.save_checkpoint(out_dir / "ema.pt", ema.state_dict())

    def sample_grid():
        """Write samples/STEP.png: one-step samples left, multistep samples right, from the same noise every time."""
        y, columns = common.grid_labels(classes, run.device), common.grid_columns(classes)
        blocks = [common.draw_many(run, lambda y, noise, shape, _: sample(ema, sigmas, y, noise, shape), 8 * columns, y,
                                   (3, size, size), args.seed, args.micro_batch) for sigmas in ([common.T_MAX], args.sigmas)]
        if run.main:
            log.grid(step, blocks, columns)

    # ---- training
    micro_batches = args.batch_size // args.micro_batch
    indices = common.index_batches(len(dataset), args.seed, step, args.total_steps, args.batch_size, args.micro_batch,
                                   run.rank, run.world)
    loader = common.make_loader(dataset, indices, args.workers, run.device)
    bar, since = common.progress(args, run, step), (time.perf_counter(), step)
    while step < args.total_steps and not stopping:
        # ------------------------------------------------------------------------------------ one training step
        N = mu = None
        stage = step * args.stages // args.total_steps if ect else None
        if grid:
            N = num_points(step, args.total_steps, args.s0, args.s1, args.schedule)
            mu = target_decay(N, args.s0, args.mu0)
            times = common.karras_times(N)
            p = common.interval_probabilities(times, args.times).to(run.device)
            times = times.to(run.device)

        buffer.zero_()
        for m in range(run.rank, micro_batches, run.world):
            common.seed_everything(common.STEP, args.seed, step, m)
            x0, y = common.to_device(next(loader), run.device, args.flip)
            y = y if classes else None
            if continuous:
                t = common.random_times(len(x0), args.times, run.device).clamp(common.T_MIN, common.T_MAX)
                loss = continuous_loss(net, x0, torch.randn_like(x0), t, y)
            else:
                if ect:
                    t = common.random_times(len(x0), args.times, run.device)
                    t_n = ect_r(t, stage, args.q, *args.mapping)
                else:
                    n = torch.multinomial(p, len(x0), replacement=True)
                    t_n, t = times[n], times[n + 1]
                loss = loss_fn(net, target, x0, torch.randn_like(x0), t_n, t, y, dist, WEIGHTS[args.weighting])
            (loss.sum() / args.batch_size).backward()
            loss_sum += loss.detach().sum() / args.batch_size
            common.tally(bins, t, loss.detach())
        stop_sum.fill_(stop.number > 0)
        if run.world > 1:
            torch.distributed.all_reduce(buffer)

        loss, stopping = tail[:2].tolist()
        grad_norm = torch.linalg.vector_norm(buffer[:-len(tail)]).item()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            bad_in_a_row = 0
            optimizer.step()
            if target is not net:
                common.ema_update(target, net, mu)
            common.ema_update(ema, net, args.ema_decay)
        else:
            bad_in_a_row, skipped = bad_in_a_row + 1, skipped + 1
        step += 1
        # -----------------------------------------------------------------------------------------------------

        if bad_in_a_row == 10:
            bar.close()
            common.too_many_bad_steps(step, loss, grad_norm, out_dir)
        bar.update()
        last = stopping or step == args.total_steps
        if args.log_every and (step % args.log_every == 0 or last) and run.main:
            since = common.report(log, bar, args, step, since, loss=loss, loss_bins=(bins[0] / bins[1]).tolist(), grad_norm=grad_norm, N=N, mu=mu,
                                  stage=stage, skipped=skipped, peak_gb=common.peak_memory_gb(run.device))
        if (args.save_every and step % args.save_every == 0) or last:
            save()
        if args.sample_every and (step % args.sample_every == 0 or step == args.total_steps):
            sample_grid()
    bar.close()
    common.finish(run, stop if step < args.total_steps else None)
