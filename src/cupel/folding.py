"""Frozen BatchNorm folded into the convolution before it: differentiably for training, for good for inference."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from cupel.encoders import ImageEncoder
from cupel.protocols import Encoder, Images

__all__ = ["Folded", "FoldedConv", "bf16_pays", "folded", "inference_copy"]


class FoldedConv(nn.Module):
    """A convolution and the BatchNorm after it, on its running statistics, as one convolution.

    W' = W · s and b' = β + (b − μ) · s with s = γ / √(σ² + ε), computed anew in every call: gradients reach W and b
    exactly as through the two modules, and γ and β where they are trained. Weight decay acts on W, not on W'.

    Args:
        conv, norm: Shared with the network they come from, not copied.
    """

    def __init__(self, conv: _ConvNd, norm: _BatchNorm) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """W' and b'."""
        conv, norm = self.conv, self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        offset = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
        bias = offset * scale if norm.bias is None else torch.addcmul(norm.bias, offset, scale)
        return conv.weight * scale.view(-1, *[1] * (conv.weight.ndim - 1)), bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv._conv_forward(x, *self.weight_and_bias())
        return out


@dataclass(frozen=True, eq=False)
class Folded:
    """An encoder whose BatchNorms are folded; implements `Encoder`.

    Args:
        module: The folded network.
        width: Dimensions of the embedding.
        input_size: Side of the images in pixels.
        dtype: bfloat16 = the network runs in it; the images may stay float32.
    """

    module: nn.Module
    width: int
    input_size: int
    dtype: torch.dtype = torch.float32

    def __call__(self, x: Images, /) -> Float[Tensor, "batch width"]:
        """Embeddings."""
        # autocast rounds what enters a convolution and leaves the normalisation of the pixels in float32
        with torch.autocast(x.device.type, self.dtype) if self.dtype == torch.bfloat16 else nullcontext():
            out: Tensor = self.module(x)
        return out


def folded(encoder: Encoder) -> Encoder:
    """The same encoder computing each convolution and its BatchNorm in one go, for training with frozen statistics.

    It shares every parameter with `encoder`, so training either trains both, and gradients are those of the unfolded
    network with its BatchNorms in eval mode, whatever mode they are in. Encoders whose code cannot be traced, and those
    that are not `ImageEncoder`s, are returned as they are.

    Example:
        >>> from cupel.encoders import Fast
        >>> from cupel.seeds import Seed
        >>> encoder = Fast(width=4).build(Seed(0))
        >>> x = torch.rand(2, 3, 32, 32)
        >>> bool(torch.allclose(folded(encoder)(x), encoder(x), atol=1e-5))
        True

    Source: the identity is textbook (Jacob et al., CVPR 2018, arXiv:1712.05877, eq. 14, in a form for training); that
        a frozen BatchNorm allows it throughout an attack or a purification is our observation.
    """
    if not isinstance(encoder, ImageEncoder):
        return encoder
    module = _fold(encoder.module)
    return encoder if module is None else Folded(module, encoder.width, encoder.input_size)


def inference_copy(encoder: Encoder, dtype: torch.dtype = torch.float32) -> Encoder:
    """A frozen copy with BatchNorm multiplied into the weights; gradients flow to the images alone.

    Args:
        encoder: Any; encoders that cannot be folded are returned as they are.
        dtype: `torch.bfloat16` rounds the weights as well. Check the result: see `cupel.inference.features`.

    Example:
        >>> from cupel.encoders import Fast
        >>> from cupel.seeds import Seed
        >>> encoder = Fast(width=4).build(Seed(0))
        >>> sum("bn" in name for name, _ in inference_copy(encoder).module.named_modules())
        0
    """
    if not isinstance(encoder, ImageEncoder):
        return encoder
    module = _fold(copy.deepcopy(encoder.module).eval())
    if module is None:
        return encoder
    for name, part in list(module.named_modules()):
        if isinstance(part, FoldedConv):
            module.set_submodule(name, _solid(part))
    module.delete_all_unused_submodules()
    for part in module.modules():
        if isinstance(part, _ConvNd | nn.Linear):
            part.to(dtype)
    module.requires_grad_(False)
    return Folded(module, encoder.width, encoder.input_size, dtype)


def bf16_pays(device: torch.device) -> bool:
    """Whether bfloat16 is done by the hardware: on CUDA, and on processors with AVX512-BF16 or AMX.

    Elsewhere it is emulated, several times slower than float32.
    """
    if device.type != "cpu":
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _fold(module: nn.Module) -> fx.GraphModule | None:
    """`module` as a graph with `FoldedConv`s; None where it cannot be traced or has nothing to fold."""
    try:
        graph_module = fx.symbolic_trace(module)
    except Exception:  # foreign code: whatever it does that cannot be traced, the unfolded network is right
        return None
    parts = dict(graph_module.named_modules())
    pairs = 0
    for node in list(graph_module.graph.nodes):
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        conv, norm = parts.get(str(source.target)), parts.get(str(node.target))
        if not isinstance(conv, _ConvNd) or not isinstance(norm, _BatchNorm) or not _matches(conv, norm):
            continue
        name = f"folded_{pairs}"
        graph_module.add_submodule(name, FoldedConv(conv, norm))
        with graph_module.graph.inserting_before(node):
            made = graph_module.graph.call_module(name, source.args, source.kwargs)
        node.replace_all_uses_with(made)
        graph_module.graph.erase_node(node)
        graph_module.graph.erase_node(source)
        pairs += 1
    if pairs == 0:
        return None
    graph_module.recompile()
    return graph_module


def _matches(conv: _ConvNd, norm: _BatchNorm) -> bool:
    return (
        not conv.transposed
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_features == conv.out_channels
    )


def _solid(part: FoldedConv) -> _ConvNd:
    """A plain convolution that computes what `part` does."""
    solid = copy.deepcopy(part.conv)
    with torch.no_grad():
        weight, bias = part.weight_and_bias()
        solid.weight, solid.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return solid
