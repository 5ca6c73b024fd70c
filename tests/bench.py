"""Benchmarks: how readable the digits are, and how fast the training step is. No test depends on a number printed here.

    python tests/bench.py quality                            the scoreboard: trains every method alike, measures it (scoreboard.py)
    python tests/bench.py quality --ckpt out/cd/last.pt out/cd/teacher/last.pt     share of generated glyphs that are the digit asked for
    python tests/bench.py guided --dir out/guided_distill    the same of every round's student, against N and w, and of their teacher
    python tests/bench.py speed                              images/s of the training steps, share of the GEMM rate, memory
"""
import argparse
import copy
import functools
import itertools
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import cd  # noqa: E402
import common  # noqa: E402
import ct  # noqa: E402
import ctm  # noqa: E402
import guided_distill  # noqa: E402


class Classifier(nn.Module):
    """A small convolutional network; `features` (B,128) also serve as the space of the Frechet distance."""
    def __init__(self, classes=10):
        super().__init__()
        def block(c_in, c_out):
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU())
        self.features = nn.Sequential(block(3, 32), block(32, 32), nn.MaxPool2d(2), block(32, 64), block(64, 64),
                                      nn.MaxPool2d(2), block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, classes)

    def forward(self, x):
        return self.head(self.features(x))


def as_floats(images):
    """uint8 (n,C,H,W) -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def load_glyphs(n, seed, size=16):
    images, labels = common.glyphs(n, seed, size)
    return as_floats(torch.from_numpy(images).permute(0, 3, 1, 2)), torch.from_numpy(labels)


def train_classifier(x, y, steps=500, batch=128):
    """A classifier of images x (n,C,H,W) with labels y (n,), made in seconds."""
    torch.manual_seed(0)
    net = Classifier(int(y.max()) + 1).to(x.device)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        i = torch.randint(len(x), (batch,), device=x.device)
        noisy = x[i] + 0.1 * torch.rand(batch, 1, 1, 1, device=x.device) * torch.randn_like(x[i])
        F.cross_entropy(net(noisy), y[i], label_smoothing=0.05).backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()
    return net.eval()


def some_images(dataset, device, most):
    """At most `most` images (n,C,H,W) of a data set, the same ones every time, and their labels (n,).

    Raises:  UserError if it has no labels to train a classifier with.
    """
    if not dataset.classes:
        raise common.UserError("the benchmark's feature distance needs a data set with labels")
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:most].sort().values.numpy()
    x, y = (part.to(device) for part in dataset.__getitems__(chosen))
    return as_floats(x), y


def feature_distance(dataset, device, most=30000):
    """images (n,H,W,C) uint8 array -> the Frechet distance between them and `dataset`, in the features of a classifier trained on it.

    Raises:  UserError if the data set has no labels to train one with.
    """
    x, y = some_images(dataset, device, most)
    classifier = train_classifier(x, y)
    return lambda images: frechet(classifier, as_floats(torch.from_numpy(images).permute(0, 3, 1, 2).to(device)), x)


@torch.no_grad()
def read(classifier, x, y):
    """The share of images that the classifier reads as their label."""
    return torch.cat([classifier(part).argmax(1) for part in x.split(1000)]).eq(y).cpu().double().mean().item()


@torch.no_grad()
def frechet(classifier, a, b):
    """Frechet distance of two sets of images in the classifier's features."""
    features = (torch.cat([classifier.features(part) for part in x.split(1000)]).cpu().double() for x in (a, b))  # mps has no float64
    return common.frechet_distance(*(moment for f in features for moment in (f.mean(0), f.T.cov())))


def make_judge(name="glyphs", size=16, device="cpu"):
    """What samples are measured with: a classifier, images (n,C,H,W) it has not seen, and words on how well it reads those.

    Of glyphs it shares no image with the generators' training set either; of a path it is trained on five sixths of at most 60,000 images.
    Raises:  UserError if the data set is not there, or has no labels.
    """
    if name == "glyphs":
        (x, y), (real, labels), longer = load_glyphs(30000, 1, size), load_glyphs(10000, 2, size), {}
    else:
        x, y = some_images(common.load_dataset(name, None, size), "cpu", 60000)
        held_out, longer = torch.arange(len(x)) % 6 == 0, dict(steps=2000)  # photographs take longer than digits
        (x, y), (real, labels) = (x[~held_out], y[~held_out]), (x[held_out], y[held_out])
    real, labels, half = real.to(device), labels.to(device), len(real) // 2
    classifier = train_classifier(x.to(device), y.to(device), **longer)
    return classifier, real, (f"classifier: {read(classifier, real, labels):.2%} of {len(real):,} held-out "
                              + ("glyphs" if name == "glyphs" else "images")
                              + f"; Frechet distance between two halves of them {frechet(classifier, real[:half], real[half:]):.3f}")


