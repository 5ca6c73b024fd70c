"""The command line: each flag says once when it applies; defaults, recipes, messages and --help."""
import re
import sys

import pytest

import common


def parser():
    """A script's flags in little: three groups with conditions, and the shared flags."""
    parser = common.Parser("A script.")
    both = parser.group("algorithm")
    both.flag("--recipe", only=dict(ckpt=False), choices=("ct", "ict", "ect"), help="which")
    both.flag("--w", only=[dict(ckpt=True), dict(stage="teacher")], type=float, help="guidance")
    train = parser.group("training of it", ckpt=False)
    train.flag("--stage", choices=("teacher", "student"), default="student", help="what")
    train.flag("--s0", only=dict(recipe=("ct", "ict")), type=int, default=2, help="first")
    train.flag("--mu", only=dict(recipe="ct", stage="student"), type=float, help="decay")
    train.flag("--teacher", metavar="FILE", help="weights")
    train.flag("--teacher-steps", only=dict(teacher=False), type=common.positive, help="length")
    train.flag("--digest", only=dict(teacher=True), help="of it")
    drawing = parser.group("drawing", ckpt=True)
    drawing.flag("--sigmas", type=common.noise_level, nargs="+", help="noise levels t")
    common.add_shared_flags(parser, dict(stage="student"))
    return parser


def recipe(flags):
    name = flags.get("recipe", "ct")
    return dict(recipe=name, s0=10, mu=0.5, batch_size=12, micro_batch=8, total_steps=7, lr=1e-3,
                class_cond=True)


def parse(monkeypatch, words, check=None):
    monkeypatch.setattr(sys, "argv", ["/x/ct.py", *words.split()])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return common.parse_flags(parser(), recipe, check)


def refusal(monkeypatch, words, check=None):
    with pytest.raises(common.UserError) as error:
        parse(monkeypatch, words, check)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("words, message", [
    ("--recipe ect --s0 3", "--s0 does not apply with --recipe ect"),
    ("--recipe ict --mu 0.5", "--mu does not apply with --recipe ict"),
    ("--recipe ct --stage teacher --mu 0.5", "--mu does not apply with --stage teacher"),
    ("--teacher x.pt --teacher-steps 5", "--teacher-steps does not apply with --teacher x.pt"),
    ("--digest abc", "--digest does not apply without --teacher"),
    ("--w 1", "--w does not apply without --ckpt"),
    ("--ckpt x.pt --s0 3", "--s0 does not apply with --ckpt x.pt"),
    ("--ckpt x.pt --lr 3", "--lr does not apply with --ckpt x.pt"),
    ("--ckpt x.pt --recipe ct", "--recipe does not apply with --ckpt x.pt"),
    ("--sigmas 80", "--sigmas does not apply without --ckpt"),
    ("--labels 3", "--labels does not apply without --ckpt"),
    ("--stage teacher --net x", "--net does not apply with --stage teacher"),
    ("--times 1 2", "unrecognized arguments: --times 1 2 (did you mean --p-t?)"),
    ("--ckpt x.pt --eval 10 --save x.png", "--save does not apply with --eval 10"),
    ("--ckpt x.pt --dataset glyphs", "--dataset does not apply without --eval"),
    ("--ckpt x.pt --inception f", "--inception does not apply without --eval"),
    ("--data-dir x", "--data-dir does not apply with --dataset glyphs"),
    ("--ckpt x.pt --sigmas 1 80", "--sigmas 1.0 80.0: name the largest first"),
    ("--batch-size 10 --micro-batch 4", "--batch-size 10 is not a multiple of --micro-batch 4"),
    ("--datset x", "unrecognized arguments: --datset x (did you mean --dataset?)"),
    ("--data x", "unrecognized arguments: --data x"),  # no abbreviations
    ("--batch-size 0", "argument --batch-size: invalid positive integer value: '0'"),
    ("--seed -1", "argument --seed: invalid count value: '-1'"),
    ("--lr x", "argument --lr: invalid number value: 'x'"),
    ("--ckpt x.pt --sigmas 81", "argument --sigmas: invalid noise level value: '81'")])
def test_what_does_not_apply_is_refused(monkeypatch, words, message):
    assert refusal(monkeypatch, words).startswith(message)


def test_flags_go_before_recipes_before_defaults(monkeypatch):
    args = parse(monkeypatch, "--s0 4 --dataset cifar10 --data-dir x")
    assert (args.s0, args.mu, args.recipe, args.stage) == (4, 0.5, "ct", "student")
    assert (args.lr, args.seed, args.out_dir, args.ckpt) == (1e-3, 0, "out/ct", None)
    assert (args.dataset, args.data_dir, args.teacher_steps) == ("cifar10", "x", None)
    assert (args.class_cond, args.log_every, args.compile) == (True, 50, None)


