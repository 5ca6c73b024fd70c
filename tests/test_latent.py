"""Latent models as Meng et al. made them: noise to v, inpainting, image to image by diffusers."""
import copy
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common
import guided_distill as gd
from test_guided_scripts import (
    CPU, FP32, IMPORTABLE, LATENT, STEPS, STOPPED, drawn, first_loss, load, losses, of_diffusers,
    open_model, pipeline, run_latent, stop_after)
from test_scripts import assert_same, records
from util import last

TO_V = [*FP32, *STEPS, "--stage", "teacher", "--total-steps", 4, "--lr", 1e-3, "--ema-decay", 0.5,
        "--label-dropout", 0.5, "--teacher", "diffusers:pipe", "--dataset", "latents.npz"]
INPAINTS = dict(in_channels=9)


def to_v_by_hand(folder):
    """The four steps of TO_V: losses, and the average of the weights."""
    unet, alphas, data = of_diffusers(folder)
    ema, losses = copy.deepcopy(unet).requires_grad_(False), []
    optimizer, indices = torch.optim.Adam(unet.parameters(), 1e-3), common.index_batches(
        12, 0, 0, 4, 8, 4)
    for step in range(4):
        halves = []
        for m in range(2):
            common.seed_everything(common.STEP, 0, step, m)
            batch = next(indices)
            k = (1000 * torch.rand(4, dtype=torch.float64)).ceil().long() - 1
            noise = torch.randn(4, 4, 8, 8)
            words = data["embeddings"][batch]
            words[torch.rand(4) < 0.5] = data["null"]
            alpha, sigma = (a.sqrt().view(4, 1, 1, 1) for a in (alphas[k], 1 - alphas[k]))
            x0 = data["latents"][batch]
            z = torch.cat([alpha * x0 + sigma * noise, data["extra"][batch]], 1)
            missed = unet(z, k, words).sample - (alpha * noise - sigma * x0)
            halves.append(missed.square().mean((1, 2, 3)))
        optimizer.zero_grad()
        loss = torch.cat(halves).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        for average, p in zip(ema.parameters(), unet.parameters()):
            average.lerp_(p.detach(), 0.5)
        losses.append(loss.item())
    return losses, ema


def assert_close_weights(found, wanted, atol):
    for (name, p), q in zip(found.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=name)


@pytest.fixture(scope="module")
def to_v(tmp_path_factory):
    folder = tmp_path_factory.mktemp("to_v")
    pipeline(folder)
    done = run_latent(folder, *TO_V, "--out-dir", "run", code=0)
    assert "pipe predicts epsilon; its weights are where v begins\n" in done.stdout
    return folder


def test_noise_to_v_by_hand(to_v):
    wanted, ema = to_v_by_hand(to_v)
    np.testing.assert_allclose(losses(to_v / "run"), wanted, 1e-4)
    assert {line["lr"] for line in records(to_v / "run")} == {1e-3}
    assert_close_weights(of_diffusers(to_v, "run/v")[0], ema, 1e-4)
    moved = ema.conv_in.weight - of_diffusers(to_v)[0].conv_in.weight
    assert moved.abs().max() > 1e-3


def test_noise_to_v_resumed_and_on_two_processes(to_v):
    again = [*TO_V, "--out-dir", "again"]
    run_latent(to_v, *again, prelude=stop_after(2), code=STOPPED)
    assert not (to_v / "again" / "v").exists()
    run_latent(to_v, *again, code=0)
    assert_same(last(to_v / "again"), last(to_v / "run"))
    run_latent(to_v, *again, "--overwrite", ranks=2, code=0)
    assert_same(last(to_v / "again")["net"], last(to_v / "run")["net"], 1e-5)
    notes = to_v / "again" / "stage1" / "notes.txt"  # not ours
    notes.parent.mkdir()
    notes.touch()
    run_latent(to_v, *again, "--overwrite", prelude=stop_after(2), code=STOPPED)
    assert notes.exists()
    left = [path.name for path in (to_v / "again").iterdir() if path.name.startswith("v")]
    assert left == []


