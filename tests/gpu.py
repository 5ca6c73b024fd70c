"""The first run on a GPU, by one command: is it right, how fast is it, what does it draw.

    python tests/gpu.py                              meant to take 25 minutes on an H100
    python tests/gpu.py --data cifar10.zip           images with labels (default: fetch CIFAR-10)
    python tests/gpu.py --quick                      all of it in little: 3 to 5 minutes
    python tests/gpu.py --only right fast            some of its parts

Needs pytest (tests/requirements.txt). Writes gpu.md and pictures into --results, anew after each
piece. The same command again goes on where it was stopped, and does again what failed; exit code 1:
something has. Of --minutes M (25) a fifth at most goes to the speed, 27% to training a teacher, 9%
to each of three students: 33 gives them 9 and 3 minutes. Without a GPU the same steps run at tiny
sizes, with --quick in 3 minutes, otherwise ct.py is compiled, too, for minutes; the numbers mean
nothing.
"""
import argparse
import contextlib
import datetime
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench
import judge
import numpy as np
import scoreboard
import torch

import common

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()

FULL = dict(
    steps=60, log_every=10, small="", compiled=("ct", "cd", "ctm", "guided_distill"), jobs=5,
    nets={"imagenet64": 64, "cifar10": 128}, timed=("ct", "cd", "ctm", "teacher"), repeat=10,
    modes=("eager", "compiled"), dtype="bf16", layout="channels_last", doublings=4,
    # part 3: 30.6 million parameters, for CIFAR-10; `micro` images a pass
    size=32, net="--net cifar10 base=128 mult=1,2,2 blocks=2 attention=16", batch=512, micro=256,
    compile="--compile", trial=40, samples=5000,
    least=85.0, judge=dict(steps=3000, batch=256, width=64))  # % that the classifier should read
QUICK = FULL | dict(
    steps=20, log_every=4, compiled=("ct",), nets={"cifar10": 128}, timed=("ct", "ctm"),
    doublings=1, compile="--no-compile", samples=1000, least=0.0,
    judge=dict(steps=500, batch=256, width=64))
TINY = dict(  # without a GPU
    steps=6, log_every=1, small="--batch-size 8 --sample-every 0", compiled=("ct",), jobs=1,
    nets={"glyphs": 4}, timed=("ct", "cd", "ctm", "teacher"), repeat=2,
    modes=("eager",), dtype="fp32", layout="contiguous", doublings=1,  # bf16: minutes on AVX2
    size=16, net="--net glyphs base=32 mult=1,1 blocks=1", batch=16, micro=16,
    compile="--no-compile", trial=4, samples=20, least=0.0, judge=dict(steps=20, batch=32, width=8))
TINY_QUICK = TINY | dict(compiled=(), timed=("ct", "ctm"))


# --------------------------------------------------------------------------------------------------
# Pieces: functions of their `Commands`, done one by one, that return what to record, or None
# --------------------------------------------------------------------------------------------------

class Failed(Exception):
    """A piece did not do what it should: one line."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM: the piece is left undone."""


def start(words, output, env):
    """A process of Python in the repository's root, as a user would start it; but in a session of
    its own: Ctrl-C reaches it through here, once."""
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=output, stderr=output,
                            env=os.environ | env, start_new_session=True)


