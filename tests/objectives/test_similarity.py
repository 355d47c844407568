"""Each prior against its published formula, written out in float64, with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import random_kept
from host_guard import HostGuard
from test_teacher import make_teacher
from torch import Tensor, nn

import smi_fast
from smi_fast import objectives, targets
from smi_fast.objectives import Objective
from smi_fast.objectives.adversarial import clamped_js
from smi_fast.objectives.attention_prior import random_mixtures
from smi_fast.objectives.gaussian_similarity import gaussian_entropy
from smi_fast.objectives.head_similarity import head_dissimilarity
from smi_fast.objectives.patch_similarity import similarity_entropy
from tests.helpers.loss_inputs import compare, loss_inputs

F64 = torch.float64
SPARSE = {"schedule": smi_fast.StopSchedule((2, 4), (0.5, 0.5)), "iterations": 6}


def published_entropy(features: Tensor) -> Tensor:
    """PSAQ-ViT's differential entropy, term by term."""
    batch, count, _ = features.shape
    entropies = []
    similarities = torch.stack(
        [
            torch.cosine_similarity(features[b, i], features[b, j], dim=0)
            for b in range(batch) for i in range(count) for j in range(count)
        ]
    ).reshape(batch, -1)  # fmt: skip
    points = torch.linspace(similarities.min().item(), similarities.max().item(), 10, dtype=F64)
    for of_image in similarities:
        kernels = torch.exp(-((points[:, None] - of_image) ** 2) / (2 * 0.01**2))
        density = kernels.mean(1) / math.sqrt(2 * math.pi * 0.01**2) + 1e-4
        entropies.append(torch.trapz(-density * density.log(), points))
    return torch.stack(entropies).mean()


@pytest.mark.parametrize("count", [2, 3, 13])
@pytest.mark.parametrize("tile", [1, 600, 1 << 18])
def test_patch_similarity(count: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(smi_fast.objectives.patch_similarity.TILE, "cpu", tile)
    features = torch.randn(2, count, 6, dtype=F64) + 0.5
    compare(similarity_entropy, published_entropy, features)
    nearly_alike = torch.randn(1, 1, 6, dtype=F64) + 0.05 * features
    compare(similarity_entropy, published_entropy, nearly_alike)


def test_patch_similarity_gradient() -> None:
    # The first image has the least and the greatest similarity, so that the points stay.
    ends = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]], dtype=F64)
    free = torch.tensor([[1.0, 0.3], [0.9, 0.4], [1.0, 0.45], [1.1, 0.2]], dtype=F64)
    assert torch.autograd.gradcheck(
        lambda x: similarity_entropy(torch.stack([ends, x])), free.requires_grad_(), eps=1e-7
    )


def test_patch_similarity_in_single_precision() -> None:
    features = torch.randn(2, 40, 16) + 0.5
    values, gradients = [], []
    for dtype in (torch.float32, F64):
        given = features.to(dtype).requires_grad_()
        values.append(similarity_entropy(given))
        gradients.append(torch.autograd.grad(values[-1], given)[0])
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-4, atol=1e-5)
    error = (gradients[0].double() - gradients[1]).norm() / gradients[1].norm()
    assert error < 2e-3


def test_patch_similarity_reads_mean_outputs_of_patches() -> None:
    outputs = {f"attention.{i}.output": torch.randn(2, 7, 3, 4, dtype=F64) for i in range(4)}
    expected = -sum(published_entropy(x[:, 2:].mean(2)) for x in outputs.values())
    term = smi_fast.PatchSimilarity()
    assert term.taps(4) == tuple(outputs)
    torch.testing.assert_close(term(loss_inputs(taps=outputs, depth=4, prefix=2)), expected)
    last = smi_fast.PatchSimilarity(blocks=(-1,))
    expected = -published_entropy(outputs["attention.3.output"][:, 2:].mean(2))
    torch.testing.assert_close(last(loss_inputs(taps=outputs, depth=4, prefix=2)), expected)


def published_gaussian(features: Tensor) -> Tensor:
    entropies = []
    for vectors in features:
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        similarities = (unit @ unit.T).flatten()
        variance = ((similarities - similarities.mean()) ** 2).mean() + 1e-8
        entropies.append(0.5 * torch.log(2 * math.pi * math.e * variance))
    return torch.stack(entropies).mean()


