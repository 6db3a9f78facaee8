"""What mutations choose from: numbers at the edges, names, places of external data, operators, attributes."""

INTEGERS = (
    0, 1, -1, 2, 3, 7, 8, 64, 255, 256, -2, -8, 65536, 1 << 20, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 40,
    (1 << 62) + 1, (1 << 63) - 1, -(1 << 63),
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, -1e38, float("inf"), float("-inf"), float("nan"), 0.5)
NAMES = ("", "x", "\u00e9\u4e16\U0001f600", "a/b", "../up", "a b\tc", "n" * 5000, "%s%n{}", "None", "\\", "'", '"')
LOCATIONS = (
    "../secret", "/etc/hostname", "sub/../../secret", "link", "hard", "folder", "", ".", "missing", "a\0b", "data",
    "linked/secret", "fifo",
)  # fmt: skip
OPERATORS = (
    "Add", "Div", "Mod", "Mul", "MatMul", "Conv", "ConvTranspose", "Gemm", "Relu", "Softmax", "Reshape",
    "Transpose", "Slice", "Concat", "Split", "Pad", "Resize", "Gather", "GatherND", "ScatterND", "Expand", "Tile",
    "Range", "ConstantOfShape", "Shape", "Squeeze", "Unsqueeze", "ReduceSum", "ReduceMean", "TopK", "NonZero",
    "Where", "Cast", "Identity", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "BatchNormalization",
    "LayerNormalization", "InstanceNormalization", "LSTM", "GRU", "QuantizeLinear", "DequantizeLinear",
    "QLinearMatMul", "QLinearConv", "MatMulInteger", "DynamicQuantizeLinear", "Einsum", "DepthToSpace",
    "SpaceToDepth", "OneHot", "CumSum", "BitShift", "Pow", "Sequence", "SequenceEmpty", "Optional",
    "StringNormalizer", "Loop", "If", "Scan", "NoSuchOperator", "Hardmax", "Flatten", "Dropout", "Constant",
    "GridSample", "RoiAlign", "Det", "Multinomial",
)  # fmt: skip
ATTRIBUTES = (
    "axis", "axes", "group", "kernel_shape", "strides", "pads", "dilations", "auto_pad", "perm", "to", "epsilon",
    "alpha", "keepdims", "transA", "hidden_size", "direction", "blocksize", "value", "mode", "noop_with_empty_axes",
    "num_outputs", "allowzero", "nonsense",
)  # fmt: skip
