"""Kernels of a mixture of encoders: tensors in, tensors out."""

from mowe_kernels.backend import use_backend
from mowe_kernels.nf4 import Nf4Weight, nf4_quantize
from mowe_kernels.ops.encoder_layer import LayerParameters, encoder_layer
from mowe_kernels.ops.encoder_layer_nf4 import Nf4LayerParameters, encoder_layer_nf4
from mowe_kernels.ops.encoder_layers import encoder_layers
from mowe_kernels.ops.grouped_conv1d import grouped_conv1d
from mowe_kernels.ops.grouped_layer_norm import grouped_layer_norm
from mowe_kernels.ops.grouped_linear import grouped_linear
from mowe_kernels.ops.grouped_linear_nf4 import grouped_linear_nf4, multiplies_in_4_bits
from mowe_kernels.ops.grouped_mlp import grouped_mlp
from mowe_kernels.ops.mixture_project import FrameClock, mixture_project
from mowe_kernels.ops.nf4_dequantize_grouped import Nf4Matrix, Nf4Stacks, nf4_dequantize_grouped
from mowe_kernels.ops.pack_plan import pack_plan
from mowe_kernels.ops.route_topk import route_topk
from mowe_kernels.ops.sequence_mean import sequence_mean
from mowe_kernels.ops.sequence_norm import sequence_norm
from mowe_kernels.ops.varlen_attention import varlen_attention
from mowe_kernels.ops.varlen_log_mel import varlen_log_mel
from mowe_kernels.ops.varlen_stft import varlen_stft
from mowe_kernels.plan import FamilyPlan, Level, PackLayout, PackPlan

__all__ = [
    "FamilyPlan",
    "FrameClock",
    "LayerParameters",
    "Level",
    "Nf4LayerParameters",
    "Nf4Matrix",
    "Nf4Stacks",
    "Nf4Weight",
    "PackLayout",
    "PackPlan",
    "encoder_layer",
    "encoder_layer_nf4",
    "encoder_layers",
    "grouped_conv1d",
    "grouped_layer_norm",
    "grouped_linear",
    "grouped_linear_nf4",
    "grouped_mlp",
    "mixture_project",
    "multiplies_in_4_bits",
    "nf4_dequantize_grouped",
    "nf4_quantize",
    "pack_plan",
    "route_topk",
    "sequence_mean",
    "sequence_norm",
    "use_backend",
    "varlen_attention",
    "varlen_log_mel",
    "varlen_stft",
]