def test_gaussian_similarity() -> None:
    features = torch.randn(3, 9, 5, dtype=F64)
    compare(gaussian_entropy, published_gaussian, features)
    assert torch.autograd.gradcheck(gaussian_entropy, features.requires_grad_())


def test_gaussian_similarity_goes_through_all_patches() -> None:
    teacher = smi_fast.SparseViT(make_teacher("deit_tiny_patch16_224", img_size=64, depth=2))
    term = smi_fast.GaussianSimilarity(rows=4)
    term.begin(teacher, 2, torch.Generator().manual_seed(0))
    for kept in (16, 12):
        picks = torch.stack([term._pick(kept, torch.tensor(i)) for i in range(kept)])
        for image in range(2):
            counts = picks[:, image].flatten().bincount(minlength=kept)
            assert (counts == 4).all()
        assert not torch.equal(picks[0, 0], picks[0, 1])
    assert term._pick(3, torch.tensor(1)).sort().values.tolist() == [[0, 1, 2]] * 2
    scores = {f"attention.{i}.scores": torch.randn(2, 3, 5, 5, dtype=F64) for i in range(2)}
    rows = [x.mean(1)[:, 1:, 1:] for x in scores.values()]
    expected = -sum(map(published_gaussian, rows)) / 2
    torch.testing.assert_close(term(loss_inputs(taps=scores, depth=2, prefix=1)), expected)


def published_head_similarity(scores: Tensor) -> Tensor:
    """MimiQ's 1 - SSIM² of every pair of heads, one by one."""
    batch, heads, queries, _ = scores.shape
    found = []
    for b in range(batch):
        for n in range(queries):
            maps = scores[b, :, n] - scores[b, :, n].min(1, keepdim=True).values
            maps = maps / (maps.max(1, keepdim=True).values + 1e-8)
            for i in range(heads):
                for j in range(heads):
                    x, y = maps[i], maps[j]
                    cov = (x * y).mean() - x.mean() * y.mean()
                    var = [(z * z).mean() - z.mean() ** 2 for z in (x, y)]
                    ssim = (2 * x.mean() * y.mean() + 0.01**2) * (2 * cov + 0.03**2)
                    ssim = ssim / (x.mean() ** 2 + y.mean() ** 2 + 0.01**2)
                    found.append(1 - (ssim / (sum(var) + 0.03**2)) ** 2)
    return torch.stack(found).mean()


