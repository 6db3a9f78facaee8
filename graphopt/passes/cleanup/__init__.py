"""The clean-ups that `simplify` runs, one idea a file; none is a pass by itself.

`constants` evaluates what does not depend on an input, `shapes` reasons about shape arithmetic with symbolic
dimensions, `redundant` drops nodes that change nothing, `chains` merges neighbours, `duplicates` merges equal
subexpressions, `guarded_onnxsim` runs the onnx-simplifier package where it can do no harm.
"""
