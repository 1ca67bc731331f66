"""Whether there can be an optimiser as `trainer` says, found out before anything is written."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from mowe.errors import ConfigError

_OF_A_MODEL = {"params", "model", "optimizer_dict"}
"""Settings of those optimisers that need the parameters of the model themselves."""


def check_optimizer(arguments: TrainingArguments, model: PreTrainedModel) -> None:
    """Raise ConfigError for `optim_args` that the optimiser does not have, and whatever the optimiser itself raises."""
    if arguments.optim_args:
        _check_optim_args(arguments, model)
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if _OF_A_MODEL.isdisjoint(settings):
        optimizer([torch.nn.Parameter(torch.zeros(1))], **settings)


def _check_optim_args(arguments: TrainingArguments, model: PreTrainedModel) -> None:
    """What reads them in `get_optimizer_cls_and_kwargs`, which itself says nothing of those it does not know."""
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext, _parse_optim_args

    given = _Asked(_parse_optim_args(arguments.optim_args))
    values = dict(given)
    context = OptimizerContext(
        args=arguments,
        model=model,
        optimizer_kwargs={"lr": arguments.learning_rate},
        adam_kwargs={"betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon},
        optim_args=given,
    )
    try:
        _OPTIMIZER_HANDLERS[arguments.optim](context)
    except ValueError as error:
        for name, value in values.items():
            if repr(value) in str(error):
                raise ConfigError(f"trainer.optim_args: {name}: {error}") from None
        raise
    for name in values.keys() - given.names.keys():
        known = f"known: {', '.join(given.names)}" if given.names else "it has none"
        raise ConfigError(f"trainer.optim_args: {name} is no setting of optim {arguments.optim.value}; {known}")


class _Asked(dict[str, str]):
    """Settings of which an optimiser takes those that it asks for; their names are noted, other settings it ignores."""

    def __init__(self, settings: dict[str, str]):
        super().__init__(settings)
        self.names: dict[str, None] = {}

    def __contains__(self, name: Any) -> bool:
        self.names[name] = None
        return super().__contains__(name)

    def get(self, name: Any, default: Any = None) -> Any:
        self.names[name] = None
        return super().get(name, default)

    def pop(self, name: Any, *default: Any) -> Any:
        self.names[name] = None
        return super().pop(name, *default)
