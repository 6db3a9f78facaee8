"""The clean-ups that `simplify` runs, one idea a file; none is a pass by itself.

`redundant` drops nodes that change nothing, `chains` merges neighbours, `duplicates` merges equal subexpressions,
`guarded_onnxsim` runs the onnx-simplifier package where it can do no harm. Constants and shape arithmetic are in
`graphopt.shapes`, since fixing a model's inputs and inspecting it need them too.
"""