def test_what_noise_to_v_leaves(to_v, tmp_path):
    """diffusers guides it as --ckpt does, and it is a teacher for stage 1."""
    shutil.copytree(to_v, tmp_path, dirs_exist_ok=True)
    _, _, data = of_diffusers(tmp_path)
    pipe = pipe_of("StableDiffusionPipeline", tmp_path / "run" / "v")
    config = pipe.scheduler.config
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")
    z = common.SeededNoise(torch.arange(2), 0)(torch.zeros(2, 4, 8, 8))
    null = data["null"].expand(2, -1, -1)
    ours, done = drawn(tmp_path, "--ckpt", "run/v.pt", "--w", 3, "--N", 4, "--sample", 2,
                       prelude=IMPORTABLE)
    assert "8 network call(s)" in done.stdout
    theirs = pipe(prompt_embeds=data["embeddings"][:2], negative_prompt_embeds=null, latents=z,
                  guidance_scale=4.0, num_inference_steps=4, output_type="np").images
    assert ours.std() > 5 and np.abs(ours - (255 * theirs).round()).max() <= 1

    ours, _ = drawn(tmp_path, "--ckpt", "run/v.pt", "--w", -1, "--N", 4, "--sample", 2,
                    prelude=IMPORTABLE)
    theirs = pipe(prompt_embeds=null, latents=z, guidance_scale=1.0, num_inference_steps=4,
                  output_type="np").images
    assert np.abs(ours - (255 * theirs).round()).max() <= 1

    shutil.rmtree(tmp_path / "pipe")
    shutil.copytree(tmp_path / "run" / "v", tmp_path / "pipe")
    stage_1 = [*LATENT, "--end-N", 4, "--stage1-steps", 1, "--round-steps", 1, "--last-steps", 1]
    run_latent(tmp_path, *stage_1, "--out-dir", "student", code=0)
    found = losses(tmp_path / "student")[0]
    np.testing.assert_allclose(found, first_loss(tmp_path, "v_prediction"), 1e-3)
    done = run_latent(tmp_path, *stage_1, "--out-dir", "run", "--overwrite", "--teacher",
                      "diffusers:run/v", code=2)
    assert "--out-dir run is or holds the --teacher: choose another" in done.stderr


def test_a_model_of_classes_that_is_not_to_guide(tmp_path):
    """Without --label-dropout no class is the null class, and no picture is guided."""
    pipeline(tmp_path, labels=True)
    widths = []
    for share in (0, 0.5):
        run_latent(tmp_path, *TO_V, "--label-dropout", share, "--sample-every", 4,
                   "--out-dir", f"{share}", code=0)
        grid, = (tmp_path / f"{share}" / "samples").glob("*.png")
        widths.append(Image.open(grid).width)
    assert widths[1] > 1.9 * widths[0]
    done = run_latent(tmp_path, "--ckpt", "0/v.pt", "--w", 1, *FP32, code=2)
    assert "--w 1: 0/v.pt was trained for weights from 0 to 0" in done.stderr
    done = run_latent(tmp_path, *TO_V, "--sampler", "S", "--out-dir", "s", code=2)
    assert "--sampler S does not apply with --stage teacher" in done.stderr


def pipe_of(name, folder):
    kind = getattr(pytest.importorskip("diffusers"), name)
    pipe = kind.from_pretrained(folder, safety_checker=None, tokenizer=None, text_encoder=None,
                                feature_extractor=None, image_encoder=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def student_of(folder, kind, **more):
    """A random student, and diffusers' pipeline of the folder that it leaves."""
    pipeline(folder, "v_prediction", **more)
    model = open_model(folder)
    model.open_vae()
    net = model.net.requires_grad_(False)
    for p in net.parameters():
        p += 0.1 * torch.randn_like(p)
    model.export(net, folder / "N0004")
    return model, model.v(net), pipe_of(kind, folder / "N0004")


def assert_pictures(found, wanted):
    """(b,C,H,W) in [-1, 1] of ours, (b,H,W,C) in [0, 1] of diffusers."""
    found = (found.clamp(-1, 1).permute(0, 2, 3, 1).numpy() + 1) / 2
    assert found.std() > 0.02
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-3)


