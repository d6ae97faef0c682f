"""Nested samples in plain Python: tensors (B, *), dicts of them, and lists with one tensor per sample."""

import torch


def leaves(sample):
    if isinstance(sample, torch.Tensor):
        return [sample]
    return [leaf for part in (sample.values() if isinstance(sample, dict) else sample) for leaf in leaves(part)]


def mapped(function, sample):
    if isinstance(sample, torch.Tensor):
        return function(sample)
    if isinstance(sample, dict):
        return {key: mapped(function, part) for key, part in sample.items()}
    return [mapped(function, part) for part in sample]


def per_sample(function, scales, *samples):
    """`function(scales, *tensors)`, with one number per scale for each sample of the batch."""
    if isinstance(samples[0], dict):
        return {key: per_sample(function, scales, *(s[key] for s in samples)) for key in samples[0]}
    rows = [
        function([float(scale[i]) for scale in scales], *(sample[i] for sample in samples))
        for i in range(len(samples[0]))
    ]
    return rows if isinstance(samples[0], list) else torch.stack(rows)
