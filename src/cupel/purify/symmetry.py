"""Hidden channels of a network can be permuted without changing what it computes: which ones, and by which order."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from cupel.errors import DataError
from cupel.inference import evaluating

__all__ = ["ChannelGroups", "Metric", "Moments", "assignment", "permuted"]

Metric = Literal["correlation", "l2"]
State = Mapping[str, Tensor]

_KEEPS = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Dropout)
_KEEPING = {F.relu, torch.relu, torch.flatten, torch.addcmul}
_ADDS = {operator.add, operator.iadd, torch.add}


@dataclass(frozen=True)
class ChannelGroups:
    """Which tensors of a network share an order of channels, and where that order can be seen.

    Args:
        graph: The traced network; it shares all weights.
        members: For each group the entries of the state that follow its order, with the dimension.
        seen: For each group the node whose output shows its channels in dimension 1.
    """

    graph: fx.GraphModule
    members: tuple[tuple[tuple[str, int], ...], ...]
    seen: tuple[fx.Node, ...]

    @staticmethod
    def of(network: nn.Module) -> ChannelGroups:
        """Find the groups of a network of convolutions, linear layers, BatchNorms, ReLUs, pools and sums.

        Everything that is summed shares an order, as a residual stream does. Inputs and outputs keep theirs.

        Raises:
            DataError: the network cannot be traced, or has a part whose channels cannot be followed.

        Example:
            >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
            >>> ChannelGroups.of(net).members
            ((('0.weight', 0), ('0.bias', 0), ('2.weight', 1)),)
        """
        try:
            graph = fx.symbolic_trace(network)
        except Exception as error:  # foreign code: tracing runs it
            what = f"its code cannot be traced ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            raise DataError("encoder", what, "use another purifier") from None
        return _Finder(graph).groups()

    def activations(self, state: State, x: Tensor) -> list[Float[Tensor, "places channels"]]:
        """What each group's channels are on images, every place of every image one row.

        Args:
            state: Weights and statistics to run with.
            x: Images in [0, 1].
        """
        recorder = _Recorder(self.graph, set(self.seen))
        with torch.no_grad(), evaluating(self.graph), _Holding(self.graph, state):
            recorder.run(x)
        made = (recorder.kept[node] for node in self.seen)
        return [one.flatten(2).transpose(1, 2).flatten(0, 1) if one.ndim > 2 else one for one in made]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps some outputs."""

    def __init__(self, graph: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(graph)
        self.wanted, self.kept = wanted, dict[fx.Node, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n in self.wanted:
            self.kept[n] = out.clone()  # an activation in place may come after it
        return out


class _Holding:
    """Other weights in a module inside the `with`."""

    def __init__(self, module: nn.Module, state: State) -> None:
        self.module, self.state = module, state

    def __enter__(self) -> None:
        own = self.module.state_dict()
        self.before = {name: value.clone() for name, value in own.items()}
        for name, value in self.state.items():
            if name in own:  # what the graph does not use is not in it
                own[name].copy_(value)

    def __exit__(self, *error: object) -> None:
        own = self.module.state_dict()
        for name, value in self.before.items():
            own[name].copy_(value)


class _Finder:
    """Follows channels through a graph; groups are joined where tensors are added."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph, self.parts = graph, dict(graph.named_modules())
        self.parent: list[int] = []
        self.group: dict[fx.Node, int | None] = {}
        self.members: list[tuple[int, str, int]] = []

    def groups(self) -> ChannelGroups:
        outputs: set[int] = set()
        for node in self.graph.graph.nodes:
            if node.op == "output":
                outputs |= {group for one in node.all_input_nodes if (group := self.group[one]) is not None}
            else:
                self.group[node] = self._follow(node)
        fixed = {self._root(one) for one in outputs}
        roots = [one for one in dict.fromkeys(self._root(g) for g, _, _ in self.members) if one not in fixed]
        members = tuple(tuple((name, dim) for g, name, dim in self.members if self._root(g) == root) for root in roots)
        last: dict[int, fx.Node] = {}
        for node, one in self.group.items():
            if one is not None and self._shows_places(node, last.get(self._root(one))):
                last[self._root(one)] = node
        return ChannelGroups(self.graph, members, tuple(last[root] for root in roots))

    def _shows_places(self, node: fx.Node, found: fx.Node | None) -> bool:
        """Later is better, but not behind the mean over places."""
        pooled = node.op == "call_method" or node.target is torch.flatten
        return found is None or not pooled

    def _follow(self, node: fx.Node) -> int | None:
        before = [self.group[one] for one in node.all_input_nodes]
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.op == "call_module":
            return self._through(node, before[0])
        if node.op == "call_function" and node.target in _ADDS and len(before) == 2:
            a, b = before
            if a is not None and b is not None:
                self.parent[self._root(a)] = self._root(b)
                return b
        if (node.op == "call_function" and node.target in _KEEPING) or (
            node.op == "call_method" and node.target in ("mean", "relu", "flatten")
        ):
            kept = [one for one in before if one is not None]
            return kept[0] if kept else None
        raise DataError("encoder", f"its channels cannot be followed through '{node.name}'", "use another purifier")

    def _through(self, node: fx.Node, before: int | None) -> int | None:
        name = str(node.target)
        part = self.parts[name]
        if isinstance(part, _ConvNd | nn.Linear):
            if isinstance(part, _ConvNd) and (part.groups != 1 or part.transposed):
                raise DataError("encoder", f"'{name}' is a grouped convolution", "use another purifier")
            if before is not None:
                self.members.append((before, f"{name}.weight", 1))
            self.parent.append(len(self.parent))
            own = len(self.parent) - 1
            self.members.append((own, f"{name}.weight", 0))
            if part.bias is not None:
                self.members.append((own, f"{name}.bias", 0))
            return own
        if isinstance(part, _BatchNorm):
            if before is not None:
                entries = {**part._parameters, **part._buffers}
                self.members += [(before, f"{name}.{k}", 0) for k, v in entries.items() if v is not None and v.ndim]
            return before
        if isinstance(part, _KEEPS):
            return before
        raise DataError("encoder", f"its channels cannot be followed through '{name}'", "use another purifier")

    def _root(self, one: int) -> int:
        while self.parent[one] != one:
            one = self.parent[one]
        return one


def permuted(state: State, groups: ChannelGroups, orders: Sequence[Int[Tensor, " channels"]]) -> dict[str, Tensor]:
    """The state with channel i of group g being what was channel `orders[g][i]`."""
    made = dict(state)
    for entries, order in zip(groups.members, orders, strict=True):
        for name, dim in entries:
            made[name] = made[name].index_select(dim, order.to(made[name].device))
    return {name: value.clone() for name, value in made.items()}


class Moments(NamedTuple):
    """Sums over rows of two sets of channels, from which their likeness follows; float64.

    Args:
        n: Rows.
        a, b: Sums, `[channels]`.
        aa, bb: Sums of squares.
        ab: Sums of products, `[channels, channels]`.
    """

    n: int
    a: Tensor
    b: Tensor
    aa: Tensor
    bb: Tensor
    ab: Tensor

    @staticmethod
    def of(a: Float[Tensor, "rows channels"], b: Float[Tensor, "rows channels"]) -> Moments:
        """Of some rows."""
        a, b = a.double(), b.double()
        return Moments(len(a), a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), a.T @ b)

    def plus(self, other: Moments) -> Moments:
        """Of both sets of rows."""
        sums = (x + y for x, y in zip(self[1:], other[1:], strict=True))
        return Moments(self.n + other.n, *sums)

    def likeness(self, metric: Metric = "correlation") -> Float[Tensor, "channels channels"]:
        """How alike channel i of a and channel j of b are: correlation, or minus the mean squared difference.

        A channel that never changes has correlation 0 with all.

        Example:
            >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
            >>> [round(float(r), 6) for r in Moments.of(x, x).likeness().flatten()]
            [1.0, 0.5, 0.5, 1.0]
        """
        n = self.n
        if metric == "l2":
            return (2 * self.ab - self.aa[:, None] - self.bb) / n
        spread_a, spread_b = (
            square / n - (total / n).square() for square, total in ((self.aa, self.a), (self.bb, self.b))
        )
        together = self.ab / n - torch.outer(self.a, self.b) / n**2
        lively = torch.outer(spread_a > 1e-12 * (self.aa / n), spread_b > 1e-12 * (self.bb / n))
        scale = torch.outer(spread_a.clamp_min(0).sqrt(), spread_b.clamp_min(0).sqrt())
        return torch.where(lively, together / torch.where(lively, scale, 1), 0)


def assignment(alike: Float[Tensor, "channels channels"], best: bool) -> Int[Tensor, " channels"]:
    """The order that makes Σ_i alike[i, order_i] largest, or smallest."""
    _, order = linear_sum_assignment(alike.cpu().numpy(), maximize=best)
    return torch.as_tensor(order)
