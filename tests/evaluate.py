"""FID, Inception score, precision and recall of images, in the features of TensorFlow's Inception.

    python tests/evaluate.py samples.npz --reference my_images.npz

The samples are an .npz or .npy, or a folder or zip of images, as `--save` writes them. The
reference is any data set that the scripts train on, or an .npz of statistics (mu, sigma) in EDM's
or ADM's layout. The scripts' `--eval N` measures with this file too, without saving samples first.

Network, preprocessing and Inception score are torch-fidelity's (pip install torch-fidelity); what
is not says why. ADM's evaluator: github.com/openai/guided-diffusion/tree/main/evaluations.
"""
import hashlib
import importlib
import io
import os
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from common import UserError

REFERENCE_IMAGES = 10_000  # for precision and recall, as many as ADM's reference files have

# --------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------

def fidelity(module):
    """A module of torch-fidelity. Raises UserError if the package is missing."""
    common.import_optional("torch_fidelity", "--eval needs torch-fidelity")
    return importlib.import_module(f"torch_fidelity.{module}")


class Inception:
    """(b,3,H,W) uint8 -> (b, 2048 + 1008): what Inception pools, and its logits without their bias.

    Raises:  UserError if the package or the weights are missing, or the file holds others.
    """
    widths = 2048, 1008

    def __init__(self, path, device):
        extractor = fidelity("feature_extractor_inceptionv3")
        url = extractor.URL_INCEPTION_V3
        cached = Path(torch.hub.get_dir(), "checkpoints", url.split("/")[-1])
        self.path = Path(path or cached)
        if not path and not cached.exists():
            raise UserError(f"--eval needs Inception's weights: fetch {url} and name the file with "
                            f"--inception, or put it into {cached.parent}")
        weights = io.BytesIO()  # torch-fidelity would unpickle whatever the file holds
        torch.save(common.load_checkpoint(self.path), weights)
        weights.seek(0)
        try:
            net = extractor.FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], weights)
        except Exception as error:
            raise UserError(f"--inception {self.path} holds other weights than those of "
                            "torch-fidelity's InceptionV3") from error
        self.net = net.to(device).eval()
        self.sha = common.file_sha(self.path)
        start_of_sha = cached.stem.split("-")[-1]  # of the published file, whose name ends with it
        self.published = self.sha.startswith(start_of_sha)

    @torch.no_grad()
    def __call__(self, images):
        features, logits = self.net(images)
        return torch.cat([features, logits], dim=1)


def add_over_ranks(run, *tensors):
    if run.world > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def image_features(run, inception, batches, n, keep):
    """Features of n images, shared out among the ranks; never are all images in memory.

    torch-fidelity's statistics know no ranks, hold all features in memory (10 GB for ImageNet) and
    take their mean in float32.

    Args:    batches: this rank's, of places (b,) in 0 .. n-1 and images (b,3,H,W) uint8.
    Returns: a namespace, on every rank: n, mu (D,) and sigma (D,D, unbiased), float64 on the CPU;
             features (keep,D) and logits (keep,K) of the images at the first places.
    """
    common.ranks_differ = True
    D, K = inception.widths
    exact = torch.device("cpu") if run.device.type == "mps" else run.device  # mps: no float64
    total = torch.zeros(D, dtype=torch.float64, device=exact)
    square = torch.zeros(D, D, dtype=torch.float64, device=exact)
    kept = torch.zeros(keep, D + K, device=exact)
    for places, images in batches:
        outputs = inception(images).to(exact)
        places = places.to(exact)
        x = outputs[:, :D].double()
        total += x.sum(0)
        square += x.T @ x
        first = places < keep
        kept[places[first]] = outputs[first]
    add_over_ranks(run, total, square, kept)
    mu = total / n
    sigma = (square - n * mu[:, None] * mu) / (n - 1)
    features, logits = kept.split([D, K], dim=1)
    return types.SimpleNamespace(n=n, mu=mu.cpu(), sigma=sigma.cpu(),
                                 features=features, logits=logits)


def share(run, n, batch):
    """This rank's batches of the places 0 .. n-1."""
    return torch.arange(n, device=run.device).split(batch)[run.rank::run.world]


def progress(run, parts, title):
    return common.progress_bar(parts, desc=title, unit="batch", leave=False, disable=not run.main)