def score(judge, net, draw, n, seed):
    """Draw n images with labels in turn; image i depends on (seed, i) alone.

    Args:    judge: of `make_judge`.  draw: (y (b,), noise, shape (b,C,H,W)) -> images, of the network `net`.
    Returns: the share that is read as the label asked for; the Frechet distance to the judge's images; images drawn a second, in
             the fastest batch.
    """
    classifier, real, _ = judge
    y, images, fastest = torch.arange(n, device=real.device) % net.classes, [], 0.0
    for i in range(0, n, 250):
        part = range(i, min(i + 250, n))
        work = functools.partial(draw, y[i:i + 250], common.seeded_noise(part, seed), (len(part), 3, net.image_size, net.image_size))
        seconds = timed(real.device, lambda: images.append(work().clamp(-1, 1)))  # noqa: B023
        fastest = max(fastest, len(part) / seconds)
    images = torch.cat(images)
    return read(classifier, images, y), frechet(classifier, images, real), fastest


def quality(args):
    """The scoreboard, or with --ckpt the samples of these checkpoints."""
    for key, default in args.apart[bool(args.ckpt)].items():
        if getattr(args, key) != default:
            raise common.UserError(f"--{key.replace('_', '-')} " + ("does not apply with --ckpt" if args.ckpt else "goes with --ckpt"))
    if not args.ckpt:
        import scoreboard
        return scoreboard.main(args)
    judge = make_judge()
    print(judge[2])
    for path in args.ckpt:
        net, trained = common.load_network(path, ("cd", "ct", "ctm"))
        if trained["args"].get("stage") == "teacher":
            ways = {f"{2 * args.N - 1} calls, Heun": functools.partial(common.sample_teacher, net, args.N, w=args.w)}
        elif net.extra and trained["script"] != "cd":
            ways = {f"{n} call(s), gamma {gamma}": functools.partial(ctm.sample, net, ctm.step_levels(n), gamma)
                    for n in args.steps for gamma in args.gamma if n > 1 or gamma == args.gamma[0]}  # one step knows no gamma
            ways |= {f"{2 * args.N - 1} calls, Heun on g": functools.partial(ctm.sample_heun, net, args.N)}
        else:
            ways = {f"{len(sigmas)} call(s), {sigmas}": functools.partial(cd.sample, net, sigmas, w=args.w) for sigmas in
                    ([80.0], [80.0, args.mid])}
        for way, draw in ways.items():
            share, distance, _ = score(judge, net, draw, args.n, args.seed)
            print(f"{path}, {way}: {share:.1%} of {args.n} read as the label asked for, Frechet distance {distance:.3f}", flush=True)


def guided(args):
    """A table of a run of guided_distill.py: a row for its teacher in many steps, for stage 1, and for each round; a column a weight."""
    run = argparse.Namespace(device=torch.device("cpu"), dtype=torch.float32 if args.fp32 else torch.bfloat16, main=False)
    judge, folder = make_judge(), Path(args.dir)
    trained = common.load_checkpoint(sorted(folder.glob("N????.pt"))[0])["args"]
    rows = [("teacher", args.teacher or trained["teacher"], n) for n in args.N]
    rows += [("stage 1", folder / "stage1.pt", n) for n in args.stage1_N]
    rows += [("student", path, None) for path in sorted(folder.glob("N????.pt"), reverse=True)]
    print(f"readability and Frechet distance of {args.n} samples, seed {args.seed}\n| | N | "
          + " | ".join(f"w = {w:g}" for w in args.w) + " |\n|---|---|" + "---|" * len(args.w))
    for name, path, N in rows:
        v, angle, own, sampler, *_, net = guided_distill.open_student(path, run)
        N, cells = own or N, []
        for w in args.w:
            draw = functools.partial(guided_distill.draw, v, angle, N, sampler or args.sampler, w, device=run.device)
            cells.append("{:.1%}, {:.2f}".format(*score(judge, net, draw, args.n, args.seed)))
        print(f"| {name} | {N} {sampler or args.sampler} | " + " | ".join(cells) + " |", flush=True)


# ---- speed

def gemm_rate(device, dtype, size):
    """Floating-point operations a second of a square matrix product: the best of several, as a ceiling should be."""
    a, best = torch.randn(size, size, device=device).to(dtype), 0.0
    for _ in range(8):
        best = max(best, 2 * size**3 / timed(device, lambda: a @ a))
    return best


