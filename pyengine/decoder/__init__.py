"""The locked forward pass: the layers as their equations, each step an operation of the C core."""
