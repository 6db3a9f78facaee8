"""What is known of a model before it runs: shapes, shape vectors and constants.

`onnx_inference` asks ONNX, `dimensions` computes with sizes that are not known, `facts` knows shapes and integer
vectors made from them, `constants` evaluates what depends on no input, `inferred` puts them together.
"""
