"""The scoreboard: every method on the same net, data and number of training steps; and the
consistency paper's Figure 3 at this scale.

    python tests/bench.py quality                             glyphs, within two hours on 2 cores
    python tests/bench.py quality --dataset mnist --data-dir data/mnist5k/train.npz --seeds 3
    python tests/bench.py quality --dataset images.zip --net glyphs image_size=16    with labels

Trainings are the scripts themselves, a process each, in folders under --work: seed after seed, of
each the teacher first, then the longest. Whatever is done is kept: the same command goes on where
it was stopped, and at its end writes a table and pictures into --results. A training that fails is
a line of the table.
"""
import argparse
import functools
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import judge
import numpy as np
import torch

import cd
import common
import ct
import ctm
import guided_distill

ROOT = Path(__file__).parent.parent
FOUR = ctm.step_levels(4)  # of consistency models too: evenly spaced on the Karras grid


class Way(NamedTuple):
    """A way to draw."""
    calls: int  # of the network for an image: NFE
    drawn: str
    w: float  # guidance weight
    file: str  # the checkpoint, in the training's folder
    open: Callable  # (path, run) -> the network, and its draw(y, noise, shape)


class Row(NamedTuple):
    """What came of a way to draw from a training: as `judge.Score`."""
    calls: int
    drawn: str
    w: float
    steps: int  # of the training so far
    read: float
    distance: float
    precision: float
    recall: float
    nearest: float
    copied: float
    rate: float


class Method(NamedTuple):
    """A training. `flags` of its script; in them {K}, {half} are steps, {teacher} a file and NET
    the flag --net if it was given."""
    title: str
    script: str
    flags: str
    cost: float  # of a step, that of ct.py being 1: for the order and the time to go
    ways: list


def way(calls, drawn, w, draw, *settings):
    """A way to draw by `draw`(net, *settings, y, noise, shape) from last.pt."""
    def opened(path, run):
        net, _ = common.load_network(path, ("cd", "ct", "ctm"))
        net = common.place(net, run)
        return net, functools.partial(draw, net, *settings)
    return Way(calls, drawn, w, "last.pt", opened)


def heun(N, w=0.0):
    def draw(net, *drawn):
        return cd.sample_teacher(net, N, *drawn, w=w)
    return way((2 * N - 1) * (2 if w else 1), f"{N} Heun steps", w, draw)


# Of a teacher, on Heun's grid; without training the fast ones are what there is.
FAST = {"euler": "Euler (DDIM)", "dpm2": "DPM-Solver-2", "dpm++2m": "DPM-Solver++(2M)",
        "deis": "DEIS, third order"}
SAMPLERS = FAST | {"ancestral": "ancestral"}


def sampler(name, N):
    def draw(net, *drawn):
        return cd.sample_teacher(net, N, *drawn, sampler=name)
    return way(common.sampler_calls(name, N), SAMPLERS[name], 0.0, draw)


def multistep(*sigmas):
    drawn = "from " + ", ".join(f"{sigma:.3g}" for sigma in sigmas)
    return way(len(sigmas), drawn, 0.0, cd.sample, sigmas)


def jumps(n, gamma):
    drawn = f"gamma {gamma:g}" if n > 1 else "one jump"
    return way(n, drawn, 0.0, ctm.sample, ctm.step_levels(n), gamma)


def ddim(N, w=0.0, file=None, stage="", sampler="D"):
    """The teacher's, of two calls a step if it is guided, or of the student in `file`."""
    def opened(path, run):
        student = guided_distill.open_student(path, run)
        draw = functools.partial(guided_distill.draw, student.v, student.angle, N, sampler, w,
                                 run.device)
        return student.net, draw
    drawn = stage + ("DDIM" if sampler == "D" else "stochastic")
    return Way(N * (2 if w and not file else 1), drawn, w, file or "last.pt", opened)


def rounds(weights, sampler="D"):
    """Of the last three students of a distillation."""
    return [ddim(N, w, f"N{N:04d}.pt", sampler=sampler) for w in weights for N in (4, 2, 1)]


def consistency(two, four):
    """A consistency model's ways, in two and in four steps from these noise levels."""
    return [multistep(80.0), multistep(*two), multistep(*four)]


CONSISTENCY = consistency([80.0, 1.6], FOUR)  # its recipe's in their place, see `ways_of`
JUMPS = [jumps(1, 0.0), *(jumps(n, gamma) for gamma in (0.0, 0.3, 1.0) for n in (2, 4))]
ON_G = way(35, "18 Heun steps on g", 0.0, ctm.sample_heun, 18)
WEIGHTS = 0.0, 1.0
TEACHER = [
    *(heun(18, w) for w in WEIGHTS),
    *(ddim(N, w) for w in WEIGHTS for N in (4, 2, 1)),
    *(heun(N) for N in (6, 5, 3)),
    *(sampler("dpm2", N) for N in (6, 5, 3)),
    *(sampler(name, N) for name in ("euler", "dpm++2m", "deis") for N in (12, 10, 8, 5)),
    *(sampler("ancestral", N) for N in (35, 10)),
]
TEACHER_AGAIN = [way for way in TEACHER if way.drawn in ("18 Heun steps", "DDIM") and not way.w]
STAGE_1 = [ddim(N, w, "stage1.pt", "stage 1, ") for w in WEIGHTS for N in (16, 4)]
CT, CD, CTM, GD = "ct.py", "cd.py", "ctm.py", "guided_distill.py"
MODULES = {CT: ct, CD: cd, CTM: ctm, GD: guided_distill}
STUDENT = "--teacher {teacher} --total-steps {K}"
CONTINUOUS = STUDENT + " --objective continuous"
ROUNDS = "--teacher {teacher} --start-N 16 "
METHODS = {
    "teacher": Method("teacher", CD, "--stage teacher --label-dropout 0.1 NET "
                      "--total-steps {teacher_steps}", 0.9, TEACHER),
    "pd": Method("progressive distillation", GD, ROUNDS + "--w-max 0 --round-steps {pd_round} "
                 "--last-steps {pd_last}", 1.9, rounds([0.0])),
    "guided-d": Method("guided distillation D", GD, ROUNDS + "--stage1-steps {d_1} "
                       "--round-steps {d_round} --last-steps {d_last}", 1.9,
                       [*STAGE_1, *rounds(WEIGHTS)]),
    "guided-s": Method("guided distillation S", GD, "--sampler S " + ROUNDS +
                       "--stage1-steps {s_1} --round-steps {s_round} --last-steps {s_last}", 1.9,
                       rounds(WEIGHTS, "S")),
    "cd": Method("CD", CD, STUDENT, 1.5, CONSISTENCY),
    "cd-continuous": Method("continuous CD", CD, CONTINUOUS, 2.1, CONSISTENCY),
    "scd": Method("sCD", CD, STUDENT + " --objective scm", 2.1, CONSISTENCY),
    "ct": Method("CT", CT, "--recipe ct NET --total-steps {K}", 1.0, CONSISTENCY),
    "ict": Method("iCT", CT, "--recipe ict NET --total-steps {K}", 1.0, CONSISTENCY),
    "ect": Method("ECT", CT, "--recipe ect " + STUDENT, 1.0, CONSISTENCY),
    "ct-continuous": Method("continuous CT", CT, CONTINUOUS, 1.8, CONSISTENCY),
    "sct": Method("sCT", CT, STUDENT + " --objective scm", 1.8, CONSISTENCY),
    "sct-scratch": Method("sCT from scratch", CT, "--objective scm --teacher none NET "
                          "--total-steps {K}", 1.8, CONSISTENCY),
    "ctm": Method("CTM", CTM, STUDENT, 4.1, [*JUMPS, ON_G]),
    "ctm-critic": Method("CTM, critic", CTM, STUDENT + " --disc conv --disc-start {half}", 4.1,
                         JUMPS),
    "ctm-scratch": Method("CTM from scratch", CTM, "--teacher none NET --total-steps {K}", 3.1,
                          JUMPS),
    # In the mean 12 solver steps where "ctm" has 2.3, and 1.
    "ctm-global": Method("CTM, global", CTM, STUDENT + " --matching global", 9.3, JUMPS),
    "ctm-local": Method("CTM, local", CTM, STUDENT + " --matching local", 3.4, JUMPS),
    "ctm-no-dsm": Method("CTM, no denoising loss", CTM, STUDENT + " --dsm-weight 0", 3.3,
                         [*JUMPS, ON_G]),
}
# With --seeds S these are trained S times, each from a teacher of its seed, of which then only the
# first ways are measured: all take an hour.
HEADLINE = "teacher", "cd", "scd", "ect", "sct-scratch", "ctm", "guided-d"
OWN = "ctm", "ctm-global", "ctm-local", "ctm-no-dsm"  # CTM's own comparison


