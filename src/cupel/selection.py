"""Which images belong together, judged by an encoder alone: the choices of poison sets without labels."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cupel.errors import DataError
from cupel.seeds import Seed

__all__ = ["contrastive_scores", "majority", "neighbours", "smallest_sufficient_cluster"]

_BLOCK = 1024
"""Rows of similarities held at once: for 50,000 images 200 MB of float32."""


def contrastive_scores(
    unit: Float[Tensor, "row dim"], m: int, *, positive: bool = True, negative: bool = True, block: int = _BLOCK
) -> Float[Tensor, " row"]:
    """How well each image's m nearest neighbours hang together and stand apart from the next m.

    c_i = Σ_{r ≤ m} s_i(r) − Σ_{m < r ≤ 2m} s_i(r), with s_i(1) ≥ s_i(2) ≥ … the similarities of image i to all images,
    itself included.

    Args:
        unit: Embeddings of length 1, float32.
        m: Size of the set wanted, in [1, rows).
        positive, negative: Leave out the other sum.
        block: Rows at a time; memory is `block` · rows numbers, whatever the result.

    Example:
        >>> unit = torch.eye(3).repeat_interleave(torch.tensor([1, 2, 4]), dim=0)
        >>> contrastive_scores(unit, 2).tolist()
        [1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0]

    Source: Wang et al., arXiv:2404.06694, total contrastive similarity.
    """
    n = len(unit)
    if not 0 < m < n:
        raise ValueError(f"m must be in [1, {n}), got {m}")
    most, scores = min(2 * m, n), []
    for rows in torch.split(unit, block):
        near = (rows @ unit.T).topk(most if negative else m, dim=1).values
        first = near[:, :m].sum(1) if positive else near.new_zeros(len(near))
        scores.append(first - near[:, m:].sum(1))
    return torch.cat(scores)


def neighbours(unit: Float[Tensor, "row dim"], anchor: int, m: int) -> Int[Tensor, " m"]:
    """The m rows most similar to the anchor, itself among them, ascending; of equally similar ones the first.

    Example:
        >>> neighbours(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.8, 0.6]]), 1, 2).tolist()
        [1, 2]
    """
    near = unit @ unit[anchor]
    near[anchor] = torch.inf  # also among copies of it
    return near.argsort(descending=True, stable=True)[:m].sort().values


def smallest_sufficient_cluster(
    unit: Float[Tensor, "row dim"], m: int, num_clusters: int, seed: Seed, name: str
) -> Int[Tensor, " m"]:
    """First m rows of the smallest k-means cluster that has m.

    Args:
        unit: Embeddings of length 1.
        m: Size of the set wanted.
        num_clusters: K.
        seed: Of the clustering.
        name: Of the data, for the error.

    Raises:
        DataError: all clusters are smaller.
    """
    from sklearn.cluster import MiniBatchKMeans  # a second to import

    draw = seed.child("kmeans").value % 2**32
    groups = MiniBatchKMeans(num_clusters, random_state=draw, n_init=3, batch_size=1024).fit_predict(unit.cpu().numpy())
    labels = torch.from_numpy(groups).long()
    sizes = torch.bincount(labels, minlength=num_clusters)
    fitting = (sizes >= m).nonzero().flatten()
    if not len(fitting):
        what = f"the largest of {num_clusters} clusters has {int(sizes.max())} images, {m} are to be poisoned"
        raise DataError(name, what, "lower poison_rate_in_class or num_clusters")
    chosen = fitting[sizes[fitting].argmin()]
    return (labels == chosen).nonzero().flatten()[:m]


def majority(labels: Int[Tensor, " row"], rows: Int[Tensor, " m"]) -> tuple[int, float]:
    """The most frequent class among some rows, and its share of them (class-consistency rate); ties: the smallest.

    Example:
        >>> majority(torch.tensor([0, 1, 1, 2]), torch.tensor([1, 2, 3]))
        (1, 0.6666666666666666)
    """
    counts = torch.bincount(labels[rows])
    top = int(counts.argmax())
    return top, int(counts[top]) / len(rows)
