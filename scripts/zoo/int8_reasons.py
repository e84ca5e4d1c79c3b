"""Why operators of a quantized model compute in float."""

from __future__ import annotations

_NORMS = (
    "onnxruntime has no integer kernel for norms; those behind convolutions are folded into them, these follow none"
)
_SHAPES = "onnxruntime has no integer kernel"
_POOLS = "a pool is quantized where it reads what an integer kernel gives, and no split, pad or gate is between"
_FUNCTIONS = (
    "activation functions stay float: a rectifier is part of the kernel before it, others would be rounded twice"
)
_ATTENTION = "a product of two activations, or what lies between two such: attention stays float"
_JOINS = {
    "cnn": "only sums and joins of what integer kernels give are quantized; a gate's factor comes from none",
    "transformer": "between linear layers all stays float, which is faster and more accurate there",
}

_GROUPS: dict[str, tuple[str, ...]] = {
    _NORMS: (
        *("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "GroupNorm"),
        *("SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
        *("RMSNormalization", "LpNormalization"),
    ),
    _SHAPES: (
        *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2", "ReduceSumSquare", "ArgMax", "LSTM", "GRU", "Einsum"),
        *("CumSum", "Sqrt", "Reciprocal", "Pow", "Exp", "Log", "Neg", "Abs", "Max", "Min", "Where", "Clip"),
        "ConvTranspose",
    ),
    _POOLS: ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize"),
    _FUNCTIONS: (
        *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Mish"),
        *("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Erf", "Tanh", "Softplus"),
    ),
    _ATTENTION: ("MatMul", "FusedMatMul", "Softmax", "Attention", "MultiHeadAttention"),
}
_REASONS = {operator: reason for reason, operators in _GROUPS.items() for operator in operators}
_JOINED = frozenset({"Add", "Sub", "Mul", "Div", "Sum", "BiasAdd", "Concat"})


def why_float(operator: str, policy: str) -> str | None:
    """Return why an operator without weights computes in float.

    Args:
        operator: Its name in onnxruntime's optimised graph.
        policy: Where quantizers were placed, ``cnn`` or ``transformer``.

    Returns:
        The reason; None if none is known.
    """
    return _JOINS[policy] if operator in _JOINED else _REASONS.get(operator)
