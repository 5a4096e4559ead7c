"""Every method of the book: what it is called, where it comes from, and whether its chapter is ready.

The table in the README and the book's map are written from here (``python -m tools.readme``), and the tests hold each
ready method to its five places: module, tests, chapter, benchmark, bibliography.

>>> [method.title for method in METHODS if method.part == "tta"]
['LAME', 'CoTTA', 'Label shift adapter']
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import pandas as pd

__all__ = ["METHODS", "PARTS", "Method", "Part", "map_page", "readme_table", "table"]

ARXIV = "https://arxiv.org/abs/"


@dataclass(frozen=True)
class Part:
    """A part of the book: one folder of the package, the book, the tests and the benchmarks."""

    slug: str
    title: str
    adapts: str


@dataclass(frozen=True)
class Method:
    """One method; ``slug`` also names its module, chapter, tests, benchmark and BibTeX entry."""

    slug: str
    title: str
    part: str
    summary: str
    authors: str
    venue: str
    year: int
    arxiv: str
    status: Literal["ready", "planned"] = "planned"

    @property
    def reference(self) -> str:
        """Authors and venue as text: "Boudiaf et al., CVPR 2022"."""
        return f"{self.authors}, {self.venue} {self.year}"


PARTS = (
    Part("adapters", "Adapters", "a few added weights in a frozen model"),
    Part("tta", "Test-time adaptation", "the model at test time, without labels"),
    Part("continual", "Continual learning", "one model over a stream of tasks"),
    Part("merging", "Model merging", "finished weights, by arithmetic"),
    Part("sharing", "Weight sharing", "one set of weights, many networks"),
    Part("training", "Training rules", "how weights are updated"),
    Part("shift", "Domain shift", "a model to new domains and environments"),
    Part("panel", "Panel data", "effect estimates that allow for unobserved differences"),
    Part("decisions", "Decisions", "a policy to changing conditions"),
)

METHODS = (
    # adapters
    Method("bone", "Bone", "adapters",
           "One trained block, guided by the frozen weight at every step", "Kang", "arXiv", 2024, "2409.15371",
           "ready"),
    Method("hydra", "Hydra", "adapters",
           "Parallel and sequential low-rank branches in one layer", "Kim et al.", "arXiv", 2023, "2309.06922",
           "ready"),
    Method("tera", "TeRA", "adapters",
           "High-rank updates from a frozen random tensor network and trained vectors",
           "Gu et al.", "arXiv", 2025, "2509.03234", "ready"),
    Method("tlora", "TLoRA", "adapters",
           "A dense tensor-ring transform of the weight before a compact residual",
           "Tao et al.", "ICCV", 2025, "2501.08727", "ready"),
    Method("eva", "EVA", "adapters",
           "LoRA started from the directions that explain the activations' variance",
           "Paischer et al.", "NeurIPS", 2025, "2410.07170", "ready"),
    Method("adaptformer", "AdaptFormer", "adapters",
           "A scaled bottleneck beside each MLP of a frozen vision transformer",
           "Chen et al.", "NeurIPS", 2022, "2205.13535", "ready"),
    Method("vl_adapter", "VL-Adapter", "adapters",
           "Adapters, and sharing them, for several vision-and-language tasks at once",
           "Sung et al.", "CVPR", 2022, "2112.06825", "ready"),
    Method("orthogonal_adaptation", "Orthogonal adaptation", "adapters",
           "LoRAs trained apart in orthogonal subspaces, merged without crosstalk",
           "Po et al.", "CVPR", 2024, "2312.02432"),
    Method("motion_director", "MotionDirector", "adapters",
           "Appearance and motion of a video learned by separate low-rank paths",
           "Zhao et al.", "ECCV", 2024, "2310.08465"),
    Method("combo", "Combo", "adapters",
           "A small conditional adapter brings new identities and emotions to co-speech motion",
           "Xu et al.", "IEEE TPAMI", 2025, "2408.09397"),
    # tta
    Method("lame", "LAME", "tta",
           "Corrects the predictions of a batch by its neighbours; the weights stay as they are",
           "Boudiaf et al.", "CVPR", 2022, "2201.05718", "ready"),
    Method("cotta", "CoTTA", "tta",
           "An averaged teacher and random restoration keep a long adaptation stable",
           "Wang et al.", "CVPR", 2022, "2203.13591", "ready"),
    Method("label_shift_adapter", "Label shift adapter", "tta",
           "A small network adjusts the classifier to the class balance met at test time",
           "Park et al.", "ICCV", 2023, "2308.08810"),
    # continual
    Method("adab2n", "AdaB2N", "continual",
           "Batch-normalisation statistics balanced over tasks",
           "Lyu et al.", "NeurIPS", 2023, "2310.08855", "ready"),
    Method("lae", "LAE", "continual",
           "A fast and a slow adapter that learn, accumulate and vote",
           "Gao et al.", "ICCV", 2023, "2303.10070", "ready"),
    Method("fsa", "First session adaptation", "continual",
           "The body adapts once, on the first session; a discriminant head does the rest",
           "Panos et al.", "ICCV", 2023, "2303.13199", "ready"),
    Method("classp", "CLASSP", "continual",
           "An optimiser that moves weights less the more they have already learned",
           "Ludwig", "arXiv", 2024, "2405.09637", "ready"),
    Method("e2wm", "EWC-LoRA (E2WM)", "continual",
           "LoRA held near the weights that mattered before, by Fisher information",
           "Xiang et al.", "NeurIPS", 2023, "2305.10626"),
    # merging
    Method("rws", "Robust weight signatures", "merging",
           "Robustness to a corruption, stored as a patch of the shallow weights",
           "Cai et al.", "ICML", 2023, "2302.12480", "ready"),
    Method("bang", "BANG", "merging",
           "Why weight averages are robust, and how to balance them", "Lin et al.", "ICLR", 2024, "2309.17230",
           "ready"),
    Method("widen", "WIDEN", "merging",
           "Magnitude and direction ranked per column, so that updates of any size merge",
           "Yu et al.", "arXiv", 2024, "2408.03092"),
    Method("pleas", "PLeaS", "merging",
           "Networks merged by partial permutation and least squares", "Nasery et al.", "CVPR", 2025, "2407.02447"),
    Method("lora_lego", "LoRA-LEGO", "merging",
           "Adapters taken apart into ranks and clustered anew", "Zhao et al.", "ICLR", 2025, "2409.16167"),
    Method("rmm", "Reversible model merging", "merging",
           "A few basis models from which every task's model can be recovered",
           "Alipour and Amiri", "arXiv", 2025, "2510.14163"),
    Method("icm_fusion", "ICM-Fusion", "merging",
           "Task vectors fused in the latent space of a variational autoencoder",
           "Shao et al.", "AAAI", 2026, "2508.04153"),
    Method("llm_fusion", "Fusion-X", "merging",
           "Several language models distilled into one, each weighted by a learned selector",
           "Kong et al.", "arXiv", 2025, "2505.23844"),
    # sharing
    Method("tangle_nas", "TangleNAS", "sharing",
           "Gradient-based architecture search with entangled weights",
           "Sukthanker et al.", "AutoML", 2024, "2312.10440"),
    Method("learngene", "Learngene by stage-wise sharing", "sharing",
           "A few shared layers expand into networks of any depth", "Xia et al.", "IJCAI", 2024, "2404.16897"),
    Method("mixture_growth", "MixtureGrowth", "sharing",
           "A wider network grown by recombining learned parameters", "Pham et al.", "WACV", 2024, "2311.04251"),
    Method("variant", "VARiant", "sharing",
           "One progressive supernet of visual autoregressive models of several depths",
           "Chen et al.", "CVPR", 2026, "2511.16546"),
    Method("one_quant_llm", "LLM-QFA", "sharing",
           "Quantised language models for many memory budgets, fine-tuned once",
           "Yi et al.", "ACL", 2025, "2405.20202"),
    # training
    Method("adamp", "AdamP", "training",
           "Momentum that does not inflate weights whose scale has no effect",
           "Heo et al.", "ICLR", 2021, "2006.08217"),
    Method("weight_compander", "Weight Compander", "training",
           "A reparametrisation that bounds large weights and wakes small ones",
           "Cakaj et al.", "IJCNN", 2023, "2306.16993"),
    Method("ofq", "OFQ", "training",
           "Quantisation-aware training without oscillating weights", "Liu et al.", "ICML", 2023, "2302.02210"),
    Method("amcl", "AMCL", "training",
           "Contrastive learning with several heads and adaptive temperatures",
           "Wang et al.", "ECCV", 2024, "2310.05615"),
    Method("tat", "TAT", "training",
           "Weights and losses that adapt to the task in all-in-one image restoration",
           "Yang et al.", "MICCAI", 2025, "2512.14550"),
    # shift
    Method("pareto_da", "Pareto domain adaptation", "shift",
           "Source loss and alignment descend together, guided by the target",
           "Lv et al.", "NeurIPS", 2021, "2112.04137"),
    Method("pose_da", "PoseDA", "shift",
           "Global alignment and local augmentation for 3-D human poses", "Chai et al.", "ICCV", 2023, "2303.16456"),
    Method("eacs", "Environment-adaptive covariate selection", "shift",
           "When to trust a spurious covariate: decided per environment",
           "Zuo and Wang", "arXiv", 2026, "2601.02322"),
    # panel
    Method("dml_panel", "Double machine learning for panels", "panel",
           "Causal effects under nonlinear confounding and fixed unobserved differences",
           "Fuhr and Papies", "arXiv", 2024, "2409.01266", "ready"),
    # decisions
    Method("reward_weighting", "Dynamic reward weighting", "decisions",
           "Reward weights that follow what the policy can still learn", "Lu et al.", "arXiv", 2025, "2509.11452"),
    Method("three_body", "Adaptive time steps by reinforcement learning", "decisions",
           "An agent picks the accuracy of a chaotic three-body simulation",
           "Saz Ulibarrena and Portegies Zwart", "Commun. Nonlinear Sci. Numer. Simul.", 2025, "2502.12809"),
)  # fmt: skip


def table() -> pd.DataFrame:
    """One row per method, indexed by slug, in the order of the book.

    >>> table().groupby("part", sort=False).size().to_dict()["tta"]
    3
    """
    rows = [asdict(method) | {"reference": method.reference} for method in METHODS]
    return pd.DataFrame(rows).set_index("slug")


def _rows(part: Part, book: str) -> list[str]:
    """A Markdown table of one part; ``book`` leads from the page to the book's folder. Only ready methods are links."""
    rows = ["| Method | In one line, and the paper |", "|:--|:--|"]
    for method in METHODS:
        if method.part == part.slug:
            ready = method.status == "ready"
            title = f"**[{method.title}]({book}{part.slug}/{method.slug}.ipynb)**" if ready else method.title
            rows.append(f"| {title} | {method.summary}. [{method.reference}]({ARXIV}{method.arxiv}) |")
    return rows


def _count() -> str:
    ready = sum(method.status == "ready" for method in METHODS)
    return f"{ready} of {len(METHODS)} methods are ready: those in **bold**, which link to their chapter."


def readme_table() -> str:
    """The README's table: parts with a ready chapter in full, the others in one line each."""
    ready = {method.part for method in METHODS if method.status == "ready"}
    lines = [_count(), ""]
    for part in (part for part in PARTS if part.slug in ready):
        lines += [f"### {part.title}: {part.adapts}", "", *_rows(part, "book/"), ""]
    lines += ["### Planned", "", "| Part | What adapts | Methods |", "|:--|:--|:--|"]
    for part in (part for part in PARTS if part.slug not in ready):
        titles = ", ".join(method.title for method in METHODS if method.part == part.slug)
        lines.append(f"| {part.title} | {part.adapts} | {titles} |")
    return "\n".join(lines)


def map_page() -> str:
    """The book's map: a short table per part."""
    lines = ["# Map of the book", "", f"What adapts, by which method. {_count()} The others are planned.", ""]
    for part in PARTS:
        lines += [f"## {part.title}", "", f"*{part.adapts[0].upper() + part.adapts[1:]}.*", "", *_rows(part, ""), ""]
    return "\n".join(lines)