def test_head_similarity() -> None:
    scores = torch.randn(2, 3, 4, 6, dtype=F64)
    compare(head_dissimilarity, published_head_similarity, scores)
    assert torch.autograd.gradcheck(head_dissimilarity, scores.requires_grad_())
    taps = {f"attention.{i}.scores": torch.randn(1, 2, 6, 6, dtype=F64) for i in (1, 2)}
    expected = sum(published_head_similarity(x[:, :, 2:, 2:]) for x in taps.values()) / 2
    term = smi_fast.HeadSimilarity(blocks=(1, -1))
    torch.testing.assert_close(term(loss_inputs(taps=taps, depth=3, prefix=2)), expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_attention_prior(sparse: bool) -> None:
    teacher = smi_fast.SparseViT(make_teacher("deit_tiny_patch16_224", img_size=48, depth=5))
    term = smi_fast.AttentionPrior()
    term.begin(teacher, 2, torch.Generator().manual_seed(0))
    assert term.taps(5) == tuple(f"attention.{i}.row" for i in (1, 2, 3, 4))
    assert smi_fast.AttentionPrior().taps(1) == ("attention.0.row",)
    mixtures = term._mixtures.double()
    kept = random_kept(2, 4, 9) if sparse else torch.arange(9).expand(2, -1)
    rows = torch.rand(4, 2, 3, kept.shape[1] + 1, dtype=F64, requires_grad=True)

    def plain(rows: Tensor) -> Tensor:
        total = 0.0
        for index, level in enumerate((2, 3, 4, 5)):
            for head in range(3):
                errors = []
                for image in range(2):
                    prior = mixtures[index, image, head, kept[image]]
                    prior = prior / prior.sum()
                    errors.append(((rows[index, image, head, 1:] - prior) ** 2).mean())
                total = total + level / 5 * torch.stack(errors).mean()
        return total

    def ours(rows: Tensor) -> Tensor:
        taps = dict(zip(term.taps(5), rows, strict=True))
        return term(loss_inputs(taps=taps, depth=5, prefix=1, kept=kept))

    term._mixtures = mixtures
    compare(ours, plain, rows)
    assert torch.autograd.gradcheck(ours, rows)


def test_mixtures_are_sums_of_gaussians() -> None:
    """The logarithm of a single component is a parabola along both axes."""
    generator = torch.Generator().manual_seed(1)
    mixtures = random_mixtures((40, 3), (12, 10), 5, generator)
    torch.testing.assert_close(mixtures.sum(-1), torch.ones(40, 3))
    assert mixtures.min() > 0 and not torch.equal(mixtures[0, 0], mixtures[0, 1])
    single = random_mixtures((50,), (12, 10), 1, generator).double().unflatten(1, (12, 10))
    broad = single[single.flatten(1).amin(1) > 1e-9]
    assert len(broad) > 10
    for axis in (1, 2):
        curvature = broad.log().diff(2, dim=axis)
        mean = curvature.mean((1, 2), keepdim=True)
        assert (mean < 0).all()
        torch.testing.assert_close(curvature, mean.expand_as(curvature), rtol=0.05, atol=1e-3)


def published_js(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = (torch.exp(x / temperature) / torch.exp(x / temperature).sum() for x in (s, t))
        m = torch.clamp(0.5 * (p + q), 0.01, 0.99)
        p, q = torch.clamp(p, 0.01, 0.99), torch.clamp(q, 0.01, 0.99)
        total = total + 0.5 * (m * torch.log(m / p)).sum() + 0.5 * (m * torch.log(m / q)).sum()
    return total / len(student)


def test_adversarial() -> None:
    student, teacher = 3 * torch.randn(2, 4, 6, dtype=F64)
    compare(lambda x: clamped_js(x, teacher, 3.0), lambda x: published_js(x, teacher, 3.0), student)
    compare(lambda x: clamped_js(student, x, 2.0), lambda x: published_js(student, x, 2.0), teacher)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clamped_js(student, x, 3.0), teacher)


def test_adversarial_student_sees_the_jittered_image() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 12, 5)).double().eval()
    images, logits = torch.randn(2, 3, 8, 12, dtype=F64), torch.randn(2, 5, dtype=F64)
    jitter = (torch.tensor([2, -3]), torch.tensor(True))
    given = loss_inputs(images, logits, jitter=jitter)
    js = published_js(network(images.roll((2, -3), (2, 3)).flip(3)), logits, 3.0)
    torch.testing.assert_close(smi_fast.AdversarialJS(network)(given), 1 - js)
    torch.testing.assert_close(smi_fast.AdversarialJS(network, bounded=False)(given), -js)
    with pytest.raises(ValueError, match="in eval mode"):
        smi_fast.AdversarialJS(network.train())(given)
    assert network.training


def plain_seams(images: Tensor, mask: Tensor) -> Tensor:
    """Seam by seam; mask [B, rows, columns] of patches whose jumps count."""
    total, size = 0.0, 4
    for axis in (2, 3):
        for k in range(1, images.shape[axis] // size):
            jump = images.select(axis, size * k) - images.select(axis, size * k - 1)
            counts = mask.select(axis - 1, k) | mask.select(axis - 1, k - 1)
            total = total + torch.norm(jump * counts.repeat_interleave(size, 1)[:, None])
    return total


@pytest.mark.parametrize("sparse", [False, True])
def test_patch_seams(sparse: bool) -> None:
    images = torch.randn(2, 3, 12, 16, dtype=F64)
    active = torch.tensor([[0, 5], [6, 7]]) if sparse else None
    mask = torch.ones(2, 12, dtype=torch.bool)
    if sparse:
        mask = torch.zeros_like(mask).scatter(1, active, True)
    mask, term = mask.reshape(2, 3, 4), smi_fast.PatchSeamTV()
    compare(lambda x: term(loss_inputs(x, active=active)), lambda x: plain_seams(x, mask), images)
    images.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: term(loss_inputs(x, active=active)), images)
    flat = torch.ones(1, 3, 8, 8, requires_grad=True)
    term(loss_inputs(flat)).backward()
    assert not flat.grad.any()


