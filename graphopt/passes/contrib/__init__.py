"""ONNX Runtime's own operators (domain com.microsoft), written out in ONNX's: a file for each kind.

Source of what they mean: ONNX Runtime, docs/ContribOperators.md.
"""