def last_error(said):
    """The last line that names an error, or simply the last one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    return ([line for line in lines if "rror" in line] or lines)[-1]


class Session:
    """Keeps of each piece a folder: record.json, what its last command said, and what was made.

    chains: by part, a list of {name: piece}; the pieces of one need each other, in their order.
    """
    def __init__(self, args):
        self.args, self.stop, self.lock = args, common.StopSignal(), threading.Lock()
        sizes = (QUICK if args.quick else FULL) if GPU else TINY_QUICK if args.quick else TINY
        if GPU and torch.cuda.get_device_properties(0).total_memory < 60e9:
            sizes = sizes | dict(micro=64)
        self.sizes = types.SimpleNamespace(**sizes)
        self.began, self.deadline = time.time(), float("inf")
        self.work = Path(args.work or ("out/gpu_quick" if args.quick else "out/gpu")).resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        settings = dict(quick=args.quick, minutes=args.minutes, data=args.data, gpu=GPU)
        path = self.work / "settings.json"
        if path.exists() and json.loads(path.read_text()) != settings:
            raise common.UserError(f"--work {self.work} holds a run with other settings: name "
                                   "another, or delete it")
        path.write_text(json.dumps(settings))
        self.chains = {part: make(self) for part, make in PARTS.items()}

    def folder(self, name):
        return self.work / re.sub(r"\W+", "_", name)

    def record(self, name):
        """What is known of a piece; None if it was not done."""
        path = self.folder(name) / "record.json"
        return json.loads(path.read_text()) if path.exists() else None

    def need(self, *names):
        for name in names:
            record = self.record(name)
            if not record or record["error"]:
                raise Failed(f"needs what did not pass: {name}")

    def do(self, name, piece):
        """Do a piece that has not passed yet, and record how it went."""
        record, folder = self.record(name), self.folder(name)
        if self.stop.number or time.time() > self.deadline or (record and not record["error"]):
            return
        if record:  # an interrupted one goes on
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        commands, began, error, values = Commands(self, folder), time.time(), None, {}
        try:
            values = piece(commands) or {}
        except Stopped:
            return
        except (Failed, common.UserError) as problem:
            error = str(problem).strip().splitlines()[-1]  # after a worker's traceback
        except Exception as problem:
            error = f"{type(problem).__name__}: {common.first_line(problem)}"
        record = dict(error=error, seconds=time.time() - began, commands=commands.said) | values
        with self.lock:
            with common.atomic_file(folder / "record.json", "w") as file:
                json.dump(record, file, indent=1)
            write_report(self)
            print(f"{(time.time() - self.began) / 60:5.1f} min  {name}: {error or 'passed'}, "
                  f"{record['seconds']:.0f} s", flush=True)


class Commands:
    """Runs the commands of a piece, which lie in `said`; `run_dir` is for what they make."""
    def __init__(self, session, folder):
        self.session, self.folder, self.said = session, folder, []
        self.run_dir = shown(folder / "run")

    def run(self, *parts, watch=None, code=0, minutes=7.0, env=None):
        """Run Python with the words of a command line, and return what it said.

        watch: a file; once it has grown, the process is told to stop by SIGTERM.
        Raises Failed if it ends with another exit `code`, or not within these minutes.
        """
        line, env, output = " ".join(parts), env or {}, self.folder / "output.txt"
        self.said.append(" ".join([*(f"{key}={env[key]}" for key in env), "python", line]))
        deadline, size = time.time() + 60 * minutes, size_of(watch)
        with open(output, "wb") as file:
            process = start(shlex.split(line), file, env)
            try:
                while process.poll() is None:
                    time.sleep(0.02)
                    if watch and size_of(watch) > size:
                        process.terminate()
                        watch = None
                    if self.session.stop.number:
                        process.terminate()  # a training finishes its step, and saves
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(60)
                        raise Stopped
                    if time.time() > deadline:
                        raise Failed(f"not ended within {minutes:g} minutes: {line}")
            finally:
                if process.poll() is None:
                    process.kill()
        said = output.read_text(errors="replace").replace("\r", "\n")
        if process.returncode != code:
            raise Failed(f"exit code {process.returncode}: {last_error(said)}")
        return said


def shown(path):
    """A path as a word of a command in the repository's root."""
    return shlex.quote(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path))


def size_of(path):
    return path.stat().st_size if path and path.exists() else 0


# --------------------------------------------------------------------------------------------------
# 1. Right or not
# --------------------------------------------------------------------------------------------------

SHORT = {  # the default commands, but for how long they take
    "ct": "--total-steps {K}",
    "cd": "--total-steps {K} --teacher-steps {K}",
    "ctm": "--total-steps {K} --teacher-steps {K}",
    "guided_distill": "--teacher-steps {K} --start-N 4 --stage1-steps {K} --round-steps {K} "
                      "--last-steps {K}",
}
EDITS = {"cd": "inpaint", "ctm": "inpaint", "guided_distill": "img2img"}
STUDENTS = {
    "cd": {"scm": "--objective scm",
           "continuous, full gradient": "--objective continuous --no-stop-gradient"},
    "ctm": {"critic": "--disc conv --disc-start 2"},
}