def test_variation_target() -> None:
    teacher = smi_fast.SparseViT(make_teacher("deit_tiny_patch16_224", img_size=32, depth=1))
    term = smi_fast.VariationTarget()
    drawn = []
    for seed in range(20):
        term.begin(teacher, 8, torch.Generator().manual_seed(seed))
        drawn.append(term._target.item() * (32 * 224 * 224 / (8 * 32 * 32)) ** 0.5)
    assert 2500 <= min(drawn) < 2650 and 2850 < max(drawn) <= 3000
    target = term._target.double()

    def plain(x: Tensor) -> Tensor:
        straight = (x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :])
        slanted = (x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:])
        return (sum(map(torch.norm, straight + slanted)) - target).abs()

    for scale in (0.1, 10):
        images = scale * torch.randn(8, 3, 8, 8, dtype=F64)
        compare(lambda x: term(loss_inputs(x)), plain, images)


def test_norm_of_each_image() -> None:
    images = torch.randn(3, 3, 4, 4, dtype=F64)
    value = objectives.L2Norm(per_image=True)(loss_inputs(images))
    torch.testing.assert_close(value, sum(torch.norm(image) for image in images) / 3)
    torch.testing.assert_close(objectives.L2Norm()(loss_inputs(images)), torch.norm(images))


def test_token_statistics_from_images() -> None:
    teacher = make_teacher("deit_tiny_distilled_patch16_224", img_size=64, depth=3).double()
    sparse, images = smi_fast.SparseViT(teacher), torch.randn(7, 3, 64, 64, dtype=F64)
    loader = [images[:3], (images[3:5], torch.zeros(2)), [images[5:]]]
    found = smi_fast.collect_statistics(teacher, loader, blocks=(0, -1))
    assert list(found) == ["block.0.tokens", "block.2.tokens"]
    tapped = sparse(images, taps=found).taps
    for name, (mean, var) in found.items():
        tokens = tapped[name][:, 2:].flatten(0, 1)
        torch.testing.assert_close(mean, tokens.mean(0))
        torch.testing.assert_close(var, tokens.var(0, correction=0))

    term = smi_fast.TokenStatistics(found)
    whole = term(loss_inputs(taps=tapped, prefix=2))
    assert whole.item() < 1e-12
    other = torch.randn(2, 3, 64, 64, dtype=F64, requires_grad=True)
    kept = random_kept(2, 5, 16)

    def plain(x: Tensor) -> Tensor:
        total = 0.0
        for name, tokens in sparse(x, kept, taps=found).taps.items():
            mean, var = found[name]
            channels = tokens[:, 2:].flatten(0, 1)
            total = total + torch.norm(channels.mean(0) - mean)
            total = total + torch.norm(channels.var(0, correction=0) - var)
        return total

    compare(
        lambda x: term(loss_inputs(taps=sparse(x, kept, taps=found).taps, prefix=2)), plain, other
    )
    with pytest.raises(ValueError, match="a loader with images, got none"):
        smi_fast.collect_statistics(teacher, [])
    with pytest.raises(ValueError, match=r"blocks in -3..2, got \(3,\)"):
        smi_fast.collect_statistics(teacher, loader, blocks=(3,))
    wide = smi_fast.SparseViT(make_teacher("deit_small_patch16_224", img_size=64, depth=3))
    with pytest.raises(ValueError, match=r"mean and variance \[384\] on cpu, got \[192\]"):
        term.begin(wide, 1, None)


def test_soft_and_multiple_targets() -> None:
    labels = torch.tensor([[1, 4], [0, 2]])
    generator = torch.Generator().manual_seed(0)
    soft = targets.soft_targets(labels, 5, generator=generator)
    logits = soft.log() - soft.log().median(1, keepdim=True).values
    wanted = logits.gather(1, labels)
    assert ((wanted + 1e-4 >= 5) & (wanted <= 10 + 1e-4)).all() and wanted.unique().numel() == 4
    assert (logits.scatter(1, labels, 0.0).abs() < 1e-5).all()
    one = targets.soft_targets(torch.tensor([3]), 5, low=6.0, high=6.0)
    torch.testing.assert_close(one, torch.tensor([[0, 0, 0, 6.0, 0]]).softmax(1))
    multi = targets.multi_targets(labels, 5)
    assert multi.tolist() == [[0, 1, 0, 0, 1], [1, 0, 1, 0, 0]]

    logits = torch.randn(2, 5, dtype=F64)
    given = loss_inputs(logits=logits, targets=multi.double())
    p = 1 / (1 + torch.exp(-logits))
    expected = -(multi * p.log() + (1 - multi) * (1 - p).log()).mean()
    torch.testing.assert_close(smi_fast.BinaryCrossEntropy()(given), expected)
    with pytest.raises(ValueError, match=r"probabilities \[2, 5\], got \[2\]"):
        smi_fast.BinaryCrossEntropy()(loss_inputs(logits=logits))
    with pytest.raises(ValueError, match=r"labels in 0\.\.4"):
        targets.multi_targets(torch.tensor([[5]]), 5)
    with pytest.raises(ValueError, match=r"labels int64 \[B\]"):
        targets.soft_targets(torch.tensor([1.0]), 5)