def test_a_micro_batch_is_given_or_left_open(monkeypatch):
    args = parse(monkeypatch, "")
    assert (args.micro_batch, args.micro_batch_limit) == (None, 8)  # the recipe's
    assert parse(monkeypatch, "--batch-size 22 --micro-batch 2").micro_batch == 2


def test_settings_that_do_not_apply_are_dropped(monkeypatch):
    """A recipe may name what another choice leaves no room for; a checkpoint must not."""
    args = vars(parse(monkeypatch, "--recipe ect"))
    assert not args.keys() & {"s0", "mu", "digest", "w", "sigmas", "save", "sample"}
    assert {"recipe", "stage", "teacher", "teacher_steps", "seed", "device"} <= args.keys()
    args = vars(parse(monkeypatch, "--teacher x.pt --stage teacher"))
    assert "teacher_steps" not in args and {"digest", "s0", "w"} <= args.keys()
    assert not args.keys() & {"mu", "net"}


def test_settings_with_a_checkpoint(monkeypatch):
    """No recipe has a say; what may apply is there, with its default."""
    args = parse(monkeypatch, "--ckpt x.pt --seed 3")
    assert (args.ckpt, args.seed, args.sample, args.micro_batch) == ("x.pt", 3, None, 64)
    assert (args.sigmas, args.labels, args.eval, args.dataset, args.w) == (None,) * 5
    assert (args.save, args.device, args.compile) == ("samples.png", "auto", False)
    assert not vars(args).keys() & {"lr", "recipe", "s0", "out_dir", "stage"}
    assert parse(monkeypatch, "--ckpt x.pt --eval 10 --dataset a.npz").dataset == "a.npz"


def test_check_sees_the_settings_of_a_training_only(monkeypatch):
    def check(args):
        common.refuse(args, ("overwrite", "teacher_steps"), "here")
    assert refusal(monkeypatch, "--teacher-steps 3", check) == "--teacher-steps does not apply here"
    parse(monkeypatch, "", check)
    parse(monkeypatch, "--ckpt x.pt", check=lambda args: 1 / 0)


def test_help_says_the_conditions(monkeypatch):
    text = re.sub(r"\s+", " ", parser().format_help())
    for words in ("training of it (without --ckpt):", "drawing (with --ckpt):",
                  "--s0 S0 first [with --recipe ct or with --recipe ict]",
                  "--mu MU decay [with --recipe ct, with --stage student]",
                  "--teacher-steps TEACHER_STEPS length [without --teacher]",
                  "--digest DIGEST of it [with --teacher]",
                  "--w W guidance [with --ckpt; or with --stage teacher]"):
        assert words in text, text


@pytest.mark.parametrize("value, wanted, holds", [
    (None, False, True), ("", False, True), (0, False, True), (3, True, True), ("x", False, False),
    (None, True, False), ("a", "a", True), ("a", ("b", "a"), True), ("a", ("b",), False),
    (None, "a", False)])
def test_conditions(value, wanted, holds):
    assert common.condition_holds(value, wanted) == holds


@pytest.mark.parametrize("words, fits", [
    (["uniform"], True), ([-1.2, 1.2], True), ([1.0], False), ([1.0, 2.0, 3.0], False),
    ([1.0, -1.0], False), ([1.0, 0.0], False), (["uniform", 1.0], False), ([50.0, 0.1], False)])
def test_p_t(words, fits):
    times = common.karras_times(10)
    if fits:
        return common.check_p_t(words, times)
    with pytest.raises(common.UserError, match=f"--p-t {words[0]}.*: name MEAN STD"):
        common.check_p_t(words, times)


def test_types():
    assert common.number(int, 2, 4)("3") == 3 and common.p_of_t("1.5") == 1.5
    assert common.p_of_t("uniform") == "uniform"
    for kind, text in ((common.number(int, 2, 4), "5"), (common.number(float, 0), "nan"),
                       (common.count, "1.5"), (common.p_of_t, "normal")):
        with pytest.raises(ValueError):
            kind(text)


def test_net_settings():
    words = "glyphs base=64 mult=1,2 attention= scale_shift=false dropout=0.1".split()
    wrong = {"resnet": "--net resnet", "glyphs depth=3": "--net depth=3: the keys are",
             "glyphs mult=a": "--net mult=a: mult is like mult=1,2,2",
             "glyphs scale_shift=1": "--net scale_shift=1: scale_shift is like"}
    settings = common.net_settings(words[:-1])
    assert (settings["base"], settings["mult"], settings["attention"]) == (64, (1, 2), ())
    assert settings["scale_shift"] is False and settings["resblock_updown"] is False
    assert common.NETS["glyphs"]["base"] == 32
    for text, message in wrong.items():
        with pytest.raises(common.UserError, match=message):
            common.net_settings(text.split())
    with pytest.raises(common.UserError, match="--net: image_size=18"):
        common.make_net(common.net_settings(["glyphs", "image_size=18"]))