def checks(session, script):
    """The chain of a script."""
    sizes = session.sizes
    log = f"--log-every {sizes.log_every} {sizes.small}"
    net = "" if GPU else sizes.net  # the default
    train = f"{script}.py {SHORT[script].format(K=sizes.steps)} {net} {log}"
    eager = session.folder(f"{script} eager, stopped") / "run"
    ckpt = eager / ("N0002.pt" if script == "guided_distill" else "last.pt")
    draw = f"{script}.py --ckpt {shown(ckpt)}"

    def stopped(commands):
        commands.run(train, f"--no-compile --out-dir {shown(eager)}", code=143,
                     watch=eager / "log.jsonl")

    def resumed(commands):
        said = commands.run(train, f"--no-compile --out-dir {shown(eager)}")
        if "; resumed at step " not in said:
            raise Failed("it began anew")

    def sampled(commands):
        commands.run(draw, f"--sample 16 --save {commands.run_dir}.png")

    def edited(commands):
        commands.run(draw, f"--sample 4 --save {commands.run_dir}")
        commands.run(draw, f"--edit {EDITS[script]} --image {commands.run_dir}/000003.png",
                     f"--labels 3 --save {commands.run_dir}.png")

    def compiled(commands):
        said = commands.run(train, f"--compile --out-dir {commands.run_dir}", minutes=20,
                            env=dict(TORCH_LOGS="graph_breaks,recompiles"))
        breaks = set(re.findall(r"(\[\S+ \[__graph_breaks\] Graph break .*)", said))
        again = set(re.findall(r"(\[\S+ \[__recompiles\] Recompiling .*)", said))
        return dict(note=f"{len(breaks)} graph break(s), {len(again)} recompilation(s), one for "
                         f"each further kind of pass. {'; '.join(sorted(breaks))}".rstrip())

    def student(commands, flags):
        teacher = eager / "teacher" / "last.pt"
        commands.run(f"{script}.py --teacher {shown(teacher)} --total-steps 6 {log} {flags}",
                     f"--out-dir {commands.run_dir}")

    chain = {"eager, stopped": stopped, "eager, resumed": resumed, "sampled": sampled}
    if script in EDITS:
        chain[EDITS[script]] = edited
    if script in sizes.compiled:
        chain["compiled"] = compiled
    for kind, flags in STUDENTS.get(script, {}).items():
        chain[kind] = functools.partial(student, flags=flags)
    return {f"{script} {what}": piece for what, piece in chain.items()}


def right(session):
    """A chain of checks for each script, and one of what belongs to none."""
    def unit_tests(commands):
        said = commands.run("-m pytest -q tests --ignore tests/test_gpu.py -k 'cuda or on_a_gpu'",
                            "" if GPU else "--collect-only")
        return dict(note=said.strip().splitlines()[-1].strip("= "))

    def torchrun(commands):
        n = max(torch.cuda.device_count(), 1)
        net = "" if GPU else session.sizes.net
        commands.run(f"-m torch.distributed.run --standalone --nproc_per_node={n} ct.py",
                     f"--total-steps 6 {net} --sample-every 0 --batch-size {8 * n} --micro-batch 8",
                     f"--no-compile --out-dir {commands.run_dir}")
        return dict(note=f"{n} process(es)")

    return [*(checks(session, script) for script in SHORT),
            {"unit tests": unit_tests, "ct torchrun": torchrun}]


# --------------------------------------------------------------------------------------------------
# 2. How fast
# --------------------------------------------------------------------------------------------------

