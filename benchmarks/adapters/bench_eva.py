"""EVA: directions and ranks against PEFT's, and one step of incremental SVD against PEFT's and scikit-learn's.

Three blocks of ViT-B with all their matrices, random weights, eight batches of eight photographs of clothes. PEFT goes
round and round through the batches until every direction rests; the sums of products know all after one round. So the
second row gives ours as many passes as PEFT took, on batches that are all different.
"""

from __future__ import annotations

from itertools import count, cycle, islice

import peft
import timm
import torch
from peft.utils.incremental_pca import IncrementalPCA
from sklearn.decomposition import IncrementalPCA as SklearnPCA
from torch import Tensor, nn
from torch.nn.functional import interpolate

from benchmarks._timing import Floor, Row, compare, counted_flops, flops_floor
from peftref.adapters.core.spectra import absorb
from peftref.adapters.eva import collect
from peftref.data import load

TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
WIDTH, DEPTH, IMAGES, SIDE = 768, 3, 8, 112


def vit(depth: int = DEPTH, width: int = WIDTH, side: int = SIDE) -> nn.Module:
    """ViT-B with fewer blocks, its weights random: no package ships trained ones of this width."""
    torch.manual_seed(0)
    shape = {"img_size": side, "patch_size": 16, "embed_dim": width, "depth": depth, "num_heads": 12}
    return timm.models.VisionTransformer(**shape, num_classes=10).eval()


def photographs(n: int, images: int = IMAGES, side: int = SIDE) -> list[Tensor]:
    x = interpolate(load("fashion8k").train.x[: n * images], size=side, mode="bilinear").expand(-1, 3, -1, -1)
    return [batch.contiguous() for batch in x.split(images)]


def theirs(model: nn.Module, batches: list[Tensor], r: int) -> tuple[dict[str, Tensor], int]:
    """PEFT's directions by layer, and the passes through the model that they took, but for the first, for hashes."""
    eva, passes = peft.EvaConfig(rho=2.0, tau=0.99), count()
    options = peft.LoraConfig(r=r, target_modules=TARGETS, init_lora_weights="eva", eva_config=eva)
    found = peft.get_eva_state_dict(
        model, batches, options, forward_fn=lambda m, x: (next(passes), m(x)), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, batch, name: x[0].flatten(0, -2), show_progress_bar=False,
    )  # fmt: skip
    return found, next(passes) - 1


def check(model: nn.Module, batches: list[Tensor], r: int, right: dict[str, Tensor]) -> None:
    """Ranks are PEFT's, give or take one, and each of its directions lies in the span of ours.

    Directions of nearly equal variance trade places between any two ways to find them, so the span is that of more.
    """
    ranks, spectra = collect(model, TARGETS, batches, r=r).ranks, collect(model, TARGETS, batches, r=r, rho=4.0).spectra
    for name, A in right.items():
        inside = (A.float() @ spectra[name].components.T).norm(dim=1)
        if abs(ranks[name] - len(A)) > 1 or (len(A) and inside.min() < 0.98):
            raise AssertionError(f"{name}: rank {ranks[name]} for {len(A)}, of a direction {inside.min():.3f} in ours")


@torch.no_grad()
def least(model: nn.Module, batches: list[Tensor]) -> Floor:
    """Each batch through the network."""
    return flops_floor(sum(counted_flops(lambda x=x: model(x)) for x in batches))


def initialisation(n: int, r: int, model: nn.Module, images: int, side: int, target: float | None = None) -> list[Row]:
    few = photographs(n, images, side)
    right, passes = theirs(model, few, r)
    check(model, few, r, right)
    once = compare(
        f"directions and ranks, {n} batches (PEFT: {passes} passes)",
        lambda: collect(model, TARGETS, few, r=r), lambda: theirs(model, few, r),
        peer_name="peft get_eva_state_dict", target=target, floor=least(model, few), warmup=0, repeats=3,
    )  # fmt: skip
    many = photographs(passes, images, side)
    right, passes = theirs(model, many, r)
    many = list(islice(cycle(many), passes))
    check(model, many, r, right)
    fair = compare(
        f"directions and ranks, {passes} passes for both",
        lambda: collect(model, TARGETS, many, r=r), lambda: theirs(model, many, r),
        peer_name="peft get_eva_state_dict", floor=least(model, many), warmup=0, repeats=1,
    )  # fmt: skip
    return [once, fair]


def update(claim: str, n: int, i: int, k: int, lowrank: bool, target: float | None = None) -> Row:
    """The second step of incremental SVD on rows whose variances fall."""
    g = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, i, generator=g) * torch.logspace(0, -2, i) for _ in range(2))
    old = absorb(None, first, k)
    if lowrank:
        pca = IncrementalPCA(k, lowrank=True, lowrank_seed=42)
        pca.partial_fit(first)
        state = dict(vars(pca))

        def peer() -> Tensor:
            vars(pca).update(state)
            return pca.partial_fit(second).components_.float()
    else:
        pca = SklearnPCA(k)
        pca.partial_fit(first.numpy())
        state = dict(vars(pca))

        def peer() -> Tensor:
            vars(pca).update(state)
            return torch.from_numpy(pca.partial_fit(second.numpy()).components_).float()

    def ours() -> Tensor:
        return absorb(old, second, k, lowrank=lowrank).components

    # What such directions are for is the variance they explain. Of two approximate ways each may have directions that
    # the other has not, where neighbouring variances are nearly equal, as here.
    rows = torch.cat([first, second])
    explained = [(rows - rows.mean(0)).mm(found.T).square().sum() for found in (ours(), peer())]
    assert explained[0] > (0.99 if lowrank else 0.9999) * explained[1], explained
    name = "peft IncrementalPCA(lowrank=True)" if lowrank else "scikit-learn IncrementalPCA"
    return compare(claim, ours, peer, peer_name=name, target=target)


def rows() -> list[Row]:
    return [
        *initialisation(8, 16, vit(), IMAGES, SIDE, target=3.0),
        update("one approximate step, 800 rows of 3072", 800, 3072, 32, lowrank=True),
        update("one exact step, 800 rows of 768", 800, 768, 32, lowrank=False),
    ]