@torch.no_grad()
def test_a_student_inpaints_in_diffusers(tmp_path):
    model, v, pipe = student_of(tmp_path, "StableDiffusionInpaintPipeline", **INPAINTS)
    noise = common.SeededNoise(torch.arange(2), 0)
    ours = model.draw(v, model.angle, 4, "D", 6.5, CPU, None, noise, None)
    data = of_diffusers(tmp_path)[2]
    z = common.SeededNoise(torch.arange(2), 0)(torch.zeros(2, 4, 8, 8))
    masks = data["masks"].repeat_interleave(2, 2).repeat_interleave(2, 3)  # latents' pixels: 2 x 2
    words = data["embeddings"][:2]

    def theirs(masks, masked):
        return pipe(prompt_embeds=words, negative_prompt_embeds=words, latents=z,
                    image=torch.zeros(2, 3, 16, 16), mask_image=masks[:2],
                    masked_image_latents=masked[:2], guidance_scale=7.5, num_inference_steps=4,
                    height=16, width=16, output_type="np").images
    assert_pictures(ours, theirs(masks, data["masked"]))
    assert np.abs(theirs(masks, data["masked"]) - theirs(1 - masks, data["masked"])).max() > 0.02
    assert np.abs(theirs(masks, data["masked"]) - theirs(masks, data["masked"][2:])).max() > 0.02


@torch.no_grad()
def test_without_its_text_an_image_keeps_its_mask(tmp_path):
    pipeline(tmp_path, "v_prediction", **INPAINTS)
    model = open_model(tmp_path)
    unet, _, data = of_diffusers(tmp_path)
    x0, y = model.fetch(model.dataset.__getitems__(np.array([3, 7])))
    tau, w = torch.tensor([0.25, 1.0], dtype=torch.float64), torch.tensor([2.0, 14.0])
    words, extra, null = data["embeddings"][[3, 7]], data["extra"][[3, 7]], data["null"]
    both = [unet(torch.cat([x0, extra], 1), torch.tensor([249, 999]), text).sample
            for text in (words, null.expand(2, -1, -1))]
    wanted = both[1] + (1 + w.view(2, 1, 1, 1)) * (both[0] - both[1])
    found = model.guide(model.v_teacher, y, w)(x0, tau)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    dropped, kept = model.drop_labels(y, 1.0)
    assert torch.equal(kept, extra) and torch.equal(dropped, null.expand(2, -1, -1))
    assert torch.equal(model.drop_labels(y, 0.0)[0], words)


def test_labels_are_dropped_by_image(tmp_path):
    pipeline(tmp_path, labels=True)
    model = open_model(tmp_path)
    labels = torch.arange(12_000) % 3
    dropped, _ = model.drop_labels((labels, None), 0.1)
    assert ((dropped == labels) | (dropped == 3)).all()
    assert abs((dropped == 3).float().mean().item() - 0.1) < 0.02