def fast(session):
    """One chain, what tells most first: there is time for some of it."""
    sizes = session.sizes

    def measure(commands, step, net, batch, mode, more=""):
        """The rows of `bench.py measure`, and those of its profile."""
        said = commands.run(f"tests/bench.py measure {step} {net} {batch} {mode}",
                            f"{sizes.dtype} {sizes.layout} --repeat {sizes.repeat} {more}".strip())
        return dict(rows=re.findall(r"^(\| .*)", said, re.M),
                    profile=re.findall(r"^profile (\| .*)", said, re.M))

    def largest(commands, step, net, batch):
        """Twice, four times, .. the batch, until it does not fit any more."""
        rows, note = [], "more was not tried"
        for _ in range(sizes.doublings):
            try:
                rows += measure(commands, step, net, 2 * batch, "eager")["rows"]
            except Failed as failure:
                if "out of memory" not in str(failure):
                    raise
                note = f"{2 * batch} does not fit"
                break
            batch *= 2
        if rows and "compiled" in sizes.modes:
            rows += measure(commands, step, net, batch, "compiled")["rows"]
        return dict(rows=rows, note=f"{batch} fits eager, {note}")

    chain, first, best = {}, next(iter(sizes.nets)), sizes.modes[-1]
    for mode in sizes.modes:  # eager first: compiling one step of imagenet64 takes four minutes
        for net, batch in sizes.nets.items():
            for step in sizes.timed:
                profiled = (step, net, mode) == ("ct", first, best)
                chain[f"{step} {net} {batch} {mode}" + ", profile" * profiled] = functools.partial(
                    measure, step=step, net=net, batch=batch, mode=mode,
                    more="--profile" * profiled)
    for net, batch in sizes.nets.items():
        for step in sizes.timed:
            chain[f"{step} {net}, largest batch"] = functools.partial(
                largest, step=step, net=net, batch=batch)
    return [chain]


# --------------------------------------------------------------------------------------------------
# 3. Real images
# --------------------------------------------------------------------------------------------------

TRAININGS = {  # settings for few steps of many images; CTM: few solver steps a jump, as for glyphs
    "teacher": "cd.py --stage teacher --class-cond {net} --lr 5e-4 --ema-decay 0.999",
    "ect": "ct.py --recipe ect --q 16 --stages 1 --lr 2e-4 --ema-decay 0.997",
    "cd": "cd.py --dist huber --lr 4e-4 --ema-decay 0.997",
    "ctm": "ctm.py --dist huber --max-steps 3 --mu 0.99 --lr 4e-4 --ema-decay 0.997",
}
SHARES = {"teacher": 0.27, "ect": 0.09, "cd": 0.09, "ctm": 0.09}  # of --minutes
CONSISTENCY = [scoreboard.multistep(80.0), scoreboard.multistep(80.0, 0.821)]
WAYS = {  # to draw
    "teacher": [scoreboard.heun(18)], "ect": CONSISTENCY, "cd": CONSISTENCY,
    "ctm": [scoreboard.jumps(1, 0.0), scoreboard.jumps(2, 0.0)],
}