def data_features(run, inception, dataset, order, keep, title):
    """`image_features` of the images `order` (m,) of a data set.

    Returns: the namespace; its `sha` is a digest of these images, decoded and shrunk as a network
             would see them, in the order of the data set.
    """
    digests = torch.zeros(len(dataset), dtype=torch.int64)

    def batches():
        parts = share(run, len(order), 64)
        indices = [order[part.cpu().numpy()] for part in parts]
        loader = common.make_loader(dataset, indices, None, run.device)
        for part, chosen, (images, _) in zip(progress(run, parts, title), indices, loader):
            for i, image in zip(chosen, images):
                digest = hashlib.sha256(image.numpy()).digest()
                digests[i] = int.from_bytes(digest[:8], "little", signed=True)
            yield part, images.to(run.device)

    outcome = image_features(run, inception, batches(), len(order), keep)
    digests = digests.to(run.device)
    add_over_ranks(run, digests)
    outcome.sha = hashlib.sha256(digests.cpu().numpy()).hexdigest()[:12]
    return outcome


# --------------------------------------------------------------------------------------------------
# Measures
# --------------------------------------------------------------------------------------------------

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of (D,), (D,D) float64.

    With sigma = R R^T the eigenvalues of sigma1 sigma2 are the squared singular values of R1^T R2.
    torch-fidelity takes the root of eigenvalues: with fewer images than features, many of which are
    zero, it is off by 1e-4 and below 0 for equal arguments; this one gives 0 to 1e-10.
    """
    R1 = square_root(sigma1)
    R2 = square_root(sigma2)
    shared = torch.linalg.svdvals(R1.T @ R2).sum()
    means = (mu1 - mu2).square().sum()
    return max((means + sigma1.trace() + sigma2.trace() - 2 * shared).item(), 0.0)


def square_root(sigma):
    """R with R R^T = sigma."""
    values, vectors = torch.linalg.eigh(sigma)
    return vectors * values.clamp(min=0).sqrt()


def inception_score(logits):
    """exp of the mean KL divergence of p(y|x) from p(y), averaged over ten splits; logits (n,K).

    Source:  Salimans et al. 2016; splits in the order drawn, as in ADM's evaluator.
    """
    isc = fidelity("metric_isc")
    scores = isc.isc_features_to_metric(logits.cpu(), splits=10, shuffle=False)
    return scores[isc.KEY_METRIC_ISC_MEAN]


def squared_distances(a, b):
    """(n,D), (m,D) float64 -> (n,m)."""
    scale = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = scale - 2 * a @ b.T
    return distances.where(distances > 1e-12 * scale, 0)  # float32 does not tell copies apart


def covered(points, centres, k, chunk):
    """The share of points (n,D) that lie no further from one of the centres (m,D) than its k-th
    nearest neighbour among the centres."""
    nearest = [squared_distances(part, centres).kthvalue(k + 1)[0] for part in centres.split(chunk)]
    reach = torch.cat(nearest)  # the (k+1)-th, as the nearest is the centre itself
    inside = [(squared_distances(part, centres) <= reach).any(1) for part in points.split(chunk)]
    return torch.cat(inside).double().mean().item()


def precision_recall(samples, reference, k=3, chunk=1000):
    """The share of samples (n,D) within reach of a reference (m,D), and the reverse.

    torch-fidelity's rounds the distances of copies, which glyphs and memorised images are, up or
    down, and is off by up to 0.15 there.

    Source:  Kynkaanniemi et al. 2019 (k = 3; they used VGG's features), in Inception's features as
             in ADM's evaluator.
    """
    samples, reference = samples.double(), reference.double()  # differences of large numbers
    precision = covered(samples, reference, k, chunk)
    recall = covered(reference, samples, k, chunk)
    return precision, recall


def measure(samples, reference):
    """All measures by name, of two namespaces; precision and recall where there are images."""
    name = "FID" if samples.n == 50_000 else f"FID@{samples.n}"
    results = {name: frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)}
    results["IS"] = inception_score(samples.logits)
    if reference.features is not None:
        precision, recall = precision_recall(samples.features, reference.features)
        results |= dict(precision=precision, recall=recall)
    return results


# --------------------------------------------------------------------------------------------------
# References
# --------------------------------------------------------------------------------------------------

def load_statistics(path, D):
    """mu (D,) and sigma (D,D), float64, of an .npz; None if it holds none, or is none.

    Raises:  UserError for wrong ones.
    """
    if path.suffix != ".npz" or not path.exists():
        return None
    with common.explain(f"--dataset {path} cannot be read as an npz"), np.load(path) as file:
        if "mu" not in file or "sigma" not in file:
            return None
        mu = torch.from_numpy(file["mu"].astype(np.float64))
        sigma = torch.from_numpy(file["sigma"].astype(np.float64))
    right = mu.shape == (D,) and sigma.shape == (D, D)
    if not right or not mu.isfinite().all() or not sigma.isfinite().all():
        raise UserError(f"--dataset {path}: mu must be of shape ({D},) and sigma ({D}, {D}), both "
                        "finite")
    return mu, sigma


def holds_images(path):
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.removesuffix(".npy").lower() in common.IMAGE_KEYS for name in names)


def dataset_of(args, trained):
    """`--dataset` and `--data-dir`, by default those the checkpoint was trained on."""
    settings = trained.get("args", {})
    name = args.dataset or settings.get("dataset")
    if name is None:
        raise UserError(f"{args.ckpt} does not say what it was trained on; name --dataset")
    if args.data_dir and name not in common.NAMED:
        raise UserError("--data-dir says where a named data set lies; give a path of your own as "
                        "--dataset")
    same = name == settings.get("dataset")
    return name, args.data_dir or (settings.get("data_dir") if same else None)


def reference_features(args, run, inception, size, trained):
    """What `--dataset` is compared by: statistics, if it is an .npz of them; images, if it has any.

    Returns: as `data_features`, of REFERENCE_IMAGES images drawn at random; features are None where
             there are statistics alone. Beside it name, and `holds`, what it is in words.
    """
    name, data_dir = dataset_of(args, trained)
    statistics = load_statistics(Path(name), inception.widths[0])
    if statistics and not holds_images(name):
        reference = types.SimpleNamespace(features=None)
        reference.holds = "statistics without images for precision and recall"
    else:
        with common.main_process_first(run):
            cache_dir = getattr(args, "cache_dir", None)  # of the scripts' flags alone
            dataset = common.load_dataset(name, data_dir, size, cache_dir)
        if trained.get("model_args", {}).get("classes"):
            common.check_class_order(dataset, trained["script"], trained.get("data"), args.ckpt)
        if run.main:
            print(f"reference {dataset.describe()}", flush=True)
        n = len(dataset)
        if n < 4:
            raise UserError(f"--dataset {name} holds {n} image(s), and precision and recall look "
                            "at three neighbours: name more")
        keep = min(n, REFERENCE_IMAGES)
        order = np.random.default_rng(0).permutation(n)  # a folder's images are sorted by class
        order = order[:keep] if statistics else order
        reference = data_features(run, inception, dataset, order, keep, "reference")
        reference.holds = "statistics" if statistics else f"{n:,} images"
        if statistics or keep < n:
            reference.holds += f" ({keep:,} images for precision and recall)"
    if statistics:
        reference.mu, reference.sigma = statistics
        reference.sha = common.file_sha(name)
    reference.name = name
    return reference


# --------------------------------------------------------------------------------------------------
# The line
# --------------------------------------------------------------------------------------------------

def report(results, samples, reference, inception):
    """Print the one line: results, what was measured (a text), compared with what, by what."""
    numbers = ", ".join(f"{key} {value:.3f}" for key, value in results.items())
    line = (f"{numbers}: {samples}; reference {reference.name}, {reference.holds}, "
            f"sha {reference.sha}; Inception {inception.sha}")
    if not inception.published:
        line += f", {inception.path}, not the weights of published numbers"
    print(line, flush=True)


SAMPLING_FLAGS = "sigmas", "steps", "gamma", "heun", "N", "sampler", "churn", "w"


def evaluate(args, run, draw, y, shape, calls, trained, batch):
    """`--ckpt --eval n`: measure n samples. Prints a line and appends one to eval.jsonl, which lies
    beside the checkpoint.

    Args:    draw, y, shape, batch: as common.draw_many.  calls: of the network for an image.
             trained: the checkpoint.
    """
    n = args.eval
    inception = Inception(args.inception, run.device)
    reference = reference_features(args, run, inception, shape[1], trained)

    def batches():
        for part in progress(run, share(run, n, batch), "samples"):
            images = common.draw_part(draw, part, y, shape, args.seed)
            yield part, images.permute(0, 3, 1, 2)

    samples = image_features(run, inception, batches(), n, n)
    if not run.main:
        return
    results = measure(samples, reference)
    labels = "all labels in turn"
    data = trained.get("data")
    if data and len(data["present"]) < trained["model_args"]["classes"]:
        labels = f"the {len(data['present'])} labels of its data in turn"
    if y is None:
        labels = "unconditional"
    elif args.labels:
        labels = f"labels {' '.join(map(str, args.labels))} in turn"
    words = [f"{n:,} samples", labels, f"NFE {calls}"]
    for key in SAMPLING_FLAGS:
        if getattr(args, key, None):
            words.append(f"{key} {common.show_value(getattr(args, key))}")
    words += [f"seed {args.seed}", f"EMA weights of {args.ckpt}"]
    report(results, ", ".join(words), reference, inception)
    settings = {key: value for key, value in vars(args).items()
                if value is not None and key not in ("sample", "save")}
    common.append_record(Path(args.ckpt).parent / "eval.jsonl", results | dict(
        n=n, labels=labels, nfe=calls, seed=args.seed, step=trained.get("step"),
        reference=reference.name, reference_holds=reference.holds, reference_sha=reference.sha,
        inception_sha=inception.sha, dtype=str(run.dtype).removeprefix("torch."), args=settings))


# --------------------------------------------------------------------------------------------------
# By itself
# --------------------------------------------------------------------------------------------------

def open_samples(path, size):
    """The saved samples; `size` None: of the size that the first of them has. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path} does not exist: name an .npz, an .npy, a folder or a zip")
    load = common.load_arrays if path.suffix in (".npz", ".npy") else common.load_files
    dataset = load(path, size)
    if len(dataset) < 10:
        raise UserError(f"{path} holds {len(dataset)} image(s): name 10 or more, the Inception "
                        "score has ten splits")
    if size is None:
        dataset.size = first_size(dataset)
    return dataset


