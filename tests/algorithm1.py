"""Algorithm 1 of Lin & Yang (arXiv 2401.00110) in plain torch: the oracle of the tests, with nothing of the package."""

import copy

import torch


def freeze(model):
    return copy.deepcopy(model).eval().requires_grad_(False)


def solve(kind, x_t, y, alpha, sigma, velocity=(-1.0, 1.0), sigma_data=0.5):
    """The clean sample and the noise of a prediction y, by the formula of the paper that introduced it."""
    if kind == "epsilon":  # Ho et al. 2020, eq. 15
        return (x_t - sigma * y) / alpha, y
    if kind == "sample":
        return y, (x_t - alpha * y) / sigma
    if kind == "v_prediction":  # Lin & Yang, eqs. 8 and 9; the norm is 1 on a variance-preserving schedule
        norm = alpha**2 + sigma**2
        return (alpha * x_t - sigma * y) / norm, (sigma * x_t + alpha * y) / norm
    if kind == "flow_prediction":  # y = alpha' x_0 + sigma' ε; (-1, 1) on the straight path
        slope, rise = velocity
        clean = (rise * x_t - sigma * y) / (alpha * rise - sigma * slope)
        return clean, (x_t - alpha * clean) / sigma
    assert kind == "edm"  # Karras et al. 2022, eq. 7 and table 1
    skip, out = sigma_data**2 / (sigma**2 + sigma_data**2), sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    clean = skip * x_t + out * y
    return clean, (x_t - clean) / sigma


def features(frozen, layers, call, x, t, cond):
    """One full pass of the frozen model; hooks store the outputs of the layers."""
    stored, modules = {}, dict(frozen.named_modules())
    hooks = [
        modules[n].register_forward_hook(
            lambda m, a, out, n=n: stored.update({n: out[0] if isinstance(out, tuple) else out})
        )
        for n in layers
    ]
    call(frozen, x, t, cond)
    for hook in hooks:
        hook.remove()
    return [stored[n] for n in layers]


def unit(x, dim):
    return x / (x * x).sum(dim, keepdim=True).sqrt()


DISTANCES = {
    "mse": lambda f, g: ((f - g) ** 2).flatten(1).mean(1),
    "mae": lambda f, g: (f - g).abs().flatten(1).mean(1),
    "huber": lambda f, g: torch.where((f - g).abs() < 1, (f - g) ** 2 / 2, (f - g).abs() - 0.5).flatten(1).mean(1),
    "cosine": lambda f, g: 1 - (unit(f.flatten(1), 1) * unit(g.flatten(1), 1)).sum(1),
    "normalised": lambda f, g: (
        ((unit(f, 2) - unit(g, 2)) ** 2).sum(2).mean(1)  # tokens (B, N, C)
        if f.ndim == 3
        else ((unit(f, 1) - unit(g, 1)) ** 2).sum(1).flatten(1).mean(1)
    ),
}


def algorithm1(
    frozen, layers, call, cond, *, clean, noise, model_output, t_prime, at_t, at_t_prime, kind,
    distance="mse", formulation="joint", x_t=None, **constants,
):  # fmt: skip
    """The loss of each sample, (B,); `at_t` and `at_t_prime` are (alpha, sigma), each of shape (B,)."""
    alpha, sigma, alpha_tt, sigma_tt = (
        s.to(clean.dtype).view(-1, *[1] * (clean.ndim - 1)) for s in (*at_t, *at_t_prime)
    )
    x_t = alpha * clean + sigma * noise if x_t is None else x_t  # eq. 2
    clean_hat, noise_hat = solve(kind, x_t, model_output, alpha, sigma, **constants)
    pairs = {"joint": [(clean_hat, noise_hat)], "split": [(clean_hat, noise), (clean, noise_hat)]}[formulation]
    with torch.no_grad():
        true = features(frozen, layers, call, alpha_tt * clean + sigma_tt * noise, t_prime, cond)
    loss = torch.zeros(len(clean))
    for x, e in pairs:  # eqs. 10 to 12, or 14 to 17
        predicted = features(frozen, layers, call, alpha_tt * x + sigma_tt * e, t_prime, cond)
        loss = loss + sum(DISTANCES[distance](f, g) for f, g in zip(predicted, true, strict=True)) / len(layers)
    return loss