def timed(device, work):
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def measure(args):
    """One variant, in a process of its own so that its peak memory is its own: prints a row of the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[args.dtype]
    torch.manual_seed(0)
    classes = 1000 if args.net == "imagenet64" else 10
    net, teacher = (common.UNet(**common.NETS[args.net], classes=classes, **more) for more in (dict(extra=args.step == "ctm"),
                                                                                              dict(null=args.step == "guided")))
    size = net.image_size
    x0, noise = (torch.randn(args.batch, 3, size, size, device=device) for _ in range(2))
    y, t_n = torch.randint(net.classes, (args.batch,), device=device), torch.rand(args.batch, device=device) + 0.1
    with torch.device("meta"):
        meta = common.UNet(**common.NETS[args.net], classes=net.classes)
        with FlopCounterMode(display=False) as counter:
            meta(x0[:1].to("meta"), t_n[:1].to("meta"), y[:1].to("meta"))
    # Forward 1, backward 2, or 1 where the weights are frozen; a forward derivative counted as 1, though it costs more. ctm: two solver steps.
    passes = dict(ct=4, cd=6, teacher=3, continuous=4, ctm=4 + 4 + 3 + 3, guided=5, rounds=5)
    flops = passes[args.step] * counter.get_total_flops()

    net = common.place(net, argparse.Namespace(device=device, dtype=dtype))
    net.to(memory_format=torch.channels_last if args.layout == "channels_last" else torch.contiguous_format)
    teacher = common.place(teacher, argparse.Namespace(device=device, dtype=dtype)).requires_grad_(False).eval()
    ema, target = copy.deepcopy(net), copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.RAdam(net.parameters(), 1e-4, foreach=True)
    buffer, _ = common.flatten_gradients(net, 0)
    if args.mode == "compiled":
        for module in (net, target, teacher):
            module.compile()
    D, inverse, times = common.net_denoiser(teacher), common.WEIGHTS["inverse"], common.karras_times(18).to(device)
    i, j = ctm.draw_indices(args.batch, 18, 2, device)

    def ctm_gradients():
        loss, _ = ctm.loss_fn(net, target, functools.partial(ctm.heun_solve, D, times), x0, noise, times, i, j, 2, y, common.pseudo_huber)
        ctm.add_gradients(net, loss.mean(), common.edm_loss(net, x0, noise, t_n, y, common.c_noise(t_n)).mean(), None, 0.0, 1.0)

    angle = guided_distill.edm_angle
    v, tau, w = guided_distill.edm_v(D, angle), torch.randint(1, 5, (args.batch,)).double() / 4, 4 * torch.rand(args.batch, device=device)

    def guided_gradients(target):  # without the embedding of w, as if --w-max were 0
        guided_distill.loss_fn(lambda z, tau: guided_distill.net_v(net, angle)(z, tau, y, None), target, angle, x0, noise, tau,
                               torch.ones_like).mean().backward()

    gradients = dict(
        ct=lambda: ct.loss_fn(net, net, x0, noise, t_n, t_n + 0.1, y, common.pseudo_huber, inverse).mean().backward(),
        cd=lambda: cd.loss_fn(net, net, D, x0, noise, t_n, t_n + 0.1, y, None, common.heun_step, common.pseudo_huber, inverse).mean().backward(),
        teacher=lambda: common.edm_loss(net, x0, noise, t_n, y).mean().backward(),
        continuous=lambda: ct.continuous_loss(net, x0, noise, t_n, y).mean().backward(),
        ctm=ctm_gradients,
        guided=lambda: guided_gradients(common.guide(v, y, w)),
        rounds=lambda: guided_gradients(lambda z, tau: guided_distill.two_steps(lambda z, tau: v(z, tau, y), angle, z, tau, tau - 1 / 8,
                                                                                tau - 1 / 4)))[args.step]

    def step():
        buffer.zero_()
        gradients()
        optimizer.step()
        common.ema_update(ema, net, 0.999)
        if args.step == "ctm":
            common.ema_update(target, net, 0.999)

    rate = gemm_rate(device, dtype, 8192 if device.type == "cuda" else 2048)
    for _ in range(3):
        step()
    times = sorted(timed(device, step) for _ in range(args.repeat))
    median = times[len(times) // 2]
    share = flops * args.batch / median / rate
    print(f"| {args.step} | {args.net} | {args.batch} | {args.mode} | {args.dtype} | {args.layout} | {args.batch / median:.1f} | "
          f"{args.batch / times[0]:.1f} | {share:.2f} | {rate / 1e9:.0f} | {common.peak_memory_gb(device):.2f} |", flush=True)


def speed(args):
    print("| step | net | batch | mode | dtype | layout | images/s | best | share of GEMM rate | GEMM GFLOP/s | peak GB |\n" + "|---" * 11 + "|")
    cuda = torch.cuda.is_available()
    for step, net in itertools.product(args.step, args.net):
        batch = args.batch or {"glyphs": 64, "cifar-small": 32}.get(net, 64)
        for variant in itertools.product(args.mode, ("fp32", "bf16"), ("contiguous", "channels_last")):
            if step == "continuous" and "channels_last" in variant and not cuda:
                continue  # torch's group norm has no forward derivative in that layout on a CPU
            command = [sys.executable, __file__, "measure", step, net, str(batch), *variant, "--repeat", "20" if cuda else "7"]
            if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
                print(f"| {step} | {net} | {batch} | {' | '.join(variant)} | failed |", flush=True)


STEPS = ["ct", "cd", "teacher", "continuous", "ctm", "guided", "rounds"]


def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("quality", help="the scoreboard of all methods; with --ckpt, how readable its glyphs are")
    command.add_argument("--n", type=common.positive, default=2000, help="samples of each")
    command.add_argument("--seed", type=int, default=1, help="of the samples and, of the scoreboard, of the trainings")
    checkpoints = command.add_argument_group("checkpoints trained on glyphs")
    checkpoints.add_argument("--ckpt", nargs="+", metavar="FILE", help="measure these, and train nothing")
    checkpoints.add_argument("--mid", type=float, default=1.6, help="the second noise level of the two-step samples")
    checkpoints.add_argument("--N", type=int, default=18, help="Heun steps of a teacher's samples")
    checkpoints.add_argument("--w", type=float, default=0.0, help="guidance weight")
    checkpoints.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="jumps of a trajectory model's samples")
    checkpoints.add_argument("--gamma", type=float, nargs="+", default=[0.0, 0.3, 1.0], help="noise put back between its jumps")
    group = command.add_argument_group("scoreboard: the same command again goes on where it was stopped")
    group.add_argument("--dataset", default="glyphs", help="glyphs, or the path of your own images, with labels")
    group.add_argument("--net", nargs="+", metavar="NAME KEY=VALUE", help="as of the scripts (default: the data set's)")
    group.add_argument("--batch-size", type=common.positive, metavar="B", help="images a step (default 32)")
    group.add_argument("--total-steps", type=common.number(int, 10), default=1500, metavar="K", help="optimizer steps of every student")
    group.add_argument("--teacher-steps", type=common.positive, default=2600, metavar="K", help="optimizer steps of their teacher")
    group.add_argument("--ablation-steps", type=common.count, default=800, metavar="K", help="of a student in CM's Figure 3; 0: without it")
    group.add_argument("--only", nargs="+", metavar="NAME", help="these trainings and their teacher (a wrong name lists them)")
    group.add_argument("--jobs", type=common.positive, metavar="J", help="trainings at once, which share the cores (default: one a core; "
                       "one where there is a GPU)")
    group.add_argument("--work", default="out/bench", metavar="DIR", help="where the trainings lie")
    group.add_argument("--results", default=str(Path(__file__).parent / "results"), metavar="DIR", help="receives the table and the pictures")
    apart = [{action.dest: action.default for action in group._group_actions} for group in (checkpoints, group)]
    command.set_defaults(run=quality, apart=apart)
    command = commands.add_parser("guided", help="table of guided_distill.py: readability and Frechet distance against N and w")
    command.add_argument("--dir", default="out/guided_distill", help="its --out-dir")
    command.add_argument("--teacher", help="default: the one that the students name")
    command.add_argument("--n", type=common.positive, default=2000, help="samples of each")
    command.add_argument("--N", type=int, nargs="+", default=[64, 4, 2, 1], help="DDIM steps of the teacher, two calls each")
    command.add_argument("--stage1-N", type=int, nargs="*", default=[64], help="steps of the student of stage 1")
    command.add_argument("--w", type=float, nargs="+", default=[0.0, 1.0, 4.0], help="guidance weights")
    command.add_argument("--sampler", choices=("D", "S"), default="D", help="of teacher and stage 1; a student has its own")
    command.add_argument("--fp32", action="store_true", help="instead of bf16")
    command.add_argument("--seed", type=int, default=1, help="of the samples")
    command.set_defaults(run=guided)
    command = commands.add_parser("speed", help="how fast the training steps are, in all variants")
    command.add_argument("--step", nargs="+", choices=STEPS, default=STEPS)
    command.add_argument("--net", nargs="+", choices=common.NETS, default=["glyphs", "cifar-small"]
                         + ["imagenet64"] * torch.cuda.is_available())
    command.add_argument("--mode", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"],
                         help="compiling takes minutes on a CPU")
    command.add_argument("--batch", type=int, help="images a step (default 64; cifar-small 32)")
    command.set_defaults(run=speed)
    command = commands.add_parser("measure", help="one row of `speed`")
    for name in ("step", "net", "batch", "mode", "dtype", "layout"):
        command.add_argument(name, type=int if name == "batch" else str)
    command.add_argument("--repeat", type=int, default=7)
    command.set_defaults(run=measure)
    return parser


if __name__ == "__main__":
    sys.excepthook = common.one_line_errors
    args = flags().parse_args()
    args.run(args)
