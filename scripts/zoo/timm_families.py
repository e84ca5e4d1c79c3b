"""timm: thirty families of different kinds, the smallest model of each."""

from __future__ import annotations

from scripts.zoo.timm_models import build as build

_CONVOLUTIONAL = (
    *("resnet10t", "repvgg_a0", "regnetx_002", "densenet121", "dla46x_c", "res2next50", "skresnet18"),
    *("cs3darknet_focus_s", "hgnetv2_b0", "nf_regnet_b0"),
)
_DEPTHWISE = (
    *("mobilenetv2_035", "mobilenetv3_small_050", "rexnet_100", "ghostnet_050", "starnet_s050", "mobileone_s1"),
    "convnext_zepto_rms",
)
_TRANSFORMERS = (*("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "pit_ti_224", "convit_tiny"),)
_HYBRIDS = ("mobilevit_xxs", "edgenext_xx_small", "levit_128s", "efficientvit_b0", "efficientformer_l1")
_MIXERS = ("mixer_s32_224", "gmlp_ti16_224", "poolformerv2_s12")


def names() -> list[str]:
    """Return the thirty models."""
    return [*_CONVOLUTIONAL, *_DEPTHWISE, *_TRANSFORMERS, *_HYBRIDS, *_MIXERS]