def images(session):
    """One chain: the images, a teacher, its students, a classifier, what it says of each."""
    sizes, npz = session.sizes, session.folder("data") / "images.npz"

    def data(commands):
        name = session.args.data or ("cifar10" if GPU else "glyphs")
        folder = ROOT / "data" if name == "cifar10" else None
        dataset = common.load_dataset(name, folder, sizes.size)
        if not dataset.classes:
            raise Failed(f"--data {name} has no labels")
        pieces = np.array_split(np.arange(len(dataset)), len(dataset) // 1000 + 1)
        pixels, labels = map(torch.cat, zip(*map(dataset.__getitems__, pieces)))
        with common.atomic_file(npz) as file:  # not compressed: it is mapped into memory
            np.savez(file, pixels.permute(0, 2, 3, 1).numpy(), labels.numpy())
        return dict(note=f"{len(labels):,} images of {sizes.size} pixels")

    def training(commands, name):
        """A short trial says how many steps fit into the minutes: schedules follow the number."""
        session.need("data", *["teacher"] * (name != "teacher"))
        teacher = session.folder("teacher") / "run" / "last.pt"
        command = TRAININGS[name].format(net=sizes.net)
        command += f" --teacher {shown(teacher)}" * (name != "teacher")
        command += (f" --dataset {shown(npz)} --batch-size {sizes.batch} {sizes.compile} "
                    f"--micro-batch {sizes.micro} --sample-every 0")
        trial, run = (session.folder(name) / kind for kind in ("trial", "run"))
        if not (trial / "last.pt").exists():
            commands.run(command, f"--total-steps {sizes.trial} --log-every {sizes.trial // 2}",
                         f"--out-dir {shown(trial)}")
        minutes = session.args.minutes * SHARES[name]
        rate = last_of_log(trial)["images_per_s"]
        steps = max(int(60 * minutes * rate / sizes.batch), 5)
        said = commands.run(command, f"--total-steps {steps} --log-every {max(steps // 10, 1)}",
                            f"--out-dir {shown(run)}", minutes=2 * minutes + 7)
        size, log = re.search(r"\S+ parameters", said)[0], last_of_log(run)
        return dict(note=f"{size}, {steps} steps, {log['images_per_s']:,.0f} images/s, loss "
                         f"{log['loss']:.4g}, peak {log['peak_gb']:.1f} GB")

    @functools.cache
    def get_device():
        run = common.setup(argparse.Namespace(device="auto", precision="auto", compile=False))
        run.main = False  # nobody is to be told what a checkpoint is taken for
        return run

    @functools.cache
    def get_judge():
        training = dict(sizes.judge)
        kind = functools.partial(judge.PhotoClassifier, width=training.pop("width"))
        return judge.make_judge(str(npz), sizes.size, get_device().device, kind=kind,
                                augment=judge.augmented, **training)

    def classifier(commands):
        session.need("data")
        words = get_judge().words
        if float(re.search(r"([\d.]+)%", words)[1]) < sizes.least:
            raise Failed(f"it should read {sizes.least:g}% at least; {words}")
        return dict(note=words)

    def samples(commands, name):
        """A picture, a block for each way to draw, and their measures."""
        session.need(name, "classifier")
        rows, blocks, run = [], [], get_device()
        for way in WAYS[name]:
            net, draw = way.open(session.folder(name) / "run" / "last.pt", run)
            y = torch.arange(80, device=run.device) % net.classes
            shape = 3, net.image_size, net.image_size
            blocks.append(common.draw_many(run, draw, 80, y, shape, 0))
            found = judge.score(get_judge(), net, draw, sizes.samples, 1)
            rows.append([way.calls, way.drawn, f"{found.read:.1%}", f"{found.distance:.3f}",
                         f"{found.rate:,.0f}"])
        common.save_grid(Path(session.args.results, f"gpu_{name}.png"), blocks, 10)
        return dict(rows=rows)

    chain = {"data": data}
    chain |= {name: functools.partial(training, name=name) for name in TRAININGS}
    chain["classifier"] = classifier
    return [chain | {f"{name} samples": functools.partial(samples, name=name)
                     for name in TRAININGS}]


def last_of_log(folder):
    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])


PARTS = dict(right=right, fast=fast, images=images)


# --------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------

def said_by(*words):
    """What a program says; "unknown" if it is not there, or fails."""
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except OSError:
        return "unknown"
    return "; ".join(done.stdout.strip().splitlines()) or "unknown"


@functools.cache
def machine():
    card = scoreboard.machine()
    if GPU:
        query = "--query-gpu=name,driver_version,memory.total"
        driver = said_by("nvidia-smi", query, "--format=csv,noheader")
        card += f" ({driver}), CUDA {torch.version.cuda}"
    commit = said_by("git", "rev-parse", "--short", "HEAD")
    return f"{card}; torch {torch.__version__}; commit {commit}"


def table(columns, rows):
    """The lines of a table; columns: "| a | b |"."""
    lines = [columns, "|---" * (columns.count("|") - 1) + "|"]
    for cells in rows:
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return [*lines, ""]


def outcomes(records):
    """A table of how pieces went. records: name -> record."""
    rows = []
    for name, record in records.items():
        outcome = f"**failed**: {record['error']}" if record["error"] else "passed"
        rows.append((name, outcome, f"{record['seconds']:.0f}", record.get("note", "")))
    return table("| piece | outcome | seconds | note |", rows)


def known(session):
    """part -> {name: record, or None if it was not done}."""
    return {part: {name: session.record(name) for chain in chains for name in chain}
            for part, chains in session.chains.items()}


