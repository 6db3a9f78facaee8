"""The fusions that `fuse-operators` makes, one pattern a file, in terms of `pattern` and `algebra`.

A pattern's module opens with its equation and conditions and has `match(node, view)`: the fusion that ends or begins at
`node`, or None. `ANCHORS` are the operators `match` wants to see, `OPSET` is the operator set the result needs.
"""