def every_prior(teacher: smi_fast.SparseViT) -> list[Objective]:
    images = torch.randn(2, 3, *teacher.image_size, dtype=teacher.dtype)
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU()).to(teacher.dtype)
    student = nn.Sequential(nn.Flatten(), nn.LazyLinear(10, dtype=teacher.dtype)).eval()
    student(images)
    return [
        smi_fast.CrossEntropy(),
        smi_fast.TotalVariation(),
        smi_fast.BatchNormMatching(cnn),
        smi_fast.TokenStatistics(smi_fast.collect_statistics(teacher, [images])),
        smi_fast.PatchSimilarity(),
        smi_fast.GaussianSimilarity(rows=4),
        smi_fast.HeadSimilarity(),
        smi_fast.AttentionPrior(),
        smi_fast.AdversarialJS(student),
        smi_fast.PatchSeamTV(),
        smi_fast.VariationTarget(),
    ]


def test_every_prior_takes_part_in_a_sparse_inversion() -> None:
    teacher = smi_fast.SparseViT(make_teacher("deit_tiny_patch16_224", img_size=64, depth=2))
    terms = every_prior(teacher)
    options = {"objectives": terms, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    for background in ("frozen", "regularized"):
        inverter = smi_fast.SparseInverter(teacher, background=background, **SPARSE, **options)
        runs = [
            inverter.invert([1, 2], generator=torch.Generator().manual_seed(5), progress=False)
            for _ in range(2)
        ]
        assert torch.equal(runs[0].images, runs[1].images)
        assert len(runs[0].history) == len(terms)
        assert all(len(set(values)) == 6 for values in runs[0].history.values())


@pytest.mark.parametrize("kept", [16, 6])
def test_a_step_with_every_prior_can_be_captured(kept: int) -> None:
    teacher = smi_fast.SparseViT(make_teacher("deit_tiny_patch16_224", img_size=64, depth=2))
    space = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    inverter = smi_fast.SparseInverter(teacher, objectives=every_prior(teacher), **SPARSE, **space)
    state = inverter.start([1, 2], None, None, torch.Generator().manual_seed(0))
    state.keep(smi_fast.Selection(state.kept[:, :kept].contiguous()))
    before = state.images().clone()
    with HostGuard():
        state.step()
    assert state.non_finite(slice(0, 1)) is None
    assert not torch.equal(state.images(), before)


@pytest.mark.parametrize("name", ["GaussianSimilarity", "AttentionPrior", "VariationTarget"])
def test_what_was_not_begun_is_refused(name: str) -> None:
    taps = {"attention.0.scores": torch.zeros(2, 1, 5, 5), "attention.0.row": torch.zeros(2, 1, 5)}
    with pytest.raises(RuntimeError, match=r"begin\(\) draws"):
        getattr(smi_fast, name)()(loss_inputs(taps=taps, depth=1, prefix=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: smi_fast.GaussianSimilarity(rows=1), "2 rows or more, got 1"),
        (lambda: smi_fast.AttentionPrior(components=0), "1 component or more, got 0"),
        (lambda: smi_fast.AdversarialJS(nn.Identity(), temperature=0), "above 0, got 0"),
        (lambda: smi_fast.VariationTarget(3, 2), "low <= high, got 3 and 2"),
        (lambda: smi_fast.TokenStatistics({}), "statistics of block.N.tokens"),
        (lambda: smi_fast.TokenStatistics({"attention.1": ()}), "block.N.tokens, got .'attention"),
    ],
)
def test_bad_options_are_refused(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