def write_report(session):
    """gpu.md, of the records that there are."""
    args, parts = session.args, known(session)
    everything = {name: record for part in parts.values() for name, record in part.items()}
    missing = [name for name in everything if not everything[name]]
    done = {name: record for name, record in everything.items() if record}
    right, fast, images = ({name: done[name] for name in part if name in done}
                           for part in parts.values())
    failed = [name for name in done if done[name]["error"]]
    minutes = sum(record["seconds"] for record in done.values()) / 60
    flags = f"{'--quick ' * args.quick}--minutes {args.minutes:g}"
    flags += f" --data {Path(args.data).name}" if args.data else ""
    lines = ["# On a GPU: right or not, how fast, real images", "",
             f"`python tests/gpu.py {flags}`", "",
             f"{machine()}; {datetime.date.today()}; {minutes:.1f} minutes, all pieces.", ""]
    if not GPU:
        lines += ["**No GPU here: the steps ran on the CPU at tiny sizes, tests that need a GPU "
                  "were only collected, and the numbers mean nothing.**", ""]
    lines += [f"- Failed: {', '.join(failed) or 'nothing'}.",
              f"- Not done, for lack of time or not yet: {', '.join(missing) or 'nothing'}.", "",
              "## 1. Right or not", "", *outcomes(right),
              "## 2. How fast", "", *bench.COLUMNS.splitlines()]
    for record in fast.values():
        lines += record.get("rows", [])
    lines += ["", *outcomes(fast)]
    for name, record in fast.items():
        if record.get("profile"):
            lines += [f"Of one step, {name}:", "", *table("| share | ms | calls | where |", [])[:2],
                      *record["profile"], ""]
    drawn = {name: images.get(f"{name} samples", {}).get("rows", []) for name in TRAININGS}
    lines += ["## 3. Real images", "", *outcomes(images)]
    lines += table("| | calls | drawn | read as asked | Fréchet distance | images/s |",
                   [(name, *cells) for name, rows in drawn.items() for cells in rows])
    lines += [f"{session.sizes.samples:,} samples of each.", ""]
    for name, rows in drawn.items():
        if rows:
            calls = ", then ".join(f"{calls} call(s)" for calls, *_ in rows)
            lines += [f"{name}, {calls}:", "", f"![{name}](gpu_{name}.png)", ""]
    lines += ["## Commands", "", "```"]
    for record in done.values():
        lines += record["commands"]
    with common.atomic_file(Path(args.results, "gpu.md"), "w") as file:
        file.write("\n".join([*lines, "```"]) + "\n")


# --------------------------------------------------------------------------------------------------

def make_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--quick", action="store_true", help="all of it in little")
    flag("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    flag("--minutes", type=float, metavar="M", help="for speed and images (default 25; --quick 2; "
         "without a GPU 0.1)")
    flag("--data", metavar="PATH", help="images with labels: a zip, a folder, an npz (default: "
         "cifar10, fetched; without a GPU glyphs)")
    flag("--work", metavar="DIR", help="where everything lies (default out/gpu, out/gpu_quick)")
    flag("--results", default=str(ROOT / "tests" / "results"), metavar="DIR",
         help="receives gpu.md and the pictures")
    return parser


def main(args):
    """Do the parts asked for. Returns the exit code."""
    if args.minutes is None:
        args.minutes = (2.0 if args.quick else 25.0) if GPU else 0.1
    if args.data:
        args.data = str(Path(args.data).resolve())
    Path(args.results).mkdir(parents=True, exist_ok=True)
    session = Session(args)
    for part in args.only:
        if part == "fast" and GPU:
            session.deadline = time.time() + 60 * max(args.minutes / 5, 1)
        with ThreadPoolExecutor(min(session.sizes.jobs, max(scoreboard.cores() // 3, 1))) as pool:
            list(pool.map(lambda chain: [session.do(*piece) for piece in chain.items()],
                          session.chains[part]))
        session.deadline = float("inf")
    write_report(session)
    if session.stop.number:
        print("stopped: the same command goes on from here")
        return 128 + session.stop.number
    records = [record for part in args.only for record in known(session)[part].values()]
    failed = sum(bool(record and record["error"]) for record in records)
    print(f"{Path(args.results, 'gpu.md')}: {failed} failed, {records.count(None)} not done")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.excepthook = common.one_line_errors
    raise SystemExit(main(make_parser().parse_args()))