def ablation(script, flags, cost):
    return Method("", script, flags + " --total-steps {A}", cost, [multistep(80.0)])


# With cd.py's and ct.py's recipes otherwise; of glyphs they say:
ABLATED = "in CD Heun, N = 18, Huber, mu = 0; in CT N from 2 to 21, mu0 = 0.9, l2"
# As "cd-heun-18", which these are compared with; a recipe may say otherwise.
HEUN_18 = "--teacher {teacher} --solver heun --N 18"
ABLATIONS = {f"cd-{dist}": ablation(CD, f"{HEUN_18} --dist {dist}", cost)
             for dist, cost in (("l1", 1.5), ("l2", 1.5), ("lpips", 100.0))}
for solver, cost, Ns in (("heun", 1.5, (9, 18, 36, 72)), ("euler", 1.3, (9, 18, 72))):
    for N in Ns:
        ABLATIONS[f"cd-{solver}-{N}"] = ablation(
            CD, f"--teacher {{teacher}} --solver {solver} --N {N}", cost)
ABLATIONS["ct-adaptive"] = ablation(CT, "--recipe ct NET", 1.0)
for N in (10, 40, 150):  # N levels always, and the mu of the adaptive run at N: mu0^(s0 / N)
    ABLATIONS[f"ct-fixed-{N}"] = ablation(
        CT, f"--recipe ct NET --schedule double --s0 {N - 1} --s1 {N - 1} "
        f"--mu0 {0.9 ** (2 / (N - 1)):.6f}", 1.0)
# CM Eq. 4; with Eq. 5 these are "cd-heun-18" and "ct-adaptive".
EQ_4 = " --parametrisation free"
ABLATIONS["cd-free"] = ablation(CD, HEUN_18 + EQ_4, 1.5)
ABLATIONS["ct-free"] = ablation(CT, "--recipe ct NET" + EQ_4, 1.0)
# Continuous time, an ingredient more each.
UNCUT, SCM = "--objective continuous --bandwidth inf", "--objective scm "
INGREDIENTS = {
    "CM": ("continuous-uncut", UNCUT),
    "+ cut": ("continuous-cut", "--objective continuous"),
    "+ weight, times": ("scm-weighted", SCM + "--r 1 --warm-up 1 --tangent-c 1"),
    "+ normalised": ("scm-normalised", SCM + "--r 1 --warm-up 1"),
    "+ warm-up: sCM": ("scm-warm", SCM + "--r 1"),
    "+ r held at 0.2": ("scm-held", SCM),
    "sCM, not cut": ("scm-uncut", SCM + "--r 1 --bandwidth inf"),
}
for name, flags in INGREDIENTS.values():
    ABLATIONS[name] = ablation(CD, f"--teacher {{teacher}} {flags} --ema-decay 0.99", 2.1)
PANELS = {  # label of a curve: its training
    "Metric functions in CD": {"l1": "cd-l1", "l2": "cd-l2", "Huber": "cd-heun-18",
                               "LPIPS": "cd-lpips"},
    "Solver and N in CD": {f"{solver.title()}, N = {N}": f"cd-{solver}-{N}"
                           for N in (9, 18, 72) for solver in ("heun", "euler")},
    "N with Heun in CD": {f"N = {N}": f"cd-heun-{N}" for N in (9, 18, 36, 72)},
    "Adaptive N and mu in CT": {"adaptive": "ct-adaptive"} | {
        f"N = {N}": f"ct-fixed-{N}" for N in (10, 40, 150)},
    "Parametrisation": {"CD, Eq. 5": "cd-heun-18", "CD, Eq. 4": "cd-free",
                        "CT, Eq. 5": "ct-adaptive", "CT, Eq. 4": "ct-free"},
}
PAIRED = "Solver and N in CD", "Parametrisation"  # whose lines come in pairs of one colour


CONTINUOUS_TIME = {"Continuous time, from a teacher": {
    label: name for label, (name, _) in INGREDIENTS.items()}}


def trainings_of(panels):
    return {name for lines in panels.values() for name in lines.values()}


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