def test_an_inpainting_model_through_all_stages(tmp_path):
    pipeline(tmp_path, **INPAINTS)
    done = run_latent(tmp_path, *TO_V, "--out-dir", "to_v", code=0)
    assert "pipe inpaints: masks and masked latents of" in done.stdout
    np.testing.assert_allclose(losses(tmp_path / "to_v"), to_v_by_hand(tmp_path)[0], 1e-4)
    shutil.rmtree(tmp_path / "pipe")
    shutil.copytree(tmp_path / "to_v" / "v", tmp_path / "pipe")
    run_latent(tmp_path, *LATENT, "--out-dir", "run", "--sample-every", 500, code=0)
    found = losses(tmp_path / "run")
    np.testing.assert_allclose(found[0], first_loss(tmp_path, "v_prediction"), 1e-3)
    assert len(found) == 9 and np.isfinite(found).all()
    student, _ = drawn(tmp_path, "--ckpt", "run/N0002.pt", "--w", 7, "--sample", 2,
                       prelude=IMPORTABLE)
    model = open_model(tmp_path)
    model.open_vae()
    model.net.load_state_dict(load(tmp_path / "run" / "N0002.pt")["ema"])
    wanted = model.draw(model.v(model.net), model.angle, 2, "D", 7.0, CPU, None,
                        common.SeededNoise(torch.arange(2), 0), None)
    assert np.abs(student - common.to_uint8(wanted).numpy()).max() <= 1


def test_masks_that_are_refused(tmp_path):
    pipeline(tmp_path, "v_prediction", **INPAINTS)
    whole = dict(np.load(tmp_path / "latents.npz"))

    def opened(without=(), **arrays):
        arrays = {key: value for key, value in (whole | arrays).items() if key not in without}
        np.savez(tmp_path / "bad.npz", **arrays)
        return open_model(tmp_path, data="bad.npz").dataset

    def refused(message, *without, **arrays):
        with pytest.raises(common.UserError, match=message):
            opened(without, **arrays)
    refused(r"takes .*'masks': \(12, 1, 8, 8\), 'masked': \(12, 4, 8, 8\)}, not .*embeddings",
            "masks", "masked")
    refused(r"takes .*'masked': .*, not .*'masks': \(12, 1, 8, 8\)", "masked")
    refused(r"not .*'masks': \(12, 8, 8\)", masks=whole["masks"][:, 0])
    refused(r"not .*'masked': \(12, 3, 8, 8\)", masked=whole["masked"][:, :3])
    for wrong, message in ((1.5, "mask outside"), (-0.1, "mask outside"), (np.nan, "inf or nan")):
        masks = whole["masks"].astype(np.float32)
        opened(masks=masks).__getitems__(np.array([2, 4]))
        masks[4, 0, 1, 1] = wrong
        with pytest.raises(common.UserError, match=f"sample 4, counted from 0, .*{message}"):
            opened(masks=masks).__getitems__(np.array([2, 4]))
    pipeline(tmp_path, "v_prediction")  # it would not look at them
    refused(r"takes .*, not .*'masks': \(12, 1, 8, 8\)")


@torch.no_grad()
@pytest.mark.parametrize("strength, steps", [(1.0, 4), (0.8, 3), (0.5, 2), (0.3, 1)])
def test_a_student_draws_from_an_image_in_diffusers(tmp_path, strength, steps):
    """The last int(4 strength) steps, from the image noised to tau = steps / 4."""
    model, v, pipe = student_of(tmp_path, "StableDiffusionImg2ImgPipeline")
    words = model.dataset.__getitems__(np.arange(2))[1]
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    theirs = pipe(prompt_embeds=words, negative_prompt_embeds=words, image=images,
                  strength=strength, guidance_scale=7.5, num_inference_steps=4, output_type="np",
                  generator=torch.Generator().manual_seed(0)).images

    generator = torch.Generator().manual_seed(0)
    encoded = model.vae.encode(2 * images - 1).latent_dist
    x0 = encoded.mean + encoded.std * torch.randn(2, 4, 8, 8, generator=generator)
    x0 = x0 * model.vae.config.scaling_factor
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    a = of_diffusers(tmp_path)[1][1000 * steps // 4 - 1]
    z = a.sqrt() * x0 + (1 - a).sqrt() * noise
    v = gd.conditioned(v, (words, z[:, :0]), torch.full((2,), 6.5))
    ours = model.decode(gd.sample(v, model.angle, 4, "D", z, start=steps))
    assert_pictures(ours, theirs)
