"""Break the code on purpose, a fault at a time, and see whether the tests notice. No part of the
suite: 2 cores need some hours for all.

    python tests/mutants.py [--only ct.py] [--jobs 2] [--list]

Each fault is applied to a copy of the tree, where the tests beside it run until one fails. A line
for each, caught or SURVIVED, then the sum; exit code 1 if one survived.
"""
import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# file: (text found exactly once, what takes its place, tests that should notice)
MUTANTS = {
    "common.py": [
        ("karras_times(N)[1:].tolist(), key=lambda level: abs(math.log(level / sigma))",
         "karras_times(N)[1:].tolist(), key=lambda level: abs(level - sigma)", "ct"),
        ("low + i / (N - 1) * (high - low)", "low + i / N * (high - low)", "math"),
        ("(standard / math.sqrt(2)).erf().diff()", "standard.erf().diff()", "ct"),
        ("return (P / P.sum()).float()", "return P.float()", "ct"),
        ("return t.clamp(T_MIN, T_MAX)", "return 2 * t.clamp(T_MIN, T_MAX)", "cd"),
        ("(mean + std * torch.randn(n, device=device)).exp()",
         "(mean - std + std * torch.randn(n, device=device)).exp()", "cd"),
        ("t * SIGMA_DATA / root, 1 / root", "t * SIGMA_DATA * root, 1 / root", "math"),
        ("SIGMA_DATA * (t - T_MIN) / root", "SIGMA_DATA * t / root", "math"),
        ("SIGMA_DATA**2 / ((t - T_MIN) ** 2", "SIGMA_DATA**2 / (t ** 2", "math"),
        ("return None if w is None else 25 * w", "return None if w is None else w", "cd"),
        ("return C_NOISE * t.log()", "return 1000 * t.log()", "math"),
        ("return x + bcast(t_next - t, x) * d_cur", "return x + bcast(t - t_next, x) * d_cur",
         "math"),
        ("dt * (d_cur + d_prime) / 2", "dt * (d_cur + d_prime) / 3", "math"),
        ("math.sqrt(t_hat**2 - t**2) * churn_noise", "(t_hat - t) * churn_noise", "math"),
        ("math.sqrt(max(tau**2 - T_MIN**2, 0))", "tau", "math"),
        ("x = f(renoised(x, tau, noise), levels_like(x, tau))",
         "x = f(renoised(x, tau, noise), levels_like(x, taus[0]))", "math"),
        ("rescale, p = (peak - shift).exp()", "rescale, p = (shift - peak).exp()", "math"),
        ("return (1 + weight) * D(x, t, y) - weight * D", "return (1 - weight) * D(x, t, y) + "
         "weight * D", "cd"),
        ("y = torch.full_like(t, net.null_y, dtype=torch.int64)",
         "y = torch.full_like(t, 0, dtype=torch.int64)", "cd"),
        ("c = 0.00054 * math.sqrt(x[0].numel())", "c = 0.00054 * math.sqrt(x.numel())", "math"),
        ("(1 / t**2 + 1 / SIGMA_DATA**2) * l2(D_x, x0)", "(1 / t**2 + 1) * l2(D_x, x0)", "cd"),
        ("    return 1 / (t_n1 - t_n)\n", "    return 1 / t_n1\n", "ct"),
        ("with torch.set_grad_enabled(not stop_gradient)", "with torch.enable_grad()", "cd"),
        ("f_net = consistency(net, x_t, t, y, cond, masks)",
         "f_net = consistency(net, x_t, t, y, cond, dropout_masks(net, len(x_t)))", "cd"),
        ("masks.append(u >= self.dropout)", "masks.append(u < self.dropout)", "unet"),
        ("h = h * mask / self.keep", "h = h * mask", "unet"),
        ("block.number = number", "block.number = 0", "unet"),
        ("most = min(args.micro_batch_limit, max(args.batch_size // run.world, 1))",
         "most = args.micro_batch_limit", "common"),
        ("recorded or default_micro_batch", "default_micro_batch", "common"),
        ("yield like, [(0, batch)], True", "yield like, [(0, batch)], False", "common scripts"),
        ("f_net.detach() - df_dt", "f_net.detach() + df_dt", "cd"),
        ("dc_skip * x_t + c_skip * dx_dt", "c_skip * dx_dt", "cd"),
        ("dc_out * F_x + c_out * dF / bcast(t, x_t)", "c_out * dF / bcast(t, x_t)", "cd"),
        ("F_net.detach() - g), rms", "F_net.detach() + g), rms", "scm"),
        ("S * c_skip * (F_x - F_path)", "S * c_skip * (F_path - F_x)", "scm"),
        ("r * (S * dF - c_skip", "r * S * dF - (c_skip", "scm"),
        ("c_skip * c_out / S * x_t", "c_skip * c_out * x_t", "scm"),
        ("g.square().flatten(1).mean(1).sqrt()", "g.square().flatten(1).sum(1).sqrt()", "scm"),
        ("g / bcast(rms + c, g)", "g / (rms.mean() + c)", "scm"),
        ("bcast(t, x_t) * x_t / R - R * dx_dt) / S", "bcast(t, x_t) * x_t / R - dx_dt) / S", "scm"),
        ("x_h = x + step * bcast(t, x) * dx_dt", "x_h = x + step * dx_dt", "scm"),
        ("(F_1 - F_0) / (2 * h)", "(F_1 - F_0) / h", "scm"),
        ("turns <= bandwidth).repeat(2)", "turns >= bandwidth).repeat(2)", "scm"),
        ("C_NOISE * net.time_scale *", "C_NOISE *", "scm"),
        ("    weight.register_hook(lambda gradient: gradient * keep)\n", "", "scm"),
        ("math.sqrt(max(step / lr_decay, 1))", "max(step / lr_decay, 1)", "cd_scripts"),
        # data
        ("return ImageOps.exif_transpose(image)", "return image", "images"),
        ('white = Image.new("RGBA", image.size, "white")',
         'white = Image.new("RGBA", image.size, "black")', "images"),
        ("grey.min() >= 0 and grey.max() <= 255", "grey.min() >= 0", "images"),
        ("white = 255.0 - rgba[..., 3]", "white = rgba[..., 3] * 1.0", "images"),
        ("elif white.max() <= 1:", "elif white.max() < 1:", "images"),
        ("image.verify()  # 0.04", "image.load()  # 0.04", "images"),
        ("if min(image.size) >= self.size:", "if max(image.size) >= self.size:", "images"),
        ('{member.CRC:08x}.npy"', 'npy"', "images"),
        ("now != before and now[0] == before[0]", "now[0] != before[0]", "images"),
        ("math.prod(shape) * dtype.itemsize != length", "0 > length", "images"),
        ("            totals.problem = error", "            raise", "images"),
        ("stop.number > 0 or totals.problem is not None", "stop.number > 0", "images"),
        ("self.present = np.unique(self.labels).tolist()",
         "self.present = list(range(self.classes))", "data scripts"),
        ("digest.update(self.labels.tobytes())", "pass", "data scripts"),
        # checkpoints
        ("fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "checkpoints"),
        ("ema._metadata[ABOUT] = about", "pass", "checkpoints"),
        ("            os.replace(temporary, path)\n        self.written, self.saved",
         "            pass\n        self.written, self.saved", "checkpoints"),
        ("for path, temporary in self.written.items():",
         "for path, temporary in reversed(self.written.items()):", "scripts"),
        ("if not run.main or not log.sound:", "if not run.main:", "checkpoints"),
        ("wrong = archive.testzip()", "wrong = None", "checkpoints"),
        ("h = norm(h) * (1 + scale) + shift", "h = norm(h) * scale + shift", "unet"),
        ("torch.cat([angles.cos(), angles.sin()], 1)", "torch.cat([angles.sin(), angles.cos()], 1)",
         "unet"),
        ("torch._foreach_lerp_(old, new, 1 - decay)", "torch._foreach_lerp_(old, new, decay)",
         "unet"),
        ("default_rng((seed, epoch)).permutation(n)", "default_rng((seed, 0)).permutation(n)",
         "data"),
        ("+ k * batch_size + m * micro_batch", "+ k * batch_size + m", "data"),
        ("for k in range(step, total_steps):", "for k in range(0, total_steps - step):", "data"),
        ("x0 = x0.float() / 127.5 - 1", "x0 = x0.float() / 128 - 1", "data"),
        ("torch.rand(len(x0), device=device) < 0.5", "torch.rand(1, device=device) < 0.5", "data"),
        ("x0.flip(3), x0)", "x0.flip(2), x0)", "data"),
        ("net.state_dict() | teacher.state_dict()", "teacher.state_dict() | net.state_dict()",
         "common"),
        ("torch.distributed.all_reduce(gradients)", "pass", "common"),
        ("totals.stop.item() > 0", "stop.number > 0", "common"),
        ("share * value.detach()", "value.detach()", "common"),
        ("self.bin_losses / self.bin_counts", "self.bin_losses", "common"),
        ("(x + 1) * 127.5).round()", "(x + 1) * 127.5)", "common"),
        ("(SAMPLE, seed, i)", "(SAMPLE, seed, 0)", "common"),
        ("return t * noise(torch.zeros(shape", "return noise(torch.zeros(shape", "ct"),
        ("at_t_min = (t <= T_MIN)", "at_t_min = (t < T_MIN)", "math"),
        ("return at_t_min, 1 - at_t_min, c_in", "return 0 * at_t_min, 1 - at_t_min, c_in", "math"),
        ("old = LATER_SETTINGS | settings_of_run", "old = settings_of_run", "cd_scripts"),
        ("if shape[2] > self.dropout_size:", "if shape[2] >= self.dropout_size:", "unet"),
        ("min(step * args.batch_size / lr_ramp, 1)", "min(step / lr_ramp, 1)", "common"),
        ('"--lr-ramp": "0",', '"--lr-ramp": "none",', "common"),
        ('args.precision != "fp32" and why_not is None', 'args.precision != "fp32"', "common"),
        ('if why_not and args.precision == "tf32":', "if False:", "common"),
        ("t_mid = (t * t_next).sqrt()", "t_mid = (t + t_next) / 2", "solvers"),
        ("x_denoised_last) / (2 * r)", "x_denoised_last) / r", "solvers"),
        ("1 / (k + 1).double()", "1 / (k + 2).double()", "solvers"),
        ("std = t_next * (1 - kept).sqrt()", "std = t * (1 - kept).sqrt()", "solvers"),
        ('if sampler in ("heun", "dpm2")', 'if sampler == "heun"', "solvers"),
        ("self.reported = before, then + time.perf_counter() - start",
         "self.reported = before, then", "live"),
        ("places = np.arange(LIVE_SAMPLES) * len(labels) // LIVE_SAMPLES",
         "places = np.arange(LIVE_SAMPLES) % len(labels)", "live"),
        ("if log.sound and due(args.eval_every, step, last)",
         "if log.sound and due(args.eval_every, step)", "live"),
    ],
    "cd.py": [
        ("min((step + 1) / args.warm_up, 1)", "min(step / args.warm_up, 1)", "cd_scripts"),
        ("r = args.r * min", "r = min", "cd_scripts"),
        ('rms if objective == "scm" else losses', "losses", "cd_scripts"),
        ('        optimizer.param_groups[0]["lr"] = lr\n', "", "cd_scripts"),
        ("return x - known(x) + known(y)", "return x", "edit"),
        ("return q * (q * x).sum(1, keepdim=True)", "return q * x.sum(1, keepdim=True)", "edit"),
        ("(((1 - a) * psi).sin() * z1", "((a * psi).sin() * z1", "edit"),
        ("with torch.no_grad():\n        x_tn =", "if True:\n        x_tn =", "cd"),
        ("c_guidance(w), masks)\n    f_net", "c_guidance(w), common.dropout_masks(net, len(x0)))\n"
         "    f_net", "cd"),
        ("solver(guide(D, y, w), x_tn1, t_n1, t_n)",
         "solver(guide(D, y, w), x_tn1, t_n, t_n1)", "cd"),
        ("consistency(target, x_tn, t_n, y, c_guidance(w), masks)",
         "consistency(net, x_tn, t_n, y, c_guidance(w), masks)", "cd"),
        ("consistency(target, x_tn, t_n, y", "consistency(target, x_tn, t_n1, y", "cd"),
        ("return weight(t_n, t_n1) * dist", "return weight(t_n1, t_n) * dist", "cd"),
        ("(x_t - x_denoised) / bcast", "(x_denoised - x_t) / bcast", "cd"),
        ("torch.rand(len(y), device=y.device) < share", "torch.rand(len(y), device=y.device) "
         "> share", "cd_scripts"),
        ("t, y, cond).clamp(-1, 1)", "t, y, cond)", "cd_scripts edit"),
        ("common.seed_everything(common.STEP, args.seed, step, m)",
         "common.seed_everything(common.STEP, args.seed, step)", "cd_scripts"),
        ("w = w_max * torch.rand", "w = 1 + w_max * torch.rand", "cd_scripts"),
        ("t = times[n + 1]", "t = times[n]", "cd_scripts"),
        ("(losses.sum() / args.batch_size).backward()", "losses.mean().backward()", "cd_scripts"),
        ("common.ema_update(target, net, mu)", "common.ema_update(target, net, 1 - mu)",
         "cd_scripts"),
        ("common.ema_update(ema, net, args.ema_decay)", "common.ema_update(ema, target, "
         "args.ema_decay)", "cd_scripts"),
        ('        model_args["parametrisation"] = args.parametrisation\n', "        pass\n",
         "cd_scripts"),
        ("w_min, w_max = -1.0, math.inf", "w_min, w_max = 0.0, math.inf", "cd_scripts"),
        ('found["args"].get("lr_ramp", 0)', 'settings.get("lr_ramp", 0)', "scripts"),
        ("solve = common.SAMPLERS[sampler]", 'solve = common.SAMPLERS["heun"]', "cd_scripts"),
    ],
    "ct.py": [
        ("r = args.r * min((step + 1) / args.warm_up, 1)", "r = args.r", "cd_scripts"),
        ("rms if scm else losses", "losses", "cd_scripts"),
        ("common.cut_time_embedding(net, args.bandwidth)", "pass", "cd_scripts"),
        ("min(s0 * 2 ** (k // stage), s1) + 1", "min(s0 * 2 ** (k // stage), s1)", "ct"),
        ("return mu0 ** (s0 / N)", "return mu0 ** (s0 / (N - 1))", "ct"),
        ("n = 1 + k * torch.sigmoid(-b * t)", "n = 1 + k * torch.sigmoid(b * t)", "ect"),
        ("q ** (stage + 1)", "q ** stage", "ect"),
        ("return t * ratio.clamp(min=0)", "return t * ratio", "ect"),
        ("    t_n = t_n.clamp(min=common.T_MIN)\n", "", "ect"),
        ("    t_n1 = t_n1.clamp(min=common.T_MIN)\n", "", "ect"),
        ("x_tn = x0 + bcast(t_n, x0) * noise", "x_tn = x0 + bcast(t_n, x0) * -noise", "ct"),
        ("with torch.no_grad():\n        f_target", "if True:\n        f_target", "ct"),
        ("t_n, y, masks=masks)", "t_n, y, masks=common.dropout_masks(net, len(x0)))", "ct"),
        ("f_target = consistency(target, x_tn", "f_target = consistency(net, x_tn", "ct"),
        ("dx_dt = noise  #", "dx_dt = -noise  #", "cd"),
        ("1 / t_n1**2 + 1 / common", "1 / t_n**2 + 1 / common", "ect"),
        ("t, y).clamp(-1, 1)", "t, y)", "ct"),
        ("stage = step * args.stages //", "stage = (step + 1) * args.stages //", "ect"),
        ("common.seed_everything(common.STEP, args.seed, step, m)",
         "common.seed_everything(common.STEP, args.seed, 0, m)", "scripts"),
        ("common.ema_update(target, net, mu)", "common.ema_update(target, net, 1 - mu)", "scripts"),
        ('        model_args["parametrisation"] = args.parametrisation\n', "        pass\n",
         "cd_scripts"),
    ],
    "ctm.py": [
        ("common.dropout_settings(args) | dict(classes", "dict(dropout=args.dropout, classes",
         "scripts"),
        ("net.output_blocks[-1][0].out_layers[3]", "net.output_blocks[-2][0].out_layers[3]", "ctm"),
        ("keep = bcast(s / t, x)", "keep = bcast(t / s, x)", "ctm"),
        ("t, y, common.c_noise(s), masks)", "t, y, common.c_noise(t), masks)", "ctm"),
        ("k + torch.randint(N - k,", "k + torch.randint(N - k - 1,", "ctm"),
        ("(position * (i - k + 1)).long()", "(position * (i - k)).long()", "ctm"),
        ("times[i - n], times[i - n - 1]", "times[i - n - 1], times[i - n]", "ctm"),
        ("return G(target, x_s, s, t_min, y)", "return G(net, x_s, s, t_min, y)", "ctm"),
        ("    with torch.no_grad():\n        x_u = solve", "    if True:\n        x_u = solve",
         "ctm"),
        ("x_target = estimate(net, target, x_u, u, s", "x_target = estimate(target, target, x_u, "
         "u, s", "ctm"),
        ("position = 0.7 * torch.rand", "position = torch.rand", "ctm"),
        ("ratio = strength / (gradient[last].norm() + 1e-4)",
         "ratio = gradient[last].norm() / (strength + 1e-4)", "ctm"),
        ("dsm_gradient, dsm_weight, 0, 1e4", "dsm_gradient, dsm_weight, 0, 1e9", "ctm"),
        ("disc_weight, 0.01, 10", "disc_weight, 0, 1e4", "ctm"),
        ("total, alpha=share)", "total)", "ctm"),
        ("p = steps / steps.sum()", "p = steps[::-1] / steps.sum()", "ctm_scripts"),
        ("real_loss = F.relu(1 - critic(real))", "real_loss = F.relu(1 + critic(real))", "critic"),
        ("s = math.sqrt(1 - gamma**2) *", "s = (1 - gamma) *", "ctm"),
        ("math.sqrt(t_next**2 - s**2)", "t_next", "ctm"),
        ("gan = -critic(x_est).mean()", "gan = critic(x_est).mean()", "ctm_scripts"),
        ("(step - args.disc_start) % 2 == 1", "(step - args.disc_start) % 2 == 0", "ctm_scripts"),
        ("common.ema_update(target, net, args.mu)", "common.ema_update(target, net, 0)",
         "ctm_scripts"),
        ("                j = i - k  # s = u", "                j = i  # s = u", "ctm_scripts"),
        ("dsm_gradient, dsm_weight, 0, 1e4", "dsm_gradient, 1, 0, 1e4", "ctm"),
        ("gan, args.dsm_weight, disc_weight, share", "gan, disc_weight, args.dsm_weight, share",
         "ctm_scripts"),
        ("            if args.dsm_weight > 0:\n                t = dsm", "            if True:\n"
         "                t = dsm", "ctm_scripts"),
    ],
    "guided_distill.py": [
        ("return i / N, (i - 0.5) / N, (i - 1) / N", "return i / N, (i - 0.5) / N, i / N - 0.5 / N",
         "guided"),
        ("(i - 2).clamp(min=0) / N", "(i - 2) / N", "guided"),
        ("a = d1.sin() * d2.cos() / scale", "a = d1.cos() * d2.sin() / scale", "guided"),
        ("on(b, z) * v2 - on(c, z) * z", "on(b, z) * v2 + on(c, z) * z", "guided"),
        ("z = alpha * x0 + sigma * noise", "z = alpha * x0 - sigma * noise", "guided"),
        ("    with torch.no_grad():\n        v_target", "    if True:\n        v_target", "guided"),
        ("lambda phi: torch.maximum(phi", "lambda phi: torch.minimum(phi", "guided"),
        ("(alpha * z - D(z / alpha, t, *c)) / sigma", "(alpha * z + D(z / alpha, t, *c)) / sigma",
         "guided"),
        ("common.c_guidance(w) if net.cond", "w if net.cond", "guided_scripts"),
        ("rounds[-1] = 1, 1", "pass", "guided"),
        ("return alpha * z - sigma * v(z", "return alpha * z + sigma * v(z", "guided"),
        ("added = ((up - phi).sin() * (up + phi).sin()).sqrt()", "added = (up - phi).sin()",
         "guided"),
        ("z = ddim(v, angle, z, tau, tau_end)", "z = ddim(v, angle, z, tau, tau_mid)", "guided"),
        ("lr *= 1 - done / steps", "pass", "guided_scripts"),
        ("            before.load_state_dict(net.state_dict())\n", "", "guided_scripts"),
        ("            optimizer.state.clear()\n", "", "guided_scripts"),
        ("gradients *= min(1.0, 1.0 /", "gradients *= max(1.0, 1.0 /", "guided_scripts"),
        ("common.ema_update(ema, net, args.ema_decay)",
         "common.ema_update(ema, net, 1 - args.ema_decay)", "guided_scripts"),
        ("w = args.w_min + span *", "w = args.w_min + args.w_max *", "guided_scripts"),
        ("(alpha * z - x.clamp(-1, 1)) / sigma", "(alpha * z - x) / sigma", "guided"),
        ("latents, clip=False)", "latents)", "guided_scripts"),
        ("max(student.w_min, 0.0) if", "student.w_min if", "guided"),
        ("return alpha * noise - sigma * x0", "return alpha * noise + sigma * x0", "guided"),
        ("return v(z, tau, (condition, extra))",
         "return v(z, tau, (condition, extra if condition is not None else 0 * extra))", "latent"),
        ("bcast(dropped, condition), self.null, condition)",
         "bcast(dropped, condition), condition, self.null)", "latent"),
        ("torch.cat([z, extra], 1)", "torch.cat([extra, z], 1)", "latent"),
        ("        if distil:\n            lr *=", "        if True:\n            lr *=", "latent"),
    ],
    "tests/judge.py": [
        ("torch.stack([cos, -sin, sin, cos], 1)", "torch.stack([cos, sin, -sin, cos], 1)", "judge"),
        ("up_to(2 * shift / x.shape[3], 2, 1)", "up_to(shift / x.shape[3], 2, 1)", "judge"),
        ("precision, recall = evaluate.precision_recall(mine, real)",
         "precision, recall = evaluate.precision_recall(real, mine)", "judge"),
        ("distances < usual.quantile(0.01)", "distances < usual.quantile(0.5)", "judge"),
        ("np.arange(len(rows)) % 5 == 0", "np.arange(len(rows)) % 5 == 1", "judge"),
        ("others, known = x[unseen], x[~unseen]", "known, others = x[unseen], x[~unseen]", "live"),
        ("return features.mean(0), features.T.cov()",
         "return features.mean(0), features.T.cov(correction=0)", "live"),
        ('about["inception"] = net.sha', "pass", "live"),
        ('if state.get("about") == about', "if state", "live"),
    ],
    "tests/scoreboard.py": [
        ('str(Path(name).with_name("teacher"))', '"teacher"', "bench"),
        ('return consistency(settings["sigmas"][:2], four)',
         "return consistency([80.0, 1.6], four)", "bench"),
        ("four = [common.nearest_level(settings", "_ = [common.nearest_level(settings", "bench"),
        ("str(seed),", "str(args.seed),", "bench"),
        ("sum(column) / len(rows) for column", "max(column) for column", "bench"),
        ("{args.n} {path} measures {judge.MEASURES}", "{args.n} {path}", "bench"),
        ('HEUN_18 = "--teacher {teacher} --solver heun --N 18"', 'HEUN_18 = "--teacher {teacher}"',
         "bench"),
    ],
}


def broken(file, old, new):
    """The file's text with the fault in it."""
    text = (ROOT / file).read_text()
    count = text.count(old)
    if count != 1:
        raise SystemExit(f"{file}: found {count} times, not once: {old!r}")
    return text.replace(old, new)


def is_caught(file, text, tests):
    """Whether one of the tests fails in a copy of the tree with this text. None: they never ran."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "out", "__pycache__"))
        (tree / file).write_text(text)
        names = [f"tests/test_{name}.py" for name in tests.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *names]
        environment = os.environ | dict(OMP_NUM_THREADS="1")
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True)
    return {0: False, 1: True}.get(done.returncode)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=MUTANTS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="see that every text is found, no more")
    args = parser.parse_args()
    mutants = []
    for file in [args.only] if args.only else MUTANTS:
        for old, new, tests in MUTANTS[file]:
            mutants.append((file, old, new, tests, broken(file, old, new)))
    if args.list:
        return print(f"{len(mutants)} faults")

    for tests in sorted({mutant[3] for mutant in mutants}):  # or a test that fails anyway catches
        if is_caught("common.py", (ROOT / "common.py").read_text(), tests) is not False:
            raise SystemExit(f"without any fault these do not pass: {tests}")

    def judge(mutant):
        file, old, new, tests, text = mutant
        verdict = {True: "caught", False: "SURVIVED", None: "NOT RUN"}[is_caught(file, text, tests)]
        print(f"{verdict:8} {file}: {old.strip()!r} -> {new.strip()!r}", flush=True)
        return verdict

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        verdicts = list(pool.map(judge, mutants))
    caught = verdicts.count("caught")
    print(f"{caught} of {len(verdicts)} caught")
    sys.exit(caught < len(verdicts))


if __name__ == "__main__":
    main()