def first_size(dataset):
    """The shorter side of a data set's first image."""
    if isinstance(dataset, common.ArrayImages):
        return min(dataset.parts[0].shape[1:3])
    from PIL import Image
    name = os.fsdecode(dataset.files[0])
    with common.explain(f"{dataset.source}/{name} cannot be read as an image"):
        return min(Image.open(io.BytesIO(common.read_file(dataset.source, name))).size)


def make_parser():
    parser = common.Parser(__doc__)
    flag = parser.add_argument
    flag("samples", metavar="SAMPLES", type=Path,
         help="an .npz, an .npy, a folder or a zip of images")
    flag("--reference", dest="dataset", metavar="DATA", required=True,
         help="a data set, as --dataset of the scripts, or an .npz of statistics (mu, sigma)")
    flag("--data-dir", metavar="DIR", help="where a named data set lies")
    flag("--inception", metavar="FILE",
         help="weights of torch-fidelity's Inception (default: where it keeps them)")
    flag("--size", type=common.positive, metavar="PIXELS",
         help="shrink all images to this size (default: that of the samples)")
    flag("--device", choices=("auto", "cuda", "mps", "cpu"),
         help="default: the first of these that is there")
    parser.set_defaults(data_dir=None, inception=None, size=None, device="auto")
    parser.set_defaults(precision="fp32", compile=False)  # for common.setup
    return parser


def main():
    sys.excepthook = common.one_line_errors
    args = make_parser().parse_args()
    run = common.setup(args)
    dataset = open_samples(args.samples, args.size)
    if run.main:
        print(f"samples {dataset.describe()}")
    n = len(dataset)
    inception = Inception(args.inception, run.device)
    try:
        reference = reference_features(args, run, inception, dataset.size, {})
        samples = data_features(run, inception, dataset, np.arange(n), n, "samples")
    except UserError as error:  # in the words of this command
        message = str(error).replace("--dataset", "--reference").replace("the network's ", "")
        raise UserError(message) from error
    if run.main:
        words = f"{n:,} samples of {args.samples}, {dataset.size} pixels, sha {samples.sha}"
        report(measure(samples, reference), words, reference, inception)
    common.finish(run)


if __name__ == "__main__":
    main()
