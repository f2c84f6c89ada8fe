"""What a training step takes of a GPU's memory: predicted from configs alone, measured, and what would save some.

Weights, gradients and optimizer states are counted tensor by tensor on a model without data. What autograd keeps of the
backbone is found by running its layers on tensors without data; what it keeps of the core is a formula
(`core_activations`).
"""
