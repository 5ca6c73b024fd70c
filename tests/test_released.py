"""Released weights load by their names and shapes, and are at once usable; files that hold code are
refused."""
import math
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import common
from util import SMALL, TINY, VECTORS, assert_mistake, last, run_script

SHAPES = VECTORS["shapes"]
SHRUNK = f"common.NETS.update(imagenet64={TINY})"  # a small stand-in for the released network


def random_weights(shapes, seed=0, cheap=False):
    """Random tensors of these shapes, none zero. `cheap`: a number a row, in memory and on disk."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        columns = (1,) * (len(shape) - 1) if cheap else shape[1:]
        values = torch.randn(shape[0], *columns, generator=generator)
        if len(shape) > 1:
            state[name] = (values / math.prod(shape[1:]) ** 0.5).expand(shape)
        else:
            state[name] = 0.1 * values + name.endswith("weight")
    return state


# ---- plain state dicts

@pytest.fixture
def shrunk(monkeypatch):
    monkeypatch.setitem(common.NETS, "imagenet64", TINY)


def assert_loads(folder, state, expected, model_args):
    """Saved, it is loaded: in float32, ready to sample or teach with, and knowing its settings."""
    torch.save(state, folder / "weights.pt")
    net, trained = common.load_network(folder / "weights.pt", ("cd", "ct"))
    assert net.state_dict().keys() == expected.keys()
    for name, value in net.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name].float()), name
    assert not any(module.training for module in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    assert trained == dict(script=None, args={}, model_args=model_args)
    assert net.classes == model_args.get("classes", 0) and net.null_y is None and not net.cond
    return net


def assert_fits_none(folder, state):
    """Saved, it is refused in one line, without a warning."""
    torch.save(state, folder / "weights.pt")
    with pytest.raises(common.UserError) as error, warnings.catch_warnings(action="error"):
        common.load_network(folder / "weights.pt", ("cd", "ct"))
    assert str(error.value).startswith(f"{folder / 'weights.pt'}: these weights fit none of")
    assert "nearest is " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key, labels", [("imagenet64", dict(classes=1000)),
                                         ("lsun256", dict(classes=0))])
def test_key_sets_load_strictly(tmp_path, key, labels):
    state = random_weights(SHAPES[key], cheap=True)
    net = assert_loads(tmp_path, state, state, common.NETS[key] | labels)
    assert sum(p.numel() for p in net.parameters()) == VECTORS["param_counts"][key]


@pytest.mark.parametrize("dtype, old", [
    (torch.float32, False), (torch.float16, False), (torch.bfloat16, True)])
def test_weights_become_float32(shrunk, tmp_path, dtype, old):
    """Of any dtype, written by any version of torch."""
    state = random_weights(SHAPES["unet_A_tiny"])
    state = {name: value.to(dtype) for name, value in state.items()}
    if old:
        torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        net, _ = common.load_network(tmp_path / "old.pt", ("cd",))
        assert torch.equal(net.out[2].bias, state["out.2.bias"].float())
    assert_loads(tmp_path, state, state, TINY | dict(classes=10))


def without(state, *words):
    return {name: value for name, value in state.items() if not any(word in name for word in words)}


def renamed(state, old, new):
    return {name.replace(old, new): value for name, value in state.items()}


def squeezed(state):
    return {name: value.squeeze(-1) if ".qkv." in name or ".proj_out." in name else value
            for name, value in state.items()}


WEIGHTS = random_weights(SHAPES["unet_A_tiny"])
WRONG = {
    "missing": without(WEIGHTS, "middle_block.1.qkv.bias"),
    "one more": WEIGHTS | {"input_blocks.3.2.weight": torch.zeros(3)},
    "renamed": renamed(WEIGHTS, "out.2.bias", "out.3.bias"),
    "wrong shape": WEIGHTS | {"time_embed.0.weight": WEIGHTS["time_embed.0.weight"][:, :-1]},
    "one class, no axis": WEIGHTS | {"label_emb.weight": torch.tensor(1.0)},
    "guided-diffusion's Conv1d": squeezed(WEIGHTS),  # ADM's own qkv channels have another order
    "numbered": WEIGHTS | {0: torch.zeros(3)},
    "wrapped twice": dict(model=dict(net=WEIGHTS)),
    "empty": {},
    "NVIDIA's": {f"model.{name}": value for name, value in WEIGHTS.items()},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_other_key_sets_are_refused(shrunk, tmp_path, wrong):
    assert_fits_none(tmp_path, WRONG[wrong])


def test_a_list_of_weights_is_refused(tmp_path):
    torch.save(list(WEIGHTS.values()), tmp_path / "weights.pt")
    with pytest.raises(common.UserError, match="weights.pt holds a list, not a checkpoint"):
        common.load_network(tmp_path / "weights.pt", ("cd", "ct"))


# ---- at once usable

class Code:
    """What a file can do when it is unpickled."""
    def __reduce__(self):
        return os.system, ("touch ran_code",)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with released weights, labelled data, and all that is refused."""
    folder = tmp_path_factory.mktemp("released")
    teacher = dict(script="cd", args=dict(stage="teacher"), model_args=TINY | dict(classes=10),
                   ema=WEIGHTS)
    student, code = teacher | dict(args=dict(stage="distill")), dict(openai=Code())
    for name, state in dict(
            openai=WEIGHTS, unconditional=without(WEIGHTS, "label_emb"), teacher=teacher,
            student=student, ct=teacher | dict(script="ct", args={}), code=code,
            module=dict(net=torch.nn.Linear(2, 2))).items():  # the last as in NVIDIA's training
        torch.save(state, folder / f"{name}.pt")
    torch.save(code, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "pickle.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    snapshot = dict(ema=Code(), loss_fn=None, augment_pipe=None, dataset_kwargs={})  # NVIDIA's
    (folder / "snapshot.pkl").write_bytes(pickle.dumps(snapshot))
    data = (folder / "openai.pt").read_bytes()
    (folder / "short.pt").write_bytes(data[:len(data) // 2])
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    for name, labels in dict(ten=[np.arange(20) % 10], three=[np.arange(20) % 3], none=[]).items():
        np.savez(folder / f"{name}.npz", images, *labels)
    Image.fromarray(images[0]).save(folder / "x.png")
    return folder


FLAGS = ["--device", "cpu", "--precision", "fp32"]
DISTIL = [*FLAGS, "--dataset", "ten.npz", "--total-steps", 2, "--batch-size", 4, "--micro-batch", 4,
          "--dist", "l2", "--N", 5, "--workers", 0, "--sample-every", 0, "--save-every", 0]


def run(work, *flags):
    return run_script(*flags, script="cd.py", cwd=work, prelude=SHRUNK, code=0)


def drawn(work, *flags):
    """Two images (2,H,W,3) and what was said."""
    done = run(work, *flags, *FLAGS, "--seed", 5, "--sample", 2, "--save", "drawn.npz")
    return np.load(work / "drawn.npz")["arr_0"].astype(int), done.stdout


def openai_net():
    net = common.UNet(**TINY, classes=10).eval().requires_grad_(False)
    net.load_state_dict(WEIGHTS)
    return net


def x_T():
    return 80 * common.SeededNoise(torch.arange(2), 5)(torch.zeros(2, 3, 16, 16))


def test_sample(work):
    """In one step, by the consistency function of the weights."""
    images, _ = drawn(work, "--ckpt", "openai.pt", "--labels", 1, 7)
    f = common.consistency(openai_net(), x_T(), torch.full((2,), 80.0), torch.tensor([1, 7]))
    expected = common.to_uint8(f.clamp(-1, 1)).numpy()
    assert np.abs(images - expected).max() <= 1 and expected.std() > 5


def test_edit(work):
    """Two ways to fill a hole."""
    task = ("--edit", "inpaint", "--image", "x.png", "--labels", 1)
    images, _ = drawn(work, "--ckpt", "openai.pt", *task)
    known, hole = np.asarray(Image.open(work / "x.png")).astype(int), np.zeros((16, 16), bool)
    hole[4:12, 4:12] = True
    changes = np.abs(images - known)
    assert changes[:, ~hole].max() <= 1 and changes[:, hole].max() > 50
    assert np.abs(images[0] - images[1])[hole].max() > 0


def test_sample_a_teacher(work):
    """Heun's method on the denoiser that --stage teacher says the weights are."""
    net, y = openai_net(), torch.tensor([1, 7])
    teacher = ("--ckpt", "openai.pt", "--stage", "teacher", "--labels", 1, 7, "--N", 3)
    images, said = drawn(work, *teacher)
    x = common.heun_sample(lambda x, t: common.denoise(net, x, t, y), x_T(), 3)
    expected = common.to_uint8(x).numpy()
    assert np.abs(images - expected).max() <= 1 and expected.std() > 5
    assert "5 network call(s) each" in said


def test_distil(work):
    """With a learning rate of 0 all stays what it began as, the teacher, and draws as that did."""
    run(work, "--teacher", "openai.pt", *DISTIL, "--lr", 0, "--mu", 0.9, "--out-dir", "still")
    state = last(work / "still")
    assert state["step"] == 2 and state["skipped"] == 0
    for key in ("net", "target", "ema"):
        assert state[key].keys() == WEIGHTS.keys()
        assert all(torch.equal(state[key][name], WEIGHTS[name]) for name in WEIGHTS), key
    assert state["model_args"] == TINY | dict(classes=10, dropout=0.0, dropout_size=0, cond=False,
                                               parametrisation="skip")
    before, after = (drawn(work, "--ckpt", path)[0] for path in ("openai.pt", "still/last.pt"))
    assert np.array_equal(before, after)


def test_distil_an_unconditional_teacher(work):
    """Labels of the data are not asked for."""
    run(work, "--teacher", "unconditional.pt", *DISTIL, "--lr", 1e-4, "--out-dir", "run")
    state, teacher = last(work / "run"), torch.load(work / "unconditional.pt")
    assert state["model_args"]["classes"] == 0 and state["skipped"] == 0
    assert state["net"].keys() == teacher.keys()
    changes = [(state["net"][name] - value).abs().max() for name, value in teacher.items()]
    assert 0 < max(changes) < 1e-3


# ---- refused

CODE = "is no checkpoint, or holds more than tensors"
REFUSED = [
    *([flag, file, f"{file} {CODE}"] for flag in ("--ckpt", "--teacher")
      for file in ("code.pt", "old.pt", "pickle.pt", "snapshot.pkl", "module.pt")),
    ["--teacher", "nowhere.pt", "nowhere.pt: No such file"],
    ["--teacher", ".", ".: Is a directory"],
    ["--teacher", "short.pt", "short.pt is no checkpoint, or is damaged"],
    ["--teacher", "student.pt", "--teacher student.pt holds a student"],
    ["--teacher", "ct.pt", "ct.pt was written by ct.py"],
    ["--teacher", "openai.pt", "--dataset", "three.npz", "knows 10 classes, and three.npz has 3"],
    ["--teacher", "teacher.pt", "--dataset", "none.npz", "knows 10 classes, and none.npz has 0"],
    ["--teacher", "openai.pt", "--w-max", "4", "openai.pt, trained without --label-dropout"],
    ["--teacher", "openai.pt", *SMALL[:5], "--net does not apply with --teacher"],
    ["--teacher", "openai.pt", "--no-class-cond", "--class-cond does not apply with --teacher"],
    ["--teacher", "openai.pt", "--stage", "teacher", "does not apply with --stage teacher"],
    ["--ckpt", "openai.pt", "--stage", "teacher", "--sigmas", "80", "1", "--sigmas does not apply"],
    ["--ckpt", "teacher.pt", "--edit", "denoise", "--image", "x.png", "--labels", "1",
     "--edit does not apply to teacher.pt, a teacher"],
    ["--ckpt", "openai.pt", "--N", "18", "--N does not apply"],
    ["--ckpt", "openai.pt", "--w", "1", "--w 1: openai.pt was trained for no guidance"],
    ["--ckpt", "openai.pt", "--labels", "10", "labels 0 to 9"],
    ["--ckpt", "openai.pt", "--edit", "inpaint", "--image", "x.png", "--labels"],
]


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_refused_in_one_line(work, flags):
    *flags, message = flags
    if "--teacher" in flags and "teacher" not in flags:
        flags = [*DISTIL, "--out-dir", "refused", *flags]
    assert_mistake(flags, message, "cd.py", work, prelude=SHRUNK)
    assert not (work / "ran_code").exists()
