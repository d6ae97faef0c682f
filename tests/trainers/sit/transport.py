"""Stands in for `transport` of willisma/SiT at 6eafdd0: what `create_transport` gives, as `training_losses` uses it. Own code."""

import enum
import math

import torch


class ModelType(enum.Enum):
    NOISE = 1
    SCORE = 2
    VELOCITY = 3


class ICPlan:
    """x_t = t x1 + (1 − t) x0."""

    def scales(self, t):
        return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


class GVPCPlan:
    """x_t = sin(π t / 2) x1 + cos(π t / 2) x0."""

    def scales(self, t):
        angle, rate = t * math.pi / 2, math.pi / 2
        return angle.sin(), angle.cos(), rate * angle.cos(), -rate * angle.sin()


class VPCPlan:
    pass


class Transport:
    def __init__(self, model_type, path_sampler, eps):
        self.model_type, self.path_sampler, self.train_eps, self.sample_eps = model_type, path_sampler, eps, eps

    def check_interval(self, train_eps, sample_eps):
        velocity = self.model_type is ModelType.VELOCITY
        return (0, 1) if velocity else (train_eps, 1 - train_eps)

    def sample(self, x1):
        x0 = torch.randn_like(x1)
        low, high = self.check_interval(self.train_eps, self.sample_eps)
        return torch.rand(len(x1)) * (high - low) + low, x0, x1

    def training_losses(self, model, x1, model_kwargs=None):
        t, x0, x1 = self.sample(x1)
        alpha, sigma, rise, fall = (scale.view(-1, 1, 1, 1) for scale in self.path_sampler.scales(t))
        output = model(alpha * x1 + sigma * x0, t, **(model_kwargs or {}))
        if self.model_type is ModelType.VELOCITY:
            error = output - (rise * x1 + fall * x0)
        else:
            error = output - x0 if self.model_type is ModelType.NOISE else output * sigma + x0
        return {"pred": output, "loss": (error**2).flatten(1).mean(1)}


def create_transport(path_type="Linear", prediction="velocity"):
    path = {"Linear": ICPlan, "GVP": GVPCPlan, "VP": VPCPlan}[path_type]()
    kind = {"noise": ModelType.NOISE, "score": ModelType.SCORE}.get(prediction, ModelType.VELOCITY)
    return Transport(kind, path, 0 if kind is ModelType.VELOCITY else 1e-3)


class Sampler:
    def __init__(self, transport):
        self.transport = transport

    def sample_ode(self):
        return self.transport.check_interval(0, 0)