def budgets(K, teacher_steps, A):
    """What stands in braces in the flags. The rounds of a distillation add up to K: stage 1 three
    tenths, each last round two tenths."""
    stage_1, last = 3 * K // 10, K // 5
    s_round = (K - stage_1 - 2 * last - 1) // 2
    return dict(K=K, half=K // 2, teacher_steps=teacher_steps, A=A,
                d_1=stage_1, d_round=K - stage_1 - 3 * last, d_last=last,
                # S's round of N = 1 is one step long
                s_1=K - 2 * s_round - 2 * last - 1, s_round=s_round, s_last=last,
                pd_round=last, pd_last=K // 2 - last)


def merged(module, flags):
    """The settings that these flags make for a script and that apply, as `common.parse_flags`."""
    parser = module.make_parser()
    settings = parser.defaults | module.recipe(flags) | flags
    return {key: value for key, value in settings.items() if not parser.why_not(key, settings)}


# What a path keeps of its own recipe, or this module decides.
FREE = {"net", "flip", "out_dir", "dataset", "teacher_steps", "total_steps", "start_N",
        "stage1_steps", "round_steps", "last_steps"}


def command(method, args, teacher, folder, seed):
    """The command line of a training: [python, script, flags ...]. Of a path it has the settings of
    the glyphs recipe: its own is for GPUs."""
    numbers = budgets(args.total_steps, args.teacher_steps, args.ablation_steps)
    net = "--net " + " ".join(args.net) if args.net else ""
    words = method.flags.replace("NET", net).format(**numbers, teacher=teacher).split()
    if args.dataset not in common.DIGITS:
        module = MODULES[method.script]
        flags = vars(module.make_parser().parse_args(words))
        theirs = merged(module, flags | dict(dataset=args.dataset))
        for key, value in merged(module, flags).items():
            if key not in FREE | flags.keys() and theirs.get(key) != value:
                values = value if isinstance(value, list) else [value]
                words += [common.flag_name(key), *map(str, values)]
    if args.dataset != "glyphs":
        words += ["--dataset", args.dataset]
        if args.data_dir:
            words += ["--data-dir", args.data_dir]
        if args.jobs > 1:
            words += ["--workers", "0"]
    if args.batch_size:
        words += ["--batch-size", str(args.batch_size)]
    return [sys.executable, str(ROOT / method.script), *words, "--seed", str(seed),
            "--sample-every", "0", "--out-dir", str(folder)]


def ways_of(method, words, again=False):
    """The ways to draw from the training that the command `words` starts: of a consistency model
    in two steps as its recipe says. again: of a further seed."""
    if again and method.ways is TEACHER:
        return TEACHER_AGAIN
    if method.ways is not CONSISTENCY:
        return method.ways
    module = MODULES[method.script]
    flags = vars(module.make_parser().parse_args(words[2:]))
    settings, four = merged(module, flags), FOUR
    if "s1" in settings:  # from scratch: it has learned no other levels
        four = [common.nearest_level(settings["s1"] + 1, sigma) for sigma in FOUR]
    return consistency(settings["sigmas"][:2], four)


def name_with(seed, name, args):
    """Of a training, and of its folder in the work folder."""
    return name if seed == args.seed else f"seed{seed}/{name}"


def same_training(before, now):
    """Whether two commands train alike: the --workers of this module change nothing."""
    before, now = (" ".join(words).replace(" --workers 0", "") for words in (before, now))
    return before == now


def read_record(folder):
    """What is known of a training: its command, seconds, error, whether it is done, its rows."""
    try:
        return json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        return dict(seconds=0.0, done=False, rows={})


def write_record(folder, record):
    folder.mkdir(parents=True, exist_ok=True)
    with common.atomic_file(folder / "result.json", "w") as file:
        json.dump(record, file, indent=1)


def last_line(folder):
    """Of what a training has said."""
    lines = (folder / "output.txt").read_text(errors="replace").replace("\r", "\n").split("\n")
    return ([line.strip() for line in lines if line.strip()] or ["it said nothing"])[-1]


def commit():
    """Of this code, or nothing where that is not known."""
    if not shutil.which("git"):
        return ""
    told = subprocess.run("git describe --always --dirty --exclude *".split(), cwd=ROOT, text=True,
                          capture_output=True)
    return told.stdout.strip()


def teacher_of(name):
    """The name of the training of the same seed that it waits for."""
    return str(Path(name).with_name("teacher"))


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Trainings:
    """Those of `train`, waiting and running."""
    def __init__(self, todo, commands, folders, jobs, stop):
        self.todo, self.commands, self.folders = todo, commands, folders
        self.jobs, self.stop, self.began = jobs, stop, time.perf_counter()
        self.waiting = sorted(todo, key=self.turn)
        self.running, self.seen, self.told = {}, {}, False
        self.env = {**os.environ, "OMP_NUM_THREADS": str(max(cores() // jobs, 1))}

    def turn(self, name):
        """The seeds one after the other; of each the teacher first, then the longest."""
        seeds = list(dict.fromkeys(Path(other).parent for other in self.todo))
        return seeds.index(Path(name).parent), Path(name).name != "teacher", -self.todo[name]

    def keep(self, name, seconds, **news):
        record = read_record(self.folders[name])
        known = dict(command=self.commands[name][1:], seconds=record["seconds"] + seconds,
                     commit=commit(), date=time.strftime("%Y-%m-%d"))
        write_record(self.folders[name], record | known | news)

    def begin(self):
        for name in list(self.waiting):
            words = self.commands[name]
            needs = "--teacher" in words and "none" not in words
            teacher = teacher_of(name)
            early = needs and (teacher in self.waiting or teacher in self.running)
            if early or len(self.running) == self.jobs:
                continue
            self.waiting.remove(name)
            if needs and not read_record(self.folders[teacher])["done"]:
                self.keep(name, 0.0, done=False, error="its teacher was not trained")
                continue
            self.folders[name].mkdir(parents=True, exist_ok=True)
            with open(self.folders[name] / "output.txt", "a") as output:
                # a session of its own: Ctrl-C reaches it through here, once
                process = subprocess.Popen(words, stdout=output, stderr=output, env=self.env,
                                           start_new_session=True)
            self.running[name] = process, time.perf_counter()

    def look_after(self):
        """End what has ended. An ablation's checkpoints are kept, for a curve."""
        for name, (process, started) in list(self.running.items()):
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if name in ABLATIONS:
                self.seen[name] = keep_snapshot(self.folders[name], self.seen.get(name))
            if not pid:
                continue
            del self.running[name]
            process.returncode = code = os.waitstatus_to_exitcode(status)
            seconds = usage.ru_utime + usage.ru_stime
            if torch.cuda.is_available():
                seconds = time.perf_counter() - started
            error, ending = None, "trained"
            if code and self.stop.number:
                ending = "stopped"
            elif code:
                error = last_line(self.folders[name])
                ending = f"FAILED: {error}"
            self.keep(name, seconds, done=code == 0, error=error)
            self.say(name, ending)

    def say(self, name, ending):
        minutes = read_record(self.folders[name])["seconds"] / 60
        left = sum(self.todo[other] for other in (*self.waiting, *self.running))
        gone = (time.perf_counter() - self.began) / 60
        to_go = gone * left / max(sum(self.todo.values()) - left, 1e-9)
        print(f"{name}: {ending}, {minutes:.1f} min; {gone:.0f} min gone, about {to_go:.0f} to go",
              flush=True)

    def work(self):
        while self.running or (self.waiting and not self.stop.number):
            if not self.stop.number:
                self.begin()
            elif not self.told:
                self.told = True
                for process, _ in self.running.values():
                    process.terminate()
            time.sleep(0.1)
            self.look_after()


def train(todo, commands, folders, jobs, stop):
    """Run the trainings `todo` (name -> cost), `jobs` at once, and keep in each folder's
    result.json how it went.

    The others wait for their seed's teacher if one is in their command. When `stop` has caught a
    signal, they are told to save, and waited for.
    """
    trainings = Trainings(todo, commands, folders, jobs, stop)
    try:
        trainings.work()
    finally:
        for process, _ in trainings.running.values():
            process.kill()


def keep_snapshot(folder, seen):
    """Keep what there is to draw with in a new last.pt. Returns when it was written; `seen`: when
    the last one was."""
    path = folder / "last.pt"
    written = path.stat().st_mtime_ns if path.exists() else None
    if written != seen:
        state = common.load_checkpoint(path)
        kept = {key: state[key] for key in ("script", "step", "args", "model_args", "ema")}
        common.save_checkpoint(folder / f"at{state['step']:06d}.pt", kept)
    return written


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------

def measures(args):
    """What two measurements have in common if they can be compared, as a text."""
    path = args.data_dir if args.dataset in common.DIGITS else args.dataset
    if path and Path(path).is_file():
        path = f"{path} {common.file_sha(path)}"
    return f"{args.n} {path} measures {judge.MEASURES}"


def measure(name, ways, folder, run, judged, args, stop):
    """The Rows of a training, kept in result.json."""
    record, rows = read_record(folder), []
    for way in ways:
        if stop.number:
            break
        path = folder / way.file
        drawn = f"{way.calls} {way.drawn} {way.w:g} {args.seed}"
        key = f"{common.file_sha(path)} {drawn} {measures(args)}"
        if key not in record["rows"]:
            net, draw = way.open(path, run)
            step = common.load_checkpoint(path)["step"]
            found = judge.score(judged(), net, draw, args.n, args.seed)
            record["rows"][key] = Row(way.calls, way.drawn, way.w, step, *found)
            write_record(folder, record)
            print(f"{name}, {way.drawn}, {way.calls} calls, w = {way.w:g}: {found.read:.1%}, "
                  f"{found.distance:.3f}", flush=True)
        rows.append(Row(*record["rows"][key]))
    return rows


def yardsticks(path, judged, args, stop):
    """The judge's words, and Rows of training images and of held-out ones; kept in a file."""
    known = json.loads(path.read_text()) if path.exists() else {}
    key = measures(args)
    if key not in known and not stop.number:
        known[key] = [judged().words, *judge.yardsticks(judged(), args.n)]
        path.parent.mkdir(parents=True, exist_ok=True)
        with common.atomic_file(path, "w") as file:
            json.dump(known, file, indent=1)
    words, *scores = known.get(key, [""])
    return words, [Row(0, "", 0.0, 0, *score) for score in scores]


def mean_of(rows):
    """The means of rows that differ in their seed."""
    scores = [row[4:] for row in rows]
    means = [sum(column) / len(rows) for column in zip(*scores)]
    return Row(*rows[0][:4], *means)


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":")[1].strip()
    return f"{cores()} cores, {model}"


# --------------------------------------------------------------------------------------------------
# What is expected, and whether it came out
# --------------------------------------------------------------------------------------------------

def verdict_on(claim, pairs):
    """A line on a claim. pairs: (name, a, b), of which a is to be below b; None: it was not
    measured."""
    pairs = [(name, a, b) for name, a, b in pairs if a is not None and b is not None]
    if not pairs:
        return f"- {claim}: *not measured*."
    right = sum(a < b for _, a, b in pairs)
    verdict = "holds in part" if right else "does not hold"
    if right == len(pairs):
        verdict = "holds"
    shown = [f"{name} {a:.3f} {'<' if a < b else '≥'} {b:.3f}" for name, a, b in pairs]
    return f"- {claim}: **{verdict}** ({'; '.join(shown)})."


ALIKE = {5: (5,), 8: (8,), 10: (9, 10), 12: (11, 12)}  # network calls; 2 N - 1 is odd


def beside_solvers(rows):
    """For `verdict_on`: the teacher's fast solvers beside DDIM, and in one and two calls the best
    student beside the best solver. rows: name -> its rows."""
    quick, students = [], []
    for calls, alike in ALIKE.items():
        teacher = [row for row in rows.get("teacher", ()) if row.w == 0]
        solved = {row.drawn: row.distance for row in teacher if row.calls in alike}
        ddim = solved.get(FAST["euler"])
        for name in list(FAST.values())[1:]:
            quick.append((f"NFE {calls}, {name}", solved.get(name), ddim))
        for n in (1, 2):
            drawn = [(row.distance, METHODS[name].title) for name in rows for row in rows[name]
                     if "{teacher}" in METHODS[name].flags and (row.calls, row.w) == (n, 0)]
            if solved and drawn:
                distance, student = min(drawn)
                solver = min(solved, key=solved.get)
                label = f"{student}, NFE {n}, beside {solver}, {calls}"
                students.append((label, distance, solved[solver]))
    return quick, students


def expectations(rows):
    """Lines on what the papers lead one to expect of the table. rows: name -> its rows."""
    def cell(column, name, calls, w=0.0, drawn=""):
        for row in rows.get(name, ()):
            if (row.calls, row.w) == (calls, w) and drawn in ("", row.drawn):
                return getattr(row, column)

    distance, share = functools.partial(cell, "distance"), functools.partial(cell, "read")

    def beside_ct(name):
        return [(f"NFE {n}", distance(name, n), distance("ct", n)) for n in (1, 2, 4)]
    consistency = [name for name in METHODS if METHODS[name].ways is CONSISTENCY]
    ctms = [name for name in METHODS if METHODS[name].script == CTM]
    fewer, more = [], []
    for name in consistency + ctms:
        drawn = "gamma 1" if name in ctms else ""
        fewer.append((METHODS[name].title, distance(name, 2, 0.0, drawn), distance(name, 1)))
    for name in ctms:
        one, two, four = distance(name, 1), *(distance(name, n, 0.0, "gamma 0") for n in (2, 4))
        title = METHODS[name].title
        more += [(f"{title}, two", two, one), (f"{title}, four", four, two)]
    short = []
    for w, calls in ((0.0, 35), (1.0, 70)):
        for name, drawn in (("guided-d", "DDIM"), ("guided-s", "stochastic")):
            teacher = share("teacher", calls, w, "18 Heun steps")
            student = share(name, 4, w, drawn)
            if teacher is not None and student is not None:
                label = f"{name[-1].upper()}, w = {w:g}, short by"
                short.append((label, teacher - student, 0.02))

    def soft_beside(name):
        drawn = {"NFE 1": (1, "one jump"), "NFE 2": (2, "gamma 0"), "NFE 4": (4, "gamma 0"),
                 "Heun on g": (ON_G.calls, ON_G.drawn)}
        return [(label, distance("ctm", calls, 0.0, how), distance(name, calls, 0.0, how))
                for label, (calls, how) in drawn.items()]
    noisier = []
    for name in ctms:
        for gamma in ("gamma 0.3", "gamma 1"):
            none, some = (distance(name, 4, 0.0, drawn) for drawn in ("gamma 0", gamma))
            noisier.append((f"{METHODS[name].title} beside {gamma}", none, some))
    quick, students = beside_solvers(rows)
    return [verdict_on("CD is better than CT at equal steps", beside_ct("cd")),
            verdict_on("Two steps are better than one", fewer),
            verdict_on("CTM with gamma 0 improves with steps", more),
            verdict_on("iCT is ahead of CT", beside_ct("ict")),
            verdict_on("ECT is ahead of CT", beside_ct("ect")),
            verdict_on("Guided distillation at 4 steps is read within 2 points of its teacher",
                       short),
            verdict_on("CTM: soft matching is ahead of global", soft_beside("ctm-global")),
            verdict_on("CTM: soft matching is ahead of local", soft_beside("ctm-local")),
            verdict_on("CTM: the denoising loss helps", soft_beside("ctm-no-dsm")),
            verdict_on("CTM in four jumps: gamma 0 is ahead of more noise", noisier),
            verdict_on("Of a teacher, fast solvers are ahead of DDIM at equal calls", quick),
            verdict_on("The teacher's best student is ahead of its best solver in more calls",
                   students)]


def conclusions(curves):
    """Lines on the paper's conclusions from its Figure 3. curves: name -> {step: distance}."""
    def at(name, step=None):  # or where it ended
        curve = curves.get(name)
        return curve.get(step or max(curve)) if curve else None

    def beside(name, others, label):
        return [(label.format(other.split("-")[-1]), at(name), at(other)) for other in others]
    small, large = "ct-fixed-10", "ct-fixed-150"
    common_steps = curves.get(small, {}).keys() & curves.get(large, {}).keys()
    first = min(common_steps, default=0)  # a stopped run has more
    panel = PANELS["Metric functions in CD"]
    ends = "".join(f" {label}: {at(name):.3f}." for label, name in panel.items() if at(name))
    free = {"CD": curves.get("cd-free"), "CT": curves.get("ct-free")}
    course = "".join(f" {label} with Eq. 4: {curve[min(curve)]:.3f} after {min(curve)} steps, "
                     f"{curve[max(curve)]:.3f} after {max(curve)}."
                     for label, curve in free.items() if curve)
    solvers = [(f"N = {N}", at(f"cd-heun-{N}"), at(f"cd-euler-{N}")) for N in (9, 18, 72)]
    return [
        verdict_on("(a) LPIPS is better than l1 and l2",
               beside("cd-lpips", ("cd-l1", "cd-l2"), "LPIPS beside {}")) + ends,
        verdict_on("(b) Heun is better than Euler at equal N", solvers),
        verdict_on("(c) With Heun N = 18 is the best, and more is no use",
               beside("cd-heun-18", [f"cd-heun-{N}" for N in (9, 36, 72)], "18 beside {}")),
        verdict_on("(d) In CT a small N converges faster",
               [("first checkpoint, N = 10 beside 150", at(small, first), at(large, first))]),
        verdict_on("(d) but to worse samples than a large N",
               [("last checkpoint, N = 150 beside 10", at(large), at(small))]),
        verdict_on("(d) and adaptive N and mu are better than fixed ones",
               beside("ct-adaptive", [f"ct-fixed-{N}" for N in (10, 40, 150)],
                      "adaptive beside N = {}")),
        verdict_on("c_skip x + c_out F (Eq. 5) is better than the network alone (Eq. 4)",
               [("CD", at("cd-heun-18"), at("cd-free")),
                ("CT", at("ct-adaptive"), at("ct-free"))]) + course,
    ]


# --------------------------------------------------------------------------------------------------
# The table and the pictures
# --------------------------------------------------------------------------------------------------

COLUMNS = {  # of a Row: title, unit, format
    "read": ("read as asked", "%", ".1f"),
    "distance": ("Fréchet distance", "", ".2f"),
    "precision": ("precision", "", ".2f"),
    "recall": ("recall", "", ".2f"),
    "nearest": ("nearest", "", ".3f"),
    "copied": ("copied", "%", ".1f"),
    "rate": ("images/s", "", ",.0f"),
}
HEADS = ["method", "NFE", "drawn", "w", *(title for title, *_ in COLUMNS.values()),
         "training minutes", "steps"]


def cell(column, rows):
    """Of rows that differ in their seed: the mean, and the range: "96.3 (95.8 to 96.9)%"."""
    _, unit, form = COLUMNS[column]
    values = [getattr(row, column) * (100 if unit else 1) for row in rows]
    mean, low, high = (f"{value:{form}}" for value in (sum(values) / len(values), min(values),
                                                       max(values)))
    if mean == "nan":
        return "–"
    spread = f" ({low} to {high})" if len(values) > 1 and column != "rate" else ""
    return mean + spread + unit


def line_of(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def minutes_of(records):
    """Of processor time, in the mean over the seeds that were trained."""
    seconds = [record["seconds"] for record in records if record["done"]]
    return sum(seconds) / len(seconds) / 60 if seconds else 0.0


def table(rows, yardstick, records):
    """rows: training -> for each way its Rows, one a seed. yardstick: of training images and of
    held-out ones. records: training -> of each seed."""
    lines = [line_of(*HEADS), "|---" * len(HEADS) + "|"]
    for title, row in zip(("*training images*", "*held-out images*"), yardstick):
        cells = [cell(column, [row]) for column in COLUMNS]
        lines.append(line_of(title, "–", "–", "–", *cells, "–", "–"))
    teacher = minutes_of(records.get("teacher", ()))
    for name in rows:
        method = METHODS[name]
        for record in records[name]:
            if not record["done"]:
                error = (record.get("error") or "not trained").replace("|", "/")
                empty = [""] * (len(HEADS) - 2)
                lines.append(line_of(method.title, f"failed: {error}", *empty))
        minutes = f"{minutes_of(records[name]):.1f}"
        if "{teacher}" in method.flags:
            minutes += f" + {teacher:.1f}"
        for same in rows[name]:
            row, cells = same[0], [cell(column, same) for column in COLUMNS]
            lines.append(line_of(method.title, row.calls, row.drawn, f"{row.w:g}", *cells, minutes,
                                 row.steps))
    return lines


NOISY = {"gamma 0.3": "--", "gamma 1": ":"}  # lines of CTM's own comparison
QUICKEST = "best of the fast solvers"
MARKERS = {"Heun": "*", "ancestral": "x", QUICKEST: "P"}


def kind_of(row):
    """Rows that make one curve, of several sorts that a method has."""
    for kind in ("stage 1", "Heun", "ancestral"):
        if kind in row.drawn:
            return kind
    if row.drawn in FAST.values():
        return QUICKEST
    return row.drawn if row.drawn in NOISY else ""


def curves_of(rows, column, best):
    """{kind: {network calls: value}} of the rows of w = 0; of several in as many calls the best."""
    curves = {}
    for row in sorted(rows, key=lambda row: (kind_of(row), row.calls)):
        if row.w == 0:
            curve, value = curves.setdefault(kind_of(row), {}), getattr(row, column)
            curve[row.calls] = best(value, curve.get(row.calls, value))
    return curves


def draw_lines(drawing, rows):
    """Shares and distances against network calls, a line for each method and kind."""
    left, right = drawing.subplots(1, 2)
    for axis, column, scale, best in ((left, "read", 100, max),
                                      (right, "distance", 1, min)):
        for number, (name, its_rows) in enumerate(rows.items()):
            for kind, curve in curves_of(its_rows, column, best).items():
                values = [scale * value for value in curve.values()]
                line = ":" if kind else "--" if number > 9 else "-"
                style = NOISY.get(kind, line)
                marker = MARKERS.get(kind, "osD^v"[number % 5])
                label = METHODS[name].title + (f", {kind}" if kind else "")
                axis.plot(list(curve), values, linestyle=style, color=f"C{number % 10}",
                          marker=marker, label=label)
        axis.set(xscale="log", xlabel="network calls (NFE)")
        ticks = 1, 2, 4, 8, 16, 35
        axis.set_xticks(ticks, [str(n) for n in ticks], minor=False)
        axis.grid(alpha=0.3)
    left.set(title="read as the label asked for, %")
    right.set(title="Fréchet distance", yscale="log")
    drawing.legend(*right.get_legend_handles_labels(), loc="outside right center", fontsize=8)


def draw_curves(path, rows):
    """Quality against network calls, without guidance; below it CTM's own comparison."""
    from matplotlib import figure
    own = {name: rows[name] for name in OWN if name in rows}
    panels = [rows]
    if len(own) > 1:
        methods = {name: rows[name] for name in rows if name not in own}
        plain = [row for row in own.get("ctm", ()) if kind_of(row) not in NOISY]
        panels = [methods | {"ctm": plain}, own]
    drawing = figure.Figure(figsize=(12, 5 * len(panels)), layout="constrained")
    parts = drawing.subfigures(len(panels), squeeze=False)[:, 0]
    for part, its_rows in zip(parts, panels):
        draw_lines(part, its_rows)
    drawing.savefig(path, dpi=100)


def draw_panels(path, panels, curves):
    """One-step distance against steps. panels: title -> {label: training}; curves: training ->
    {steps: distance}."""
    from matplotlib import figure
    drawing = figure.Figure(figsize=(2 + 3 * len(panels), 3.6), layout="constrained")
    axes = drawing.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items()):
        pairs = title in PAIRED
        for number, (label, name) in enumerate(lines.items()):
            if curves.get(name):
                axis.plot(*zip(*curves[name].items()), marker=".", label=label,
                          color=f"C{number // 2 if pairs else number}",
                          linestyle="--" if pairs and number % 2 else "-")
        axis.set(title=title, xlabel="training steps", yscale="log")
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend(fontsize=8)
    drawing.supylabel("Fréchet distance, one step")
    drawing.savefig(path, dpi=100)


def draw_samples(path, blocks, columns, across=3):
    """blocks: title -> images (n,H,W,3) uint8, `columns` of them in each row of a block; `across`
    blocks beside each other."""
    from PIL import Image, ImageDraw, ImageFont
    grids = []
    for images in blocks.values():
        n, H, W, C = images.shape
        grid = images.reshape(n // columns, columns, H, W, C).swapaxes(1, 2)
        zoom = max(1, 56 // H)
        grids.append(grid.reshape(-1, columns * W, C).repeat(zoom, 0).repeat(zoom, 1))
    height, width = grids[0].shape[0] + 24, grids[0].shape[1] + 12  # with title and margin
    size = width * min(across, len(grids)), height * math.ceil(len(grids) / across)
    whole = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(15)
    for number, (title, grid) in enumerate(zip(blocks, grids)):
        top, left = number // across * height, number % across * width
        pen.text((left, top + 2), title, fill="black", font=font)
        whole.paste(Image.fromarray(grid), (left, top + 22))
    with common.atomic_file(path) as file:
        whole.save(file, "PNG")


def examples(dataset, each=3):
    """(each * classes,H,W,3) uint8: in a row the first images of the classes, one of each."""
    labels = np.asarray(dataset.labels)
    places = [np.resize(np.flatnonzero(labels == y), each) for y in range(dataset.classes)]
    images, _ = dataset.__getitems__(np.stack(places, 1).ravel())
    return images.permute(0, 2, 3, 1).numpy()


def samples_of(way, folder, run, seed, each=3):
    """The first of the samples that were measured, as `examples`."""
    net, draw = way.open(folder / way.file, run)
    places = torch.arange(each * net.classes)
    y = (places % net.classes).to(run.device)
    shape = len(places), 3, net.image_size, net.image_size
    with torch.no_grad():
        images = draw(y, common.SeededNoise(places, seed), shape)
    return common.to_uint8(images).cpu().numpy()


def to_be_shown(ways):
    """Of a teacher its first way; of others that of fewest calls, without guidance."""
    plain = [way for way in ways if way.w == 0]
    return plain[0] if ways is TEACHER else min(plain, key=lambda way: way.calls)


def picture(draw, path, *values):
    try:
        draw(path, *values)
    except ImportError:
        print(f"{path} was not drawn: pip install matplotlib")


def memorised(rows, held_out):
    """A line on whether samples lie nearer to training images than the held-out ones, whose Row is
    `held_out`. rows: name -> its rows."""
    drawn = [(row, f"{METHODS[name].title}, NFE {row.calls}, {row.drawn}, w = {row.w:g}")
             for name in rows for row in rows[name]]
    if math.isnan(held_out.nearest) or not drawn:
        return []
    near, near_label = min(drawn, key=lambda pair: pair[0].nearest)
    most, most_label = max(drawn, key=lambda pair: pair[0].copied)
    return [f"- Learned by heart? Nearest to the training images are the samples of {near_label}: "
            f"{near.nearest:.3f}, where held-out images have {held_out.nearest:.3f}. Most are "
            f"copied by {most_label}: {most.copied:.1%}, where held-out images have 1.0%."]


def command_line(args):
    """That of the board, to be read: of paths what is below this folder, or the name."""
    keys = ("dataset", "data_dir", "net", "batch_size", "total_steps", "teacher_steps",
            "ablation_steps", "n", "seed", "seeds", "only")
    words = ["python tests/bench.py quality"]
    for key in keys:
        value = getattr(args, key)
        if key in ("dataset", "data_dir") and value not in (None, *common.DIGITS):
            below = Path(value).is_relative_to(Path.cwd())
            value = Path(value).relative_to(Path.cwd()) if below else Path(value).name
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [common.flag_name(key), *map(str, values)]
    return " ".join(words)


def origin(args, run, records):
    """Words on how the trainings came about: when, of which code, where, with which seeds."""
    trained = [record for same in records.values() for record in same if record["done"]]
    dates = sorted({record.get("date", "") for record in trained} - {""})
    commits = sorted({record.get("commit", "") for record in trained} - {""})
    when = " to ".join(dict.fromkeys(dates[:1] + dates[-1:]))
    code = f"commit {', '.join(commits)}" if commits else ""
    minutes = sum(record["seconds"] for record in trained) / 60
    seeds = f"One run, seed {args.seed}."
    if args.seeds > 1:
        several = ", ".join(METHODS[name].title for name in HEADLINE if name in records)
        seeds = (f"{args.seeds} runs, seeds {args.seed} to {args.seed + args.seeds - 1}, of "
                 f"{several}, each from the teacher of its seed: mean and range; one run, seed "
                 f"{args.seed}, of the others. Most samplers of a teacher are of the first.")
    words = [when, code, machine(), f"torch {torch.__version__}",
             str(run.dtype).removeprefix("torch."), f"all trainings {minutes:.0f} minutes"]
    return "; ".join(filter(None, words)) + f". {seeds}"


def report(args, run, told, lines_of_table, held_out, records, rows, curves, chosen):
    """The lines of quality_NAME.md."""
    gpu = run.device.type == "cuda"
    recipe = args.dataset if args.dataset in common.DIGITS else "glyphs"
    batch = args.batch_size or cd.STUDENTS[recipe]["batch_size"]
    lines = [
        f"# Scoreboard: {Path(args.dataset).stem}", "", f"`{command_line(args)}`", "",
        f"{origin(args, run, records)} Every student took {args.total_steps} optimizer steps of "
        f"{batch} images, the teacher {args.teacher_steps}; the settings are those of the {recipe} "
        "recipes.",
        f"{args.n} samples each; {told}.", "", *lines_of_table, "",
        "- *read as asked*: share of the samples that the classifier reads as the label asked for. "
        "*Fréchet distance*: in its features, to held-out images; for w > 0 too, though guidance "
        "moves away from the data as it is meant to. *precision*: share of the samples within "
        "reach of held-out images, in these features; *recall*: the reverse.",
        "- *nearest*: from the nearest training image, the median rms difference of pixels in "
        "[-1, 1]; *copied*: share of the samples that are nearer to one than the nearest hundredth "
        "of held-out images is.", *memorised(rows, held_out),
        f"- *images/s*: when sampling, {'on the GPU' if gpu else 'in one thread beside others'}. "
        f"*training minutes*: of {'the machine' if gpu else 'processor time'}, start included, + "
        "those of the teacher where there is one; of a distillation in rounds all its rounds, of "
        f"which *steps* counts those up to that student. Stage 1 has {3 * args.total_steps // 10} "
        f"of guided distillation D's {args.total_steps} steps.",
        "- Consistency models draw from the noise levels named, in four steps from those of the "
        "Karras grid of N = 5 but its end, on which CTM jumps too, CT and iCT from the nearest "
        "of their own. Steps are the critic's own turns too.", "",
        "## What was expected", "",
        "Smaller Fréchet distance is better. Of several seeds the mean.", "", *expectations(rows),
        ""]
    failed = [f"- {name} failed: {records[name][0].get('error')}" for name in chosen
              if name in ABLATIONS and not records[name][0]["done"]]
    if failed or curves.keys() & trainings_of(PANELS):
        download = "" if "cd-lpips" in chosen else " LPIPS takes a GPU and a download."
        settings = f"those of the {recipe} recipes, in CD Heun, N = 18"
        if recipe == "glyphs":
            settings = ABLATED
        lines += [
            "## Consistency models, Figure 3, at this scale", "",
            f"One-step samples, Fréchet distance after {args.ablation_steps} steps. Settings "
            f"otherwise: {settings}.{download}", "", *conclusions(curves), "", *failed, ""]
    ends = [f"- {label}: {curves[name][max(curves[name])]:.3f}"
            for label, (name, _) in INGREDIENTS.items() if name in curves]
    if ends:
        lines += ["## Continuous time, an ingredient more each", "",
                  f"cd.py, one-step samples, Fréchet distance after {args.ablation_steps} steps, "
                  "--ema-decay 0.99. With tangent-c 1 hardly anything is normalised.", "", *ends]
    return lines


# --------------------------------------------------------------------------------------------------

def choose(args):
    """The trainings asked for: name -> Method, their teacher first. Raises UserError for a name
    that is none."""
    every = dict(METHODS)
    if args.ablation_steps:
        every |= ABLATIONS
        if not torch.cuda.is_available():
            del every["cd-lpips"]
    for name in args.only or ():
        if name not in every:
            raise common.UserError(f"--only {name}: there is no such training; there are "
                                   f"{', '.join(every)}")
    chosen = {name: every[name] for name in every if not args.only or name in args.only}
    if any("{teacher}" in method.flags for method in chosen.values()):
        chosen = {"teacher": METHODS["teacher"]} | chosen
    return chosen


def steps_of(name, args):
    if name in ABLATIONS:
        return args.ablation_steps
    return args.teacher_steps if name == "teacher" else args.total_steps


def open_data(args):
    """The data set, when all that is needed is seen to be there: now, not when every training has
    failed. Makes the paths in args absolute."""
    if args.dataset not in common.DIGITS and not Path(args.dataset).exists():
        raise common.UserError(f"--dataset {args.dataset} does not exist: name glyphs, mnist or "
                               "the path of images with labels")
    if args.data_dir:
        if args.dataset != "mnist":
            raise common.UserError("--data-dir goes with --dataset mnist: it says where it lies")
        args.data_dir = str(Path(args.data_dir).resolve())
    if args.dataset not in common.DIGITS:
        args.dataset = str(Path(args.dataset).resolve())
    net = args.net or common.DATASETS[common.known_dataset(vars(args))]["net"]
    size = common.net_settings(net)["image_size"]
    dataset = common.load_dataset(args.dataset, args.data_dir, size)
    if not dataset.classes:
        raise common.UserError(f"--dataset {args.dataset} has no labels: the scoreboard needs them")
    if args.dataset == "mnist":
        judge.held_out_digits(args.data_dir, size)
    return dataset


def plan(args, chosen, work):
    """The command lines, training -> words; and name of a method -> its trainings, one a seed."""
    commands, same = {}, {name: [] for name in chosen}
    for seed, name in itertools.product(range(args.seed, args.seed + args.seeds), chosen):
        if seed == args.seed or name in HEADLINE:
            training = name_with(seed, name, args)
            teacher = work / teacher_of(training) / "last.pt"
            words = command(chosen[name], args, teacher, work / training, seed)
            if name in ABLATIONS:
                words += ["--save-every", str(max(args.ablation_steps // 5, 1))]
            commands[training] = words
            same[name].append(training)
    return commands, same


def unfinished(args, chosen, commands, same, folders):
    """The trainings that are not done, or were of another command: name -> cost."""
    todo = {}
    for name, trainings in same.items():
        for training in trainings:
            record = read_record(folders[training])
            again = same_training(record.get("command", []), commands[training][1:])
            if not record["done"] or not again:
                todo[training] = chosen[name].cost * steps_of(name, args)
    return todo


def measure_all(args, run, size, work, chosen, commands, folders, stop):
    """The judge's words; the yardsticks' Rows; and of each training its Rows. Each is measured in
    one thread, --jobs at once."""
    torch.set_num_threads(1)
    making = threading.Lock()
    kept = work / f"judge{size}.pt", measures(args)
    make = functools.cache(
        lambda: judge.make_judge(args.dataset, size, run.device, args.data_dir, kept))

    def judged():
        with making:  # or two threads would make one each
            return make()

    def of_training(training):
        name, folder = Path(training).name, folders[training]
        if not read_record(folder)["done"]:
            return []
        ways = ways_of(chosen[name], commands[training], training != name)
        if name in ABLATIONS:
            snapshots = sorted(folder.glob("at*.pt"))
            ways = [ways[0]._replace(file=path.name) for path in snapshots]
        return measure(training, ways, folder, run, judged, args, stop)
    told, yardstick = yardsticks(work / f"judge{size}.json", judged, args, stop)
    with ThreadPoolExecutor(args.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return told, yardstick, dict(zip(commands, pool.map(of_training, commands)))


def rows_and_curves(chosen, same, measured):
    """Method -> for each way its Rows, one a seed; and ablation -> {step: distance}."""
    rows, curves = {}, {}
    for name in chosen:
        by_way = {}
        for row in itertools.chain(*(measured[training] for training in same[name])):
            by_way.setdefault(row[:4], []).append(row)
        if name in METHODS:
            rows[name] = list(by_way.values())
        elif by_way:
            curves[name] = {row.steps: row.distance for row in measured[name]}
    return rows, curves


def main(args):
    stop, chosen = common.StopSignal(), choose(args)
    run = common.setup(argparse.Namespace(device="auto", precision="auto", compile=False))
    run.main = False  # nobody is to be told what a checkpoint is taken for
    args.jobs = args.jobs or (1 if run.device.type == "cuda" else cores())
    dataset = open_data(args)
    stem = Path(args.dataset).stem
    work = (Path(args.work) / stem).resolve()
    commands, same = plan(args, chosen, work)
    folders = {training: work / training for training in commands}

    train(unfinished(args, chosen, commands, same, folders), commands, folders, args.jobs, stop)
    told, yardstick, measured = measure_all(
        args, run, dataset.size, work, chosen, commands, folders, stop)
    if stop.number:
        print("stopped: the same command goes on from here")
        raise SystemExit(128 + stop.number)

    records = {name: [read_record(folders[training]) for training in same[name]] for name in same}
    rows, curves = rows_and_curves(chosen, same, measured)
    means = {name: [mean_of(way) for way in rows[name]] for name in rows}
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    lines_of_table = table(rows, yardstick, records)
    lines = report(args, run, told, lines_of_table, yardstick[1], records, means, curves, chosen)
    for file, panels in (("figure3", PANELS), ("continuous", CONTINUOUS_TIME)):
        if curves.keys() & trainings_of(panels):
            picture(draw_panels, results / f"{file}_{stem}.png", panels, curves)
    with common.atomic_file(results / f"quality_{stem}.md", "w") as file:
        file.write("\n".join(lines).rstrip() + "\n")
    picture(draw_curves, results / f"quality_{stem}.png", means)
    if dataset.classes <= 10:
        blocks = {"training images": examples(dataset)}
        for name in means:
            if records[name][0]["done"]:
                way = to_be_shown(ways_of(METHODS[name], commands[name]))
                title = f"{METHODS[name].title}: {way.calls} call{'s' * (way.calls > 1)}"
                blocks[title] = samples_of(way, folders[name], run, args.seed)
        draw_samples(results / f"samples_{stem}.png", blocks, dataset.classes)
    failed = [training for name in same for training, record in zip(same[name], records[name])
              if not record["done"]]
    print(f"{results / f'quality_{stem}.md'}: "
          + (f"{', '.join(failed)} failed" if failed else "all trained and measured"))
    raise SystemExit(1 if failed else 0)
