"""Narrowing float32 to float16: numbers, stored weights, whole graphs; for `convert-float16`."""
