"""MESO of BOAT (its MEHA) on label cleaning, from a checkout of its repository; nothing of it is in this one.

It needs torch, higher and matplotlib, which this package does not.
"""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from label_cleaning_engines import PENALTY


class Meso:
    """All rows, from w = lam = 0, with the steps of `bilevel.MEHA(step, c=c)` under `optax.sgd(rate)`.

    The penalty is BOAT's, `c (k + 1)^1/4` and .2 at the first step.
    """

    def __init__(self, path: Path, train: dict, trusted: dict, classes: int):
        if str(path) not in sys.path:
            sys.path.append(str(path))
        self.torch: Any = importlib.import_module("torch")
        self.boat: Any = importlib.import_module("boat_torch")
        self.torch.set_num_threads(1)  # faster than two here
        self.classes = classes
        rows = lambda level: {
            "data": self.torch.tensor(np.asarray(level["X"])),
            "target": self.torch.tensor(np.asarray(level["y"]), dtype=self.torch.int64),
        }
        self.train, self.trusted = rows(train), rows(trusted)

    def started(self, step: float, rate: float, c: float) -> "Run":
        torch = self.torch
        losses = self.torch.nn.functional.cross_entropy
        weigh = torch.nn.Module()
        weigh.lam = torch.nn.Parameter(torch.zeros(len(self.train["target"])))
        model = torch.nn.Linear(self.train["data"].shape[1], self.classes, bias=False)
        torch.nn.init.zeros_(model.weight)

        def inner(rows: dict, weigh: Any, model: Any) -> Any:
            own = losses(model(rows["data"]), rows["target"], reduction="none")
            return (torch.sigmoid(weigh.lam) * own).mean() + PENALTY * model.weight.square().sum()

        def outer(rows: dict, weigh: Any, model: Any) -> Any:
            return losses(model(rows["data"]), rows["target"])

        # It asks for the losses by the name of a module.
        module = types.ModuleType("boat_losses")
        vars(module).update(inner=inner, outer=outer)
        sys.modules["boat_losses"] = module
        gamma = 20 * step
        config = {
            "fo_op": "MESO", "gm_op": None, "na_op": None, "lower_level_model": model,
            "upper_level_model": weigh, "lower_level_var": list(model.parameters()),
            "upper_level_var": list(weigh.parameters()),
            "lower_level_opt": torch.optim.SGD(model.parameters(), lr=step),
            "upper_level_opt": torch.optim.SGD(weigh.parameters(), lr=rate * c),
            "device": "cpu", "lower_iters": 1, "fo_ol_batch_input": False, "return_grad": False,
            "loss_log_path": "",
            "MESO": {"eta": 1 / (0.5 / step + 1 / gamma), "gamma_1": 1 / gamma, "c0": c, "y_hat_lr": 0.1},
        }  # fmt: skip
        names = {"inner": "lower_level_loss", "outer": "upper_level_loss"}
        functions = {names[name]: {"function": f"boat_losses.{name}"} for name in names}
        solver = self.boat.Problem(config, functions).build_ll_solver()
        return Run(solver._fo_op_solver, config["upper_level_opt"], self.train, self.trusted)


class Run:
    """Steps of MESO and of the rule for lam, without the losses and the file that `run_iter` writes at each step."""

    def __init__(self, solver: Any, rule: Any, train: dict, trusted: dict):
        self.solver, self.rule, self.rows, self.steps = solver, rule, (train, trusted), 0

    def go(self, count: int) -> None:
        for _ in range(count):
            self.solver.optimize(*self.rows, self.steps)
            self.rule.step()
            self.rule.zero_grad()
            self.steps += 1

    def point(self) -> tuple[Array, Array]:
        """`w` (features, classes) and `lam`."""
        w, lam = self.solver.ll_var[0], self.solver.ul_var[0]
        return jnp.asarray(w.detach().numpy().T), jnp.asarray(lam.detach().numpy())
